"""Real models of many families, tiny and made from their configurations, and batches for them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCAB, WIDTH, TOKENS = 61, 16, (2, 7)

# What the configurations share; GPT-2 and its kin have other names for the same.
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.4,  # logits of a spread that is not tiny
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
MAMBA = {"mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
# name: (class of the configuration and of the model without their endings, what is particular to it)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama_tied": ("Llama", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "mistral": ("Mistral", {}),
    "gemma2": ("Gemma2", {"final_logit_softcapping": 5.0}),
    "gemma3": ("Gemma3", {}),
    "gemma3_softcap": ("Gemma3", {"final_logit_softcapping": 5.0}),
    "cohere": ("Cohere", {"logit_scale": 0.25}),
    "cohere2": ("Cohere2", {"logit_scale": 0.25}),
    "granite": ("Granite", {"logits_scaling": 3.0}),
    "granitemoe": ("GraniteMoe", {"logits_scaling": 3.0}),
    "hyperclovax": ("HyperCLOVAX", {"logits_scaling": 3.0}),
    "minicpm3": ("MiniCPM3", {"dim_model_base": 4, **LATENT}),
    "falcon_h1": ("FalconH1", {"lm_head_multiplier": 0.5, **MAMBA}),
    "recurrent_gemma": ("RecurrentGemma", {"logits_soft_cap": 5.0, "lru_width": WIDTH, "block_types": ["recurrent", "attention"]}),
    "nanochat": ("NanoChat", {"final_logit_softcapping": 5.0}),
    "phi": ("Phi", {}),
    "phi3": ("Phi3", {}),
    "gpt2": ("GPT2", {"n_embd": WIDTH, "n_layer": 2, "n_head": 2, "n_positions": 64}),
    "gptj": ("GPTJ", {"n_embd": WIDTH, "n_layer": 2, "n_head": 2, "rotary_dim": 4}),
    "gpt_neox": ("GPTNeoX", {}),
    "opt": ("OPT", {"ffn_dim": 24, "word_embed_proj_dim": 12}),
    "olmo2": ("Olmo2", {}),
    "mpt": ("Mpt", {"d_model": WIDTH, "n_heads": 2, "n_layers": 2, "logit_scale": 0.5}),
    "mamba": ("Mamba", {"state_size": 4}),
    "starcoder2": ("Starcoder2", {}),
    "stablelm": ("StableLm", {}),
    "bloom": ("Bloom", {"n_head": 2, "n_layer": 2}),
    "biogpt": ("BioGpt", {}),
    "modernbert_decoder": ("ModernBertDecoder", {"global_attn_every_n_layers": 2}),
    "deepseek_v3": (
        "DeepseekV3",
        {"n_group": 1, "topk_group": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, **LATENT},
    ),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}),
    "glm4": ("Glm4", {}),
    "rwkv": ("Rwkv", {"attention_hidden_size": WIDTH}),
}
HEADS = {
    "gemma2": {"softcap": 5.0},
    "gemma3_softcap": {"softcap": 5.0},
    "recurrent_gemma": {"softcap": 5.0},
    "nanochat": {"softcap": 5.0},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25},
    "granite": {"logit_scale": 1 / 3.0},
    "granitemoe": {"logit_scale": 1 / 3.0},
    "hyperclovax": {"logit_scale": 3.0},
    "falcon_h1": {"logit_scale": 0.5},
}


def config(name: str, **more: Any) -> Any:
    family, particular = MODELS[name]
    given = {**COMMON, **particular, **more}
    configuration = getattr(transformers, f"{family}TextConfig" if family == "Gemma3" else f"{family}Config")
    if family in ("GPT2", "GPTJ", "Mpt"):
        given = {key: value for key, value in given.items() if key not in COMMON or key == "vocab_size" or key.endswith("token_id")}
    made = configuration(**given)
    made._attn_implementation = made._experts_implementation = "eager"  # these take float64
    return made


def model_class(name: str) -> Any:
    family = MODELS[name][0]
    return getattr(transformers, "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM")


def build(name: str, cls: Any = None, seed: int = 0, **more: Any) -> Any:
    """cls: a class of the user's own in place of the model's."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = (cls or model_class(name))(config(name, **more))
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):  # zero at first, which would hide a bias that is lost
                nn.init.normal_(parameter)
    return model.eval()


def batch(seed: int = 1, tokens: tuple[int, ...] = TOKENS, vocab: int = VOCAB) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocab, tokens, generator=generator)
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def labels(inputs: dict[str, Tensor]) -> Tensor:
    targets = inputs["input_ids"].roll(-1, -1)
    targets[:, -1] = -100
    return targets

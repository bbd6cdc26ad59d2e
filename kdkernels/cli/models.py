"""Output heads of well known models, and how to name others on the command line."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class HeadShape:
    """An output head. vocab: rows V, padding included. dim: hidden size D.

    name: what it was asked for by. tokenizer: whose tokens the rows are, "" where that is not known. folder: of its tokenizer.json.
    Two heads of the same sizes are equal, whoever's they are.
    """

    vocab: int
    dim: int
    name: str = field(default="", compare=False)
    tokenizer: str = field(default="", compare=False)
    folder: Path | None = field(default=None, compare=False)

    @property
    def sizes(self) -> str:
        return f"{self.vocab}x{self.dim}"


# Tokenizer, owner on the hub, and vocab_size (padding included) and hidden_size of config.json, or of the text_config in it.
# Each was read in a public source, whose letter stands at its group:
# A  ai-dynamo/aiconfigurator 095f58a, model_configs: copies of config.json
# B  NVIDIA-NeMo/Megatron-Bridge 067f987, tests/unit_tests/models: copies of config.json
# C  mlc-ai/mlc-llm 79d603f, model_preset.py: copies of config.json
# L  Lightning-AI/litgpt 2685705, litgpt/config.py: n_embd and padded_vocab_size of a name of the hub
# M  AI-Hypercomputer/maxtext e591f30, configs/models
# S  THUDM/slime 624b824, scripts/models
# T  transformers 5.23, defaults of the configuration class whose documentation names this model
# Models of one tokenizer may differ in padding and in added tokens, as Qwen2.5 and Qwen3 do.
_TABLE: tuple[tuple[str, str, dict[str, tuple[int, int]]], ...] = (
    # L, S
    (
        "Qwen2",
        "Qwen",
        {
            "Qwen2.5-0.5B": (151_936, 896),
            "Qwen2.5-1.5B": (151_936, 1536),
            "Qwen2.5-3B": (151_936, 2048),
            "Qwen2.5-7B": (152_064, 3584),
            "Qwen2.5-14B": (152_064, 5120),
            "Qwen2.5-32B": (152_064, 5120),
            "Qwen2.5-72B": (152_064, 8192),
            "Qwen3-0.6B": (151_936, 1024),
            "Qwen3-1.7B": (151_936, 2048),
            "Qwen3-4B": (151_936, 2560),
            "Qwen3-8B": (151_936, 4096),
            "Qwen3-14B": (151_936, 5120),
            "Qwen3-32B": (151_936, 5120),
            "Qwen3-30B-A3B": (151_936, 2048),
            "Qwen3-235B-A22B": (151_936, 4096),
            # A
            "Qwen3-Coder-480B-A35B": (151_936, 6144),
            # M, S, T
            "Qwen3-Next-80B-A3B": (151_936, 2048),
        },
    ),
    # config.json in Captainphiora/qwen-ascend-llm for 1.5B; printed head in a log of 7B (Linear of 3,584 and 152,064)
    (
        "Qwen2",
        "deepseek-ai",
        {"DeepSeek-R1-Distill-Qwen-1.5B": (151_936, 1536), "DeepSeek-R1-Distill-Qwen-7B": (152_064, 3584)},
    ),
    # A; S for 0.8B, 4B and 9B; pytorch/torchtitan b5bcd76 for 2B
    (
        "Qwen3.5",
        "Qwen",
        {
            "Qwen3.5-0.8B": (248_320, 1024),
            "Qwen3.5-2B": (248_320, 2048),
            "Qwen3.5-4B": (248_320, 2560),
            "Qwen3.5-9B": (248_320, 4096),
            "Qwen3.5-27B": (248_320, 5120),
            "Qwen3.5-35B-A3B": (248_320, 2048),
            "Qwen3.5-122B-A10B": (248_320, 3072),
            "Qwen3.5-397B-A17B": (248_320, 4096),
            "Qwen3.6-27B": (248_320, 5120),
            "Qwen3.6-35B-A3B": (248_320, 2048),
        },
    ),
    # A for 3.1, C for 3.1 and 3.2, L, M for 3.3
    (
        "Llama-3",
        "meta-llama",
        {
            "Llama-3.1-8B": (128_256, 4096),
            "Llama-3.1-70B": (128_256, 8192),
            "Llama-3.1-405B": (128_256, 16_384),
            "Llama-3.2-1B": (128_256, 2048),
            "Llama-3.2-3B": (128_256, 3072),
            "Llama-3.3-70B": (128_256, 8192),
        },
    ),
    # L
    (
        "Llama-3",
        "deepseek-ai",
        {"DeepSeek-R1-Distill-Llama-8B": (128_256, 4096), "DeepSeek-R1-Distill-Llama-70B": (128_256, 8192)},
    ),
    # A, M
    ("Llama-4", "meta-llama", {"Llama-4-Scout-17B-16E": (202_048, 5120), "Llama-4-Maverick-17B-128E": (202_048, 5120)}),
    # C, L
    ("Gemma-2", "google", {"Gemma-2-2B": (256_000, 2304), "Gemma-2-9B": (256_000, 3584), "Gemma-2-27B": (256_000, 4608)}),
    # C for 1B, B for 4B and 27B, hidden size of 12B L and M; from 4B on the text_config leaves vocab_size to transformers: T
    (
        "Gemma-3",
        "google",
        {
            "Gemma-3-1B": (262_144, 1152),
            "Gemma-3-4B": (262_208, 2560),
            "Gemma-3-12B": (262_208, 3840),
            "Gemma-3-27B": (262_208, 5376),
        },
    ),
    # T
    ("Gemma-3n", "google", {"Gemma-3n-E4B": (262_400, 2048)}),
    # A for 26B and 31B, M
    (
        "Gemma-4",
        "google",
        {
            "Gemma-4-E2B": (262_144, 1536),
            "Gemma-4-E4B": (262_144, 2560),
            "Gemma-4-26B-A4B": (262_144, 2816),
            "Gemma-4-31B": (262_144, 5376),
        },
    ),
    # C, L
    ("Mistral-v1", "mistralai", {"Mistral-7B-v0.1": (32_000, 4096), "Mistral-7B-v0.2": (32_000, 4096)}),
    ("Mistral-v3", "mistralai", {"Mistral-7B-v0.3": (32_768, 4096), "Mistral-Large": (32_768, 12_288)}),
    # config.json in kevinstephano/thunder_model_blocks for Nemo; C and B for 3B, T for 8B
    ("Mistral-Nemo", "mistralai", {"Mistral-Nemo": (131_072, 5120)}),
    ("Ministral-3", "mistralai", {"Ministral-3-3B": (131_072, 3072), "Ministral-3-8B": (131_072, 4096)}),
    # L; C calls its Phi-4-mini phi-4
    ("Phi-3", "microsoft", {"Phi-3-mini-4k": (32_064, 3072), "Phi-3.5-mini": (32_064, 3072)}),
    ("Phi-4", "microsoft", {"Phi-4": (100_352, 5120)}),
    ("Phi-4-mini", "microsoft", {"Phi-4-mini": (200_064, 3072)}),
    # C, L
    (
        "SmolLM2",
        "HuggingFaceTB",
        {"SmolLM2-135M": (49_152, 576), "SmolLM2-360M": (49_152, 960), "SmolLM2-1.7B": (49_152, 2048)},
    ),
    # T, and fetchwiki/HuggingFaceTB-SmolLM3-3B
    ("SmolLM3", "HuggingFaceTB", {"SmolLM3-3B": (128_256, 2048)}),
    # C, L
    ("OLMo-2", "allenai", {"OLMo-2-7B": (100_352, 4096), "OLMo-2-13B": (100_352, 5120), "OLMo-2-32B": (100_352, 5120)}),
    # M
    ("OLMo-3", "allenai", {"OLMo-3-7B": (100_278, 4096), "OLMo-3-32B": (100_278, 5120)}),
    # A, M, T
    ("gpt-oss", "openai", {"gpt-oss-20b": (201_088, 2880), "gpt-oss-120b": (201_088, 2880)}),
    # A
    (
        "DeepSeek-V3",
        "deepseek-ai",
        {
            "DeepSeek-V3": (129_280, 7168),
            "DeepSeek-R1": (129_280, 7168),
            "DeepSeek-V3.1": (129_280, 7168),
            "DeepSeek-V3.2": (129_280, 7168),
        },
    ),
    ("DeepSeek-V4", "deepseek-ai", {"DeepSeek-V4-Flash": (129_280, 4096), "DeepSeek-V4-Pro": (129_280, 7168)}),
    # S; B for 4.5
    (
        "GLM-4",
        "zai-org",
        {
            "GLM-4-9B": (151_552, 4096),
            "GLM-4-32B": (151_552, 6144),
            "GLM-4.5": (151_552, 5120),
            "GLM-4.5-Air": (151_552, 4096),
        },
    ),
    # S; A for 5 and later
    ("GLM-4.7", "zai-org", {"GLM-4.7-Flash": (154_880, 2048)}),
    ("GLM-5", "zai-org", {"GLM-5": (154_880, 6144), "GLM-5.1": (154_880, 6144), "GLM-5.2": (154_880, 6144)}),
    # A, S
    ("Kimi-K2", "moonshotai", {"Kimi-K2": (163_840, 7168), "Kimi-K2.5": (163_840, 7168), "Kimi-K2.6": (163_840, 7168)}),
    ("Moonlight", "moonshotai", {"Moonlight-16B-A3B": (163_840, 2048)}),
    # A, S
    ("MiniMax-M2", "MiniMaxAI", {"MiniMax-M2": (200_064, 3072), "MiniMax-M2.5": (200_064, 3072), "MiniMax-M2.7": (200_064, 3072)}),
    # the model table of a public calculator of training throughput, "confirmed" there by the headers of the weights
    ("Granite-3", "ibm-granite", {"Granite-3.3-8B": (49_159, 4096)}),
    (
        "Granite-4",
        "ibm-granite",
        {
            "Granite-4.0-350M": (100_352, 1024),
            "Granite-4.0-1B": (100_352, 2048),
            "Granite-4.0-micro": (100_352, 2560),
            "Granite-4.0-H-micro": (100_352, 2048),
            "Granite-4.0-H-tiny": (100_352, 1536),
            "Granite-4.0-H-small": (100_352, 4096),
        },
    ),
    # L
    (
        "Falcon3",
        "tiiuae",
        {
            "Falcon3-1B": (131_072, 2048),
            "Falcon3-3B": (131_072, 3072),
            "Falcon3-7B": (131_072, 3072),
            "Falcon3-10B": (131_072, 3072),
        },
    ),
    # T
    ("LFM2", "LiquidAI", {"LFM2-8B-A1B": (65_536, 2048)}),
    # A
    (
        "Nemotron-3",
        "nvidia",
        {"NVIDIA-Nemotron-3-Nano-30B-A3B": (131_072, 2688), "NVIDIA-Nemotron-3-Super-120B-A12B": (131_072, 4096)},
    ),
)
HEADS = {name: HeadShape(*sizes, name, tokenizer) for tokenizer, _, heads in _TABLE for name, sizes in heads.items()}
OWNERS = {name: owner for _, owner, heads in _TABLE for name in heads}
# Parts of a name on the hub that say how a model was trained on, by whom and when, and nothing of its head.
TRAINING = re.compile(r"instruct|it|base|chat|pt|hf|meta|thinking|reasoning|plus|bf16|1m|[0-9]{4}")

SIZES = re.compile(r"([0-9]+)x([0-9]+)")
# Heads beyond this are typing errors: a thousand times the largest vocabulary and hidden size there are.
LARGEST = 2**28


def plain(name: str) -> str:
    """A name without what says nothing of the head."""
    name = re.sub(r"^qwen2\.5-(coder|math)-", "qwen2.5-", name.lower())
    return "-".join(part for part in name.split("-") if not TRAINING.fullmatch(part))


_PLAIN = {plain(name): name for name in HEADS}


def of_table(text: str) -> HeadShape | None:
    """The table's head of a bare name, or of an owner's model; what others publish under the same name may differ."""
    owner, _, name = text.rpartition("/")
    found = _PLAIN.get(plain(name))
    if found is None or (owner and owner.lower() != OWNERS[found].lower()):
        return None
    return HEADS[found]

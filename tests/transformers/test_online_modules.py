"""The modules of a teacher that OKD adapts: queries and values of every layer of every family, and nothing else."""

from __future__ import annotations

import pytest
from torch import nn

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
from kdkernels.transformers.online import OnlineTeacher, query_value_modules  # noqa: E402
from tests.support.tiny_models import MODELS, build  # noqa: E402

SEPARATE, LATENT = ("q_proj", "v_proj"), ("q_b_proj", "kv_b_proj")
# family: (where its attention is, for the number of a layer; the modules in it), read off the modules' names by hand
ATTENTION: dict[str, tuple[str, tuple[str, ...]]] = {
    **dict.fromkeys(
        (
            *("llama", "llama_tied", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "gemma3_softcap", "cohere", "cohere2"),
            *("granite", "granitemoe", "hyperclovax", "falcon_h1", "nanochat", "phi", "olmo2", "starcoder2", "stablelm"),
            *("qwen3_moe", "glm4"),
        ),
        ("model.layers.{}.self_attn", SEPARATE),
    ),
    "minicpm3": ("model.layers.{}.self_attn", LATENT),
    "deepseek_v3": ("model.layers.{}.self_attn", LATENT),
    "recurrent_gemma": ("model.layers.{}.temporal_block", SEPARATE),  # in its second layer only
    "phi3": ("model.layers.{}.self_attn", ("qkv_proj",)),
    "gpt2": ("transformer.h.{}.attn", ("c_attn",)),
    "gptj": ("transformer.h.{}.attn", SEPARATE),
    "gpt_neox": ("gpt_neox.layers.{}.attention", ("query_key_value",)),
    "opt": ("model.decoder.layers.{}.self_attn", SEPARATE),
    "mpt": ("transformer.blocks.{}.attn", ("Wqkv",)),
    "bloom": ("transformer.h.{}.self_attention", ("query_key_value",)),
    "biogpt": ("biogpt.layers.{}.self_attn", SEPARATE),
    "modernbert_decoder": ("model.layers.{}.attn", SEPARATE),
}
WITHOUT = ("mamba", "rwkv")


def expected_names(family: str) -> list[str]:
    attention, names = ATTENTION[family]
    layers = (1,) if family == "recurrent_gemma" else (0, 1)
    return [f"{attention.format(layer)}.{name}" for layer in layers for name in names]


# what is adapted


def test_the_table_has_every_family() -> None:
    assert {*ATTENTION, *WITHOUT} == set(MODELS)


@pytest.mark.parametrize("family", ATTENTION)
def test_queries_and_values_of_every_layer_carry_lora_and_nothing_else_does(family: str) -> None:
    model = build(family)
    assert sorted(query_value_modules(model)) == sorted(expected_names(family))
    originals = {name: model.get_submodule(name) for name in expected_names(family)}
    teacher = OnlineTeacher(model, rank=2)
    prefix = "base_model.model."
    assert {name.partition(".lora_")[0] for name in teacher.named_parameters()} == {prefix + name for name in originals}
    for name, original in originals.items():
        assert teacher.model.get_submodule(prefix + name).base_layer is original


@pytest.mark.parametrize("family", WITHOUT)
def test_a_model_without_attention_is_refused_and_named_modules_are_taken(family: str) -> None:
    with pytest.raises(ValueError, match=r"looked for linear modules called q_proj.*qkv_proj.*okd_target_modules"):
        OnlineTeacher(build(family))
    name = {"mamba": "in_proj", "rwkv": "receptance"}[family]
    teacher = OnlineTeacher(build(family), rank=2, target_modules=[name])
    assert all(f".{name}.lora_" in key for key in teacher.named_parameters())


class Layer(nn.Module):
    """Linear modules by name, and modules below them."""

    def __init__(self, *names: str, **below: nn.Module) -> None:
        super().__init__()
        for name in names:
            setattr(self, name, nn.Linear(2, 2))
        for name, module in below.items():
            setattr(self, name, module)


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (Layer("query", "key", "value"), ["query", "value"]),
        (Layer("q", "k", "v", "o"), ["q", "v"]),
        (Layer("Wq", "Wk", "Wv", "dense"), ["Wq", "Wv"]),
        (Layer("W_pack", "o_proj"), ["W_pack"]),
        (Layer("q_proj", "kv_a_proj_with_mqa", "kv_b_proj"), ["q_proj", "kv_b_proj"]),  # DeepSeek-V2-Lite: queries of full rank
        (Layer("q_b_proj", "kv_proj", indexer=Layer("q_b_proj", "kv_proj")), ["q_b_proj", "kv_proj"]),
        (Layer("q_proj", "o_proj"), ["q_proj"]),  # values of another layer
        (Layer("q_proj", "k_proj", "o_proj"), ["q_proj", "k_proj"]),  # keys that are the values
        (Layer("in_proj_qkv", "in_proj_z", "out_proj"), ["in_proj_qkv"]),
        (Layer("key", "value", "receptance"), []),
        (Layer("gate_proj", "up_proj", "v_proj"), []),
    ],
    ids=lambda case: "-".join(case._modules) if isinstance(case, Layer) else "",
)
def test_names_of_one_layer(layer: Layer, expected: list[str]) -> None:
    beside = Layer("q_proj", "v_proj")
    found = query_value_modules(nn.ModuleDict({"beside": beside, "layer": layer}))
    assert found == ["beside.q_proj", "beside.v_proj", *(f"layer.{name}" for name in expected)]

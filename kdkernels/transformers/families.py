"""What is known of model families, in one place: a family that differs from the others in what is read here is one row.

Names alone do not tell: ``logits_scaling`` divides the logits in Granite, multiplies them in HyperCLOVA X and divides the hidden
states in MiniCPM3. So a scale in a model whose family has no row is refused. Read in transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

MULTIPLIES, DIVIDES, ELSEWHERE = "multiplies the logits", "divides the logits", "does not touch the head's output"


class Family(NamedTuple):
    """type: of the models, by its beginning. scale: the attribute of model or configuration that holds one, and what it does.
    own_positions: tokens are not numbered 0, 1, 2, ... from a row's start."""

    type: str
    scale: tuple[str, str] | None = None
    own_positions: bool = False


FAMILIES = (
    Family("cohere", scale=("logit_scale", MULTIPLIES)),
    Family("mpt", scale=("logit_scale", ELSEWHERE)),  # in its configuration only
    Family("granite", scale=("logits_scaling", DIVIDES)),
    Family("hyperclovax", scale=("logits_scaling", MULTIPLIES)),
    Family("minicpm", scale=("logits_scaling", ELSEWHERE)),  # divides the hidden states, before they enter the head
    Family("falcon_h1", scale=("lm_head_multiplier", MULTIPLIES)),
    Family("muse_", scale=("output_multiplier", MULTIPLIES)),
    Family("inkling", scale=("logits_mup_width_multiplier", ELSEWHERE)),  # divides the hidden states
    Family("opt", own_positions=True),  # by the mask
    Family("paligemma", own_positions=True),  # from 1
)
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")  # Gemma and those after it; RecurrentGemma

# Names of the linear modules directly in an attention layer, in lower case; wqkv (InternLM2) and w_pack (Baichuan) are known from
# the models' own code on the hub.
FUSED = ("qkv_proj", "query_key_value", "c_attn", "wqkv", "qkv", "w_pack", "in_proj_qkv", "in_proj_qkvz")
# The last two are the second factor of low-rank queries.
QUERIES = ("q_proj", "query", "q", "wq", "q_lin", "query_proj", "project_q", "q_b_proj", "q_gate_proj")
# kv_b_proj and kv_proj make keys and values from one latent; the last two are ZAYA's.
VALUES = (
    *("v_proj", "value", "v", "wv", "v_lin", "value_proj", "project_v"),
    *("kv_b_proj", "kv_proj", "v_proj_current", "v_proj_delayed"),
)
KEYS = ("k_proj",)  # Gemma 4: where an attention has no projection of its values, they are its keys


def families_of(*model_types: str) -> Iterator[Family]:
    """The rows for a model of these types: its own, and that of its text part."""
    return (family for family in FAMILIES if any(kind.startswith(family.type) for kind in model_types))

"""Models for images, tiny and made from their configurations: their hidden states go with their heads, and their eyes learn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.hidden import logits_by

transformers = pytest.importorskip("transformers")
import kdkernels as kd  # noqa: E402
from kdkernels.transformers import hidden_states, lm_head, verify_lm_head  # noqa: E402  (of no use without the line above)
from tests.support.tiny_models import labels  # noqa: E402

IMAGE, PLACES = 5, slice(2, 6)  # the token that stands for a patch, and where four of them are
TEXT = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EYES = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
QWEN_EYES = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4, "in_channels": 3}
# name: the configuration's own part, and what the batch has besides tokens
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Llava": (
        {
            "text_config": transformers.LlamaConfig(**TEXT),
            "vision_config": transformers.CLIPVisionConfig(**{**EYES, "patch_size": 8}),
            "image_token_index": IMAGE,
            "vision_feature_layer": -1,
        },
        {"pixel_values": torch.randn(2, 3, 16, 16)},
    ),
    "Idefics3": (
        {"text_config": transformers.LlamaConfig(**TEXT), "vision_config": EYES, "image_token_id": IMAGE, "scale_factor": 2},
        {"pixel_values": torch.randn(2, 1, 3, 16, 16)},
    ),
    "Gemma3": (
        {"text_config": {**TEXT, "sliding_window": 8}, "vision_config": EYES, "image_token_index": IMAGE, "mm_tokens_per_image": 4},
        {"pixel_values": torch.randn(2, 3, 16, 16), "token_type_ids": IMAGE},
    ),
    "Qwen2VL": (
        {
            "text_config": {**TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
            "vision_config": {**QWEN_EYES, "spatial_merge_size": 2, "temporal_patch_size": 2},
            "image_token_id": IMAGE,
        },
        {
            "pixel_values": torch.randn(32, 96),
            "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]]),
            "mm_token_type_ids": IMAGE,  # its positions have three dimensions
        },
    ),
}


def build(name: str, seed: int = 0) -> Any:
    config, _ = MODELS[name]
    torch.manual_seed(seed)
    configuration = getattr(transformers, f"{name}Config")(**config)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(configuration)
    for parameter in model.parameters():
        if not parameter.any():  # such as Gemma3's way from the images to the text, which would let nothing through
            nn.init.normal_(parameter)
    return model.eval()


def batch(name: str) -> dict[str, Tensor]:
    ids = torch.randint(8, 64, (2, 12), generator=torch.Generator().manual_seed(1))
    ids[:, PLACES] = IMAGE
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    more = {key: (ids == IMAGE).long() if value is IMAGE else value for key, value in MODELS[name][1].items()}
    return {"input_ids": ids, "attention_mask": mask, **more}


@pytest.mark.parametrize("name", MODELS)
def test_hidden_states_and_head_are_the_models_logits(name: str) -> None:
    model, inputs = build(name), batch(name)
    verify_lm_head(model)
    with torch.no_grad():
        found, expected = logits_by(lm_head(model), hidden_states(model, inputs)), model(**inputs).logits
        others = model(**{**inputs, "pixel_values": -inputs["pixel_values"]}).logits
    real = inputs["attention_mask"] == 1
    torch.testing.assert_close(found[real], expected[real])
    assert not torch.allclose(others[real], expected[real]), "the images count"


@pytest.mark.parametrize("name", MODELS)
def test_the_eyes_learn_from_the_loss(name: str) -> None:
    student, teacher, inputs = build(name), build(name, seed=1).requires_grad_(False), batch(name)
    hidden = hidden_states(student, inputs)
    kd.linear_kd_loss(hidden, lm_head(student), hidden_states(teacher, inputs), lm_head(teacher), labels(inputs)).backward()
    seeing = [parameter for key, parameter in student.named_parameters() if "vis" in key]
    assert sum(parameter.grad is not None and bool(parameter.grad.any()) for parameter in seeing) > len(seeing) // 2

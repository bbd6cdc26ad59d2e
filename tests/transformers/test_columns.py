"""Columns of a batch: both models get what both take, and what one cannot read is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdkernels.transformers.data import Collator
from tests.support.batches import APART, A, B, both_ways, gpt2, llama, loss, one_by_one, trainer

transformers = pytest.importorskip("transformers")
from kdkernels.transformers import TopKCache, write_cache  # noqa: E402
from kdkernels.transformers.batches.inputs import Inputs  # noqa: E402
from tests.support.tiny_models import build  # noqa: E402


@pytest.mark.parametrize("made", ["live", "cache"])
@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("teacher_input_ids", A),
        ("token_type_ids", [0, 0, 1, 1]),
        ("completion_mask", [0, 1, 1, 1]),
        ("pixel_values", torch.ones(3, 2, 2)),
    ],
)
def test_a_column_that_no_model_takes_is_refused_by_name(column: str, value: Any, made: str, tmp_path: Path) -> None:
    data = [{"input_ids": A, "labels": A, column: value}]
    what = "what both take" if made == "live" else "what it takes"
    expected = rf"\[0\]: the column {column} \(of shape .*LlamaForCausalLM.* not take it; accepted: {what}"
    with pytest.raises(ValueError, match=expected):
        trainer(llama(1), llama(2), data, tmp_path) if made == "live" else write_cache(llama(2), data, tmp_path / "c", top_k=3)
    if made == "live":  # as it comes from a collator of one's own
        training = trainer(llama(1), llama(2), APART, tmp_path, collator=lambda _: Collator(None)(data))
        with pytest.raises(ValueError, match=f"the column {column}"):
            training.train()


@pytest.mark.parametrize(("student", "teacher"), [(gpt2, llama), (llama, gpt2)])
def test_a_column_that_one_model_takes_is_refused_with_both_names(student: Any, teacher: Any, tmp_path: Path) -> None:
    data = [{"input_ids": A, "token_type_ids": [0, 0, 1, 1]}]
    lacking, taking = ("model", "teacher")[student is gpt2], ("model", "teacher")[student is llama]
    message = (
        rf"token_type_ids .*: the {lacking} \(LlamaForCausalLM\) does not take it, though the {taking} \(GPT2LMHeadModel\) does"
    )
    with pytest.raises(ValueError, match=message):
        trainer(student(1), teacher(2), data, tmp_path)


def test_a_column_that_both_take_reaches_both_and_the_cache_tells_it_apart(tmp_path: Path) -> None:
    """GPT-2 adds an embedding for each token type."""
    student, teacher = gpt2(1), gpt2(2)
    types = [[0, 0, 1, 1], [4, 3, 2, 1]]
    data = [{"input_ids": A, "labels": A, "token_type_ids": one} for one in types]
    losses = []
    for one in types:
        with torch.no_grad():
            given = {"input_ids": torch.tensor([A]), "token_type_ids": torch.tensor([one])}
            x, z = (model.eval()(**given).logits[0, :-1].double().log_softmax(-1) for model in (student, teacher))
        losses.append(float((z.exp() * (z - x)).sum(-1).mean()))
    assert abs(losses[0] - losses[1]) > 0.01
    right = sum(losses) / 2
    longer = [*data, {"input_ids": B, "labels": [-100] * 5, "token_type_ids": [1] * 5}]  # so that columns are padded too
    assert both_ways(student, teacher, longer, tmp_path) == pytest.approx((right, right), rel=1e-5)
    cache = TopKCache(tmp_path / "cache")
    assert cache.columns == ["token_type_ids"]
    with pytest.raises(ValueError, match=r"is not in the cache .* \(it was made with token_type_ids\)"):
        trainer(student, cache, APART[:1], tmp_path).train()
    with pytest.raises(ValueError, match="train_dataset is None, and the cache holds its examples without token_type_ids"):
        trainer(student, cache, None, tmp_path)


class Seeing(transformers.LlamaForCausalLM):
    """A model with eyes: adds the mean of each channel of an image to its embeddings."""

    def forward(self, input_ids: Tensor, pixel_values: Tensor | None = None, **more: Any) -> Any:
        embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            embeds = embeds + nn.functional.pad(pixel_values.mean((2, 3)), (0, 13))[:, None] * 3
        return super().forward(inputs_embeds=embeds, **more)


def test_images_reach_both_models_and_are_told_apart_in_a_cache(tmp_path: Path) -> None:
    student, teacher = Seeing(llama(1).config), Seeing(llama(2).config)
    images = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)) + torch.tensor([1.0, -1.0])[:, None, None, None]
    data = [{"input_ids": A, "labels": A, "pixel_values": image} for image in images]
    with torch.no_grad():
        given = {"input_ids": torch.tensor([A, A]), "pixel_values": images}
        x, z = (model.eval()(**given).logits[:, :-1].double().log_softmax(-1) for model in (student, teacher))
    right = float((z.exp() * (z - x)).sum(-1).mean())
    assert right != pytest.approx(one_by_one(student, teacher, [A]), rel=1e-2)
    assert both_ways(student, teacher, data, tmp_path) == pytest.approx((right, right), rel=1e-5)
    data[1]["pixel_values"] = images[1, :, :2]
    training = trainer(student, teacher, data, tmp_path)
    with pytest.raises(ValueError, match=r"the column pixel_values has entries of several shapes \(\(3, 4, 4\), \(3, 2, 4\)\)"):
        training.train()


def test_texts_and_numbers_about_examples_are_left_out_with_one_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = [
        {
            "input_ids": A,
            "labels": A,
            "text": "a",
            "id": 7,
            "score": 0.5,
            "messages": [{"role": "user"}],
            "token_type_ids": [0] * 4,
        },
        {"input_ids": B, "labels": B, "text": "b", "id": 8, "score": None, "messages": [], "token_type_ids": [0] * 5},
    ]
    student, teacher = llama(1), llama(2)
    right = one_by_one(student, teacher, [A, B])
    training = trainer(student, teacher, data, tmp_path)
    assert training.evaluate()["eval_loss"] == pytest.approx(right, rel=1e-5)
    training.train()
    (said,) = [record.message for record in caplog.records if "left out" in record.message]
    assert said.endswith("do not take are left out: text, id, score, messages, token_type_ids.")
    caplog.clear()
    assert len(write_cache(teacher, data, tmp_path / "cache", top_k=3)) == 2
    (said,) = [record.message for record in caplog.records if "left out" in record.message]


def test_positions_that_say_nothing_are_no_matter_to_a_model_without_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    student, teacher = llama(1), build("bloom").float()
    data = [{**example, "position_ids": list(range(len(example["input_ids"])))} for example in APART]
    assert loss(student, teacher, data, tmp_path) == pytest.approx(one_by_one(student, teacher, [A, B]), rel=1e-4)
    inputs = Inputs.of({"model": student, "teacher": teacher})
    given = inputs(Collator(None)(data))
    assert ["position_ids" in inputs.to(name, given) for name in ("model", "teacher")] == [True, False]
    with pytest.raises(
        ValueError, match=r"the column position_ids .* the teacher \(BloomForCausalLM\) does not take it, though the model"
    ):
        trainer(student, teacher, [{**APART[0], "position_ids": [3, 4, 5, 6]}], tmp_path)


def test_columns_of_the_length_of_the_tokens_are_padded() -> None:
    made = Collator(0)(
        [{"input_ids": A, "token_type_ids": [1] * 4, "x": [1.5, 2]}, {"input_ids": [3], "token_type_ids": [2], "x": [0, 1]}]
    )
    assert made["token_type_ids"].tolist() == [[1] * 4, [2, 0, 0, 0]]
    assert made["x"].tolist() == [[1.5, 2], [0, 1]]

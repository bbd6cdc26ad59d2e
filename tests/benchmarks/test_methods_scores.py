"""The figures of benchmarks.methods against values worked out by hand and whole logits."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks.methods_scores import calibration_error, held_out, judged, rouge_l
from kdkernels.demo.models import build
from tests.support.demo import TINY


def test_the_calibration_error_is_that_of_a_table_worked_out_by_hand() -> None:
    # of ten bins: (0.3, 0.4] says 0.35 and 0.37 and is right once in two; (0.9, 1] says 0.95, 0.97, 1.0 and is always right
    confidence = torch.tensor([0.35, 0.95, 0.37, 0.97, 1.0])
    hit = torch.tensor([True, True, False, True, True])
    expected = 2 / 5 * abs(0.5 - 0.36) + 3 / 5 * abs(1.0 - (0.95 + 0.97 + 1.0) / 3)
    assert calibration_error(confidence, hit, bins=10) == pytest.approx(expected, rel=1e-6)
    # in one bin what is said too much and too little cancels
    assert calibration_error(confidence, hit, bins=1) == pytest.approx(abs(4 / 5 - 3.64 / 5), rel=1e-6)
    # an edge belongs to the bin below it, and 0 to the first
    assert calibration_error(torch.tensor([0.5, 0.0]), torch.tensor([True, False]), bins=2) == pytest.approx(0.5 / 2)


@pytest.mark.parametrize(
    ("written", "true", "longest"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], 4),
        ([1, 2, 3, 4], [4, 3, 2, 1], 1),
        ([1, 9, 2, 9, 3], [8, 1, 2, 8, 3], 3),  # not side by side
        ([5, 5, 5], [5, 1, 2], 1),  # each token counts once
        ([5, 1, 2], [5, 5, 5], 1),
        ([1, 2, 1, 2], [2, 1, 2, 1], 3),
        ([1, 2], [3, 4], 0),
    ],
)
def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence(written: list[int], true: list[int], longest: int) -> None:
    assert rouge_l(written, true) == pytest.approx(longest / len(true))


def test_rouge_l_weighs_precision_and_recall_alike() -> None:
    precision, recall = 2 / 2, 2 / 6
    assert rouge_l([1, 2], [1, 7, 7, 7, 2, 7]) == pytest.approx(2 * precision * recall / (precision + recall))


def test_held_out_figures_are_those_of_whole_logits() -> None:
    model = build(TINY.student, 50, 8, 0)
    generator = torch.Generator().manual_seed(0)
    inputs, labels = (torch.randint(50, (5, 8), generator=generator) for _ in range(2))
    logits = model(input_ids=inputs).logits.detach().double()
    found = held_out(model, inputs, labels)
    assert found["loss"] == pytest.approx(
        float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())), rel=1e-5
    )
    assert found["accuracy"] == pytest.approx(float((logits.argmax(-1) == labels).double().mean()))
    confidence, best = logits.softmax(-1).max(-1)
    assert found["ece"] == pytest.approx(calibration_error(confidence.flatten(), (best == labels).flatten()), rel=1e-4)


def test_continuations_are_judged_by_the_teacher_given_their_prompts() -> None:
    teacher = build(TINY.teacher, 50, 16, 0)
    generator = torch.Generator().manual_seed(0)
    prompts, written, true = (torch.randint(50, (3, length), generator=generator) for length in (4, 6, 6))
    written[:, 3:] = written[:, :3]  # a 3-gram that comes twice in each row
    found = judged(teacher, prompts, written, true)
    logprobs = teacher(input_ids=torch.cat([prompts, written], 1)).logits.detach().double().log_softmax(-1)
    each = -logprobs[:, 3:-1].gather(-1, written[..., None])
    assert found["teacher_loss"] == pytest.approx(float(each.mean()), rel=1e-5)
    assert found["distinct"] == pytest.approx(9 / 12)
    assert found["rouge_l"] == pytest.approx(sum(map(rouge_l, written.tolist(), true.tolist())) / 3)

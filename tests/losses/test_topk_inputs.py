"""Bad arguments of ``linear_topk_kd_loss`` are refused before any work, ids that no token has among them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import kdkernels as kd
from tests.support.cases import draw
from tests.support.refusals import OPTIONS, forbid_work, refused
from tests.support.topk import keep

CASE = draw()
LABELS = torch.arange(6)
KEPT = keep(CASE, 4)


def call(**changed: Any) -> Any:
    arguments: dict[str, Any] = {
        "student_hidden": CASE.student_hidden,
        "student_head": CASE.student_weight,
        "topk_ids": KEPT.ids,
        "topk_logprobs": KEPT.log_probs,
    }
    return kd.linear_topk_kd_loss(**{**arguments, **changed})


def with_id(value: int) -> Tensor:
    ids = KEPT.ids.clone()
    ids[3, 2] = value
    return ids


ARGUMENTS: list[tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = [
    ({"student_hidden": [1.0]}, TypeError, ("student_hidden", "tensor", "list")),
    ({"student_hidden": CASE.student_hidden.long()}, TypeError, ("student_hidden", "int64", "float32", "bfloat16")),
    ({"student_hidden": CASE.student_hidden[:, :-1]}, ValueError, ("student_hidden", "(6, 7)", "(37, 8)", "D = 8")),
    ({"student_head": "lm_head"}, TypeError, ("student_head", "LMHead", "str")),
    ({"student_head": CASE.student_weight.double()}, TypeError, ("student_hidden and student_head", "float32", "float64")),
    ({"tail": "drop"}, ValueError, ("tail", "'drop'", "renormalize, bucket")),
    ({"topk_ids": [[1]]}, TypeError, ("topk_ids", "tensor", "list")),
    ({"topk_ids": KEPT.ids.float()}, TypeError, ("topk_ids", "float32", "integers")),
    ({"topk_ids": KEPT.ids > 3}, TypeError, ("topk_ids", "bool", "integers")),
    ({"topk_ids": KEPT.ids.to("meta")}, ValueError, ("topk_ids", "meta", "cpu")),
    ({"topk_ids": KEPT.ids[:-1]}, ValueError, ("topk_ids", "(5, 4)", "(6, 8)", "(6, K)")),
    ({"topk_ids": KEPT.ids[None]}, ValueError, ("topk_ids", "(1, 6, 4)", "(6, K)")),
    ({"topk_ids": KEPT.ids[:, 0]}, ValueError, ("topk_ids", "(6,)", "(6, K)")),
    ({"topk_ids": KEPT.ids[:, :0], "topk_logprobs": KEPT.log_probs[:, :0]}, ValueError, ("topk_ids", "(6, 0)", "K at least 1")),
    ({"topk_logprobs": KEPT.log_probs[:, :3]}, ValueError, ("topk_logprobs (6, 3)", "topk_ids (6, 4)")),
    ({"topk_logprobs": KEPT.log_probs.tolist()}, TypeError, ("topk_logprobs", "tensor", "list")),
    ({"topk_logprobs": KEPT.log_probs.int()}, TypeError, ("topk_logprobs", "int32", "float32")),
    ({"topk_logprobs": KEPT.log_probs.to("meta")}, ValueError, ("topk_logprobs", "meta", "cpu")),
    ({"topk_logprobs": KEPT.log_probs.clone().requires_grad_()}, ValueError, ("topk_logprobs", "requires grad", "detach")),
    ({"topk_rest": KEPT.log_probs}, ValueError, ("topk_rest", "(6, 4)", "needs (6,)")),
    ({"topk_rest": -1.0}, TypeError, ("topk_rest", "tensor", "float")),
    ({"topk_rest": KEPT.log_probs[:, 0].to("meta")}, ValueError, ("topk_rest", "meta", "cpu")),
    ({"topk_rest": KEPT.log_probs[:, 0].clone().requires_grad_()}, ValueError, ("topk_rest", "requires grad", "detach")),
    ({"topk_rest": KEPT.log_probs[:, 0], "tail": "renormalize"}, ValueError, ("topk_rest", "renormalize", "bucket")),
    ({"topk_ids": with_id(37)}, ValueError, ("topk_ids holds 37", "0 to 36", "-inf")),
    ({"topk_ids": with_id(-1)}, ValueError, ("topk_ids holds -1", "0 to 36", "-inf")),
    ({"topk_ids": with_id(37), "labels": LABELS}, ValueError, ("topk_ids holds 37", "0 to 36")),
    ({"topk_ids": with_id(int(KEPT.ids[3, 0]))}, ValueError, (f"topk_ids holds {int(KEPT.ids[3, 0])} twice", "distinct", "-inf")),
    ({"vocab_size": 38}, ValueError, ("vocab_size=38", "1 to 37", "student_head")),
    ({"vocab_size": 30.0}, TypeError, ("vocab_size", "integer", "float")),
    ({"vocab_size": 1}, ValueError, ("topk_ids holds", "0 to 0")),
    ({"strategy": "fast"}, ValueError, ("strategy", "'fast'", "auto, tokens")),
    ({"memory_budget": 0}, ValueError, ("memory_budget", "positive", "0")),
]


@pytest.mark.parametrize(("wrong", "error", "words"), [*OPTIONS, *ARGUMENTS])
def test_bad_input_is_refused_before_any_work(
    wrong: dict[str, Any], error: type[Exception], words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call(labels=LABELS).isfinite()
    forbid_work(monkeypatch)
    with pytest.raises(AssertionError, match="work was done"):
        call(labels=LABELS)
    with refused(error, *words):
        call(**wrong)


@pytest.mark.parametrize("wrong", [37, -1, int(KEPT.ids[3, 0])])
def test_bad_ids_are_found_in_whatever_pieces_they_are_looked_at(wrong: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for slots in (1, 8, 100):
        monkeypatch.setattr("kdkernels.engine.keep.SLOTS", slots)
        assert call().isfinite()
        with refused(ValueError, f"topk_ids holds {wrong}"):
            call(topk_ids=with_id(wrong))

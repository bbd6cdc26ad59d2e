"""Bad input is refused before any work, in words that name the argument, what came and what is accepted."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import kdkernels as kd
from kdkernels import backends
from kdkernels.products import HeadProducts
from tests.cases import draw

TOKENS, VOCAB, STUDENT, TEACHER = 6, 37, 8, 12
CASE = draw(tokens=(TOKENS,), vocab=VOCAB, dims=(STUDENT, TEACHER))
LABELS = torch.arange(TOKENS)
X, Z = (logits.float() for logits in CASE.logits())


def forbid_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any product or row operation is a failure, and not one of the expected kind."""

    def work(*_: Any, **__: Any) -> None:
        raise AssertionError("work was done before the input was checked")

    monkeypatch.setattr(HeadProducts, "logits", work)
    monkeypatch.setattr(backends, "operators", work)


@pytest.fixture(autouse=True)
def nothing_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_work(monkeypatch)


def linear(**changed: Any) -> Any:
    arguments: dict[str, Any] = {
        "student_hidden": CASE.student_hidden,
        "student_head": CASE.student_weight,
        "teacher_hidden": CASE.teacher_hidden,
        "teacher_head": CASE.teacher_weight,
    }
    return kd.linear_kd_loss(**{**arguments, **changed})


def from_logits(**changed: Any) -> Any:
    return kd.kd_loss(**{"student_logits": X, "teacher_logits": Z, **changed})


def refused(error: type[Exception], *words: str) -> Any:
    """All of the words, in this order, in the message."""
    return pytest.raises(error, match="(?s)" + ".*".join(map(re.escape, words)))


def test_the_good_input_would_work(monkeypatch: pytest.MonkeyPatch) -> None:
    for call in (linear, from_logits):
        with pytest.raises(AssertionError, match="work was done"):
            call(labels=LABELS)
    monkeypatch.undo()
    assert linear(labels=LABELS).isfinite()
    assert from_logits(labels=LABELS).isfinite()


# What is wrong, the error, and the words of its message; for both public functions.
OPTIONS: list[tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = [
    ({"divergence": "kl"}, ValueError, ("divergence", "'kl'", "forward_kl")),
    ({"divergence": 1}, TypeError, ("divergence", "int")),
    ({"divergence": kd.jsd}, TypeError, ("divergence", "did you mean jsd()")),
    ({"t": 1.5}, ValueError, ("t is", "[0, 1]", "1.5")),
    ({"t": -0.1}, ValueError, ("t is", "[0, 1]", "-0.1")),
    ({"t": math.nan}, ValueError, ("t is", "[0, 1]", "nan")),
    ({"t": "half"}, TypeError, ("t is", "[0, 1]", "str")),
    ({"t": True}, TypeError, ("t is", "[0, 1]", "bool")),
    ({"t": torch.ones(2)}, ValueError, ("t is", "0-dim", "(2,)")),
    ({"t": torch.tensor(1)}, ValueError, ("t is", "float", "int64")),
    ({"temperature": 0.0}, ValueError, ("temperature", "positive", "0.0")),
    ({"temperature": 1.1e5}, ValueError, ("temperature", "positive", "1e-9 to 1e5", "110000.0")),
    ({"temperature": -1}, ValueError, ("temperature", "positive", "-1")),
    ({"temperature": math.inf}, ValueError, ("temperature", "positive", "inf")),
    ({"temperature": math.nan}, ValueError, ("temperature", "positive", "nan")),
    ({"temperature": "2"}, TypeError, ("temperature", "positive", "str")),
    ({"temperature": torch.tensor(2.0)}, TypeError, ("temperature", "Tensor")),
    ({"kd_weight": -1.0}, ValueError, ("kd_weight", "at least 0", "-1.0")),
    ({"kd_weight": None}, TypeError, ("kd_weight", "NoneType")),
    ({"ce_weight": -1.0, "labels": LABELS}, ValueError, ("ce_weight", "at least 0", "-1.0")),
    ({"ce_weight": math.inf, "labels": LABELS}, ValueError, ("ce_weight", "inf")),
    ({"ce_weight": 0.5}, ValueError, ("labels is None", "ce_weight=0.5")),
    ({"ignore_index": 1.0}, TypeError, ("ignore_index", "integer", "float")),
    ({"labels": [1, 2]}, TypeError, ("labels", "tensor", "list")),
    ({"labels": LABELS.float()}, TypeError, ("labels", "float32", "integers")),
    ({"labels": LABELS > 2}, TypeError, ("labels", "bool", "integers")),
    ({"labels": LABELS[:-1]}, ValueError, ("labels", "(5,)", "(6,)")),
    ({"labels": LABELS[:, None]}, ValueError, ("labels", "(6, 1)", "(6,)")),
    ({"labels": LABELS.to("meta")}, ValueError, ("labels", "meta", "cpu")),
    ({"labels": LABELS + VOCAB}, ValueError, ("labels", str(VOCAB + TOKENS - 1), f"0 to {VOCAB - 1}", "ignore_index=-100")),
    ({"labels": LABELS - 3}, ValueError, ("labels", "-3", f"0 to {VOCAB - 1}", "ignore_index=-100")),
    ({"labels": LABELS.clone().fill_(-100), "ignore_index": 7}, ValueError, ("labels", "-100", "ignore_index=7")),
    ({"token_weight": 2.0}, TypeError, ("token_weight", "tensor", "float")),
    ({"token_weight": LABELS}, TypeError, ("token_weight", "int64", "float32")),
    ({"token_weight": torch.ones(5)}, ValueError, ("token_weight", "(5,)", "(6,)")),
    ({"token_weight": torch.ones(6, device="meta")}, ValueError, ("token_weight", "meta", "cpu")),
    ({"token_weight": torch.ones(6).requires_grad_()}, ValueError, ("token_weight", "requires grad", "detach")),
    ({"reduction": "batchmean"}, ValueError, ("reduction", "'batchmean'", "mean, sum, none")),
    ({"reduction": None}, ValueError, ("reduction", "None", "mean, sum, none")),
    ({"normalizer": 0}, ValueError, ("normalizer", "positive", "0")),
    ({"normalizer": -3.0}, ValueError, ("normalizer", "positive", "-3.0")),
    ({"normalizer": "all"}, TypeError, ("normalizer", "positive", "str")),
    ({"normalizer": torch.ones(2)}, ValueError, ("normalizer", "0-dim", "(2,)")),
    ({"normalizer": 3, "reduction": "sum"}, ValueError, ("normalizer", "'mean'", "'sum'")),
    ({"normalizer": 3, "reduction": "none"}, ValueError, ("normalizer", "'mean'", "'none'")),
]


@pytest.mark.parametrize("call", [linear, from_logits])
@pytest.mark.parametrize(("wrong", "error", "words"), OPTIONS)
def test_options_of_both_functions(wrong: dict[str, Any], error: type[Exception], words: tuple[str, ...], call: Any) -> None:
    with refused(error, *words):
        call(**wrong)


def head(model: str, **parts: Any) -> dict[str, Any]:
    weight = CASE.student_weight if model == "student" else CASE.teacher_weight
    return {f"{model}_head": kd.LMHead(**{"weight": weight, **parts})}


LINEAR: list[tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = [
    ({"student_hidden": [1.0]}, TypeError, ("student_hidden", "tensor", "list")),
    ({"student_hidden": CASE.student_hidden.long()}, TypeError, ("student_hidden", "int64", "float32", "bfloat16")),
    ({"teacher_hidden": CASE.teacher_hidden.cfloat()}, TypeError, ("teacher_hidden", "complex64", "float32")),
    ({"teacher_hidden": CASE.teacher_hidden.to("meta")}, ValueError, ("teacher_hidden", "meta", "cpu")),
    ({"student_hidden": CASE.student_hidden[:, :-1]}, ValueError, ("student_hidden", "(6, 7)", "(37, 8)", "D = 8")),
    ({"teacher_hidden": CASE.teacher_hidden[:, :-1]}, ValueError, ("teacher_hidden", "(6, 11)", "(37, 12)", "D = 12")),
    ({"teacher_hidden": CASE.teacher_hidden[:-1]}, ValueError, ("student_hidden (6, 8)", "teacher_hidden (5, 12)")),
    ({"teacher_hidden": CASE.teacher_hidden[None]}, ValueError, ("student_hidden (6, 8)", "teacher_hidden (1, 6, 12)")),
    ({"teacher_hidden": CASE.teacher_hidden.clone().requires_grad_()}, ValueError, ("teacher_hidden", "linear_okd_loss")),
    ({"student_head": "lm_head"}, TypeError, ("student_head", "LMHead", "str")),
    ({"student_head": torch.nn.Linear(8, 37)}, TypeError, ("student_head", "LMHead", "Linear")),
    ({"teacher_head": None}, TypeError, ("teacher_head", "LMHead", "NoneType")),
    ({"student_head": CASE.student_weight[0]}, ValueError, ("student_head.weight", "(V, D)", "(8,)")),
    ({"student_head": CASE.student_weight[:0]}, ValueError, ("student_head.weight", "(V, D)", "(0, 8)")),
    ({"student_head": CASE.student_weight.int()}, TypeError, ("student_head.weight", "int32")),
    ({"student_head": CASE.student_weight.to("meta")}, ValueError, ("student_head.weight", "meta", "cpu")),
    ({"student_head": CASE.student_weight.double()}, TypeError, ("student_hidden and student_head", "float32", "float64")),
    ({"teacher_head": CASE.teacher_weight.half()}, TypeError, ("teacher_hidden and teacher_head", "float32", "float16")),
    (head("student", bias=torch.ones(36)), ValueError, ("student_head.bias", "(37,)", "(36,)")),
    (head("teacher", bias=torch.ones(37, 1)), ValueError, ("teacher_head.bias", "(37,)", "(37, 1)")),
    (head("student", bias=[0.0] * 37), TypeError, ("student_head.bias", "tensor", "list")),
    (head("student", bias=torch.ones(37, dtype=torch.int64)), TypeError, ("student_head.bias", "int64")),
    (head("student", bias=torch.ones(37, device="meta")), ValueError, ("student_head.bias", "meta", "cpu")),
    (head("student", logit_scale=0.0), ValueError, ("student_head.logit_scale", "positive", "0.0")),
    (head("teacher", logit_scale=-1.0), ValueError, ("teacher_head.logit_scale", "positive", "-1.0")),
    (head("teacher", logit_scale="1"), TypeError, ("teacher_head.logit_scale", "positive", "str")),
    (head("student", softcap=0.0), ValueError, ("student_head.softcap", "positive", "None", "0.0")),
    (head("teacher", softcap=-30.0), ValueError, ("teacher_head.softcap", "positive", "-30.0")),
    (head("teacher", softcap=math.inf), ValueError, ("teacher_head.softcap", "positive", "inf")),
    ({"teacher_head": torch.ones(40, 12)}, ValueError, ("student_head has 37", "teacher_head 40", "vocab_size")),
    ({"teacher_head": torch.ones(30, 12)}, ValueError, ("student_head has 37", "teacher_head 30", "vocab_size")),
    ({"vocab_size": 38}, ValueError, ("vocab_size=38", "1 to 37")),
    ({"vocab_size": 0}, ValueError, ("vocab_size=0", "1 to 37")),
    ({"vocab_size": 30.0}, TypeError, ("vocab_size", "integer", "float")),
    ({"vocab_size": True}, TypeError, ("vocab_size", "integer", "bool")),
    ({"vocab_size": 5, "labels": LABELS}, ValueError, ("labels", "holds 5", "0 to 4")),
    ({"strategy": "fast"}, ValueError, ("strategy", "'fast'", "auto, tokens")),
    ({"memory_budget": 0}, ValueError, ("memory_budget", "positive", "0")),
    ({"memory_budget": 1e6}, TypeError, ("memory_budget", "bytes", "float")),
    ({"memory_budget": True}, TypeError, ("memory_budget", "bytes", "bool")),
]


@pytest.mark.parametrize(("wrong", "error", "words"), LINEAR)
def test_arguments_of_linear_kd_loss(wrong: dict[str, Any], error: type[Exception], words: tuple[str, ...]) -> None:
    with refused(error, *words):
        linear(**wrong)


LOGITS: list[tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = [
    ({"student_logits": [1.0]}, TypeError, ("student_logits", "tensor", "list")),
    ({"student_logits": X.int()}, TypeError, ("student_logits", "int32", "float32")),
    ({"teacher_logits": Z.bool()}, TypeError, ("teacher_logits", "bool", "float32")),
    ({"teacher_logits": Z.to("meta")}, ValueError, ("teacher_logits", "meta", "cpu")),
    ({"teacher_logits": Z[:, :-1]}, ValueError, ("student_logits (6, 37)", "teacher_logits (6, 36)")),
    ({"teacher_logits": Z[:-1]}, ValueError, ("student_logits (6, 37)", "teacher_logits (5, 37)")),
    ({"student_logits": torch.tensor(1.0), "teacher_logits": torch.tensor(1.0)}, ValueError, ("student_logits ()", "(..., V)")),
    ({"student_logits": X[:, :0], "teacher_logits": Z[:, :0]}, ValueError, ("student_logits (6, 0)", "V at least 1")),
    ({"teacher_logits": Z.clone().requires_grad_()}, ValueError, ("teacher_logits", "requires grad", "linear_okd_loss")),
]


@pytest.mark.parametrize(("wrong", "error", "words"), LOGITS)
def test_arguments_of_kd_loss(wrong: dict[str, Any], error: type[Exception], words: tuple[str, ...]) -> None:
    with refused(error, *words):
        from_logits(**wrong)


def test_vocab_size_and_budgets_belong_to_linear_kd_loss() -> None:
    for name in ("vocab_size", "strategy", "memory_budget"):
        with pytest.raises(TypeError, match=name):
            from_logits(**{name: None})


def test_a_labels_mistake_of_a_dropped_token_is_still_a_mistake_unless_it_is_ignored() -> None:
    with refused(ValueError, "labels", "99"):
        linear(labels=torch.tensor([0, 1, 2, 3, 4, 99]), token_weight=torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 0.0]))


@pytest.mark.parametrize("options", [{"temprature": 2.0}, {"student_hidden": 1}, {"divergence": "kl"}])
def test_the_module_refuses_what_the_function_would(options: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=r"divergence|temprature|student_hidden"):
        kd.LinearKDLoss(**options)


class TestGoodInput:
    """What might look wrong and is not."""

    @pytest.fixture(autouse=True)
    def work_is_allowed(self, nothing_is_computed: None, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.undo()

    def test_a_bare_weight_is_a_head(self) -> None:
        assert linear() == linear(student_head=kd.LMHead(CASE.student_weight), teacher_head=kd.LMHead(CASE.teacher_weight))

    @pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64])
    def test_labels_of_any_integer_dtype(self, dtype: torch.dtype) -> None:
        expected = linear(labels=LABELS, ce_weight=1.0)
        assert linear(labels=LABELS.to(dtype), ce_weight=1.0) == expected
        assert linear(labels=LABELS.to(dtype).repeat_interleave(2)[::2], ce_weight=1.0) == expected

    def test_numbers_may_be_integers(self) -> None:
        assert linear(t=1, temperature=2, kd_weight=1, normalizer=4) == linear(temperature=2.0, normalizer=4.0)

    def test_a_single_token_needs_no_batch_dimension(self) -> None:
        one = linear(
            student_hidden=CASE.student_hidden[0], teacher_hidden=CASE.teacher_hidden[0], labels=LABELS[0], reduction="none"
        )
        assert one.shape == ()
        torch.testing.assert_close(one, linear(reduction="none")[0])
        assert from_logits(student_logits=X[0], teacher_logits=Z[0], reduction="none").shape == ()

    @pytest.mark.parametrize("lead", [(6,), (2, 3), (1, 2, 3), (6, 1)])
    def test_leading_dimensions_are_only_a_shape(self, lead: tuple[int, ...]) -> None:
        shaped = linear(
            student_hidden=CASE.student_hidden.reshape(*lead, -1),
            teacher_hidden=CASE.teacher_hidden.reshape(*lead, -1),
            labels=LABELS.reshape(lead),
            reduction="none",
        )
        assert shaped.shape == lead
        torch.testing.assert_close(shaped.flatten(), linear(labels=LABELS, reduction="none"), rtol=0, atol=0)

    def test_a_teacher_that_requires_grad_is_fine_where_nothing_is_learned(self) -> None:
        with torch.no_grad():
            assert linear(teacher_hidden=CASE.teacher_hidden.clone().requires_grad_()) == linear()

    def test_a_teachers_head_is_held_constant(self) -> None:
        weight: Tensor = CASE.teacher_weight.clone().requires_grad_()
        assert not linear(teacher_head=weight).requires_grad

    def test_options_of_a_call_win_over_those_of_the_module(self) -> None:
        module = kd.LinearKDLoss(divergence="jsd", temperature=2.0, reduction="sum")
        inputs = (CASE.student_hidden, CASE.student_weight, CASE.teacher_hidden, CASE.teacher_weight, LABELS)
        assert module(*inputs) == kd.linear_kd_loss(*inputs, divergence="jsd", temperature=2.0, reduction="sum")
        assert module(*inputs, t=0.5) == kd.linear_kd_loss(*inputs, divergence="jsd", temperature=2.0, reduction="sum", t=0.5)
        assert module(*inputs, reduction="mean") == kd.linear_kd_loss(*inputs, divergence="jsd", temperature=2.0)
        assert "temperature=2.0" in repr(module)

    def test_a_head_can_be_replaced_in_part(self) -> None:
        head = kd.LMHead(CASE.student_weight, softcap=5.0)
        assert replace(head, logit_scale=2.0).softcap == 5.0

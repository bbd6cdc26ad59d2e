"""Bad input is refused before any work, in words that name the argument, what came and what is accepted."""

from __future__ import annotations

import copy
import math
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import kdkernels as kd
from kdkernels.losses import models
from tests.support.refusals import CASE, LABELS, LINEAR, OPTIONS, STUDENT, TEACHER, TOKENS, VOCAB, forbid_work, refused

X, Z = (logits.float() for logits in CASE.logits())


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


def test_the_good_input_would_work(monkeypatch: pytest.MonkeyPatch) -> None:
    for call in (linear, from_logits):
        with pytest.raises(AssertionError, match="work was done"):
            call(labels=LABELS)
    monkeypatch.undo()
    assert linear(labels=LABELS).isfinite()
    assert from_logits(labels=LABELS).isfinite()


@pytest.mark.parametrize("call", [linear, from_logits])
@pytest.mark.parametrize(("wrong", "error", "words"), OPTIONS)
def test_options_of_both_functions(wrong: dict[str, Any], error: type[Exception], words: tuple[str, ...], call: Any) -> None:
    with refused(error, *words):
        call(**wrong)


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

    @pytest.mark.parametrize("part", ["weight", "bias"])
    def test_a_teachers_head_that_would_learn_is_held_constant_with_one_warning(
        self, part: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Every model that is loaded has such a head until it is frozen."""
        parts = {"weight": CASE.teacher_weight.clone(), "bias": torch.zeros(VOCAB)}
        parts[part].requires_grad_()
        head = kd.LMHead(**parts)
        models._warn_once.cache_clear()
        losses = [linear(teacher_head=head) for _ in range(3)]
        (warned,) = caplog.records
        assert re.match("teacher_head requires grad.*linear_kd_loss is constant.*linear_okd_loss", warned.message)
        caplog.clear()
        models._warn_once.cache_clear()
        with torch.no_grad():
            losses.append(linear(teacher_head=head))
        losses.append(linear(teacher_head=head.detach()))
        assert not caplog.records
        assert all(loss == losses[0] and not loss.requires_grad for loss in losses)

    def test_a_head_that_both_models_share_learns_as_the_students(self) -> None:
        shared = CASE.student_weight.clone().requires_grad_()
        apart = shared.detach().clone().requires_grad_()
        hidden = CASE.student_hidden.flip(0)
        found = linear(student_head=shared, teacher_hidden=hidden, teacher_head=shared)
        expected = linear(student_head=apart, teacher_hidden=hidden, teacher_head=apart.detach().clone())
        assert torch.equal(*(torch.autograd.grad(loss, leaf)[0] for loss, leaf in ((found, shared), (expected, apart))))

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

    def test_a_head_is_shown_without_its_values(self) -> None:
        head = kd.LMHead(torch.nn.Parameter(torch.randn(37, 8)), torch.zeros(37, dtype=torch.bfloat16), 2.0, 30.0)
        assert repr(head) == (
            "LMHead(weight=<(37, 8), torch.float32, cpu, requires_grad>, bias=<(37,), torch.bfloat16, cpu>, "
            "logit_scale=2.0, softcap=30.0)"
        )
        assert "bias=None" in repr(kd.LMHead(head.weight))
        assert "meta" in repr(kd.LMHead(torch.empty(3, 2, device="meta")))

    @pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, np.int64, np.uint8])
    def test_numbers_of_numpy_are_numbers(self, kind: Any) -> None:
        for call in (linear, from_logits):
            options = {"t": kind(1), "temperature": kind(2), "kd_weight": kind(3), "ce_weight": kind(1), "normalizer": kind(4)}
            plain = {name: float(value) for name, value in options.items()}
            assert call(labels=LABELS, **options) == call(labels=LABELS, **plain)
        head = {"logit_scale": 2, "softcap": 3}
        numpys = kd.LMHead(CASE.student_weight, **{name: kind(value) for name, value in head.items()})
        assert linear(student_head=numpys) == linear(student_head=kd.LMHead(CASE.student_weight, **head))

    @pytest.mark.parametrize("kind", [np.int8, np.int32, np.int64, np.uint16])
    def test_whole_numbers_of_numpy_are_whole_numbers(self, kind: Any) -> None:
        numpys = linear(labels=LABELS, ignore_index=kind(3), vocab_size=kind(30), memory_budget=kind(100))
        assert numpys == linear(labels=LABELS, ignore_index=3, vocab_size=30, memory_budget=100)

    def test_sizes_of_numpy_do_not_overflow_in_a_plan(self) -> None:
        sizes = (8192, 151_936, 896, 3584)
        assert kd.plan(*(np.int32(size) for size in sizes), memory_budget=np.int32(2**30)) == kd.plan(*sizes, memory_budget=2**30)

    def test_flags_of_numpy_are_flags(self) -> None:
        loss, metrics = linear(return_metrics=np.bool_(True), square_temperature=np.bool_(False), temperature=2.0)
        assert loss == linear(square_temperature=False, temperature=2.0)
        assert metrics["tokens"] == TOKENS
        assert kd.plan(8, 9, 4, 4, train_head=np.bool_(False)) == kd.plan(8, 9, 4, 4, train_head=False)

    def test_parameters_of_numpy_are_parameters(self) -> None:
        third = np.float32(1 / 3)
        assert kd.jsd(third) == kd.jsd(float(third))
        assert from_logits(divergence=replace(kd.jsd(), a=third)) == from_logits(divergence=kd.jsd(float(third)))

    def test_what_is_held_constant_may_require_grad_where_nothing_is_learned(self) -> None:
        with torch.no_grad():
            options = {name: torch.tensor(0.5, requires_grad=True) for name in ("t", "normalizer")}
            assert linear(**options) == linear(t=0.5, normalizer=0.5)

    @pytest.mark.parametrize("call", [linear, from_logits])
    def test_what_is_divided_by_0_is_the_mean_of_no_tokens(self, call: Any) -> None:
        assert call(normalizer=torch.tensor(0.0)) == call(labels=torch.full((TOKENS,), -100)) == 0
        assert call(token_weight=torch.tensor([1.0, -1.0] * (TOKENS // 2))) == 0

    @pytest.mark.parametrize("weight", [-2.0, math.nan])
    def test_token_weights_are_taken_as_they_are(self, weight: float) -> None:
        weights = torch.ones(TOKENS)
        weights[1] = weight
        losses = linear(reduction="none")
        expected = losses * weights
        torch.testing.assert_close(linear(reduction="none", token_weight=weights), expected, equal_nan=True)
        torch.testing.assert_close(linear(token_weight=weights), expected.sum() / weights.sum(), equal_nan=True)

    def test_ignore_index_may_be_a_token(self) -> None:
        losses = linear(labels=LABELS, ce_weight=1.0, reduction="none")
        found = linear(labels=LABELS, ce_weight=1.0, ignore_index=3, reduction="none")
        torch.testing.assert_close(found, losses.where(LABELS != 3, 0.0))

    @pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0)])
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_a_batch_without_tokens_has_loss_0_and_gradients_0(self, reduction: str, shape: tuple[int, ...]) -> None:
        hidden, weight = torch.zeros(*shape, STUDENT, requires_grad=True), CASE.student_weight.clone().requires_grad_()
        empty = {"student_hidden": hidden, "teacher_hidden": torch.zeros(*shape, TEACHER)}
        loss = linear(**empty, student_head=weight, labels=torch.zeros(shape, dtype=torch.int64), reduction=reduction)
        assert loss.shape == (shape if reduction == "none" else ())
        assert loss.sum() == 0
        of_hidden, of_weight = torch.autograd.grad(loss.sum(), [hidden, weight])
        assert of_hidden.shape == hidden.shape
        assert not of_weight.any()

    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_meta_tensors_give_shapes_and_dtypes(self, reduction: str) -> None:
        case = {name: part.to("meta") for name, part in vars(CASE).items() if isinstance(part, Tensor)}
        hidden, weight = case["student_hidden"].requires_grad_(), case["student_weight"].requires_grad_()
        loss, metrics = kd.linear_kd_loss(
            hidden,
            weight,
            case["teacher_hidden"],
            case["teacher_weight"],
            LABELS.to("meta"),
            reduction=reduction,
            return_metrics=True,
        )
        assert (loss.device.type, loss.dtype, metrics["kd"].device.type) == ("meta", torch.float32, "meta")
        assert loss.shape == ((TOKENS,) if reduction == "none" else ())
        loss.sum().backward()
        assert (hidden.grad.shape, weight.grad.shape) == (hidden.shape, weight.shape)
        with refused(ValueError, "teacher_head.weight", "cpu", "meta"):
            kd.linear_kd_loss(hidden, weight, case["teacher_hidden"], CASE.teacher_weight)

    @pytest.mark.parametrize("wide", ["student_hidden", "student_head"])
    def test_float64_under_autocast_is_named(self, wide: str) -> None:
        """As torch's own linear refuses it: autocast does not touch float64."""
        given = {"student_hidden": CASE.student_hidden, "student_head": CASE.student_weight}
        given[wide] = given[wide].double()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with refused(TypeError, "student_hidden and student_head", "float64", "autocast leaves float64 alone"):
                linear(**given)
            with pytest.raises(RuntimeError, match="dtype"):
                torch.nn.functional.linear(given["student_hidden"], given["student_head"])

    @pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
    def test_a_copy_of_a_divergence_is_it(self, copied: Any) -> None:
        assert from_logits(divergence=copied(kd.jsd(0.3))) == from_logits(divergence=kd.jsd(0.3))

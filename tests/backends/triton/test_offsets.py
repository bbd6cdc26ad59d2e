"""Logits in 16 bits out of their products, in Triton's interpreter: what is stored, and what it does to the loss.

That every divergence and head is right is in test_backends.py, and OKD in test_okd.py (variant triton-offsets).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import kdkernels as kd
from kdkernels.backends.columns import Row
from tests.support import okd, oracle
from tests.support.cases import OFFSETS, Case, assert_as_good_as_eager, draw, dressed, ratios, running
from tests.support.kernels import step_of
from tests.support.oracle import Options

pytest.importorskip("triton", reason="Triton is not installed")
from kdkernels.backends.triton import offsets
from tests.support.interpreter import as_on_a_gpu

INF, NAN = torch.inf, torch.nan
TOKENS, VOCAB = 20, 150  # two blocks of tokens by five of columns, the last ones not full
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[offsets.OffsetRows]]:
    """What was multiplied, chunk by chunk."""
    seen: list[offsets.OffsetRows] = []

    class Seen(offsets.OffsetRows):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.logits = [decoded(side) for side in self.sides]
            seen.append(self)

    monkeypatch.setattr(offsets, "OffsetRows", Seen)
    with running(OFFSETS):
        yield seen


def case_of(
    name: str = "jsd", *, seed: int = 0, spread: float = 3.0, dtype: torch.dtype = BF16, bare: bool = False, **options: Any
) -> Case:
    drawn = draw(seed, (TOKENS,), VOCAB, (24, 40), spread, dtype)
    return replace(drawn if bare else dressed(drawn), options=Options(name, **options))


def rows_of(case: Case) -> tuple[offsets.OffsetRows, list[Tensor]]:
    """The products of a case's step, and both models' logits in float64, from the bits that they are made of."""
    step = step_of(case, case.options.divergence, dtype=case.student_hidden.dtype)
    hidden = [side.rows(slice(None)) for side in (step.student, step.teacher)]
    codes = torch.zeros(2, TOKENS, 192, dtype=torch.float16)[..., :VOCAB].unbind()
    return offsets.OffsetRows((step,), hidden, codes, case.labels), list(
        replace(case, student_scale=1.0, teacher_scale=1.0).logits()
    )


def teacher_bans(case: Case) -> Case:
    """A tile and more, and of the student other tokens."""
    case = replace(case, student_softcap=None, teacher_softcap=None, labels=torch.full((TOKENS,), 5))
    assert case.student_bias is not None
    assert case.teacher_bias is not None
    case.student_bias[60:70] = case.teacher_bias[[3, 149]] = case.teacher_bias[32:64] = -INF
    return case


def with_metrics(case: Case, **more: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """As case.run, and the metrics."""
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in case.learned().items()}
    loss, found = case.loss(leaves, return_metrics=True, **more)
    grads = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    losses, _ = case.loss(return_metrics=True, reduction="none", **more)
    return {"losses": losses, "loss": loss.detach(), **grads}, found


def decoded(side: Any, block: int = 32) -> Tensor:
    largest = side.largest.repeat_interleave(block, 1)[:, : side.codes.shape[1]].double()
    return side.codes.double() + (largest - 1.0)


class TestWhatIsStored:
    @pytest.mark.parametrize("spread", [0.3, 3.0, 30.0])
    def test_a_logit_is_off_by_a_rounding_of_how_far_it_lies_from_the_largest(self, spread: float) -> None:
        rows, right = rows_of(case_of(spread=spread, bare=True))
        for side, exact in zip(rows.sides, right, strict=True):
            tiles = torch.nn.functional.pad(exact, (0, 10), value=-INF).view(TOKENS, -1, 32)
            largest = tiles.amax(-1).repeat_interleave(32, 1)[:, :VOCAB]
            code = (exact - (largest - 1.0)).abs()
            half_a_step = torch.finfo(torch.float16).eps / 2 * 2 ** code.clamp(min=2.0**-14).log2().floor()
            # and what float32 sums of products of 24 and 40 are off by, and adding it to the largest
            noise = 48 * torch.finfo(torch.float32).eps * spread * 3
            assert ((decoded(side) - exact).abs() <= half_a_step + noise).all()
            assert ((decoded(side) - exact).abs()[exact == largest] <= noise).all()

    def test_sums_are_those_of_the_stored_logits(self) -> None:
        rows, _ = rows_of(case_of(bare=True, temperature=2.0, ce_weight=0.5))
        for side in rows.sides:
            above = decoded(side).view(TOKENS, VOCAB) - side.largest.repeat_interleave(32, 1)[:, :VOCAB].double()
            sums = torch.nn.functional.pad(above.exp(), (0, 10)).view(TOKENS, 5, 32).sum(-1)
            torch.testing.assert_close(side.sums.double(), sums, rtol=1e-5, atol=0)

    @pytest.mark.parametrize("t", [0.4, 1.0])
    def test_a_minus_says_that_a_code_is_banned(self, t: float) -> None:
        case = replace(case_of("forward_kl", t=t), student_softcap=None, teacher_softcap=None)
        assert case.student_bias is not None
        assert case.teacher_bias is not None
        case.student_bias[[3, 149]] = case.student_bias[32:64] = case.teacher_bias[70] = -INF
        rows, _ = rows_of(case)
        student, target = rows.sides
        banned = torch.nn.functional.pad(student.codes == -INF, (0, 10)).view(TOKENS, 5, 32).any(-1)
        assert torch.equal(student.sums.signbit(), banned)
        assert banned[0].tolist() == [True, True, False, False, True]
        assert not target.sums.signbit().any(), "which does not learn"

    def test_labels_in_every_tile_and_at_its_edges_have_their_logit_unrounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(offsets, "LABELS", 8)
        labels = torch.tensor([*range(30, 34), *range(62, 66), *range(0, 150, 15), 149, -100])
        case = replace(case_of(bare=True, ce_weight=0.5, temperature=2.0), labels=labels)
        rows, (x, _) = rows_of(case)
        found = rows.sides[0].label_logits
        assert found is not None
        kept = labels >= 0
        torch.testing.assert_close(found.double()[kept], x[kept.nonzero()[:, 0], labels[kept]], rtol=1e-5, atol=1e-5)
        assert rows.sides[1].label_logits is None


class TestLoss:
    @pytest.mark.parametrize("dtype", [BF16, torch.float16])
    @pytest.mark.parametrize("budget", [None, 4 * 192 * 6, 1])
    def test_however_the_tokens_are_cut(self, dtype: torch.dtype, budget: int | None, made: list[Any]) -> None:
        case = case_of("reverse_kl", dtype=dtype, t=0.4, temperature=2.0, ce_weight=0.5)
        with running("triton"):
            right = case.run()
        del made[:]
        found = case.run(strategy="tokens", memory_budget=budget)
        kept = TOKENS - 2  # one label is ignored, one weight 0
        rows = {None: kept, 4 * 192 * 6: 6, 1: 1}[budget]
        assert [len(one.sides[0].codes) for one in made] == [rows] * (2 * kept // rows)  # losses of tokens, and their mean
        assert_as_good_as_eager({0: ratios([found], [case.plain(dtype)], [case.plain()])})  # type: ignore[list-item]
        for name, value in right.items():  # and by far closer than that to what float32 logits give
            torch.testing.assert_close(found[name].float(), value.float(), rtol=2e-2, atol=4e-3 * value.abs().max().item())

    def test_a_target_that_is_the_student_is_no_loss(self) -> None:
        low = replace(
            case_of("reverse_kl", t=0.0, spread=0.3, bare=True), student_bias=torch.full((VOCAB,), -1.0)
        )  # largest - 1 is rounded
        for case in (case_of("forward_kl", t=0.0), case_of("jsd", t=0.0, temperature=2.0), low):
            found = case.run()
            assert (found["losses"] == 0).all()
            assert not found["student_hidden"].any()

    def test_two_runs_agree_bit_for_bit(self) -> None:
        case = case_of("reverse_kl", t=0.4, ce_weight=0.5)
        for one, other in zip(*(case.run().values() for _ in range(2)), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)

    @pytest.mark.parametrize("needs", [("student_hidden",), ("student_weight",), ()])
    def test_what_takes_no_gradient(self, needs: tuple[str, ...]) -> None:
        case = case_of(bare=True)
        leaves = {name: leaf.detach().requires_grad_(name in needs) for name, leaf in case.learned().items()}
        loss = case.loss(leaves)
        right = case.run()
        torch.testing.assert_close(loss.detach(), right["loss"], rtol=0, atol=0)
        for name, grad in zip(needs, torch.autograd.grad(loss, [leaves[name] for name in needs]) if needs else (), strict=True):
            torch.testing.assert_close(grad, right[name], rtol=0, atol=0)

    def test_labels_that_nobody_checks(self) -> None:
        case = case_of(ce_weight=0.5)
        right, found = case.run(), case.run(check_labels=False)
        for name, value in right.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-2 * value.abs().max().item())
        assert case.labels is not None
        wrong = replace(case, labels=case.labels.clone().index_fill_(0, torch.tensor([4]), VOCAB))
        assert wrong.run(check_labels=False)["loss"].isnan()

    @pytest.mark.parametrize("banned", [False, True])
    def test_a_teacher_that_learns_too(self, banned: bool, made: list[Any]) -> None:
        case = case_of("jsd", temperature=2.0, ce_weight=0.5, seed=3)
        if banned:
            case = teacher_bans(case)
        exact, eager = (okd.plain(case, 0.3, dtype) for dtype in (torch.float64, BF16))
        found = okd.results(case, 0.3, strategy="tokens", memory_budget=6 * 192 * 5)
        assert len(made) > 4
        for learner, result in found.items():
            assert_as_good_as_eager({0: ratios([result], [eager[learner]], [exact[learner]])})


class TestMetrics:
    @pytest.mark.parametrize("banned", [False, True])
    @pytest.mark.parametrize(("t", "temperature"), [(1.0, 1.0), (0.4, 2.0), (0.0, 1.0)])
    @pytest.mark.parametrize("name", kd.divergences())
    def test_they_are_those_of_the_stored_logits(
        self, name: str, t: float, temperature: float, banned: bool, made: list[Any]
    ) -> None:
        case = case_of(name, t=t, temperature=temperature, ce_weight=0.5, kd_weight=3.0)
        assert case.student_bias is not None
        assert case.teacher_bias is not None
        if banned:
            case = replace(case, student_softcap=None, teacher_softcap=None, labels=torch.full((TOKENS,), 5))
            case.student_bias[[3, 149]] = case.student_bias[32:64] = case.teacher_bias[60:70] = -INF  # type: ignore[index]
        result, found = with_metrics(case)
        rows = made[0]
        right = oracle.metrics(*(temperature * logits for logits in rows.logits), None, None, case.options)
        ce = oracle.metrics(*case.logits(), case.labels, case.token_weight, case.options)["ce"]
        torch.testing.assert_close(found.pop("ce").double(), ce, rtol=1e-3, atol=1e-3)
        assert set(found) == set(right)
        for metric, value in right.items():
            torch.testing.assert_close(
                found[metric].double(), value, rtol=2e-5, atol=2e-6, msg=lambda text, of=metric: f"{of}: {text}"
            )
        assert_as_good_as_eager({0: ratios([result], [case.plain(BF16)], [case.plain()])})
        if t == 0.0:
            assert found["kd"] == 0

    def test_labels_whose_loss_nobody_asks_for(self, made: list[Any]) -> None:
        case = case_of(bare=True)
        case = replace(case, labels=torch.arange(TOKENS))
        _, found = case.loss(return_metrics=True)
        assert made
        right = oracle.metrics(*case.logits(), case.labels, None, case.options)["ce"]
        torch.testing.assert_close(found["ce"].double(), right, rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("t", [0.4, 1.0])
    def test_however_the_tokens_are_cut(self, t: float, made: list[Any]) -> None:
        case = case_of("forward_kl", t=t)
        (_, right), (result, found) = (
            with_metrics(case, strategy="tokens", memory_budget=budget) for budget in (None, 4 * 192 * 6)
        )
        assert len(made) == 2 * (1 + 3)
        for metric, value in right.items():
            torch.testing.assert_close(found[metric], value, rtol=1e-6, atol=0)
        assert_as_good_as_eager({0: ratios([result], [case.plain(BF16)], [case.plain()])})

    def test_of_a_loss_that_does_not_ask_for_the_teacher(self, made: list[Any]) -> None:
        case = case_of("jsd", kd_weight=0.0, ce_weight=1.0)
        result, found = with_metrics(case)
        right = oracle.metrics(*made[0].logits, None, None, case.options)
        torch.testing.assert_close(found["kd"].double(), right["kd"], rtol=2e-5, atol=2e-6)
        assert_as_good_as_eager({0: ratios([result], [case.plain(BF16)], [case.plain()])})

    def test_without_a_look_at_the_labels(self) -> None:
        case = case_of("forward_kl", t=0.4, ce_weight=0.5)
        (right, of_all), (result, found) = (with_metrics(case, check_labels=check) for check in (True, False))
        for one, other in ((result, right), (found, of_all)):
            for name, value in other.items():
                torch.testing.assert_close(one[name], value, rtol=1e-5, atol=1e-2 * value.abs().max().item())

    @pytest.mark.parametrize("banned", [False, True])
    def test_of_a_student_whose_teacher_learns(self, banned: bool, made: list[Any]) -> None:
        case = case_of("jsd", temperature=2.0, ce_weight=0.5, seed=3)
        if banned:
            case = teacher_bans(case)
        found, without = (okd.run(case, strategy="tokens", return_metrics=metrics) for metrics in (True, False))
        (rows, _) = made
        right = oracle.metrics(*(2.0 * logits for logits in rows.logits), None, None, case.options)
        for metric, value in right.items():
            torch.testing.assert_close(found.pop(metric).double(), value, rtol=2e-5, atol=2e-6)
        del found["ce"]
        for name, value in without.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=0)

    def test_a_largest_entry_in_any_tile_is_found(self, made: list[Any]) -> None:
        """Also where several are as large: the first one, as of float32 logits. A thread looks at every 32nd tile."""
        case = case_of(bare=True)
        student, teacher = (torch.randn(TOKENS, 1100, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
        for row, (of_student, of_teacher) in enumerate(
            [((5, 1029), (5,)), ((31, 32), (31,)), ((32, 90), (90,)), ((1099,), (1099, 0))]
        ):
            student[row, list(of_student)], teacher[row, list(of_teacher)] = 8.0, 8.0
        hidden = torch.eye(TOKENS, 24)
        padded = [torch.nn.functional.pad(side.t(), (0, 24 - TOKENS)).to(BF16) for side in (student, teacher)]
        parts = {"student_hidden": hidden.to(BF16), "teacher_hidden": hidden.to(BF16)}
        case = replace(case, **parts, student_weight=padded[0], teacher_weight=padded[1])
        for row, agreement in enumerate((1.0, 1.0, 0.0, 0.0)):
            weight = torch.zeros(TOKENS).index_fill_(0, torch.tensor([row]), 1.0)
            _, found = replace(case, token_weight=weight).loss(return_metrics=True)
            assert found["agreement"] == agreement, row
        assert len(made) == 4


class TestSpecialValues:
    """As everywhere: what is banned adds nothing, NaN and +inf are not hidden (DESIGN's numbers, test_special_values.py)."""

    @pytest.mark.parametrize("t", [0.0, 0.4, 1.0])
    @pytest.mark.parametrize("of", ["student", "teacher", "both"])
    @pytest.mark.parametrize(("name", "temperature"), [("forward_kl", 1.0), ("forward_kl", 2.0), ("reverse_kl", 1.0)])
    def test_banned_tokens_and_a_tile_that_is_banned_whole(self, name: str, temperature: float, of: str, t: float) -> None:
        case = case_of(name, t=t, temperature=temperature, ce_weight=0.5)
        case = replace(case, student_softcap=None, teacher_softcap=None)
        assert case.student_bias is not None
        assert case.teacher_bias is not None
        for bias in {"student": [case.student_bias], "teacher": [case.teacher_bias]}.get(
            of, [case.student_bias, case.teacher_bias]
        ):
            bias[[3, 149]] = bias[32:64] = -INF
        case = replace(case, labels=torch.full((TOKENS,), 5))
        found = case.run()
        assert all(value.isfinite().all() for value in found.values())
        assert_as_good_as_eager({0: ratios([found], [case.plain(BF16)], [case.plain()])})
        if of != "teacher":
            assert not found["student_weight"][32:64].any()

    @pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # what the interpreter's NumPy says
    @pytest.mark.parametrize("value", [NAN, INF])
    @pytest.mark.parametrize("part", ["student_hidden", "teacher_hidden", "student_bias", "teacher_bias"])
    @pytest.mark.parametrize(
        ("name", "t", "metrics"),
        [("total_variation", 1.0, False), ("forward_kl", 0.0, False), ("forward_kl", 0.0, True), ("forward_kl", 0.4, True)],
    )
    def test_what_is_not_finite_is_seen(self, name: str, t: float, metrics: bool, value: float, part: str) -> None:
        case = replace(case_of(name, t=t), student_softcap=None, teacher_softcap=None)
        getattr(case, part).view(-1)[7] = value
        found = with_metrics(case)[0] if metrics else case.run()
        rows = range(TOKENS) if part.endswith("bias") else [0]
        kept = [row for row in rows if row not in (1, 2)]  # ignored, and of weight 0
        assert found["losses"][kept].isnan().all()
        assert found["loss"].isnan()
        assert found["student_hidden"][kept].isnan().any(1).all()
        assert found["student_weight"].isnan().any(1).all(), "of every token"

    def test_dropped_tokens_are_not_looked_at(self) -> None:
        case = case_of(ce_weight=0.5)
        case.student_hidden[1], case.teacher_hidden[2] = NAN, NAN
        assert all(value.isfinite().all() for value in case.run().values())


class TestWhereItIsNotTaken:
    """Where what the kernels are made for is not there, logits are kept in float32 as ever."""

    def test_float32_and_short_rows(self, made: list[Any]) -> None:
        case_of(dtype=torch.float32).run()
        replace(draw(vocab=37, dtype=BF16), options=Options()).run()
        assert not made

    def test_temperatures_that_make_differences_small(self, made: list[Any]) -> None:
        case = case_of(temperature=4.5, ce_weight=0.5)
        exact, found = case.plain(), case.run()
        assert not made
        assert_as_good_as_eager({0: ratios([found], [case.plain(BF16)], [exact])})
        case_of(temperature=4.0).run()
        assert made

    def test_a_loss_that_does_not_look_at_the_teacher(self, made: list[Any]) -> None:
        case_of(kd_weight=0.0, ce_weight=1.0).run()
        assert not made

    def test_nobody_asked(self, made: list[Any]) -> None:
        for value in ("", "float32"):
            with mock.patch.dict(os.environ, KDKERNELS_LOGITS=value):
                case_of().run()
        with mock.patch.dict(os.environ):
            del os.environ["KDKERNELS_LOGITS"]
            case_of().run()
        assert not made

    def test_the_vocab_strategy(self, made: list[Any]) -> None:
        case_of().run(strategy="vocab")
        assert not made

    def test_an_unknown_choice_is_refused(self) -> None:
        said = pytest.raises(ValueError, match="KDKERNELS_LOGITS is 'half'; accepted: float32, offsets")
        with mock.patch.dict(os.environ, KDKERNELS_LOGITS="half"), said:
            case_of().run()


def test_the_plan_has_four_bytes_a_logit_and_six_where_the_teacher_learns() -> None:
    with as_on_a_gpu():
        for online, each in ((False, 4), (True, 6)):
            plan = kd.plan(TOKENS, VOCAB, 24, 40, BF16, strategy="tokens", memory_budget=2**20, online_teacher=online)
            assert plan.logits_bytes == TOKENS * 192 * each


def test_a_named_gpu_is_planned_with_what_would_run_there() -> None:
    for device, each in (("H100", 4), ("H200", 4), ("A100-80", 10), ("B200", 10)):
        plan = kd.plan(64, 6400, 24, 40, BF16, device=device, strategy="tokens")
        assert plan.logits_bytes == 64 * 6400 * each, device


@pytest.mark.parametrize("name", ["forward_kl", "jsd"])
def test_a_row_of_weight_0_is_not_computed(name: str) -> None:
    rows, _ = rows_of(case_of(name, bare=True))
    dx = torch.full((TOKENS, VOCAB), 3.0, dtype=BF16)
    weights = torch.ones(TOKENS)
    weights[3] = 0.0
    of_rows = Row(*rows.row_loss(0, weights, dx).unbind(1))
    assert of_rows.kd[3] == 0
    assert not dx[3].any()
    assert dx[4].any()

"""Distillation from the k tokens that an offline teacher kept: the loss and gradients that the formulas give, at three products."""

from __future__ import annotations

import decimal
import functools
import itertools
import math
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

import pytest
import torch
from torch import Tensor

import kdkernels as kd
from kdkernels.engine import keep as keeping
from kdkernels.engine import outcomes
from kdkernels.engine import run as loop
from tests.backends.test_backends import SPREADS, yardsticks
from tests.engine.test_cost import STUDENT, US, N, Products, V
from tests.engine.test_products import kind  # noqa: F401  (a fixture)
from tests.losses.test_inputs import OPTIONS, forbid_work, refused
from tests.losses.test_okd import MAIN
from tests.losses.test_operators import Recorder
from tests.support import oracle
from tests.support.cases import Case, InsideOperators, Result, assert_as_good_as_eager, draw, dressed, keywords, ratios, strided
from tests.support.oracle import Options

NAN, INF = torch.nan, torch.inf
TAILS = ("renormalize", "bucket")
REDUCTIONS = ("mean", "sum", "none")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# In small cases two or three tokens of six, or a dozen columns of 37.
BUDGET = 300
both_tails = pytest.mark.parametrize("tail", TAILS)
both_strategies = pytest.mark.parametrize("strategy", ["tokens", "vocab"])
every_divergence = pytest.mark.parametrize("name", kd.divergences())
every_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


@dataclass(frozen=True)
class Kept:
    """A student's case, and what was kept of the teacher: ids and log-probabilities (..., K), perhaps that of the rest (...)."""

    case: Case
    ids: Tensor
    log_probs: Tensor
    tail: str = "renormalize"
    rest: Tensor | None = None

    def learned(self) -> dict[str, Tensor]:
        return self.case.learned()

    def loss(self, leaves: dict[str, Tensor] | None = None, **more: Any) -> Any:
        leaves = self.learned() if leaves is None else leaves
        head, _ = self.case.heads(leaves)
        given = {"token_weight": self.case.token_weight, "tail": self.tail, "topk_rest": self.rest}
        options = {**keywords(self.case.options), **given, **more}
        return kd.linear_topk_kd_loss(leaves["student_hidden"], head, self.ids, self.log_probs, self.case.labels, **options)

    def run(self, **more: Any) -> Result:
        """Losses of the tokens, their reduction, and its gradients."""
        leaves = {name: leaf.detach().requires_grad_() for name, leaf in self.learned().items()}
        loss = self.loss(leaves, **more)
        grads = torch.autograd.grad(loss.sum(), list(leaves.values()))
        with torch.no_grad():
            per_token = self.loss(leaves, **{**more, "reduction": "none", "normalizer": None})
        return {"losses": per_token, "loss": loss.detach(), **dict(zip(leaves, grads, strict=True))}

    def plain(self, dtype: torch.dtype = torch.float64) -> Result:
        """The formulas with autograd, in ``dtype``."""
        case, options = self.case, self.case.options
        leaves = {name: leaf.detach().to(dtype).requires_grad_() for name, leaf in self.learned().items()}
        x = oracle.after_head(
            *(leaves.get(name) for name in ("student_hidden", "student_weight", "student_bias")),  # type: ignore[arg-type]
            case.student_scale,
            case.student_softcap,
        )
        keep = oracle.kept(x.shape[:-1], case.labels, case.token_weight, options.ignore_index)
        of_rows = [
            divergence(row, ids, log_probs, self.tail, options, None if self.rest is None else self.rest[keep][at])
            for at, (row, ids, log_probs) in enumerate(zip(x[keep], self.ids[keep], self.log_probs[keep], strict=True))
        ]
        square = options.temperature**2 if options.square_temperature else 1.0
        loss = options.kd_weight * square * torch.stack([*of_rows, x.sum() * 0])[:-1]
        if options.ce_weight and case.labels is not None:
            loss = loss + options.ce_weight * oracle.cross_entropy(x[keep], case.labels[keep])
        if case.token_weight is not None:
            loss = loss * case.token_weight[keep].to(loss.dtype)
        per_token = torch.zeros(keep.shape, dtype=loss.dtype).masked_scatter(keep, loss)
        mean = oracle.mean(per_token, case.labels, case.token_weight, options)
        grads = torch.autograd.grad(mean, list(leaves.values()))
        return {"losses": per_token.detach(), "loss": mean.detach(), **dict(zip(leaves, grads, strict=True))}


def log_of_rest(log_probs: list[float], least: float = 2.0**-23) -> float:
    """log(1 - sum of exp), in fifty digits: what is left may be far below the roundings of 1. At least 2^-23, as is documented."""
    with decimal.localcontext(decimal.Context(prec=50)):
        rest = max(1 - sum(Decimal(value).exp() for value in log_probs), Decimal(least))
        return float(rest.ln()) if rest > 0 else -INF


def of_one_row(
    x: Tensor, ids: Tensor, log_probs: Tensor, tail: str, options: Options, rest: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of target and student over the outcomes of a row: x [V], ids and log_probs [K], rest 0-dim."""
    lq = torch.log_softmax(x / options.temperature, -1)
    used = log_probs != -INF
    chosen, given = ids[used], log_probs[used].to(x.dtype)
    own = lq[chosen]
    if tail == "bucket":
        outside = torch.ones(len(x), dtype=torch.bool)
        outside[chosen] = False
        own_rest = lq[outside].logsumexp(0) if outside.any() else x.new_tensor(-INF)
        # of no rest that the student has, none is made up
        left = log_of_rest(log_probs[used].tolist(), 2.0**-23 if own_rest > -INF else 0.0) if rest is None else rest
        own, given = torch.cat([own, own_rest[None]]), torch.cat([given, x.new_tensor([float(left)])])
    return torch.log_softmax(oracle.target_logits(own, given, options.t), -1), own


def divergence(x: Tensor, ids: Tensor, log_probs: Tensor, tail: str, options: Options, rest: Tensor | None = None) -> Tensor:
    lp, lq = of_one_row(x, ids, log_probs, tail, options, rest)
    if not len(lq):
        return x.sum() * 0
    banned = (lp == -INF) | (lq == -INF)
    parameter = oracle.DEFAULTS.get(options.divergence, 0.0) if options.parameter is None else options.parameter
    terms = oracle.FORMULAS[options.divergence](lp.masked_fill(banned, 0.0), lq.masked_fill(banned, 0.0), parameter)
    return terms.masked_fill(banned, 0.0).sum()


def keep(
    case: Case,
    count: int,
    tail: str = "renormalize",
    dtype: torch.dtype = torch.float32,
    ragged: bool = False,
    floor: float = 0.0,
    rest: bool = False,
) -> Kept:
    """The teacher's ``count`` most likely tokens of each position of a case.

    ragged: every second position has two unused slots, in front, with ids that no token has. floor: probability that the teacher
    spreads evenly over the vocabulary. rest: keep the others' log-probability too.
    """
    _, z = case.logits()
    p = (1 - floor) * torch.softmax(z / case.options.temperature, -1) + floor / z.shape[-1]
    whole = p.log() if floor else torch.log_softmax(z / case.options.temperature, -1)
    log_probs, ids = whole.topk(count)
    if ragged:
        ids.view(-1, count)[::2, 0], ids.view(-1, count)[::2, 1] = -7, 10**9
        log_probs.view(-1, count)[::2, :2] = -INF
    listed = ids.where(log_probs > -INF, ids[..., -1:])
    others = whole.scatter(-1, listed, -INF).logsumexp(-1).to(dtype) if rest else None
    return Kept(case, ids, log_probs.to(dtype), tail, others)


def full(tail: str = "bucket", dtype: torch.dtype = torch.float32, **options: Any) -> Kept:
    """Six tokens, one ignored and one of weight 0, everything that a head can have, and slots that are not used."""
    options = {"temperature": 2.0, "ce_weight": 0.5, **options}
    case = replace(dressed(draw(dtype=dtype)), options=Options(**options))
    return keep(case, 5, tail, torch.float64 if dtype == torch.float64 else torch.float32, ragged=True)


def assert_same(found: Any, right: Any) -> None:
    assert len(found) == len(right)
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def assert_close(found: Result, right: Result, share: float) -> None:
    """Within a share of each result's largest entry."""
    for name, value in right.items():
        atol = share * max(1e-300, value.double().abs().max().item())
        torch.testing.assert_close(
            found[name].double(), value.double(), rtol=0, atol=atol, msg=lambda text, of=name: f"{of}: {text}"
        )


# All divergences in float32, those that are most used in every dtype.
ACCURACY = [(dtype, name) for dtype in DTYPES for name in kd.divergences() if dtype == torch.float32 or name in MAIN]


@functools.cache
def compared(name: str, tail: str, dtype: torch.dtype, spread: float) -> Any:
    """For each setting its cases, the exact results and eager's; bare and dressed, the target the teacher's or mixed."""
    found = {}
    for bare, (t, temperature) in ((True, (1.0, 1.0)), (False, (0.4, 2.0)), (False, (1.0, 1.0))):
        options = Options(name, t=t, temperature=temperature, ce_weight=0.0 if bare else 0.5, kd_weight=0.75)
        # Near enough to each other for the k tokens to hold mass of both.
        cases = [draw(seed, (10,), 211, (16, 16), spread, dtype, near=spread / 8) for seed in range(2)]
        cases = [replace(case if bare else dressed(case, seed), options=options) for seed, case in enumerate(cases)]
        # What is left of 1 below float64's own roundings is no result that float64 could be held to.
        floor = 0.01 if dtype == torch.float64 else 0.0
        rest = tail == "bucket" and t < 1.0
        kept = [keep(case, 7, tail, ragged=not bare, floor=floor, rest=rest) for case in cases]
        working = torch.float32 if dtype == torch.float64 else dtype
        exact, eager = ([one.plain(to) for one in kept] for to in (torch.float64, working))
        found[bare, t, temperature] = (kept, *yardsticks(exact, eager, 1.0, dtype))
    return found


@both_tails
@pytest.mark.parametrize(("dtype", "name"), ACCURACY)
def test_as_close_to_the_formulas_as_eager(name: str, dtype: torch.dtype, tail: str) -> None:
    over = {}
    for spread, strategy in itertools.product(SPREADS, ("tokens", "vocab")):
        for setting, (kept, exact, eager) in compared(name, tail, dtype, spread).items():
            found = [one.run(strategy=strategy, memory_budget=3000) for one in kept]
            over[(spread, strategy, *setting)] = ratios(found, eager, exact)
    assert_as_good_as_eager(over)


@both_tails
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["forward_kl", "jsd"])
def test_on_every_kind_of_machine(kind: str, name: str, dtype: torch.dtype, tail: str) -> None:  # noqa: F811
    """16-bit products that are widened, that are native, and whose results stay in float32."""
    test_as_close_to_the_formulas_as_eager(name, dtype, tail)


class TestFormulas:
    """In float64, where nothing but the formula matters."""

    @both_tails
    @both_strategies
    @every_divergence
    @pytest.mark.parametrize(("t", "temperature"), [(0.0, 1.0), (0.3, 1.0), (0.7, 3.0), (1.0, 0.5)])
    def test_targets(self, t: float, temperature: float, name: str, strategy: str, tail: str) -> None:
        if name == "total_variation":
            t = max(t, 0.05)  # with both at one point its slope is a sign, which the oracle's roundings decide
        kept = full(tail, torch.float64, divergence=name, t=t, temperature=temperature)
        assert_close(kept.run(strategy=strategy, memory_budget=2 * BUDGET), kept.plain(), 1e-12)
        tensor = torch.tensor(t, dtype=torch.float64)
        assert_same([kept.loss(t=tensor, strategy=strategy)], [kept.loss(strategy=strategy)])

    @both_tails
    @both_strategies
    @pytest.mark.parametrize(
        "options",
        [
            {"square_temperature": False},
            {"kd_weight": 0.0},
            {"ce_weight": 0.0},
            {"kd_weight": 3.0, "ce_weight": 2.0, "temperature": 1.0},
            {"normalizer": 7.0},
            {"divergence": "jsd", "parameter": 0.2},
        ],
    )
    def test_factors(self, options: dict[str, Any], strategy: str, tail: str) -> None:
        kept = full(tail, torch.float64, **options)
        assert_close(kept.run(strategy=strategy, memory_budget=2 * BUDGET), kept.plain(), 1e-12)

    @both_tails
    def test_a_sum_divides_by_nothing(self, tail: str) -> None:
        kept = full(tail, torch.float64)
        undivided = replace(kept, case=replace(kept.case, options=replace(kept.case.options, normalizer=1.0)))
        assert_close(kept.run(reduction="sum", normalizer=None), undivided.plain(), 1e-12)

    @both_tails
    @pytest.mark.parametrize("lead", [(), (1,), (2, 3), (1, 2, 1, 3)])
    def test_leading_dimensions_are_only_a_shape(self, lead: tuple[int, ...], tail: str) -> None:
        case = replace(dressed(draw(tokens=lead, dtype=torch.float64)), options=Options(ce_weight=0.5))
        kept = keep(case, 3, tail, torch.float64)
        assert kept.loss(reduction="none").shape == lead
        flat = replace(
            kept,
            case=replace(
                case,
                student_hidden=case.student_hidden.reshape(-1, 8),
                labels=case.labels.reshape(-1),  # type: ignore[union-attr]
                token_weight=case.token_weight.reshape(-1),  # type: ignore[union-attr]
            ),
            ids=kept.ids.reshape(-1, 3),
            log_probs=kept.log_probs.reshape(-1, 3),
        )
        right = flat.plain()
        found = kept.run()
        assert_close({**found, **{name: found[name].view(right[name].shape) for name in found}}, right, 1e-12)

    @every_divergence
    @pytest.mark.parametrize("t", [0.4, 1.0])
    def test_renormalized_is_a_teacher_who_bans_the_others(self, t: float, name: str) -> None:
        """The loss from logits with z = -inf outside of the k tokens: another implementation, down to the row loops."""
        kept = full("renormalize", torch.float64, divergence=name, t=t)
        case = kept.case
        x, _ = case.logits()
        z = torch.full_like(x, -INF)
        for row, ids, log_probs in zip(z, kept.ids, kept.log_probs, strict=True):
            used = log_probs != -INF
            row[ids[used]] = log_probs[used] * case.options.temperature
        right = kd.kd_loss(*(x, z, case.labels), **keywords(case.options), token_weight=case.token_weight, return_metrics=True)
        found = kept.loss(return_metrics=True)
        torch.testing.assert_close(found[0], right[0], rtol=1e-12, atol=0)
        for metric in ("kd", "ce", "target_entropy", "student_entropy", "agreement", "tokens"):
            torch.testing.assert_close(found[1][metric], right[1][metric], rtol=1e-12, atol=1e-15)

    @both_tails
    @both_strategies
    @every_divergence
    @pytest.mark.parametrize("t", [0.0, 0.4, 1.0])
    def test_a_teacher_that_is_known_whole_is_a_teacher(self, t: float, name: str, strategy: str, tail: str) -> None:
        case = replace(dressed(draw(dtype=torch.float64)), options=Options(name, t=t, temperature=2.0, ce_weight=0.5))
        kept = keep(case, 37, tail, torch.float64)
        found = kept.run(strategy=strategy, memory_budget=2 * BUDGET)
        assert_close(found, case.run(), 1e-12)

    def test_half_of_the_student_may_be_banned(self) -> None:
        for tail, name, t in itertools.product(TAILS, kd.divergences(), (1.0, 0.5)):
            kept = full(tail, torch.float64, divergence=name, t=t)
            case = replace(kept.case, student_softcap=None)
            bias = case.student_bias
            assert bias is not None
            assert case.labels is not None
            bias[::2] = -INF
            case.labels[case.labels >= 0] |= 1  # cross-entropy with a banned label is infinite
            kept = replace(kept, case=case)
            found = kept.run()
            assert all(value.isfinite().all() for value in found.values())
            assert_close(found, kept.plain(), 1e-12)
            assert (found["student_weight"][::2] == 0).all()


class TestSureStudents:
    """Where the student gives nearly all of its mass to the k tokens, 1 - their sum has no digits; the rest still has gradients."""

    @pytest.mark.parametrize("gap", [20.0, 60.0, 200.0, 2000.0])
    @pytest.mark.parametrize("offset", [0.0, 2.0**15])
    @both_strategies
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_the_rest_is_a_softmax_of_its_own(self, dtype: torch.dtype, strategy: str, offset: float, gap: float) -> None:
        """Logits that float32 holds exactly, the k tokens ``gap`` above the others, all of them ``offset`` from 0."""
        x = torch.tensor([[gap, 0.0, 1.0, -1.0, gap - 1.0, 0.5]], dtype=dtype)
        case = Case(x + offset, torch.eye(6, dtype=dtype), x, torch.eye(6, dtype=dtype))
        kept = Kept(case, torch.tensor([[0, 4]]), torch.tensor([[0.5, 0.25]], dtype=dtype).log(), "bucket")
        exact = replace(kept, case=replace(case, student_hidden=x)).plain()
        found = kept.run(strategy=strategy, memory_budget=50)
        eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float64).eps * (1 + offset))  # statistics are kept in float64
        torch.testing.assert_close(found["loss"].double(), exact["loss"], rtol=8 * eps, atol=0)
        # A multiple of the softmax over the rest: what the student gives that outcome, less what the target does.
        rest = [1, 2, 3, 5]
        share = torch.softmax(x[0].double(), 0)[rest].sum() - math.exp(log_of_rest(kept.log_probs[0].tolist()))
        expected = torch.softmax(x[0, rest].double(), 0) * share
        torch.testing.assert_close(found["student_hidden"][0, rest].double(), expected, rtol=8 * eps, atol=0)
        torch.testing.assert_close(exact["student_hidden"][0, rest], expected, rtol=1e-12, atol=0)

    @both_strategies
    def test_or_to_the_rest(self, strategy: str) -> None:
        x = torch.tensor([[-300.0, 2.0, 1.0, -1.0, -301.0, 0.5]])
        kept = Kept(Case(x, torch.eye(6), x, torch.eye(6)), torch.tensor([[0, 4]]), torch.tensor([[0.5, 0.25]]).log(), "bucket")
        assert_close(kept.run(strategy=strategy, memory_budget=50), kept.plain(), 1e-6)

    def test_a_softcap_bans_nothing(self) -> None:
        """-inf before a softcap is its lowest value: tokens have to leave the rest after it."""
        for gap in (1.0, 6.0, 12.0):
            x = torch.tensor([[gap, 0.0, 1.0, -1.0, gap - 1.0, 0.5]], dtype=torch.float64)
            case = Case(x * 50, torch.eye(6).double(), x, torch.eye(6).double(), student_softcap=gap)
            kept = Kept(case, torch.tensor([[0, 4]]), torch.tensor([[0.5, 0.25]]).double().log(), "bucket")
            assert_close(kept.run(), kept.plain(), 1e-12)


class TestSlots:
    @both_tails
    @both_strategies
    @every_divergence
    def test_unused_slots_change_nothing(self, name: str, strategy: str, tail: str) -> None:
        kept = keep(replace(draw(), options=Options(name, t=0.5)), 4, tail)
        lead = kept.ids.shape[:-1]
        # Ids out of range, of the same row's tokens, and of others.
        for wrong in (-1, 10**12, int(kept.ids[0, 0]), 0):
            more = replace(
                kept,
                ids=torch.cat([torch.full((*lead, 2), wrong), kept.ids], -1),
                log_probs=torch.cat([torch.full((*lead, 2), -INF), kept.log_probs], -1),
            )
            options: dict[str, Any] = {"strategy": strategy, "memory_budget": BUDGET}
            assert_close(more.run(**options), kept.run(**options), 1e-6)
            for (_, found), (_, right) in [(more.loss(return_metrics=True), kept.loss(return_metrics=True))]:
                assert_close(found, right, 1e-6)

    @both_tails
    @every_divergence
    def test_a_position_without_any_has_no_target(self, name: str, tail: str) -> None:
        for t in (0.0, 0.5, 1.0):
            case = replace(draw(), options=Options(name, t=t))
            kept = keep(case, 4, tail)
            kept.log_probs[2] = -INF
            found = kept.run(reduction="sum")
            torch.testing.assert_close(found["losses"][2], torch.tensor(0.0), rtol=0, atol=0)
            assert found["student_hidden"][2].abs().max() <= 1e-6
            assert (found["losses"][[0, 1, 3, 4, 5]] != 0).all() or t == 0.0
            _, metrics = kept.loss(return_metrics=True)
            assert all(value.isfinite() for value in metrics.values())
            assert metrics["agreement"] <= 5 / 6

    def test_the_order_of_the_slots_is_nothing(self) -> None:
        kept = full("bucket", torch.float64)
        order = torch.tensor([4, 0, 3, 1, 2])
        assert_close(replace(kept, ids=kept.ids[:, order], log_probs=kept.log_probs[:, order]).run(), kept.run(), 1e-13)

    @both_tails
    def test_mass_above_one_is_normalised(self, tail: str) -> None:
        kept = keep(replace(draw(dtype=torch.float64), options=Options("jsd")), 4, tail, torch.float64)
        kept = replace(kept, log_probs=kept.log_probs + 1.0)
        assert_close(kept.run(), kept.plain(), 1e-12)
        if tail == "renormalize":
            assert_close(kept.run(), replace(kept, log_probs=kept.log_probs - 1.0).run(), 1e-12)

    @both_tails
    @pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32])
    def test_ids_of_any_integer_dtype_and_log_probs_of_any_float(self, dtype: torch.dtype, tail: str) -> None:
        kept = keep(replace(draw(), options=Options()), 4, tail)
        assert_same([replace(kept, ids=strided(kept.ids.to(dtype))).loss()], [kept.loss()])
        for of in DTYPES:
            rounded = kept.log_probs.to(of)
            assert_same([replace(kept, log_probs=rounded).loss()], [replace(kept, log_probs=rounded.double()).loss()])


class TestMetrics:
    @both_tails
    @both_strategies
    @pytest.mark.parametrize("temperature", [1.0, 2.0])
    @pytest.mark.parametrize("t", [0.4, 1.0])
    def test_they_are_means_over_the_kept_tokens(self, t: float, temperature: float, strategy: str, tail: str) -> None:
        kept = full(tail, torch.float64, divergence="jsd", t=t, temperature=temperature)
        case = kept.case
        x, _ = case.logits()
        counts = oracle.kept(x.shape[:-1], case.labels, case.token_weight, -100)
        q = (x[counts] / temperature).softmax(-1)
        rows = [
            of_one_row(x_row, ids, log_probs, tail, case.options)
            for x_row, ids, log_probs in zip(x[counts], kept.ids[counts], kept.log_probs[counts], strict=True)
        ]
        used = kept.log_probs[counts] != -INF
        mass = q.gather(-1, kept.ids[counts].where(used, 0))
        right = {
            "kd": torch.stack(
                [
                    divergence(*row, tail, case.options)
                    for row in zip(x[counts], kept.ids[counts], kept.log_probs[counts], strict=True)
                ]
            ).mean(),
            "target_entropy": torch.stack([torch.special.entr(lp.exp()).sum() for lp, _ in rows]).mean(),
            "student_entropy": torch.special.entr(q).sum(-1).mean(),
            "ce": oracle.cross_entropy(x[counts], case.labels[counts]).mean(),  # type: ignore[index]
            "agreement": (q.argmax(-1) == kept.ids[counts].gather(-1, kept.log_probs[counts].argmax(-1)[:, None])[:, 0])
            .double()
            .mean(),
            "overlap": torch.minimum(mass, kept.log_probs[counts].exp()).where(used, 0.0).sum(-1).mean(),
            "tokens": counts.sum().double(),
        }
        loss, found = kept.loss(return_metrics=True, strategy=strategy, memory_budget=2 * BUDGET)
        assert set(found) == set(right)
        assert not any(value.requires_grad or value.dim() for value in found.values())
        assert_close(found, right, 1e-12)
        assert_same([loss], [kept.loss(strategy=strategy, memory_budget=2 * BUDGET)])

    def test_overlap_is_at_most_that_over_the_vocabulary(self) -> None:
        case = draw(near=0.3)
        whole = case.loss(return_metrics=True)[1]["overlap"]
        found = [keep(case, count, tail).loss(return_metrics=True)[1]["overlap"] for tail in TAILS for count in (1, 5, 37)]
        assert all(value <= whole + 1e-6 for value in found)
        torch.testing.assert_close(found[2], whole)
        assert found[0] < found[1] < found[2]

    def test_agreement_sees_the_students_best_token_wherever_it_is(self) -> None:
        case = draw(tokens=(40,), near=0.3)
        x, z = case.logits()
        right = (x.argmax(-1) == z.argmax(-1)).float().mean()
        assert 0.1 < right < 0.9
        for strategy in ("tokens", "vocab"):
            found = keep(case, 3).loss(return_metrics=True, strategy=strategy, memory_budget=2000)[1]["agreement"]
            torch.testing.assert_close(found, right)

    def test_without_labels_there_is_no_cross_entropy(self) -> None:
        assert "ce" not in keep(draw(), 3).loss(return_metrics=True)[1]


class TestCost:
    # A column of all tokens takes one float32 tile: this is four blocks of the vocabulary.
    BLOCKS = 16 * N * 4

    def count(self, learn: tuple[str, ...], kept: Kept | None = None, **more: Any) -> int:
        kept = keep(draw(tokens=(N,), vocab=V, dims=(STUDENT, 12)), 6, "bucket") if kept is None else kept
        leaves = {name: leaf.detach().requires_grad_(name in learn) for name, leaf in kept.learned().items()}
        with Products() as products:
            loss = kept.loss(leaves, **more).sum()
            if learn:
                loss.backward()
        return products.flops

    @both_tails
    @every_divergence
    @pytest.mark.parametrize("memory_budget", [None, 500, 1])
    def test_three_of_the_students_and_chunks_add_none(self, memory_budget: int | None, name: str, tail: str) -> None:
        kept = keep(replace(draw(tokens=(N,), vocab=V, dims=(STUDENT, 12)), options=Options(name)), 6, tail)
        options: dict[str, Any] = {"strategy": "tokens", "memory_budget": memory_budget, "return_metrics": False}
        assert self.count(("student_hidden", "student_weight"), kept, **options) == 3 * US
        assert self.count(("student_hidden",), kept, **options) == 2 * US
        assert self.count(("student_weight",), kept, **options) == 2 * US
        assert self.count((), kept, **options) == US

    @every_divergence
    def test_streaming_multiplies_once_more_for_every_divergence(self, name: str) -> None:
        kept = keep(replace(draw(tokens=(N,), vocab=V, dims=(STUDENT, 12)), options=Options(name)), 6, "bucket")
        options: dict[str, Any] = {"strategy": "vocab", "memory_budget": self.BLOCKS}
        assert self.count(("student_hidden", "student_weight"), kept, **options) == 4 * US
        assert self.count(("student_hidden",), kept, **options) == 3 * US
        assert self.count((), kept, **options) == US
        assert self.count(("student_hidden", "student_weight"), kept, strategy="vocab") == 3 * US

    def test_losses_per_token_are_computed_again_in_the_backward(self) -> None:
        assert self.count(("student_hidden", "student_weight"), reduction="none") == 4 * US

    @both_strategies
    @pytest.mark.parametrize("count", [0, 1, N // 2, N])
    def test_dropped_tokens_cost_nothing(self, count: int, strategy: str) -> None:
        kept = keep(draw(tokens=(N,), vocab=V, dims=(STUDENT, 12)), 6)
        labels = torch.full((N,), -100)
        labels[torch.randperm(N, generator=torch.Generator().manual_seed(0))[:count]] = 3
        for case in (replace(kept.case, labels=labels), replace(kept.case, token_weight=(labels == 3).float())):
            found = self.count(("student_hidden", "student_weight"), replace(kept, case=case), strategy=strategy)
            assert found == 3 * US * count // N

    @both_strategies
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("memory_budget", [200, 1000, 2000])
    def test_the_scratch_is_within_the_budget(
        self, memory_budget: int, dtype: torch.dtype, strategy: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        taken: list[int] = []
        borrowed = loop.borrowed

        def recording(block: int, tiles: Any, *rest: Any) -> Any:
            taken.append(sum(rows * columns * of.itemsize for (rows, columns), of in tiles))
            return borrowed(block, tiles, *rest)

        monkeypatch.setattr(loop, "borrowed", recording)
        full(dtype=dtype).run(strategy=strategy, memory_budget=memory_budget)
        least = 8 * (37 if strategy == "tokens" else 6)  # one token or one column: less there cannot be
        assert taken
        assert all(0 < size <= max(memory_budget, least) for size in taken)

    @both_strategies
    def test_nothing_as_large_as_all_logits_is_made(self, strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Chunks of eight tokens of 24 or blocks of sixteen columns of 50, in pieces of one row."""
        monkeypatch.setattr(outcomes, "PIECE_BYTES", {"cpu": 1})
        made_of: list[tuple[int, ...]] = []

        class Shapes(InsideOperators):
            def after(self, name: str, made: Any) -> None:
                parts = made if isinstance(made, (tuple, list)) else (made,)
                made_of.extend(tuple(part.shape) for part in parts if isinstance(part, Tensor) and part.dtype != torch.uint8)

        kept = keep(draw(tokens=(N,), vocab=V, dims=(STUDENT, 12)), 6, "bucket")
        leaves = {name: leaf.detach().requires_grad_() for name, leaf in kept.learned().items()}
        with Shapes():
            kept.loss(leaves, strategy=strategy, memory_budget=8 * V * 4)
        wide = {shape for shape in made_of if len(shape) == 2 and shape[1] > STUDENT and shape[0] not in (V, STUDENT)}
        assert wide
        assert max(rows * columns for rows, columns in wide) <= 8 * V

    def test_nobody_waits_for_the_device(self) -> None:
        """Sizes that depend on values make a GPU wait; the kept rows are the only such."""
        seen: list[str] = []

        class Names(InsideOperators):
            def before(self, name: str, args: tuple[Any, ...]) -> None:
                seen.append(name)

        kept = full("bucket")
        leaves = {name: leaf.detach().requires_grad_() for name, leaf in kept.learned().items()}
        with Names():
            kept.loss(leaves, return_metrics=True)
        waiting = {"aten::nonzero", "aten::masked_select", "aten::is_nonzero", "aten::equal", "aten::unique_dim", "aten::_unique2"}
        assert not waiting & set(seen)
        assert seen.count("aten::_local_scalar_dense") == 0
        assert seen.count("aten::nonzero_static") == 1


class TestSpecialValues:
    @both_tails
    @both_strategies
    @every_divergence
    @pytest.mark.parametrize("bad", [NAN, INF])
    def test_a_bad_value_makes_its_row_nan_and_no_other(self, bad: float, name: str, strategy: str, tail: str) -> None:
        options: dict[str, Any] = {"strategy": strategy, "memory_budget": BUDGET, "reduction": "sum"}
        good = keep(replace(draw(), options=Options(name, t=0.5)), 4, tail)
        others = [0, 2, 3, 4, 5]

        def assert_row_is_nan(kept: Kept, **more: Any) -> None:
            found, right = kept.run(**options, **more), good.run(**options, **more)
            assert found["losses"].isnan().tolist() == [False, True, False, False, False, False]
            assert found["loss"].isnan()
            assert found["student_hidden"][1].isnan().all()
            assert found["student_weight"].isnan().any()
            torch.testing.assert_close(found["losses"][others], right["losses"][others], rtol=0, atol=0)
            torch.testing.assert_close(found["student_hidden"][others], right["student_hidden"][others], rtol=0, atol=0)

        hidden = good.case.student_hidden.clone()
        hidden[1, 0] = bad
        log_probs = good.log_probs.clone()
        log_probs[1, 2] = bad
        assert_row_is_nan(replace(good, log_probs=log_probs))
        assert_row_is_nan(replace(good, log_probs=log_probs), t=0.0)
        if bad is NAN:  # an infinite hidden state makes -inf logits, too
            assert_row_is_nan(replace(good, case=replace(good.case, student_hidden=hidden)))
        for column in (int(good.ids[1, 1]), next(v for v in range(37) if v not in good.ids[1])):
            bias = torch.zeros(37)
            bias[column] = bad
            case = replace(good.case, student_bias=bias)
            assert replace(good, case=case).run(**options)["losses"].isnan().all()

    @both_tails
    @both_strategies
    def test_a_divergence_of_weight_zero_is_left_out_whatever_it_came_to(self, strategy: str, tail: str) -> None:
        kept = full(tail, kd_weight=0.0)
        right = kept.run(strategy=strategy)
        wrong = kept.log_probs.masked_fill(kept.log_probs != -INF, NAN)
        found = replace(kept, log_probs=wrong).run(strategy=strategy)
        assert_same(list(found.values()), list(right.values()))

    @both_tails
    @both_strategies
    @every_reduction
    def test_all_tokens_masked(self, reduction: str, strategy: str, tail: str) -> None:
        kept = full(tail)
        case = replace(kept.case, labels=torch.full((6,), -100))
        case.student_hidden[0, 0] = NAN
        for result, value in replace(kept, case=case).run(reduction=reduction, strategy=strategy).items():
            assert (value == 0).all(), result

    @both_tails
    @both_strategies
    @pytest.mark.parametrize("lead", [(0,), (2, 0), (0, 3)])
    def test_no_tokens(self, lead: tuple[int, ...], strategy: str, tail: str) -> None:
        case = replace(draw(tokens=lead), labels=torch.zeros(lead, dtype=torch.int64), options=Options(ce_weight=0.5))
        kept = keep(case, 3, tail)
        found = kept.run(strategy=strategy)
        total, metrics = kept.loss(return_metrics=True, strategy=strategy)
        assert total == found["loss"] == 0
        assert found["losses"].shape == lead
        assert (found["student_weight"] == 0).all()
        assert metrics["tokens"] == 0

    @both_tails
    def test_dropped_rows_may_hold_anything(self, tail: str) -> None:
        kept = full(tail)
        good = kept.run()
        assert kept.case.labels is not None
        for row in (int((kept.case.labels == -100).nonzero()), 2):  # the latter has weight 0
            kept.case.student_hidden[row] = NAN
            kept.ids[row], kept.log_probs[row] = 99, 3.0
        assert_same(list(kept.run().values()), list(good.values()))

    @every_divergence
    def test_students_at_their_target_stay_there(self, name: str) -> None:
        """Where the rest is an outcome; renormalized, a student at its teacher still has mass outside of the k tokens to lose."""
        case = replace(draw(spread=5.0, near=0.0), options=Options(name, temperature=2.0))
        for t in (0.0, 0.4, 1.0):
            found = keep(case, 5, "bucket").run(t=t)
            assert found["losses"].abs().max() <= 1e-6
            if name != "total_variation" or t == 0.0:  # its slope is a sign, which roundings decide unless both are the same bits
                assert found["student_hidden"].abs().max() <= 1e-5

    @both_strategies
    @both_tails
    def test_total_variation_at_ties_has_gradient_exactly_zero(self, tail: str, strategy: str) -> None:
        case = replace(draw(), options=Options("total_variation", t=0.0, temperature=2.0))
        kept = keep(case, 5 if tail == "bucket" else 37, tail)
        found = kept.run(strategy=strategy, memory_budget=BUDGET)
        assert all((value == 0).all() for value in found.values())


class TestAutograd:
    def leaves(self, kept: Kept) -> dict[str, Tensor]:
        return {name: leaf.clone().requires_grad_() for name, leaf in kept.learned().items()}

    @both_tails
    @both_strategies
    @every_reduction
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_backward_twice_gives_the_same_gradient_twice(
        self, dtype: torch.dtype, reduction: str, strategy: str, tail: str
    ) -> None:
        kept = full(tail, dtype, divergence="jsd", t=0.6)
        leaves = self.leaves(kept)
        value = kept.loss(leaves, reduction=reduction, strategy=strategy, memory_budget=BUDGET)
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        upstream, inputs = torch.full_like(value, 0.25), list(leaves.values())
        first = torch.autograd.grad(value, inputs, upstream, retain_graph=True)
        assert [grad.dtype for grad in first] == [dtype] * 3
        saved = [grad.clone() for grad in first]
        for grad in first:
            grad.fill_(NAN)  # what a caller does with a gradient is their own business
        assert_same(torch.autograd.grad(value, inputs, upstream), saved)

    @both_tails
    def test_each_token_has_its_own_upstream_gradient(self, tail: str) -> None:
        kept = full(tail, torch.float64)
        leaves = self.leaves(kept)
        upstream = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0, 1e-3], dtype=torch.float64)
        inputs = list(leaves.values())
        together = torch.autograd.grad(kept.loss(leaves, reduction="none"), inputs, upstream)
        per_token = [torch.autograd.grad(kept.loss(leaves, reduction="none")[token], inputs) for token in range(6)]
        for at, grad in enumerate(together):
            by_hand = sum(factor * grads[at] for factor, grads in zip(upstream, per_token, strict=True))
            torch.testing.assert_close(grad, by_hand, rtol=1e-10, atol=1e-14)

    @both_strategies
    @every_reduction
    @pytest.mark.parametrize("learn", [("student_hidden",), ("student_weight",), ("student_bias",), ()])
    def test_gradients_go_only_where_they_are_asked_for(self, learn: tuple[str, ...], reduction: str, strategy: str) -> None:
        kept = full()
        everything = kept.run(reduction=reduction, strategy=strategy, memory_budget=BUDGET)
        leaves = {name: leaf.clone().requires_grad_(name in learn) for name, leaf in kept.learned().items()}
        loss = kept.loss(leaves, reduction=reduction, strategy=strategy, memory_budget=BUDGET)
        assert loss.requires_grad == bool(learn)
        if learn:
            loss.sum().backward()
        for name, leaf in leaves.items():
            if name in learn:
                torch.testing.assert_close(leaf.grad, everything[name], rtol=1e-6, atol=1e-9)
            else:
                assert leaf.grad is None

    @both_strategies
    @every_reduction
    def test_two_runs_agree_bit_for_bit_and_inputs_are_never_written_to(self, reduction: str, strategy: str) -> None:
        kept = full(divergence="jsd")
        parts = [part for part in (*vars(kept.case).values(), kept.ids, kept.log_probs) if isinstance(part, Tensor)]
        before, versions = [part.clone() for part in parts], [part._version for part in parts]
        first, second = (kept.run(reduction=reduction, strategy=strategy, memory_budget=BUDGET) for _ in range(2))
        assert_same(list(first.values()), list(second.values()))
        assert_same(parts, before)
        assert [part._version for part in parts] == versions

    @both_strategies
    @both_tails
    def test_pieces_are_only_a_size(self, tail: str, strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
        kept = full(tail)
        whole = kept.run(strategy=strategy)
        monkeypatch.setattr(outcomes, "PIECE_BYTES", {"cpu": 1})
        assert_close(kept.run(strategy=strategy), whole, 1e-6)

    @both_strategies
    @every_reduction
    def test_autocast(self, reduction: str, strategy: str) -> None:
        """bfloat16 hidden states over float32 master weights."""
        kept = full(temperature=1.0)
        case = replace(kept.case, student_hidden=kept.case.student_hidden.bfloat16())
        right = replace(kept, case=replace(case, student_hidden=case.student_hidden.float())).run(reduction=reduction)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = replace(kept, case=case).run(reduction=reduction, strategy=strategy, memory_budget=BUDGET)
        assert found["loss"].dtype == torch.float32
        assert {name: found[name].dtype for name in kept.learned()} == {name: leaf.dtype for name, leaf in case.learned().items()}
        assert_close(found, right, 4 * torch.finfo(torch.bfloat16).eps)

    def test_float16_gradients_of_single_tokens_survive_until_a_gradient_scaler_multiplies_them(self) -> None:
        kept = keep(draw(tokens=(2048,), vocab=53, spread=1.0, dtype=torch.float16), 5, "bucket")
        exact, scale = kept.plain(), 2.0**14
        leaves = self.leaves(kept)
        (kept.loss(leaves) * scale).backward()
        for name, leaf in leaves.items():
            wrong = (leaf.grad.double() / scale - exact[name]).norm() / exact[name].norm()  # type: ignore[union-attr]
            assert wrong < 2e-3, name

    def test_a_padded_head_is_cut(self) -> None:
        kept = full("bucket", torch.float64)
        case = kept.case
        assert case.student_bias is not None
        padded = replace(
            case,
            student_weight=torch.cat([case.student_weight, torch.full((4, 8), NAN, dtype=torch.float64)]),
            student_bias=torch.cat([case.student_bias, torch.full((4,), NAN, dtype=torch.float64)]),
        )
        for strategy in ("tokens", "vocab"):
            found = replace(kept, case=padded).run(vocab_size=37, strategy=strategy)
            assert (found["student_weight"][37:] == 0).all()
            assert (found["student_bias"][37:] == 0).all()
            found = {name: value[:37] if name in ("student_weight", "student_bias") else value for name, value in found.items()}
            assert_close(found, kept.run(), 1e-12)

    def test_strides_are_nothing(self) -> None:
        kept = full()
        case = replace(
            kept.case, student_hidden=strided(kept.case.student_hidden), student_weight=strided(kept.case.student_weight)
        )
        found = replace(kept, case=case, ids=strided(kept.ids), log_probs=strided(kept.log_probs)).run()
        assert_close(found, kept.run(), 1e-6)

    @both_tails
    @every_divergence
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_finite_differences(self, reduction: str, name: str, tail: str) -> None:
        case = dressed(draw(tokens=(4,), vocab=7, dims=(3, 5), dtype=torch.float64))
        case = replace(case, student_softcap=8.0, options=Options(name, temperature=1.5, ce_weight=0.5, kd_weight=2.0))
        kept = keep(case, 3, tail, torch.float64)

        def loss(*leaves: Tensor) -> Tensor:
            return kept.loss(dict(zip(kept.learned(), leaves, strict=True)), reduction=reduction)

        assert torch.autograd.gradcheck(loss, [leaf.clone().requires_grad_() for leaf in kept.learned().values()])


@both_tails
@pytest.mark.parametrize("metrics", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_operator_keeps_its_contract(dtype: torch.dtype, metrics: bool, tail: str) -> None:
    kept = full(tail, dtype)
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in kept.learned().items()}
    with Recorder() as recorder:
        kept.loss(leaves, return_metrics=metrics)
    torch.library.opcheck(torch.ops.kdkernels.linear_topk_kd.default, recorder.calls["linear_topk_kd"])


# PyTorch warns of what PyTorch does: its tracer makes an instance of every autograd.Function.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_compiled_graph_has_no_breaks(reduction: str) -> None:
    kept, graphs = full("bucket", divergence="jsd"), []
    inner = torch._dynamo.lookup_backend("aot_eager")

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return inner(graph, inputs)

    def stepped(leaves: dict[str, Tensor], t: Tensor) -> Any:
        loss, metrics = kept.loss(leaves, t=t, reduction=reduction, return_metrics=True)
        return (loss * 1.5).sum(), metrics

    compiled = torch.compile(stepped, fullgraph=True, backend=counting)
    for t in (1.0, 0.4):
        results = []
        for function in (stepped, compiled):
            leaves = {name: leaf.clone().requires_grad_() for name, leaf in kept.learned().items()}
            loss, metrics = function(leaves, torch.tensor(t))
            loss.backward()
            results.append([loss.detach(), *metrics.values(), *(leaf.grad for leaf in leaves.values())])
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-7)
    assert len(graphs) == 1, "t is a tensor: another value must not compile again"


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
        monkeypatch.setattr(keeping, "SLOTS", slots)
        assert call().isfinite()
        with refused(ValueError, f"topk_ids holds {wrong}"):
            call(topk_ids=with_id(wrong))

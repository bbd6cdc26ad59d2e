"""Banned tokens add nothing, NaN and +inf are never hidden, and what is empty or fully masked is 0."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import kdkernels as kd
from tests.support import oracle
from tests.support.cases import VARIANTS, Case, draw, dressed, every_divergence, keywords, parameters, running
from tests.support.oracle import Options

INF, NAN = torch.inf, torch.nan
# Of those that go by logits alone, where no strategy plays a part.
every_row_variant = pytest.mark.parametrize(
    "variant", parameters([variant for variant in VARIANTS if not variant.endswith("-vocab")])
)
every_variant = pytest.mark.parametrize("variant", parameters(VARIANTS))


def logits(seed: int = 0, rows: int = 4, vocab: int = 37, spread: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, rows, vocab, generator=generator) * spread)  # type: ignore[return-value]


def several_blocks(variant: str) -> int:
    """A vocabulary of more than two blocks of the row loops and no multiple of them."""
    return 300 if variant.startswith("triton") else 2100


def run(x: Tensor, z: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Losses of the tokens, and the gradient of their sum."""
    x = x.detach().clone().requires_grad_()
    losses = kd.kd_loss(x, z, **{"reduction": "none", **options})
    (grad,) = torch.autograd.grad(losses.sum(), [x])
    return losses.detach(), grad


def expect(x: Tensor, z: Tensor, labels: Tensor | None, options: Options) -> tuple[Tensor, Tensor]:
    found = oracle.with_gradients(
        lambda x: (x, z.double()), {"x": x}, torch.float64, labels, None, replace(options, normalizer=1.0)
    )
    return found["losses"], found["x"]


@every_variant
@every_divergence
class TestBannedTokens:
    @pytest.mark.parametrize("where", ["student", "teacher", "both", "apart"])
    @pytest.mark.parametrize(("t", "temperature"), [(1.0, 1.0), (0.0, 1.0), (0.4, 2.0), (0.6, 1.0)])
    def test_they_add_nothing(self, variant: str, name: str, where: str, t: float, temperature: float) -> None:
        x, z = logits()
        if where != "teacher":
            x[:2, 5:9], x[2, 36] = -INF, -INF
        if where != "student":
            z[:2, 5 if where == "both" else 7 : 12], z[3, 0] = -INF, -INF
        labels = torch.tensor([1, 2, 3, 4])
        options = Options(name, t=t, temperature=temperature, ce_weight=0.5)
        losses, grad = expect(x, z, labels, options)
        with running(variant):
            found, dx = run(x, z, labels=labels, **{**keywords(options), "normalizer": None})
        assert found.isfinite().all()
        assert dx.isfinite().all()
        torch.testing.assert_close(found.double(), losses, rtol=2e-5, atol=2e-6)
        torch.testing.assert_close(dx.double(), grad, rtol=1e-4, atol=2e-6)
        assert (dx[x == -INF] == 0).all()

    # what the interpreter's NumPy says of a sum past the largest number
    @pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
    def test_a_student_that_masks_by_the_least_number_has_its_gradient(self, variant: str, name: str) -> None:
        """Where the teacher has those tokens, forward KL is about 1e38, or past float32; its gradient q - p is like any other."""
        bias = torch.zeros(300)
        bias[200:] = torch.finfo(torch.float32).min
        case = replace(draw(vocab=300), student_bias=bias, options=Options(name))
        expected = case.plain()
        with running(variant):
            found = case.run()
        for grad in ("student_hidden", "student_weight"):
            assert found[grad].isfinite().all(), grad
            torch.testing.assert_close(found[grad].double(), expected[grad], rtol=1e-4, atol=1e-6)
        if name != "forward_kl":
            torch.testing.assert_close(found["loss"].double(), expected["loss"], rtol=2e-5, atol=2e-6)
        else:
            assert found["loss"] > 1e36

    def test_a_bias_can_ban_them(self, variant: str, name: str) -> None:
        case = replace(
            dressed(draw(vocab=41)), student_softcap=None, teacher_softcap=None, options=Options(name, t=0.5, ce_weight=0.5)
        )
        assert case.student_bias is not None
        assert case.teacher_bias is not None
        case.student_bias[[3, 40]], case.teacher_bias[[0, 3]] = -INF, -INF
        case = replace(case, labels=torch.tensor([1, 2, 5, -100, 7, 8]))
        exact = case.plain()
        with running(variant):
            found = case.run()
        for result, right in exact.items():
            torch.testing.assert_close(
                found[result].double(), right, rtol=1e-4, atol=1e-5, msg=lambda text, of=result: f"{of}: {text}"
            )
        assert (found["student_weight"][[3, 40]] == 0).all()

    def test_a_row_with_one_token_left_is_certain(self, variant: str, name: str) -> None:
        x, z = torch.full((2, 37), -INF), torch.full((2, 37), -INF)
        x[:, 6], z[:, 6] = 2.0, -1.0
        with running(variant):
            losses, dx = run(x, z, divergence=name)
        assert (losses == 0).all()
        assert (dx == 0).all()


@every_variant
@every_divergence
class TestNothingIsHidden:
    # One row for each model and each bad value, and two that are good.
    BAD = tuple(itertools.product(("student", "teacher"), (NAN, INF)))
    GOOD = slice(4, None)

    @pytest.mark.parametrize("t", [1.0, 0.4, 0.0])
    @pytest.mark.parametrize("blocks", [1, 3])
    def test_a_bad_logit_makes_its_row_nan_and_no_other(self, variant: str, name: str, t: float, blocks: int) -> None:
        vocab = 37 if blocks == 1 else several_blocks(variant)
        x, z = logits(rows=6, vocab=vocab)
        with running(variant):
            good, good_dx = run(x, z, divergence=name, t=t)
            for row, (model, bad) in enumerate(self.BAD):
                (x if model == "student" else z)[row, vocab - 2] = bad
            losses, dx = run(x, z, divergence=name, t=t)
            mean, _ = run(x[3:], z[3:], divergence=name, t=t, reduction="mean")
        assert losses[:4].isnan().all(), dict(zip(self.BAD, losses.tolist(), strict=False))
        assert dx[:4].isnan().all()
        assert mean.isnan()
        torch.testing.assert_close(losses[self.GOOD], good[self.GOOD], rtol=0, atol=0)
        torch.testing.assert_close(dx[self.GOOD], good_dx[self.GOOD], rtol=0, atol=0)

    @pytest.mark.parametrize("t", [1.0, 0.4, 0.0])
    def test_the_other_model_cannot_ban_it_away(self, variant: str, name: str, t: float) -> None:
        x, z = logits(rows=6)
        for row, (model, bad) in enumerate(self.BAD):
            x[row, 5], z[row, 5] = (bad, -INF) if model == "student" else (-INF, bad)
        with running(variant):
            losses, dx = run(x, z, divergence=name, t=t)
        assert losses[:4].isnan().all(), dict(zip(self.BAD, losses.tolist(), strict=False))
        assert dx[:4].isnan().any(1).all()
        assert losses[self.GOOD].isfinite().all()

    def test_a_bad_hidden_state_reaches_every_gradient(self, variant: str, name: str) -> None:
        case = replace(draw(), options=Options(name))
        case.student_hidden[2, 0] = NAN
        with running(variant):
            found = case.run()
        assert found["losses"].isnan().tolist() == [False, False, True, False, False, False]
        assert found["student_hidden"][2].isnan().all()
        assert found["student_hidden"][[0, 1, 3, 4, 5]].isfinite().all()
        assert found["student_weight"].isnan().all()

    def test_a_softcap_passes_nan_on(self, variant: str, name: str) -> None:
        case = replace(draw(), options=Options(name), student_softcap=5.0, teacher_softcap=5.0)
        case.teacher_hidden[3, 1] = NAN
        with running(variant):
            found = case.run()
        assert found["losses"].isnan().tolist() == [False, False, False, True, False, False]
        assert found["student_hidden"][3].isnan().all()


@every_variant
@every_divergence
class TestNothingToDo:
    def test_all_tokens_masked(self, variant: str, name: str) -> None:
        case = replace(dressed(draw()), labels=torch.full((6,), -100), options=Options(name, ce_weight=0.5))
        case.student_hidden[0, 0] = NAN
        with running(variant):
            for reduction in ("mean", "sum"):
                found = case.run(reduction=reduction)
                for result, value in found.items():
                    assert (value == 0).all(), (reduction, result)

    def test_all_weights_zero(self, variant: str, name: str) -> None:
        case = replace(draw(), token_weight=torch.zeros(6), options=Options(name))
        with running(variant):
            for result, value in case.run().items():
                assert (value == 0).all(), result

    @pytest.mark.parametrize("lead", [(0,), (2, 0), (0, 3)])
    def test_no_tokens(self, variant: str, name: str, lead: tuple[int, ...]) -> None:
        case = replace(draw(tokens=lead), labels=torch.zeros(lead, dtype=torch.int64), options=Options(name, ce_weight=0.5))
        with running(variant):
            found = case.run()
            losses, dx = run(torch.zeros(*lead, 5), torch.zeros(*lead, 5), divergence=name)
            total, metrics = case.loss(return_metrics=True)
        assert found["loss"] == 0
        assert found["losses"].shape == losses.shape == lead
        assert dx.shape == (*lead, 5)
        assert (found["student_weight"] == 0).all()
        assert total == 0
        assert metrics["tokens"] == 0

    def test_t_zero_asks_for_nothing(self, variant: str, name: str) -> None:
        x, z = logits(spread=10.0)
        with running(variant):
            losses, dx = run(x, z, divergence=name, t=0.0, temperature=2.0)
        assert losses.abs().max() <= 1e-6
        assert dx.abs().max() <= 2e-6

    def test_equal_models_are_at_their_target(self, variant: str, name: str) -> None:
        x, _ = logits(spread=10.0)
        with running(variant):
            for t, temperature in ((1.0, 1.0), (0.4, 1.0), (1.0, 2.0), (0.4, 2.0), (0.7, 3.0)):
                losses, dx = run(x, x.clone(), divergence=name, t=t, temperature=temperature)
                assert losses.abs().max() <= 1e-6, (t, temperature)
                assert dx.abs().max() <= 2e-6, (t, temperature)


@every_row_variant
@pytest.mark.parametrize(("t", "temperature"), [(1.0, 1.0), (0.4, 1.0), (1.0, 2.0), (0.4, 2.0), (0.7, 3.0)])
def test_total_variation_at_ties_has_gradient_exactly_zero(variant: str, t: float, temperature: float) -> None:
    x, _ = logits(vocab=several_blocks(variant), spread=10.0)
    with running(variant):
        losses, dx = run(x, x.clone(), divergence="total_variation", t=t, temperature=temperature)
    assert (losses == 0).all()
    assert (dx == 0).all()


@every_variant
def test_dropped_rows_may_hold_anything(variant: str) -> None:
    case: Case = dressed(draw())
    with running(variant):
        good = case.run()
        assert case.labels is not None
        case.student_hidden[case.labels == -100] = NAN
        case.teacher_hidden[case.labels == -100] = INF
        case.teacher_hidden[2] = NAN  # the one of weight 0
        found = case.run()
    for result, value in good.items():
        torch.testing.assert_close(found[result], value, rtol=0, atol=0)


@every_row_variant
@every_divergence
def test_logits_far_from_zero_are_as_good_as_near_it(variant: str, name: str) -> None:
    x, z = (part.round() for part in logits(spread=10.0))
    with running(variant):
        near, near_dx = run(x, z, divergence=name)
        far, far_dx = run(x + 4096.0, z - 8192.0, divergence=name)
    torch.testing.assert_close(far, near, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(far_dx, near_dx, rtol=1e-5, atol=1e-6)


@every_variant
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("masked", [slice(0, 8), slice(0, 40), slice(60, 96)], ids=str)
def test_a_finite_mask_is_no_nan(variant: str, name: str, masked: slice) -> None:
    """finfo.min where others write -inf, in the model whose probabilities weigh the running sums: parts of a row hold only that."""
    bias = torch.zeros(96)
    bias[masked] = torch.finfo(torch.float32).min
    side = "teacher_bias" if name == "forward_kl" else "student_bias"
    case = replace(draw(tokens=(4,), vocab=96), options=Options(name), **{side: bias})
    with running(variant):
        found = case.run()
    for of, right in case.plain().items():
        torch.testing.assert_close(found[of].double(), right, rtol=1e-4, atol=1e-5, msg=lambda text, of=of: f"{of}: {text}")

"""Every backend and instruction set is as close to the float64 oracle as eager PyTorch of the same dtype, for every divergence."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import kdkernels as kd
from tests.support import oracle
from tests.support.cases import (
    CHOICES,
    SPREADS,
    Result,
    assert_as_good_as_eager,
    draw,
    dressed,
    keywords,
    parameters,
    ratios,
    running,
    strided,
    yardsticks,
)
from tests.support.oracle import Options

# Logits that exist have no strategy.
LOGITS_CHOICES = [(variant, dtype) for variant, dtype in CHOICES if "-" not in variant]
# Leading dimensions, vocabulary, draws. 2600 is more than two blocks of the native row loops and no multiple of a vector; 3 and 1
# are less than a vector. Small problems are drawn several times: see assert_as_good_as_eager.
Shape = tuple[tuple[int, ...], int, int]
SHAPES: tuple[Shape, ...] = (((12,), 1003, 2), ((2, 3), 2600, 1), ((1,), 1003, 16), ((5,), 3, 6), ((2,), 1, 2), ((), 37, 8))
# For kernels in the interpreter, with tiles of 16 tokens, 32 or 128 columns and 16 of the hidden size.
INTERPRETED_SHAPES: tuple[Shape, ...] = (((6,), 101, 4), ((2, 3), 150, 3), ((1,), 131, 16), ((5,), 3, 6), ((2,), 1, 2), ((), 37, 8))


def shapes(variant: str) -> tuple[Shape, ...]:
    return INTERPRETED_SHAPES if variant.startswith("triton") else SHAPES


def settings(variant: str) -> list[tuple[float, float, Shape]]:
    """t, temperature, shape: all of the first two at the first shape (in the interpreter most), one of them at each other shape."""
    mixed = itertools.cycle(((1.0, 1.0), (0.4, 2.0), (0.4, 1.0), (1.0, 2.0), (0.0, 1.0)))
    first, *others = shapes(variant)
    full = [(t, temperature, first) for t in (0.0, 0.4, 1.0) for temperature in (1.0, 2.0)]
    return [*(full[1:5] if variant.startswith("triton") else full), *((*next(mixed), shape) for shape in others)]


@functools.cache
def from_hidden(name: str, dtype: torch.dtype, spread: float, t: float, temperature: float, shape: Shape, parts: str) -> Any:
    """The cases, the exact results and eager's."""
    tokens, vocab, draws = shape
    options = Options(name, t=t, temperature=temperature)
    cases = [draw(seed, tokens, vocab, (16, 24), spread, dtype, near=0.01 if parts == "near" else None) for seed in range(draws)]
    if parts == "dressed":
        options = replace(options, ce_weight=0.5, kd_weight=0.75)
        cases = [dressed(case, seed) for seed, case in enumerate(cases)]
    cases = [replace(case, options=options) for case in cases]
    working = torch.float32 if dtype == torch.float64 else dtype
    return cases, *yardsticks([case.plain() for case in cases], [case.plain(working) for case in cases], t, dtype)


@functools.cache
def from_logits(name: str, dtype: torch.dtype, spread: float, t: float, temperature: float, shape: Shape, parts: str) -> Any:
    """Pairs of logits, their options, the exact results and eager's."""
    tokens, vocab, draws = shape
    options = Options(name, t=t, temperature=temperature)
    labels = token_weight = None
    generator = torch.Generator().manual_seed(5)
    both = torch.randn(draws, 2, *tokens, vocab, generator=generator, dtype=torch.float64) * spread
    pairs = [tuple(pair.unbind()) for pair in both.to(dtype)]
    if parts == "dressed":
        options = replace(options, ce_weight=0.5, kd_weight=0.75)
        batch = dressed(draw(0, tokens, vocab))
        labels, token_weight = batch.labels, batch.token_weight

    def plain(x: Tensor, z: Tensor, to: torch.dtype) -> Result:
        return oracle.with_gradients(lambda x: (x, z.to(to)), {"x": x}, to, labels, token_weight, options)

    working = torch.float32 if dtype == torch.float64 else dtype
    exact, eager = ([plain(x, z, to) for x, z in pairs] for to in (torch.float64, working))
    keyword = {**keywords(options), "labels": labels, "token_weight": token_weight}
    return pairs, keyword, *yardsticks(exact, eager, t if labels is None else 1.0, dtype)


def run_logits(x: Tensor, z: Tensor, **options: Any) -> Result:
    x = x.detach().requires_grad_()
    loss = kd.kd_loss(x, z, **options)
    (grad,) = torch.autograd.grad(loss, [x])
    with torch.no_grad():
        return {"losses": kd.kd_loss(x, z, **{**options, "reduction": "none"}), "loss": loss.detach(), "x": grad}


@pytest.mark.parametrize("name", kd.divergences())
@pytest.mark.parametrize(("variant", "dtype"), parameters(CHOICES))
@pytest.mark.parametrize("spread", SPREADS)
class TestFromHiddenStates:
    def test_from_hidden_states(self, spread: float, variant: str, dtype: torch.dtype, name: str) -> None:
        compared = {}
        for t, temperature, shape in settings(variant):
            cases, exact, eager = from_hidden(name, dtype, spread, t, temperature, shape, "plain")
            with running(variant):
                compared[t, temperature, shape] = ratios([case.run() for case in cases], eager, exact)
        assert_as_good_as_eager(compared)

    def test_everything_a_head_and_a_batch_can_have(self, spread: float, variant: str, dtype: torch.dtype, name: str) -> None:
        compared = {}
        for t, temperature in ((1.0, 1.0), (0.4, 2.0)):
            cases, exact, eager = from_hidden(name, dtype, spread, t, temperature, shapes(variant)[0], "dressed")
            with running(variant):
                compared[t, temperature] = ratios([case.run() for case in cases], eager, exact)
        assert_as_good_as_eager(compared)

    def test_a_student_close_to_its_teacher(self, spread: float, variant: str, dtype: torch.dtype, name: str) -> None:
        compared = {}
        for t in (1.0, 0.4):
            cases, exact, eager = from_hidden(name, dtype, spread, t, 1.0, shapes(variant)[0], "near")
            with running(variant):
                compared[t] = ratios([case.run() for case in cases], eager, exact)
        assert_as_good_as_eager(compared)


@pytest.mark.parametrize("name", kd.divergences())
@pytest.mark.parametrize(("variant", "dtype"), parameters(LOGITS_CHOICES))
@pytest.mark.parametrize("spread", SPREADS)
class TestFromLogits:
    def test_labels_weights_and_factors_from_logits(self, spread: float, variant: str, dtype: torch.dtype, name: str) -> None:
        compared = {}
        for t, temperature in ((1.0, 1.0), (0.4, 2.0)):
            pairs, options, exact, eager = from_logits(name, dtype, spread, t, temperature, shapes(variant)[0], "dressed")
            with running(variant):
                compared[t, temperature] = ratios([run_logits(x, z, **options) for x, z in pairs], eager, exact)
        assert_as_good_as_eager(compared)

    def test_from_logits(self, spread: float, variant: str, dtype: torch.dtype, name: str) -> None:
        compared = {}
        for t, temperature, shape in settings(variant):
            pairs, options, exact, eager = from_logits(name, dtype, spread, t, temperature, shape, "plain")
            with running(variant):
                compared[t, temperature, shape] = ratios([run_logits(x, z, **options) for x, z in pairs], eager, exact)
        assert_as_good_as_eager(compared)


@pytest.mark.parametrize(("variant", "dtype"), parameters(CHOICES))
class TestLayouts:
    """Views of any strides give what their contiguous copies give."""

    def assert_same(self, found: Result, right: Result) -> None:
        for name, value in right.items():
            tolerance = 4 * torch.finfo(value.dtype).eps
            torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance * value.abs().max().item())

    def test_hidden_states_and_heads(self, variant: str, dtype: torch.dtype) -> None:
        case = dressed(draw(tokens=(2, 3), vocab=101, dtype=dtype))
        case = replace(case, options=Options(ce_weight=0.5))
        parts = {name: part for name, part in vars(case).items() if isinstance(part, Tensor)}
        views = {name: strided(part) for name, part in parts.items()}
        assert not any(view.is_contiguous() for name, view in views.items() if not name.endswith("bias"))
        with running(variant):
            self.assert_same(replace(case, **views).run(), case.run())

    def test_logits(self, variant: str, dtype: torch.dtype) -> None:
        x, z = (torch.randn(2, 6, 101, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
        padded = [torch.nn.functional.pad(part, (2, 5), value=torch.nan)[:, 2:-5] for part in (x, z)]
        every_second = [torch.repeat_interleave(part, 2, 0)[::2] for part in (x, z)]
        with running(variant):
            right = run_logits(x, z)
            for one, other in (padded, every_second, [strided(x), strided(z)], [x, padded[1]], [strided(x), z]):
                self.assert_same(run_logits(one, other), right)

    def test_one_hidden_state_for_all_tokens(self, variant: str, dtype: torch.dtype) -> None:
        """expand gives strides of 0."""
        case = draw(tokens=(4,), dtype=dtype)
        one, other = (part[:1].expand(4, -1) for part in (case.student_hidden, case.teacher_hidden))
        with running(variant):
            right = replace(case, student_hidden=one.clone(), teacher_hidden=other.clone()).run()
            self.assert_same(replace(case, student_hidden=one, teacher_hidden=other).run(), right)


SIXTEEN_BITS = [(variant, dtype) for variant, dtype in LOGITS_CHOICES if dtype.itemsize == 2]


@pytest.mark.parametrize(("variant", "dtype"), parameters(SIXTEEN_BITS))
class TestSixteenBits:
    """Computed in float32, and rounded once."""

    def test_gradients_of_logits_are_those_of_float32_rounded_to_nearest(self, variant: str, dtype: torch.dtype) -> None:
        x, z = (torch.randn(2, 12, 1003, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
        with running(variant):
            found = run_logits(x, z, reduction="sum", temperature=2.0)
            wide = run_logits(x.float(), z.float(), reduction="sum", temperature=2.0)
        torch.testing.assert_close(found["x"], wide["x"].to(dtype), rtol=0, atol=0)
        torch.testing.assert_close(found["losses"], wide["losses"], rtol=0, atol=0)

    def test_nan_of_any_payload_stays_nan(self, variant: str, dtype: torch.dtype) -> None:
        x, z = torch.randn(3, 37).to(dtype), torch.randn(3, 37)
        for payload in (0x7FC00000, 0x7FFFFFFF, -1, 0x7F800001):
            z[1, 5] = torch.tensor(payload, dtype=torch.int32).view(torch.float32)
            with running(variant):
                found = run_logits(x, z, reduction="sum")
            assert found["x"][1].isnan().all(), hex(payload)
            assert found["losses"].isnan().tolist() == [False, True, False]

"""Finished gradients times the upstream one: one rounding, and no access to memory where that one is 1."""

from __future__ import annotations

import pytest
import torch

from tests.support.cases import NATIVE_DTYPES, draw
from tests.support.meter import metered

pytest.importorskip("triton", reason="Triton is not installed")
from kdkernels.backends.triton import arch, scaling
from tests.support.interpreter import as_on_a_gpu

# One entry, a block's all but one and one more, and more than every program has a block of at first.
COUNTS = (1, scaling.BLOCK - 1, scaling.BLOCK + 1, scaling.BLOCK * scaling.PROGRAMS * 3 + 5)
FACTORS = (3.0, 1 / 3, -1.0, 0.0, 65536.0, torch.inf, torch.nan)


def drawn(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Over all of a dtype's magnitudes that a gradient has, with entries that are no numbers."""
    generator = torch.Generator().manual_seed(count)
    grad = torch.randn(count, generator=generator) * torch.randint(-30, 5, (count,), generator=generator).float().exp2()
    grad[::7], grad[::1001], grad[::1003] = 0.0, torch.inf, torch.nan
    return grad.to(dtype)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
def test_it_is_the_product_rounded_once(dtype: torch.dtype, count: int) -> None:
    """Of two float32 numbers float64 has the product exactly."""
    with as_on_a_gpu():
        for factor in FACTORS:
            grad, scale = drawn(count, dtype), torch.tensor(factor)
            right = (grad.double() * scale.double()).float().to(dtype)
            scaling.scale_(grad, scale)
            torch.testing.assert_close(grad, right, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
def test_a_factor_of_one_moves_no_entry(dtype: torch.dtype) -> None:
    grad = drawn(COUNTS[-1], dtype)
    before = grad.clone()
    with as_on_a_gpu(), metered() as meter:
        scaling.scale_(grad, torch.ones(()))
    programs = arch.multiprocessors(grad.device) * scaling.PROGRAMS
    assert (meter.total(), meter.loaded["scale_kernel"]) == (4 * programs, 4 * programs), "each reads the factor"
    torch.testing.assert_close(grad, before, rtol=0, atol=0, equal_nan=True)


def test_an_empty_gradient_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "scale_kernel", None)
    with as_on_a_gpu():
        scaling.scale_(torch.empty(0, 8), torch.tensor(2.0))


@pytest.mark.parametrize("factor", [1.0, 1 / 3])
def test_a_step_of_bfloat16_is_scaled_by_all_digits_of_the_upstream_gradient(factor: float) -> None:
    """torch's own product of a bfloat16 tensor and a scalar on a GPU rounds the scalar first, 1/3 by one part in 400."""
    case = draw(tokens=(8,), vocab=37, dtype=torch.bfloat16)
    found = []
    with as_on_a_gpu():
        for upstream in (1.0, factor):
            leaves = {name: leaf.detach().requires_grad_() for name, leaf in case.learned().items()}
            found.append(torch.autograd.grad(case.loss(leaves, strategy="tokens") * upstream, list(leaves.values())))
    for plain, scaled in zip(*found, strict=True):
        right = plain.double() * torch.tensor(factor).double()
        torch.testing.assert_close(scaled.double(), right, rtol=torch.finfo(torch.bfloat16).eps / 2, atol=1e-37)

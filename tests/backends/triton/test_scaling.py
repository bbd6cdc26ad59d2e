"""Finished gradients times the upstream one: one rounding, and no access to memory where that one is 1."""

from __future__ import annotations

import pytest
import torch

import kdkernels as kd
from kdkernels.losses import autograd
from tests.support.cases import NATIVE_DTYPES, Case, draw
from tests.support.meter import metered

pytest.importorskip("triton", reason="Triton is not installed")
from kdkernels.backends import triton
from kdkernels.backends.triton import scaling
from tests.support.interpreter import as_on_a_gpu

BLOCK, PROGRAMS = scaling.cut(torch.device("cpu"))
# One entry, a block's all but one and one more, and three blocks for the first program.
COUNTS = (1, BLOCK - 1, BLOCK, BLOCK + 1, BLOCK * (2 * PROGRAMS + 1) + 5)
FACTORS = (3.0, 1 / 3, -1.0, 0.0, 65536.0, torch.inf, torch.nan)


def drawn(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Over all of a dtype's magnitudes that a gradient has, with entries that are no numbers."""
    generator = torch.Generator().manual_seed(count)
    grad = torch.randn(count, generator=generator) * torch.randint(-30, 5, (count,), generator=generator).float().exp2()
    grad[::7], grad[::1001], grad[::1003] = 0.0, torch.inf, torch.nan
    return grad.to(dtype)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
def test_it_is_the_product_of_two_float32_numbers(dtype: torch.dtype, count: int) -> None:
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
    assert (meter.total(), meter.loaded["scale_kernel"]) == (4 * PROGRAMS, 4 * PROGRAMS), "each reads the factor"
    torch.testing.assert_close(grad, before, rtol=0, atol=0, equal_nan=True)


def test_multiprocessors_are_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the threads of a warp: with 2,048, that each have 16 bytes of 16-bit entries."""
    assert (BLOCK, PROGRAMS) == (2048, 3 * 8)
    monkeypatch.setattr(scaling.arch, "warp", lambda _: 64)
    assert scaling.cut(torch.device("cpu")) == (4096, 3 * 4)


def test_an_empty_gradient_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "scale_kernel", None)
    with as_on_a_gpu():
        scaling.scale_(torch.empty(0, 8), torch.tensor(2.0))


@pytest.mark.parametrize("factor", [1.0, 1 / 3])
def test_a_step_of_bfloat16_is_scaled_by_all_digits_of_the_upstream_gradient(factor: float) -> None:
    """torch's own product of a bfloat16 tensor and a scalar on a GPU rounds the scalar first, 1/3 by one part in 400."""
    case = draw(tokens=(8,), vocab=37, dtype=torch.bfloat16)
    with as_on_a_gpu():
        found = [gradients(case, upstream) for upstream in (1.0, factor)]
    for plain, scaled in zip(*found, strict=True):
        right = plain.double() * torch.tensor(factor).double()
        torch.testing.assert_close(scaled.double(), right, rtol=torch.finfo(torch.bfloat16).eps / 2, atol=1e-37)


def gradients(case: Case, upstream: float, **more: bool) -> list[torch.Tensor]:
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in case.learned().items()}
    return list(torch.autograd.grad(case.loss(leaves, strategy="tokens") * upstream, list(leaves.values()), **more))


@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
def test_a_graph_that_is_kept_has_the_same_gradients(dtype: torch.dtype) -> None:
    case = draw(tokens=(8,), vocab=37, dtype=dtype)
    with as_on_a_gpu():
        for kept, freed in zip(gradients(case, 1 / 3, retain_graph=True), gradients(case, 1 / 3), strict=True):
            torch.testing.assert_close(kept, freed, rtol=0, atol=0)


def test_a_backward_that_breaks_off_is_not_gone_on_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first gradient would be scaled twice."""
    case = draw()
    leaves = case.student_hidden.requires_grad_(), case.student_weight.requires_grad_()
    scale, asked = autograd._scaled, iter((False, True))

    def stopped(*of: torch.Tensor) -> torch.Tensor:
        if next(asked, False):
            raise KeyboardInterrupt
        return scale(*of)

    monkeypatch.setattr(autograd, "_scaled", stopped)
    with as_on_a_gpu():
        loss, upstream = kd.linear_kd_loss(*leaves, case.teacher_hidden, case.teacher_weight), torch.tensor(2.0)
        with pytest.raises(KeyboardInterrupt):
            loss.backward(upstream)
        with pytest.raises(RuntimeError, match=r"modified by an inplace operation"):
            loss.backward(upstream)


def test_what_a_kernel_cannot_do_torch_does(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Where nothing can be compiled, as for a teacher's saved top-k, which takes no other kernel; and a gradient with gaps."""

    class Broken:
        def __getitem__(self, _: object) -> object:
            raise RuntimeError("Failed to find C compiler")

    with as_on_a_gpu():
        gaps = drawn(64, torch.float32).view(8, 8)[:, :3]
        whole = gaps.clone()
        triton.BACKEND.scale_(gaps, torch.tensor(0.5))
        torch.testing.assert_close(gaps, whole * 0.5, rtol=0, atol=0, equal_nan=True)
        monkeypatch.setattr(scaling, "scale_kernel", Broken())
        monkeypatch.setattr(triton, "_scaled_by_torch", set())
        for _ in range(2):
            grad = torch.ones(3)
            triton.BACKEND.scale_(grad, torch.tensor(0.5))
            assert grad.tolist() == [0.5] * 3
    assert [record.getMessage() for record in caplog.records] == [
        "kdkernels: Triton cannot scale gradients on cpu, so PyTorch does: RuntimeError('Failed to find C compiler')"
    ]

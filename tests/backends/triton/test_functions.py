"""What kernels compute with: pair functions, logarithms, and products of float32."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import kdkernels as kd
from kdkernels.divergences import FLAT, resolve
from tests.support.cases import assert_as_good_as_eager, draw, ratios
from tests.support.kernels import EPS
from tests.support.oracle import Options

triton = pytest.importorskip("triton", reason="Triton is not installed")
tl = pytest.importorskip("triton.language")
from kdkernels.backends.triton import functions, launch  # noqa: E402
from tests.support.interpreter import as_on_a_gpu  # noqa: E402


def test_a_product_of_the_interpreter_is_the_same_in_every_place_of_a_tile() -> None:
    """As from a matrix unit: logits that statistics are of are made again for the gradient, in tiles that begin elsewhere.
    A matrix library rounds by the place in the tile on some processors (OpenBLAS on Zen 5)."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    random = np.random.default_rng(0)
    left, right = (random.standard_normal(shape).astype(np.float32) for shape in ((16, 64), (64, 32)))
    nothing = TensorHandle(np.zeros((16, 32), np.float32), tl.float32)
    with as_on_a_gpu():
        builder = InterpreterBuilder()

        def product(shift: int) -> np.ndarray:
            sides = (TensorHandle(side, tl.float32) for side in (left, np.roll(right, shift, 1)))
            return np.roll(builder.create_dot(*sides, nothing, None, None).data, -shift, 1)

        whole = product(0)
        assert whole.dtype == np.float32
        np.testing.assert_allclose(whole, left.astype(np.float64) @ right, rtol=0, atol=EPS * np.abs(whole).max())
        for shift in range(1, 32):
            np.testing.assert_array_equal(product(shift), whole)


@triton.jit
def pair_kernel(lp_ptr, lq_ptr, d_ptr, value_ptr, slope_ptr, shares, PAIR: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    value, slope, _ = PAIR(tl.load(lp_ptr + at), tl.load(lq_ptr + at), tl.load(d_ptr + at), shares)
    tl.store(value_ptr + at, value)
    tl.store(slope_ptr + at, slope)


@pytest.mark.parametrize("temperature", [1.0, FLAT])
@pytest.mark.parametrize("name", kd.divergences())
def test_the_pair_functions_are_those_of_torch(name: str, temperature: float) -> None:
    lp, d = torch.rand(2, 256, generator=torch.Generator().manual_seed(0)) * -30
    d[:128] = torch.linspace(-0.2, 0.2, 128) if temperature == FLAT else 0.0
    lq = lp + d
    divergence, found = resolve(name), torch.empty(2, 256)
    shares, pair = divergence.shares(temperature), launch.pair_function(name, temperature)
    pair_kernel[(1,)](lp, lq, d, found[0], found[1], shares, PAIR=pair, BLOCK=256)
    for one, other in zip(found, divergence.pair(lp, lq, d, shares)[:2], strict=True):
        torch.testing.assert_close(one, other, rtol=16 * EPS, atol=30 * EPS)
    again = launch.pair_function(name, temperature * 1.5)
    assert again is pair, "another function would be compiled again"


def tf32(values: np.ndarray) -> np.ndarray:
    """Rounded to the eleven digits that NVIDIA's matrix units take of a float32."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


def cut_off(exact: np.ndarray) -> np.ndarray:
    """float64 to float32, towards zero, as matrix units add."""
    near = exact.astype(np.float32)
    return np.where(np.abs(near.astype(np.float64)) > np.abs(exact), np.nextafter(near, np.float32(0)), near)


@pytest.mark.parametrize(("width", "times"), [(16, 1.95), (24, 2.4), (96, 4.9), (160, 6.4)])
def test_three_products_of_tf32_are_worse_than_float32_may_be(width: int, times: float) -> None:
    """Why vocabulary.product multiplies float32 as it is: the error of a logit, over that of a float32 product."""
    random = np.random.default_rng(0)
    left = random.standard_normal((64, width)).astype(np.float32)
    right = (random.standard_normal((width, 256)) * width**-0.5).astype(np.float32)
    upper, lower = (tf32(left), tf32(right)), (tf32(left - tf32(left)), tf32(right - tf32(right)))
    single, split = np.zeros((2, 64, 256), np.float32)
    for at in range(width):
        single = (single + left[:, at : at + 1].astype(np.float64) * right[at]).astype(np.float32)
    for at in range(0, width, 8):
        for one, other in ((lower[0], upper[1]), (upper[0], lower[1]), upper):
            split = cut_off(split + one[:, at : at + 8].astype(np.float64) @ other[at : at + 8].astype(np.float64))
    exact = left.astype(np.float64) @ right
    errors = [np.sqrt(np.mean((found - exact) ** 2)) for found in (split, single)]
    assert errors[0] / errors[1] == pytest.approx(times, rel=0.1)


@triton.jit
def log_kernel(v_ptr, found_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(found_ptr + at, functions.log(tl.load(v_ptr + at)))


@pytest.mark.parametrize("span", [(1e-9, 1e-3), (0.1, 0.5), (0.5, 1.0), (0.99, 1.01), (0.9999, 1.0)], ids=str)
def test_the_logarithm_loses_no_digit(span: tuple[float, float]) -> None:
    """1.2 units in the last place with fused operations, which the interpreter has not; near 1 too, relative to the result."""
    v = torch.empty(2**14).uniform_(*span, generator=torch.Generator().manual_seed(0))
    found = torch.empty_like(v)
    log_kernel[(1,)](v, found, BLOCK=len(v))
    assert ((found.double() - v.double().log()).abs() <= 1.25 * EPS * v.double().log().abs()).all()


def test_the_logarithm_of_one_is_zero_and_nan_stays() -> None:
    found = torch.empty(2)
    log_kernel[(1,)](torch.tensor([1.0, torch.nan]), found, BLOCK=2)
    assert found[0] == 0.0
    assert found[1].isnan()


@pytest.mark.parametrize("spread", [1.0, 10.0, 30.0])
@pytest.mark.parametrize("name", ["jsd", "skew_forward_kl", "skew_reverse_kl"])
def test_mixtures_of_close_distributions_are_as_good_as_eager(name: str, spread: float) -> None:
    """Where p is near q a biased logarithm would show in the value, which is almost 0, and in the gradient."""
    compared = {}
    for near in (1e-2, 1e-3):
        options = Options(name)
        cases = [replace(draw(seed, (8,), 301, (16, 16), spread, near=near), options=options) for seed in range(3)]
        exact, eager = [case.plain() for case in cases], [case.plain(torch.float32) for case in cases]
        with as_on_a_gpu():
            found = [case.run() for case in cases]
        compared[near] = ratios(found, eager, exact)
    assert_as_good_as_eager(compared)

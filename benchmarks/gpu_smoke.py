"""First, whether a GPU does what the library asks of it, and how fast it is at that: products, copies, then one small loss through
every kernel, held to the reference backend in float64.

A rate is a dict with ``rate``, what was run, and operations or bytes per second; a check is one of gpu_checks.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import kdkernels as kd
from benchmarks.cases import DTYPES
from benchmarks.gpu_checks import checked
from benchmarks.gpu_device import BACKEND, device_of
from benchmarks.gpu_scale import SkippedError
from benchmarks.gpu_times import milliseconds, spread
from benchmarks.runner import Result, told
from kdkernels import backends
from kdkernels.backends import products
from kdkernels.divergences import DivergenceName
from kdkernels.engine.cut import Strategy

# Relative to the float64 result, in the norm: a few roundings of the returned gradients, and far below what a wrong formula gives.
BOUND = {"bf16": 1e-2, "fp32": 1e-4}
# Total variation's slope is a sign: an entry whose p and q agree to rounding may take the other one, and each such entry of the 1.5
# million is up to 8e-4 of the gradient's norm.
BOUND_OF_SIGNS = 5e-3
DIMS = (64, 96)
# M, N, K: the device's full rate, and the logits of 4096 tokens at the smallest student's head.
SHAPES = ((8192, 8192, 8192), (4096, 151_936, 896))


def held(found: Tensor, exact: Tensor, bound: float) -> float:
    """The error relative to ``exact``; raises if it is above the bound."""
    error = float((found.double() - exact).norm() / exact.norm())
    if not error <= bound:
        raise ArithmeticError(f"relative error {error:.3g}, at most {bound:.3g} is right")
    return error


def _operands(device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(rows, 512, generator=generator, device=device, dtype=torch.bfloat16) for rows in (256, 1024))
    return left, right.t()


def kept_product(device: str) -> Result:
    """Logits: the float32 product of 16-bit operands, into the first rows of a tile."""
    if device != "cuda":
        raise SkippedError("torch.mm takes out_dtype on a GPU only")
    left, right = _operands(device)
    out = torch.empty(300, 1024, device=device)[:256]
    torch.mm(left, right, out_dtype=torch.float32, out=out)
    return {"relative_error": held(out, left.double() @ right.double(), 1e-5)}


def added_product(device: str) -> Result:
    """The head's gradient: a product of 16-bit operands added to a float32 sum, in place."""
    if device != "cuda":
        raise SkippedError("torch.addmm takes out_dtype on a GPU only")
    left, right = _operands(device)
    out = torch.ones(256, 1024, device=device)
    torch.addmm(out, left, right, out_dtype=torch.float32, out=out)
    return {"relative_error": held(out - 1, left.double() @ right.double(), 1e-5)}


def served_by(dtype: torch.dtype, device: str) -> Result:
    found = kd.backend(device, dtype)
    if found != BACKEND:
        raise LookupError(f"{found!r} runs on this device, not {BACKEND!r}")
    return {"backend": found}


def rates(size: str, device: str) -> Iterator[Result]:
    """Of products into bfloat16 and float32, and of a copy."""

    def timed(run: Callable[[], object], per_run: int) -> Result:
        for _ in range(3):
            run()
        found = spread([milliseconds(run, device) for _ in range(10)])
        return {**found, "per_second": per_run / found["median_ms"] * 1e3}

    def product(shape: tuple[int, int, int], dtype: torch.dtype) -> Result:
        rows, columns, inner = shape
        left, right = (torch.randn(side, inner, device=device, dtype=torch.bfloat16) for side in (rows, columns))
        out = torch.empty(rows, columns, device=device, dtype=dtype)
        return timed(lambda: products.multiply(left, right.t(), dtype, out), 2 * rows * columns * inner)

    for shape in ((16, 48, 32),) if size == "toy" else SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            facts: Result = {"rate": f"bf16 product {' x '.join(map(str, shape))} into {str(dtype).removeprefix('torch.')}"}
            yield told({**facts, "unit": "operations"}, partial(product, shape, dtype))

    def copied() -> Result:
        source = torch.empty(2**16 if size == "toy" else 2**31, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        return timed(lambda: target.copy_(source), 2 * source.nbytes)

    yield told({"rate": "copy", "unit": "bytes"}, copied)


def opened(size: str) -> Callable[[str], Iterator[Result]]:
    """What is looked at before any kernel of ours runs."""
    device = device_of(size)

    def run(name: str) -> Iterator[Result]:
        if name == "rates":
            yield from rates(size, device)
        elif name == "backend":
            for dtype_name, dtype in DTYPES.items():
                yield checked({"check": name, "dtype": dtype_name}, served_by, dtype, device)
        else:
            yield checked({"check": name}, {"kept_product": kept_product, "added_product": added_product}[name], device)

    return run


def small_loss(size: str, strategy: Strategy, divergence: DivergenceName, dtype_name: str) -> Result:
    """The loss and its two gradients of inputs without anything optional, as the times take them: this compiles their kernels."""
    device, dtype = device_of(size), DTYPES[dtype_name]
    tokens, vocab = (5, 48) if size == "toy" else (300, 5008)
    generator = torch.Generator(device).manual_seed(1)
    shapes = (tokens, DIMS[0]), (vocab, DIMS[0]), (tokens, DIMS[1]), (vocab, DIMS[1])
    inputs = [torch.randn(shape, generator=generator, device=device).mul_(shape[1] ** -0.25).to(dtype) for shape in shapes]

    def results(inputs: list[Tensor], strategy: Strategy) -> list[Tensor]:
        leaves = [leaf.detach().requires_grad_() for leaf in inputs[:2]]
        loss = kd.linear_kd_loss(*leaves, *inputs[2:], divergence=divergence, strategy=strategy)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    found = results(inputs, strategy)
    with backends.use("reference"):
        exact = results([part.double() for part in inputs], "tokens")
    bound = max(BOUND[dtype_name], BOUND_OF_SIGNS if divergence == "total_variation" else 0.0)
    return {"relative_errors": [held(*pair, bound) for pair in zip(found, exact, strict=True)]}


def opened_losses(size: str, strategy: str) -> Callable[[str, str], Iterator[Result]]:
    def run(divergence: str, dtype: str) -> Iterator[Result]:
        facts: Result = {"check": "small_loss", "strategy": strategy, "dtype": dtype, "divergence": divergence}
        yield checked(facts, small_loss, size, strategy, divergence, dtype)

    return run

"""Checks at the sizes of models: rows and products entry by entry, offsets past 2^31, and the memory of a step."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import kdkernels as kd
from benchmarks.cases import MIB
from benchmarks.gpu_device import cluster_rows, offset_logits
from benchmarks.gpu_times import peak_bytes
from benchmarks.runner import Result, why
from kdkernels.divergences import resolve


class SkippedError(Exception):
    """Says why a check means nothing here."""


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        if not torch.equal(found[name], value):
            raise ArithmeticError(f"{name} differs by up to {(found[name].double() - value.double()).abs().max().item():.3g}")


# Rows that are as long as those of models, and so many that clusters take several of them, one after the other, in several chunks
# each; few enough for 16 processes on one GPU.
AT_SCALE = ((512, 128_256), (512, 151_936), (256, 262_147))
VARIANTS = ((False, False), (True, False), (True, True))  # dressed, with metrics


@dataclass(frozen=True)
class LongRows:
    """Random logits [2, rows, vocab padded] of both models, and what a dressed loss takes besides; a third of the weights is 0."""

    vocab: int
    logits: Tensor
    bias: Tensor
    labels: Tensor
    weight: Tensor

    @staticmethod
    def drawn(rows: int, vocab: int, device: str) -> LongRows:
        generator = torch.Generator(device).manual_seed(vocab)
        logits = torch.randn(2, rows, -(-vocab // 64) * 64, generator=generator, device=device).mul_(3)
        bias = torch.randn(vocab, generator=generator, device=device)
        labels = torch.randint(vocab, (rows,), generator=generator, device=device)
        weight = torch.rand(rows, generator=generator, device=device)
        weight[::3] = 0.0
        return LongRows(vocab, logits, bias, labels, weight)

    def sides(self, is_dressed: bool) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the student and of the target."""
        x, z = self.logits[..., : self.vocab]
        if is_dressed:
            x, z = (((v + self.bias) * 0.7 / 20.0).tanh_() * 10.0 for v in (x, z))
            z = torch.lerp(x, z, 0.4)
        return x.log_softmax(1), z.log_softmax(1)

    def row_loss(self, divergence: str, dtype: torch.dtype, is_dressed: bool, metrics: bool) -> tuple[Tensor, Tensor]:
        """ROW_COLUMNS, and dx in ``dtype`` as float32."""
        from kdkernels.backends.triton.rows import row_loss  # Triton may not be installed

        dx = torch.full_like(self.logits[0], torch.nan, dtype=dtype)
        x, z, out = (side[:, : self.vocab] for side in (self.logits[0].clone(), self.logits[1], dx))
        a, weight = resolve(divergence).a, self.weight
        if is_dressed:
            t, head = weight.new_tensor(0.4), [0.7, 20.0, 0.7, 20.0]
            columns = row_loss(
                x, z, self.bias, self.bias, self.labels, weight, t, divergence, a, 2.0, 1.0, 0.5, head, True, metrics, out
            )
        else:
            t, head = weight.new_tensor(1.0), [1.0, 0.0, 1.0, 0.0]
            columns = row_loss(x, z, None, None, None, weight, t, divergence, a, 1.0, 1.0, 0.0, head, True, metrics, out)
        return columns, out.float()


def may_differ(dx: Tensor, student: Tensor, target: Tensor, divergence: str) -> Tensor:
    """By how much two float32 computations of dx may, entry by entry, besides its own rounding. dx is slope - q sum slope, both
    about as large as q and, in a row of JSD, up to a hundred times as large as what they leave. Total variation's slope is q times
    half a sign, which rounding turns where log-probabilities (``student``, ``target``) are all but equal."""
    q = student.exp()
    allowed = (dx.abs().amax(1, keepdim=True) + q) * 1e-5 + 1e-30
    if divergence == "total_variation":
        turned = q * ((student - target).abs() <= 1e-5)
        allowed += turned + q * turned.sum(1, keepdim=True)
    return allowed


def roundings(dx: Tensor, dtype: torch.dtype) -> Tensor:
    """By how much two roundings to ``dtype`` of all but the same number may differ: by one step, which for what is smaller than
    all normal numbers is the least number that there is (in float16 6e-8, more than many an entry of dx)."""
    form = torch.finfo(dtype)
    return dx.abs() * (2 * form.eps) + form.smallest_normal * form.eps


def rows_at_scale(dtype: torch.dtype, divergence: str, device: str) -> Result:
    """The cluster kernel's rows against Triton's, which the oracle holds: columns, and every entry of dx to its rounding."""
    worst: dict[str, float] = {}
    for rows, vocab in AT_SCALE:
        given = LongRows.drawn(rows, vocab, device)
        for is_dressed, metrics in VARIANTS:
            options = (divergence, dtype, is_dressed, metrics)
            name = f"{rows} x {vocab}" + ", dressed" * is_dressed + ", metrics" * metrics
            with mock.patch.dict(os.environ, KDKERNELS_ROWS="triton"):
                expected, dx = given.row_loss(*options)
            with cluster_rows() as started:
                found, made = given.row_loss(*options)
                same(dict(zip(("columns", "dx"), given.row_loss(*options), strict=True)), {"columns": found, "dx": made})
            if len(started) != 2:
                raise LookupError(f"the cluster kernel took no rows of {vocab} logits")
            allowed = roundings(dx, dtype) + may_differ(dx, *given.sides(is_dressed), divergence)
            off = float(((made - dx).abs() / allowed).max()), float((found - expected).abs().max() / 1e-4)
            worst[name] = max(off)
            if not worst[name] <= 1.0:
                raise ArithmeticError(f"{name}: entries of dx, and columns, are {off} times what they may be off")
    return {"worst_ratio": max(worst.values()), "rows_at_scale": worst}


def _step(
    tokens: int, vocab: int, dims: tuple[int, int], dtype: torch.dtype
) -> tuple[list[Tensor], Callable[..., Tensor], list[Tensor]]:
    """Student's leaves, the loss of random inputs, and the teacher's, on the GPU."""
    device = "cuda"
    generator = torch.Generator(device).manual_seed(0)
    shapes = (tokens, dims[0]), (vocab, dims[0]), (tokens, dims[1]), (vocab, dims[1])
    inputs = [torch.randn(shape, generator=generator, device=device, dtype=dtype).mul_(shape[1] ** -0.25) for shape in shapes]
    leaves = [leaf.requires_grad_() for leaf in inputs[:2]]
    return leaves, lambda **options: kd.linear_kd_loss(*leaves, *inputs[2:], **options), inputs[2:]


# Tokens, vocabulary and hidden sizes of the products that store 16-bit offsets; a vocabulary that no tile divides.
PRODUCTS = ((2048, 128_256, (2048, 4096)), (2048, 151_936, (896, 3584)), (1000, 262_147, (1152, 3840)))
TILE, PIECE = 256, 128  # columns of a tile; rows that are looked at together
# How far below the largest of their tile codes are -inf, a little less; and a hidden state and a weight whose product lies there.
FAR, BANNING = 65_000.0, (8.0, -(2.0**15))


def stored_offsets(codes: Tensor, largest: Tensor, sums: Tensor, hidden: Tensor, weight: Tensor, *, learns: bool) -> float:
    """By how many times more than they may the stored logits [N, V] of a plain head, the largest of their tiles and their sums are
    off, against float32 products: by a rounding of a code, and what sums in two orders may differ by. Infinitely where others are
    banned than those far below the largest of their tile, or the sums' signs say something else (nothing, of a model that does not
    learn)."""
    worst = 0.0
    for begin in range(0, len(codes), PIECE):
        here = slice(begin, begin + PIECE)
        x = hidden[here].float() @ weight.float().t()
        padded = torch.nn.functional.pad(x, (0, -x.shape[1] % TILE), value=-torch.inf).view(len(x), -1, TILE)
        code = torch.nn.functional.pad(codes[here].float(), (0, -x.shape[1] % TILE), value=-torch.inf).view_as(padded)
        real = padded.isfinite()
        banned = real & (code == -torch.inf)
        far = real & (padded < largest[here][..., None] - FAR)
        said = sums[here].signbit()
        if not torch.equal(banned, far) or bool((said != banned.any(2))[said | learns].any()):
            return torch.inf
        noise = 2e-5 * (padded.masked_fill(far | ~real, 0.0).abs().amax((1, 2))[:, None] + 1.0)
        off_largest = (largest[here] - padded.amax(2)).abs() / noise
        rounding = torch.finfo(torch.float16).eps / 2 * code.abs().clamp(min=2.0**-14)
        off = (code + (largest[here] - 1.0)[..., None] - padded).abs() / (rounding + noise[..., None])
        off_sums = ((code - 1.0).exp().sum(2) / sums[here].abs() - 1.0).abs() / 1e-4
        found = float(torch.stack([off_largest.max(), off[real & ~banned].max(), off_sums.max()]).max())
        worst = found if not found <= worst else worst  # NaN stays
    return worst


def products_at_scale(dtype: torch.dtype, strategy: str, device: str) -> Result:
    """What both models' products store, by Triton's kernel or by the one in CUDA C++."""
    if device != "cuda":
        raise SkippedError("sizes for a GPU")
    worst: dict[str, float] = {}
    for tokens, vocab, dims in PRODUCTS:
        leaves, loss, teacher = _step(tokens, vocab, dims, dtype)
        for hidden, head in (leaves, teacher):
            hidden.data[:, 0], head.data[[5, vocab - 1], 0] = BANNING
        sides: list[tuple[Tensor, ...]] = []
        with offset_logits(strategy, sides) as started, torch.no_grad():
            loss(strategy="tokens", memory_budget=2**34)
        if len(started) != (2 if strategy == "offsets-cuda" else 1):  # both products, or the rows
            raise LookupError(f"{strategy}: {len(started)} of what was asked for, {vocab} x {dims}")
        for name, side, inputs in zip(("student", "teacher"), sides, (leaves, teacher), strict=True):
            key = f"{name}, {tokens} x {vocab} x {inputs[0].shape[1]}"
            codes, largest, sums = side
            worst[key] = stored_offsets(codes, largest, sums, *(part.detach() for part in inputs), learns=name == "student")
            if not worst[key] <= 1.0:
                raise ArithmeticError(f"{key}: off by {worst[key]:.3g} times what it may be")
    return {"worst_ratio": max(worst.values()), "products_at_scale": worst}


def planned_memory(dtype: torch.dtype, strategy: str, device: str) -> Result:
    """A step's peak, above inputs and returned gradients, is what kd.plan said: to 16 MiB or a twentieth, in both directions."""
    if device != "cuda":
        raise SkippedError("the peak is read from the CUDA allocator")
    tokens, vocab, dims = 6000, 50_257, (512, 768)
    leaves, loss, _ = _step(tokens, vocab, dims, dtype)

    found = {}
    for budget_ in (None, 256 * MIB):
        options: dict[str, Any] = {"memory_budget": budget_, "device": device, "strategy": strategy}
        plan = kd.plan(tokens, vocab, *dims, dtype, **options)

        def step(budget_: int | None = budget_) -> None:
            torch.autograd.grad(loss(strategy=strategy, memory_budget=budget_), leaves)

        step()  # what libraries keep for good is not the step's
        peak = peak_bytes(step) - sum(leaf.nbytes for leaf in leaves)
        found["default budget" if budget_ is None else "256 MiB budget"] = {"peak": peak, "planned": plan.scratch_bytes}
        if abs(peak - plan.scratch_bytes) > max(16 * MIB, plan.scratch_bytes // 20):
            raise ArithmeticError(f"peak {peak / MIB:.0f} MiB, planned {plan.scratch_bytes / MIB:.0f} MiB, budget {budget_}")
    return {"scratch_bytes": found}


def large_offsets(dtype: torch.dtype, strategy: str, device: str) -> Result:
    """Logits past 2^31 entries in one chunk give what small chunks give, to a hundredth of the gradients' norm."""
    if device != "cuda" or dtype != torch.bfloat16:
        raise SkippedError("run on a GPU in bfloat16 only, for the memory that it takes")
    leaves, loss, _ = _step(8200, 262_147, (64, 64), dtype)
    try:
        whole, parts = (
            (value.item(), torch.autograd.grad(value, leaves))
            for value in (loss(strategy=strategy, memory_budget=bytes_) for bytes_ in (2**35, 2**28))
        )
    except torch.OutOfMemoryError as error:
        raise SkippedError(why(error)) from None
    errors = [abs(whole[0] - parts[0]) / abs(parts[0])]
    for one, other in zip(whole[1], parts[1], strict=True):
        errors.append(((one.float() - other.float()).norm() / other.float().norm()).item())
    if not max(errors) <= 0.01:
        raise ArithmeticError(f"loss, gradients of hidden states and head differ by {errors} of their norms")
    return {"relative_differences": errors}

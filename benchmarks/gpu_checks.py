"""What a GPU has to get right before its times mean anything: the contract of the README's "Numbers you can trust".

Values and gradients are held against float64 autograd on the CPU over formulas that share no code with the library
(tests/support/oracle.py); the bound is the error of eager PyTorch in the same dtype on the same device, twice, plus one rounding
(tests/support/cases.py). A check is a dict with ``passed`` true, or false and a ``reason``, or with ``skipped`` and why it means
nothing here.
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import kdkernels as kd
from benchmarks.cases import DTYPES, MIB
from benchmarks.gpu_device import cluster_rows, device_of, offset_logits
from benchmarks.gpu_times import peak_bytes
from benchmarks.runner import Result, why
from kdkernels.divergences import resolve
from kdkernels.engine.scratch import ROW_ELEMENTS
from tests.support.cases import Case, assert_as_good_as_eager, draw, dressed, ratios
from tests.support.oracle import Options


class SkippedError(Exception):
    """Says why a check means nothing here."""


@dataclass(frozen=True)
class Setting:
    """One problem, drawn ``draws`` times. dressed: biases, scales, softcaps, labels with holes, token weights, a share of CE.

    banned: -inf biases for some tokens of each model. chunks: into how many the memory budget cuts the logits, at least.
    """

    tokens: tuple[int, ...]
    vocab: int
    dims: tuple[int, int] = (16, 24)
    draws: int = 1
    t: float = 1.0
    temperature: float = 1.0
    dressed: bool = False
    banned: bool = False
    chunks: int = 1


SETTINGS = {
    "plain": Setting((12,), 1003, draws=2),
    "temperature": Setting((12,), 1003, temperature=2.0, draws=2),
    "t < 1": Setting((12,), 1003, t=0.4, draws=2),
    "both, odd widths": Setting((2, 3), 2600, (17, 23), t=0.4, temperature=2.0),
    "one token": Setting((1,), 1003, t=0.4, draws=16),
    "vocabulary smaller than a block": Setting((5,), 3, temperature=2.0, draws=6),
    "vocabulary of one": Setting((2,), 1, draws=2),
    "no leading dimension": Setting((), 37, draws=8),
    "several chunks": Setting((67,), 1003, chunks=3),
    "wide": Setting((257,), 9001, (96, 160)),
    "dressed": Setting((12,), 1003, dressed=True, draws=2),
    "dressed, t < 1": Setting((12,), 1003, dressed=True, t=0.4, temperature=2.0, draws=2),
    "banned tokens": Setting((12,), 1003, banned=True, draws=2),
    "banned tokens, t < 1": Setting((12,), 1003, banned=True, t=0.4, temperature=2.0, draws=2),
}
SPREADS = (1.0, 10.0, 30.0)
SHORT = ("plain", "both, odd widths", "vocabulary smaller than a block", "several chunks", "dressed, t < 1", "banned tokens")
TOY = {
    "dressed, t < 1": Setting((5,), 37, dressed=True, t=0.4, temperature=2.0, draws=3),
    "banned tokens": Setting((2, 2), 45, (7, 9), banned=True, draws=3),
    "vocabulary smaller than a block": Setting((3,), 3, draws=4),
}
# Through the interpreter: one divergence that has its value in one sweep, and one that needs the log-sum-exps first.
TOY_DIVERGENCES = ("forward_kl", "jsd")
REPEATED = {"toy": TOY["dressed, t < 1"], "full": Setting((300,), 5003, (64, 96), dressed=True, t=0.4, temperature=2.0)}


def cases(setting: Setting, divergence: str, dtype: torch.dtype, spread: float) -> list[Case]:
    """The setting's problems on the CPU, their tensors rounded to ``dtype``."""
    options = Options(divergence, t=setting.t, temperature=setting.temperature)
    drawn = [draw(seed, setting.tokens, setting.vocab, setting.dims, spread, dtype) for seed in range(setting.draws)]
    if setting.dressed:
        options = replace(options, ce_weight=0.5, kd_weight=0.75)
        drawn = [dressed(case, seed) for seed, case in enumerate(drawn)]
    if setting.banned:
        biases = torch.zeros(2, setting.vocab, dtype=dtype)
        biases[0, 1::7] = biases[1, 3::5] = -torch.inf
        drawn = [replace(case, student_bias=biases[0], teacher_bias=biases[1]) for case in drawn]
    return [replace(case, options=options) for case in drawn]


def moved(case: Case, device: str) -> Case:
    parts: dict[str, Any] = {name: part.to(device) for name, part in vars(case).items() if isinstance(part, Tensor)}
    return replace(case, **parts)


def on_cpu(result: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.cpu() for name, value in result.items()}


def budget(case: Case, chunks: int) -> int | None:
    """Bytes of logits that make at least about ``chunks`` of either strategy; None leaves the choice to the library."""
    if chunks == 1:
        return None
    tokens, vocab = case.student_hidden.shape[:-1].numel(), case.student_weight.shape[0]
    return tokens * vocab * case.student_weight.itemsize // chunks


# Checked as strategies: ``tokens`` with the cluster kernel, its rows cut in as many ways as a cluster can be, so that rows of every
# length are shared by several blocks; and ``tokens`` with logits of 16 bits.
CLUSTER, OFFSETS = "cluster", "offsets"
CLUSTERS = ((1, 8, 3), (2, 8, 3), (4, 16, 1), (8, 8, 3), (8, 16, 1), (16, 8, 3))


@contextmanager
def shared_rows(strategy: str, at: int, vocab: int) -> Iterator[str]:
    """What to call the loss with. at: which of the ways to cut rows. vocab: logits of a row; short rows lie too close."""
    if strategy not in (CLUSTER, OFFSETS):
        yield strategy
        return
    with cluster_rows(CLUSTERS[at % len(CLUSTERS)]) if strategy == CLUSTER else offset_logits() as started:
        yield "tokens"
    if not started and vocab >= ROW_ELEMENTS:
        raise LookupError(f"{strategy}: no rows were taken")


def _with_shared_rows(check: Callable[[Case, str], Result], case: Case, strategy: str) -> Result:
    with shared_rows(strategy, 2, case.student_weight.shape[0]) as called:
        return check(case, called)


def _with_offsets(check: Callable[..., Result], dtype: torch.dtype, strategy: str, device: str) -> Result:
    with shared_rows(strategy, 0, ROW_ELEMENTS) as called:
        return check(dtype, called, device)


# Rows that are as many and as long as those of models: clusters take several of them, one after the other, in several chunks each.
AT_SCALE = ((2048, 128_256), (2048, 151_936), (1024, 262_147))


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

    def student(self, is_dressed: bool) -> Tensor:
        """The student's probabilities."""
        x = self.logits[0, :, : self.vocab]
        return ((((x + self.bias) * 0.7 / 20.0).tanh_() * 10.0) if is_dressed else x).softmax(1)

    def row_loss(self, divergence: str, dtype: torch.dtype, is_dressed: bool) -> tuple[Tensor, Tensor]:
        """ROW_COLUMNS, and dx in ``dtype`` as float32."""
        from kdkernels.backends.triton.rows import row_loss  # Triton may not be installed

        dx = torch.full_like(self.logits[0], torch.nan, dtype=dtype)
        x, z, out = (side[:, : self.vocab] for side in (self.logits[0].clone(), self.logits[1], dx))
        a, weight = resolve(divergence).a, self.weight
        if is_dressed:
            t, head = weight.new_tensor(0.4), [0.7, 20.0, 0.7, 20.0]
            columns = row_loss(
                x, z, self.bias, self.bias, self.labels, weight, t, divergence, a, 2.0, 1.0, 0.5, head, True, False, out
            )
        else:
            t, head = weight.new_tensor(1.0), [1.0, 0.0, 1.0, 0.0]
            columns = row_loss(x, z, None, None, None, weight, t, divergence, a, 1.0, 1.0, 0.0, head, True, False, out)
        return columns, out.float()


def may_differ(dx: Tensor, student: Tensor) -> Tensor:
    """By how much two float32 computations of dx may, entry by entry, besides its own rounding. dx is slope - q sum slope, both
    about as large as q (``student``) and, in a row of JSD, up to a hundred times as large as what they leave."""
    return (dx.abs().amax(1, keepdim=True) + student) * 1e-5 + 1e-30


def rows_at_scale(dtype: torch.dtype, _: str, device: str) -> Result:
    """The cluster kernel's rows against Triton's, which the oracle holds: columns, and every entry of dx to its rounding."""
    worst: dict[str, float] = {}
    for rows, vocab in AT_SCALE:
        given = LongRows.drawn(rows, vocab, device)
        for divergence, is_dressed in itertools.product(kd.divergences(), (False, True)):
            name = f"{divergence}{', dressed' if is_dressed else ''}, {rows} x {vocab}"
            with mock.patch.dict(os.environ, KDKERNELS_ROWS="triton"):
                expected, dx = given.row_loss(divergence, dtype, is_dressed)
            with cluster_rows() as started:
                found, made = given.row_loss(divergence, dtype, is_dressed)
                _same(
                    dict(zip(("columns", "dx"), given.row_loss(divergence, dtype, is_dressed), strict=True)),
                    {"columns": found, "dx": made},
                )
            if len(started) != 2:
                raise LookupError(f"the cluster kernel took no rows of {vocab} logits")
            allowed = dx.abs() * (2 * torch.finfo(dtype).eps) + may_differ(dx, given.student(is_dressed))
            off = float(((made - dx).abs() / allowed).max()), float((found - expected).abs().max() / 1e-4)
            worst[name] = max(off)
            if not worst[name] <= 1.0:
                raise ArithmeticError(f"{name}: entries of dx, and columns, are {off} times what they may be off")
    return {"worst_ratio": max(worst.values()), "rows_at_scale": worst}


def accuracy(divergence: str, strategy: str, dtype: torch.dtype, spread: float, size: str, device: str) -> Result:
    """How the errors of value and gradients compare with what they may be: at most 1 is right (see assert_as_good_as_eager)."""
    compared = {}
    for at, (name, setting) in enumerate(settings_of(size).items()):
        drawn = cases(setting, divergence, dtype, spread)
        exact = [case.plain() for case in drawn]
        eager, found = [], []
        for case in (moved(case, device) for case in drawn):
            with torch.device(device):  # where the oracle makes its masks
                eager.append(on_cpu(case.plain(dtype)))
            with shared_rows(strategy, at, setting.vocab) as called:
                found.append(on_cpu(case.run(strategy=called, memory_budget=budget(case, setting.chunks))))
        compared[name] = ratios(found, eager, exact)
    for names in {tuple(ratio) for ratio in compared.values()}:  # a head without a bias has no gradient of one
        assert_as_good_as_eager({name: ratio for name, ratio in compared.items() if tuple(ratio) == names})
    return {"worst_ratio": max(max(ratio.values()) for ratio in compared.values()), "settings": list(compared)}


def settings_of(size: str) -> dict[str, Setting]:
    if size == "toy":
        return TOY
    return SETTINGS if size == "full" else {name: SETTINGS[name] for name in SHORT}


def repeated(divergence: str, dtype: torch.dtype, size: str, device: str) -> Case:
    return moved(cases(REPEATED["toy" if size == "toy" else "full"], divergence, dtype, 3.0)[0], device)


def _same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        if not torch.equal(found[name], value):
            raise ArithmeticError(f"{name} differs by up to {(found[name].double() - value.double()).abs().max().item():.3g}")


def two_runs(case: Case, strategy: str) -> Result:
    """Two runs in several chunks agree bit for bit."""
    first, second = (case.run(strategy=strategy, memory_budget=budget(case, 3)) for _ in range(2))
    _same(second, first)
    return {}


def _with_graph(case: Case, strategy: str, **more: Any) -> tuple[dict[str, Tensor], Any]:
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in case.learned().items()}
    return leaves, case.loss(leaves, strategy=strategy, **more)


def backward_twice(case: Case, strategy: str) -> Result:
    """backward(retain_graph=True) twice gives the same gradients twice, and leaves the inputs alone."""
    leaves, loss = _with_graph(case, strategy)
    before = {name: leaf.detach().clone() for name, leaf in leaves.items()}
    first, second = (
        [grad.clone() for grad in torch.autograd.grad(loss, list(leaves.values()), retain_graph=True)] for _ in range(2)
    )
    _same(dict(zip(leaves, second, strict=True)), dict(zip(leaves, first, strict=True)))
    _same({name: leaf.detach() for name, leaf in leaves.items()}, before)
    return {}


def host_syncs(case: Case, strategy: str) -> Result:
    """At most one host sync in loss and backward, with labels, masks and token weights to look at; none without that look."""
    if case.student_hidden.device.type != "cuda":
        raise SkippedError("host syncs are counted by CUDA")
    counts = {"syncs": _syncs(case, strategy, check_labels=True), "unchecked_syncs": _syncs(case, strategy, check_labels=False)}
    if counts["syncs"] > 1 or counts["unchecked_syncs"]:
        raise ArithmeticError(
            f"{counts['syncs']} host syncs, {counts['unchecked_syncs']} without a check; one and none are the most"
        )
    return counts


def _syncs(case: Case, strategy: str, **more: Any) -> int:
    def step() -> None:
        leaves, loss = _with_graph(case, strategy, **more)
        torch.autograd.grad(loss, list(leaves.values()))

    step()  # a kernel's first launch loads it
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def captured(case: Case, strategy: str) -> Result:
    """A step captured in a CUDA graph gives for other hidden states what the step itself gives for them, to a thousandth of the
    norm: in a graph a matrix library may take another way to add up."""
    if case.student_hidden.device.type != "cuda":
        raise SkippedError("CUDA captures graphs")
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in case.learned().items()}

    def step() -> dict[str, Tensor]:
        loss = case.loss(leaves, strategy=strategy, check_labels=False)
        return {"loss": loss.detach(), **dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))}

    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        step()  # kernels are compiled and loaded, libraries take their memory
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = step()
    with torch.no_grad():
        leaves["student_hidden"].mul_(-0.5)
    graph.replay()
    for name, value in step().items():
        apart = (made[name].double() - value.double()).norm() / value.double().norm()
        if not apart <= 1e-3:
            raise ArithmeticError(f"{name} of the replayed graph is {apart.item():.3g} of its norm from that of the step")
    return {}


def special_values(case: Case, strategy: str) -> Result:
    """Every token masked: loss and gradients 0. NaN in: NaN out."""
    assert case.labels is not None
    for name, value in replace(case, labels=torch.full_like(case.labels, -100)).run(strategy=strategy).items():
        if bool(value.any()):
            raise ArithmeticError(f"{name} is not 0 though every token is masked")
    poisoned = case.student_hidden.clone()
    poisoned.view(-1)[0] = torch.nan
    for name, value in replace(case, student_hidden=poisoned).run(strategy=strategy).items():
        if not bool(value.isnan().any()):
            raise ArithmeticError(f"{name} hides a NaN of the hidden states")
    return {}


def _step(tokens: int, vocab: int, dims: tuple[int, int], dtype: torch.dtype) -> tuple[list[Tensor], Callable[..., Tensor]]:
    """Student's leaves, and the loss of random inputs, on the GPU."""
    device = "cuda"
    generator = torch.Generator(device).manual_seed(0)
    shapes = (tokens, dims[0]), (vocab, dims[0]), (tokens, dims[1]), (vocab, dims[1])
    inputs = [torch.randn(shape, generator=generator, device=device, dtype=dtype).mul_(shape[1] ** -0.25) for shape in shapes]
    leaves = [leaf.requires_grad_() for leaf in inputs[:2]]
    return leaves, lambda **options: kd.linear_kd_loss(*leaves, *inputs[2:], **options)


def planned_memory(dtype: torch.dtype, strategy: str, device: str) -> Result:
    """A step's peak, above inputs and returned gradients, is what kd.plan said: to 16 MiB or a twentieth, in both directions."""
    if device != "cuda":
        raise SkippedError("the peak is read from the CUDA allocator")
    tokens, vocab, dims = 6000, 50_257, (512, 768)
    leaves, loss = _step(tokens, vocab, dims, dtype)

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
    leaves, loss = _step(8200, 262_147, (64, 64), dtype)
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


def checked(facts: Result, check: Callable[..., Result], *arguments: Any) -> Result:
    """The check's outcome."""
    try:
        return {**facts, "passed": True, **check(*arguments)}
    except SkippedError as reason:
        return {**facts, "skipped": str(reason)}
    except Exception as error:  # a kernel that does not compile is a finding like any other
        return {**facts, "passed": False, "reason": why(error)}


REPEATED_CHECKS = (two_runs, backward_twice, host_syncs, captured, special_values)
OF_DTYPE = (planned_memory, large_offsets)
OF_CLUSTERS = (rows_at_scale,)
Item = tuple[str, str | None, str, float | None]  # dtype, divergence, check, spread


def items(size: str, dtype: str, divergence: str) -> list[Item]:
    """The checks of a divergence."""
    spreads = (3.0,) if size == "toy" else SPREADS
    at_spreads: list[Item] = [(dtype, divergence, "accuracy", spread) for spread in spreads]
    return at_spreads + [(dtype, divergence, check.__name__, None) for check in REPEATED_CHECKS]


def items_of_dtype(dtype: str, strategy: str) -> list[Item]:
    """The checks that are made once for each dtype."""
    return [(dtype, None, check.__name__, None) for check in (OF_CLUSTERS if strategy == CLUSTER else OF_DTYPE)]


def opened(size: str, strategy: str) -> Callable[[str, str | None, str, float | None], Iterator[Result]]:
    device = device_of(size)
    by_name = {check.__name__: check for check in (*REPEATED_CHECKS, *OF_DTYPE, *OF_CLUSTERS)}

    def run(dtype_name: str, divergence: str | None, name: str, spread: float | None) -> Iterator[Result]:
        dtype = DTYPES[dtype_name]
        facts: Result = {"check": name, "strategy": strategy, "dtype": dtype_name}
        if strategy == CLUSTER and device != "cuda":
            yield {**facts, "divergence": divergence, "skipped": "the cluster kernel needs an NVIDIA GPU"}
            return
        if divergence is None:
            check = partial(_with_offsets, by_name[name]) if strategy == OFFSETS else by_name[name]
            yield checked(facts, check, dtype, strategy, device)
            return
        facts["divergence"] = divergence
        if spread is None:
            yield checked(facts, _with_shared_rows, by_name[name], repeated(divergence, dtype, size, device), strategy)
        else:
            yield checked({**facts, "spread": spread}, accuracy, divergence, strategy, dtype, spread, size, device)

    return run

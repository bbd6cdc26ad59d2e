"""What a GPU has to get right before its times mean anything: the contract of the README's "Numbers you can trust".

Values and gradients are held against float64 autograd on the CPU over formulas that share no code with the library
(tests/support/oracle.py); the bound is the error of eager PyTorch in the same dtype on the same device, twice, plus one rounding
(tests/support/cases.py). A check is a dict with ``passed`` true, or false and a ``reason``, or with ``skipped`` and why it means
nothing here.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import DTYPES
from benchmarks.gpu_device import cluster_rows, device_of, offset_logits
from benchmarks.gpu_scale import SkippedError, large_offsets, planned_memory, products_at_scale, rows_at_scale, same
from benchmarks.runner import Result, why
from kdkernels.engine.scratch import ROW_ELEMENTS
from tests.support import oracle
from tests.support.cases import Case, assert_as_good_as_eager, draw, dressed, ratios
from tests.support.oracle import Options


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
# length are shared by several blocks; and ``tokens`` with logits of 16 bits, by Triton's products and by those in CUDA C++.
CLUSTER, OFFSETS, OFFSETS_CUDA = "cluster", "offsets", "offsets-cuda"
CLUSTERS = ((1, 8, 3), (2, 8, 3), (4, 16, 1), (8, 8, 3), (8, 16, 1), (16, 8, 3))


@contextmanager
def shared_rows(strategy: str, at: int, vocab: int) -> Iterator[str]:
    """What to call the loss with. at: which of the ways to cut rows. vocab: logits of a row; short rows lie too close."""
    if strategy not in (CLUSTER, OFFSETS, OFFSETS_CUDA):
        yield strategy
        return
    with cluster_rows(CLUSTERS[at % len(CLUSTERS)]) if strategy == CLUSTER else offset_logits(strategy) as started:
        yield "tokens"
    # The products in CUDA C++ are of plain heads alone; products_at_scale says whether they are made.
    if not started and vocab >= ROW_ELEMENTS and strategy != OFFSETS_CUDA:
        raise LookupError(f"{strategy}: no rows were taken")


def _with_shared_rows(check: Callable[[Case, str], Result], case: Case, strategy: str) -> Result:
    with shared_rows(strategy, 2, case.student_weight.shape[0]) as called:
        return check(case, called)


def _with_offsets(check: Callable[..., Result], dtype: torch.dtype, strategy: str, device: str) -> Result:
    with shared_rows(strategy, 0, ROW_ELEMENTS) as called:
        return check(dtype, called, device)


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


def two_runs(case: Case, strategy: str) -> Result:
    """Two runs in several chunks agree bit for bit."""
    first, second = (case.run(strategy=strategy, memory_budget=budget(case, 3)) for _ in range(2))
    same(second, first)
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
    same(dict(zip(leaves, second, strict=True)), dict(zip(leaves, first, strict=True)))
    same({name: leaf.detach() for name, leaf in leaves.items()}, before)
    return {}


def scaled(case: Case, strategy: str) -> Result:
    """An upstream gradient of a third gives a third of each gradient, to one rounding of its dtype, by which a third that is
    rounded to 16 bits first is found out. (Of float16's hidden states, which are kept larger until then, both are rounded.)"""
    grads = []
    for factor in (1.0, 1 / 3):
        leaves, loss = _with_graph(case, strategy)
        grads.append(torch.autograd.grad(loss * factor, list(leaves.values())))
    third = torch.tensor(1 / 3).double().item()
    for name, plain, found in zip(leaves, *grads, strict=True):
        kind = torch.finfo(found.dtype)
        roundings = 2 if found.dtype == torch.float16 and name == "student_hidden" else 1
        rtol, atol = roundings * kind.eps / 2 * (1 + 2**-10), kind.smallest_normal * kind.eps
        torch.testing.assert_close(found.double(), plain.double() * third, rtol=rtol, atol=atol)
    return {}


def large_gradient(dtype: torch.dtype, strategy: str, device: str) -> Result:
    """The scaling of a gradient, which is the same for every strategy, reaches its entries past 2^31 and leaves none out there."""
    if device != "cuda" or dtype != torch.bfloat16:
        raise SkippedError("run on a GPU in bfloat16 only, for the memory that it takes")
    try:
        grad = torch.ones(2**31 + 5000, dtype=dtype, device=device)
    except torch.OutOfMemoryError as error:
        raise SkippedError(why(error)) from None
    torch.ops.kdkernels.scale_(grad, torch.full((), 3.0, device=device))
    wrong = int((grad[-8192:] != 3.0).sum())
    if wrong:
        raise ArithmeticError(f"{wrong} of the last 8,192 entries are not scaled once")
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


def measured(case: Case, strategy: str) -> Result:
    """Metrics of a step with gradients are those of float64, to what a rounding of 16-bit offsets does to a mean; the most likely
    tokens to one of them. With all that the case has and of bare heads, at its t and at 1."""
    bare = replace(case, student_bias=None, teacher_bias=None, student_softcap=None, teacher_softcap=None)
    for one, t in itertools.product((case, bare), (case.options.t, 1.0)):
        given = replace(one, options=replace(one.options, t=t))
        _, (_, found) = _with_graph(given, strategy, return_metrics=True)
        with torch.device(case.student_hidden.device):  # where the oracle makes its masks
            right = oracle.metrics(*given.logits(), given.labels, given.token_weight, given.options)
        for name, value in right.items():
            bound = 1.01 / right["tokens"] if name == "agreement" else 1e-3 * (1.0 + value.abs())
            if not bool((found[name] - value).abs() <= bound):
                raise ArithmeticError(f"at t = {t} {name} is {found[name].item():.6g} instead of {value.item():.6g}")
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


def checked(facts: Result, check: Callable[..., Result], *arguments: Any) -> Result:
    """The check's outcome."""
    try:
        return {**facts, "passed": True, **check(*arguments)}
    except SkippedError as reason:
        return {**facts, "skipped": str(reason)}
    except Exception as error:  # a kernel that does not compile is a finding like any other
        return {**facts, "passed": False, "reason": why(error)}


REPEATED_CHECKS = (two_runs, backward_twice, scaled, host_syncs, captured, special_values)
OF_DTYPE = (planned_memory, large_offsets)
OF_OFFSETS = (*OF_DTYPE, products_at_scale)
Item = tuple[str, str | None, str, float | None]  # dtype, divergence, check, spread


def items(size: str, dtype: str, divergence: str, strategy: str) -> list[Item]:
    """The checks of a divergence."""
    spreads = (3.0,) if size == "toy" else SPREADS
    at_spreads: list[Item] = [(dtype, divergence, "accuracy", spread) for spread in spreads]
    checks = (*REPEATED_CHECKS, *((rows_at_scale,) if strategy == CLUSTER else ()))
    if (dtype, divergence) == ("bf16", "forward_kl") and strategy in ("tokens", OFFSETS, OFFSETS_CUDA):  # as KDTrainer does
        checks = (*checks, measured)
    return at_spreads + [(dtype, divergence, check.__name__, None) for check in checks]


def items_of_dtype(dtype: str, strategy: str) -> list[Item]:
    """The checks that are made once for each dtype."""
    of_strategy = {CLUSTER: (), OFFSETS: OF_OFFSETS, OFFSETS_CUDA: OF_OFFSETS, "tokens": (*OF_DTYPE, large_gradient)}
    return [(dtype, None, check.__name__, None) for check in of_strategy.get(strategy, OF_DTYPE)]


def opened(size: str, strategy: str) -> Callable[[str, str | None, str, float | None], Iterator[Result]]:
    device = device_of(size)
    by_name = {check.__name__: check for check in (*REPEATED_CHECKS, *OF_OFFSETS, large_gradient, measured)}

    def run(dtype_name: str, divergence: str | None, name: str, spread: float | None) -> Iterator[Result]:
        dtype = DTYPES[dtype_name]
        facts: Result = {"check": name, "strategy": strategy, "dtype": dtype_name}
        if strategy in (CLUSTER, OFFSETS_CUDA) and device != "cuda":
            yield {**facts, "divergence": divergence, "skipped": "kernels in CUDA C++ need an NVIDIA GPU"}
            return
        if divergence is None:
            own = strategy in (OFFSETS, OFFSETS_CUDA) and by_name[name] in OF_DTYPE
            check = partial(_with_offsets, by_name[name]) if own else by_name[name]
            yield checked(facts, check, dtype, strategy, device)
            return
        facts["divergence"] = divergence
        if name == rows_at_scale.__name__:
            yield checked(facts, rows_at_scale, dtype, divergence, device)
        elif spread is None:
            yield checked(facts, _with_shared_rows, by_name[name], repeated(divergence, dtype, size, device), strategy)
        else:
            yield checked({**facts, "spread": spread}, accuracy, divergence, strategy, dtype, spread, size, device)

    return run

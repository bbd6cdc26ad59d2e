"""Problem instances, the library run on them, and the measure of error that the tests share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kdkernels as kd
from kdkernels import backends
from kdkernels.backends import native
from kdkernels.engine.cut import Cut
from kdkernels.losses import operators as ops
from tests.support import oracle
from tests.support.oracle import Options

Result = dict[str, Tensor]
INSTRUCTION_SETS = ("avx512", "avx2", "plain")
# By backend or instruction set; "-vocab" streams the vocabulary in blocks, the others take whole rows.
BLOCK_VARIANTS = ("reference", *INSTRUCTION_SETS)
VARIANTS = (*BLOCK_VARIANTS, "triton", "reference-vocab", "native-vocab", "triton-vocab")
# Whole rows whose logits are kept in 16 bits.
OFFSETS = "triton-offsets"
NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = (*NATIVE_DTYPES, torch.float64)
REDUCTIONS = ("mean", "sum", "none")
# The divergences that are most used.
MAIN = ("forward_kl", "reverse_kl", "jsd")
# Standard deviations of logits.
SPREADS = (1.0, 10.0, 30.0)
both_strategies = pytest.mark.parametrize("strategy", ["tokens", "vocab"])
every_divergence = pytest.mark.parametrize("name", kd.divergences())
every_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


def choices(variants: tuple[str, ...]) -> list[tuple[str, torch.dtype]]:
    """Every variant with every dtype that it takes."""
    wide = [(variant, torch.float64) for variant in variants if variant.startswith("reference")]
    return [(variant, dtype) for variant in variants for dtype in NATIVE_DTYPES] + wide


CHOICES = [*choices(VARIANTS), (OFFSETS, torch.bfloat16)]
BLOCK_CHOICES = choices(BLOCK_VARIANTS)


def skip_reason(variant: str) -> str | None:
    if variant.partition("-")[0] in (*backends.usable(), *native.instruction_sets()):
        return None
    if variant.startswith("triton"):
        return "Triton is not installed"
    return f"this processor has no {variant}" if native.available() else "the C++ extension was not built here"


def parameters(choices: Any = VARIANTS) -> list[Any]:
    """For pytest.mark.parametrize: variants, or tuples that start with one; those that cannot run here are skipped and say why."""
    found = []
    for choice in choices:
        parts = choice if isinstance(choice, tuple) else (choice,)
        reason = skip_reason(parts[0])
        marks = [pytest.mark.skip(reason=reason)] if reason else []
        found.append(pytest.param(*parts, marks=marks, id="-".join(str(part).removeprefix("torch.") for part in parts)))
    return found


@contextmanager
def running(variant: str) -> Iterator[None]:
    """Everything inside runs on one backend, for the native one on one instruction set, and in one strategy.

    The vocabulary comes in three to five ragged blocks there, however little memory it would take whole.
    """
    backend, _, strategy = variant.partition("-")
    with ExitStack() as stack:
        if backend == "triton":
            from tests.support.interpreter import as_on_a_gpu  # Triton may not be installed

            stack.enter_context(as_on_a_gpu())
        else:
            stack.enter_context(backends.use("native" if backend in INSTRUCTION_SETS else backend))
        if backend in INSTRUCTION_SETS:
            stack.enter_context(native.instruction_set(backend))
        if variant == OFFSETS:
            stack.enter_context(mock.patch.dict("os.environ", KDKERNELS_LOGITS="offsets"))
        elif strategy:
            stack.enter_context(mock.patch("kdkernels.losses.operators.choose", return_value=strategy))
            stack.enter_context(mock.patch("kdkernels.engine.cut.block_columns", lambda _, vocab, *__: max(1, vocab // 4 + 1)))
        yield


def strategies_that_run(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list to which each step adds the name of the strategy that its cut came from."""
    ran: list[str] = []
    run = ops.run

    def recording(cut: Cut, *rest: Any) -> Any:
        ran.append("tokens" if cut.whole_rows else "vocab")
        return run(cut, *rest)

    monkeypatch.setattr(ops, "run", recording)
    return ran


def divergence(options: Options) -> kd.Divergence:
    factory = getattr(kd, options.divergence)
    return factory() if options.parameter is None else factory(options.parameter)


def keywords(options: Options) -> dict[str, Any]:
    names = ("t", "temperature", "square_temperature", "kd_weight", "ce_weight", "ignore_index", "normalizer")
    return {"divergence": divergence(options), **{name: getattr(options, name) for name in names}}


class InsideOperators(TorchDispatchMode):
    """Shows every operator that runs, those inside the library's losses too: its arguments before, and what it made."""

    def before(self, name: str, args: tuple[Any, ...]) -> None:
        """name: such as aten::mm, whatever the overload."""

    def after(self, name: str, made: Any) -> None: ...

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        library, name = func._schema.name.split("::")
        self.before(func._schema.name, args)
        if library == "kdkernels" and name in ops.IMPLEMENTATIONS:
            with self:
                made = ops.IMPLEMENTATIONS[name](*args)
        else:
            made = func(*args, **(kwargs or {}))
        self.after(func._schema.name, made)
        return made


class Recorder(InsideOperators):
    """Keeps the arguments of every operator of the library."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple[Any, ...]] = {}

    def before(self, name: str, args: tuple[Any, ...]) -> None:
        if name.startswith("kdkernels::"):
            kept = tuple(arg.detach().clone() if isinstance(arg, Tensor) else arg for arg in args)
            self.calls[name.removeprefix("kdkernels::")] = kept


@dataclass(frozen=True)
class Case:
    """Hidden states and heads of both models; all of one dtype unless a test replaces some."""

    student_hidden: Tensor
    student_weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    student_bias: Tensor | None = None
    teacher_bias: Tensor | None = None
    student_scale: float = 1.0
    student_softcap: float | None = None
    teacher_scale: float = 1.0
    teacher_softcap: float | None = None
    labels: Tensor | None = None
    token_weight: Tensor | None = None
    options: Options = field(default_factory=Options)

    def learned(self) -> dict[str, Tensor]:
        leaves = {"student_hidden": self.student_hidden, "student_weight": self.student_weight, "student_bias": self.student_bias}
        return {name: leaf for name, leaf in leaves.items() if leaf is not None}

    def heads(self, leaves: dict[str, Tensor]) -> tuple[kd.LMHead, kd.LMHead]:
        return (
            kd.LMHead(leaves["student_weight"], leaves.get("student_bias"), self.student_scale, self.student_softcap),
            kd.LMHead(self.teacher_weight, self.teacher_bias, self.teacher_scale, self.teacher_softcap),
        )

    def plain(self, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        """The formulas with autograd, in ``dtype``."""
        teacher = (self.teacher_hidden, self.teacher_weight, self.teacher_bias)
        z = oracle.after_head(
            *(None if part is None else part.to(dtype) for part in teacher),  # type: ignore[arg-type]
            self.teacher_scale,
            self.teacher_softcap,
        )

        def logits(student_hidden: Tensor, student_weight: Tensor, student_bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
            x = oracle.after_head(student_hidden, student_weight, student_bias, self.student_scale, self.student_softcap)
            return x, z

        return oracle.with_gradients(logits, self.learned(), dtype, self.labels, self.token_weight, self.options)

    def run(self, **more: Any) -> dict[str, Tensor]:
        """The library: losses of the tokens, their mean, and its gradients."""
        leaves = {name: leaf.detach().requires_grad_() for name, leaf in self.learned().items()}
        loss = self.loss(leaves, **more)
        grads = torch.autograd.grad(loss.sum(), list(leaves.values()))
        with torch.no_grad():
            per_token = self.loss(leaves, **{**more, "reduction": "none", "normalizer": None})
        return {"losses": per_token, "loss": loss.detach(), **dict(zip(leaves, grads, strict=True))}

    def loss(self, leaves: dict[str, Tensor] | None = None, **more: Any) -> Any:
        leaves = self.learned() if leaves is None else leaves
        student, teacher = self.heads(leaves)
        options = {**keywords(self.options), "token_weight": self.token_weight, **more}
        return kd.linear_kd_loss(leaves["student_hidden"], student, self.teacher_hidden, teacher, self.labels, **options)

    def logits(self) -> tuple[Tensor, Tensor]:
        """Both models' logits after their heads, in float64."""
        return tuple(  # type: ignore[return-value]
            oracle.after_head(*(None if part is None else part.double() for part in parts), scale, softcap)  # type: ignore[arg-type]
            for *parts, scale, softcap in (
                (self.student_hidden, self.student_weight, self.student_bias, self.student_scale, self.student_softcap),
                (self.teacher_hidden, self.teacher_weight, self.teacher_bias, self.teacher_scale, self.teacher_softcap),
            )
        )


def draw(
    seed: int = 0,
    tokens: tuple[int, ...] = (6,),
    vocab: int = 37,
    dims: tuple[int, int] = (8, 12),
    spread: float = 3.0,
    dtype: torch.dtype = torch.float32,
    near: float | None = None,
    **more: Any,
) -> Case:
    """Random hidden states and heads whose logits have standard deviation ``spread``; ``near``: teacher = student + that noise."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale

    hidden, weight = normal(*tokens, dims[0]), normal(vocab, dims[0], scale=spread / dims[0] ** 0.5)
    if near is None:
        teacher_hidden, teacher_weight = normal(*tokens, dims[1]), normal(vocab, dims[1], scale=spread / dims[1] ** 0.5)
    else:
        teacher_hidden, teacher_weight = hidden.clone(), weight + normal(vocab, dims[0], scale=near)
    parts = (hidden, weight, teacher_hidden, teacher_weight)
    return Case(*(part.to(dtype) for part in parts), **more)


def dressed(case: Case, seed: int = 1) -> Case:
    """The same with everything that a head and a batch can have: biases, scales, softcaps, labels with holes, token weights."""
    generator = torch.Generator().manual_seed(seed)
    vocab, tokens, dtype = case.student_weight.shape[0], case.student_hidden.shape[:-1], case.student_weight.dtype
    labels = torch.randint(0, vocab, tokens, generator=generator)
    token_weight = torch.rand(tokens, generator=generator) + 0.5
    if tokens.numel() > 2:
        labels.view(-1)[1], token_weight.view(-1)[2] = -100, 0.0
    return replace(
        case,
        student_bias=torch.randn(vocab, generator=generator).to(dtype),
        teacher_bias=torch.randn(vocab, generator=generator).to(dtype),
        student_scale=0.75,
        student_softcap=20.0,
        teacher_scale=1.25,
        teacher_softcap=30.0,
        labels=labels,
        token_weight=token_weight,
    )


def strided(tensor: Tensor) -> Tensor:
    """The same values with gaps, and with more than one dimension in another order."""
    order = list(reversed(range(tensor.dim())))
    with_gaps = torch.repeat_interleave(tensor.permute(order), 2, -1)[..., ::2]
    return with_gaps.permute(order)


def root_mean_square(tensors: list[Tensor]) -> float:
    return torch.cat([tensor.double().flatten() for tensor in tensors]).square().mean().sqrt().item()


def error(found: list[Result], exact: list[Result], name: str) -> float:
    """Root mean square error of one result over all of its entries and several draws; anything not finite is infinitely wrong."""
    differences = [result[name].double() - right[name] for result, right in zip(found, exact, strict=True)]
    return root_mean_square([difference.nan_to_num(torch.inf, torch.inf, torch.inf) for difference in differences])


def ratios(found: list[Result], eager: list[Result], exact: list[Result]) -> dict[str, float]:
    """Error over what it may be: twice that of eager in the same dtype, plus one rounding of the result. At most 1 is right.

    The mean loss is allowed the error of the losses that it is the mean of.
    """
    over = {}
    for name in found[0]:
        rounding = torch.finfo(found[0][name].dtype).eps * root_mean_square([right[name] for right in exact])
        allowed = 2 * error(eager, exact, "losses" if name == "loss" else name) + rounding
        wrong = error(found, exact, name)
        over[name] = wrong / allowed if allowed else torch.inf if wrong else 0.0
    return over


def assert_as_good_as_eager(compared: dict[Any, dict[str, float]]) -> None:
    """The ratios of several settings are at most 1 together (their root mean square), and none is above 2.

    In one setting a single row can decide both errors, and then eager is better by luck now and then; a wrong formula or a
    systematic loss of digits is far off in its setting, or a little in all of them.
    """
    for name in next(iter(compared.values())):
        over = {setting: ratio[name] for setting, ratio in compared.items()}
        worst = max(over, key=lambda setting: over[setting])
        assert over[worst] <= 2, f"{name}: error {over[worst]:.3g} times what it may be at {worst}"
        together = (sum(ratio**2 for ratio in over.values()) / len(over)) ** 0.5
        assert together <= 1, f"{name}: error {together:.3g} times what it may be over {len(over)} settings"


def assert_same(found: Any, right: Any) -> None:
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def assert_close(found: Result, right: Result, share: float) -> None:
    """Within a share of each result's largest entry."""
    for name, value in right.items():
        atol = share * value.double().abs().max().item() if value.numel() else 0.0
        torch.testing.assert_close(
            found[name].double(), value.double(), rtol=0, atol=atol, msg=lambda text, of=name: f"{of}: {text}"
        )


def yardsticks(exact: list[Result], eager: list[Result], t: float, dtype: torch.dtype) -> tuple[list[Result], list[Result]]:
    """The exact results, and eager's in ``dtype``, from the float64 oracle and from an eager run in at most float32."""
    if t == 0.0:  # the target is the student, so everything is 0; the oracle's own rounding need not count
        exact = [{name: torch.zeros_like(value) for name, value in right.items()} for right in exact]
    if dtype != torch.float64:
        return exact, eager
    # Nothing here is more exact than float64: eager's error is float32's times the ratio of roundings, twice for the oracle's own.
    ratio = 4 * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    return exact, [
        {name: right[name] + ratio * (found[name].double() - right[name]) for name in right}
        for right, found in zip(exact, eager, strict=True)
    ]

"""Random calls of the public functions, well formed and then spoilt, and what has to come of each.

``draw(seed)`` makes a call. It is well formed; then it may be dressed in what must make no difference, or a known one (strides,
views, dtypes of labels, special values), and then spoilt: its ``bad`` says which arguments no longer mean anything. ``check``
runs it and holds it to two rules. What is bad is refused: by a ValueError or TypeError that is raised in the package and names one
of the arguments that are wrong. Anything else gives the right losses, metrics and gradients, within a bound on roundings; it warns
of nothing and changes no input. The right ones are those of oracle.py in float64. Where NaN or +inf come in, the row is NaN; -inf
bans.

``python -m tests.fuzz.check SEED`` repeats one case and prints it.
"""

from __future__ import annotations

import re
import sys
import traceback
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kdkernels as kd
from kdkernels import backends
from kdkernels.backends import native
from tests.fuzz.calls import LOSSES, Call, Wrong, get, normal, shown, takes, tensors
from tests.fuzz.draw import draw
from tests.fuzz.expect import ROUNDINGS, Expected, eps_of, expect
from tests.fuzz.small import hold, schedule

PACKAGE = str(Path(kd.__file__).parent)


def _bits(value: Tensor) -> Tensor:
    return value.detach().resolve_neg().reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8)


def inputs(call: Call) -> dict[str, Tensor]:
    found = {name: get(call, name) for name in tensors(call)}
    return {
        name: value
        for name, value in found.items()
        if value.device.type == "cpu" and value.layout == torch.strided and value.numel() and not value.is_complex()
    }


def run(call: Call) -> tuple[Any, list[Tensor]]:
    """What the function returns, and upstream gradients for its losses."""
    arguments = dict(call.arguments)
    if call.function == "LinearKDLoss":
        options = {name: arguments.pop(name) for name in list(arguments) if takes("linear_kd_loss", name)}
        made = kd.LinearKDLoss(**options)(**arguments)
    else:
        made = getattr(kd, call.function)(**arguments)
    values = list(made) if isinstance(made, tuple) else [made]
    losses = [value for value in values if isinstance(value, Tensor)]
    return values, [normal(call.rng, *loss.shape).to(loss.dtype) for loss in losses]


def check(call: Call) -> str:
    """Raises Wrong; returns "refused" or "right"."""
    if call.function not in LOSSES:
        return _check_small(call)
    before = {name: _bits(value).clone() for name, value in inputs(call).items()}
    with ExitStack() as stack:
        if call.mode == "no_grad":
            stack.enter_context(torch.no_grad())
        if call.mode == "inference":
            stack.enter_context(torch.inference_mode())
        if call.variant == "reference":
            stack.enter_context(backends.use("reference"))
        else:
            stack.enter_context(native.instruction_set(call.variant))
        try:
            values, upstream = run(call)
        except Exception as error:
            _refused(call, error)
            _unchanged(call, before)
            return "refused"
        if call.bad:
            raise Wrong("it was accepted")
        losses = [value for value in values if isinstance(value, Tensor)]
        leaves = [name for name in (*call.arguments, *_parts()) if _asks(call, name)] if call.mode == "grad" else []
        leaves = [name for name in leaves if name in _learners(call)]
        grads: tuple[Any, ...] = ()
        if leaves:
            total = sum(((loss * up).sum() for loss, up in zip(losses, upstream, strict=True)), torch.zeros(()))
            grads = torch.autograd.grad(total, [get(call, name) for name in leaves], allow_unused=True)
    with torch.enable_grad():
        expected = expect(call, upstream)
    _unchanged(call, before)
    _compare(call, expected, values, dict(zip(leaves, grads, strict=True)))
    return "right"


def _parts() -> tuple[str, ...]:
    return tuple(f"{model}_{part}" for model in ("student", "teacher") for part in ("weight", "bias"))


def _asks(call: Call, name: str) -> bool:
    value = get(call, name)
    return isinstance(value, Tensor) and value.requires_grad


def _learners(call: Call) -> tuple[str, ...]:
    student = ("student_logits", "student_hidden", "student_weight", "student_bias")
    return (*student, "teacher_hidden", "teacher_weight", "teacher_bias") if call.function == "linear_okd_loss" else student


def _refused(call: Call, error: Exception) -> None:
    where = traceback.extract_tb(error.__traceback__)[-1].filename
    if not call.bad:
        raise Wrong(f"it is well formed, but was refused: {type(error).__name__}: {error}") from error
    if type(error) not in (ValueError, TypeError):
        raise Wrong(f"refused by {type(error).__name__}, not by a ValueError or TypeError: {error}") from error
    if not where.startswith(PACKAGE):
        raise Wrong(f"refused in {where}, not by a check of the package: {error}") from error
    names = frozenset().union(*call.bad)
    if not any(re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", str(error)) for name in names):
        raise Wrong(f"the error names none of {', '.join(sorted(names))}: {error}") from error


def _unchanged(call: Call, before: dict[str, Tensor]) -> None:
    for name, value in inputs(call).items():
        if name in before and not torch.equal(_bits(value), before[name]):
            raise Wrong(f"{name} was modified")


def _differs(found: Tensor, right: Tensor, off: Tensor) -> Tensor:
    """Where a value is not the right one; what is not finite has to be the same."""
    same = (found == right) | (found.isnan() & right.isnan())
    return ~(same | ((found - right).abs() <= off.expand_as(right)))


def _compare(call: Call, expected: Expected, values: list[Any], grads: dict[str, Any]) -> None:
    metrics = values.pop() if isinstance(values[-1], dict) else {}
    if bool(metrics) != bool(call.arguments.get("return_metrics", False)):
        raise Wrong(f"metrics: {metrics}")
    for loss, right, off in zip(values, expected.losses, expected.off, strict=True):
        if loss.shape != right.shape:
            raise Wrong(f"loss of shape {tuple(loss.shape)}, not {tuple(right.shape)}")
        rounding = ROUNDINGS * eps_of(loss.dtype) * right.abs().nan_to_num(0.0, 0.0, 0.0) + torch.finfo(loss.dtype).tiny
        wrong = _differs(loss.detach().double(), right, off.nan_to_num(0.0) + rounding)
        if wrong.any() and not expected.unsaid:
            raise Wrong(f"losses {loss.detach()[wrong].tolist()}, not {right[wrong].tolist()} within {off[wrong].tolist()}")
    for name, grad in grads.items():
        if name not in expected.grads:
            continue
        right, off, unsaid = expected.grads[name]
        if grad is None or grad.shape != right.shape or grad.dtype != get(call, name).dtype:
            raise Wrong(f"gradient of {name} is {shown(grad)}; it has shape {tuple(right.shape)}")
        if expected.unsaid:
            continue
        wrong = _differs(grad.double(), right, off.nan_to_num(0.0)) & ~unsaid
        if wrong.any():
            some = [part.expand_as(right)[wrong][:5].tolist() for part in (grad, right, off)]
            raise Wrong(f"gradient of {name} is {some[0]}, not {some[1]} within {some[2]}")
        if unsaid.any() and not name.endswith("bias") and grad[unsaid].isfinite().all() and grad[unsaid].any():
            raise Wrong(f"gradient of {name} hides what is not a number")
    if metrics:
        if int(metrics["tokens"]) != expected.tokens:
            raise Wrong(f"tokens is {metrics['tokens']}, not {expected.tokens}")
        for name, (right_value, off_value) in expected.metrics.items():
            if not abs(float(metrics[name]) - right_value) <= off_value + 1e-6 and float(metrics[name]) != right_value:
                raise Wrong(f"metric {name} is {float(metrics[name])}, not {right_value} within {off_value}")


def _check_small(call: Call) -> str:
    try:
        function = schedule if call.function == "TAIDSchedule" else getattr(kd, call.function)
        found = function(**call.arguments)
    except Exception as error:
        _refused(call, error)
        return "refused"
    if call.bad:
        raise Wrong(f"it was accepted: {found}")
    hold(call, found)
    return "right"


def fails(seed: int) -> str | None:
    """What is wrong in the case of that seed, and how to repeat it; None if nothing is."""
    call = draw(seed)
    shown = call.show()  # before anything is modified
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check(call)
    except Exception as error:
        text = str(error) if isinstance(error, Wrong) else "".join(traceback.format_exception(error))
        return f"case {seed}: {text}\n{shown}\nrepeat it: python -m tests.fuzz.check {seed}"
    return None


if __name__ == "__main__":
    torch.set_num_threads(1)
    for argument in sys.argv[1:]:
        print(draw(int(argument)).show())
        print(fails(int(argument)) or "nothing is wrong")

"""What the library's launchers start on a GPU of an architecture, recorded without one: part of ``make static`` (static.py)."""

from __future__ import annotations

import contextlib
import importlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch

import kdkernels as kd
from kdkernels import backends
from kdkernels.backends.base import Model, Needs, Step, Terms
from kdkernels.divergences import resolve

# Kernels, by the file of kdkernels/backends/triton that each is in.
KERNELS = {
    **{"row_loss": "rows", "statistics": "vocabulary", "sums": "vocabulary", "gradient": "vocabulary"},
    **{"offsets_product": "offsets", "offsets_row": "offsets", "scale": "scaling"},
}
TOKENS, VOCAB, DIMS = 256, 4096, (512, 1024)
PLAIN = ", plain"
BARE = ", bare heads"
VALUE = ", value alone"
ODD = ", rows that start anywhere"  # as of a caller's logits, over an odd vocabulary: accesses are as narrow as an entry


@dataclass(frozen=True)
class Launch:
    """What a launcher started: the kernel and its arguments."""

    label: str
    kernel: Any
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    @property
    def name(self) -> str:
        """Such as "row_loss"."""
        return str(self.kernel.fn.__name__).removesuffix("_kernel")


def jit_function(name: str) -> Any:
    """A kernel, by its name in KERNELS."""
    return getattr(importlib.import_module(f"kdkernels.backends.triton.{KERNELS[name]}"), f"{name}_kernel")


class Recorder:
    """Stands for a kernel and keeps what it is started with."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches, self.label = kernel, launches, ""

    def __getitem__(self, _: Any) -> Callable[..., None]:
        return lambda *arguments, **keywords: self.launches.append(Launch(self.label, self.kernel, arguments, keywords))


@contextlib.contextmanager
def recorded(architecture: str) -> Iterator[tuple[list[Launch], Callable[[str], None]]]:
    """Launches for that architecture are kept instead of run; the second gives the following ones a label."""
    launches: list[Launch] = []
    recorders = {
        f"kdkernels.backends.triton.{module}.{name}_kernel": Recorder(jit_function(name), launches)
        for name, module in KERNELS.items()
    }

    def label(text: str) -> None:
        for recorder in recorders.values():
            recorder.label = text

    with contextlib.ExitStack() as stack:
        for name, recorder in recorders.items():
            stack.enter_context(mock.patch(name, recorder))
        for module in ("arch", "blocks"):
            stack.enter_context(mock.patch(f"kdkernels.backends.triton.{module}.architecture", return_value=architecture))
        yield launches, label


def _step(divergence: str, dtype: torch.dtype, metrics: bool, dress: str = "") -> Step:
    """dress: "" for everything that a loss can have, BARE without biases and softcaps, PLAIN without temperature and labels too."""
    softcap = 0.0 if dress else 30.0
    temperature, ce = (1.0, 0.0) if dress == PLAIN else (2.0, 0.5)

    def model(dim: int) -> Model:
        bias = None if dress else torch.empty(VOCAB)
        return Model(torch.empty(TOKENS, dim, dtype=dtype), torch.empty(VOCAB, dim, dtype=dtype), bias, dtype, torch.float32)

    return Step(
        student=model(DIMS[0]),
        teacher=model(DIMS[1]),
        labels=torch.zeros(TOKENS, dtype=torch.int64),
        weights=torch.ones(TOKENS),
        scale=torch.ones(()),
        t=torch.ones(()),
        terms=Terms(divergence, resolve(divergence).a, temperature, 1.0, ce, [0.5, softcap, 0.5, softcap]),
        rows=None,
        count=TOKENS,
        needs=Needs(True, True, True),
        metrics=metrics,
        alone=False,
        lift=None,
        backend=backends.triton.BACKEND,
        budget=2**30,
    )


def _dresses(architecture: str, dtype: torch.dtype) -> tuple[str, ...]:
    """What makes the launchers take other blocks, where the table has others."""
    from kdkernels.backends.triton.blocks import TABLE

    return ("", BARE, PLAIN) if TABLE[architecture, dtype.itemsize].roomy else ("",)


def _record_vocabulary(dtype: torch.dtype, dress: str, label: Callable[[str], None]) -> None:
    """The launches of the strategy ``vocab``."""
    from kdkernels.backends.columns import STATS_COLUMNS, SUMS_COLUMNS
    from kdkernels.backends.triton.vocabulary import LearnerSweeps

    def sweeps(step: Step) -> LearnerSweeps:
        tile = torch.empty(TOKENS, VOCAB, dtype=dtype)
        return LearnerSweeps(step, (step.student.hidden, step.teacher.hidden), tile, torch.empty(0))

    stats, sums = torch.zeros(TOKENS, len(STATS_COLUMNS)), torch.zeros(TOKENS, len(SUMS_COLUMNS))
    for name, metrics in itertools.product(kd.divergences(), (False, True)):
        label(name + (", metrics" if metrics else "") + dress)
        step = _step(name, dtype, metrics, dress)
        if metrics or not step.terms.resolved().one_sweep:
            sweeps(step).sums(stats)
        if not metrics:
            list(sweeps(step).gradients(stats, sums))
    # The statistics know of a divergence only whose exponentials they weigh.
    for weigh, metrics in (("", False), ("target", False), ("student", False), ("", True)):
        label((f"weighed by the {weigh}" if weigh else "metrics" if metrics else "two sweeps") + dress)
        sweeps(_step("jsd", dtype, metrics, dress)).statistics(weigh, dress != PLAIN)


def _record_offsets(dtype: torch.dtype, dress: str, found: list[Launch], label: Callable[[str], None]) -> None:
    """The launches of whole rows that are kept in 16 bits: the products, and the rows of every divergence."""
    from kdkernels.backends.triton.offsets import OffsetRows

    steps = {name: _step(name, dtype, False, dress) for name in kd.divergences()}
    one, codes, weights = next(iter(steps.values())), torch.empty(2, TOKENS, VOCAB, dtype=torch.float16), torch.ones(TOKENS)
    labels = None if dress == PLAIN else one.labels
    rows = OffsetRows((one,), (one.student.hidden, one.teacher.hidden), codes.unbind(), labels)
    found[-3:] = [
        replace(launch, label=f"of {side}{dress}")
        for launch, side in zip(found[-3:], ("the student", "the teacher", "both"), strict=True)
    ]
    OffsetRows((one, one), (one.student.hidden, one.teacher.hidden), codes.unbind(), labels)
    found[-3:] = [replace(found[-2], label=f"of a teacher that learns{dress}")]
    OffsetRows((replace(one, metrics=True),), (one.student.hidden, one.teacher.hidden), codes.unbind(), labels)
    found[-2:] = [replace(found[-1], label=f"of the teacher, metrics{dress}")]
    for name, step in steps.items():
        for metrics in (False,) if dress else (False, True):
            rows.steps = (replace(step, metrics=metrics),)
            label(name + (", metrics" if metrics else "") + dress)
            rows.row_loss(0, weights, codes[0].view(dtype))
        rows.steps = (step,)
        if dress == PLAIN:
            label(name + VALUE)
            rows.row_loss(0, weights, None)


def launches(architecture: str, dtype: torch.dtype) -> list[Launch]:
    """Every kernel with every divergence, with and without metrics where that matters to it."""
    from kdkernels.backends.triton import rows, scaling
    from kdkernels.backends.triton.blocks import TABLE

    row_loss: Callable[..., Any] = rows.row_loss
    with recorded(architecture) as (found, label):
        label("any loss")
        scaling.scale_(torch.empty(VOCAB, DIMS[0], dtype=dtype), torch.ones(()))
        for name in kd.divergences():
            for metrics in (False, True):
                label(name + (", metrics" if metrics else ""))
                step = _step(name, dtype, metrics)
                x, z = torch.empty(2, TOKENS, VOCAB, dtype=dtype)
                row_loss(
                    *(x, z, step.student.bias, step.teacher.bias, step.labels, step.weights, step.t),
                    *(*step.terms.loss, step.terms.head, True, metrics),
                )
                if not metrics:
                    single = torch.empty(2, TOKENS, VOCAB)
                    plain = (*single, None, None, None, step.weights, step.t, name, step.terms.a, 1.0, 1.0, 0.0, [1.0, 0.0] * 2)
                    label(name + PLAIN)
                    row_loss(*plain, True, False, x)
                    label(name + VALUE)
                    row_loss(*plain, False, False)
                    label(name + ODD)
                    odd = [torch.empty(TOKENS, VOCAB + 1, dtype=dtype) for _ in range(2)]
                    row_loss(*odd, *plain[2:], True, False, torch.empty_like(odd[0]))
                    label(name)
        for dress in _dresses(architecture, dtype):
            _record_vocabulary(dtype, dress, label)
            if TABLE[architecture, dtype.itemsize].offsets:
                _record_offsets(dtype, dress, found, label)
    return found

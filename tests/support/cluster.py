"""The cluster row kernel on a CPU: the library's own launcher starts rows.cu there, on the cluster of cluster_machine.cpp."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from kdkernels.backends.columns import Row
from kdkernels.backends.cuda import rows
from kdkernels.divergences import resolve
from tests.support import cxx, oracle
from tests.support.cases import Result
from tests.support.oracle import Options

OPTIONS = ("-std=c++17", "-O1")
ENTRY = """
extern "C" const char* start(const kd::Arguments* of, unsigned grid, unsigned threads, unsigned slices, unsigned seed,
                             bool checked) {
  return machine::run({grid, KD_CLUSTER, threads, slices}, [of] { row_loss(*of); }, seed, checked);
}
"""


@dataclass(frozen=True)
class Machine:
    """clusters: that run at the same time, so that each takes every so many-th row. seed: of the order in which things happen.
    checked: whether accesses to shared memory are held to the barriers that order them. options: the compiler's, besides."""

    clusters: int = 1
    seed: int = 0
    checked: bool = False
    options: tuple[str, ...] = ()


@functools.cache
def _machine() -> str:
    made = str(cxx.folder() / "machine.o")
    cxx.compile(*OPTIONS, "-c", str(cxx.HERE / "cluster_machine.cpp"), "-o", made)
    return made


@functools.cache
def _library(text: str, options: tuple[str, ...]) -> ctypes.CDLL:
    folder = cxx.folder()
    source, compiled, made = (str(folder / name) for name in ("rows.cpp", "rows.o", "rows.so"))
    Path(source).write_text(text)
    cxx.compile(*OPTIONS, "-c", source, "-o", compiled, *options)
    cxx.compile("-shared", compiled, _machine(), "-o", made)
    library = ctypes.CDLL(made)
    library.start.restype = ctypes.c_char_p
    return library


class Kernel:
    """Stands for a compiled kernel."""

    def __init__(self, text: str, on: Machine) -> None:
        folder = Path(rows.__file__).parent
        part = (folder / "machine.cuh").read_text()
        assert part in text
        here = '}  // namespace kd\n#include "cluster_machine.h"\nnamespace kd {\n'
        options = (*on.options, *(("-fsanitize=thread",) if on.checked else ()))
        self.on, self.start = on, _library(text.replace(part, here) + ENTRY, options).start

    def launch(self, grid: int, threads: int, shared: int, stream: int, arguments: Sequence[Any]) -> None:
        (given,) = arguments
        wrong = self.start(ctypes.byref(given), grid, threads, shared, self.on.seed, self.on.checked)
        assert not wrong, wrong.decode()


@contextlib.contextmanager
def cut(cluster: int, warps: int, on: Machine | None = None) -> Iterator[None]:
    """Inside, the launcher starts clusters of so many blocks on this machine."""
    on = on or Machine()

    def kernel(divergence: str, macros: rows.Macros, shape: rows.Shape, device: torch.device) -> Any:
        return Kernel(rows.source(divergence, macros, shape), on), on.clusters

    with (
        mock.patch.object(rows, "why_not", return_value=""),
        mock.patch.object(rows, "_kernel", kernel),
        mock.patch.object(rows, "_shapes", lambda vocab, device: (rows.cut(vocab, cluster, warps, 1),)),
        mock.patch.object(rows, "is_worth_it", return_value=True),
        mock.patch.object(rows, "_multiprocessors"),
        mock.patch.object(torch.cuda, "device", return_value=contextlib.nullcontext()),
        mock.patch.object(torch.cuda, "current_stream", return_value=mock.Mock(cuda_stream=0)),
    ):
        yield


@dataclass(frozen=True)
class Problem:
    """Logits as a product leaves them, and what is done to them. heads: scale and softcap of student and teacher."""

    x: Tensor
    z: Tensor
    options: Options
    biases: tuple[Tensor | None, Tensor | None] = (None, None)
    heads: tuple[float, float, float, float] = (1.0, 0.0, 1.0, 0.0)
    labels: Tensor | None = None
    weight: Tensor | None = None

    def ban(self, model: str) -> None:
        """Takes tokens of five rows from the student, the teacher or both ("apart": from the student, and the sixth row's from the
        teacher): every seventh, a chunk, either of two blocks that meet at 640, and all but one."""
        bans = torch.zeros(self.x.shape, dtype=torch.bool)
        bans[0, ::7] = bans[1, :512] = bans[2, 640:] = bans[3, :640] = bans[4] = True
        bans[4, 700] = False
        if model != "teacher":
            self.x[bans] = -torch.inf
        if model in ("teacher", "both"):
            self.z[bans] = -torch.inf
        if model == "apart":
            self.z[5, :640] = -torch.inf

    def plain(self, dtype: torch.dtype, metrics: bool = False) -> Result:
        """The formulas with autograd. metrics: with those, of each row, besides."""

        def after(v: Tensor, bias: Tensor | None, scale: float, softcap: float) -> Tensor:
            v = (v if bias is None else v + bias.to(dtype)) * scale
            return softcap * torch.tanh(v / softcap) if softcap else v

        def logits(x: Tensor) -> tuple[Tensor, Tensor]:
            return after(x, self.biases[0], *self.heads[:2]), after(self.z.to(dtype), self.biases[1], *self.heads[2:])

        found = oracle.with_gradients(logits, {"x": self.x}, dtype, self.labels, self.weight, self.options)
        result = {"losses": found["losses"], "x": found["x"]}
        if metrics:
            x, z = logits(self.x.to(dtype))
            of_rows = [
                oracle.metrics(
                    x[row], z[row], *(None if of is None else of[row] for of in (self.labels, self.weight)), self.options
                )
                for row in torch.arange(len(x)).split(1)
            ]
            result |= {name: torch.stack([of_row[name] for of_row in of_rows]) for name in of_rows[0] if name != "tokens"}
        return result

    def run(self, grad: bool = True, metrics: bool = False) -> Result:
        """The kernel's losses and gradient, and metrics."""
        (x, z), options = map(with_room, (self.x, self.z)), self.options
        kd_scale = options.kd_weight * options.temperature**2
        weight = torch.ones(len(x)) if self.weight is None else self.weight
        dx = with_room(torch.full_like(self.x, torch.nan)) if grad else None
        pair = resolve(options.divergence)
        columns = rows.row_loss(
            *(x, z, *self.biases, self.labels, weight, torch.tensor(options.t), options.divergence, pair.a, options.temperature),
            *(kd_scale, options.ce_weight, list(self.heads), dx, metrics),
        )
        assert columns is not None
        of = Row(*columns.unbind(1))._asdict()
        found = {"losses": weight * (kd_scale * of["kd"] + options.ce_weight * of["ce"])}
        if dx is not None:
            found["x"] = dx
        if metrics:
            found |= {name: column for name, column in of.items() if name != "ce" or self.labels is not None}
        return found


def with_room(values: Tensor) -> Tensor:
    """The same in rows that start at multiples of 64 entries; what lies behind each must not matter."""
    count, vocab = values.shape
    room = torch.full((count, -(-vocab // 64) * 64), torch.nan)
    room[:, :vocab] = values
    return room[:, :vocab]


def problem(
    name: str, seed: int, vocab: int, spread: float, *,
    t: float = 1.0, temperature: float = 1.0, dressed: bool = False, count: int = 6,
) -> Problem:  # fmt: skip
    """Random logits of ``count`` rows; dressed: all that a loss can have besides, the third row without weight."""
    generator = torch.Generator().manual_seed(seed)
    x, z = torch.randn(2, count, vocab, generator=generator) * spread
    if not dressed:
        return Problem(x, z, Options(name, t=t, temperature=temperature, normalizer=1.0))
    weight = torch.rand(count, generator=generator) + 0.5
    weight[2] = 0.0
    biases = torch.randn(2, vocab, generator=generator).unbind()
    labels = torch.randint(0, vocab, (count,), generator=generator)
    options = Options(name, t=t, temperature=temperature, kd_weight=0.75, ce_weight=0.5, normalizer=1.0)
    return Problem(x, z, options, biases, (0.75, 20.0, 1.25, 30.0), labels, weight)

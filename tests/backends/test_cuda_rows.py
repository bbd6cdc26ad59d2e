"""The arithmetic of the cluster row kernel (math.cuh), compiled for a CPU in the kernel's order, is as good as eager PyTorch.

The launcher is the library's own; what it would start on a GPU runs here as tests/support/cluster_rows.cpp, with exact exponentials
and quotients for the hardware's quick ones.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import kdkernels as kd
from kdkernels.backends.cuda import rows
from kdkernels.divergences import resolve
from tests.support import ROOT, oracle
from tests.support.cases import Result, assert_as_good_as_eager, ratios
from tests.support.oracle import Options

INF, NAN = torch.inf, torch.nan
CXX = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
DRIVER = ROOT / "tests" / "support" / "cluster_rows.cpp"
INCLUDES = "#include <algorithm>\n#include <vector>\n"  # the rest is in a namespace
pytestmark = pytest.mark.skipif(CXX is None, reason="no C++ compiler here")

every_divergence = pytest.mark.parametrize("name", kd.divergences())


@functools.cache
def library(text: str) -> ctypes.CDLL:
    assert CXX is not None
    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder, "rows.cpp"), Path(folder, "rows.so")
        source.write_text(text)
        options = ("-std=c++17", "-O1", "-fPIC", "-shared", "-Wno-unknown-pragmas")
        done = subprocess.run(
            [*shlex.split(CXX), *options, str(source), "-o", str(made)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return ctypes.CDLL(str(made))


class OnThisMachine:
    """Stands for a compiled kernel."""

    def __init__(self, text: str) -> None:
        self.run = library(text).row_loss

    def launch(self, grid: int, threads: int, shared: int, stream: int, arguments: Sequence[Any]) -> None:
        assert len(arguments) == 1
        self.run(ctypes.byref(arguments[0]))


@pytest.fixture(autouse=True)
def on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(divergence: str, macros: rows.Macros, shape: rows.Shape, device: torch.device) -> Any:
        text = rows.source(divergence, macros, shape)
        kernel_source = (Path(rows.__file__).parent / "rows.cu").read_text()
        assert text.endswith(kernel_source)
        return OnThisMachine(INCLUDES + text.removesuffix(kernel_source) + DRIVER.read_text()), 1

    monkeypatch.setattr(rows, "why_not", lambda device: "")
    monkeypatch.setattr(rows, "_kernel", kernel)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: mock.Mock(cuda_stream=0))


@contextlib.contextmanager
def cut(cluster: int, warps: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "_shape", lambda vocab, device: rows.cut(vocab, cluster, warps, 1))
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

    def plain(self, dtype: torch.dtype) -> Result:
        """The formulas with autograd."""

        def after(v: Tensor, bias: Tensor | None, scale: float, softcap: float) -> Tensor:
            v = (v if bias is None else v + bias.to(dtype)) * scale
            return softcap * torch.tanh(v / softcap) if softcap else v

        def logits(x: Tensor) -> tuple[Tensor, Tensor]:
            return after(x, self.biases[0], *self.heads[:2]), after(self.z.to(dtype), self.biases[1], *self.heads[2:])

        found = oracle.with_gradients(logits, {"x": self.x}, dtype, self.labels, self.weight, self.options)
        return {"losses": found["losses"], "x": found["x"]}

    def run(self, grad: bool = True) -> Result:
        """The kernel's losses and gradient."""
        (x, z), options = map(with_room, (self.x, self.z)), self.options
        kd_scale = options.kd_weight * options.temperature**2
        weight = torch.ones(len(x)) if self.weight is None else self.weight
        dx = with_room(torch.full_like(self.x, NAN)) if grad else None
        pair = resolve(options.divergence)
        columns = rows.row_loss(
            *(x, z, *self.biases, self.labels, weight, torch.tensor(options.t), options.divergence, pair.a, options.temperature),
            *(kd_scale, options.ce_weight, list(self.heads), dx, False),
        )
        assert columns is not None
        losses = weight * (kd_scale * columns[:, 0] + options.ce_weight * columns[:, 1])
        return {"losses": losses} if dx is None else {"losses": losses, "x": dx}


def with_room(values: Tensor) -> Tensor:
    """The same in rows that start at multiples of 64 entries; what lies behind each must not matter."""
    count, vocab = values.shape
    room = torch.full((count, -(-vocab // 64) * 64), NAN)
    room[:, :vocab] = values
    return room[:, :vocab]


def problem(
    name: str, seed: int, vocab: int, spread: float, *, t: float = 1.0, temperature: float = 1.0, dressed: bool = False
) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    count = 6
    x, z = torch.randn(2, count, vocab, generator=generator) * spread
    if not dressed:
        return Problem(x, z, Options(name, t=t, temperature=temperature, normalizer=1.0))
    weight = torch.rand(count, generator=generator) + 0.5
    weight[2] = 0.0
    biases = torch.randn(2, vocab, generator=generator).unbind()
    labels = torch.randint(0, vocab, (count,), generator=generator)
    options = Options(name, t=t, temperature=temperature, kd_weight=0.75, ce_weight=0.5, normalizer=1.0)
    return Problem(x, z, options, biases, (0.75, 20.0, 1.25, 30.0), labels, weight)


def compared(problems: Sequence[Problem]) -> dict[str, float]:
    found, eager, exact = [], [], []
    for one in problems:
        found.append(one.run())
        eager.append(one.plain(torch.float32))
        exact.append(one.plain(torch.float64))
    return ratios(found, eager, exact)


@every_divergence
@pytest.mark.parametrize("dressed", [False, True], ids=["plain", "dressed"])
class TestWholeRows:
    # blocks with a chunk and a part of one, the last one shorter; blocks without a column; one thread's entries
    SIZES = ((1213, 2, 2), (100, 4, 1), (3, 1, 1))

    def test_as_good_as_eager(self, name: str, dressed: bool) -> None:
        found = {}
        temperature = 2.0 if dressed else 1.0
        for vocab, cluster, warps in self.SIZES if dressed or name in ("jsd", "forward_kl") else self.SIZES[:1]:
            with cut(cluster, warps):
                for t in (1.0, 0.4):
                    for spread in (1.0, 10.0, 30.0):
                        problems = [
                            problem(name, seed, vocab, spread, t=t, temperature=temperature, dressed=dressed)
                            for seed in range(2 if vocab > 1000 else 6)
                        ]
                        found[(vocab, t, spread)] = compared(problems)
        assert_as_good_as_eager(found)

    def test_two_runs_agree_bit_for_bit(self, name: str, dressed: bool) -> None:
        one = problem(name, 0, 1213, 3.0, dressed=dressed, temperature=2.0 if dressed else 1.0)
        with cut(2, 2):
            first, second = one.run(), one.run()
        for part in first:
            assert torch.equal(first[part], second[part])

    def test_a_loss_without_a_gradient_is_the_same(self, name: str, dressed: bool) -> None:
        one = problem(name, 0, 1213, 3.0, dressed=dressed, temperature=2.0 if dressed else 1.0)
        with cut(2, 2):
            assert torch.equal(one.run()["losses"], one.run(grad=False)["losses"])


@every_divergence
class TestNearAndFlat:
    @pytest.mark.parametrize("temperature", [1.0, 100.0])
    def test_a_student_close_to_its_teacher(self, name: str, temperature: float) -> None:
        found = {}
        with cut(2, 2):
            for spread in (1.0, 10.0):
                problems = [problem(name, seed, 1213, spread, temperature=temperature) for seed in range(3)]
                noise = [
                    torch.randn(one.x.shape, generator=torch.Generator().manual_seed(seed)) for seed, one in enumerate(problems)
                ]
                near = [replace(one, z=one.x + 0.01 * spread * by) for one, by in zip(problems, noise, strict=True)]
                found[spread] = compared(near)
        assert_as_good_as_eager(found)


@every_divergence
class TestSpecialValues:
    VOCAB = 1213  # the second of two blocks begins at 640

    @pytest.mark.parametrize("model", ["student", "teacher", "both", "apart"])
    def test_banned_tokens_add_nothing(self, name: str, model: str) -> None:
        """Single ones, all of a chunk, all of a block, and all but one."""
        found = {}
        for t in (1.0, 0.4):
            problems = []
            for seed in range(3):
                one = problem(name, seed, self.VOCAB, 3.0, t=t)
                bans = torch.zeros(one.x.shape, dtype=torch.bool)
                bans[0, ::7] = bans[1, :512] = bans[2, 640:] = bans[3, :640] = bans[4] = True
                bans[4, 700] = False
                if model != "teacher":
                    one.x[bans] = -INF
                if model in ("teacher", "both"):
                    one.z[bans] = -INF
                if model == "apart":
                    one.z[5, :640] = -INF
                problems.append(one)
            with cut(2, 2):
                found[t] = compared(problems)
        assert_as_good_as_eager(found)

    def test_a_student_that_masks_by_the_least_number_has_its_gradient(self, name: str) -> None:
        x = problem(name, 4, 1003, 3.0).x
        x[:, 700:] = torch.finfo(torch.float32).min
        one = replace(problem(name, 4, 1003, 3.0), x=x)
        with cut(4, 2):
            found = one.run()["x"]
        torch.testing.assert_close(found.double(), one.plain(torch.float64)["x"], rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("value", [NAN, INF])
    @pytest.mark.parametrize("model", ["student", "teacher"])
    def test_a_bad_entry_makes_its_row_nan_and_no_other(self, name: str, model: str, value: float) -> None:
        places = (0, 3, 511, 640, self.VOCAB - 1)
        clean = problem(name, 0, self.VOCAB, 3.0)
        with cut(2, 2):
            right = clean.run()
            for t in (1.0, 0.4):
                one = problem(name, 0, self.VOCAB, 3.0, t=t)
                for row, place in enumerate(places):
                    (one.x if model == "student" else one.z)[row, place] = value
                found = one.run()
                assert found["losses"][:5].isnan().all()
                assert found["x"][:5].isnan().all()
                if t == 1.0:
                    for part in right:
                        assert torch.equal(found[part][5:], right[part][5:])

    def test_rows_of_weight_zero_are_not_computed(self, name: str) -> None:
        weight = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 1.0])
        one = replace(problem(name, 0, self.VOCAB, 3.0), weight=weight)
        one.x[weight == 0], one.z[weight == 0] = NAN, INF
        with cut(2, 2):
            found = one.run()
        assert not found["losses"][weight == 0].any()
        assert not found["x"][weight == 0].any()
        assert found["x"].isfinite().all()

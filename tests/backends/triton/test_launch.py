"""How kernels are started: on which GPU, as what architecture, and compiled once for all token counts and temperatures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import kdkernels as kd
from kdkernels.backends.operators import STATS_COLUMNS
from kdkernels.divergences import FLAT
from tests.support import ROOT
from tests.support.kernels import CPU, GPU, TOKENS, large, step_of, sweeps_of

pytest.importorskip("triton", reason="Triton is not installed")
from kdkernels.backends.triton import device, launch, rows, vocabulary

# Keys of what would be compiled for sm_90, in a process without the interpreter. Nothing is launched.
SPECIALISATIONS = """
import dataclasses, json, sys
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
from benchmarks import static
from kdkernels.backends.triton import vocabulary

backend = make_backend(GPUTarget("cuda", 90, 32))
make_step = static._step
known = {}

make_sweeps = vocabulary.LearnerSweeps

def keys(tokens, a, temperature, width=static.VOCAB, architecture="sm_90"):
    # a block of columns begins at a multiple of 16 and may end anywhere
    vocabulary.LearnerSweeps = lambda step, hidden, tile, buffer: make_sweeps(step, hidden, tile[:, :width], buffer)
    def step(name, dtype, metrics):
        made = make_step(name, dtype, metrics)
        terms = dataclasses.replace(made.terms, a=a, temperature=temperature, kd_scale=temperature**2)
        return dataclasses.replace(made, terms=terms, t=torch.tensor(a))
    static._step, static.TOKENS = step, tokens
    found = set()
    for launched in static.launches(architecture, torch.bfloat16):
        kernel = launched.kernel
        binder = create_function_from_signature(kernel.signature, kernel.params, backend)
        _, specialization, options = binder(*launched.arguments, **launched.keywords)
        pair = launched.keywords.get("PAIR")
        name = [kernel.fn.__name__, getattr(pair, "__name__", "")]
        constants = {key: str(value) for key, value in launched.keywords.items() if key != "PAIR"}
        rest = [part for part in specialization if not (part[0] == "constexpr")]
        found.add(json.dumps([name, constants, str(rest)], sort_keys=True))
    return found

first = keys(256, 0.3, 2.0)
others = (257, 0.3, 2.0), (1, 0.3, 2.0), (16, 0.7, 3.5), (1000, 0.0, 16.0), (256, 0.3, 2.0, 1008)
print(json.dumps([len(first), *(sorted(keys(*other) ^ first) for other in others)]))
"""


def test_token_counts_blocks_t_and_temperatures_do_not_compile_again() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SPECIALISATIONS)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    count, *differences = json.loads(done.stdout)
    assert count > 3 * len(kd.divergences())
    assert differences == [[]] * len(differences)


class TestLaunch:
    @pytest.fixture
    def on(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
        def set_up(capability: tuple[int, int] = (9, 0), hip: str | None = None) -> None:
            launch.architecture.cache_clear()
            monkeypatch.setattr(torch.version, "hip", None if hip is None else "7.0")
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
            monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(gcnArchName=hip))

        yield set_up
        launch.architecture.cache_clear()

    @pytest.mark.parametrize(
        ("capability", "hip", "name", "described"),
        [
            ((8, 0), None, "sm_80", False),
            ((8, 9), None, "sm_89", False),
            ((9, 0), None, "sm_90", True),
            ((10, 0), None, "sm_100", True),
            ((12, 0), None, "sm_120", True),
            ((9, 4), "gfx942:sramecc+:xnack-", "gfx942", False),
            ((9, 5), "gfx950", "gfx950", False),
        ],
    )
    def test_what_a_device_is_and_can(
        self, capability: Any, hip: str | None, name: str, described: bool, on: Callable[..., None]
    ) -> None:
        on(capability, hip)
        assert launch.architecture(GPU) == name
        assert launch.described(GPU) is described
        assert launch.warp(GPU) == (64 if hip else 32)

    def test_kernels_start_on_the_gpu_of_their_arguments(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Triton takes the current device, which in a process of several GPUs may be another one."""
        entered: list[torch.device] = []

        @contextmanager
        def guard(device: torch.device) -> Iterator[None]:
            entered.append(device)
            yield
            entered.append(torch.device("cpu"))

        class Kernel:
            fn = SimpleNamespace(__name__="sums_kernel")

            def __getitem__(self, _: Any) -> Callable[..., None]:
                return lambda *_, **__: started.append(entered[-1])

        started: list[torch.device] = []
        monkeypatch.setattr(torch.cuda, "device", guard)
        second = torch.device("cuda", 1)
        with launch.on(CPU):
            assert entered == []
        monkeypatch.setattr(rows.launch, "on", lambda _: guard(second))
        monkeypatch.setattr(rows, "row_loss_kernel", Kernel())
        case = large("jsd")
        rows.row_loss(*torch.randn(2, 3, 16).unbind(), *(None,) * 3, torch.ones(3), torch.ones(()), "jsd", 0.5, 1.0, 1.0, 0.0,
                      [1.0, 0.0, 1.0, 0.0], True, False)  # fmt: skip
        sweeps = sweeps_of(step_of(case, "jsd"))
        monkeypatch.setattr(vocabulary, "sums_kernel", Kernel())
        sweeps.sums(torch.zeros(TOKENS, len(STATS_COLUMNS)))
        assert started == [second, second]

    def test_the_interpreter_stands_for_sm_90(self) -> None:
        assert launch.architecture(CPU) == "sm_90"
        assert launch.interpreting()

    def test_what_is_absent_is_none(self) -> None:
        assert launch.head_arguments(None, 0.5, 0.0) == (None, 0.5, None)
        divergence = kd.jsd(0.25)
        assert launch.term_arguments(divergence, 1.0, 2.0, 0.0) == ((0.25, 0.75, 0.0), None, 2.0, None)
        assert launch.term_arguments(divergence, 4.0, 2.0, 0.5) == ((0.25, 0.75, 0.0), 4.0, 0.5, 0.5)
        assert launch.term_arguments(divergence, 4.0, 0.0, 0.5)[2] is None
        assert launch.term_arguments(divergence, FLAT, 1.0, 0.5)[0] == (0.25, 0.75, 1.0)

    def test_moments_are_told_apart(self) -> None:
        named = {"": device.NOTHING, "target": device.TARGET, "student": device.STUDENT}
        assert {weigh: constant.value for weigh, constant in named.items()} == device.WEIGH
        assert len(set(device.WEIGH.values())) == 3

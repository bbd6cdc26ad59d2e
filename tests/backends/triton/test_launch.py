"""How kernels are started: on which GPU and as what architecture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import kdkernels as kd
from kdkernels.backends.columns import STATS_COLUMNS, WEIGH
from kdkernels.divergences import FLAT
from tests.support.kernels import CPU, GPU, TOKENS, large, step_of, sweeps_of

pytest.importorskip("triton", reason="Triton is not installed")
from kdkernels.backends.triton import arch, device, launch, rows, vocabulary


class TestLaunch:
    @pytest.fixture
    def on(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
        def set_up(capability: tuple[int, int] = (9, 0), hip: str | None = None) -> None:
            arch.architecture.cache_clear()
            monkeypatch.setattr(torch.version, "hip", None if hip is None else "7.0")
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
            monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(gcnArchName=hip))

        yield set_up
        arch.architecture.cache_clear()

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
        assert arch.architecture(GPU) == name
        assert arch.described(GPU) is described
        assert arch.warp(GPU) == (64 if hip else 32)

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
        with arch.on(CPU):
            assert entered == []
        monkeypatch.setattr(arch, "on", lambda _: guard(second))
        monkeypatch.setattr(rows, "row_loss_kernel", Kernel())
        case = large("jsd")
        rows.row_loss(*torch.randn(2, 3, 16).unbind(), *(None,) * 3, torch.ones(3), torch.ones(()), "jsd", 0.5, 1.0, 1.0, 0.0,
                      [1.0, 0.0, 1.0, 0.0], True, False)  # fmt: skip
        sweeps = sweeps_of(step_of(case, "jsd"))
        monkeypatch.setattr(vocabulary, "sums_kernel", Kernel())
        sweeps.sums(torch.zeros(TOKENS, len(STATS_COLUMNS)))
        assert started == [second, second]

    def test_the_interpreter_stands_for_sm_90(self) -> None:
        assert arch.architecture(CPU) == "sm_90"
        assert arch.interpreting()

    def test_what_is_absent_is_none(self) -> None:
        assert launch.head_arguments(None, 0.5, 0.0) == (None, 0.5, None)
        divergence = kd.jsd(0.25)
        assert launch.term_arguments(divergence, 1.0, 2.0, 0.0) == ((0.25, 0.75, 0.0), None, 2.0, None)
        assert launch.term_arguments(divergence, 4.0, 2.0, 0.5) == ((0.25, 0.75, 0.0), 4.0, 0.5, 0.5)
        assert launch.term_arguments(divergence, 4.0, 0.0, 0.5)[2] is None
        assert launch.term_arguments(divergence, FLAT, 1.0, 0.5)[0] == (0.25, 0.75, 1.0)

    def test_moments_are_told_apart(self) -> None:
        named = {"": device.NOTHING, "target": device.TARGET, "student": device.STUDENT}
        assert {weigh: constant.value for weigh, constant in named.items()} == WEIGH
        assert len({*WEIGH.values(), device.LOST.value}) == 4

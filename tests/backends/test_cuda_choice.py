"""Which cut of the cluster row kernel is started, and what becomes of an error: a kernel that cannot run is given up, alone."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch

from kdkernels.backends.cuda import rows
from kdkernels.backends.cuda.compile import CompileError, DriverError
from kdkernels.backends.cuda.rows import cut, is_worth_it, shapes_of

KIB = 1024
HOPPER = 227 * KIB, 228 * KIB  # shared memory of a block at most, and of one of its 132 multiprocessors
MULTIPROCESSORS = 132
VOCAB = 4096
INVALID_VALUE, ILLEGAL_ADDRESS, OUT_OF_RESOURCES, LAUNCH_FAILED = 1, 700, 701, 719


class Device:
    """Stands for a compiler and a driver: kernels raise what ``errors`` has for their clusters; ``started`` has the others'."""

    def __init__(self) -> None:
        self.errors: dict[tuple[str, int], Exception] = {}
        self.clusters: dict[int, int] = {}
        self.asked: list[tuple[str, int]] = []
        self.macros: list[dict[str, int | str]] = []
        self.started: list[tuple[str, int]] = []

    def kernel(self, divergence: str, macros: rows.Macros, shape: rows.Shape, device: torch.device) -> tuple[Any, int]:
        of = divergence, shape.cluster
        self.asked.append(of)
        self.macros.append(dict(macros))
        if isinstance(self.errors.get(of), CompileError | OSError):
            raise self.errors[of]

        def launch(*_: Any) -> None:
            if of in self.errors:
                raise self.errors[of]
            self.started.append(of)

        return mock.Mock(launch=launch), self.clusters.get(shape.cluster, MULTIPROCESSORS // shape.cluster)

    def run(self, divergence: str, metrics: bool = False) -> bool:
        """Whether it is done."""
        x, z = torch.zeros(2, 3, VOCAB)
        options = (None, None, None, torch.ones(3), torch.ones(()), divergence, 0.5, 1.0, 1.0, 0.0, [1.0, 0.0, 1.0, 0.0], x)
        return rows.row_loss(x, z, *options, metrics) is not None


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """With a row of 4096 logits in clusters of 2 or, if those cannot be, of 4."""
    made = Device()
    monkeypatch.setattr(rows, "_given_up", set())
    monkeypatch.setattr(rows, "_kernel", made.kernel)
    monkeypatch.setattr(rows, "_multiprocessors", lambda _: MULTIPROCESSORS)
    monkeypatch.setattr(rows, "_shapes", lambda vocab, _: (cut(vocab, 2, 8, 3), cut(vocab, 4, 16, 1)))
    monkeypatch.setattr(rows, "why_not", lambda _: "")
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: mock.Mock(cuda_stream=0))
    rows._say_slow.cache_clear()
    yield made
    rows._say_slow.cache_clear()


@pytest.mark.parametrize(
    "error",
    [CompileError("wrong"), OSError("no NVRTC"), *(DriverError("refused", code) for code in (INVALID_VALUE, OUT_OF_RESOURCES))],
    ids=repr,
)
def test_what_cannot_run_is_given_up_and_nothing_else(error: Exception, device: Device, caplog: pytest.LogCaptureFixture) -> None:
    device.errors["jsd", 2] = error
    assert device.run("jsd")
    assert device.run("jsd")
    assert device.run("forward_kl")
    assert device.started == [("jsd", 4), ("jsd", 4), ("forward_kl", 2)]
    assert device.asked.count(("jsd", 2)) == 1
    (said,) = caplog.messages
    assert str(error) in said

    device.errors["jsd", 4] = error
    assert not device.run("jsd"), "Triton's does it"
    assert device.run("forward_kl")


@pytest.mark.parametrize("code", [ILLEGAL_ADDRESS, LAUNCH_FAILED, 999])
def test_an_error_that_leaves_the_device_dead_is_raised(code: int, device: Device) -> None:
    device.errors["jsd", 2] = DriverError("cuLaunchKernel: CUDA_ERROR", code)
    for _ in range(2):
        with pytest.raises(DriverError, match="CUDA_ERROR"):
            device.run("jsd")


def test_too_few_clusters_at_a_time_are_left_for_others(device: Device, caplog: pytest.LogCaptureFixture) -> None:
    device.clusters[2] = 0
    caplog.set_level(logging.INFO)
    assert device.run("jsd")
    assert device.run("jsd")
    assert device.started == [("jsd", 4), ("jsd", 4)]
    device.clusters[4] = 0
    assert not device.run("jsd")
    assert [message for message in caplog.messages if "0 clusters of 2 blocks" in message] == caplog.messages[:1]


@pytest.mark.parametrize("name", ["forward_kl", "jsd"])
def test_metrics_are_made_here_too_in_two_sweeps(name: str, device: Device) -> None:
    assert device.run(name, metrics=True)
    assert device.started == [(name, 2)]
    assert [(of["KD_METRICS"], of["KD_WEIGH"]) for of in device.macros] == [(1, 0)]
    assert device.run(name)
    assert device.macros[-1]["KD_METRICS"] == 0


class TestTime:
    @pytest.mark.parametrize(
        ("vocab", "cluster", "clusters"), [(128_256, 16, 24), (151_936, 8, 16), (32_000, 4, 96), (1003, 1, 396)]
    )
    @pytest.mark.parametrize("count", [1, 100, 132, 700, 2048])
    def test_a_device_with_all_its_clusters_takes_the_first_cut(self, vocab: int, cluster: int, clusters: int, count: int) -> None:
        first = shapes_of(vocab, *HOPPER)[0]
        assert first.cluster == cluster
        assert is_worth_it(first, clusters, count, vocab, MULTIPROCESSORS)

    def test_a_device_with_few_clusters_of_16(self) -> None:
        """It takes them from 1 / 1.6 of the multiprocessors on, where Triton's kernel has them all."""
        shape = shapes_of(250_000, *HOPPER)[0]
        assert shape.cluster == 16
        assert [is_worth_it(shape, clusters, 2048, 250_000, MULTIPROCESSORS) for clusters in (8, 6, 5, 4, 0)] == [
            True,
            True,
            False,
            False,
            False,
        ]

    def test_cuts(self) -> None:
        assert [(shape.cluster, shape.blocks) for shape in shapes_of(128_256, *HOPPER)] == [(16, 3), (8, 1)]
        assert shapes_of(10**6, *HOPPER) == ()

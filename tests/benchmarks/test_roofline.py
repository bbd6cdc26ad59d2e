"""The roofline against published figures, and against the products that the benchmarks time."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kdkernels as kd
from benchmarks import contenders
from benchmarks import roofline as published
from benchmarks.cases import HEADS, Head, Problem
from benchmarks.roofline import Row, median_error, rows
from kdkernels.planning import roofline
from kdkernels.planning.devices import DEVICES
from kdkernels.planning.roofline import seconds
from tests.support.trace import Trace


@pytest.fixture(scope="module")
def found() -> list[Row]:
    return rows()


class TestPublished:
    def test_eager_speeds_are_predicted_within_a_quarter(self, found: list[Row]) -> None:
        assert median_error(found, "speed") <= 0.25

    def test_no_eager_speed_is_far_off(self, found: list[Row]) -> None:
        """Not on the devices whose rows MEMORY_EFFICIENCY is from, and less on the one that reaches less of its bandwidth."""
        for row in found:
            if row.eager and row.metric == "speed":
                assert row.error < (0.3 if row.device == "NVIDIA B200" else 0.15), row

    def test_eager_speeds_are_predicted_on_each_device(self, found: list[Row]) -> None:
        for name in {row.device for row in found}:
            assert median_error([row for row in found if row.device == name], "speed") <= 0.25, name

    def test_eager_peaks_are_predicted(self, found: list[Row]) -> None:
        assert median_error(found, "memory") <= 0.02

    def test_peaks_of_losses_on_logits_are_exact(self, found: list[Row]) -> None:
        peaks = [row for row in found if row.eager and row.metric == "memory" and row.kernel in published.LOGIT_LOSSES]
        assert len(peaks) == 6 + 6 + 6 + 4
        for row in peaks:
            assert row.error < 0.003, row

    def test_every_row_is_modelled_or_says_why_not(self, found: list[Row]) -> None:
        assert len(found) == len(published.PUBLISHED.read_text().splitlines()) - 1 == 207
        for row in found:
            assert (row.predicted is None) == bool(row.reason), row
            assert not (row.eager and row.reason), "every eager row is modelled"
        said = {(row.kernel, row.provider) for row in found if row.reason}
        assert said == set(published.NOT_MODELLED), "no reason for rows that are not there"

    def test_every_figure_stands_in_a_column_that_says_predicted(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert published.main([]) == 0
        shown = capsys.readouterr().out
        assert "predicted" in shown.splitlines()[0]
        assert shown.count("median relative error of the predicted") == 4
        assert "not modelled:" in shown

    def test_another_file_can_be_named(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert published.main(["--csv", str(tmp_path / "missing.csv")]) == 2
        assert "missing.csv is not a file" in capsys.readouterr().err

    def test_a_wrong_bandwidth_is_noticed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The bound on the error means something: half the bandwidth breaks it."""
        for name in DEVICES:
            monkeypatch.setitem(DEVICES, name, replace(DEVICES[name], bandwidth=DEVICES[name].bandwidth / 2))
        assert median_error(rows(), "speed") > 0.25


def test_the_row_that_the_efficiency_of_products_is_from_is_met() -> None:
    """42 ms, rounded, for x, dH and dW of 8,192 tokens at the head of V = 151,936 and D = 4,096."""
    with published.PUBLISHED.open(newline="") as file:
        (row,) = (line for line in csv.DictReader(file) if line["provider"].startswith("bare head products"))
    with Trace(0) as counted:
        hidden, head = (torch.empty(rows, 4096, dtype=torch.bfloat16, device="meta") for rows in (8192, 151_936))
        logits = hidden @ head.t()
        logits @ head, logits.t() @ hidden
    assert round(seconds(counted.passes, DEVICES["H100"]) * 1e3) == float(row["median"]) == 42


@pytest.mark.parametrize("tokens", [100, 4096, 10_000])
def test_bare_products_are_those_that_the_benchmarks_time(tokens: int) -> None:
    vocab, student, teacher = 4096, 64, 96
    shapes = (tokens, student), (vocab, student), (tokens, teacher), (vocab, teacher)
    given = Problem(*(torch.empty(*shape, dtype=torch.bfloat16, device="meta") for shape in shapes))
    seen: list[tuple[tuple[int, ...], ...]] = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if func in (torch.ops.aten.mm.out, torch.ops.aten.addmm.out):
                left, right = args[-2:]
                seen.append((*left.shape, right.shape[1]))
            return out

    with Products():
        contenders.products(given, roofline.PRODUCTS_BLOCK)()
    passes = roofline.products_passes(tokens, vocab, student, teacher, torch.bfloat16)
    modelled = [shape for step in passes for shape in [step.shape] * step.times if shape is not None]
    assert sorted(seen) == sorted((rows, inner, columns) for rows, columns, inner in modelled)


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_the_predicted_step_is_near_the_bare_products(head: Head) -> None:
    for name, most in (("forward_kl", 1.5), ("jsd", 1.65)):
        plan = kd.plan(8192, head.vocab, head.student_dim, head.teacher_dim, torch.bfloat16, device="H100", divergence=name)
        assert plan.seconds is not None
        assert plan.products_seconds is not None
        assert 1.0 < plan.seconds / plan.products_seconds <= most

"""The roofline against published figures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import roofline as published
from benchmarks.roofline import Row, median_error, rows
from kdkernels.roofline import (
    DEVICES,
)


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

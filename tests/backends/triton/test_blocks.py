"""The table of block sizes, and the search for better ones."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.cases import NATIVE_DTYPES
from tests.support.kernels import CPU, GPU

pytest.importorskip("triton", reason="Triton is not installed")
from kdkernels.backends.triton import arch, autotune, blocks
from kdkernels.backends.triton.blocks import TABLE, Matrix


class TestTable:
    @pytest.fixture
    def on(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
        return lambda name: monkeypatch.setattr(blocks, "architecture", lambda _: name)

    def test_every_architecture_has_both_sizes_of_operand(self) -> None:
        listed = {name for name, _ in TABLE}
        assert listed == {"sm_80", "sm_90", "sm_100", "gfx942"}
        assert set(TABLE) == {(name, size) for name in listed for size in (2, 4)}

    @pytest.mark.parametrize("key", TABLE)
    def test_blocks_are_what_a_kernel_can_take(self, key: tuple[str, int]) -> None:
        entry = TABLE[key]
        for matrix in (entry.statistics, entry.sums, entry.gradient, entry.roomy or entry.sums, entry.measured or entry.sums):
            for size in (matrix.block_n, matrix.block_v, matrix.block_d):
                assert size >= 16
                assert size & (size - 1) == 0, "a power of two"
            assert matrix.block_n <= 256
            assert matrix.block_v <= 256, "a descriptor's box has no more rows"
            assert matrix.options() == {"num_warps": matrix.num_warps, "num_stages": matrix.num_stages}
        assert entry.row.entries & (entry.row.entries - 1) == 0
        assert entry.row.entries % arch.ENTRIES == 0, "accesses of 16 bytes, whatever the dtype"

    @pytest.mark.parametrize(
        ("name", "takes"),
        [
            *((name, name) for name in ("sm_80", "sm_90", "sm_100", "gfx942")),
            *(("sm_86", "sm_80"), ("sm_89", "sm_80"), ("sm_120", "sm_100"), ("sm_103", "sm_100")),
            *(("gfx950", "gfx942"), ("gfx1100", "gfx942"), ("gfx90a", "gfx942"), ("sm_75", "sm_80"), ("sm_70", "sm_80")),
        ],
    )
    @pytest.mark.parametrize("dtype", NATIVE_DTYPES)
    def test_what_is_not_listed_takes_the_nearest_older_one_or_else_the_oldest(
        self, dtype: torch.dtype, name: str, takes: str, on: Callable[[str], None]
    ) -> None:
        on(name)
        assert blocks.entry(GPU, dtype) is TABLE[takes, dtype.itemsize]
        assert blocks.row_entry(GPU) is TABLE[takes, 4].row

    def test_registers_are_capped_on_nvidia_only(self, on: Callable[[str], None]) -> None:
        row = blocks.Row()
        on("sm_90")
        assert row.options(GPU) == {"num_warps": row.num_warps, "maxnreg": row.maxnreg}
        on("gfx942")
        assert row.options(GPU) == {"num_warps": row.num_warps}


class TestAutotune:
    TABLED = Matrix(64, 128, 32, 8, 3)

    @pytest.fixture
    def asked(self, monkeypatch: pytest.MonkeyPatch) -> list[Matrix]:
        """Searches on an imagined GPU; what was timed, where half the tokens, twice the depth and one warp are fastest."""
        monkeypatch.setenv("KDKERNELS_AUTOTUNE", "1")
        monkeypatch.setattr(autotune, "_winners", {})
        monkeypatch.setattr(autotune, "architecture", lambda _: "sm_90")
        timed: list[Matrix] = []

        def seconds(_: Any, matrix: Matrix) -> float:
            timed.append(matrix)
            return 0.001 * (1 + abs(matrix.block_n - 32) + abs(matrix.block_d - 64) + abs(matrix.num_stages - 3)) + matrix.num_warps

        monkeypatch.setattr(autotune, "seconds", seconds)
        return timed

    WINNER = Matrix(32, 128, 64, 1, 3)

    def chosen(self, kernel: str = "sums_kernel", device_: torch.device = GPU, dtype: torch.dtype = torch.bfloat16) -> Matrix:
        stand_in = SimpleNamespace(fn=SimpleNamespace(__name__=kernel))
        return autotune.chosen(stand_in, self.TABLED, device_, dtype, lambda _: None)

    def test_the_fastest_is_taken_and_printed_in_the_tables_own_form(
        self, asked: list[Matrix], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.chosen() == self.WINNER
        printed = capsys.readouterr().err
        found = re.search(r"(\(\"sm_90\", \d\)): (\w+)=(Matrix\([^)]*\))  #", printed)
        assert found, printed
        assert eval(found[1]) in TABLE
        assert found[2] in {"statistics", "sums", "gradient"}
        assert eval(found[3], {"Matrix": Matrix}) == self.WINNER
        assert self.TABLED in asked

    def test_it_searches_once_for_each_kernel_and_dtype(self, asked: list[Matrix]) -> None:
        self.chosen()
        once = len(asked)
        assert once == len(set(asked)) > 1
        assert self.chosen() == self.WINNER
        assert len(asked) == once
        for number, other in enumerate(({"kernel": "statistics_kernel"}, {"dtype": torch.float32}), start=2):
            self.chosen(**other)
            assert len(asked) == number * once

    @pytest.mark.parametrize("value", [None, "", "0"])
    def test_without_being_asked_the_table_is_taken(
        self, value: str | None, asked: list[Matrix], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("KDKERNELS_AUTOTUNE") if value is None else monkeypatch.setenv("KDKERNELS_AUTOTUNE", value)
        assert self.chosen() is self.TABLED
        assert not asked

    def test_off_a_gpu_the_table_is_taken(self, asked: list[Matrix]) -> None:
        assert self.chosen(device_=CPU) is self.TABLED
        assert not asked

    def test_the_search_ends_when_its_time_is_up(self, asked: list[Matrix], monkeypatch: pytest.MonkeyPatch) -> None:
        """Three kernels of a dtype within two minutes: the time of one, and what a last candidate takes, three times."""
        assert 3 * (autotune.PATIENCE + 5) <= 120
        clock = iter(range(0, 10_000, 12))  # a candidate takes 12 s
        monkeypatch.setattr(autotune.time, "monotonic", lambda: next(clock))
        assert self.chosen() in asked
        assert len(asked) == 1 + -(-35 // 12) - 1

    @pytest.mark.parametrize("matrix", sorted({entry.statistics for entry in TABLE.values()}, key=str))
    def test_candidates_can_run_and_keep_the_vocabularys_block(self, matrix: Matrix) -> None:
        found = list(autotune.neighbours(matrix))
        assert matrix not in found
        assert len(found) == len(set(found)) > 5
        for one in found:
            assert one.block_v == matrix.block_v, "splits are multiples of it"
            assert min(one.block_n, one.block_d) >= 16
            assert all(size & (size - 1) == 0 for size in (*one.blocks().values(), one.num_warps))
            assert one.num_stages >= 1
            assert 1 <= one.num_warps <= 16

    def test_a_candidate_that_fails_is_infinitely_slow(self, capsys: pytest.CaptureFixture[str]) -> None:
        def fails(_: Matrix) -> None:
            raise RuntimeError("out of resource: shared memory")

        assert autotune.seconds(fails, self.TABLED) == float("inf")
        printed = capsys.readouterr().err
        assert "shared memory" in printed
        assert str(self.TABLED) in printed

    def test_a_run_counts_with_its_fastest_repeat(self, monkeypatch: pytest.MonkeyPatch) -> None:
        times = iter([3.0, 2.0, 5.0, 2.5, 4.0])
        started: list[Matrix] = []

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None: ...
            def synchronize(self) -> None: ...
            def elapsed_time(self, _: Any) -> float:
                return next(times)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        assert autotune.seconds(started.append, self.TABLED) == 2e-3
        assert started == [self.TABLED] * (1 + autotune.REPEATS), "the first compiles, and is not timed"

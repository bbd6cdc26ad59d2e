"""A vocabulary over two and three gloo processes: what one process computes, and refusals instead of ranks that wait for ever.

The processes are started once for each number of them. They run every problem of PROBLEMS, every call of REFUSED and the other
functions named in ALSO, and leave what they found in files; the tests compare.
"""

from __future__ import annotations

import math
import os
import re
import socket
import subprocess
import sys
from typing import Any
from unittest import mock

import pytest
import torch

import kdkernels as kd
from kdkernels.backends import reference
from kdkernels.backends.columns import STATS_COLUMNS
from kdkernels.backends.merge import merged
from kdkernels.engine.cut import column_bytes
from tests.parallel.problems import (
    HEADS,
    HIDDEN,
    REFUSED,
    SIZES,
    SMALL,
    SPLITS,
    STRATEGIES,
    TOKENS,
    VOCAB,
    Found,
    Problem,
    full,
    fused_problems,
    problems,
)
from tests.parallel.work import START
from tests.support import okd
from tests.support.cases import (
    MAIN,
    Case,
    assert_as_good_as_eager,
    ratios,
)


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """[size][rank]: what the processes found."""
    found = {}
    for size in SIZES:
        folder = tmp_path_factory.mktemp(f"ranks{size}")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        started = [
            subprocess.Popen(
                [sys.executable, "-c", START, str(rank), str(size), str(folder)],
                env={**os.environ, **shared, "PYTHONPATH": os.pathsep.join(sys.path)},
            )
            for rank in range(size)
        ]
        try:
            assert [process.wait(timeout=240) for process in started] == [0] * size
        finally:
            for process in started:
                process.kill()
        found[size] = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]
    return found


def whole(found: list[Found]) -> Found:
    """The ranks' results side by side: gradients of heads are of their own rows."""
    return {name: torch.cat([one[name] for one in found]) if name in HEADS else value for name, value in found[0].items()}


def share_of(problem: Problem) -> float:
    """What rounding, and regrouping the sums over a vocabulary, can change of a result's largest entry."""
    dtypes = [getattr(problem.case, name).dtype for name in ("student_hidden", "student_weight", *HIDDEN[1:], "teacher_weight")]
    dtypes += [torch.bfloat16] * problem.autocast
    return VOCAB * max(torch.finfo(dtype).eps for dtype in dtypes)


def differences(found: Found, right: Found, share: float) -> list[str]:
    """What of it is not within that share of its largest finite entry (losses, in nats: of 1 at least), or has another dtype,
    shape, NaN or infinity."""
    wrong = [] if set(found) == set(right) else [f"{sorted(found)} instead of {sorted(right)}"]
    for name in set(found) & set(right):
        largest = right[name].double().nan_to_num(0.0, 0.0, 0.0).abs().max().item() if right[name].numel() else 0.0
        if name not in okd.EVERYTHING:
            largest = max(largest, 1.0)
        try:
            torch.testing.assert_close(found[name], right[name], rtol=0, atol=share * largest, equal_nan=True)
        except AssertionError as error:
            wrong.append(f"{name}: {error}")
    return wrong


sizes = pytest.mark.parametrize("size", SIZES)


@pytest.fixture(scope="session")
def alone() -> dict[str, Found]:
    """Every problem in one process."""
    return {name: problem.run() for name, problem in problems().items()}


class TestAsOneProcess:
    @sizes
    def test_losses_metrics_and_gradients(self, size: int, ranks: Any, alone: dict[str, Found]) -> None:
        wrong = {
            name: found
            for name, problem in problems().items()
            if (found := differences(whole([rank[name] for rank in ranks[size]]), alone[name], share_of(problem)))
        }
        assert not wrong, "\n".join(f"{name}: {'; '.join(texts)}" for name, texts in wrong.items())

    @sizes
    def test_all_ranks_have_the_same_bit_for_bit(self, size: int, ranks: Any) -> None:
        for name in problems():
            first, *rest = ({key: value for key, value in rank[name].items() if key not in HEADS} for rank in ranks[size])
            for other in rest:
                for key, value in first.items():
                    torch.testing.assert_close(other[key], value, rtol=0, atol=0, equal_nan=True, msg=f"{name}: {key}")

    def test_problems_are_what_they_are_called(self, alone: dict[str, Found]) -> None:
        """A test of equality proves nothing of results that are all NaN or 0."""
        for name, found in alone.items():
            spoiled = any(word in name for word in ("nan", "inf"))
            nothing = any(word in name for word in ("masked", "no tokens"))
            for part in ("loss", "student", "teacher", *okd.EVERYTHING):
                if part in found and not (spoiled and part in okd.EVERYTHING):
                    assert found[part].isfinite().all() != spoiled, (name, part)
                    assert (found[part] != 0).any() != nothing, (name, part)
        assert alone["ties tokens"]["agreement"] == pytest.approx((TOKENS - 1) / TOKENS)

    @sizes
    def test_rows_beyond_the_cut_take_no_gradient(self, size: int, ranks: Any) -> None:
        for strategy in STRATEGIES:
            found = whole([rank[f"okd a rank without rows {strategy}"] for rank in ranks[size]])
            for name in HEADS:
                assert (found[name][24:] == 0).all()
                assert (found[name][:24] != 0).any()


@pytest.mark.parametrize("first", [True, False])
def test_the_largest_entry_of_a_block_with_nan_is_found_wherever_it_is(first: bool) -> None:
    """A maximum over ranks may lose NaN, or not: that must decide about nothing."""
    x, z = torch.tensor([[[1.0, torch.nan, 2.0]], [[3.0, 5.0, 4.0]]], dtype=torch.float64)
    parts = [
        reference.block_stats(side, side, None, None, None, torch.ones(()), 1.0, [1.0, 0.0, 1.0, 0.0], "", False, True)
        for side in ((x, z) if first else (z, x))
    ]
    parts[1][:, [STATS_COLUMNS.index(name) for name in ("argmax_x", "argmax_z")]] += 3
    whole = dict(zip(STATS_COLUMNS, merged(torch.stack(parts), "")[0].tolist(), strict=True))
    assert whole["max_x"] == whole["max_z_T"] == torch.inf
    assert math.isnan(whole["log_sum_x"])
    assert math.isnan(whole["log_sum_z_T"])
    assert whole["argmax_x"] == whole["argmax_z"] == (1 if first else 4)


class TestAgainstTheFormulas:
    @sizes
    @pytest.mark.parametrize("strategy", STRATEGIES)
    @pytest.mark.parametrize("name", kd.divergences())
    def test_in_float64(self, name: str, strategy: str, size: int, ranks: Any) -> None:
        """Against autograd over the plain formulas, which share no code with the library."""
        one = f"{name} mean {strategy}"
        exact = problems()[one].case.plain()
        found = whole([rank[one] for rank in ranks[size]])
        assert not differences(found, {key: exact[key] for key in found}, VOCAB * torch.finfo(torch.float64).eps)
        both = f"okd {name} mean {strategy}"
        exact = _online(problems()[both].case, torch.float64)
        found = whole([rank[both] for rank in ranks[size]])
        expected = {key: exact[key] for key in found}
        assert not differences(found, expected, VOCAB * torch.finfo(torch.float64).eps)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_as_close_as_eager(self, dtype: torch.dtype, ranks: Any) -> None:
        compared = {}
        for size in SIZES:
            for strategy in STRATEGIES:
                for divergence in MAIN:
                    name = f"{divergence} {dtype} {strategy}"
                    case = problems()[name].case
                    found = whole([rank[name] for rank in ranks[size]])
                    compared[name, size] = ratios([found], [case.plain(dtype)], [case.plain()])
        assert_as_good_as_eager(compared)


def _online(case: Case, dtype: torch.dtype) -> Found:
    exact = okd.plain(case, 0.5, dtype)
    return {**{who: exact[who]["loss"] for who in exact}, **exact["student"], **exact["teacher"]}


class TestCost:
    @sizes
    def test_a_rank_multiplies_what_one_process_would_with_its_rows(self, size: int, ranks: Any) -> None:
        """3 Us + Ut, however many chunks; 5 Us + 3 Ut for blocks and two forward sweeps."""
        student, teacher = 2 * 8, 2 * 12
        for rank in ranks[size]:
            assert rank["products"] == {"tokens": 3 * student + teacher, "vocab": 5 * student + 3 * teacher}

    @sizes
    def test_collectives(self, size: int, ranks: Any) -> None:
        table = ("SUM", (size, 64), torch.int64)
        kept = TOKENS - 2
        largest, added = ("MAX", (kept, 4), torch.float64), ("SUM", (kept, 7), torch.float64)
        places, sums = ("MIN", (kept, 2), torch.float64), ("SUM", (kept, 5), torch.float64)
        hidden = ("SUM", (kept, 8), torch.float32)
        for rank in ranks[size]:
            for strategy in STRATEGIES:
                seen = {name.rpartition(" ")[0]: of for name, of in rank["collectives"].items() if name.endswith(strategy)}
                assert seen["one sweep"] == [table, largest, added, hidden]
                assert seen["frozen"] == [table, largest, added]
                assert seen["metrics"] == [table, largest, added, places, sums, hidden]
                assert seen["masked"] == [table]

    @sizes
    def test_every_rank_has_as_many_chunks_as_the_one_with_most_rows(self, size: int, ranks: Any) -> None:
        per_row = max(SPLITS[size]) * column_bytes(torch.float32, torch.float32, torch.device("cpu"))
        most = SMALL[torch.float32] // per_row
        assert 1 <= most < TOKENS - 2
        for rank in ranks[size]:
            seen = [shape[0] for how, shape, _ in rank["collectives"]["small tokens"] if how == "MAX"]
            assert sum(seen) == TOKENS - 2
            assert max(seen) <= most
            assert rank["collectives"] == ranks[size][0]["collectives"]


@sizes
def test_backward_twice_and_two_runs_give_the_same(size: int, ranks: Any) -> None:
    assert all(rank["twice"] for rank in ranks[size])


@sizes
def test_compiled_without_a_break(size: int, ranks: Any) -> None:
    for rank in ranks[size]:
        assert rank["compiled"]["graphs"] == 1
        for eager, found in zip(rank["compiled"]["eager"], rank["compiled"]["compiled"], strict=True):
            for one, other in zip(eager, found, strict=True):
                torch.testing.assert_close(other, one, rtol=2 * torch.finfo(one.dtype).eps, atol=1e-7)


@sizes
def test_operators_keep_the_contracts_of_their_library(size: int, ranks: Any) -> None:
    assert all(rank["checked"] for rank in ranks[size])


@sizes
def test_kernels_that_multiply_themselves(size: int, ranks: Any) -> None:
    for name, problem in fused_problems().items():
        found = whole([rank["fused"][name] for rank in ranks[size]])
        assert not differences(found, problem.run(), VOCAB * torch.finfo(torch.float32).eps), name


@sizes
def test_ranks_outside_of_the_group_take_no_part(size: int, ranks: Any) -> None:
    right = Problem(full()).run()
    *others, last = (rank["part_of_the_world"] for rank in ranks[size])
    for found in (last["found"], whole([other["found"] for other in others])):
        assert not differences(found, right, share_of(Problem(full())))
    assert {found["error"] for found in (*others, last)} == {
        "this rank is not in process_group; call the loss on the group's ranks only"
    }


class TestRefusals:
    @sizes
    @pytest.mark.parametrize("name", REFUSED)
    def test_every_rank_raises_and_says_what_is_wrong(self, name: str, size: int, ranks: Any) -> None:
        said = [rank["refusals"][name] for rank in ranks[size]]
        for kind, text in said:
            assert re.search(REFUSED[name][1], text), text
            assert kind == "TypeError" if re.search("one dtype|is a tensor|got str|got float", text) else "ValueError"
        if not name.startswith("one rank's"):
            assert len(set(said)) == 1

    @sizes
    def test_what_one_rank_cannot_even_place(self, size: int, ranks: Any) -> None:
        for name, said in {
            "one rank's tensors": ("TypeError", "student_hidden is a tensor, got list"),
            "one rank's device": (
                "ValueError",
                "process_group serves no tensors on cpu, where student_hidden is; its backend is gloo",
            ),
        }.items():
            first, *rest = (rank["refusals"][name] for rank in ranks[size])
            assert first == said
            for other in rest:
                assert other[1].startswith("rank 0 of process_group refused the input")

    @sizes
    def test_afterwards_the_ranks_go_on_together(self, size: int, ranks: Any) -> None:
        assert all(rank["refusals"]["afterwards"] == ("", "True") for rank in ranks[size])

    def test_without_torch_distributed(self) -> None:
        for online in (False, True):
            with pytest.raises(ValueError, match=r"torch\.distributed is not initialised; call init_process_group first"):
                Problem(full(), online).run(process_group=object())
            with (
                mock.patch("torch.distributed.is_available", return_value=False),
                pytest.raises(ValueError, match=r"torch\.distributed is not"),
            ):
                Problem(full(), online).run(process_group=object())

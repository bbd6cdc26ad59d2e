"""The kernels over many tiles and splits, the table of their blocks, and how they are started. In Triton's interpreter.

That every divergence, dtype and head is right is in test_backends.py; here is what takes more than one tile to go wrong.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import kdkernels as kd
from kdkernels import backends
from kdkernels.backends import reference
from kdkernels.backends.operators import ROW_COLUMNS, STATS_COLUMNS
from kdkernels.divergences import FLAT, resolve
from kdkernels.step import Step, Terms, prepare
from kdkernels.vocab import sums_of_one_sweep
from tests.support import ROOT
from tests.support.cases import NATIVE_DTYPES, Case, assert_as_good_as_eager, draw, dressed, ratios
from tests.support.oracle import Options

triton = pytest.importorskip("triton", reason="Triton is not installed")
tl = pytest.importorskip("triton.language")

from benchmarks.traffic import metered  # noqa: E402
from kdkernels.backends.triton import autotune, blocks, device, functions, launch, rows, vocabulary  # noqa: E402
from kdkernels.backends.triton.blocks import TABLE, Matrix  # noqa: E402
from tests.support.interpreter import as_on_a_gpu  # noqa: E402

EPS = torch.finfo(torch.float32).eps
AT = {name: column for column, name in enumerate(STATS_COLUMNS)}
# With blocks of 16 tokens and 32 columns two tiles by five; the programs side by side decide how the five are split.
TOKENS, VOCAB, DIMS = 20, 150, (24, 40)
SPLITS = {1: 1, 5: 3, 16: 5}
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def large(name: str = "jsd", dims: tuple[int, int] = DIMS, dtype: torch.dtype = torch.float32) -> Case:
    case = dressed(draw(tokens=(TOKENS,), vocab=VOCAB, dims=dims, dtype=dtype))
    return replace(case, options=Options(name, t=0.6, temperature=2.0, ce_weight=0.5))


def run(case: Case, **more: Any) -> dict[str, Tensor]:
    """Loss, metrics if asked for, and gradients, in strategy "vocab" in two blocks of columns."""
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in case.learned().items()}
    memory = 80 * case.student_hidden.shape[0] * case.student_hidden.element_size()
    made = case.loss(leaves, **{"strategy": "vocab", "memory_budget": memory, **more})
    loss, metrics = made if isinstance(made, tuple) else (made, {})
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {"loss": loss.detach(), **metrics, **dict(zip(leaves, grads, strict=True))}


def assert_close(found: dict[str, Tensor], right: dict[str, Tensor], terms: int = VOCAB) -> None:
    """Within what regrouping sums of ``terms`` terms can change."""
    assert set(found) == set(right)
    for name, value in right.items():
        tolerance = terms * EPS * value.abs().max().item()
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance, msg=lambda text, of=name: f"{of}: {text}")


def step_of(case: Case, name: str, metrics: bool = False, dtype: torch.dtype = torch.float32) -> Step:
    options = case.options
    return prepare(
        (case.student_hidden, case.student_weight, case.student_bias),
        (case.teacher_hidden, case.teacher_weight, case.teacher_bias),
        *(case.token_weight, torch.ones(()), None, case.labels, torch.tensor(options.t)),
        Terms(name, resolve(name).a, options.temperature, options.kd_weight, options.ce_weight, [1.0, 0.0, 1.0, 0.0]),
        *(-100, case.student_weight.shape[0], (dtype, dtype), (True, True, True), metrics, 2**30),
    )


def sweeps_of(step: Step, tile: Tensor | None = None) -> Any:
    tile = torch.empty(step.count, step.vocab, dtype=step.student.dtype) if tile is None else tile
    index = step.index(0, step.count)
    return vocabulary.LearnerSweeps(step, (step.student.rows(index), step.teacher.rows(index)), tile, torch.empty(0))


def of_logits(x: Tensor, z: Tensor, **more: Any) -> Case:
    """A case with exactly these logits [N, V]: hidden states are the rows of an identity, padded to a multiple of 4."""
    hidden = torch.eye(x.shape[0], -(-x.shape[0] // 4) * 4)
    weights = [torch.nn.functional.pad(side.t(), (0, hidden.shape[1] - x.shape[0])).contiguous() for side in (x, z)]
    return Case(hidden, weights[0], hidden, weights[1], **more)


def test_a_product_of_the_interpreter_is_the_same_in_every_place_of_a_tile() -> None:
    """As from a matrix unit: logits that statistics are of are made again for the gradient, in tiles that begin elsewhere.
    A matrix library rounds by the place in the tile on some processors (OpenBLAS on Zen 5)."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    random = np.random.default_rng(0)
    left, right = (random.standard_normal(shape).astype(np.float32) for shape in ((16, 64), (64, 32)))
    nothing = TensorHandle(np.zeros((16, 32), np.float32), tl.float32)
    with as_on_a_gpu():
        builder = InterpreterBuilder()

        def product(shift: int) -> np.ndarray:
            sides = (TensorHandle(side, tl.float32) for side in (left, np.roll(right, shift, 1)))
            return np.roll(builder.create_dot(*sides, nothing, None, None).data, -shift, 1)

        whole = product(0)
        assert whole.dtype == np.float32
        np.testing.assert_allclose(whole, left.astype(np.float64) @ right, rtol=0, atol=EPS * np.abs(whole).max())
        for shift in range(1, 32):
            np.testing.assert_array_equal(product(shift), whole)


class TestTilesAndSplits:
    @pytest.fixture
    def splits(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """How many partial results were merged."""
        seen: list[int] = []
        merged = vocabulary.merged
        monkeypatch.setattr(vocabulary, "merged", lambda parts, weigh: seen.append(len(parts)) or merged(parts, weigh))
        return seen

    @pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
    def test_however_the_vocabulary_is_split_the_results_are_the_same(self, name: str, splits: list[int]) -> None:
        case = large(name)
        with backends.use("reference"):
            right = run(case)
        for programs, count in SPLITS.items():
            with as_on_a_gpu(programs=programs):
                found = run(case)
            assert_close(found, right)
            assert splits[-1] == count

    @pytest.mark.parametrize("name", ["reverse_kl", "total_variation"])
    def test_two_runs_agree_bit_for_bit(self, name: str) -> None:
        with as_on_a_gpu(programs=5):
            for one, other in zip(*(run(large(name), return_metrics=True).values() for _ in range(2)), strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=0)

    def test_metrics_over_splits(self) -> None:
        case = large("forward_kl")
        with backends.use("reference"):
            right = run(case, return_metrics=True)
        for programs in (1, 16):
            with as_on_a_gpu(programs=programs):
                assert_close(run(case, return_metrics=True), right)

    @pytest.mark.parametrize("tile", [(16, 16, 16), (32, 64, 32), (64, 256, 64)])
    def test_every_size_of_tile(self, tile: tuple[int, int, int]) -> None:
        with backends.use("reference"):
            right = run(large())
        with as_on_a_gpu(blocks=tile, programs=16):
            assert_close(run(large()), right)

    @pytest.mark.parametrize("vocab", [1, 5, 31, 32, 33])
    def test_a_vocabulary_of_about_a_tile(self, vocab: int) -> None:
        case = replace(dressed(draw(tokens=(3,), vocab=vocab)), options=Options("jsd", ce_weight=0.5))
        with backends.use("reference"):
            right = run(case, return_metrics=True)
        with as_on_a_gpu(programs=16):
            assert_close(run(case, return_metrics=True), right)

    @pytest.mark.parametrize("kd_weight", [0.0, 1.0])
    def test_labels_in_every_tile_and_at_its_edges(self, kd_weight: float) -> None:
        labels = torch.tensor([*range(30, 34), *range(62, 66), *range(0, 150, 5), 149, 79])  # a block ends after 80 columns
        case = replace(
            draw(tokens=(len(labels),), vocab=VOCAB, dims=DIMS), labels=labels, options=Options(kd_weight=kd_weight, ce_weight=1.0)
        )
        with backends.use("reference"):
            right = run(case)
        with as_on_a_gpu(programs=16):
            assert_close(run(case), right)

    @pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
    def test_tiles_and_splits_that_are_banned_whole(self, name: str) -> None:
        case = replace(large(name), labels=None, options=Options(name, t=0.5))
        assert case.student_bias is not None
        assert case.teacher_bias is not None
        case = replace(case, student_softcap=None, teacher_softcap=None)
        case.student_bias[:64], case.teacher_bias[:40], case.teacher_bias[120:] = -torch.inf, -torch.inf, -torch.inf
        with backends.use("reference"):
            right = run(case, return_metrics=True)
        assert all(value.isfinite().all() for value in right.values())
        for programs in (1, 16):
            with as_on_a_gpu(programs=programs):
                assert_close(run(case, return_metrics=True), right)
                assert_close(run(case), {part: value for part, value in right.items() if part in ("loss", *case.learned())})

    @pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "total_variation"])
    @pytest.mark.parametrize("model", ["student", "teacher"])
    def test_a_bad_entry_shows_whatever_its_tile(self, model: str, name: str) -> None:
        one_sweep = resolve(name).one_sweep
        for bad, column in ((torch.nan, 10), (torch.nan, 149), (torch.inf, 70)):
            bias = torch.zeros(VOCAB)
            bias[column] = bad
            step = step_of(replace(draw(tokens=(6,), vocab=VOCAB), **{f"{model}_bias": bias}), name)
            with as_on_a_gpu(programs=16):
                stats = sweeps_of(step).statistics(one_sweep, False)
                sums = sums_of_one_sweep(stats, resolve(name)) if one_sweep else sweeps_of(step).sums(stats)
                dx = torch.cat([tile.clone() for *_, tile in sweeps_of(step).gradients(stats, sums)], 1)
            assert sums[:, :2].isnan().all()
            assert dx.isnan().all()

    @pytest.mark.parametrize("model", ["student_hidden", "teacher_hidden"])
    def test_a_bad_token_is_nan_and_no_other(self, model: str) -> None:
        case = draw(tokens=(TOKENS,), vocab=VOCAB, options=Options("jsd"))
        others = torch.arange(TOKENS) != 2
        with as_on_a_gpu(programs=16):
            right = case.loss(reduction="none", strategy="vocab")
            getattr(case, model)[2, 3] = torch.nan
            found = case.loss(reduction="none", strategy="vocab")
        assert found[2].isnan()
        torch.testing.assert_close(found[others], right[others], rtol=0, atol=0)

    @pytest.mark.parametrize("programs", SPLITS)
    def test_of_equal_largest_logits_the_first_wins(self, programs: int) -> None:
        x, z = (torch.randn(2, 8, VOCAB, generator=torch.Generator().manual_seed(0)) * 3).round()
        for row, columns in enumerate([(3, 5), (31, 32), (0, 149), (64, 96, 128), (63, 64), (31, 63), (149,), (16, 140)]):
            x[row, list(columns)], z[row, [(column + 7) % VOCAB for column in columns]] = 50.0, 60.0
        case = of_logits(x, z)
        with as_on_a_gpu(programs=programs):
            found = sweeps_of(step_of(case, "jsd", metrics=True)).statistics("", False)
        assert found[:, AT["argmax_x"]].tolist() == x.argmax(1).tolist()
        assert found[:, AT["argmax_z"]].tolist() == z.argmax(1).tolist()

    @pytest.mark.parametrize("weigh", ["target", "student"])
    def test_statistics_are_those_of_the_reference_where_the_largest_entries_grow_late(self, weigh: str) -> None:
        x, z = torch.randn(2, 20, VOCAB, generator=torch.Generator().manual_seed(0)) * 3
        x[3, 60:] += 300.0  # by more than any exponential holds
        z[4, 100:] += 300.0
        x[5, :20] += 300.0
        labels = torch.arange(20) * 7
        case = replace(of_logits(x, z, labels=labels), options=Options(t=0.7, temperature=2.0, ce_weight=1.0))
        head = [1.0, 0.0, 1.0, 0.0]
        t = torch.tensor(0.7)
        right = reference.block_stats(x, z, None, None, labels, t, 2.0, head, weigh, True, True)
        for programs in SPLITS:
            with as_on_a_gpu(programs=programs):
                found = sweeps_of(step_of(case, "jsd", metrics=True)).statistics(weigh, True)
            for column, name in enumerate(STATS_COLUMNS):
                tolerance = VOCAB * EPS * right[:, column].abs().max().item()
                torch.testing.assert_close(found[:, column].float(), right[:, column], rtol=0, atol=tolerance, msg=name)

    @pytest.mark.parametrize("factor", [2, 4])
    def test_any_candidate_of_a_search_gives_the_same(self, factor: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """The blocks that run may differ from those that the splits were made for."""
        kernels = set()

        def chosen(kernel: Any, matrix: Matrix, *_: Any) -> Matrix:
            kernels.add(kernel.fn.__name__)
            return replace(matrix, block_n=matrix.block_n * factor, block_d=matrix.block_d * 2)

        with as_on_a_gpu(programs=5):
            right = run(large())
            monkeypatch.setattr(autotune, "chosen", chosen)
            assert_close(run(large()), right)
        assert kernels == {"statistics_kernel", "sums_kernel", "gradient_kernel"}


def test_a_teacher_that_nobody_looks_at_is_not_handed_to_the_kernels() -> None:
    case = replace(draw(), labels=torch.arange(6), options=Options(kd_weight=0.0, ce_weight=1.0))
    for metrics in (False, True):  # which are about the teacher
        with as_on_a_gpu():
            *_, student, teacher = sweeps_of(step_of(case, "jsd", metrics=metrics))._operands(Matrix(16, 32, 16, 4, 1))
        assert student is not None
        assert (teacher is None) == (not metrics)


class TestOperands:
    MATRIX = Matrix(16, 32, 16, 4, 1)

    def both(self, width: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        return torch.randn(5, width).to(dtype), torch.randn(7, width).to(dtype)

    @pytest.mark.parametrize(("dtype", "aligned"), [(torch.float32, 4), (torch.bfloat16, 8), (torch.float16, 8)])
    def test_rows_of_16_bytes_go_by_descriptors_and_others_by_pointers(self, dtype: torch.dtype, aligned: int) -> None:
        for width in range(1, 33):
            hidden, weight = self.both(width, dtype)
            *given, (hidden_stride, weight_stride, d) = launch.operands(hidden, weight, self.MATRIX, CPU)
            described = [type(part).__name__ == "TensorDescriptor" for part in given]
            assert described == [width % aligned == 0] * 2
            assert (hidden_stride, weight_stride) == ((None, None) if all(described) else (width, width))
            assert d == width
            if all(described):
                assert [part.block_shape for part in given] == [[16, 16], [32, 16]]
                assert [part.base is side for part, side in zip(given, (hidden, weight), strict=True)] == [True, True]

    def test_a_view_that_begins_off_16_bytes_goes_by_pointers(self) -> None:
        hidden, weight = self.both(16)
        for one, other in ((hidden[:, 1:9], weight[:, 0:8]), (hidden[:, 0:8], weight[:, 1:9])):
            *_, (hidden_stride, weight_stride, width) = launch.operands(one, other, self.MATRIX, CPU)
            assert (hidden_stride, weight_stride, width) == (16, 16, 8)

    def test_rows_that_lie_on_one_another_go_by_pointers(self) -> None:
        hidden, weight = self.both(16)
        *_, (hidden_stride, weight_stride, _) = launch.operands(hidden, weight[:1].expand(7, 16), self.MATRIX, CPU)
        assert (hidden_stride, weight_stride) == (16, 0)

    def test_a_transposed_head_is_copied(self) -> None:
        hidden, weight = self.both(8)
        given = launch.operands(hidden, weight.t().contiguous().t(), self.MATRIX, CPU)
        assert given[1].stride() == (8, 1)
        assert (given[1] == weight).all()

    @pytest.mark.parametrize("architecture", ["sm_80", "gfx942"])
    def test_older_and_other_architectures_have_no_descriptors(self, architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(launch, "architecture", lambda _: architecture)
        hidden, weight = self.both(16)
        given = launch.operands(hidden, weight, self.MATRIX, CPU)
        assert given[0] is hidden
        assert given[1] is weight
        assert given[2] == (16, 16, 16)

    @pytest.mark.parametrize("dims", [DIMS, (23, 39), (23, 40), (1, 3)])
    @pytest.mark.parametrize("dtype", NATIVE_DTYPES)
    def test_both_give_what_the_oracle_gives(self, dtype: torch.dtype, dims: tuple[int, int]) -> None:
        case = replace(draw(tokens=(18,), vocab=70, dims=dims, dtype=dtype), options=Options("jsd", t=0.6))
        with as_on_a_gpu(programs=8):
            found = run(case)
        exact, eager = case.plain(), case.plain(dtype)
        eager = {**eager, "losses": eager["losses"]}
        over = ratios([{**found, "losses": eager["losses"]}], [eager], [exact])
        assert max(over[name] for name in ("loss", *case.learned())) <= 2, over

    def test_pointers_give_what_descriptors_give(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with as_on_a_gpu(programs=5):
            right = run(large())
            monkeypatch.setattr(launch, "described", lambda _: False)
            found = run(large())
        assert_close(found, right, terms=1)


@contextmanager
def far_apart(shape: tuple[int, int], stride: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """A matrix whose rows are so far apart that offsets pass 2^31. Only the touched pages exist.

    It begins in the middle, so that an offset that wraps around to the negative reads zeros instead of memory that is not ours.
    """
    reach = shape[0] * stride * dtype.itemsize
    try:
        memory = mmap.mmap(-1, 2 * reach, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000))
    except (OSError, ValueError, AttributeError) as error:
        pytest.skip(f"no {2 * reach / 2**30:.0f} GiB of address space without memory: {error}")
    whole = torch.frombuffer(memory, dtype=dtype)
    yield whole.as_strided(shape, (stride, 1), reach // dtype.itemsize)
    del whole


@pytest.mark.skipif(sys.platform != "linux", reason="address space without memory is asked for as on Linux")
class TestFarOffsets:
    """N x V passes 2^31 elements at 32k tokens and 65k entries: offsets are 64 bits wide before they are multiplied."""

    STRIDE = 2**30
    ROWS = 4

    @pytest.fixture(autouse=True)
    def nothing_is_copied_back(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The interpreter copies whole storages back from the host, also where they never left it."""
        executor = triton.runtime.interpreter.GridExecutor
        monkeypatch.setattr(executor, "_restore_args_dev", lambda *_: None)

    @pytest.mark.parametrize("which", ["x", "z", "out"])
    def test_of_the_row_operation(self, which: str) -> None:
        generator = torch.Generator().manual_seed(0)
        near = dict(zip(("x", "z", "out"), torch.randn(3, self.ROWS, 70, generator=generator).half(), strict=True))
        options = ("jsd", 0.5, 1.0, 1.0, 0.0, [1.0, 0.0, 1.0, 0.0], True, False)

        def both(x: Tensor, z: Tensor, out: Tensor) -> list[Tensor]:
            columns = rows.row_loss(x, z, None, None, None, torch.ones(self.ROWS), torch.ones(()), *options, out)
            return [columns, out.clone()]

        with as_on_a_gpu(), far_apart((self.ROWS, 70), self.STRIDE, torch.float16) as far:
            right = both(**{name: part.clone() for name, part in near.items()})
            far.copy_(near[which])
            found = both(**{**near, which: far})
            del far
        for one, other in zip(found, right, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)

    @pytest.mark.parametrize("operand", ["hidden", "weight"])
    def test_of_operands_that_are_multiplied(self, operand: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(launch, "described", lambda _: False)
        case = draw(tokens=(self.ROWS,), vocab=self.ROWS, dims=(16, 16), dtype=torch.float16)
        with as_on_a_gpu(), far_apart((self.ROWS, 16), self.STRIDE, torch.float16) as far:
            sweeps = sweeps_of(step_of(case, "jsd", dtype=torch.float16))
            right = sweeps.statistics("", False)
            hidden, weight, *head = sweeps.models[0]
            far.copy_(hidden if operand == "hidden" else weight)
            sweeps.models[0] = (far, weight, *head) if operand == "hidden" else (hidden, far, *head)
            found = sweeps.statistics("", False)
            sweeps.models[0] = ()
            del far
        torch.testing.assert_close(found, right, rtol=0, atol=0)

    def test_of_the_gradient_tile(self) -> None:
        case = draw(tokens=(self.ROWS,), vocab=40, dims=(16, 16), dtype=torch.float16)
        with as_on_a_gpu(), far_apart((self.ROWS, 40), self.STRIDE, torch.float16) as far:
            step = step_of(case, "jsd", dtype=torch.float16)
            near = torch.empty(self.ROWS, 40, dtype=torch.float16)
            for tile in (near, far):
                sweeps = sweeps_of(step, tile)
                stats = sweeps.statistics("", False)
                assert len(list(sweeps.gradients(stats, sweeps.sums(stats)))) == 1
            found = far.clone()
            del far, tile, sweeps
        assert near.abs().max() > 0
        torch.testing.assert_close(found, near, rtol=0, atol=0)


@triton.jit
def pair_kernel(lp_ptr, lq_ptr, d_ptr, value_ptr, slope_ptr, shares, PAIR: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    value, slope, _ = PAIR(tl.load(lp_ptr + at), tl.load(lq_ptr + at), tl.load(d_ptr + at), shares)
    tl.store(value_ptr + at, value)
    tl.store(slope_ptr + at, slope)


@pytest.mark.parametrize("temperature", [1.0, FLAT])
@pytest.mark.parametrize("name", kd.divergences())
def test_the_pair_functions_are_those_of_torch(name: str, temperature: float) -> None:
    lp, d = torch.rand(2, 256, generator=torch.Generator().manual_seed(0)) * -30
    d[:128] = torch.linspace(-0.2, 0.2, 128) if temperature == FLAT else 0.0
    lq = lp + d
    divergence, found = resolve(name), torch.empty(2, 256)
    shares, pair = divergence.shares(temperature), launch.pair_function(name, temperature)
    pair_kernel[(1,)](lp, lq, d, found[0], found[1], shares, PAIR=pair, BLOCK=256)
    for one, other in zip(found, divergence.pair(lp, lq, d, shares)[:2], strict=True):
        torch.testing.assert_close(one, other, rtol=16 * EPS, atol=30 * EPS)
    again = launch.pair_function(name, temperature * 1.5)
    assert again is pair, "another function would be compiled again"


def row_arguments(x: Tensor, z: Tensor, weight: Tensor, labels: Tensor | None = None) -> tuple[Any, ...]:
    loss = ("jsd", 0.3, 2.0, 1.5, 0.5 if labels is not None else 0.0, [0.75, 30.0, 1.25, 0.0])
    return x, z, None, None, labels, weight, torch.tensor(0.7), *loss


@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.bfloat16,) * 2], ids=str
)
def test_gradient_tiles_of_learners_lie_in_the_scratch(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Rows of an odd vocabulary have room behind them; a copy of the tile would be memory that no plan knows of."""
    step = step_of(large("jsd"), "jsd")
    steps = [replace(step, student=replace(step.student, dtype=dtype)) for dtype in dtypes]
    scratch = torch.empty(TOKENS, 192, dtype=torch.float32 if torch.float32 in dtypes else torch.bfloat16)
    tile = scratch[:, :VOCAB]
    rows_ = step.student.hidden, step.teacher.hidden
    for dtype, learner in zip(dtypes, vocabulary.FusedSweeps(steps, rows_, tile, torch.empty(0)).learners, strict=True):
        assert learner.tile.shape == (TOKENS, VOCAB)
        assert learner.tile.dtype == dtype
        assert learner.tile.data_ptr() == scratch.data_ptr()
        assert learner.tile.stride(0) * dtype.itemsize == scratch.stride(0) * scratch.itemsize


def tf32(values: np.ndarray) -> np.ndarray:
    """Rounded to the eleven digits that NVIDIA's matrix units take of a float32."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


def cut_off(exact: np.ndarray) -> np.ndarray:
    """float64 to float32, towards zero, as matrix units add."""
    near = exact.astype(np.float32)
    return np.where(np.abs(near.astype(np.float64)) > np.abs(exact), np.nextafter(near, np.float32(0)), near)


@pytest.mark.parametrize(("width", "times"), [(16, 1.95), (24, 2.4), (96, 4.9), (160, 6.4)])
def test_three_products_of_tf32_are_worse_than_float32_may_be(width: int, times: float) -> None:
    """Why vocabulary._product multiplies float32 as it is: the error of a logit, over that of a float32 product."""
    random = np.random.default_rng(0)
    left = random.standard_normal((64, width)).astype(np.float32)
    right = (random.standard_normal((width, 256)) * width**-0.5).astype(np.float32)
    upper, lower = (tf32(left), tf32(right)), (tf32(left - tf32(left)), tf32(right - tf32(right)))
    single, split = np.zeros((2, 64, 256), np.float32)
    for at in range(width):
        single = (single + left[:, at : at + 1].astype(np.float64) * right[at]).astype(np.float32)
    for at in range(0, width, 8):
        for one, other in ((lower[0], upper[1]), (upper[0], lower[1]), upper):
            split = cut_off(split + one[:, at : at + 8].astype(np.float64) @ other[at : at + 8].astype(np.float64))
    exact = left.astype(np.float64) @ right
    errors = [np.sqrt(np.mean((found - exact) ** 2)) for found in (split, single)]
    assert errors[0] / errors[1] == pytest.approx(times, rel=0.1)


@triton.jit
def log_kernel(v_ptr, found_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(found_ptr + at, functions.log(tl.load(v_ptr + at)))


@pytest.mark.parametrize("span", [(1e-9, 1e-3), (0.1, 0.5), (0.5, 1.0), (0.99, 1.01), (0.9999, 1.0)], ids=str)
def test_the_logarithm_loses_no_digit(span: tuple[float, float]) -> None:
    """1.2 units in the last place with fused operations, which the interpreter has not; near 1 too, relative to the result."""
    v = torch.empty(2**14).uniform_(*span, generator=torch.Generator().manual_seed(0))
    found = torch.empty_like(v)
    log_kernel[(1,)](v, found, BLOCK=len(v))
    assert ((found.double() - v.double().log()).abs() <= 1.25 * EPS * v.double().log().abs()).all()


def test_the_logarithm_of_one_is_zero_and_nan_stays() -> None:
    found = torch.empty(2)
    log_kernel[(1,)](torch.tensor([1.0, torch.nan]), found, BLOCK=2)
    assert found[0] == 0.0
    assert found[1].isnan()


@pytest.mark.parametrize("spread", [1.0, 10.0, 30.0])
@pytest.mark.parametrize("name", ["jsd", "skew_forward_kl", "skew_reverse_kl"])
def test_mixtures_of_close_distributions_are_as_good_as_eager(name: str, spread: float) -> None:
    """Where p is near q a biased logarithm would show in the value, which is almost 0, and in the gradient."""
    compared = {}
    for near in (1e-2, 1e-3):
        options = Options(name)
        cases = [replace(draw(seed, (8,), 301, (16, 16), spread, near=near), options=options) for seed in range(3)]
        exact, eager = [case.plain() for case in cases], [case.plain(torch.float32) for case in cases]
        with as_on_a_gpu():
            found = [case.run() for case in cases]
        compared[near] = ratios(found, eager, exact)
    assert_as_good_as_eager(compared)


@pytest.mark.parametrize(
    ("logits", "to", "width"),
    [
        (torch.float32, torch.bfloat16, 8),
        (torch.float32, torch.float32, 4),
        (torch.float32, None, 4),
        (torch.float16, torch.float16, 8),
        (torch.bfloat16, None, 8),
    ],
    ids=str,
)
def test_each_thread_takes_a_part_of_16_bytes(
    logits: torch.dtype, to: torch.dtype | None, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the narrowest tensor; of a part that two threads share, each sweep would shuffle the sums between them."""
    seen: list[dict[str, Any]] = []

    class Kernel:
        def __getitem__(self, _: Any) -> Callable[..., None]:
            return lambda *_, **keywords: seen.append(keywords)

    monkeypatch.setattr(rows, "row_loss_kernel", Kernel())
    x, z = torch.randn(2, 3, 96).to(logits)
    rows.row_loss(*row_arguments(x, z, torch.ones(3)), to is not None, False, None if to is None else torch.empty(3, 96, dtype=to))
    row = blocks.row_entry(CPU)
    assert seen[0]["WIDTH"] == width
    assert seen[0]["LANES"] * width == row.num_warps * 32 * row.entries
    # rows that start anywhere: a thread's part is one entry
    rows.row_loss(*row_arguments(*torch.randn(2, 3, 97).to(logits), torch.ones(3)), False, False)
    assert seen[1]["WIDTH"] == 1
    assert seen[1]["LANES"] == row.num_warps * 32 * rows.MOST_PARTS


class TestRows:
    def draw(self) -> tuple[Tensor, Tensor]:
        return tuple(torch.randn(2, 5, VOCAB, generator=torch.Generator().manual_seed(0)) * 3)  # type: ignore[return-value]

    @pytest.mark.parametrize("to", NATIVE_DTYPES)
    @pytest.mark.parametrize("dtype", NATIVE_DTYPES)
    def test_gradients_can_go_to_another_tensor_of_another_dtype(self, dtype: torch.dtype, to: torch.dtype) -> None:
        x, z = (part.to(dtype) for part in self.draw())
        before, labels = x.clone(), torch.arange(5) * 30
        out = torch.full((5, VOCAB), torch.nan, dtype=to)
        wide = x.float().clone()
        with as_on_a_gpu():
            columns = rows.row_loss(*row_arguments(x, z, torch.ones(5), labels), True, True, out)
            right = rows.row_loss(*row_arguments(wide, z, torch.ones(5), labels), True, True)
        torch.testing.assert_close(x, before, rtol=0, atol=0)
        torch.testing.assert_close(columns, right, rtol=0, atol=0)
        torch.testing.assert_close(out, wide.to(to), rtol=0, atol=0)

    @pytest.mark.parametrize("name", ["forward_kl", "jsd"])
    @pytest.mark.parametrize("metrics", [False, True])
    def test_rows_of_weight_zero_write_zeros_and_are_not_read(self, metrics: bool, name: str) -> None:
        x, z = self.draw()
        weight = torch.tensor([1.0, 0.0, 2.0, 0.0, -0.0])
        live, labels = weight != 0, torch.arange(5) * 30
        with as_on_a_gpu():
            kept = x[live].clone()
            arguments = list(row_arguments(kept, z[live], weight[live], labels[live]))
            arguments[7] = name
            with metered() as alone:
                right = rows.row_loss(*arguments, True, metrics)
            x[~live], z[~live] = torch.nan, torch.inf
            arguments[:2], arguments[4:6] = (x, z), (labels, weight)
            with metered() as meter:
                columns = rows.row_loss(*arguments, True, metrics)
        assert (x[~live] == 0).all()
        assert (columns[~live] == 0).all()
        torch.testing.assert_close(x[live], kept, rtol=0, atol=0)
        torch.testing.assert_close(columns[live], right, rtol=0, atol=0)
        per_row = meter.loaded.total() - alone.loaded.total()
        assert per_row <= 3 * (4 + 4 + 8), "of a dropped row its weight, its label and t are read, and no logit"

    @pytest.mark.parametrize("name", kd.divergences())
    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    def test_a_bad_target_makes_the_whole_gradient_nan(self, bad: float, name: str) -> None:
        """A slope that only compares would hide it."""
        x, z = self.draw()
        z[1, 140] = bad
        arguments = list(row_arguments(x, z, torch.ones(5)))
        arguments[7], arguments[-1] = name, [1.0, 0.0, 1.0, 0.0]
        with as_on_a_gpu():
            columns = rows.row_loss(*arguments, True, False)
        assert columns[:, 0].isnan().tolist() == x.isnan().all(1).tolist() == [False, True, False, False, False]
        assert not x[[0, 2, 3, 4]].isnan().any()

    def test_no_rows_are_no_launch(self) -> None:
        with as_on_a_gpu():
            columns = rows.row_loss(*row_arguments(torch.empty(0, 37), torch.empty(0, 37), torch.empty(0)), True, False)
        assert columns.shape == (0, len(ROW_COLUMNS))

    @pytest.mark.parametrize("row", [32, 256])
    @pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
    def test_every_size_of_tile(self, name: str, row: int) -> None:
        x, z = self.draw()
        arguments = list(row_arguments(x.clone(), z, torch.linspace(-1, 2, 5), torch.arange(5) * 30))
        arguments[7] = name
        right = reference.row_loss(*arguments, True, True)
        dx = arguments[0]
        arguments[0] = x
        with as_on_a_gpu(row=row):
            columns = rows.row_loss(*arguments, True, True)
        torch.testing.assert_close(columns, right, rtol=VOCAB * EPS, atol=VOCAB * EPS)
        torch.testing.assert_close(x, dx, rtol=0, atol=VOCAB * EPS * dx.abs().max().item())


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
    def step(name, dtype, metrics, dress=""):
        made = make_step(name, dtype, metrics, dress)
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
        for matrix in (entry.statistics, entry.sums, entry.gradient, entry.roomy or entry.sums):
            for size in (matrix.block_n, matrix.block_v, matrix.block_d):
                assert size >= 16
                assert size & (size - 1) == 0, "a power of two"
            assert matrix.block_n <= 256
            assert matrix.block_v <= 256, "a descriptor's box has no more rows"
            assert matrix.options() == {"num_warps": matrix.num_warps, "num_stages": matrix.num_stages}
        assert entry.row.entries & (entry.row.entries - 1) == 0
        assert entry.row.entries % launch.ENTRIES == 0, "accesses of 16 bytes, whatever the dtype"

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


class TestBackends:
    @pytest.fixture
    def here(self, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
        def set_up(installed: bool, gpu: bool, interpreter: bool = False) -> None:
            monkeypatch.setattr(backends, "_triton_installed", lambda: installed)
            monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
            monkeypatch.setenv("TRITON_INTERPRET", "1" if interpreter else "0")

        return set_up

    @pytest.mark.parametrize(
        ("installed", "gpu", "interpreter", "expected"),
        [
            (True, True, False, "triton"),
            (True, False, True, "triton"),
            (True, False, False, "reference"),
            (False, True, False, "reference"),
            (False, True, True, "reference"),
        ],
    )
    def test_which_one_runs_on_a_gpu(
        self, installed: bool, gpu: bool, interpreter: bool, expected: str, here: Callable[..., None]
    ) -> None:
        here(installed, gpu, interpreter)
        for dtype in NATIVE_DTYPES:
            assert kd.backend("cuda", dtype) == expected
        assert kd.backend("cuda", torch.float64) == "reference"
        assert ("triton" in backends.usable()) == (expected == "triton")
        assert kd.backend("cpu") != "triton"

    def test_one_that_is_not_usable_is_refused_by_name(self, here: Callable[..., None]) -> None:
        here(False, True)
        with pytest.raises(ValueError, match=r"backend 'triton' is not usable here; accepted: .*reference"), backends.use("triton"):
            pass
        with pytest.raises(ValueError, match=r"backend 'cuda' is not usable here"), backends.use("cuda"):
            pass

    def test_what_was_asked_for_ends_with_the_block(self) -> None:
        before, inside = kd.backend(), []

        def fails() -> None:
            inside.extend([kd.backend(), kd.backend("cpu", torch.float64)])
            raise RuntimeError("inside")

        with pytest.raises(RuntimeError, match="inside"), backends.use("triton"):
            fails()
        assert inside == ["triton", "triton"]
        assert kd.backend() == before

    def test_it_needs_no_triton_until_it_is_asked_for(self) -> None:
        script = """
            import sys
            sys.modules["triton"] = None  # import triton: ModuleNotFoundError
            import torch, kdkernels as kd
            x = torch.randn(3, 8, requires_grad=True)
            kd.linear_kd_loss(x, torch.randn(9, 8), torch.randn(3, 4), torch.randn(9, 4), strategy="vocab").backward()
            assert "kdkernels.backends.triton" not in sys.modules
        """
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, cwd=ROOT,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr

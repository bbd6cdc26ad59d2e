"""Operands of the kernels: descriptors or pointers, rows that lie far apart, gradients in the scratch."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.support.cases import NATIVE_DTYPES, draw, ratios
from tests.support.kernels import CPU, DIMS, TOKENS, VOCAB, assert_close, large, run, step_of, sweeps_of
from tests.support.oracle import Options

triton = pytest.importorskip("triton", reason="Triton is not installed")
from kdkernels.backends.triton import arch, launch, rows, vocabulary  # noqa: E402
from kdkernels.backends.triton.blocks import Matrix  # noqa: E402
from tests.support.interpreter import as_on_a_gpu  # noqa: E402


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
        monkeypatch.setattr(arch, "architecture", lambda _: architecture)
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

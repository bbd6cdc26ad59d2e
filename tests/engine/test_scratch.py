"""Where memory for the logits is not there the error says what would take less, nothing is left half done, the next call works.

On Linux a real limit shows it: RLIMIT_AS, in a process of its own.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch

import kdkernels as kd
from kdkernels.engine import scratch

LIMITED = """
import resource, sys
import torch
import kdkernels as kd
from kdkernels.engine import scratch

strategy, topk = sys.argv[1], sys.argv[2] == "topk"
tokens, vocab, dim = 2048, 8192, 4
generator = torch.Generator().manual_seed(0)
hidden, weight, z, head = (torch.randn(rows, dim, generator=generator) for rows in (tokens, vocab, tokens, vocab))
given = (z.new_zeros(tokens, 1, dtype=torch.int64), z.new_zeros(tokens, 1)) if topk else (z, head)
loss = kd.linear_topk_kd_loss if topk else kd.linear_kd_loss

def run(budget):
    learned = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    value = loss(*learned, *given, strategy=strategy, memory_budget=budget)
    value.backward()
    return value.item(), learned[1].grad

small = 2**20
before, grad = run(small)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
limit = used + 48 * 2**20  # below the logits of one model, 64 MiB
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    run(2**62)
except torch.OutOfMemoryError as error:
    print(error)
else:
    raise AssertionError("there was enough")
assert scratch._held is None
assert not scratch._lock.locked()
after, again = run(small)
assert after == before
assert torch.equal(grad, again)
assert scratch._held is not None
assert scratch._held.numel() < 48 * 2**20
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a limit on memory that makes an allocation fail is Linux's")
@pytest.mark.parametrize("loss", ["linear", "topk"])
@pytest.mark.parametrize("strategy", ["tokens", "vocab"])
def test_too_little_memory_is_an_error_that_says_what_takes_less(strategy: str, loss: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(LIMITED), strategy, loss],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    logits = 2048 * 8192 * 4 * (1 if loss == "topk" else 2)
    block = 4 * 8192 * 4
    assert f"wants {logits + block} bytes on cpu" in done.stdout
    assert f"memory_budget is {2**62} bytes, and a smaller memory_budget takes less" in done.stdout
    assert "DefaultCPUAllocator: can't allocate memory" in done.stdout  # by which a search for a batch size knows it


def asked(monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[int]:
    """Sizes of the scratch that a loss allocates."""
    sizes, allocate = [], scratch._allocate

    def noted(size: int, *rest: Any) -> torch.Tensor:
        sizes.append(size)
        return allocate(size, *rest)

    monkeypatch.setattr(scratch, "_allocate", noted)
    kd.free_scratch()
    x, weight = torch.randn(10, 4), torch.randn(50, 4)
    kd.linear_kd_loss(x, weight, x, weight, **options)
    return sizes


@pytest.mark.parametrize("strategy", ["tokens", "vocab", "auto"])
def test_no_budget_makes_it_ask_for_more_than_all_logits(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, block, roundings = 2 * 4 * 10 * 50, 4 * 50 * 4, 3 * 64
    (size,) = asked(monkeypatch, strategy=strategy, memory_budget=2**62)
    assert logits + block <= size <= logits + block + roundings


def tiles_on(device: str, *tiles: tuple[tuple[int, int], torch.dtype]) -> list[torch.Tensor]:
    with scratch.borrowed(33, list(tiles), 2**30, torch.device(device)) as (buffer, found):
        assert buffer.shape == (33,)
        return found


@pytest.mark.parametrize("columns", [50_257, 64, 65, 130, 50, 1])
def test_rows_of_a_gpus_tiles_start_at_whole_cache_lines_and_a_cpus_lie_close(columns: int) -> None:
    """An odd vocabulary's too. On a device without data, which is not a CPU."""
    shapes = [((3, columns), dtype) for dtype in (torch.float32, torch.float32, torch.bfloat16)]
    for tile, (shape, dtype) in zip(tiles_on("meta", *shapes), shapes, strict=True):
        assert (tile.shape, tile.dtype) == (shape, dtype)
        assert tile.storage_offset() * dtype.itemsize % 128 == 0
        if columns >= 64:
            assert tile.stride(0) * dtype.itemsize % 128 == 0
            assert tile.stride(0) - columns < 64
        else:
            assert tile.is_contiguous(), "few columns, of which a little budget may hold no more"
    assert all(tile.is_contiguous() for tile in tiles_on("cpu", *shapes))


def test_what_lies_between_the_rows_of_a_gpus_tiles_is_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was there: a matrix library may read the entry past a row of odd length, and NaN times 0 is NaN."""
    row_stride = scratch.row_stride
    monkeypatch.setattr(scratch, "row_stride", lambda columns, _: row_stride(columns, torch.device("cuda")))
    monkeypatch.setattr(scratch, "_allocate", lambda size, *_: torch.full((size,), 0xFF, dtype=torch.uint8))
    kd.free_scratch()
    try:
        for tile in tiles_on("cpu", ((3, 101), torch.bfloat16), ((3, 101), torch.float32)):
            rows = tile.as_strided((3, 128), (128, 1))
            assert rows[:, 101:].eq(0).all()
            assert rows[:, :101].isnan().all()
    finally:
        kd.free_scratch()


def test_no_tile_of_a_gpu_reaches_into_another() -> None:
    shapes = [((5, 70), dtype) for dtype in (torch.float32, torch.bfloat16, torch.float32)]
    found = tiles_on("meta", *shapes)
    begins = [tile.storage_offset() * tile.itemsize for tile in found]
    ends = [begin + (4 * tile.stride(0) + 70) * tile.itemsize for begin, tile in zip(begins, found, strict=True)]
    assert begins[0] >= 33 * 4
    assert ends[0] <= begins[1]
    assert ends[1] <= begins[2]
    assert ends[2] <= found[0].untyped_storage().nbytes()


def test_a_gpus_error_keeps_its_type_and_others_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    for raised, kept in (
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), False),
        (RuntimeError("HIP out of memory"), False),
        (RuntimeError("something else"), True),
    ):

        def fails(*_: Any, error: Exception = raised, **__: Any) -> None:
            raise error

        monkeypatch.setattr(torch, "empty", fails)
        with pytest.raises(RuntimeError) as caught:
            scratch._allocate(100, 7, torch.device("cpu"))
        monkeypatch.undo()
        if kept:
            assert caught.value is raised
        else:
            assert type(caught.value) is torch.OutOfMemoryError
            assert "memory_budget is 7 bytes" in str(caught.value)
            assert str(raised) in str(caught.value)
            assert caught.value.__cause__ is raised
            assert len(caught.value.args) == 1

"""Ranks write together, each its own batch, under DistributedDataParallel and FSDP2."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.processes import run_apart

pytest.importorskip("transformers")

DISTRIBUTED = """
import os
import sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from kdkernels.transformers.on_policy import OnPolicy
from tests.support.writing import Parrot, data, lively, responses, rows, written

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)


def sharded(model):
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


# Each rank's text is what the model writes alone; where one has nothing to write, or ends early, the other goes on.
silent = data()
silent["labels"].fill_(-100)
free = responses(written(lively("llama"), data(), top_k=1, max_new_tokens=6))
for wrap, synced in ((DistributedDataParallel, False), (sharded, True)):
    wrapped = wrap(lively("llama"))
    for batch, ends in ((data(), []), (data() if rank else silent, []), (data(), [one[0] for one in free] if rank else [])):
        options = {"eos_token_id": ends or None, "max_new_tokens": 6, "top_k": 1}
        found, source = OnPolicy(1.0, **options).batch(wrapped, batch, step=0, micro=0, progress=0.0, rank=rank, synced=synced)
        if batch is silent:
            assert source == "data"
        else:
            assert rows(found) == rows(written(lively("llama"), batch, rank=rank, **options))
    wrapped(**found).loss.backward()

# One rank's prompts have one length, the other's three: of a model that is asked once for each.
found, _ = OnPolicy(1.0, top_k=1, max_new_tokens=4).batch(
    lively("rwkv"), data((3, 6, 1) if rank else (2, 2, 2)), step=0, micro=0, progress=0.0, rank=rank, synced=True
)
assert [len(one) for one in responses(found)] == [4, 4, 4]

# A buffer counts as full when all are.
writer, half = OnPolicy(1.0, schedule="adaptive", replay_size=6), data()
half["labels"][rank:] = -100  # nothing to write on rank 0, one row on rank 1
sources = []
for step in range(4):
    sources.append(writer.batch(Parrot(), data() if rank == 0 or step else half, step=step, micro=0, progress=1.0, rank=rank)[1])
assert sources == ["generated"] * 3 + ["replayed"], sources
dist.barrier()
dist.destroy_process_group()
os._exit(0)  # threads of gloo that outlive the group may ask for the interpreter while it ends, which aborts
"""


def test_ranks_write_together_under_ddp_and_fsdp(tmp_path: Any) -> None:
    run_apart(DISTRIBUTED, *([str(rank), str(tmp_path / "store")] for rank in (0, 1)))

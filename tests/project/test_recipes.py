"""The loops of docs/recipes.md on two processes: the weights of one process, and what the page says of bfloat16."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from tests.support import ROOT
from tests.support.pages import blocks
from tests.support.processes import run_apart

PAGE = ROOT / "docs" / "recipes.md"
SETUP = 2  # blocks before the first section
RANKS = 2
ALONE = "A loop of your own"
PAIRS = ("DistributedDataParallel", "FSDP2", "Accelerate")  # each step takes a batch of either rank
SPLIT = "Several processes that share a vocabulary"  # each step takes one batch, the same on both


def code(section: str) -> str:
    """Of a section, with the blocks that all of them need before it."""
    (text,) = re.findall(rf"^## {section}\n.*?(?=^## |\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    own = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    both = [*own] if section != "FSDP2" else [code("DistributedDataParallel").partition("dist.init_process_group")[0], *own]
    setup = [content for language, content in blocks(PAGE) if language == "python"][:SETUP]
    return "\n".join([*setup, *both])


# Changes of the code, of which the page speaks.
STEP = "loss = distillation_loss(student, batch, tokens) * ranks  # gradients are averaged over the ranks\n"
HALVES = f"""first, last = ({{name: part[rows] for name, part in batch.items()}} for rows in (slice(0, 2), slice(2, 4)))
        with student.no_sync():
            (distillation_loss(student, first, tokens) * ranks).backward()
        {STEP.replace("batch", "last")}"""
SHARDED_TEACHER = (
    "student = tiny(32, seed=1)\nfor layer in student.model.layers:",
    "student = tiny(32, seed=1)\nfor layer in teacher.model.layers: fully_shard(layer)\nfully_shard(teacher)\n"
    "for layer in student.model.layers:",
)
POLICY = "mp_policy=torch.distributed.fsdp.MixedPrecisionPolicy(param_dtype=torch.bfloat16)"
SHARDS = [("fully_shard(layer)", f"fully_shard(layer, {POLICY})"), ("fully_shard(student)", f"fully_shard(student, {POLICY})")]
HEAD_APART = ("fully_shard(student", f"fully_shard(student.lm_head, {POLICY}); fully_shard(student")
IN_BFLOAT16 = {
    "Accelerate": [("Accelerator(cpu=True)", "Accelerator(cpu=True, mixed_precision='bf16')")],
    "The Trainer of transformers": [
        ("use_cpu=True", "use_cpu=True, bf16=True"),
        ("loss = distillation_loss(model", "with self.accelerator.autocast(): loss = distillation_loss(model"),
    ],
    "FSDP2": [*SHARDS, ("dist.destroy_process_group()", "")],
}


def run(section: str, *replaced: tuple[str, str]) -> dict[str, Any]:
    """The names that a section leaves, with some of its text replaced."""
    text, scope = code(section), {}
    for old, new in replaced:
        assert old in text, old
        text = text.replace(old, new)
    exec(compile(text, section, "exec"), scope)
    return scope


def weights(scope: dict[str, Any]) -> dict[str, Tensor]:
    named = scope["student"].named_parameters()
    whole = {name.removeprefix("module."): one.full_tensor() if hasattr(one, "full_tensor") else one for name, one in named}
    if "student_rows" in scope:  # of this rank
        whole["lm_head.weight"] = scope["student_rows"]
    return {name: one.detach().clone() for name, one in whole.items()}


RANK = """
import os, sys
from pathlib import Path
import torch

rank, folder, *ports = sys.argv[1:]
os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
from tests.project.test_recipes import HALVES, PAIRS, SHARDED_TEACHER, SPLIT, STEP, run, weights

for section, port in zip((*PAIRS, SPLIT, "no_sync", "sharded teacher"), ports, strict=True):
    os.environ["MASTER_PORT"] = port
    # the page ends its group; FSDP's weights are gathered before that
    replaced = [] if section == "Accelerate" else [("dist.destroy_process_group()", "")]
    if section == "no_sync":
        found = run("DistributedDataParallel", *replaced, (STEP, HALVES))
    elif section == "sharded teacher":
        found = run("FSDP2", *replaced, SHARDED_TEACHER)
    else:
        found = run(section, *replaced)
    torch.save(weights(found), Path(folder) / f"{section}-{rank}.pt")
    torch.distributed.destroy_process_group()
"""
BFLOAT16 = """
import os, sys
import pytest
import torch

os.chdir(sys.argv[1])
os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
from tests.project.test_recipes import HEAD_APART, IN_BFLOAT16, SHARDS, STEP, run

for section, changes in IN_BFLOAT16.items():
    run(section, *changes)
in_group = ("dist.init_process_group", "#")
with pytest.raises(TypeError, match="student_hidden and student_head are torch.bfloat16 and torch.float32"):
    run("FSDP2", in_group, *SHARDS, HEAD_APART)
run("FSDP2", in_group, *SHARDS, HEAD_APART, (STEP, f"with torch.autocast('cpu', torch.bfloat16): {STEP}"))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place, sockets = tmp_path_factory.mktemp("recipes"), [socket.socket() for _ in range(len(PAIRS) + 3)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [str(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    run_apart(RANK, *([str(rank), str(place), *ports] for rank in range(RANKS)))
    return place


def ends(folder: Path, section: str) -> list[dict[str, Tensor]]:
    return [torch.load(folder / f"{section}-{rank}.pt", weights_only=True) for rank in range(RANKS)]


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("section", PAIRS)
def test_two_ranks_do_what_one_process_does_with_two_micro_batches(section: str, folder: Path) -> None:
    first, second = ends(folder, section)
    assert all(torch.equal(one, second[name]) for name, one in first.items())
    close(first, weights(run(ALONE)))


def test_ranks_that_share_the_vocabulary_do_what_one_process_does(folder: Path) -> None:
    first, second = ends(folder, SPLIT)
    heads = [one.pop("lm_head.weight") for one in (first, second)]
    assert all(torch.equal(one, second[name]) for name, one in first.items())
    alone = run(ALONE, ("zip(batches[::2], batches[1::2])", "zip(batches)"))
    close({**first, "lm_head.weight": torch.cat(heads)}, weights(alone))


@pytest.mark.parametrize(("changed", "section"), [("no_sync", "DistributedDataParallel"), ("sharded teacher", "FSDP2")])
def test_micro_batches_under_no_sync_and_a_sharded_teacher_change_nothing(changed: str, section: str, folder: Path) -> None:
    for one, other in zip(ends(folder, changed), ends(folder, section), strict=True):
        close(one, other)


def test_in_bfloat16_each_loop_takes_what_the_page_says_of_it(tmp_path: Path) -> None:
    run_apart(BFLOAT16, [str(tmp_path)])

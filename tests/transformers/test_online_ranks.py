"""OKD's teacher on two processes, plain and sharded: one teacher, trained as one process would."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.processes import run_apart

pytest.importorskip("transformers")
pytest.importorskip("peft")

DISTRIBUTED = """
import sys
import safetensors.torch
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch import Tensor
from kdkernels.transformers.online import OnlineTeacher
from tests.support.online import ADAMW, backward, losses
from tests.support.processes import run_apart
from tests.support.tiny_models import build
from tests.support.training import assert_same


def save_to(state, path):
    torch.save(state, path)
    return path


rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))


def assert_same_in_both(state):
    both = [None, None]
    dist.all_gather_object(both, state)
    assert_same(both[0], both[1])


def training(family, dtype, sharded, state=None):
    teacher = OnlineTeacher(build(family, seed=5).to(dtype), rank=3)
    if sharded:
        teacher.checkpoint_activations()
        teacher.shard(mesh)
        assert len([m for m in teacher.model.modules() if type(m).__name__.startswith("FSDP")]) == 3
        assert all(hasattr(parameter, "device_mesh") for parameter in teacher.parameters())
    teacher.optimize_with(*ADAMW, 1e-2)
    if state is not None:
        teacher.load_state_dict(state)
    return teacher


def step(teacher, seed):
    student = build("llama", seed=2).to(teacher.model.dtype)
    losses(student, teacher, seed + 10 * rank).teacher.backward()
    return teacher.step(1.0, 0.5)


def alone(teacher, seed):
    # Both processes' batches in one: the mean of their losses, clipped and stepped without the code under test
    student = build("llama", seed=2).to(teacher.model.dtype)
    for other in range(2):
        (losses(student, teacher, seed + 10 * other).teacher / 2).backward()
    parameters = teacher.parameters()
    norm = torch.cat([p.grad.flatten() for p in parameters]).square().sum().sqrt()
    for p in parameters:
        p.grad *= min(1.0, 0.5 / float(norm))
    teacher._optimizer.step()
    teacher._optimizer.zero_grad()
    return norm


for family, dtype, sharded in (("llama", torch.float64, False), ("gpt2", torch.float64, True), ("llama", torch.bfloat16, True)):
    expected, teacher = training(family, dtype, False), training(family, dtype, sharded)
    for seed in range(3):
        expected_norm, norm = alone(expected, seed), step(teacher, seed)
        assert not hasattr(norm, "full_tensor")
        if dtype is torch.float64:
            torch.testing.assert_close(norm, expected_norm, rtol=1e-6, atol=0)
    state = teacher.state_dict()
    if dtype is torch.float64:
        torch.testing.assert_close(state["lora"], expected.state_dict()["lora"], rtol=1e-4, atol=1e-7)
    assert_same_in_both(state)
    assert {type(tensor) for tensor in state["lora"].values()} == {Tensor}

    # interrupted = uninterrupted, and the same state in shards and whole
    teacher_again = training(family, dtype, sharded, torch.load(save_to(state, f"{store}.{rank}"), weights_only=True))
    assert_same(teacher_again.state_dict(), state)
    whole_teacher = training(family, dtype, False, state)
    assert_same(whole_teacher.state_dict(), state)
    for seed in range(3, 5):
        assert torch.equal(step(teacher_again, seed), step(teacher, seed))
    assert_same(teacher_again.state_dict(), teacher.state_dict())

    # a scaled loss that overflows in one process is left out by both
    before = teacher.state_dict()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    backward(teacher, 1, float("inf") if rank == 1 else 1024.0)
    teacher.step(1.0, 0.5, scaler)
    scaler.update()
    assert scaler.get_scale() == 512.0
    assert_same(teacher.state_dict()["lora"], before["lora"])

    teacher.save(f"{store}.adapter")
    dist.barrier()
    saved = safetensors.torch.load_file(f"{store}.adapter/adapter_model.safetensors")
    assert_same(list(saved.values()), [before["lora"][name.replace(".weight", ".default.weight")] for name in saved])
    dist.barrier()

    if not sharded:  # a parameter that took part in one process only
        first = next(iter(teacher.named_parameters()))
        backward(teacher, rank)
        if rank == 1:
            teacher.parameters()[0].grad = None
        teacher.step(1.0, None)
        after = teacher.state_dict()
        assert_same_in_both(after)
        assert not torch.equal(after["lora"][first], before["lora"][first])
dist.destroy_process_group()
"""


def test_two_processes_train_one_teacher_plain_and_sharded(tmp_path: Any) -> None:
    run_apart(DISTRIBUTED, *([str(rank), str(tmp_path / "store")] for rank in (0, 1)))

"""``KDTrainer`` on two gloo processes, under DistributedDataParallel and FSDP2: as one process with batches twice as large."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from kdkernels.transformers import KDTrainer
from tests.support.training import BATCH, examples, logs, models, settings, weights

RANKS, STEPS = 2, 4
METHODS: dict[str, dict[str, Any]] = {
    "taid": {"method": "taid", "taid_alpha": 0.1},
    "okd": {"method": "okd", "okd_learning_rate": 3e-2},
    "distillm": {
        "method": "jsd",
        "on_policy_fraction": 0.7,
        "on_policy_schedule": "adaptive",
        "on_policy_max_new_tokens": 4,
        "replay_buffer_size": 6,
        "eval_strategy": "steps",
        "eval_steps": 1,
    },
}
SHARDED = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "state_dict_type": "FULL_STATE_DICT"}


def trained(folder: Path, method: str, kind: str, *, resume: bool = False, **more: Any) -> dict[str, Any]:
    """A run's end: weights of both models (whole), logs, an evaluation; with ``resume`` it goes on from its second checkpoint."""
    student, teacher = models(torch.float32)
    given = {**METHODS[method], "max_steps": STEPS, "max_grad_norm": 0.5, "save_strategy": "steps", "save_steps": 2, **more}
    if kind != "alone":
        given["ddp_backend"] = "gloo"
    if kind == "fsdp":
        given |= {"fsdp": True, "fsdp_config": {**SHARDED, "cpu_ram_efficient_loading": False}}
    args = settings(folder, **given)
    if kind == "fsdp":
        # accelerate shards on GPUs only, and takes several processes on CPUs for DistributedDataParallel. With this word for the
        # kind of processes it goes the GPUs' way; nothing else of it depends on the word.
        from accelerate import DistributedType, PartialState

        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    data, held_out = examples(RANKS * BATCH * 2 * STEPS), examples(7, seed=5)
    trainer = KDTrainer(student, args, train_dataset=data, eval_dataset=held_out, teacher=teacher)
    assert trainer.is_fsdp_enabled == (kind == "fsdp")
    if kind != "fsdp":  # transformers shards when it trains, and evaluates no FSDP2 model before
        trainer.evaluate()  # changes nothing
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resume else None)
    state = trainer.accelerator.get_state_dict(trainer.model)
    evaluation = trainer.evaluate()
    found = {
        "student": {name: tensor.clone() for name, tensor in state.items()} if state else {},
        "teacher": {} if trainer.online is None else trainer.online.state_dict()["lora"],
        "logs": logs(trainer),
        "evaluation": {name: evaluation[name] for name in evaluation if not name.endswith(("_time", "_runtime", "_second"))},
        "t": 1.0 if trainer.taid is None else float(trainer.taid.t),
    }
    trainer.accelerator.free_memory()
    return found


RANK = """
import sys
from pathlib import Path

import torch
from tests.transformers.test_trainer_ranks import METHODS, trained

rank, folder = sys.argv[1], Path(sys.argv[2])
for kind in ("ddp", "fsdp"):
    for method in METHODS:
        runs = [trained(folder / kind / method, method, kind, resume=resume) for resume in (False, True)]
        torch.save(runs, folder / f"{kind}-{method}-{rank}.pt")
torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both ranks' results of all runs."""
    place = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    paths = {"PYTHONPATH": os.pathsep.join(sys.path)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(place)],
            env={**os.environ, **shared, **paths, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
        )
        for rank in range(RANKS)
    ]
    try:
        assert [process.wait(timeout=500) for process in started] == [0] * RANKS
    finally:
        for process in started:
            process.kill()
    return place


def ends(folder: Path, kind: str, method: str) -> list[list[dict[str, Any]]]:
    """[rank][uninterrupted, resumed]."""
    return [torch.load(folder / f"{kind}-{method}-{rank}.pt", weights_only=True) for rank in range(RANKS)]


def close(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for part in ("student", "teacher"):
        assert found[part].keys() == expected[part].keys()
        for name, tensor in expected[part].items():
            # Adam divides by what may be rounding alone: a few entries may differ by more than others
            torch.testing.assert_close(found[part][name], tensor, rtol=1e-3, atol=2e-4)
    for one, other in zip(found["logs"], expected["logs"], strict=True):
        assert one == pytest.approx(other, rel=1e-3)
    assert found["evaluation"] == pytest.approx(expected["evaluation"], rel=1e-3)
    assert found["t"] == pytest.approx(expected["t"], rel=1e-5)


@pytest.mark.parametrize("method", ["taid", "okd"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_ranks_are_one_with_batches_twice_as_large(kind: str, method: str, folder: Path, tmp_path: Path) -> None:
    """Seven held-out examples do not divide among them, and each counts once."""
    alone = trained(tmp_path, method, "alone", per_device_train_batch_size=RANKS * BATCH)
    whole = ends(folder, kind, method)[0][0]
    close(whole, alone)
    if method == "okd":
        assert max(float(tensor.abs().max()) for name, tensor in whole["teacher"].items() if "lora_B" in name) > 1e-2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_the_ranks_agree_and_an_interrupted_run_is_the_uninterrupted_one(kind: str, method: str, folder: Path) -> None:
    (first, resumed), (second, also_resumed) = ends(folder, kind, method)
    for one, other in ((first, second), (resumed, also_resumed)):
        assert one["t"] == other["t"]
        assert one["evaluation"] == other["evaluation"]
        assert all(torch.equal(tensor, other["teacher"][name]) for name, tensor in one["teacher"].items())
        for name in other["student"]:  # FSDP gives the whole to the first rank alone
            assert torch.equal(one["student"][name], other["student"][name])
    for part in ("student", "teacher"):
        assert first[part].keys() == resumed[part].keys()
        assert all(torch.equal(tensor, resumed[part][name]) for name, tensor in first[part].items())
    assert first["t"] == resumed["t"]
    assert [entry["loss"] for entry in first["logs"][2:]] == [entry["loss"] for entry in resumed["logs"][2:]]


def test_weights_of_the_runs_are_not_those_of_the_start(folder: Path) -> None:
    start = weights(models(torch.float32)[0])
    for kind in ("ddp", "fsdp"):
        for method in METHODS:
            end = ends(folder, kind, method)[0][0]["student"]
            assert end.keys() == start.keys()
            assert not any(torch.equal(tensor, start[name]) for name, tensor in end.items() if tensor.dim() == 2)

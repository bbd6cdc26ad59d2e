"""TRL's trainers with the fused loss beside the same trainers without it, on tiny models; and the patch itself."""

from __future__ import annotations

import itertools
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl")
pytest.importorskip("datasets")
pytest.importorskip("peft")
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from kdkernels.compat import trl as compat
from tests.support.tiny_models import build
from tests.support.trl import (
    DOUBLE,
    HALF,
    TRAINERS,
    Pair,
    assert_same_run,
    batch,
    both_trainers,
    child_environment,
    compare,
    data,
    family,
    loss_and_gradients,
    models,
    run,
    trainer_of,
)


class TestRuns:
    @both_trainers
    @pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
    def test_a_run_is_the_same_run(self, kind: str, beta: float, tmp_path: Path) -> None:
        """Accumulated micro-batches, prompts and padding that do not count, a temperature; what is logged, and what is learned."""
        compare(kind, tmp_path, args={"beta": beta})

    def test_what_the_student_writes(self, tmp_path: Path) -> None:
        expected = run("gkd", tmp_path, args={"max_steps": 1})
        found = compare("gkd", tmp_path, args={"lmbda": 1.0, "max_steps": 1})
        assert found["logs"][0]["loss"] != expected["logs"][0]["loss"]

    @both_trainers
    def test_adapters_of_peft(self, kind: str, tmp_path: Path) -> None:
        def pair() -> Pair:
            student, teacher = models()
            torch.manual_seed(3)
            config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
            return get_peft_model(student, config).double(), teacher

        found = compare(kind, tmp_path, pair, args={"max_steps": 2})
        assert any("lora_" in name for name in found["student"])

    @both_trainers
    def test_a_head_tied_to_the_embeddings(self, kind: str, tmp_path: Path) -> None:
        compare(kind, tmp_path, lambda: models("llama_tied"), args={"max_steps": 2})

    @both_trainers
    def test_without_gradient_checkpointing(self, kind: str, tmp_path: Path) -> None:
        compare(kind, tmp_path, args={"max_steps": 1, "gradient_checkpointing": False})

    @both_trainers
    def test_bfloat16_is_where_it_was(self, kind: str, tmp_path: Path) -> None:
        """GKDTrainer runs in autocast. DistillationTrainer does not, whatever ``bf16`` says, and nor does its patched loss."""

        def pair() -> Pair:
            return models(dtype=torch.float32)

        tolerance = torch.finfo(torch.bfloat16).eps if kind == "gkd" else HALF
        half = compare(kind, tmp_path, pair, tolerance, args={"max_steps": 2, "bf16": True})
        single = run(kind, tmp_path, pair=pair(), args={"max_steps": 1})
        difference = abs(half["logs"][0]["loss"] / single["logs"][0]["loss"] - 1)
        assert (difference > 16 * torch.finfo(torch.float32).eps) == (kind == "gkd")

    @both_trainers
    def test_evaluations(self, kind: str, tmp_path: Path) -> None:
        found = []
        for block in (nullcontext(), TRAINERS[kind][1]()):
            with block:
                found.append(trainer_of(kind, tmp_path, eval_dataset=data(kind, 6)).evaluate())
        expected, ours = ({name: value for name, value in one.items() if not name.endswith(("time", "second"))} for one in found)
        assert ours == pytest.approx(expected, rel=DOUBLE if kind == "gkd" else HALF)
        assert ("eval_entropy" in ours) == (kind == "distillation")

    def test_metrics_of_the_users_own_get_logits(self, tmp_path: Path) -> None:
        def accuracy(prediction: Any) -> dict[str, float]:
            logits, labels = torch.as_tensor(prediction.predictions), torch.as_tensor(prediction.label_ids)
            counted = labels[:, 1:] != -100
            return {"accuracy": float((logits[:, :-1].argmax(-1) == labels[:, 1:])[counted].double().mean())}

        with compat.gkd_trainer_patched():
            ours = trainer_of("gkd", tmp_path, eval_dataset=data("gkd", 6), compute_metrics=accuracy).evaluate()
        theirs = trainer_of("gkd", tmp_path, eval_dataset=data("gkd", 6), compute_metrics=accuracy).evaluate()
        assert ours["eval_accuracy"] == theirs["eval_accuracy"]
        assert ours["eval_loss"] == theirs["eval_loss"]


def in_turn(kind: str, trainer: Any, inputs: dict[str, Tensor], **more: Any) -> tuple[list[Tensor], list[Tensor]]:
    """One batch's loss and gradients, of TRL and of the patch."""
    theirs = loss_and_gradients(trainer, inputs, **more)
    with TRAINERS[kind][1]():
        return theirs, loss_and_gradients(trainer, inputs, **more)


def close(ours: list[Tensor], theirs: list[Tensor], tolerance: float) -> bool:
    pairs = list(zip(ours, theirs, strict=True))
    return all(bool((one - other).abs().max() <= tolerance * other.abs().max()) for one, other in pairs)


class TestBatches:
    @both_trainers
    @pytest.mark.parametrize("count", [None, 7, torch.tensor(7), torch.tensor(3.5)])
    def test_what_the_sum_is_divided_by(self, kind: str, count: Any, tmp_path: Path) -> None:
        theirs, ours = in_turn(kind, trainer_of(kind, tmp_path), batch(kind), num_items_in_batch=count)
        assert len(ours) > 10
        assert close(ours, theirs, DOUBLE if kind == "gkd" else HALF)

    @pytest.mark.parametrize("training", [True, False])
    def test_the_count_that_the_generation_left_in_the_batch(self, training: bool, tmp_path: Path) -> None:
        """It comes before the argument in training, and is not looked at in evaluations."""
        trainer = trainer_of("distillation", tmp_path)
        trainer.model.train(training)
        inputs = {**batch("distillation"), "num_items_in_batch": torch.tensor(5.0)}
        theirs, ours = in_turn("distillation", trainer, inputs, num_items_in_batch=torch.tensor(99))
        assert close(ours, theirs, HALF)

    @both_trainers
    def test_the_models_are_left_as_they_were(self, kind: str, tmp_path: Path) -> None:
        """The teacher in evaluation mode, as TRL has it; with the autocast around its forward, which is put aside in between."""
        trainer = trainer_of(kind, tmp_path, models(dtype=torch.float32), args={"bf16": True})
        student, teacher = (trainer.accelerator.prepare_model(trainer.model), trainer.teacher_model)
        teacher.train()
        before = [vars(model)["forward"] for model in (student, teacher)]
        with TRAINERS[kind][1]():
            trainer.compute_loss(student, batch(kind))
        assert not any(module.training for module in teacher.modules())
        assert [vars(model)["forward"] for model in (student, teacher)] == before

    def test_what_tools_wrote_does_not_count(self, tmp_path: Path) -> None:
        trainer, inputs = trainer_of("distillation", tmp_path), batch("distillation")
        tools = torch.ones_like(inputs["completion_mask"])
        tools[0, 1:4] = 0
        theirs, ours = in_turn("distillation", trainer, {**inputs, "tool_mask": tools})
        assert close(ours, theirs, HALF)
        assert not close(ours, in_turn("distillation", trainer, inputs)[1], HALF)

    @both_trainers
    def test_where_no_token_counts_all_is_zero(self, kind: str, tmp_path: Path) -> None:
        inputs = batch(kind)
        if kind == "gkd":
            inputs["labels"].fill_(-100)
        else:
            inputs["completion_mask"].zero_()
        trainer = trainer_of(kind, tmp_path)
        for count in (None, 0, torch.tensor(0)):
            theirs, ours = in_turn(kind, trainer, inputs, num_items_in_batch=count)
            assert all(not one.any() for one in ours)
            assert bool(theirs[0].isnan()) == (count is not None)

    def test_the_logged_entropy_is_of_the_tokens_that_count_at_the_temperature(self, tmp_path: Path) -> None:
        trainer, inputs = trainer_of("distillation", tmp_path), batch("distillation")
        in_turn("distillation", trainer, inputs)
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        with torch.no_grad():
            logits = trainer.model(input_ids=ids, attention_mask=mask).logits[:, 3:-1][inputs["completion_mask"] == 1]
        exact = float(torch.special.entr((logits / 0.7).softmax(-1)).sum(-1).mean())
        logged = trainer._metrics["train" if trainer.model.training else "eval"]["entropy"]
        assert logged == pytest.approx([exact, exact], rel=HALF)

    # What a family does to its logits. TRL knows the scale under some names and the softcap under one: with these two families its
    # DistillationTrainer has another objective than the models' own distributions. Its GKDTrainer has the logits themselves.
    @pytest.mark.parametrize(
        ("name", "known"),
        [
            *((name, True) for name in ("gemma2", "cohere", "granite", "gpt2", "qwen3_moe")),
            ("recurrent_gemma", False),
            ("mpt", False),
        ],
    )
    def test_the_loss_is_of_the_models_own_logits(self, name: str, known: bool, tmp_path: Path) -> None:
        pair, losses = family(name), {}
        inputs = {kind: batch(kind) for kind in TRAINERS}
        for kind in TRAINERS:
            trainer = trainer_of(kind, tmp_path, pair, args={"temperature": 1.0, "beta": 0.3})
            trainer.model.eval()
            losses[kind], losses[f"{kind}, patched"] = (float(found[0]) for found in in_turn(kind, trainer, inputs[kind]))
        exact = losses.pop("gkd")
        assert losses.pop("gkd, patched") == pytest.approx(exact, rel=HALF)
        assert losses.pop("distillation, patched") == pytest.approx(exact, rel=HALF)
        assert (losses.pop("distillation") == pytest.approx(exact, rel=HALF)) == known

    @both_trainers
    def test_a_model_that_does_something_unknown_to_its_logits_is_refused(self, kind: str, tmp_path: Path) -> None:
        class Doubled(LlamaForCausalLM):
            def forward(self, *args: Any, **kwargs: Any) -> Any:
                output = super().forward(*args, **kwargs)
                output.logits = output.logits * 2
                return output

        trainer = trainer_of(kind, tmp_path, (build("llama"), build("llama", cls=Doubled, seed=1)))
        with TRAINERS[kind][1](), pytest.raises(ValueError, match="another logit scale"):
            trainer.compute_loss(trainer.model, batch(kind))


RANK = """
import os, sys
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import DistributedType, PartialState
from tests.compat.test_trl import SHARDED
from tests.support.trl import TRAINERS, run
from transformers import TrainingArguments

os.environ["CI"] = "1"
rank, folder = sys.argv[1], Path(sys.argv[2])
settled = TrainingArguments.__post_init__


def sharded_on_processors(self):
    # With this word for the kind of processes accelerate goes the way of GPUs; on CPUs it would not shard.
    settled(self)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


for way, more in {"ddp": {}, "fsdp": SHARDED}.items():
    TrainingArguments.__post_init__ = sharded_on_processors if way == "fsdp" else settled
    for kind in TRAINERS:
        found = []
        for block in (nullcontext(), TRAINERS[kind][1]()):
            with block:
                found.append(run(kind, folder / rank, args={"max_steps": 1, "ddp_backend": "gloo", **more}))
        torch.save(found, folder / f"{way}-{kind}-{rank}.pt")
torch.distributed.destroy_process_group()
"""
SHARDED = {
    "fsdp": True,
    "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "cpu_ram_efficient_loading": False},
    "gradient_checkpointing": False,
}


def test_on_two_processes_with_ddp_and_fsdp2_a_run_is_the_same_run(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = child_environment(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", RANK, str(rank), str(tmp_path)],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
        )
        for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=300) for process in started] == [0, 0]
    finally:
        for process in started:
            process.kill()
    for way, kind in itertools.product(("ddp", "fsdp"), TRAINERS):
        (theirs, ours), (_, other) = (torch.load(tmp_path / f"{way}-{kind}-{rank}.pt") for rank in range(2))
        assert_same_run(ours, theirs, DOUBLE if kind == "gkd" else HALF)
        assert_same_run(other, ours, DOUBLE)

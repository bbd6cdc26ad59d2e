"""The training loops whose whole steps are timed side by side: ours, TRL's trainers as they are and patched, and plain loops.

Each trains the same student on the same batches with the same loss: forward KL from the teacher, teacher ‖ student, at temperature
1, the mean over all tokens but the first, without cross-entropy and without text that the student writes. TRL calls it beta = 0.
AdamW, the gradient's norm clipped to 1, float32, no gradient checkpointing, one sequence a step. What is not set here is each
library's default.

TRL's DistillationTrainer has its student write every completion. Here it is handed the rest of the sequence in place of that; what
comes after is its own. TRL 1.16.0 has no loss of Liger's any more; as earlier releases did, "TRL GKD, Liger's loss" puts
LigerFusedLinearJSDLoss, which is torch, in the place of the loss. What use_liger_kernel still does is to put Triton kernels into
the models' layers.

Nothing of TRL, accelerate and Liger-Kernel is imported before its contender is asked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import (
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainerCallback,
    default_data_collator,
    get_constant_schedule_with_warmup,
)

import kdkernels as kd
from benchmarks.cases import Problem
from benchmarks.contenders import CONTENDERS as LOSSES
from benchmarks.measure import Timed
from kdkernels.compat.trl import distillation_trainer_patched, gkd_trainer_patched
from kdkernels.transformers import KDConfig, KDTrainer, hidden_states, lm_head
from tests.support.memory import mark, status

LEARNING_RATE = 1e-4
CLIPPED_NORM = 1.0


class Watch(TrainerCallback):
    """The clock around a loop's steps, and how far memory rises in them; the yardstick runs before each of them and after the last.

    The first step is not counted: it pays for what libraries and optimizer keep. yardstick: returns its seconds. patience: seconds
    of counted steps and yardsticks after which no further step is begun.
    """

    def __init__(self, yardstick: Callable[[], float], repeats: int, patience: float) -> None:
        self.yardstick, self.repeats, self.patience = yardstick, repeats, patience
        self.timed = Timed([], [])
        self.peaks: list[int] = []  # bytes above what the process holds between two steps
        self.process = 0  # the highest mark of the process itself
        self.warm = False
        self.since, self.started, self.before = 0.0, 0.0, 0

    def begin(self) -> None:
        if not self.warm:
            return
        if not self.timed.yardsticks:
            self.since = time.perf_counter()
            self.timed.yardsticks.append(self.yardstick())
        self.before = mark()
        self.started = time.perf_counter()

    def end(self) -> bool:
        """Whether there is to be another step."""
        if not self.warm:
            self.warm = True
            return True
        self.timed.steps.append(time.perf_counter() - self.started)
        high = status("VmHWM")
        self.peaks.append(high - self.before)
        self.process = max(self.process, high)
        self.timed.yardsticks.append(self.yardstick())
        return len(self.peaks) < self.repeats and time.perf_counter() - self.since < self.patience

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = not self.end() or control.should_training_stop


@dataclass(frozen=True)
class Run:
    """examples: one a step, token ids [N + 1] int64, the first of them for the step that is not counted. folder: for what a trainer
    writes."""

    student: Any
    teacher: Any
    examples: list[Tensor]
    watch: Watch
    folder: Path

    def rows(self, **more: str) -> list[dict[str, Any]]:
        """As trainers take them: the labels are not shifted."""
        listed = [ids.tolist() for ids in self.examples]
        return [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids, **more} for ids in listed]

    def settings(self) -> dict[str, Any]:
        """Of transformers' Trainer. The learning rate of the first step is 0: counted steps start from the weights as given."""
        return {
            "output_dir": str(self.folder),
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "per_device_train_batch_size": 1,
            "max_steps": len(self.examples),
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "constant_with_warmup",
            "warmup_steps": 1,
            "weight_decay": 0.0,
            "max_grad_norm": CLIPPED_NORM,
            "train_sampling_strategy": "sequential",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
        }


def _losses(trainer: Any) -> list[float]:
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def _kd_trainer(run: Run) -> list[float]:
    config = KDConfig(method="forward_kl", **run.settings())
    rows = Dataset.from_list(run.rows())
    return _losses(KDTrainer(run.student, config, train_dataset=rows, teacher=run.teacher, callbacks=[run.watch]))


def _tokenizer() -> Any:
    """TRL's trainers want one, and have nothing to do with it here."""
    made = Tokenizer(WordLevel({"<pad>": 0}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<pad>")


def _trl(cls: type, config: Any, run: Run, rows: list[dict[str, Any]], **more: Any) -> list[float]:
    given = {"model": run.student, "teacher_model": run.teacher, "args": config, "train_dataset": Dataset.from_list(rows)}
    return _losses(cls(**given, processing_class=_tokenizer(), callbacks=[run.watch], **more))


def _with_liger_loss(cls: Any) -> type:
    """A GKDTrainer whose loss is Liger-Kernel's, from the hidden states of the models' bodies."""
    loss = LOSSES["liger"]("forward_kl")

    class WithLigerLoss(cls):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Tensor:
            given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            student, teacher = (self.accelerator.unwrap_model(one) for one in (model, self.teacher_model))
            with torch.no_grad():
                target = teacher.model(**given, use_cache=False).last_hidden_state[:, :-1]
            hidden = student.model(**given, use_cache=False).last_hidden_state[:, :-1]
            heads = student.lm_head.weight, teacher.lm_head.weight.detach()
            labels = inputs["labels"][:, 1:].flatten()
            return loss(Problem(hidden.flatten(0, 1), heads[0], target.flatten(0, 1), heads[1], labels))

    return WithLigerLoss


def _gkd(
    run: Run,
    patched: Callable[[], AbstractContextManager[None]] = nullcontext,
    derived: Callable[[type], type] = lambda cls: cls,
    **more: Any,
) -> list[float]:
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    config = GKDConfig(beta=0.0, lmbda=0.0, **run.settings(), **more)
    with patched():
        return _trl(derived(GKDTrainer), config, run, run.rows(), data_collator=default_data_collator)


def _distillation(run: Run, patched: Callable[[], AbstractContextManager[None]] = nullcontext) -> list[float]:
    from trl.trainer.distillation_config import DistillationConfig
    from trl.trainer.distillation_trainer import DistillationTrainer

    class Given(DistillationTrainer):
        """The completion is the rest of the sequence behind its first token, in place of what the student would write."""

        def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
            ids = torch.tensor([one["input_ids"] for one in inputs])
            prompt, completion = ids[:, :1], ids[:, 1:]
            return {
                "prompt_ids": prompt,
                "prompt_mask": torch.ones_like(prompt),
                "completion_ids": completion,
                "completion_mask": torch.ones_like(completion),
                "num_items_in_batch": torch.tensor(completion.numel()),
            }

    config = DistillationConfig(beta=0.0, shuffle_dataset=False, **run.settings())
    with patched():
        return _trl(Given, config, run, run.rows(prompt=""))


def _accelerate(run: Run, loss_of: Callable[[Any, Any, dict[str, Tensor]], Tensor]) -> list[float]:
    """A loop of one's own. loss_of: of student, teacher and a batch."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(run.student.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    student, optimizer, schedule = accelerator.prepare(run.student, optimizer, get_constant_schedule_with_warmup(optimizer, 1))
    losses = []
    for ids in run.examples:
        run.watch.begin()
        batch = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None], "labels": ids[None]}
        loss = loss_of(student, run.teacher, batch)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(student.parameters(), CLIPPED_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if not run.watch.end():
            break
    return losses


def _eager_loss(student: Any, teacher: Any, batch: dict[str, Tensor]) -> Tensor:
    """From whole logits, with no copy of them that can be done without."""
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        target = teacher(**given, use_cache=False).logits[:, :-1].log_softmax(-1)
    found = student(**given, use_cache=False).logits[:, :-1].log_softmax(-1)
    loss: Tensor = kl_div(found, target, reduction="sum", log_target=True) / target[..., 0].numel()
    return loss


def _kd_loss(student: Any, teacher: Any, batch: dict[str, Tensor]) -> Tensor:
    """As in docs/recipes.md."""
    with torch.no_grad():
        target = hidden_states(teacher, batch)
    hidden = hidden_states(student, batch)
    labels = batch["labels"].roll(-1, 1)
    labels[:, -1] = -100
    return kd.linear_kd_loss(hidden, lm_head(student), target, lm_head(teacher), labels)


# Each trains, and returns the loss of each step. use_liger_kernel comes last: it changes classes of transformers.
TRAINERS: dict[str, Callable[[Run], list[float]]] = {
    "KDTrainer": _kd_trainer,
    "accelerate, kd": partial(_accelerate, loss_of=_kd_loss),
    "accelerate, eager": partial(_accelerate, loss_of=_eager_loss),
    "TRL GKD": _gkd,
    "TRL GKD, patched": partial(_gkd, patched=gkd_trainer_patched),
    "TRL GKD, Liger's loss": partial(_gkd, derived=_with_liger_loss),
    "TRL GKD, use_liger_kernel": partial(_gkd, use_liger_kernel=True),
    "TRL Distillation": _distillation,
    "TRL Distillation, patched": partial(_distillation, patched=distillation_trainer_patched),
}

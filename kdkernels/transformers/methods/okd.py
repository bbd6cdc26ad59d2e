"""OKD (arXiv 2409.12512): the teacher adapts along with the student, by LoRA. What trains there is ``online.OnlineTeacher``."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from kdkernels.losses.okd import linear_okd_loss
from kdkernels.transformers.finite import NotFinite, check_weights
from kdkernels.transformers.heads import lm_head
from kdkernels.transformers.methods.base import Lesson, Means
from kdkernels.transformers.methods.fixed import Fixed
from kdkernels.transformers.online import OnlineTeacher
from kdkernels.transformers.settings import COUNT, SHARE, SWITCH, Flag, Settings, at_least_0, said


@dataclass
class OKDSettings(Settings):
    method_of = "okd"

    okd_lora_rank: Annotated[int, COUNT, Flag("R", "of the LoRA that lets the teacher adapt", name="lora_rank")] = said(
        32, "Rank of the teacher's LoRA."
    )
    okd_lora_alpha: float | None = said(None, "Numerator of the LoRA's scale alpha / rank.")
    okd_lora_dropout: float = said(0.0, "Dropout of the LoRA.")
    okd_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules that get a LoRA (found: queries and values).", "nargs": "+"}
    )
    okd_learning_rate: Annotated[
        float | None,
        at_least_0(", or None"),
        Flag("RATE", "of that LoRA (default: the student's)", name="teacher_learning_rate"),
    ] = said(None, "Learning rate of the teacher's LoRA.")
    okd_teacher_alpha: Annotated[
        float, SHARE, Flag("A", "KL to the student in the teacher's loss; the rest is CE", name="teacher_alpha")
    ] = said(0.5, "KL to the student in the teacher's loss; the rest is CE.")
    save_teacher: Annotated[bool, Flag("", "save the LoRA too, in OUT/student/teacher", kind=SWITCH)] = said(
        False, "Save the teacher's LoRA beside the student."
    )

    @classmethod
    def check_cached(cls, config: Any, cache: Any) -> None:
        if config.method == cls.method_of:
            raise ValueError("method 'okd' trains the teacher along, but the teacher given is a cache of its log-probabilities")


class OKD(Fixed):
    name, key = "okd", "teacher"
    losses = ("teacher_loss",)

    def __init__(self, trainer: Any, target: Any) -> None:
        super().__init__(trainer, target)
        args = self.args
        self.online = OnlineTeacher(
            target.teacher,
            rank=args.okd_lora_rank,
            alpha=args.okd_lora_alpha,
            dropout=args.okd_lora_dropout,
            target_modules=args.okd_target_modules,
            seed=args.seed,
        )
        trainer.teacher = target.teacher = self.online.model
        if args.checkpoints_activations:
            self.online.checkpoint_activations()

    def begin_run(self) -> None:
        for parameter in self.online.parameters():
            parameter.grad = None

    def prepare(self) -> None:
        """Besides, give the teacher its optimizer."""
        super().prepare()
        args, trainer = self.args, self.trainer
        cls, options = trainer.get_optimizer_cls_and_kwargs(args, trainer.teacher)
        of_its_own = {"params", "model", "optimizer_dict"} & options.keys()
        if of_its_own or not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
            raise ValueError(f"optim={args.optim!s} chooses parameters by itself; accepted with 'okd': adamw_torch and such")
        self.online.optimize_with(cls, options, args.learning_rate if args.okd_learning_rate is None else args.okd_learning_rate)

    def loss(self, lesson: Lesson) -> tuple[Tensor, Means]:
        self.online.train(lesson.training)
        if not lesson.training:
            return super().loss(lesson)
        target = self.target.hidden(lesson)
        hidden, head = lesson.student()
        student, teacher, means = linear_okd_loss(
            hidden,
            head,
            target,
            lm_head(self.online.model),
            lesson.labels,
            teacher_alpha=self.args.okd_teacher_alpha,
            **lesson.options,
        )
        means["teacher_loss"] = teacher.detach()
        # Its value is the student's loss, its gradient that of both.
        return student + (teacher - teacher.detach()), means

    def before_step(self) -> None:
        """The teacher takes a step of its own, at the same point of the schedule."""
        trainer = self.trainer
        group = trainer.optimizer.param_groups[0]
        start = group.get("initial_lr", self.args.learning_rate)
        rate = group["lr"] / start if start else 1.0
        try:
            self.online.step(rate, self.args.max_grad_norm or None, trainer.accelerator.scaler)
        except NotFinite as error:
            raise trainer.ended(str(error)) from error

    def evaluating(self) -> AbstractContextManager[None]:
        disabled: AbstractContextManager[None] = self.online.model.disable_adapter()
        return disabled

    def check(self) -> None:
        check_weights(self.online.model, "teacher")

    def save(self, folder: Path) -> None:
        """With save_teacher the LoRA too, in the folder "teacher"."""
        if self.args.save_teacher:
            self.online.save(folder / "teacher")

    def state_dict(self) -> Any:
        return self.online.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.online.load_state_dict(state)

    def load_best(self, state: Any) -> None:
        self.online.load_state_dict(state)

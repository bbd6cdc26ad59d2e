"""TAID (arXiv 2501.16937): the target moves from the student to the teacher, the faster the better the student follows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch

from kdkernels.losses.taid import TAIDSchedule
from kdkernels.transformers.means import TokenMeans
from kdkernels.transformers.methods.base import Lesson, Means
from kdkernels.transformers.methods.fixed import Fixed
from kdkernels.transformers.settings import SHARE, Flag, Settings, said


@dataclass
class TAIDSettings(Settings):
    method_of = "taid"

    taid_t_start: Annotated[float, Flag("t", "the teacher's share in the target at the start", kind=SHARE)] = said(
        0.4, "The teacher's share in the target at the start."
    )
    taid_t_end: float = said(1.0, "The teacher's share in the target at the end.")
    taid_alpha: float = said(5e-4, "Step size of the adaptive share.")
    taid_beta: float = said(0.99, "Momentum of the adaptive share.")
    taid_adaptive: bool = said(True, "Move the share faster while the loss falls; else linearly.")

    @classmethod
    def check(cls, config: Any) -> None:
        if config.method == cls.method_of:
            config.taid_schedule()

    def taid_schedule(self) -> TAIDSchedule:
        """TAID's controller at its start."""
        return TAIDSchedule(self.taid_t_start, self.taid_t_end, self.taid_alpha, self.taid_beta, self.taid_adaptive)


class TAID(Fixed):
    name = key = "taid"

    def __init__(self, trainer: Any, target: Any) -> None:
        super().__init__(trainer, target)
        self.schedule = self.args.taid_schedule().to(self.args.device)
        self._means = TokenMeans()

    def begin_run(self) -> None:
        self._means = TokenMeans()
        self.schedule.load_state_dict(self.args.taid_schedule().state_dict())

    def more(self, lesson: Lesson) -> Mapping[str, Any]:
        return {"t": self.schedule.t} if lesson.training else {}

    def add(self, means: Means) -> None:
        self._means.add(means)

    def after_step(self) -> None:
        """t moves by the cross-entropy between target and student, the mean over the whole step."""
        means = self._means.drained()
        if not self.trainer.accelerator.optimizer_step_was_skipped:
            state = self.trainer.state
            loss = means["kd"] + means["target_entropy"]
            self.schedule.update(
                torch.where(means["tokens"] > 0, loss, torch.nan),  # of no tokens it learns nothing
                min(1.0, state.global_step / state.max_steps),
            )

    def logs(self) -> dict[str, float]:
        return {"t": float(self.schedule.t)}

    def state_dict(self) -> Any:
        return self.schedule.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.schedule.load_state_dict(state)

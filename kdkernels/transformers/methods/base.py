"""What takes part in a training: the trainer calls the hooks of a ``Part`` in its loop, and keeps its state in the checkpoints.

A method is a part with a loss, in a file with all that is its own: settings, loss, hooks and state. What goes along with any
method, as the student's own writing does, is a part without a loss.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from kdkernels.losses.head import LMHead

Means = dict[str, Tensor]
"""0-dim tensors, means over the tokens that count; "tokens" says how many those are."""


@dataclass(frozen=True)
class Lesson:
    """A micro-batch, for a loss.

    batch: prepared, as both models read it. targets: what a cached teacher says of it, by the names of ``kd.linear_topk_kd_loss``.
    labels: (B, S) int64, the token to predict at each position; -100 does not count. student: runs the student's forward, and gives
    its hidden states (B, S, D) and its head. options: of every loss of this library. training: gradients are wanted, and t moves.
    """

    batch: Mapping[str, Any]
    targets: Mapping[str, Tensor]
    labels: Tensor
    student: Callable[[], tuple[Tensor, LMHead]]
    options: Mapping[str, Any]
    training: bool


class Part:
    """What each hook does by itself is nothing.

    trainer: the KDTrainer, once its models are in their places. key: of the state in a checkpoint. per_rank: each process has a
    state of its own; ``absent`` is why a checkpoint may lack it. losses: names of means that are divided as the loss is.
    """

    key: ClassVar[str] = ""
    per_rank: ClassVar[bool] = False
    absent: ClassVar[str] = ""
    losses: ClassVar[tuple[str, ...]] = ()

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.args = trainer, trainer.args

    def begin_run(self) -> None:
        """A run begins where the first of this trainer did, however that ended; a checkpoint's state comes after this."""

    def prepare(self) -> None:
        """Once, before the first run: shard, and make optimizers."""

    def write(self, batches: list[Any]) -> list[Any] | None:
        """The micro-batches of a step, or others in place of them; None leaves them as they are."""
        return None

    def add(self, means: Means) -> None:
        """A micro-batch's means, in training."""

    def before_step(self) -> None:
        """The gradients of a step are there, and the student's optimizer comes next."""

    def after_step(self) -> None:
        """The student's optimizer was called."""

    def logs(self) -> dict[str, float]:
        """What is logged besides the means."""
        return {}

    def evaluating(self) -> AbstractContextManager[None]:
        """Inside, the target is the teacher itself, which does not move: losses against two targets would not compare."""
        return contextlib.nullcontext()

    def evaluated(self, metrics: Mapping[str, float]) -> None:
        """An evaluation between steps is done, of all its data sets."""

    def check(self) -> None:
        """Before weights are saved: NotFinite where one of this part's is NaN or infinite."""

    def save(self, folder: Path) -> None:
        """The student was saved in the folder."""

    def state_dict(self) -> Any:
        """For torch.save, and torch.load with weights_only=True. Every process calls it."""
        return None

    def load_state_dict(self, state: Any) -> None:
        """Go on from ``state_dict``."""

    def load_best(self, state: Any) -> None:
        """The student has the weights of its best checkpoint again, of which this is the state."""

"""A divergence from a teacher that stays as it is: the target and the loss of every method that does not say otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from kdkernels.engine.cut import STRATEGIES
from kdkernels.losses.linear import linear_kd_loss
from kdkernels.transformers.heads import lm_head
from kdkernels.transformers.hidden import hidden_states
from kdkernels.transformers.methods.base import Lesson, Means, Part
from kdkernels.transformers.online import shard
from kdkernels.transformers.settings import BYTES, COUNT, NOT_NEGATIVE, TEMPERATURE, Flag, Settings, one_of, said


@dataclass
class LossSettings(Settings):
    """Of the loss, whatever the method."""

    temperature: Annotated[float, TEMPERATURE, Flag("T", "divides both models' logits in the divergence")] = said(
        1.0, "Divides both models' logits in the divergence."
    )
    kd_weight: Annotated[float, NOT_NEGATIVE, Flag("W", "factor of the divergence")] = said(1.0, "Factor of the divergence.")
    ce_weight: Annotated[float, NOT_NEGATIVE, Flag("W", "factor of the labels' cross-entropy")] = said(
        0.0, "Factor of the labels' cross-entropy."
    )
    vocab_size: Annotated[
        int | None,
        COUNT,
        Flag("V", "compare the first V tokens; other names there are confirmed (default: what both know)"),
    ] = said(None, "Cut both heads to their first rows.")
    strategy: Annotated[str, one_of(*STRATEGIES)] = said("auto", "How the loss is cut: tokens, vocab or auto.")
    memory_budget: Annotated[
        int | None, BYTES, Flag("BYTES", "for the loss's logits of both models (default: what the loss itself takes)")
    ] = said(None, "Bytes for the loss's logits.")

    def loss_options(self) -> dict[str, Any]:
        """Of a loss of this library, as they are."""
        names = ("temperature", "kd_weight", "ce_weight", "strategy", "memory_budget")
        return {name: getattr(self, name) for name in names}


class Live:
    """A target that the teacher's own forward makes."""

    def __init__(self, teacher: Any, inputs: Any) -> None:
        self.teacher, self.inputs = teacher, inputs

    def shard(self, mesh: Any) -> None:
        shard(self.teacher, mesh)

    def hidden(self, lesson: Lesson) -> Tensor:
        """(B, S, D), with the teacher's graph where gradients are on."""
        return hidden_states(self.teacher, self.inputs.to("teacher", lesson.batch))

    def loss(self, lesson: Lesson, **more: Any) -> tuple[Tensor, Means]:
        with torch.no_grad():
            target = self.hidden(lesson)
        hidden, head = lesson.student()
        found: tuple[Tensor, Means] = linear_kd_loss(
            hidden, head, target, lm_head(self.teacher).detach(), lesson.labels, **lesson.options, **more
        )
        return found


class Fixed(Part):
    """A method. target: what is learned from, Live or Cached. name: of ``KDConfig(method=...)``, where it is no divergence's; in
    ``named`` each is found by it."""

    name: ClassVar[str] = ""
    named: ClassVar[dict[str, type[Fixed]]] = {}

    def __init_subclass__(cls) -> None:
        Fixed.named[cls.name] = cls

    def __init__(self, trainer: Any, target: Any) -> None:
        super().__init__(trainer)
        self.target = target

    def prepare(self) -> None:
        """Shard the teacher where the student is sharded."""
        if self.trainer.is_fsdp_enabled:
            self.target.shard(init_device_mesh(self.args.device.type, (self.args.world_size,)))

    def more(self, lesson: Lesson) -> Mapping[str, Any]:
        """Options of the loss that are this method's."""
        return {}

    def loss(self, lesson: Lesson) -> tuple[Tensor, Means]:
        """The loss of a micro-batch, 0-dim, divided by options["normalizer"], and its means."""
        found: tuple[Tensor, Means] = self.target.loss(lesson, **self.more(lesson))
        return found

"""A target that was kept on disk: the log-probabilities of a teacher's most likely tokens (``python -m kdkernels cache``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from kdkernels.engine.outcomes import TAILS
from kdkernels.losses.topk import linear_topk_kd_loss
from kdkernels.transformers.methods.base import Lesson, Means
from kdkernels.transformers.settings import Flag, Settings, one_of, said


@dataclass
class CachedSettings(Settings):
    topk_tail: Annotated[str, one_of(*TAILS), Flag("NAME", "with a cached teacher: what stands for the rest")] = said(
        "bucket", "Tokens that a cached teacher does not list: bucket or renormalize."
    )

    @classmethod
    def check_cached(cls, config: Any, cache: Any) -> None:
        divergence = config.resolved_divergence()
        if config.topk_tail == "renormalize" and divergence.weighed_by_student:
            raise ValueError(
                f"with topk_tail='renormalize' {divergence.name} moves mass outside the top-k, free of cost; accepted: 'bucket'"
            )
        if config.temperature != cache.temperature:
            raise ValueError(f"temperature={config.temperature}, but the cache was made for {cache.temperature}")


class Cached:
    """tail: ``topk_tail``. vocab_size: how many rows of the student's head are compared, None for all."""

    def __init__(self, tail: str, vocab_size: int | None) -> None:
        self.tail, self.vocab_size = tail, vocab_size

    def shard(self, mesh: Any) -> None:
        """There is nothing to shard."""

    def loss(self, lesson: Lesson, **more: Any) -> tuple[Tensor, Means]:
        targets = dict(lesson.targets)
        if self.tail == "renormalize":
            targets.pop("topk_rest", None)
        if self.vocab_size is not None:  # what the student has no row for is no part of the target
            unknown = targets["topk_ids"] >= self.vocab_size
            targets["topk_logprobs"] = targets["topk_logprobs"].masked_fill(unknown, -torch.inf)
        hidden, head = lesson.student()
        options: dict[str, Any] = {**targets, "labels": lesson.labels, "tail": self.tail, **lesson.options, **more}
        found: tuple[Tensor, Means] = linear_topk_kd_loss(hidden, head, **options)
        return found

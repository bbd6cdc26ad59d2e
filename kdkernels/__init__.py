"""Distillation losses for language models with large vocabularies, without the logits."""

from kdkernels.backends import backend
from kdkernels.divergences import (
    Divergence,
    divergences,
    forward_kl,
    jsd,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    total_variation,
)
from kdkernels.engine.scratch import free_scratch
from kdkernels.losses.head import LMHead
from kdkernels.losses.linear import LinearKDLoss, linear_kd_loss
from kdkernels.losses.logits import kd_loss
from kdkernels.losses.okd import OKDLoss, linear_okd_loss
from kdkernels.losses.taid import TAIDSchedule
from kdkernels.losses.topk import linear_topk_kd_loss
from kdkernels.planning.plan import Plan, plan

__version__ = "0.1.0"

__all__ = [
    "Divergence",
    "LMHead",
    "LinearKDLoss",
    "OKDLoss",
    "Plan",
    "TAIDSchedule",
    "backend",
    "divergences",
    "forward_kl",
    "free_scratch",
    "jsd",
    "kd_loss",
    "linear_kd_loss",
    "linear_okd_loss",
    "linear_topk_kd_loss",
    "plan",
    "reverse_kl",
    "skew_forward_kl",
    "skew_reverse_kl",
    "total_variation",
]

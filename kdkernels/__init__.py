"""Distillation losses for language models with large vocabularies, without the logits."""

import importlib
from typing import TYPE_CHECKING

from kdkernels.backends import backend as backend
from kdkernels.divergences import *  # noqa: F403  (Divergence, divergences and every factory that is listed there)
from kdkernels.engine.scratch import free_scratch as free_scratch
from kdkernels.losses.head import LMHead as LMHead
from kdkernels.losses.linear import LinearKDLoss as LinearKDLoss
from kdkernels.losses.linear import linear_kd_loss as linear_kd_loss
from kdkernels.losses.logits import kd_loss as kd_loss
from kdkernels.losses.okd import OKDLoss as OKDLoss
from kdkernels.losses.okd import linear_okd_loss as linear_okd_loss
from kdkernels.losses.taid import TAIDSchedule as TAIDSchedule
from kdkernels.losses.topk import linear_topk_kd_loss as linear_topk_kd_loss
from kdkernels.planning.plan import Plan as Plan
from kdkernels.planning.plan import plan as plan

if TYPE_CHECKING:
    from kdkernels import compat as compat
    from kdkernels import transformers as transformers

__version__ = "0.1.0"

# Not as an assignment, which type checkers would read and find no divergence in: they go by the imports.
globals()["__all__"] = sorted(name for name, value in globals().items() if callable(value) and not name.startswith("_"))
# Imported when they are first asked for, since they take long, and what they need may not be installed.
_PARTS = ("compat", "transformers")


def __dir__() -> list[str]:
    return [*globals()["__all__"], "__version__", *_PARTS]


if not TYPE_CHECKING:  # a type checker would take every name to be there

    def __getattr__(name: str) -> object:
        if name not in _PARTS:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return importlib.import_module(f"{__name__}.{name}")

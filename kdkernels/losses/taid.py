"""TAID's controller: how fast the target moves from the student's distribution to the teacher's (arXiv 2501.16937)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kdkernels.backends.dtypes import DTYPES
from kdkernels.divergences import is_number
from kdkernels.losses.checks import INTEGERS, scalar
from kdkernels.scalars import flag, number


class TAIDSchedule(nn.Module):
    """The interpolation ``t`` of the target, to be updated once per optimizer step.

    With L the step's loss, d = (L_prev - L) / (L_prev + 1e-15), the momentum m = beta m + (1 - beta) d and
    step = alpha sigmoid(m) (1 - t), an update sets t = min(t_end, max(t_lin, t + step)), where t_lin goes linearly from t_start to
    t_end with progress. The first update only remembers L. adaptive=False: t = t_lin.

    t_start, t_end: 0 <= t_start <= t_end <= 1. alpha: step size, at least 0. beta: momentum, in [0, 1).

    Everything is a float32 buffer: ``update`` never waits for the device, and state_dict carries it. Call ``.to(device)`` with the
    model; casts of a model that holds it (``.bfloat16()``) leave it in float32.
    """

    t: Tensor
    momentum: Tensor
    previous: Tensor

    def __init__(
        self,
        t_start: float = 0.4,
        t_end: float = 1.0,
        alpha: float = 5e-4,
        beta: float = 0.99,
        adaptive: bool = True,
    ) -> None:
        super().__init__()
        for name, value in {"t_start": t_start, "t_end": t_end, "alpha": alpha, "beta": beta}.items():
            if not is_number(value):
                raise TypeError(f"{name} is a number, got {type(value).__name__}")
        t_start, t_end, alpha, beta, adaptive = float(t_start), float(t_end), float(alpha), float(beta), flag("adaptive", adaptive)
        if not 0.0 <= t_start <= t_end <= 1.0:
            raise ValueError(f"accepted: 0 <= t_start <= t_end <= 1, got t_start={t_start}, t_end={t_end}")
        number("alpha", alpha, "at least 0", 0.0)
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"beta is in [0, 1), got {beta}")
        self.t_start, self.t_end, self.alpha, self.beta, self.adaptive = t_start, t_end, alpha, beta, adaptive
        self.register_buffer("t", torch.tensor(t_start, dtype=torch.float32))
        self.register_buffer("momentum", torch.tensor(0.0, dtype=torch.float32))
        # NaN until the first loss has been seen.
        self.register_buffer("previous", torch.tensor(math.nan, dtype=torch.float32))

    def _apply(self, fn: Any, recurse: bool = True) -> TAIDSchedule:
        """Moved with the model, but not cast with it: in bfloat16 the steps of ``t`` would be rounded away."""

        def moved(tensor: Tensor) -> Tensor:
            made: Tensor = fn(tensor)
            return made if made.dtype == tensor.dtype else tensor.to(made.device)

        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        for name, buffer in self._buffers.items():  # assign=True takes tensors of any dtype as they are
            self._buffers[name] = None if buffer is None else buffer.float()

    @torch.no_grad()
    def update(self, loss: Tensor | float, progress: float) -> Tensor:
        """Move ``t`` after an optimizer step, and return it.

        loss: the step's loss, 0-dim; where torch.distributed is initialised its mean over the ranks counts, so that all of them
        keep one t. (The authors' code feeds the cross-entropy form, metrics["kd"] + metrics["target_entropy"].)
        progress: finished steps / total steps, in [0, 1]. Call it in training only: never on validation batches, and once per
        optimizer step, not per micro-batch.
        """
        if not is_number(progress) or not 0.0 <= progress <= 1.0:
            raise ValueError(f"progress is finished steps / total steps, in [0, 1], got {progress!r}")
        accepted = "a number or a 0-dim tensor"
        given: Any = loss
        if isinstance(given, Tensor):
            given = scalar("loss", given, accepted, self.t.device, (*DTYPES, *INTEGERS))
        else:
            if isinstance(given, int) or not is_number(given) or math.isfinite(given):  # others are passed over below
                given = number("loss", given, accepted)
        if isinstance(given, Tensor):
            current = given.to(torch.float32)
        else:  # filled in on the device: no copy from the host
            current = torch.full((), given, dtype=torch.float32, device=self.t.device)
        if dist.is_available() and dist.is_initialized():
            current = current.clone()
            dist.all_reduce(current)
            current /= dist.get_world_size()
        linear = self.t_start + (self.t_end - self.t_start) * float(progress)
        if not self.adaptive:
            self.t.fill_(linear)
            return self.t
        first = self.previous.isnan()
        change = (self.previous - current) / (self.previous + 1e-15)
        momentum = self.beta * self.momentum + (1.0 - self.beta) * change
        step = self.alpha * momentum.sigmoid() * (1.0 - self.t)
        moved = (self.t + step).clamp(min=linear).clamp(max=self.t_end)
        # A loss that is not a number teaches nothing, and must not stay in the momentum for the rest of the run.
        usable = current.isfinite()
        self.t.copy_(torch.where(first | ~usable, self.t, moved))
        self.momentum.copy_(torch.where(first | ~usable, self.momentum, momentum))
        self.previous.copy_(torch.where(usable, current, self.previous))
        return self.t

    def extra_repr(self) -> str:
        names = ("t_start", "t_end", "alpha", "beta", "adaptive")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)

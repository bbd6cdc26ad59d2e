"""Numbers that are none, and where they came from: weights of a model, losses and gradients of a step.

One NaN that reaches an optimizer is in every weight after it, and a Trainer goes on all the same. So weights are looked through
before anything is computed from them and before they are saved, and a step without finite numbers ends the run before a weight has
moved.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kdkernels.backends.dtypes import DTYPES
from kdkernels.transformers.heads import unwrapped

logger = logging.getLogger(__name__)

SHOWN_ROWS, SHOWN_TOKENS = 4, 8


class NotFinite(ValueError):
    """Weights, a loss or gradients that are NaN or infinite; the text says which."""


def _wrong(tensor: Any, *, low: bool = True, high: bool = True) -> Tensor | None:
    """Whether a tensor holds NaN; with low also -inf, with high inf. 0-dim on its device, None where that is not to be seen."""
    here = tensor.to_local() if hasattr(tensor, "full_tensor") else tensor
    dense = type(here) in (Tensor, nn.Parameter) and here.dtype in DTYPES and here.device.type != "meta"
    if not dense or not here.numel():
        return None
    least, most = torch.aminmax(here.detach())  # NaN if any entry is; unlike isfinite it makes no copy
    return most.isnan() | (least.isneginf() & low) | (most.isposinf() & high)


def is_finite(tensor: Tensor, *, low: bool = True) -> bool:
    """Whether all entries are numbers. low: -inf is none."""
    wrong = _wrong(tensor, low=low)
    return wrong is None or not wrong


def _looked_through(model: nn.Module) -> dict[str, Tensor]:
    """For each parameter, and each buffer that is saved with them, whether it is wrong.

    What may hold -inf: a mask among the buffers, and the bias of the output head, which bans a token so.
    """
    base = unwrapped(model)
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    bans = {id(bias) for name, bias in (head.named_parameters() if isinstance(head, nn.Module) else ()) if name.endswith("bias")}
    found: dict[str, Tensor] = {}
    seen: set[int] = set()  # tied ones are one
    for prefix, module in model.named_modules():
        if hasattr(module, "quant_state"):  # bitsandbytes may store its codes in a dtype of numbers
            continue
        saved = {name: buffer for name, buffer in module._buffers.items() if name not in module._non_persistent_buffers_set}
        for tensors, infinite in ((module._parameters, True), (saved, False)):
            for name, tensor in tensors.items():
                if tensor is None or id(tensor) in seen:
                    continue
                seen.add(id(tensor))
                wrong = _wrong(tensor, low=infinite and id(tensor) not in bans, high=infinite)
                if wrong is not None:
                    found[f"{prefix}.{name}".lstrip(".")] = wrong
    return found


def _anywhere(flags: list[Tensor], model: nn.Module) -> list[bool]:
    """On the host, in one transfer for each device; on any rank, where the model is sharded over them."""
    places = list(dict.fromkeys(flag.device for flag in flags))
    stacked = {place: torch.stack([flag for flag in flags if flag.device == place]) for place in places}
    if any(hasattr(parameter, "full_tensor") for parameter in model.parameters()) and dist.is_initialized():
        for place, together in stacked.items():
            most = together.int()
            dist.all_reduce(most, dist.ReduceOp.MAX)
            stacked[place] = most != 0
    values = {place: iter(together.tolist()) for place, together in stacked.items()}
    return [bool(next(values[flag.device])) for flag in flags]


def wrong_weights(model: nn.Module) -> str | None:
    """Says which weights are NaN or infinite, the first by name; None where none is. Quantised ones are not looked at.

    One pass over the weights. Where FSDP2 has sharded them all ranks have to call this, and get the same.
    """
    found = _looked_through(model)
    names = [name for name, wrong in zip(found, _anywhere(list(found.values()), model), strict=True) if wrong]
    if not names:
        return None
    more = len(names) - 1
    return f"{names[0]} is NaN or infinite" + (
        f", and so {'is' if more == 1 else 'are'} {more} more of its tensors" if more else ""
    )


def check_weights(model: nn.Module, role: str) -> None:
    """Raises NotFinite where a weight is NaN or infinite. role: what to call the model, "teacher"."""
    if (wrong := wrong_weights(model)) is not None:
        raise NotFinite(
            f"the {role}'s {wrong}; accepted: finite weights (a run that diverged leaves such, and so does a cast to float16 of "
            "what is larger than 65504)"
        )


class Losses:
    """Losses of batches that come one by one, and what tells each batch from others. Nothing waits for the device."""

    def __init__(self, batch: str) -> None:
        """batch: what such a batch is called."""
        self.batch = batch
        self.values: list[Tensor] = []
        self._begun: list[Tensor | None] = []

    def add(self, loss: Tensor, input_ids: Tensor | None) -> None:
        """loss: 0-dim. input_ids: (B, S), or None where the batch has none."""
        self.values.append(loss.detach())
        self._begun.append(None if input_ids is None else input_ids[:SHOWN_ROWS, :SHOWN_TOKENS].clone())

    def wrong(self, values: list[float]) -> int | None:
        """The number of the first that is not finite. values: these, on the host."""
        return next((number for number, value in enumerate(values) if not math.isfinite(value)), None)

    def where(self, number: int | None = None) -> str:
        """Which batch it was; without a number all of them."""
        if number is None:
            return "; ".join(map(self.where, range(len(self.values)))) or "before its first batch"
        begun = self._begun[number]
        rows = "" if begun is None else f", whose rows begin with the tokens {', '.join(map(str, begun.tolist()))}"
        return f"{self.batch} {number + 1} of {len(self.values)}{rows}"

    def check_mean(self, name: str, mean: float, model: nn.Module, steps: int) -> None:
        """Raises NotFinite where the mean of these losses, of all ranks, is no number. name: of it. steps: so far."""
        if math.isfinite(mean):
            return
        wrong = self.wrong(torch.stack(self.values).tolist())
        where = "a batch of another process" if wrong is None else self.where(wrong)
        weights = wrong_weights(model)
        cause = "" if weights is None else f"; the student's {weights}"
        raise NotFinite(f"{name} is {mean} after {steps} steps{cause}; {where}")


class Watch:
    """Ends a training whose numbers are none, or whose student gets no gradient.

    model: the student. keeps_gradients: whether they are there when the step is taken; some optimizers step within the backward.
    """

    def __init__(self, model: nn.Module, *, keeps_gradients: bool) -> None:
        self.model, self.keeps_gradients = model, keeps_gradients
        self.begin_run()

    def begin_run(self) -> None:
        self._learns = False  # a gradient was seen that is not 0
        self.begin_step()

    def begin_step(self) -> None:
        self._losses = Losses("micro-batch")
        self._tokens: Any = None

    def add(self, loss: Tensor, input_ids: Tensor | None, tokens: Any) -> None:
        """A micro-batch. loss: 0-dim, with its graph. tokens: how many count in the whole step; None where that is not known."""
        self._losses.add(loss, input_ids)
        self._tokens = tokens
        if torch.is_grad_enabled() and not loss.requires_grad:
            raise self._without_gradient()

    def check(self, step: int, norm: Any, scaler: torch.amp.GradScaler | None) -> None:
        """Before the optimizer's step, the only wait for the device in it. step: its number. norm: of the student's gradients.

        Raises NotFinite for a loss or a norm that is NaN or infinite, unless a scaler leaves the step out and makes the next loss
        smaller; ValueError where no parameter has a gradient. Warns where all gradients are 0.
        """
        whole = norm.full_tensor() if hasattr(norm, "full_tensor") else torch.as_tensor(norm)
        *values, size = torch.stack([*self._losses.values, whole.to(self._place())]).tolist()
        wrong = self._losses.wrong(values)
        if wrong is None and math.isfinite(size):
            self._check_gradients(step, size)
        elif scaler is None or scaler.get_scale() <= 1:
            what = f"the norm of the gradients is {size}" if wrong is None else f"the loss is {values[wrong]}"
            raise self.ended(step, what, wrong)

    def ended(self, step: int, what: str, batch: int | None = None) -> NotFinite:
        """The error that ends a step. batch: the micro-batch that it comes from, None where that is not known."""
        weights = wrong_weights(self.model)
        cause = "" if weights is None else f"the step before has left the student where {weights}; "
        return NotFinite(
            f"{what} at step {step}; {cause}a smaller learning rate or a longer warmup may help, if the data is as it should be: "
            f"{self._losses.where(batch)}"
        )

    def _place(self) -> torch.device:
        return self._losses.values[0].device if self._losses.values else torch.device("cpu")

    def _check_gradients(self, step: int, size: float) -> None:
        """At the first step in which a token counts: does the student learn at all? size: the norm of its gradients."""
        if self._learns or (size == 0.0 and self._tokens is not None and not int(self._tokens)):
            return
        self._learns = True
        if size != 0.0 or not self.keeps_gradients:
            return
        if all(parameter.grad is None for parameter in self.model.parameters()):
            raise self._without_gradient()
        logger.warning(
            "All gradients of the student are 0 at step %d, though tokens count: it learns nothing. That is right where it equals "
            "its teacher, and where kd_weight and ce_weight are 0; else some layers let no gradient through.",
            step,
        )

    def _without_gradient(self) -> ValueError:
        names = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        return ValueError(
            f"no gradient reaches the student: none of its {len(names)} parameters that require one gets it, {names[0]} for one. "
            "Between them and the loss are layers that let none through, such as quantised ones that were made ready for inference"
        )

"""TRL's GKDTrainer and DistillationTrainer with the fused loss: no logits are built, nothing else changes.

    from trl.experimental.gkd import GKDConfig, GKDTrainer
    from kdkernels.compat.trl import patch_gkd_trainer

    patch_gkd_trainer()  # before training; GKDTrainer itself is used as before
    GKDTrainer(student, teacher, GKDConfig("run", beta=0.5), train_dataset=chats, processing_class=tokenizer).train()

or for one block, ``with gkd_trainer_patched():``. ``patch_distillation_trainer`` and ``distillation_trainer_patched`` do the same
for ``trl.DistillationTrainer``. What is replaced is ``compute_loss`` of the class, so trainers made before take part too, and
un-patching gives back the very function that was there.

GKDTrainer builds both models' logits [B, S, V] and some float copies of them; DistillationTrainer works on tiles of 4096 tokens by
32768 words and multiplies anew in the backward. Here both take hidden states from the models' own forwards and one call of
``kd.linear_kd_loss``, with TRL's conventions: which end of ``beta`` is which divergence; no T²; the GKDTrainer's loss at
temperature 1, since there ``temperature`` is of sampling alone; the division by ``num_items_in_batch``, or by the tokens of the
batch.

TRL's own compute_loss goes on being called where its result is asked for: for ``return_outputs=True`` of the GKDTrainer (an
evaluation with compute_metrics), whose caller wants the logits, and for subclasses that replace a part of the loss. Subclasses with
a compute_loss of their own (ServerDistillationTrainer) are as they were.

Students with PEFT adapters, gradient checkpointing, DistributedDataParallel and FSDP2 work as without the patch; DeepSpeed ZeRO-3
and FSDP1 have no whole head to compute with, which is a ValueError. Before a model's first loss ``verify_lm_head`` holds its head
against its logits, except under FSDP.

TRL 1.16.0 is what was read; another release, or a class that was changed, is refused.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from kdkernels.compat.conventions import divergence_of_beta
from kdkernels.errors import to_install
from kdkernels.losses.linear import linear_kd_loss
from kdkernels.transformers.heads import lm_head
from kdkernels.transformers.hidden import hidden_states
from kdkernels.transformers.verify import verify_lm_head

RELEASES = ("1.16.0",)  # of TRL, whose sources were read

ComputeLoss = Callable[..., Any]

# What a DistillationTrainer's batch may hold for the model besides tokens and their mask.
MORE_INPUTS = (
    "pixel_values",
    "image_grid_thw",
    "pixel_attention_mask",
    "spatial_shapes",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)


_verified: WeakSet[nn.Module] = WeakSet()


def _prepared(trainer: Any, model: nn.Module) -> Any:
    """The model that accelerate was given, inside what shards, spreads and compiles it."""
    return trainer.accelerator.unwrap_model(model, keep_torch_compile=False)


@contextmanager
def _in_own_dtype(trainer: Any, *models: nn.Module) -> Iterator[None]:
    """Inside, the models run without the autocast that accelerate has put around their forwards."""
    wrapped = []
    for model in models:
        attributes = vars(_prepared(trainer, model))
        if "_original_forward" in attributes:
            wrapped.append((attributes, attributes["forward"]))
            attributes["forward"] = attributes["_original_forward"]
    try:
        yield
    finally:
        for attributes, forward in wrapped:
            attributes["forward"] = forward


def _verify(trainer: Any, *models: nn.Module) -> None:
    """``verify_lm_head``, once for each model."""
    if trainer.is_fsdp_enabled:  # it may hold the weights in one dtype and multiply in another, which would be taken for an error
        return
    for model in models:
        inner = _prepared(trainer, model)
        if inner not in _verified:
            with _in_own_dtype(trainer, model):
                verify_lm_head(inner)
            _verified.add(inner)


def _fused_loss(
    trainer: Any,
    model: nn.Module,
    batch: Mapping[str, Any],
    targets: Tensor,
    *,
    temperature: float,
    num_items: Tensor | float | None,
    return_metrics: bool,
) -> Any:
    """The loss of a micro-batch, with the metrics of ``linear_kd_loss`` if they are asked for.

    batch: arguments of both models, (B, S). targets: (B, C), C < S, the tokens to predict by the C positions before the last one;
    -100 does not count. num_items: what the sum over the tokens is divided by, None for their number.
    """
    teacher = trainer.teacher_model
    batch = {"position_ids": None, **batch}  # as TRL leaves them to the models, padding on the left included
    student_hidden = hidden_states(model, batch)
    with torch.no_grad():
        teacher_hidden = hidden_states(teacher, batch)
    student_head, teacher_head = lm_head(model), lm_head(teacher).detach()
    # A model split over devices may end on another one than its head is on.
    device, width = student_head.weight.device, targets.shape[1]
    return linear_kd_loss(
        student_hidden[:, :-1][:, -width:].to(device),
        student_head,
        teacher_hidden[:, :-1][:, -width:].to(teacher_head.weight.device),
        teacher_head,
        targets.to(device),
        divergence=divergence_of_beta(trainer.beta),
        temperature=temperature,
        square_temperature=False,
        normalizer=None if num_items is None else torch.as_tensor(num_items, dtype=torch.float32),
        return_metrics=return_metrics,
    )


def _of_gkd(original: ComputeLoss, unchanged: Callable[[Any], bool]) -> ComputeLoss:
    def compute_loss(self: Any, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        if return_outputs or not unchanged(self):
            return original(self, model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        _verify(self, model, self.teacher_model)
        self.teacher_model.eval()
        with self.accelerator.autocast():  # the heads' products too, which the models' own forwards do not cover here
            return _fused_loss(
                self,
                model,
                {name: inputs[name] for name in ("input_ids", "attention_mask")},
                inputs["labels"][:, 1:],
                temperature=1.0,
                num_items=num_items_in_batch,
                return_metrics=False,
            )

    return compute_loss


def _of_distillation(original: ComputeLoss, unchanged: Callable[[Any], bool]) -> ComputeLoss:
    def compute_loss(self: Any, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        if not unchanged(self):
            return original(self, model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        _verify(self, model, self.teacher_model)
        self.teacher_model.eval()
        mode = "train" if self.model.training else "eval"
        if mode == "train" and inputs.get("num_items_in_batch") is not None:
            # Counted after the student has written; the gradients are averaged over the ranks, the count is of all of them.
            num_items_in_batch = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        counted = inputs["completion_mask"] * inputs.get("tool_mask", 1) != 0
        more = {name: inputs[name] for name in MORE_INPUTS if name in inputs}
        if "pixel_values" not in more:
            more.pop("image_grid_thw", None)
        with _in_own_dtype(self, model, self.teacher_model):  # as TRL, which calls what is below these forwards
            loss, metrics = _fused_loss(
                self,
                model,
                {
                    "input_ids": torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
                    "attention_mask": torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
                    **more,
                },
                inputs["completion_ids"].masked_fill(~counted, -100),
                temperature=self.temperature,
                num_items=num_items_in_batch,
                return_metrics=True,
            )
        tokens = self.accelerator.gather_for_metrics(metrics["tokens"]).sum()
        entropy = self.accelerator.gather_for_metrics(metrics["student_entropy"] * metrics["tokens"]).sum()
        self._metrics[mode]["entropy"].append((entropy / tokens).item() if tokens > 0 else 0.0)
        return (loss, None) if return_outputs else loss

    profiled: ComputeLoss = importlib.import_module("trl.extras.profiling").profiling_decorator(compute_loss)
    return profiled


@dataclass(frozen=True)
class _Patch:
    """How one of TRL's trainers is patched.

    module, name: where the class is. read: what the fused loss stands in for, a digest of its source by its name in the class, or
    in the module where it starts with a dot. make: the new compute_loss, from the original one and from whether a trainer still has
    all that was read.
    """

    module: str
    name: str
    read: Mapping[str, str]
    make: Callable[[ComputeLoss, Callable[[Any], bool]], ComputeLoss]

    def apply(self) -> None:
        if self.name in _originals:
            return
        cls = self._supported()
        original, parts = vars(cls)["compute_loss"], [name for name in self.read if name[0] != "." and name != "compute_loss"]
        known = {name: getattr(cls, name) for name in parts}

        def unchanged(trainer: Any) -> bool:
            return all(getattr(type(trainer), name) is part and name not in vars(trainer) for name, part in known.items())

        replacement = self.make(original, unchanged)
        cls.compute_loss = replacement  # type: ignore[attr-defined]
        _originals[self.name] = (cls, original, replacement)

    def undo(self) -> None:
        if self.name not in _originals:
            return
        cls, original, replacement = _originals[self.name]
        if vars(cls)["compute_loss"] is not replacement:
            raise RuntimeError(
                f"{self.name}.compute_loss has been replaced since it was patched; undo that first, or it would be lost here"
            )
        cls.compute_loss = original
        del _originals[self.name]

    @contextmanager
    def applied(self) -> Iterator[None]:
        before = self.name in _originals
        self.apply()
        try:
            yield
        finally:
            if not before:
                self.undo()

    def _supported(self) -> type:
        """The class, if it is the one that was read."""
        try:
            installed = importlib.metadata.version("trl")
        except importlib.metadata.PackageNotFoundError as error:
            raise ImportError(f"patching {self.name} needs TRL, not installed here: {to_install('trl')}") from error
        supported = f"supported: {', '.join(RELEASES)}"
        if installed not in RELEASES:
            raise RuntimeError(f"{self.name} of TRL {installed} cannot be patched, its loss may be another; {supported}")
        module = importlib.import_module(self.module)
        cls: type = getattr(module, self.name)
        for name, digest in self.read.items():
            holder, attribute = (module, name[1:]) if name[0] == "." else (cls, name)
            if _digest(getattr(holder, attribute)) != digest:
                raise RuntimeError(
                    f"{self.name} of TRL {installed} cannot be patched: its {attribute} is not the released one (edited, or "
                    f"replaced by another patch); {supported}, as released"
                )
        return cls


_originals: dict[str, tuple[Any, ComputeLoss, ComputeLoss]] = {}  # the class, what was there, what is there now


def _digest(function: Any) -> str:
    """Of the source, or nothing where there is none to read."""
    try:
        return hashlib.sha256(inspect.getsource(inspect.unwrap(function)).encode()).hexdigest()[:16]
    except (OSError, TypeError):
        return ""


_GKD = _Patch(
    "trl.experimental.gkd.gkd_trainer",
    "GKDTrainer",
    {"compute_loss": "6c602000b7955e81", "generalized_jsd_loss": "fa445e28549d31b6"},
    _of_gkd,
)
_DISTILLATION = _Patch(
    "trl.trainer.distillation_trainer",
    "DistillationTrainer",
    {
        "compute_loss": "e5082879a7183040",
        "_compute_loss": "9fc0021cbcc0b5e9",
        "_get_last_hidden_state": "12dc17e4ad4b1999",
        "._chunked_divergence_loss": "550cb45191ab1654",
    },
    _of_distillation,
)


def patch_gkd_trainer() -> None:
    """Let ``trl.experimental.gkd.GKDTrainer`` compute its loss from hidden states. Once patched, another call changes nothing.

    Loss and gradients are TRL's up to rounding. Nothing is logged that is not logged without the patch. TRL's ``empty_cache()``
    after each loss, which hands back the logits' memory, is left out. A batch in which no token counts has loss 0 whatever
    ``num_items_in_batch`` is (there: NaN where that is 0).

    Raises ImportError where TRL is missing, RuntimeError where its release, or its source, is not what was read; then nothing has
    been changed. In training, ValueError as ``kdkernels.transformers.lm_head`` for heads that are not whole (DeepSpeed ZeRO-3,
    FSDP1), quantised, or not linear, and as ``verify_lm_head``.
    """
    _GKD.apply()


def unpatch_gkd_trainer() -> None:
    """Undo ``patch_gkd_trainer``; where it is not in force nothing happens.

    Raises RuntimeError if compute_loss has been replaced by others since.
    """
    _GKD.undo()


def gkd_trainer_patched() -> AbstractContextManager[None]:
    """``patch_gkd_trainer`` for the length of a with block, after which all is as it was before."""
    return _GKD.applied()


def patch_distillation_trainer() -> None:
    """Let ``trl.DistillationTrainer`` compute its loss here. Once patched, another call changes nothing.

    Loss, gradients and the logged entropy are TRL's up to rounding. Logit scales and softcaps are those that
    ``kdkernels.transformers.lm_head`` reads and ``verify_lm_head`` tests, also of models whose configuration TRL misreads. As in
    TRL the loss is computed in the parameters' own dtype whatever ``bf16`` says (its default there is True): TRL calls the model
    below the forward that accelerate wraps in autocast.

    Raises as ``patch_gkd_trainer``.
    """
    _DISTILLATION.apply()


def unpatch_distillation_trainer() -> None:
    """Undo ``patch_distillation_trainer``; where it is not in force nothing happens.

    Raises RuntimeError if compute_loss has been replaced by others since.
    """
    _DISTILLATION.undo()


def distillation_trainer_patched() -> AbstractContextManager[None]:
    """``patch_distillation_trainer`` for the length of a with block, after which all is as it was before."""
    return _DISTILLATION.applied()

"""``KDTrainer``: transformers' Trainer, with a teacher.

Where the data flows: a step's micro-batches come in (get_batch_samples), where the student may write some anew; each becomes a
Lesson for the method's loss (compute_loss), divided by the tokens that count in all of them; sums over their tokens are kept.
What a method does besides, it does in its hooks (methods/base.py): OKD's teacher takes a step of its own before the student's
optimizer does, TAID's controller sees the step's means after it. In an evaluation nothing of that moves.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from kdkernels.losses.taid import TAIDSchedule
from kdkernels.transformers import checkpoints, given
from kdkernels.transformers.batches.inputs import Collated, Inputs
from kdkernels.transformers.batches.layout import IGNORED, PADDING, TARGETS, Prepared, document_numbers, next_tokens
from kdkernels.transformers.config import KDConfig
from kdkernels.transformers.data import Collator
from kdkernels.transformers.finite import Losses, NotFinite, Watch, check_weights
from kdkernels.transformers.heads import lm_head
from kdkernels.transformers.hidden import hidden_states
from kdkernels.transformers.means import TokenMeans, floats
from kdkernels.transformers.methods import parts_of
from kdkernels.transformers.methods.base import Lesson, Means
from kdkernels.transformers.modes import evaluate, evaluating
from kdkernels.transformers.on_policy import OnPolicy
from kdkernels.transformers.online import OnlineTeacher
from kdkernels.transformers.padding import tokenizer_of as saved_tokenizer
from kdkernels.transformers.verify import check_documents, verify_lm_head

logger = logging.getLogger(__name__)


class _Steps(TrainerCallback):
    """Hands the Trainer's events on to the trainer itself."""

    def __init__(self, trainer: KDTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        for part in self.trainer.parts:
            part.before_step()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        for part in self.trainer.parts:
            part.after_step()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        check_weights(self.trainer.model, "student")


class KDTrainer(Trainer):
    """transformers' Trainer that distils a teacher into the model it trains.

    model: the student, a causal language model of transformers, also with PEFT adapters.
    args: a KDConfig.
    teacher: a causal language model; or its folder or hub name; or a folder made by ``python -m kdkernels cache`` (or a TopKCache),
        whose log-probabilities then stand in for the model.
    processing_class, teacher_processing_class: the tokenizers, or processors that have one, whose vocabularies must be the same.
        Where one is not given, the one saved with its model is looked for. Heads of different height (padded vocabularies) are cut
        to what both know; tokens that are no padding and no special tokens are named in a warning where they are cut off, and
        args.vocab_size says which rows are meant (``shared_vocabulary``).
    train_dataset, eval_dataset: examples with "input_ids" and, unless each token counts, "labels" (-100: does not count), both not
        shifted. A position counts where its label does, and its token and the one before it are real and of one document. With a
        cached teacher both must be in the cache, and the train_dataset may be left out: the cache holds its own. Of a list or a
        Dataset the first 10,000 examples are looked at now (without a data_collator), the others when they come.
    data_collator: makes {"input_ids", "attention_mask", "labels"} of them (default: pads on the right; further columns go along).
        Further ones go to both models, and are refused where one does not take them; texts and numbers about examples are left out
        with a word. Padding may stand on either side. Documents in one row (DataCollatorWithFlattening) are told by position_ids
        that restart, by cu_seq_lens_q or seq_idx, or by an attention_mask that numbers them.
    The rest is the Trainer's. No logits are made, so compute_metrics and preprocess_logits_for_metrics are refused.

    Both heads are verified (``verify_lm_head``) before anything else. What is logged besides the loss, as means over the tokens
    since the last log: kd (the divergence, without T² and weights), ce, target_entropy, student_entropy, agreement, overlap, and
    tokens, how many these were; in TAID t, in OKD teacher_loss; in evaluations the same with the prefix "eval_" (but for tokens),
    over the whole data set and against the teacher itself (t = 1, without LoRA). A checkpoint holds all that a run needs to go on
    as if it had not been interrupted. With "okd" the LoRA stays on the teacher after training; ``trainer.online.unload()`` gives it
    back without.

    A loss or gradients that are NaN or infinite end training before the optimizer's step, with no option to go on: that step would
    leave NaN in every weight. (A GradScaler may leave steps out while a smaller scale can help.) An evaluation whose loss is no
    number ends it too, and so does a student that no gradient reaches; gradients that are all 0 are warned of. Weights that are no
    numbers are not saved.

    Raises ValueError or TypeError that names the argument, what came and what is accepted.
    """

    args: KDConfig
    model: Any
    optimizer: Any
    processing_class: Any

    def __init__(
        self,
        model: Any,
        args: KDConfig,
        data_collator: Callable[[Any], Any] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        teacher: Any,
        teacher_processing_class: Any = None,
        **options: Any,
    ) -> None:
        given.check_options(args, options)
        given.check_student(model)
        given.check_tokenizers(processing_class, teacher_processing_class)
        given.check_model(model, "model")
        self.cache = given.cache_of(teacher)
        self.teacher: Any = given.teacher_of(teacher, model) if self.cache is None else None
        if self.cache is not None:
            train_dataset = given.learned_from(self.cache, args, train_dataset)
        if processing_class is None:
            processing_class = saved_tokenizer(model)
        own_collator = data_collator is not None
        if not own_collator:
            # The student's own padding may be a token that the teacher has no row for; what stands at padding does not matter.
            data_collator = Collator(None)
        super().__init__(model, args, data_collator, train_dataset, eval_dataset, processing_class, **options)

        self.model_accepts_loss_kwargs = True  # the loss divides by the tokens of the whole step
        self._loss_shifts_labels = True
        self._prepared = False  # its parts
        if not self.is_fsdp_enabled:  # there it waits until the weights are where they belong
            verify_lm_head(model, role="student")
        if self.teacher is not None:
            self._place_teacher()
            verify_lm_head(self.teacher, role="teacher")
        self.vocab_size, self.known_tokens = given.in_common(
            self.model, self.teacher, self.cache, self.processing_class, teacher_processing_class, args.vocab_size
        )
        models = {"model": self.model} if self.teacher is None else {"model": self.model, "teacher": self.teacher}
        self.inputs = Inputs.of(models, None if args.vocab_size is not None else self.known_tokens)
        if not own_collator:
            given.look_at(self.data_collator, self.inputs, train_dataset=self.train_dataset, eval_dataset=self.eval_dataset)
        self._collate = Collated(self.data_collator, self.inputs, self.cache)
        self.data_collator = self._collate
        self.method, *others = parts_of(self)
        self.parts = (self.method, *others)
        self._logged, self._evaluated = TokenMeans(), TokenMeans()
        steps_within_backward = any(kind in str(args.optim) for kind in ("lomo", "layerwise"))
        self._watch, self._evaluated_losses = Watch(model, keeps_gradients=not steps_within_backward), Losses("batch")
        self._empty: Tensor = torch.tensor(0)  # steps of which no token counted
        self._told: set[str] = set()
        self._apart = False  # whether both models were seen to keep documents apart
        self.add_callback(_Steps(self))

    # ---- what is set up once ----

    @property
    def online(self) -> OnlineTeacher | None:
        """OKD's teacher."""
        return getattr(self.method, "online", None)

    @property
    def taid(self) -> TAIDSchedule | None:
        """TAID's controller."""
        return getattr(self.method, "schedule", None)

    @property
    def on_policy(self) -> OnPolicy | None:
        """Where the student writes, what decides when."""
        return next((part.on_policy for part in self.parts if hasattr(part, "on_policy")), None)

    def _place_teacher(self) -> None:
        evaluate(self.teacher)
        placed = (getattr(self.teacher, name, None) is not None for name in ("hf_device_map", "quantization_method"))
        if not self.is_fsdp_enabled and not any(placed):  # FSDP2 moves each shard, where the whole may not fit
            self.teacher.to(self.args.device)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        # A second run starts where the first did, however that ended; a checkpoint's state comes after this.
        self._logged = TokenMeans()
        self._watch.begin_run()
        for part in self.parts:
            part.begin_run()
        if not self._prepared:
            self._prepared = True
            for part in self.parts:
                part.prepare()
        if not self.is_fsdp_enabled and self.model_wrapped is self.model:
            # An evaluation before has let accelerate mark the model as prepared, which would now leave it without
            # DistributedDataParallel.
            vars(self.model).pop("_is_accelerate_prepared", None)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if self.is_fsdp_enabled:
            verify_lm_head(self.model, role="student")
        return prepared

    # ---- a step ----

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """The Trainer's, of the tokens that count in the loss."""
        counted = [
            {"labels": nn.functional.pad(next_tokens(batch), (1, 0), value=IGNORED)} if "labels" in batch else batch
            for batch in batch_samples
        ]
        return super()._get_num_items_in_batch(counted, device)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """The micro-batches of a step and how many tokens count in them on all ranks; some may be the student's own writing."""
        if 0 < self.state.max_steps <= self.state.global_step:
            # Resumed from its last step: the Trainer looks whether it is done only after one more.
            self.control.should_training_stop = True
            return [], None
        self._watch.begin_step()
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        for part in self.parts if batches else ():
            if (written := part.write(batches)) is not None:
                batches, count = written, self._get_num_items_in_batch(written, device)
        self._notice(count)
        return batches, count

    def _notice(self, count: Tensor | int | None) -> None:
        """Steps of which no token counts, on the device: they are told when next something is logged."""
        if count is not None:
            self._empty = self._empty + (torch.as_tensor(count) == 0)

    def _tell(self, empty: bool, what: str) -> None:
        if empty and what not in self._told:
            self._told.add(what)
            logger.warning("%s has no token that counts: its loss is 0, and says nothing.", what)

    def ended(self, what: str) -> NotFinite:
        """The error that ends the step at hand."""
        return self._watch.ended(self.state.global_step + 1, what)

    def compute_loss_context_manager(self) -> contextlib.ExitStack:
        """Autocast also around the heads' products and the teacher, which the model's own forward does not cover."""
        stack: contextlib.ExitStack = super().compute_loss_context_manager()
        stack.enter_context(self.accelerator.autocast())
        return stack

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Tensor | int | None = None
    ) -> Any:
        """The step's share of this micro-batch: the sum over its tokens over ``num_items_in_batch`` (None: over their number)."""
        loss, means = self._losses(model, self._collate.prepared(inputs), num_items_in_batch)
        if model.training:
            self._logged.add(means)
            for part in self.parts:
                part.add(means)
            self._watch.add(loss, inputs.get("input_ids"), num_items_in_batch)
        else:
            self._evaluated.add(means)
            self._evaluated_losses.add(loss, inputs.get("input_ids"))
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # the gradients are averaged over the ranks, the count is of all of them
        return (loss, {}) if return_outputs else loss

    def _losses(self, model: nn.Module, batch: Prepared, normalizer: Tensor | int | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch, and its means over tokens."""
        if "labels" not in batch and "shift_labels" not in batch:
            raise ValueError(f"the batch has no labels, which the loss needs; it has {', '.join(batch)}")
        labels = next_tokens(batch)
        # Of each model once; where a forward is one of all ranks, not at all.
        if PADDING in batch and not (self._apart or self.is_fsdp_enabled or self.is_deepspeed_enabled):
            check_documents({"model": self.model, "teacher": self.teacher}, len(labels))
            self._apart = True
        options = {
            **self.args.loss_options(),
            "divergence": self.args.resolved_divergence(),
            "normalizer": normalizer if normalizer is None or isinstance(normalizer, Tensor) else float(normalizer),
            "vocab_size": self.vocab_size,
            "return_metrics": True,
        }
        read = {name: value for name, value in batch.items() if name not in TARGETS}
        lesson = Lesson(
            batch=read,
            targets={name: batch[name] for name in TARGETS if name in batch},
            labels=labels,
            student=lambda: (hidden_states(model, self.inputs.to("model", read)), lm_head(model)),
            options=options,
            training=model.training and torch.is_grad_enabled(),
        )
        loss, means = self.method.loss(lesson)
        return loss, self._per_token(means, loss, normalizer)

    def _per_token(self, means: Means, loss: Tensor, normalizer: Tensor | int | None) -> Means:
        """The metrics and the loss, whatever it was divided by, as means over the batch's tokens."""
        tokens = means["tokens"]
        scale = 1.0 if normalizer is None else torch.as_tensor(normalizer, device=tokens.device) / tokens
        means = {name: value * scale if name in self.method.losses else value for name, value in means.items()}
        return {**means, "loss": loss.detach() * scale}

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The Trainer's; a step whose losses or gradients are no numbers ends the run here, before a weight has moved."""
        norm = super()._get_grad_norm(model, grad_norm)
        if not self.is_deepspeed_enabled:  # which holds the gradients, scales them, and leaves steps out by itself
            self._watch.check(self.state.global_step + 1, norm, self.accelerator.scaler)
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The Trainer's, with the means over the tokens since the last log."""
        self._tell(bool(self._empty), "A step")
        if "loss" in logs:
            means = self._logged.drained()
            logs.update(floats(means))
            if means:
                logs["tokens"] = float(means["tokens"])
            for part in self.parts:
                logs.update(part.logs())
        super().log(logs, start_time)

    # ---- evaluation: nothing moves ----

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, None, None]:
        """The loss of a batch; there are no logits to return."""
        inputs = self._collate.prepared(self._prepare_inputs(inputs))
        if "labels" in inputs:
            inputs["labels"] = self._counted_once(inputs)
        with evaluating(model), torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        return loss.detach(), None, None

    def _counted_once(self, batch: Prepared) -> Tensor:
        """The last batches of several ranks are filled up with examples that came before; those do not count again."""
        labels: Tensor = batch["labels"]
        state = self.accelerator.gradient_state
        if self.args.world_size == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return labels
        numbers = document_numbers(batch)
        first = self.args.process_index * (numbers[-1, -1] + 1)
        return labels.masked_fill(first + numbers >= state.remainder, IGNORED)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The Trainer's, with means over all tokens of the data set in place of means over batches.

        The loss is against the teacher itself, which does not move: losses against two targets would not compare.
        """
        self._evaluated, self._evaluated_losses = TokenMeans(), Losses("batch")
        with self.method.evaluating():
            output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        means = self._evaluated.drained()
        self._tell(not float(means.get("tokens", 0.0)), f"An evaluation ({metric_key_prefix})")
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in floats(means).items()}
        name = f"{metric_key_prefix}_loss"
        self._evaluated_losses.check_mean(name, metrics.get(name, 0.0), self.model, self.state.global_step)
        return output._replace(metrics={**(output.metrics or {}), **metrics})

    def _evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        metrics: dict[str, float] = super()._evaluate(*arguments, **options)
        for part in self.parts:
            part.evaluated(metrics)
        return metrics

    # ---- checkpoints ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The student, as the Trainer saves it; with save_teacher also OKD's LoRA, in the folder "teacher" beside it.

        Raises ValueError where a weight is NaN or infinite, and leaves what was saved before.
        """
        check_weights(self.model, "student")
        for part in self.parts:
            part.check()
        super().save_model(output_dir, _internal_call)
        for part in self.parts:
            part.save(Path(output_dir or self.args.output_dir or "."))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        checkpoints.save(self.parts, Path(output_dir), self.args)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            checkpoints.load(self.parts, Path(checkpoint), self.args)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.state.best_model_checkpoint is not None:
            checkpoints.load_best(self.parts, Path(self.state.best_model_checkpoint))

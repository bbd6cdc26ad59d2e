"""Settings of a distillation run, on top of those of transformers' Trainer."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import TrainingArguments

from kdkernels.transformers.methods import SETTINGS, AllSettings
from kdkernels.transformers.settings import said

# Of a Trainer that computes activations twice: since transformers 5.23, and before, which is to go with 6.
CHECKPOINTING = next(name for name in ("activation_checkpointing", "gradient_checkpointing") if hasattr(TrainingArguments, name))


@dataclass
class KDConfig(AllSettings, TrainingArguments):
    """Settings of ``KDTrainer``: those of transformers.TrainingArguments, and what is distilled how.

    The loss of a token is kd_weight T² D + ce_weight CE, as ``kd.linear_kd_loss`` has it; a step divides by the tokens that count
    in all its micro-batches on all ranks.

    method: a divergence of ``kd.divergences()`` between the teacher and the student; "taid", whose target moves from the student to
        the teacher (arXiv 2501.16937); "okd", whose teacher adapts along with the student through LoRA (arXiv 2409.12512).
    divergence: the student's in "taid" and "okd" (None: forward_kl). divergence_parameter: beta of jsd, alpha of the skew ones.
    taid_*: of ``kd.TAIDSchedule``. okd_teacher_alpha: of ``kd.linear_okd_loss``. okd_lora_*, okd_target_modules: of the LoRA on
        the teacher's query and value projections. okd_learning_rate: of the teacher (None: the student's); it follows the student's
        schedule. save_teacher: save the LoRA too, beside the student, in the folder "teacher".
    on_policy_fraction: the part of the batches that the student writes itself, from the prompts of the data, for the teacher to
        judge (GKD, arXiv 2306.13649). on_policy_schedule: "constant", or "adaptive": the fraction grows by 0.1 when an evaluation
        does not find a lower cross-entropy, and batches are used again from a buffer of replay_buffer_size sequences (DistiLLM,
        arXiv 2402.03898). on_policy_max_new_tokens, on_policy_temperature, on_policy_top_k (0: all), on_policy_top_p: of sampling.
    topk_tail: with a cached teacher, what stands for the tokens that it does not list (``kd.linear_topk_kd_loss``).
    vocab_size: cut both heads to their first rows (None: to what the two have in common); tokens below that have other names in the
        other tokenizer are taken for one another, with a warning. strategy, memory_budget: as for the loss.

    Raises ValueError or TypeError that names the setting, what came and what is accepted.
    """

    remove_unused_columns: bool = said(False, "Off: the loss takes columns that the model does not.")

    def __post_init__(self) -> None:
        """First what needs no model."""
        for settings in SETTINGS:
            settings.check_fields(self)
            settings.check(self)
        if self.label_smoothing_factor != 0.0:
            raise ValueError(f"label_smoothing_factor={self.label_smoothing_factor} is not a term of this loss; accepted: 0")
        super().__post_init__()

    @property
    def checkpoints_activations(self) -> bool:
        """Whether activations are computed twice instead of kept."""
        return bool(getattr(self, CHECKPOINTING))

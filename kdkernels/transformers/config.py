"""Settings of a distillation run, on top of those of transformers' Trainer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from kdkernels.divergences import Divergence, divergences, resolve
from kdkernels.engine.cut import STRATEGIES
from kdkernels.engine.outcomes import TAILS
from kdkernels.losses.taid import TAIDSchedule
from kdkernels.scalars import number, temperature_of
from kdkernels.transformers.on_policy import SCHEDULES

TAID, OKD = "taid", "okd"


def methods() -> tuple[str, ...]:
    """Names that ``KDConfig(method=...)`` accepts."""
    return (*divergences(), TAID, OKD)


def _help(text: str, **more: Any) -> Any:
    return {"help": text, **more}


@dataclass
class KDConfig(TrainingArguments):
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

    method: str = field(default="forward_kl", metadata=_help("A divergence, or taid, or okd."))
    divergence: str | None = field(default=None, metadata=_help("The student's divergence in taid and okd (forward_kl)."))
    divergence_parameter: float | None = field(default=None, metadata=_help("beta of jsd, alpha of the skew divergences."))
    kd_weight: float = field(default=1.0, metadata=_help("Factor of the divergence."))
    ce_weight: float = field(default=0.0, metadata=_help("Factor of the labels' cross-entropy."))
    temperature: float = field(default=1.0, metadata=_help("Divides both models' logits in the divergence."))
    taid_t_start: float = field(default=0.4, metadata=_help("The teacher's share in the target at the start."))
    taid_t_end: float = field(default=1.0, metadata=_help("The teacher's share in the target at the end."))
    taid_alpha: float = field(default=5e-4, metadata=_help("Step size of the adaptive share."))
    taid_beta: float = field(default=0.99, metadata=_help("Momentum of the adaptive share."))
    taid_adaptive: bool = field(default=True, metadata=_help("Move the share faster while the loss falls; else linearly."))
    okd_teacher_alpha: float = field(default=0.5, metadata=_help("KL to the student in the teacher's loss; the rest is CE."))
    okd_lora_rank: int = field(default=32, metadata=_help("Rank of the teacher's LoRA."))
    okd_lora_alpha: float | None = field(default=None, metadata=_help("Numerator of the LoRA's scale alpha / rank."))
    okd_lora_dropout: float = field(default=0.0, metadata=_help("Dropout of the LoRA."))
    okd_target_modules: list[str] | None = field(
        default=None, metadata=_help("Modules that get a LoRA (found: queries and values).", nargs="+")
    )
    okd_learning_rate: float | None = field(default=None, metadata=_help("Learning rate of the teacher's LoRA."))
    save_teacher: bool = field(default=False, metadata=_help("Save the teacher's LoRA beside the student."))
    on_policy_fraction: float = field(default=0.0, metadata=_help("Part of the batches that the student writes itself."))
    on_policy_schedule: str = field(default="constant", metadata=_help("constant (GKD) or adaptive (DistiLLM)."))
    on_policy_max_new_tokens: int = field(default=128, metadata=_help("Longest response that the student writes."))
    on_policy_temperature: float = field(default=1.0, metadata=_help("Temperature of sampling."))
    on_policy_top_k: int = field(default=0, metadata=_help("Sample from so many most likely tokens; 0: from all."))
    on_policy_top_p: float = field(default=1.0, metadata=_help("Sample from the most likely tokens of this mass."))
    replay_buffer_size: int = field(default=1000, metadata=_help("Sequences that the adaptive schedule keeps."))
    topk_tail: str = field(default="bucket", metadata=_help("Tokens that a cached teacher does not list: bucket or renormalize."))
    vocab_size: int | None = field(default=None, metadata=_help("Cut both heads to their first rows."))
    strategy: str = field(default="auto", metadata=_help("How the loss is cut: tokens, vocab or auto."))
    memory_budget: int | None = field(default=None, metadata=_help("Bytes for the loss's logits."))
    remove_unused_columns: bool = field(default=False, metadata=_help("Off: the loss takes columns that the model does not."))

    def __post_init__(self) -> None:
        self._check()
        super().__post_init__()

    def _check(self) -> None:
        """Everything that needs no model."""
        choices = {
            "method": methods(),
            "on_policy_schedule": SCHEDULES,
            "topk_tail": TAILS,
            "strategy": STRATEGIES,
        }
        for name, accepted in choices.items():
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name} {getattr(self, name)!r} is not known; accepted: {', '.join(accepted)}")
        if self.method not in (TAID, OKD) and self.divergence is not None:
            raise ValueError(
                f"divergence={self.divergence!r} goes with method 'taid' or 'okd'; method {self.method!r} is one itself"
            )
        self.resolved_divergence()
        temperature_of("temperature", self.temperature)
        counts = ("okd_lora_rank", "on_policy_max_new_tokens", "replay_buffer_size", "vocab_size", "memory_budget")
        for name in counts:
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} is a whole number of at least 1, got {value!r}")
        for name in ("kd_weight", "ce_weight"):
            number(name, getattr(self, name), "a number of at least 0", 0.0)
        for name in ("on_policy_fraction", "okd_teacher_alpha"):
            if number(name, getattr(self, name), "a number in [0, 1]", 0.0) > 1.0:
                raise ValueError(f"{name} is a number in [0, 1], got {getattr(self, name)}")
        if self.on_policy_schedule == "adaptive" and str(getattr(self.eval_strategy, "value", self.eval_strategy)) == "no":
            raise ValueError(
                "on_policy_schedule='adaptive' goes by evaluations, but eval_strategy is 'no'; accepted: 'steps' or 'epoch'"
            )
        if self.okd_learning_rate is not None:
            number("okd_learning_rate", self.okd_learning_rate, "a number of at least 0, or None", 0.0)
        if self.method == TAID:
            self.taid_schedule()
        if self.label_smoothing_factor != 0.0:
            raise ValueError(f"label_smoothing_factor={self.label_smoothing_factor} is not a term of this loss; accepted: 0")

    def resolved_divergence(self) -> Divergence:
        """The student's divergence."""
        name = self.method if self.method in divergences() else self.divergence or "forward_kl"
        return resolve(name, self.divergence_parameter)

    def taid_schedule(self) -> TAIDSchedule:
        """TAID's controller at its start."""
        return TAIDSchedule(self.taid_t_start, self.taid_t_end, self.taid_alpha, self.taid_beta, self.taid_adaptive)

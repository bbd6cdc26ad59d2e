"""Batches that the student writes itself (GKD, DistiLLM), with any method whose teacher can judge them: ``on_policy.OnPolicy``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from kdkernels.transformers.batches.layout import plain
from kdkernels.transformers.finite import check_weights
from kdkernels.transformers.heads import unwrapped
from kdkernels.transformers.methods.base import Part
from kdkernels.transformers.on_policy import SCHEDULES, OnPolicy
from kdkernels.transformers.settings import COUNT, SHARE, Flag, Settings, one_of, said
from kdkernels.transformers.vocabularies import tokenizer_of

ADAPTIVE = "the fraction grows when an evaluation finds no gain, and what was written is used again (DistiLLM)"


@dataclass
class OnPolicySettings(Settings):
    on_policy_fraction: Annotated[float, SHARE, Flag("PART", "of the batches that the student writes itself (GKD)")] = said(
        0.0, "Part of the batches that the student writes itself."
    )
    on_policy_schedule: Annotated[str, one_of(*SCHEDULES), Flag("NAME", f"adaptive: {ADAPTIVE}")] = said(
        "constant", "constant (GKD) or adaptive (DistiLLM)."
    )
    on_policy_max_new_tokens: Annotated[int, COUNT, Flag("N", "most tokens that the student writes", name="max_new_tokens")] = said(
        128, "Longest response that the student writes."
    )
    on_policy_temperature: float = said(1.0, "Temperature of sampling.")
    on_policy_top_k: int = said(0, "Sample from so many most likely tokens; 0: from all.")
    on_policy_top_p: float = said(1.0, "Sample from the most likely tokens of this mass.")
    replay_buffer_size: Annotated[int, COUNT] = said(1000, "Sequences that the adaptive schedule keeps.")

    @classmethod
    def check(cls, config: Any) -> None:
        if config.on_policy_schedule == "adaptive" and str(getattr(config.eval_strategy, "value", config.eval_strategy)) == "no":
            raise ValueError(
                "on_policy_schedule='adaptive' goes by evaluations, but eval_strategy is 'no'; accepted: 'steps' or 'epoch'"
            )

    @classmethod
    def check_cached(cls, config: Any, cache: Any) -> None:
        if cls.asked_for(config):
            raise ValueError("on_policy_fraction needs a teacher that can judge new text; the teacher given is a cache")

    @staticmethod
    def asked_for(config: Any) -> bool:
        """Whether the student may write at all."""
        return bool(config.on_policy_fraction != 0.0 or config.on_policy_schedule != "constant")


class Writing(Part):
    """Asks ``OnPolicy`` for each micro-batch where it comes from."""

    key = "on_policy"
    per_rank = True  # a replay buffer
    absent = "its run had no on_policy_fraction, or fewer processes"

    def __init__(self, trainer: Any) -> None:
        super().__init__(trainer)
        self.on_policy = self._made()

    def begin_run(self) -> None:
        self.on_policy = self._made()

    def _made(self) -> OnPolicy:
        args, trainer, limits = self.args, self.trainer, self.trainer.inputs.limits
        if limits.positions is not None and args.on_policy_max_new_tokens >= limits.positions:
            raise ValueError(
                f"on_policy_max_new_tokens={args.on_policy_max_new_tokens} leaves no room for a prompt: {limits.whose} takes "
                f"{limits.positions:,} tokens in a sequence; accepted: 1 to {limits.positions - 1}"
            )
        generation = getattr(unwrapped(trainer.model), "generation_config", None)
        given = trainer.processing_class
        tokenizer = None if given is None else tokenizer_of(given, "processing_class")
        ids = [getattr(tokenizer, "eos_token_id", None), getattr(generation, "eos_token_id", None)]
        ends = {end for one in ids if one is not None for end in (one if isinstance(one, list) else [one])}
        return OnPolicy(
            args.on_policy_fraction,
            schedule=args.on_policy_schedule,
            max_new_tokens=args.on_policy_max_new_tokens,
            temperature=args.on_policy_temperature,
            top_k=args.on_policy_top_k,
            top_p=args.on_policy_top_p,
            replay_size=args.replay_buffer_size,
            seed=args.seed,
            pad_token_id=0,  # masked, and known to both
            eos_token_id=sorted(ends) or None,
            vocab_size=trainer.known_tokens,
            positions=limits.positions,
        )

    def write(self, batches: list[Any]) -> list[Any]:
        trainer = self.trainer
        check_weights(trainer.model, "student")  # sampling by NaN leaves a GPU unusable
        step, steps = trainer.state.global_step, max(1, trainer.state.max_steps)
        try:
            with trainer.compute_loss_context_manager():
                return [
                    self.on_policy.batch(
                        trainer.model,
                        plain(trainer._prepare_inputs(batch)),
                        step=step,
                        micro=micro,
                        progress=min(1.0, step / steps),
                        rank=self.args.process_index,
                        synced=trainer.is_fsdp_enabled,
                    )[0]
                    for micro, batch in enumerate(batches)
                ]
        except RuntimeError as error:
            if "probability tensor" not in str(error):
                raise
            raise trainer.ended("the student writes by probabilities that are nan") from error

    def evaluated(self, metrics: Mapping[str, float]) -> None:
        found = [value for name, value in metrics.items() if name.startswith("eval_") and name.endswith("_ce")]
        if found:
            self.on_policy.observe(sum(found) / len(found))

    def logs(self) -> dict[str, float]:
        return {"on_policy_fraction": self.on_policy.fraction}

    def state_dict(self) -> Any:
        return self.on_policy.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.on_policy.load_state_dict(state)

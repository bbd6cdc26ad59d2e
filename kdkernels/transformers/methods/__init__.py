"""How a student can be taught.

A method is a file here: its settings (a dataclass of Settings) and its part (a subclass of Fixed, or of another method), both with
its name. The settings go among the bases of ``AllSettings``, by which type checkers know KDConfig's fields too; all else follows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from kdkernels.divergences import Divergence, divergences, resolve
from kdkernels.scalars import one_of as check_one_of
from kdkernels.transformers.methods.cached import Cached, CachedSettings
from kdkernels.transformers.methods.fixed import Fixed, Live, LossSettings
from kdkernels.transformers.methods.okd import OKDSettings
from kdkernels.transformers.methods.on_policy import OnPolicySettings, Writing
from kdkernels.transformers.methods.taid import TAIDSettings
from kdkernels.transformers.settings import NUMBER, Flag, Settings, one_of, said


def methods() -> tuple[str, ...]:
    """Names that ``KDConfig(method=...)`` accepts."""
    return (*divergences(), *METHODS)


@dataclass
class MethodSettings(Settings):
    method: Annotated[str, Flag("NAME", f"a divergence, {' or '.join(METHODS)}", kind=one_of(*methods()), required=True)] = said(
        "forward_kl", "A divergence, or taid, or okd."
    )

    divergence: Annotated[
        str | None, Flag("NAME", f"of {' and '.join(METHODS)} (default: forward_kl)", kind=one_of(*divergences()))
    ] = said(None, "The student's divergence in taid and okd (forward_kl).")
    divergence_parameter: Annotated[float | None, Flag("X", "beta of jsd, alpha of the skew divergences", kind=NUMBER)] = said(
        None, "beta of jsd, alpha of the skew divergences."
    )

    @classmethod
    def check(cls, config: Any) -> None:
        check_one_of("method", config.method, methods())  # with the divergences that were registered since
        if config.method not in METHODS and config.divergence is not None:
            raise ValueError(
                f"divergence={config.divergence!r} goes with method {' or '.join(map(repr, METHODS))}; method {config.method!r} is "
                "one itself"
            )
        config.resolved_divergence()

    def resolved_divergence(self) -> Divergence:
        """The student's divergence."""
        name = self.method if self.method in divergences() else self.divergence or "forward_kl"
        return resolve(name, self.divergence_parameter)


# A dataclass has the fields of its last base first.
@dataclass
class AllSettings(CachedSettings, OnPolicySettings, OKDSettings, TAIDSettings, LossSettings, MethodSettings):
    """What KDConfig adds to transformers' settings."""


SETTINGS: tuple[type[Settings], ...] = tuple(reversed(AllSettings.__bases__))
METHODS = {settings.method_of: Fixed.named[settings.method_of] for settings in SETTINGS if settings.method_of}
"""Besides these each divergence is a method: Fixed."""


def parts_of(trainer: Any) -> tuple[Any, ...]:
    """The method of a KDTrainer whose models are in their places, and what goes along with it."""
    args = trainer.args
    target = Live(trainer.teacher, trainer.inputs) if trainer.cache is None else Cached(args.topk_tail, trainer.vocab_size)
    method = METHODS.get(args.method, Fixed)(trainer, target)
    return (method, *([Writing(trainer)] if OnPolicySettings.asked_for(args) else []))

"""What a demo run is made of."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
from dataclasses import dataclass, field
from typing import Any

from kdkernels.errors import CommandError, to_install

LIBRARIES = ("matplotlib", "numpy", "peft", "rich", "safetensors", "tokenizers", "transformers")
DEFAULT_MINUTES = 5.0
BEFORE, AGAINST = "student before", "cross-entropy"  # where the methods start, and what they are compared with


@dataclass(frozen=True)
class ModelSize:
    """A Llama: hidden size, layers, attention heads."""

    width: int
    layers: int
    heads: int


@dataclass(frozen=True)
class Settings:
    """Everything that decides what is computed. The command line sets minutes and seed; tests set the rest, smaller.

    minutes: the length of the run on 2 cores. It scales the steps and the seconds they may take; set-up is not counted.
    vocab: tokens of the vocabulary. window: tokens per sequence. batch: sequences per step.
    learning_rate: of teacher and student until the student is distilled. further_rate: of the students from there on.
    lora_rate: of the LoRA of OKD's teacher.
    teacher_steps, student_steps, further_steps: at 5 minutes, on a machine that is fast enough for them; the student's own
    steps come before those further ones that the methods are compared by.
    teacher_seconds, student_seconds, further_seconds: at 5 minutes; where a measured step is too slow to fit, there are fewer.
    heldout_windows: sequences of the final held-out loss. curve_windows: of the losses along the way, of which there are
    ``evaluations``. prompts: held-out texts that each model continues, of prompt_tokens, by written_tokens.
    next_steps: of the command that the demo ends with.
    files: use only so many source files (None: all). loss_windows: sequences of the loss-step comparison.
    checkpoint_seconds: time between two checkpoints. pace_seconds: between two looks at whether the steps still fit.
    """

    minutes: float = DEFAULT_MINUTES
    seed: int = 0
    vocab: int = 8192
    window: int = 128
    batch: int = 4
    teacher: ModelSize = field(default=ModelSize(width=128, layers=2, heads=4))
    student: ModelSize = field(default=ModelSize(width=48, layers=1, heads=2))
    learning_rate: float = 4e-3
    further_rate: float = 2e-3
    lora_rate: float = 1e-3
    teacher_steps: int = 1300
    student_steps: int = 1000
    further_steps: int = 350
    teacher_seconds: float = 100.0
    student_seconds: float = 50.0
    further_seconds: float = 90.0
    heldout_windows: int = 256
    curve_windows: int = 32
    evaluations: int = 10
    prompts: int = 96
    prompt_tokens: int = 32
    written_tokens: int = 64
    next_steps: int = 100
    files: int | None = None
    loss_windows: int = 16
    loss_repeats: int = 5
    loss_budget: int = 32 * 2**20
    checkpoint_seconds: float = 5.0
    pace_seconds: float = 15.0

    @property
    def scale(self) -> float:
        return self.minutes / DEFAULT_MINUTES


def fingerprint(**parts: Any) -> str:
    """The same text for the same parts, in every process."""
    plain = {name: dataclasses.asdict(part) if dataclasses.is_dataclass(part) else part for name, part in parts.items()}  # type: ignore[arg-type]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def require_libraries() -> None:
    """Raise the one line that says what to install, before anything heavy is imported."""
    missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise CommandError(f"the demo needs {', '.join(missing)}, not installed here: {to_install('demo')}")

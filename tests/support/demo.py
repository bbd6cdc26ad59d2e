"""The demo on a corpus of some files and models of some thousand parameters."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from kdkernels.demo import run as demo
from kdkernels.demo.settings import ModelSize, Settings

TINY = Settings(
    vocab=300,
    window=16,
    batch=2,
    teacher=ModelSize(width=32, layers=1, heads=2),
    student=ModelSize(width=16, layers=1, heads=2),
    teacher_steps=24,
    student_steps=24,
    further_steps=24,
    heldout_windows=8,
    curve_windows=4,
    evaluations=4,
    prompts=6,
    prompt_tokens=6,
    written_tokens=8,
    next_steps=2,
    files=80,
    loss_windows=4,
    loss_repeats=1,
    checkpoint_seconds=0.0,
    pace_seconds=0.0,
)


def run(folder: Path, settings: Settings = TINY, **options: Any) -> tuple[dict[str, Any], str]:
    screen = io.StringIO()
    return demo.run(settings, folder, console=Console(file=screen, width=100), **options), screen.getvalue()


def learned(results: dict[str, Any]) -> Any:
    """What has to agree between two runs that computed the same: curves, TAID's t, final losses and texts, without the times."""
    models = results["heldout"]["models"]
    losses = {name: {key: value for key, value in row.items() if key != "seconds"} for name, row in models.items()}
    phases = ("teacher", "student", "students")
    curves = [json.loads(json.dumps(results[phase][key])) for phase in phases for key in ("curves", "taid_t")]
    return losses, curves, json.loads(json.dumps(results["samples"]))

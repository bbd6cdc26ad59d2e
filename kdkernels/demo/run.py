"""A whole demo run, from the sources of the interpreter to the plot."""

from __future__ import annotations

import dataclasses
import datetime
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tokenizers import Tokenizer

from kdkernels.console import files, info, terminal
from kdkernels.demo import corpus as corpora
from kdkernels.demo import loss_step, onward, plot, report, samples
from kdkernels.demo.corpus import Corpus
from kdkernels.demo.models import heldout_losses, hidden_states, mean_and_error
from kdkernels.demo.settings import AGAINST, BEFORE, Settings
from kdkernels.demo.train import Learner, Phase, further_phase, student_phase, teacher_phase, train
from kdkernels.errors import CommandError

TEACHER, STUDENT, STUDENTS = "teacher.safetensors", "student.safetensors", "students.safetensors"
RESULTS, PLOT = "results.json", "demo.png"
LOSS_STEP_T = 0.7  # between the target of TAID's start and the teacher itself


def run(settings: Settings, folder: Path, *, resume: bool = False, console: Console | None = None) -> dict[str, Any]:
    """Run the demo into ``folder`` and return what results.json holds.

    resume: go on from the folder's checkpoints. Without it the students' further steps start anew; a finished teacher, and the
    student before those, of the same settings are taken from the folder either way.

    Raises CommandError for a folder that is not a demo's, and where a file cannot be written.
    """
    if resume and not files.marker(folder, "demo").exists():
        raise CommandError(
            f"--resume: {folder} holds no demo; accepted: the --out of an earlier one, or the same command without --resume"
        )
    files.claim(folder, "demo")
    with files.writing(folder, "with room the same command with --resume goes on from the last checkpoint"):
        return _run(settings, folder, resume, console or terminal.Output())


def _run(settings: Settings, folder: Path, resume: bool, console: Console) -> dict[str, Any]:
    if not resume:
        (folder / STUDENTS).unlink(missing_ok=True)
    clock = _Clock()
    corpus = corpora.prepare(settings, folder, lambda text: console.print(text, highlight=False))
    console.print(
        f"{corpus.facts['train_tokens']:,} tokens to train on, {corpus.facts['heldout_tokens']:,} held out, whole files each"
    )
    clock.lap("corpus")

    teacher = teacher_phase(settings, corpus)
    _train(teacher, settings, corpus, folder / TEACHER, resume, console)
    clock.lap("teacher")
    student = student_phase(settings, corpus)
    _train(student, settings, corpus, folder / STUDENT, resume, console)
    clock.lap("student")
    students = further_phase(settings, corpus, teacher, student)
    _train(students, settings, corpus, folder / STUDENTS, resume, console)
    clock.lap("students")

    models = {"teacher": teacher.learners[0].model, BEFORE: student.learners[0].model}
    models |= {learner.name: learner.model for learner in students.learners}
    with _own_threads():
        torch.set_num_threads(students.threads)
        heldout = _heldout([*teacher.learners, *student.learners, *students.learners], list(models), settings, corpus)
        clock.lap("held-out losses")
        console.print(f"letting {len(models)} models write")
        tokenizer = Tokenizer.from_file(str(folder / corpora.TOKENIZER))
        written = samples.measure(models, settings, corpus, tokenizer)
        clock.lap("samples")
    console.print("measuring the loss step")
    step = _loss_step(teacher, students, settings, corpus, folder)
    clock.lap("loss step")

    results: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "info": info.facts(),
        "settings": dataclasses.asdict(settings),
        "corpus": corpus.facts,
        "teacher": _phase_results(teacher),
        "student": _phase_results(student),
        "students": _phase_results(students),
        "heldout": heldout,
        "samples": written,
        "loss_step": step,
        "seconds": clock.laps,
    }
    results["conclusions"] = report.conclusions(results)
    plot.draw(folder / PLOT, results)
    clock.lap("plot")
    report.write_json(folder / RESULTS, results)
    kept = {"teacher": models["teacher"], "student": models[BEFORE]}
    with terminal.without_file_bars():
        command = onward.leave(folder, kept, tokenizer, settings, corpus)
    report.show(console, results)
    terminal.say(console, f"{sum(clock.laps.values()):.0f} s in all. Results, plot, models and checkpoints: {folder}/")
    terminal.say(console, "Next, the same student by another method, with a command that takes your models and text too:")
    terminal.say(console, command)
    return results


class _Clock:
    """Seconds of each part of this run."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name], self._last = round(now - self._last, 2), now


@contextmanager
def _own_threads() -> Iterator[None]:
    """Afterwards torch has as many threads again as before."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _train(phase: Phase, settings: Settings, corpus: Corpus, path: Path, resume: bool, console: Console) -> None:
    with _own_threads(), report.progress_bar(console, phase.name) as watch:
        train(phase, settings, corpus, path, resume, watch)
    if phase.cached:
        console.print(f"{phase.name}: finished before, taken from {path}", soft_wrap=True)
    elif phase.steps < phase.planned:
        console.print(f"{phase.name}: {phase.steps} steps instead of {phase.planned}, to stay within the time on this machine")


def _phase_results(phase: Phase) -> dict[str, Any]:
    taid = [learner for learner in phase.learners if learner.schedule is not None]
    return {
        "steps": phase.steps,
        "planned_steps": phase.planned,
        "threads": phase.threads,
        "seconds": round(phase.seconds, 2),
        "from_cache": phase.cached,
        "curves": {learner.name: learner.curve for learner in phase.learners},
        "taid_t": {learner.name: learner.t for learner in taid},
    }


def _heldout(learners: list[Learner], names: list[str], settings: Settings, corpus: Corpus) -> dict[str, Any]:
    """Final losses of all models on the same windows; gains over cross-entropy from the differences window by window."""
    inputs, labels = corpus.held_out(settings.heldout_windows, settings.window)
    models: dict[str, Any] = {}
    alone = None
    for name, learner in zip(names, learners, strict=True):
        losses = heldout_losses(learner.model, inputs, labels)
        loss, error = mean_and_error(losses)
        models[name] = {
            "loss": loss,
            "error": error,
            "parameters": sum(parameter.numel() for parameter in learner.model.parameters()),
            "seconds": learner.seconds,
        }
        if name == AGAINST:
            alone = losses
        elif alone is not None:
            models[name]["gain"], models[name]["gain_error"] = mean_and_error(alone - losses)
    return {
        "windows": inputs.shape[0],
        "tokens": inputs.numel(),
        "files": corpus.facts["heldout_files"],
        "frequencies": corpus.frequency_loss(),
        "models": models,
    }


def _loss_step(teacher: Phase, students: Phase, settings: Settings, corpus: Corpus, folder: Path) -> dict[str, Any]:
    inputs, _ = corpus.held_out(settings.loss_windows, settings.window)
    models = {"student": next(one.model for one in students.learners if one.schedule), "teacher": teacher.learners[0].model}
    tensors = {}
    with torch.no_grad():
        for name, model in models.items():
            tensors[f"{name}_hidden"] = hidden_states(model, inputs).flatten(0, 1)
            tensors[f"{name}_head"] = model.lm_head.weight
    measured, gradient_difference = loss_step.compare(
        tensors, LOSS_STEP_T, settings.loss_budget, settings.loss_repeats, folder / "loss-step.safetensors"
    )
    ours, theirs = measured.values()
    return {
        "t": LOSS_STEP_T,
        "tokens": inputs.numel(),
        "vocab": corpus.facts["vocab"],
        "budget_bytes": settings.loss_budget,
        "repeats": settings.loss_repeats,
        "methods": {name: dataclasses.asdict(row) for name, row in measured.items()},
        "loss_difference": abs(ours.loss - theirs.loss),
        "gradient_difference": gradient_difference,
    }

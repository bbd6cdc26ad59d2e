"""What a demo run shows: a progress bar, tables, texts and a JSON file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Column, Table
from rich.text import Text

from kdkernels.console import files, terminal
from kdkernels.demo.samples import HELD_OUT, LONGEST_NGRAM, shown
from kdkernels.demo.settings import AGAINST, BEFORE
from kdkernels.demo.train import Phase, Watch

NARROWEST_TEXT = 40  # columns of a continuation on the screen, with its frame
MIB = 2**20


@contextmanager
def progress_bar(console: Console, phase: str) -> Iterator[Watch]:
    """A bar for one phase, on a terminal, and a line at each evaluation."""
    with terminal.Bar(console, wide=True) as bar:
        task = bar.add_task(phase, total=None)
        said = ""

        def watch(phase: Phase, note: str) -> None:
            nonlocal said
            bar.update(task, completed=phase.step, total=phase.steps)
            if note != said:
                console.print(f"{phase.name}: step {phase.step}/{phase.steps}, held out, in nats: {note}", soft_wrap=True)
            said = note

        yield watch


def show(console: Console, results: dict[str, Any]) -> None:
    print_losses(console, results)
    print_samples(console, results)
    print_loss_step(console, results)
    for line in results["conclusions"]:
        console.print(f"- {line}", highlight=False)


def print_losses(console: Console, results: dict[str, Any]) -> None:
    heldout, students = results["heldout"], results["students"]
    table = Table(title=f"Held-out loss, nats per token, {students['steps']:,} further steps ({heldout['tokens']:,} tokens)")
    for name in ("model", "loss ± s.e.", "gain ± s.e.", "size", "time"):
        table.add_column(name, justify="left" if name == "model" else "right", no_wrap=True)
    table.add_row("token frequencies", f"{heldout['frequencies']:.3f}", "", "", "")
    for name, row in heldout["models"].items():
        against = row.get("gain")
        table.add_row(
            name,
            f"{row['loss']:.3f} ± {row['error']:.3f}",
            "" if against is None else f"{against:+.3f} ± {row['gain_error']:.3f}",
            f"{row['parameters'] / 1e6:.2f} M",
            f"{row['seconds']:.0f} s",
        )
    console.print(table)


def print_loss_step(console: Console, results: dict[str, Any]) -> None:
    step = results["loss_step"]
    table = Table(title=f"One TAID loss step, t = {step['t']:.2f}, {step['tokens']:,} x {step['vocab']:,} logits")
    for name in ("method", "time", "peak memory", "loss"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for name, row in step["methods"].items():
        table.add_row(name, f"{row['seconds'] * 1e3:.0f} ms", _memory(row["peak_bytes"]), f"{row['loss']:.6f}")
    console.print(table)
    console.print(
        f"Median of {step['repeats']} turns. Memory: above the inputs, gradients included; logits scratch limited to "
        f"{step['budget_bytes'] / MIB:.0f} MiB by memory_budget. Loss differs by {step['loss_difference']:.1e} nats, gradients by "
        f"{step['gradient_difference']:.1e} of the largest.",
    )


def _memory(peak: int | None) -> str:
    return "not measured" if peak is None else f"{peak / MIB:.0f} MiB"


def print_samples(console: Console, results: dict[str, Any]) -> None:
    """What the models write: figures of all of it, and one continuation of each, side by side."""
    samples = results["samples"]
    title = (
        f"What they write: {samples['prompts']} held-out prompts of {samples['prompt_tokens']} tokens, continued by "
        f"{samples['written_tokens']}"
    )
    table = Table(title=title)
    for name in ("written by", "loss ± s.e.", "lower ± s.e.", *(f"n = {n + 1}" for n in range(LONGEST_NGRAM))):
        table.add_column(name, justify="left" if name == "written by" else "right")
    for name, row in samples["models"].items():
        lower = "" if name == AGAINST else f"{row['lower']:+.3f} ± {row['lower_error']:.3f}"
        shares = [f"{share:.3f}" for share in row["distinct"]]
        table.add_row(name, f"{row['teacher_loss']:.3f} ± {row['error']:.3f}", lower, *shares)
    console.print(table)
    console.print(
        "Loss: the teacher's, in nats per token, on what was written; the lower, the likelier it finds that. lower: than on what "
        f"{AGAINST} wrote. n: the share of distinct n-grams. Sampled at temperature 1 with one seed.",
        highlight=False,
    )
    console.print(Panel(Text(shown(samples["prompt"]), overflow="fold"), title="one of the prompts, and how they go on"))
    columns = max(1, console.width // NARROWEST_TEXT)
    grid = Table.grid(*(Column(ratio=1) for _ in range(columns)), expand=True)
    panels = [Panel(Text(shown(row["text"]), overflow="fold"), title=name) for name, row in samples["models"].items()]
    for at in range(0, len(panels), columns):
        grid.add_row(*panels[at : at + columns])
    console.print(grid)


def conclusions(results: dict[str, Any]) -> list[str]:
    """What these figures say and what they do not, in plain lines."""
    models, written = results["heldout"]["models"], results["samples"]["models"]
    distilled = [name for name in models if "gain" in models[name]]
    lead = models[BEFORE]["loss"] - models["teacher"]["loss"]
    varied = {name: written[name]["distinct"][-1] for name in (BEFORE, AGAINST, *distilled)}
    return [
        f"Before distillation the teacher is {abs(lead):.2f} nats {'better' if lead > 0 else 'worse'} than the student on held-out "
        f"text. From there {len(distilled) + 1} copies of the student took the same {results['students']['steps']} steps on the "
        f"same text; {AGAINST} alone brought its held-out loss from {models[BEFORE]['loss']:.3f} to {models[AGAINST]['loss']:.3f}.",
        f"Held-out loss against {AGAINST}: "
        + _verdicts({name: (models[name]["gain"], models[name]["gain_error"]) for name in distilled})
        + ".",
        f"The teacher's loss on what they write, against {AGAINST}: "
        + _verdicts({name: (written[name]["lower"], written[name]["lower_error"]) for name in distilled})
        + ".",
        f"Distinct 3-grams, most first: {', '.join(f'{name} {share:.3f}' for name, share in _sorted(varied))}; the teacher has "
        f"{written['teacher']['distinct'][-1]:.3f}, the {HELD_OUT} {written[HELD_OUT]['distinct'][-1]:.3f}.",
        "The errors cover the choice of held-out text, not of the seed: another seed can change which student is ahead (--seed).",
        "It does not reproduce published results, which are of far larger models and of answers to instructions: here a teacher of "
        f"{models['teacher']['parameters'] / 1e6:.1f} M parameters and {results['teacher']['steps']:,} steps teaches a student of "
        f"{models[BEFORE]['parameters'] / 1e6:.1f} M and {results['student']['steps']:,}.",
    ]


def _verdicts(gains: dict[str, tuple[float, float]]) -> str:
    """Of each name, the largest gain first: twice the standard error is what counts as a difference."""
    return "; ".join(f"{name} {_verdict(gain, error)} ({gain:+.3f} ± {error:.3f})" for name, (gain, error) in _sorted(gains))


def _verdict(gain: float, error: float) -> str:
    return "no clear difference" if abs(gain) < 2 * error else "better" if gain > 0 else "worse"


def _sorted(values: dict[str, Any]) -> list[tuple[str, Any]]:
    return sorted(values.items(), key=lambda item: item[1], reverse=True)


def write_json(path: Path, results: dict[str, Any]) -> None:
    files.write(path, (json.dumps(results, indent=1) + "\n").encode())

"""What a demo run shows: a progress bar, tables, a plot and a JSON file."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from rich.console import Console
from rich.table import Table

from kdkernels.console import files, terminal
from kdkernels.demo.train import Phase, Watch

# One colour per method, told apart by people who see colours differently (Okabe and Ito).
COLOURS = {
    "cross-entropy": "#555555",
    "forward KL": "#0072B2",
    "TAID": "#D55E00",
    "teacher": "#009E73",
    "kdkernels": "#0072B2",
    "eager PyTorch": "#555555",
}
MIB = 2**20


@contextmanager
def progress_bar(console: Console, phase: str) -> Iterator[Watch]:
    """A bar for one phase, on a terminal, and a line at each evaluation."""
    with terminal.Bar(console) as bar:
        task = bar.add_task(phase, total=None)
        shown = ""

        def watch(phase: Phase, note: str) -> None:
            nonlocal shown
            bar.update(task, completed=phase.step, total=phase.steps)
            if note != shown:
                console.print(f"{phase.name}: step {phase.step}/{phase.steps}, held out, in nats: {note}", soft_wrap=True)
            shown = note

        yield watch


def print_losses(console: Console, results: dict[str, Any]) -> None:
    heldout, students = results["heldout"], results["students"]
    table = Table(title=f"Held-out loss in nats per token, after {students['steps']:,} steps ({heldout['tokens']:,} tokens)")
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
    table = Table(
        title=f"One TAID loss step with gradients (t = {step['t']:.2f}), {step['tokens']:,} tokens x {step['vocab']:,} vocabulary"
    )
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


def conclusions(results: dict[str, Any]) -> list[str]:
    """What these figures say and what they do not, in plain lines."""
    models = results["heldout"]["models"]
    alone = models["cross-entropy"]["loss"]
    lead = alone - models["teacher"]["loss"]
    parts = []
    for name in ("forward KL", "TAID"):
        gain, error = models[name]["gain"], models[name]["gain_error"]
        verdict = "no clear difference" if abs(gain) < 2 * error else "better" if gain > 0 else "worse"
        parts.append(f"{name} {verdict} ({gain:+.3f} ± {error:.3f})")
    return [
        f"The teacher is {abs(lead):.2f} nats {'better' if lead > 0 else 'worse'} than the student alone (cross-entropy). "
        f"Against the student alone: {'; '.join(parts)}.",
        "This shows that the losses train real models from hidden states and heads; how near they come to eager PyTorch, and at "
        "what cost, is measured above.",
        "The errors cover the choice of held-out text, not of the seed: another seed can change which student is ahead (--seed).",
        "It does not reproduce published gains: those are of students that had been trained before, with far larger teachers. Here "
        "a student starts untrained, so TAID's target is at first in part the student's own guess.",
        "A teacher of some minutes is weak, and what a loss step costs depends on vocabulary, tokens and widths (kd.plan).",
    ]


def write_json(path: Path, results: dict[str, Any]) -> None:
    files.write(path, (json.dumps(results, indent=1) + "\n").encode())


def plot(path: Path, results: dict[str, Any]) -> None:
    """Curves, gains with their errors, and the loss step's time and memory."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    models, methods = results["heldout"]["models"], results["loss_step"]["methods"]
    figure, (curves, gains, times, memory) = plt.subplots(
        1, 4, figsize=(15, 4.6), width_ratios=(3, 1.6, 1.1, 1.1), layout="constrained"
    )
    _curves(curves, results)
    _gains(gains, models)
    _bars(times, {name: row["seconds"] * 1e3 for name, row in methods.items()}, "One loss step: time", "milliseconds")
    peaks = {name: (row["peak_bytes"] or math.nan) / MIB for name, row in methods.items()}
    _bars(
        memory,
        peaks,
        "Peak memory" if not any(map(math.isnan, peaks.values())) else "Peak memory:\nnot measured",
        "MiB above the inputs",
    )
    for axes in (curves, gains, times, memory):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"kdkernels demo: {models['teacher']['parameters'] / 1e6:.1f} M teacher, {models['TAID']['parameters'] / 1e6:.1f} M "
        f"students, {results['corpus']['vocab']:,}-token vocabulary, Python sources, {results['info']['threads']} CPU threads"
    )
    content = io.BytesIO()
    figure.savefig(content, dpi=120, format="png")
    plt.close(figure)
    files.write(path, content.getvalue())


def _curves(axes: Any, results: dict[str, Any]) -> None:
    """The students in training, between the teacher and token frequencies."""
    models, frequencies = results["heldout"]["models"], results["heldout"]["frequencies"]
    for name, curve in results["students"]["curves"].items():
        steps, losses, errors = zip(*curve, strict=True)
        axes.plot(
            steps,
            losses,
            color=COLOURS[name],
            label=f"student, {name}" + (" alone" if name == "cross-entropy" else ""),
            marker="o",
            markersize=3,
        )
        low = [loss - error for loss, error in zip(losses, errors, strict=True)]
        high = [loss + error for loss, error in zip(losses, errors, strict=True)]
        axes.fill_between(steps, low, high, color=COLOURS[name], alpha=0.12, linewidth=0)
    axes.axhline(models["teacher"]["loss"], color=COLOURS["teacher"], linestyle="--", label="teacher, trained before")
    axes.axhline(frequencies, color="#999999", linestyle=":", label="token frequencies alone")
    # The first point is an untrained model: drawn, it would press everything else together.
    trained = [loss for curve in results["students"]["curves"].values() for _, loss, _ in curve[1:]]
    axes.set_ylim(models["teacher"]["loss"] - 0.2, max(*trained, frequencies) + 0.3)
    axes.set(xlabel=f"student steps (of {results['settings']['batch'] * results['settings']['window']} tokens)")
    axes.set(ylabel="held-out loss (nats per token)", title="Students in training")
    axes.legend(frameon=False, fontsize=9)


def _gains(axes: Any, models: dict[str, Any]) -> None:
    """What each way of distilling gains over cross-entropy alone."""
    distilled = [name for name in models if "gain" in models[name]]
    axes.bar(
        distilled,
        [models[name]["gain"] for name in distilled],
        yerr=[2 * models[name]["gain_error"] for name in distilled],
        color=[COLOURS[name] for name in distilled],
        width=0.6,
        capsize=4,
    )
    axes.axhline(0.0, color="black", linewidth=0.8)
    axes.set(ylabel="nats per token below\ncross-entropy alone", title="Gain at the end\n(bars: ± 2 s.e., one seed)")


def _bars(axes: Any, values: dict[str, float], title: str, unit: str) -> None:
    bars = axes.bar(
        [name.replace(" ", "\n") for name in values], values.values(), color=[COLOURS[name] for name in values], width=0.6
    )
    axes.bar_label(bars, fmt="%.0f")
    axes.set(ylabel=unit, title=title)

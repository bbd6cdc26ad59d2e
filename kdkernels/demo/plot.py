"""The picture of a demo run: curves, quality and diversity of what the models write, the loss step, and a text of each model."""

from __future__ import annotations

import io
import math
import textwrap
from pathlib import Path
from typing import Any

import matplotlib

from kdkernels.console import files
from kdkernels.demo.report import MIB
from kdkernels.demo.samples import HELD_OUT, shown
from kdkernels.demo.settings import BEFORE

PROMPT = "prompt"
# One colour per method, told apart by people who see colours differently (Okabe and Ito).
COLOURS = {
    PROMPT: "#000000",
    HELD_OUT: "#000000",
    "teacher": "#009E73",
    BEFORE: "#999999",
    "cross-entropy": "#E69F00",
    "forward KL": "#0072B2",
    "TAID": "#D55E00",
    "OKD": "#CC79A7",
    "kdkernels": "#0072B2",
    "eager PyTorch": "#555555",
}
TEXT_COLUMNS, TEXT_LINES = 32, 16  # of a continuation


def draw(path: Path, results: dict[str, Any]) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    written, methods = results["samples"]["models"], results["loss_step"]["methods"]
    figure: Any = plt.figure(figsize=(16, 7.6), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.7, 1))
    curves, writing, times, memory = upper.subplots(1, 4, width_ratios=(3, 2.4, 0.8, 0.8))
    _curves(curves, results)
    _writing(writing, written)
    _bars(times, {name: row["seconds"] * 1e3 for name, row in methods.items()}, "One loss step: time", "milliseconds")
    peaks = {name: (row["peak_bytes"] or math.nan) / MIB for name, row in methods.items()}
    missing = any(map(math.isnan, peaks.values()))
    _bars(memory, peaks, "Peak memory:\nnot measured" if missing else "Peak memory", "MiB above the inputs")
    for axes in (curves, writing, times, memory):
        axes.spines[["top", "right"]].set_visible(False)
    texts = {PROMPT: results["samples"]["prompt"], **{name: row["text"] for name, row in written.items()}}
    for axes, (name, text) in zip(lower.subplots(1, len(texts)), texts.items(), strict=True):
        _text(axes, name, text)
    lower.suptitle("One of the prompts, and how it goes on", fontsize=10)
    models = results["heldout"]["models"]
    figure.suptitle(
        f"kdkernels demo: {models['teacher']['parameters'] / 1e6:.1f} M teacher, {models[BEFORE]['parameters'] / 1e6:.1f} M "
        f"students, {results['corpus']['vocab']:,}-token vocabulary, Python sources, {results['info']['threads']} CPU threads"
    )
    content = io.BytesIO()
    figure.savefig(content, dpi=110, format="png")
    plt.close(figure)
    files.write(path, content.getvalue())


def _curves(axes: Any, results: dict[str, Any]) -> None:
    """The students from where they all start."""
    for name, curve in results["students"]["curves"].items():
        steps, losses, _ = zip(*curve, strict=True)
        axes.plot(steps, losses, color=COLOURS[name], label=name, marker="o", markersize=3)
    # On the curves' own windows, which are fewer than those of the table.
    teacher = results["teacher"]["curves"]["teacher"][-1][1]
    axes.axhline(teacher, color=COLOURS["teacher"], linestyle="--", label="teacher")
    axes.set(xlabel=f"further steps (of {results['settings']['batch'] * results['settings']['window']} tokens)")
    axes.set(ylabel="held-out loss (nats per token)", title="Students from one start")
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))  # beside: it covers no curve


def _writing(axes: Any, written: dict[str, Any]) -> None:
    """Quality against diversity, for each who writes."""
    for name, row in written.items():
        axes.errorbar(
            row["distinct"][-1],
            row["teacher_loss"],
            yerr=row["error"],
            fmt="o",
            color=COLOURS[name],
            label=name,
            capsize=3,
            elinewidth=1,
        )
    axes.invert_yaxis()  # better is up
    axes.set(xlabel="distinct 3-grams (share)", ylabel="teacher's loss on it, ± s.e. (upwards: likelier)", title="What they write")
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _bars(axes: Any, values: dict[str, float], title: str, unit: str) -> None:
    bars = axes.bar(
        [name.replace(" ", "\n") for name in values], values.values(), color=[COLOURS[name] for name in values], width=0.6
    )
    axes.bar_label(bars, fmt="%.0f")
    axes.set(ylabel=unit, title=title)


def _text(axes: Any, name: str, text: str) -> None:
    lines: list[str] = []
    for line in shown(text).split("\n"):
        lines += textwrap.wrap(line, TEXT_COLUMNS, drop_whitespace=False) or [""]
    axes.set_axis_off()
    axes.set_title(name, color=COLOURS[name], fontsize=9, loc="left")
    fitting = "\n".join(lines[:TEXT_LINES])
    axes.text(0, 1, fitting, transform=axes.transAxes, va="top", family="monospace", fontsize=6, parse_math=False)

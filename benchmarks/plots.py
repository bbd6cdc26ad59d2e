"""Draws every picture from the result files that exist, beside them: ``python -m benchmarks.plots``.

    compare.json  -> compare.png   time over the bare products, by loss, head and contender
    growth.json   -> growth.png    that ratio and peak memory, against N and against V
    limits.json   -> limits.png    memory under a limit against N and against V, and the strategies' break-even
    methods.json  -> methods.png   losses, written text and time of the training methods, against cross-entropy
    training.json -> training.png  tokens per second and memory of whole steps against the length of a sequence

Nothing is measured here. How they look is in drawing.py.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.drawing import (
    BLACK,
    BLUE,
    GREY,
    LOSS_NAMES,
    PURPLE,
    RC,
    SKY,
    SPEED_TICKS,
    VERMILION,
    bytes_axis,
    bytes_text,
    caption,
    contender_handles,
    cross,
    draw_crosses,
    draw_line,
    has_figures,
    in_order,
    legend,
    log_axis,
    mark,
    ratio_axis,
    series_of,
    size_axis,
    style,
    ticks,
    tried_contenders,
)
from benchmarks.limits import planned_ratio
from benchmarks.methods_report import FIGURES, extent
from benchmarks.rows import RESULTS
from kdkernels.demo.settings import AGAINST


def compare(results: dict[str, Any]) -> Figure:
    """A panel for each loss and head that was measured: the median ratio of each contender, and a bar from lowest to highest."""
    rows = results["rows"]
    (losses, heads), contenders = (in_order(row[key] for row in rows) for key in ("loss", "head")), tried_contenders(rows)
    shown = [(loss, head) for loss in losses for head in heads if any((row["loss"], row["head"]) == (loss, head) for row in rows)]
    columns = min(4, len(shown))
    lines = -(-len(shown) // columns)
    figure, panels = plt.subplots(
        lines,
        columns,
        figsize=(2.2 + 2.8 * columns, 1.0 + (0.9 + 0.25 * len(contenders)) * lines),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    ratio_axis(panels[0][0], "x", [ratio for row in rows if has_figures(row) for ratio in row["ratios"]], line=False)
    for axes, (loss, head) in zip(panels.flat, shown, strict=False):
        found = [row for row in rows if (row["loss"], row["head"]) == (loss, head) and row["contender"] in contenders]
        sizes = found[0]
        axes.set_title(
            f"{LOSS_NAMES.get(loss, loss)}, {head}\nV = {sizes['vocab']:,}, N = {sizes['tokens']:,}, "
            f"D = {sizes['student_dim']:,} and {sizes['teacher_dim']:,}",
            loc="left",
        )
        axes.axvline(1.0, color=GREY, linewidth=0.8, zorder=0)
        axes.grid(axis="x", alpha=0.25, linewidth=0.6)
        axes.tick_params(axis="y", length=0)
        for row in found:
            _compared(axes, row, contenders.index(row["contender"]))
    for axes in panels.flat[len(shown) :]:
        axes.set_axis_off()
    for axes in panels.flat[max(0, len(shown) - columns) : len(shown)]:
        axes.set_xlabel("time over the bare products")
        axes.tick_params(axis="x", labelbottom=True)
    panels[0][0].set_yticks(range(len(contenders)), contenders)
    panels[0][0].set_ylim(len(contenders) - 0.4, -0.6)
    kinds = {(row["dtype"], row["masked"]) for row in rows}
    handles = [
        mark(colour, "o", f"{dtype}, {'half masked' if masked else 'no mask'}", markerfacecolor="white" if masked else colour)
        for dtype, colour in _DTYPE_COLOURS.items()
        for masked in (False, True)
        if (dtype, masked) in kinds
    ]
    legend(figure, handles)
    notes = [
        "Points are medians, bars go from the lowest to the highest ratio",
        "Masked steps: over the products of the tokens that count",
    ]
    caption(figure, results["machine"], *notes)
    return figure


_DTYPE_COLOURS = {"fp32": BLUE, "bf16": VERMILION}
# Rows of one contender in one panel, above each other so that none hides another.
_OFFSETS = {("fp32", False): -0.27, ("fp32", True): -0.09, ("bf16", False): 0.09, ("bf16", True): 0.27}


def _compared(axes: Axes, row: dict[str, Any], place: int) -> None:
    colour, height = _DTYPE_COLOURS[row["dtype"]], place + _OFFSETS[row["dtype"], row["masked"]]
    if not has_figures(row):
        if row["masked"]:  # the unmasked one beside it says it already, for the same reason
            return
        word = "failed" if "failed" in row else "not offered"
        axes.text(0.99, height, word, transform=axes.get_yaxis_transform(), ha="right", va="center", fontsize=7, color=colour)
        return
    axes.plot([min(row["ratios"]), max(row["ratios"])], [height, height], color=colour, linewidth=1.4, alpha=0.7)
    axes.plot([row["ratio"]], [height], "o", color=colour, markersize=4.5, markerfacecolor="white" if row["masked"] else colour)


_SWEEPS = {"tokens": ("vocab", "tokens N", "V"), "vocab": ("tokens", "vocabulary V", "N")}


def growth(results: dict[str, Any]) -> Figure:
    """Time over the bare products, and peak memory, of each contender against N and against V."""
    rows = results["rows"]
    contenders = tried_contenders(rows)
    figure, panels = plt.subplots(2, 2, figsize=(10.5, 7.6), sharex="col", sharey="row", layout="constrained")
    measured, failed = [row for row in rows if has_figures(row)], any("failed" in row for row in rows)
    for column, (sweep, (fixed, label, letter)) in enumerate(_SWEEPS.items()):
        of_sweep = [row for row in rows if row["part"] == sweep]
        if not of_sweep:
            continue
        time, memory = panels[0][column], panels[1][column]
        row = of_sweep[0]
        time.set_title(
            f"{LOSS_NAMES.get(row['loss'], row['loss'])}, {row['dtype']}, {letter} = {row[fixed]:,}, "
            f"D = {row['student_dim']:,} and {row['teacher_dim']:,}",
            loc="left",
        )
        for contender in contenders:
            series = series_of(of_sweep, contender, sweep)
            for axes, key in ((time, "ratio"), (memory, "peak_bytes")):
                draw_line(axes, series, contender, sweep, key)
        draw_crosses((time, memory), of_sweep, contenders, sweep)
        size_axis(memory, sorted({row[sweep] for row in of_sweep}), label)
    if measured:
        room = 2.0 if failed else 1.25  # for the crosses
        ratio_axis(panels[0][0], "y", [row["ratio"] for row in measured], room=room)
        bytes_axis(panels[1][0], "y", [row["peak_bytes"] for row in measured], room=2 * room)
    panels[0][0].set_ylabel("time over the bare products")
    panels[1][0].set_ylabel("peak memory above the inputs")
    for axes in panels.flat:
        axes.grid(alpha=0.25, linewidth=0.6)
    handles = contender_handles(contenders) + ([cross()] if failed else [])
    legend(figure, handles, columns=-(-len(handles) // (1 if len(handles) < 7 else 2)))
    caption(figure, results["machine"], "Returned gradients are part of the peak")
    return figure


def limits(results: dict[str, Any]) -> Figure:
    """Memory against N and against V under the limit, failures on its line, and time of "tokens" over "vocab" by budget."""
    rows = [row for row in results["rows"] if row["part"] in _SWEEPS]
    contenders = in_order(row["contender"] for row in rows)
    figure, panels = plt.subplots(1, 3, figsize=(14, 4.7), layout="constrained")
    sizes = [row[key] for row in rows for key in ("peak_bytes", "limit") if key in row]
    for axes, (sweep, (fixed, label, letter)) in zip(panels, _SWEEPS.items(), strict=False):
        of_sweep = [row for row in rows if row["part"] == sweep]
        if not of_sweep:
            axes.set_axis_off()
            continue
        row = of_sweep[0]
        axes.set_title(f"{row['dtype']}, {letter} = {row[fixed]:,}, D = {row['student_dim']} and {row['teacher_dim']}", loc="left")
        for contender in contenders:
            series = series_of(of_sweep, contender, sweep)
            draw_line(axes, series, contender, sweep, "peak_bytes")
            plans = [(row[sweep], row["planned_peak_bytes"]) for row in series if "planned_peak_bytes" in row]
            if plans:
                axes.plot(*zip(*plans, strict=True), ":", color=style(contender)[0], linewidth=1.2)
            failed = [row for row in series if "failed" in row]
            at = [row[sweep] for row in failed], [row["limit"] for row in failed]
            axes.plot(*at, "x", color=style(contender)[0], markersize=8, markeredgewidth=2, zorder=3)
        axes.axhline(row["limit"], color=GREY, linewidth=1, linestyle="--")
        size_axis(axes, sorted({row[sweep] for row in of_sweep}), label)
        bytes_axis(axes, "y", sizes)
        axes.grid(alpha=0.25, linewidth=0.6)
    panels[0].set_ylabel("peak memory above the inputs")
    _break_even(panels[2], [row for row in results["rows"] if row["part"] == "break-even" and has_figures(row)])
    handles = contender_handles(contenders)
    handles += [Line2D([], [], color=GREY, linestyle=":", label="planned"), cross()]
    if rows:
        label = f"limit of the process, {bytes_text(rows[0]['limit'])}"
        handles.append(Line2D([], [], color=GREY, linewidth=1, linestyle="--", label=label))
    legend(figure, handles)
    caption(figure, results["machine"], "Returned gradients are part of the peak")
    return figure


def _break_even(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    if not rows:
        axes.set_axis_off()
        return
    styles = itertools.cycle(((BLACK, "o"), (PURPLE, "^"), (SKY, "s")))  # the other panels' contenders have the other colours
    for (loss, dtype), (colour, marker) in zip(in_order((row["loss"], row["dtype"]) for row in rows), styles, strict=False):
        points = [row for row in rows if (row["loss"], row["dtype"]) == (loss, dtype)]
        budgets, ratios = ([point[key] for point in points] for key in ("budget", "ratio"))
        name = f"{LOSS_NAMES.get(loss, loss)}, {dtype}"
        axes.plot(budgets, ratios, color=colour, linewidth=1.4, label=name, marker=marker, markersize=5.5)
        spread = [
            [point["ratio"] - min(point["ratios"]) for point in points],
            [max(point["ratios"]) - point["ratio"] for point in points],
        ]
        axes.errorbar(budgets, ratios, spread, color=colour, linestyle="none", linewidth=1)
        hollow = [point for point in points if point["auto"] == "vocab"]
        at = [point["budget"] for point in hollow], [point["ratio"] for point in hollow]
        axes.plot(*at, marker, color=colour, markerfacecolor="white", markersize=5.5, zorder=3)
        axes.plot(budgets, list(map(planned_ratio, points)), ":", color=colour)
    ratio_axis(axes, "y", [ratio for row in rows for ratio in row["ratios"]] + list(map(planned_ratio, rows)))
    bytes_axis(axes, "x", [row["budget"] for row in rows])
    row = rows[0]
    axes.set_title(
        f"N = {row['tokens']:,}, V = {row['vocab']:,}, D = {row['student_dim']:,} and {row['teacher_dim']:,}", loc="left"
    )
    axes.set_xlabel("memory_budget")
    axes.set_ylabel("time of tokens over time of vocab")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.legend(loc="upper right", title="hollow: auto takes vocab; dotted: planned", title_fontsize=8, fontsize=8)


def methods(results: dict[str, Any]) -> Figure:
    """Figures of each method less those of cross-entropy from the same start, a row for each gap: a point for each seed, a line at
    their mean; and a step's time over one of cross-entropy, a point for each round, a line at the median."""
    there = list(results["plan"]["students"])
    gaps = [gap for gap in there if results["runs"].get(gap, {}).get(AGAINST)] or there[:1]
    shown = ("loss", "teacher_loss", "rouge_l", "distinct")
    names = [name for name in results["plan"]["methods"] if name != AGAINST]
    figure, panels = plt.subplots(
        len(gaps), len(shown) + 1, figsize=(15.5, 0.9 + 3.4 * len(gaps)), sharey=True, squeeze=False, layout="constrained"
    )
    for line, gap in zip(panels, gaps, strict=True):
        for axes, key in zip(line, shown, strict=False):
            title, _, less = FIGURES[key]
            _apart(axes, [_above(results["runs"].get(gap, {}), name, key) for name in names], statistics.mean, line=0.0)
            sense = "right: more varied" if key == "distinct" else f"{'left' if less else 'right'}: better"
            axes.set_xlabel(f"{title},\nless {AGAINST}'s ({sense})")
        times = results["times"].get(gap, {})
        _apart(line[-1], [times[name]["ratios"] if name in times else [] for name in names], statistics.median, line=1.0)
        line[-1].set_xlabel(f"time of a step\nover {AGAINST}'s")
        line[0].set_title(gap, loc="left")
        line[0].set_yticks(range(len(names)), names)
        line[0].set_ylim(len(names) - 0.5, -0.5)
    marks = [
        mark(BLUE, "o", "a seed, or a round of the times", alpha=0.6),
        mark(VERMILION, "|", "mean of the seeds, median of the rounds", markersize=11, markeredgewidth=2),
    ]
    legend(figure, marks)
    caption(
        figure,
        results["machine"],
        f"Teacher to student by parameters, {results['plan']['steps']} steps",
        extent(results).replace("`", ""),
    )
    return figure


def training(results: dict[str, Any]) -> Figure:
    """Tokens per second of whole steps, and their memory above models, gradients and optimizer state, against the tokens."""
    rows = [
        row | {"speed": row["tokens"] / row["seconds"], "scratch": row["peak_bytes"] - row["returned_bytes"]}
        if has_figures(row)
        else row
        for row in results["rows"]
    ]
    measured = [row for row in rows if has_figures(row)]
    contenders = in_order(row["contender"] for row in measured)
    figure, panels = plt.subplots(1, 2, figsize=(10.5, 4.8), layout="constrained")
    for axes, key, label in zip(panels, ("speed", "scratch"), ("tokens per second", "peak memory of a step"), strict=True):
        for contender in contenders:
            draw_line(axes, series_of(rows, contender, "tokens"), contender, "tokens", key)
        size_axis(axes, sorted({row["tokens"] for row in rows}), "predicted tokens N of a sequence")
        axes.set_ylabel(label)
        axes.grid(alpha=0.25, linewidth=0.6)
    if measured:
        speeds = [row["speed"] for row in measured]
        ticks(log_axis(panels[0], "y"), SPEED_TICKS, "{:,.0f}".format)
        panels[0].set_ylim(min(speeds) / 1.4, max(speeds) * 2)  # room for the crosses
        bytes_axis(panels[1], "y", [row["scratch"] for row in measured], room=4)
    draw_crosses(panels, rows, contenders, "tokens")
    legend(figure, [*contender_handles(contenders), cross()], columns=5)
    caption(figure, results["machine"], "Memory above models, gradients and optimizer state")
    return figure


def _above(runs: dict[str, Any], name: str, key: str) -> list[float]:
    """A method's figure less that of cross-entropy, of each seed that both have."""
    alone = runs.get(AGAINST, {})
    return [one[key] - alone[seed][key] for seed, one in runs.get(name, {}).items() if seed in alone]


def _apart(axes: Axes, values: Sequence[Sequence[float]], middle: Callable[[Sequence[float]], float], *, line: float) -> None:
    """Points of each row, and where their middle is; a thin line where nothing differs."""
    axes.axvline(line, color=GREY, linewidth=0.8, zorder=0)
    axes.grid(axis="x", alpha=0.3)
    for row, of_row in enumerate(values):
        if of_row:
            axes.plot(of_row, [row] * len(of_row), "o", color=BLUE, alpha=0.6, markersize=6)
            axes.plot([middle(of_row)] * 2, [row - 0.3, row + 0.3], color=VERMILION, linewidth=2)


PICTURES: dict[str, Callable[[dict[str, Any]], Figure]] = {
    "compare": compare,
    "growth": growth,
    "limits": limits,
    "methods": methods,
    "training": training,
}


def draw(folder: Path) -> list[Path]:
    """The pictures of the result files in the folder, beside them; which ones."""
    drawn = []
    for name, picture in PICTURES.items():
        source = folder / f"{name}.json"
        if not source.exists():
            continue
        with plt.rc_context(RC):
            figure = picture(json.loads(source.read_text()))
            figure.savefig(source.with_suffix(".png"), dpi=110)
            plt.close(figure)
        drawn.append(source.with_suffix(".png"))
    return drawn


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where the result files are (default benchmarks/results)")
    folder = parser.parse_args().folder
    drawn = draw(folder)
    if not drawn:
        parser.error(f"--folder {folder} holds none of {', '.join(f'{name}.json' for name in PICTURES)}")
    print("\n".join(f"wrote {path}" for path in drawn))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

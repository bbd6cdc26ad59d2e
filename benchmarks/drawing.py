"""What the pictures have in common: colours and markers, axes and their ticks, legends and captions, and a contender's line.

Colours are those of Okabe and Ito, which stay apart for colour-blind readers, and each contender has a marker of its own besides. A
case without figures is in the picture too: as a word or a cross where its figure would be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks.cases import GIB, MIB

KIB = 2**10
BLUE, ORANGE, GREEN, SKY, VERMILION, PURPLE, BLACK = "#0072B2", "#E69F00", "#009E73", "#56B4E9", "#D55E00", "#CC79A7", "#000000"
GREY = "#6E6E6E"
# Colour and marker of each contender; one that is not listed is grey.
STYLES = {
    "tokens": (BLUE, "o"),
    "vocab": (GREEN, "s"),
    "eager": (VERMILION, "^"),
    "compiled": (ORANGE, "D"),
    "checkpointed": (PURPLE, "v"),
    "liger": (SKY, "P"),
    "liger compiled": (SKY, "X"),
    "trl": (BLACK, "d"),
    "torchtune": (GREY, "h"),
    "KDTrainer": (BLUE, "o"),
    "accelerate, kd": (GREEN, "s"),
    "accelerate, eager": (VERMILION, "^"),
    "TRL GKD": (ORANGE, "D"),
    "TRL GKD, patched": (SKY, "P"),
    "TRL GKD, Liger's loss": (PURPLE, "v"),
    "TRL Distillation": (BLACK, "d"),
    "TRL Distillation, patched": (BLUE, "X"),
}
LOSS_NAMES = {"forward_kl": "forward KL", "reverse_kl": "reverse KL", "jsd": "JSD", "taid": "TAID"}
SPEED_TICKS = [mantissa * 10.0**exponent for exponent in range(7) for mantissa in (1, 2, 5)]
RATIO_TICKS = (0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0)
RC: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "legend.frameon": False,
}


def style(contender: str) -> tuple[str, str]:
    return STYLES.get(contender, (GREY, "h"))


def in_order(values: Iterable[Any]) -> list[Any]:
    """Each once, in order of first appearance."""
    return list(dict.fromkeys(values))


def tried_contenders(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Those with a figure or a failure among the rows; who is not offered anywhere has no place in a picture."""
    tried = {row["contender"] for row in rows if "skipped" not in row}
    return [name for name in in_order(row["contender"] for row in rows) if name in tried]


def has_figures(row: dict[str, Any]) -> bool:
    return "failed" not in row and "skipped" not in row


def ticks(axis: Axis, values: Sequence[float], text: Callable[[float], str]) -> None:
    """A logarithmic axis that is labelled at these values alone, in plain numbers."""
    axis.set_major_locator(FixedLocator(list(values)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
    axis.set_minor_locator(NullLocator())


def log_axis(axes: Axes, which: str) -> Axis:
    if which == "x":
        axes.set_xscale("log")
        return axes.xaxis
    axes.set_yscale("log")
    return axes.yaxis


def ratio_axis(axes: Axes, which: str, values: Sequence[float], *, line: bool = True, room: float = 1.25) -> None:
    """Logarithmic, a little wider than the values (``room`` times above them), with a line at 1."""
    axis = log_axis(axes, which)
    low, high = min([1.0, *values]) / 1.15, max([1.0, *values]) * room
    (axes.set_xlim if which == "x" else axes.set_ylim)(low, high)
    ticks(axis, [tick for tick in RATIO_TICKS if low <= tick <= high], "{:g}".format)
    if line:
        axes.axhline(1.0, color=GREY, linewidth=0.8, zorder=0)


def bytes_text(size: float) -> str:
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if size >= unit:
            return f"{size / unit:g} {name}"
    return f"{size:g} B"


def bytes_axis(axes: Axes, which: str, values: Sequence[float], *, room: float = 1.4) -> None:
    """Logarithmic, a little wider than the values (``room`` times above them), labelled at powers of 2 or 4."""
    axis = log_axis(axes, which)
    low, high = min(values) / 1.4, max(values) * room
    (axes.set_xlim if which == "x" else axes.set_ylim)(low, high)
    factor = 2 if high < 64 * low else 4
    powers = [float(factor**exponent) for exponent in range(50)]
    ticks(axis, [power for power in powers if low <= power <= high], bytes_text)


def size_axis(axes: Axes, sizes: Sequence[int], label: str) -> None:
    """A logarithmic x axis that is labelled at the sizes that were measured."""
    ticks(log_axis(axes, "x"), sizes, lambda size: f"{int(size):,}")
    axes.set_xlim(min(sizes) / 1.25, max(sizes) * 1.25)
    axes.set_xlabel(label)


def caption(figure: Figure, machine: dict[str, Any], *notes: str) -> None:
    """Where and when it was measured, small, under everything else."""
    threads = f"{machine['threads']} thread" + ("s" if machine["threads"] != 1 else "")
    parts = [*notes, f"{machine['processor']}, {threads}, torch {machine['torch']}, {machine['date']}"]
    figure.supxlabel(". ".join(parts) + ".", fontsize=7.5, color=GREY, x=0.01, ha="left")


def legend(figure: Figure, handles: Sequence[Line2D], columns: int | None = None) -> None:
    """Above the panels, where it covers nothing."""
    figure.legend(handles=handles, loc="outside upper center", ncols=columns or len(handles), handlelength=2.4)


def mark(colour: str, marker: str, label: str, **options: Any) -> Line2D:
    return Line2D([], [], color=colour, marker=marker, label=label, **{"linestyle": "none", "markersize": 5.5, **options})


def contender_handles(contenders: Sequence[str]) -> list[Line2D]:
    return [mark(*style(name), name, linestyle="-", linewidth=1.4) for name in contenders]


def cross() -> Line2D:
    return mark(GREY, "x", "failed", markeredgewidth=1.8)


def series_of(rows: Sequence[dict[str, Any]], contender: str, sweep: str) -> list[dict[str, Any]]:
    """A contender's rows of a sweep, from small to large."""
    return sorted((row for row in rows if row["part"] == sweep and row["contender"] == contender), key=lambda row: row[sweep])


def draw_line(axes: Axes, series: Sequence[dict[str, Any]], contender: str, sweep: str, key: str) -> None:
    colour, marker = style(contender)
    points = [(row[sweep], row[key]) for row in series if has_figures(row)]
    dashes = "--" if contender == "liger compiled" else "-"  # shares its colour with the one that is not compiled
    axes.plot(*zip(*points, strict=True), dashes, color=colour, marker=marker, markersize=5, linewidth=1.4) if points else None


def draw_crosses(panels: Sequence[Axes], rows: Sequence[dict[str, Any]], contenders: Sequence[str], sweep: str) -> None:
    """Along the upper edge, one under another: who failed at which size."""
    for place, contender in enumerate(contenders):
        sizes = [row[sweep] for row in series_of(rows, contender, sweep) if "failed" in row]
        for axes in panels:
            at = [0.97 - 0.035 * place] * len(sizes)
            axes.plot(sizes, at, "x", color=style(contender)[0], transform=axes.get_xaxis_transform(), markeredgewidth=1.8)

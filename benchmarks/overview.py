"""The contenders in one table: on a GPU and a CPU, how exact, and what each can be asked for; and the README's part of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import gpu_report, gpu_times
from benchmarks.cases import GIB
from benchmarks.contenders import BUDGETED
from benchmarks.peers import OFFERS, Offers
from benchmarks.rows import Row

# What the table calls the fields of ``Offers``.
OFFERED = {
    "losses": "losses",
    "masked": "tokens that do not count",
    "temperature": "temperature",
    "larger_teacher": "a teacher's head with more rows",
    "banned": "an entry of −inf adds",
    "both_learn": "both learn",
    "source": "as read in",
}


def grid(corner: str, columns: dict[Any, str], rows: list[Row], column: Callable[[Row], Any], cell: Callable[[Row], str]) -> str:
    """A table of contenders down and ``columns`` across, which ``column`` finds for a row; a dash where there is nothing to say."""

    def shown(row: Row) -> str:
        return cell(row) if "ratio" in row else "failed" if "failed" in row else "–"

    found = {(row["contender"], column(row)): shown(row) for row in rows}
    lines = [f"| {corner} | {' | '.join(columns.values())} |", "|---|" + "---|" * len(columns)]
    for contender in dict.fromkeys(row["contender"] for row in rows):
        cells = [found.get((contender, one), "–") for one in columns]
        if set(cells) != {"–"}:
            lines.append(f"| {contender} | {' | '.join(cells)} |")
    return "\n".join(lines)


def on_a_gpu(row: Row) -> str:
    return f"{row['median_ms']:.1f} ms, {row['ratio']:.2f}; {row['peak_bytes'] / GIB:.1f} GiB"


def _timed(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """The machine of a result file of benchmarks.gpu, and what was timed at the head at which others were."""
    machines, found, _ = gpu_report.read(path)
    timed = [row for row in gpu_report.latest(found) if row["stage"] in ("ours", "others") and "ratio" in row]
    other = next(row for row in timed if row["stage"] == "others")
    return machines[-1], [row for row in timed if row["head"] == other["head"]]


def _longest(grown: dict[str, Any]) -> list[Row]:
    """The step of the most tokens, by each contender."""
    rows = [row for row in grown["rows"] if row["part"] == "tokens"]
    most = max(row["tokens"] for row in rows)
    return [row for row in rows if row["tokens"] == most]


def _places(on_gpu: Row, on_cpu: Row) -> str:
    return (
        "Time, also over that of the bare products, and peak memory above the inputs, gradients included. "
        f"GPU: {on_gpu['student']} ← {on_gpu['teacher']}, {on_gpu['tokens']:,} tokens, {on_gpu['dtype']}; "
        f"CPU: V = {on_cpu['vocab']:,}, {on_cpu['tokens']:,} tokens, {on_cpu['dtype']}. "
    )


def _either(row: Row) -> str:
    return on_a_gpu(row) if "median_ms" in row else f"{row['ratio']:.2f}; {row['peak_bytes'] / GIB:.1f} GiB"


def door_table(path: Path, grown: dict[str, Any]) -> str:
    """What was timed beside others on a GPU, and the largest step on a CPU, of whoever took part in both. path: a result file of
    benchmarks.gpu; grown: what growth.json holds."""
    facts, timed = _timed(path)
    on_cpu = _longest(grown)
    names = [*gpu_times.OURS, *(row["contender"] for row in timed)]
    both = [name for name in dict.fromkeys(names) if name == BUDGETED or name in {row["contender"] for row in on_cpu}]
    rows = sorted((row for row in [*timed, *on_cpu] if row["contender"] in both), key=lambda row: both.index(row["contender"]))

    def column(row: Row) -> tuple[bool, str]:
        return "median_ms" in row, row["loss"]

    columns = {column(row): f"{facts['device']}, {row['loss']}" for row in timed}
    columns[column(on_cpu[0])] = f"CPU, {on_cpu[0]['loss']}"
    title = (
        f"{_places(timed[0], on_cpu[0])}`tokens` and `vocab` are this library's strategies, with the scratch that they take by "
        "default or 1 GiB; eager is PyTorch as one writes it."
    )
    return f"{title}\n\n{grid('', columns, rows, column, _either)}\n"


def overview_table(path: Path, grown: dict[str, Any], compared: dict[str, Any]) -> str:
    """A row for each contender: forward KL on a GPU and on a CPU, the error of dW, and what it offers. path: a result file of
    benchmarks.gpu; grown, compared: what growth.json and compare.json hold."""
    facts, timed = _timed(path)
    on_cpu = _longest(grown)
    on_gpu = {row["contender"]: row for row in timed if row["loss"] == "forward_kl"}
    figures = on_gpu, {row["contender"]: row for row in on_cpu}
    errors: dict[str, float] = {}
    for row in compared["rows"]:
        if row["dtype"] == "bf16" and "head_grad_error" in row:
            errors[row["contender"]] = max(row["head_grad_error"], errors.get(row["contender"], 0.0))
    lines = [
        f"{_places(timed[0], on_cpu[0])}Forward KL; the error of dW is the largest of all losses, heads and masks in bfloat16, on "
        "the CPU. A dash where nothing was measured; ″: as above.",
        "",
        f"| | {facts['device']} | CPU | error of dW | {' | '.join(OFFERED.values())} |",
        "|---|---|---|---|" + "---|" * len(OFFERED),
    ]
    before: Offers | None = None
    for name, offers in OFFERS.items():
        rows = [of.get(name, {}) for of in figures]
        measured = [_either(row) if "ratio" in row else "failed" if "failed" in row else "–" for row in rows]
        error = f"{errors[name]:.1e}" if name in errors else "–"
        said = ["″" if offers == before else getattr(offers, key) for key in OFFERED]
        lines.append(f"| {' | '.join([name, *measured, error, *said])} |")
        before = offers
    return "\n".join(lines) + "\n"

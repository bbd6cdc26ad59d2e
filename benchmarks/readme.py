"""Writes the tables of the README and of docs from benchmarks/results: ``python -m benchmarks.readme``."""

from __future__ import annotations

import itertools
import json
import math
import operator
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import gpu_report, gpu_times, limits, linear, offsets
from benchmarks.cases import GIB, LOSSES, MIB, ONLINE, Case, key
from benchmarks.measure import PEERS
from benchmarks.methods_report import methods_table
from benchmarks.overview import door_table, grid, on_a_gpu, overview_table
from benchmarks.rows import RESULTS, Row

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
END = "<!-- end -->"
ERRORS = {"value_error": "value", "hidden_grad_error": "dH", "head_grad_error": "dW"}


def _where(machine: dict[str, Any], *others: str) -> str:
    """others: libraries that were measured too."""
    libraries = ", ".join(f"{name} {machine[name]}" for name in ("torch", *others) if machine.get(name))
    return f"{machine['processor']}, {machine['threads']} threads, {machine['instruction_sets'][0]}, {libraries}, {machine['date']}"


def _cell(found: dict[Any, Row], case: Case, say: Callable[[Row], str]) -> str:
    row = found.get(key(case.facts), {"failed": "not run"})
    return str(row["failed"]) if "failed" in row else say(row)


def _scratch(row: Row, peak: str = "peak_bytes") -> float:
    """MiB above inputs and returned gradients."""
    return float(row[peak] - row["returned_bytes"]) / MIB


def linear_table(results: dict[str, Any]) -> str:
    """The library alone, with the losses that were timed. results: what linear.json holds."""
    found = {key(row): row for row in results["rows"]}
    timed = {row["loss"] for row in results["rows"] if row["part"] == "time"}
    losses = [loss for loss in linear.LOSSES if loss in timed]
    lines = [
        f"{_where(results['machine'])}; N = 1024, medians.",
        "",
        "| V, D_s, D_t | dtype | " + " | ".join(losses) + " | 128 MiB budget | eager forward KL | half masked / unmasked |",
        "|---|---|" + "---|" * (len(losses) + 3),
    ]

    def ratio(row: Row) -> str:
        return f"{row['ratio']:.3f}"

    def both(row: Row) -> str:
        return f"{_scratch(row):.0f} | {_scratch(row, 'planned_peak_bytes'):.0f}"

    cases = linear.cases()
    for head, dtype in itertools.product(linear.FULL, linear.TIMED):
        here = [case for case in cases if (case.part, case.head, case.dtype) == ("time", head, dtype) and case.loss in losses]
        row = [_cell(found, case, ratio) for case in here]
        row += [""] * (len(losses) + 3 - len(row))
        sizes = ", ".join(f"{size:,}" for size in (head.vocab, head.student_dim, head.teacher_dim))
        lines.append(f"| {sizes} | {dtype} | {' | '.join(row)} |")
    if ONLINE in losses:
        lines += ["", "okd is `linear_okd_loss` with a frozen teacher head, over five products: the fifth makes dH of the teacher."]
    lines += [
        "",
        "| peak memory above inputs and returned gradients, V = 151,936 | measured, MiB | planned, MiB |",
        "|---|---|---|",
    ]
    for case in cases:
        if case.part == "memory" and case.loss in losses:
            title = "OKD" if case.loss == ONLINE else "forward KL"
            limit = f", budget {case.budget // MIB} MiB" if case.budget else ""
            lines.append(f"| {title}, {case.dtype}, N = {case.tokens}{limit} | {_cell(found, case, both)} |")
    eager = _cell(found, Case("time", linear.FULL[0], 1024, "fp32", "eager"), lambda row: f"{_scratch(row):.0f}")
    lines.append(f"| eager PyTorch, fp32, N = 1024 (grows with N) | {eager} | |")
    own = [row for row in results["rows"] if "own_dtype_products_seconds" in row]
    if own:
        lines += [
            "",
            "This processor has no bfloat16 matrix path, so bf16 rows are over float32 products. "
            "torch's own bfloat16 products take "
            + " and ".join(
                f"{row['own_dtype_products_seconds']:.0f} s where the whole loss step takes {row['seconds']:.1f} s" for row in own
            )
            + ".",
        ]
    return "\n".join(lines) + "\n"


def limits_table(results: dict[str, Any]) -> str:
    """The largest step, and the break-even. results: what limits.json holds."""
    rows, lines = results["rows"], [f"{_where(results['machine'])}."]
    if largest := [row for row in rows if row["part"] == "largest"]:
        lines += ["", *_largest_table(largest)]
    if even := [row for row in rows if row["part"] == "break-even"]:
        lines += ["", *_break_even_table(even)]
    return "\n".join(lines) + "\n"


def _largest_table(rows: list[Row]) -> list[str]:
    row = rows[0]
    lines = [
        f"Forward KL, {row['dtype']}, N = {row['tokens']:,}, V = {row['vocab']:,}, D_s = {row['student_dim']:,}, "
        f"D_t = {row['teacher_dim']:,}; the whole process may hold {row['limit'] / GIB:g} GiB. Planned values in parentheses.",
        "",
        "| | seconds | GiB above inputs, gradients included | GiB of the process | error of the loss | of dH | of dW |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "seconds" not in row:
            wanted = f"({row['planned_peak_bytes'] / GIB:.1f})" if "planned_peak_bytes" in row else ""
            lines.append(f"| {row['contender']} | {_reason(row)} | {wanted} | | | | |")
            continue
        cells = [
            row["contender"],
            f"{row['seconds']:.0f} ({row['planned_seconds']:.0f})" if "planned_seconds" in row else f"{row['seconds']:.0f}",
            f"{row['peak_bytes'] / GIB:.2f}" + (f" ({row['planned_peak_bytes'] / GIB:.2f})" if "planned_peak_bytes" in row else ""),
            f"{row['process_bytes'] / GIB:.2f}",
            *(f"{row[error]:.1e}" for error in ERRORS),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _reason(row: Row) -> str:
    """Why a row has no figures."""
    return f"failed: {_plain(row['failed'])}"


def _plain(reason: str) -> str:
    """Without the place in the allocator's source that its message starts with."""
    text = re.sub(r"\[enforce fail at [^\]]*\]\s*(err == 0\.)?\s*", "", reason)
    text = re.sub(r"\d{7,}", lambda size: f"{int(size[0]):,}", text)
    return text if len(text) <= 160 else text[:157] + "..."


def _break_even_table(rows: list[Row]) -> list[str]:
    row, budgets = rows[0], list(dict.fromkeys(row["budget"] for row in rows))
    lines = [
        f"Time of `tokens` over `vocab` by `memory_budget`, N = {row['tokens']:,}, V = {row['vocab']:,}, "
        f"D_s = {row['student_dim']:,}, D_t = {row['teacher_dim']:,}: measured (planned); bold where `auto` takes `vocab`.",
        "",
        "| | " + " | ".join(f"{budget / MIB:g} MiB" for budget in budgets) + " | even at (planned) |",
        "|---|" + "---|" * (len(budgets) + 1),
    ]
    for (loss, dtype), some in itertools.groupby(rows, key=operator.itemgetter("loss", "dtype")):
        cells, points = [f"{loss}, {dtype}"], {row["budget"]: row for row in some}
        for budget in budgets:
            row = points.get(budget, {"failed": "not run"})
            if "failed" in row:
                cells.append(_reason(row))
                continue
            mark = "**" if row["auto"] == "vocab" else ""
            cells.append(f"{mark}{row['ratio']:.2f} ({limits.planned_ratio(row):.2f}){mark}")
        ran = [row for row in points.values() if "ratio" in row]
        at = [row["budget"] for row in ran]
        even = (_budget(crossing(at, ratios)) for ratios in ([row["ratio"] for row in ran], list(map(limits.planned_ratio, ran))))
        lines.append("| {} | {} ({}) |".format(" | ".join(cells), *even))
    return lines


def _budget(size: float | None) -> str:
    return "none of them" if size is None else f"{size / MIB:.1f} MiB"


def crossing(budgets: Sequence[int], ratios: Sequence[float]) -> float | None:
    """Where the ratios first pass 1, between two budgets on straight lines of both logarithms; None where they do not."""
    steps = list(zip(budgets, map(math.log, ratios), strict=True))
    for (left, above), (right, below) in itertools.pairwise(steps):
        if above == 0:
            return float(left)
        if above * below <= 0:
            return float(left * (right / left) ** (above / (above - below)))
    return None


def _time(row: Row) -> str:
    low, high = (f"{end(row['ratios']):.2f}" for end in (min, max))
    return f"{row['ratio']:.2f} ({low} to {high})" if low != high else f"{row['ratio']:.2f}"


def _both(row: Row) -> str:
    return f"{_time(row)}, {_scratch(row):,.0f} MiB"


def _missing(rows: list[Row]) -> str:
    """What was not measured, and why: a line for each contender and reason."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        for kind in ("failed", "skipped"):
            if kind in row:
                at = f"{row['loss']} at {row['head']} {row['dtype']}, N = {row['tokens']:,}, V = {row['vocab']:,}"
                found.setdefault((row["contender"], kind, _plain(row[kind])), []).append(at)
    lines = []
    for (contender, kind, reason), places in found.items():
        at = "" if kind == "skipped" else f" ({'; '.join(dict.fromkeys(places))})"
        lines.append(f"- {contender}: {reason}{at}")
    return "\n".join(["Failed, or not there to be measured:", "", *lines]) if lines else ""


def _largest(rows: list[Row], error: str) -> str:
    return f"{max(row[error] for row in rows):.1e}" if rows else "–"


def _error_table(rows: list[Row]) -> str:
    """The largest relative error of each contender in each dtype, over heads, losses and masks."""
    measured = [row for row in rows if "ratio" in row]
    dtypes = list(dict.fromkeys(row["dtype"] for row in measured))
    errors = {error: title for error, title in ERRORS.items() if any(error in row for row in measured)}
    lines = [
        "| largest relative error | " + " | ".join(f"{dtype} {title}" for dtype in dtypes for title in errors.values()) + " |",
        "|---|" + "---|" * (len(dtypes) * len(errors)),
    ]
    for contender in dict.fromkeys(row["contender"] for row in measured):
        of = {dtype: [row for row in measured if (row["contender"], row["dtype"]) == (contender, dtype)] for dtype in dtypes}
        lines.append(f"| {contender} | {' | '.join(_largest(of[dtype], error) for dtype in dtypes for error in errors)} |")
    return "\n".join(lines)


def _folded(title: str, table: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{table}\n\n</details>"


def compare_table(results: dict[str, Any]) -> str:
    """The contenders side by side: forward KL at every head, the other losses and masks, errors, and what is missing and why.

    results: what compare.json holds.
    """
    rows: list[Row] = results["rows"]
    settings = {(row["head"], row["dtype"]): row for row in rows}
    plain = [row for row in rows if row["loss"] == "forward_kl" and not row["masked"]]

    def setting(row: Row) -> tuple[str, str]:
        return row["head"], row["dtype"]

    def kind(row: Row) -> tuple[str, bool]:
        return row["loss"], row["masked"]

    heads = {one: f"{one[0]} {one[1]}, N = {row['tokens']}" for one, row in settings.items()}
    sections = [
        f"{_where(results['machine'], *PEERS)}. Time of a step over its four bare products, the median (lowest to highest), and "
        "peak memory above inputs and returned gradients; forward KL of all tokens. Tokens are few here, so that a step takes "
        "seconds: how memory grows with them is below.",
        _folded("forward KL of all tokens, with memory", grid("forward KL", heads, plain, setting, _both)),
        "The other losses, and half of the tokens masked: time over the products of the tokens that count, so that a contender "
        "that computes the masked ones too is near 2. A table for each head:",
    ]
    for one, title in heads.items():
        here = [row for row in rows if setting(row) == one]
        of = [(loss, masked) for loss in LOSSES for masked in (False, True) if (loss, masked) in set(map(kind, here))]
        if len(of) > 1:
            columns = {(loss, masked): loss + (", masked" if masked else "") for loss, masked in of}
            table = grid(title, columns, here, kind, _time)
            sections.append(_folded(title, table))
    sections += [
        "Errors against float64 on the inputs as rounded to the dtype, logits of standard deviation 3; dW on 512 of its rows.",
        _folded("errors of the loss, dH and dW", _error_table(rows)),
        _missing(rows),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def growth_table(results: dict[str, Any]) -> str:
    """Time and memory against N and against V. results: what growth.json holds."""
    rows: list[Row] = results["rows"]
    sections = [
        f"{_where(results['machine'], *PEERS)}. Forward KL, as above: time over the four bare products, and peak memory above "
        "inputs and returned gradients."
    ]
    for sweep, fixed in (("tokens", "vocab"), ("vocab", "tokens")):
        here = [row for row in rows if row["part"] == sweep]
        if here:
            symbols = {"tokens": "N", "vocab": "V"}
            one = here[0]
            corner = f"{symbols[fixed]} = {one[fixed]:,}, D_s = {one['student_dim']}, D_t = {one['teacher_dim']}"
            columns = {size: f"{symbols[sweep]} = {size:,}" for size in sorted({row[sweep] for row in here})}
            sections.append(grid(corner, columns, here, operator.itemgetter(sweep), _both))
    sections.append(_missing(rows))
    return "\n\n".join(section for section in sections if section) + "\n"


def training_table(results: dict[str, Any]) -> str:
    """Speed and memory of whole steps against the length of a sequence. results: what training.json holds."""
    rows: list[Row] = results["rows"]
    one = rows[0]

    def speed(row: Row) -> str:
        return f"{row['tokens'] / row['seconds']:,.0f} ({row['ratio']:.2f})"

    def memory(row: Row) -> str:
        return f"{_scratch(row):,.0f} ({row['peak_bytes'] / MIB:,.0f})"

    columns = {size: f"N = {size:,}" for size in sorted({row["tokens"] for row in rows})}
    tables = [
        grid(corner, columns, rows, operator.itemgetter("tokens"), cell)
        for corner, cell in (("tokens/s (time over the bare work)", speed), ("MiB (gradients included)", memory))
    ]
    sections = [
        f"{_where(results['machine'], 'transformers', *PEERS)}. Forward KL, {one['dtype']}, V = {one['vocab']:,}, hidden sizes "
        f"{one['student_dim']} and {one['teacher_dim']}, two layers, one sequence with N predicted tokens a step; each process may "
        f"hold {one['limit'] / GIB:g} GiB. Medians; peak memory above models, gradients and optimizer state (in parentheses, above "
        "models and optimizer state alone).",
        *tables,
        "The first counted step's loss against float64:",
        _error_table(rows),
        _missing(rows),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def gpu_table(path: Path) -> str:
    """Times and memory of a result file of benchmarks.gpu, and how its checks went."""
    machines, found, _ = gpu_report.read(path)
    facts, results = machines[-1], gpu_report.latest(found)
    timed = {*gpu_times.OURS, *gpu_times.EXTENTS["short"].others}
    rows = [row for row in results if row["stage"] in ("ours", "others") and "ratio" in row and row["contender"] in timed]
    checks = [row for row in results if "check" in row and "skipped" not in row]
    passed = sum(row["passed"] for row in checks)
    columns = {(row["head"], row["loss"]): f"{row['student']} ← {row['teacher']}, {row['loss']}" for row in rows}
    known = {name: version for machine in machines for name, version in machine["versions"].items() if version}
    versions = ", ".join(f"{name} {known[name]}" for name in ("torch", "triton", *PEERS) if name in known)
    title = (
        f"{facts['device']}, {versions}, {facts['date'][:10]}; {passed} of {len(checks)} checks passed. "
        f"{rows[0]['tokens']:,} tokens, {rows[0]['dtype']}: a step's time, also over that of its four bare products, and its peak "
        "memory above inputs, returned gradients in it."
    )
    return f"{title}\n\n{grid('', columns, rows, lambda row: (row['head'], row['loss']), on_a_gpu)}\n"


def _between(page: str, mark: str, content: str) -> str:
    """The page with ``content`` between the marks of that name; as it is where it has none."""
    before, found, rest = page.partition(f"<!-- {mark} -->\n")
    return f"{before}{found}{content}{END}{rest.split(END, 1)[1]}" if found else page


# What is between the marks of a name: the table of a result file.
SECTIONS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "compare": ("compare.json", compare_table),
    "growth": ("growth.json", growth_table),
    "limits": ("limits.json", limits_table),
    "measured": ("linear.json", linear_table),
    "methods": ("methods.json", methods_table),
    "offsets": ("offsets.json", offsets.error_table),
    "training": ("training.json", training_table),
}


def updated(page: str) -> str:
    """A page with the tables of the result files between their marks."""
    for mark, (file, make) in SECTIONS.items():
        page = _between(page, mark, make(json.loads((RESULTS / file).read_text())))
    on_gpu = RESULTS / "gpu-h100.jsonl"
    grown, compared = (json.loads((RESULTS / f"{name}.json").read_text()) for name in ("growth", "compare"))
    page = _between(page, "door", door_table(on_gpu, grown))
    page = _between(page, "overview", overview_table(on_gpu, grown, compared))
    page = _between(page, "predicted", offsets.predicted_table())
    page = _between(page, "gpu-h200", gpu_table(RESULTS / "gpu-h200.jsonl"))
    return _between(page, "gpu", gpu_table(on_gpu))


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(updated(page.read_text()))

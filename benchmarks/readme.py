"""Writes the README's tables from benchmarks/results: ``python -m benchmarks.readme``."""

from __future__ import annotations

import json
import operator
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import contenders, gpu_report
from benchmarks.gpu_times import GIB
from benchmarks.limits import limits_table
from benchmarks.linear import DTYPES, LOSSES, RESULTS, SHAPES, Case, name
from benchmarks.measure import MIB

README = Path(__file__).parent.parent / "README.md"
END = "<!-- end -->"
# Rows of the table of memory: what they are called, the loss, tokens and budget.
MEMORY = (
    ("forward KL", "forward_kl", 1024, None),
    ("forward KL", "forward_kl", 8192, None),
    ("forward KL", "forward_kl", 1024, 128 * MIB),
    ("OKD", "okd", 1024, None),
)


def _ratio(cases: dict[str, Any], case: Case) -> str:
    result = cases.get(name(case), {"failed": "not run"})
    return result["failed"] if "failed" in result else f"{result['ratio']:.3f}"


def table(results: dict[str, Any]) -> str:
    """The section's Markdown, with the losses that were timed."""
    machine, cases = results["machine"], results["cases"]
    threads = machine["threads"]
    losses = [
        loss for loss in LOSSES if any(name(Case("time", shape, dtype, loss)) in cases for shape in SHAPES for dtype in DTYPES)
    ]
    lines = [
        f"{machine['processor']}, {threads} threads, {machine['instruction_sets'][0]}, torch {machine['torch']}, "
        f"{machine['date']}; N = 1024, medians.",
        "",
        "| V, D_s, D_t | dtype | " + " | ".join(losses) + " | 128 MiB budget | eager forward KL | half masked / unmasked |",
        "|---|---|" + "---|" * (len(losses) + 3),
    ]
    for shape, sizes in SHAPES.items():
        for dtype in DTYPES:
            row = [_ratio(cases, Case("time", shape, dtype, loss)) for loss in losses]
            extra = [Case("time", shape, budget=128 * MIB), Case("eager", shape), Case("time", shape, masked=True)]
            row += [_ratio(cases, case) if dtype == "fp32" else "" for case in extra]
            lines.append(f"| {', '.join(f'{size:,}' for size in sizes)} | {dtype} | " + " | ".join(row) + " |")
    if "okd" in losses:
        lines += ["", "okd is `linear_okd_loss` with a frozen teacher head, over five products: the fifth makes dH of the teacher."]
    lines += [
        "",
        "| peak memory above inputs and returned gradients, V = 151,936 | measured, MiB | planned, MiB |",
        "|---|---|---|",
    ]
    for dtype in DTYPES:
        for title, loss, tokens, budget in MEMORY:
            if loss not in losses:
                continue
            result = cases.get(name(Case("memory", "152k", dtype, loss, tokens=tokens, budget=budget)), {"failed": "not run"})
            if "failed" in result:
                measured, planned = result["failed"], ""
            else:
                measured, planned = (f"{result[key] / MIB:.0f}" for key in ("scratch_bytes", "planned_scratch_bytes"))
            limit = f", budget {budget // MIB} MiB" if budget else ""
            lines.append(f"| {title}, {dtype}, N = {tokens}{limit} | {measured} | {planned} |")
    eager = cases.get(name(Case("eager", "152k")), {})
    if "scratch_bytes" in eager:
        lines.append(f"| eager PyTorch, fp32, N = 1024 (grows with N) | {eager['scratch_bytes'] / MIB:.0f} | |")
    own = [
        (cases[name(case)]["seconds"], cases[name(case)]["own_dtype_products_seconds"])
        for case in (Case("time", shape, "bf16") for shape in SHAPES)
        if "own_dtype_products_seconds" in cases.get(name(case), {})
    ]
    if own:
        lines += [
            "",
            "This processor has no bfloat16 matrix path, so bf16 rows are over float32 products. "
            "torch's own bfloat16 products take "
            + " and ".join(f"{products:.0f} s where the whole loss step takes {step:.1f} s" for step, products in own)
            + ".",
        ]
    return "\n".join(lines) + "\n"


def methods_table(results: dict[str, Any]) -> str:
    """The methods side by side: means over the seeds, and the range of their losses."""
    machine = results["machine"]
    where = f"{machine['processor']}, {machine['threads']} thread, torch {machine['torch']}, {machine['date']}"
    lines = [
        f"{where}; {results['steps']} steps, {len(results['seeds'])} seeds.",
        "",
        "| method | held-out loss, nats (lowest to highest seed) | next-token accuracy | seconds per step |",
        "|---|---|---|---|",
    ]
    for method, seeds in results["runs"].items():
        losses, accuracies, seconds = ([one[key] for one in seeds.values()] for key in ("loss", "accuracy", "seconds_per_step"))
        cells = (
            method,
            f"{statistics.mean(losses):.3f} ({min(losses):.3f} to {max(losses):.3f})",
            f"{statistics.mean(accuracies):.1%}",
            f"{statistics.mean(seconds):.3f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    teacher = results["teacher"]
    lines.append(f"| the teacher itself | {teacher['loss']:.3f} | {teacher['accuracy']:.1%} | |")
    return "\n".join(lines).replace("%", " %") + "\n"


Row = dict[str, Any]
ERRORS = {"value_error": "value", "hidden_grad_error": "dH", "head_grad_error": "dW"}


def _grid(corner: str, columns: dict[Any, str], rows: list[Row], column: Callable[[Row], Any], cell: Callable[[Row], str]) -> str:
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


def _where(machine: dict[str, Any]) -> str:
    libraries = ", ".join(f"{name} {machine[name]}" for name in ("torch", "liger-kernel", "trl") if machine.get(name))
    return f"{machine['processor']}, {machine['threads']} threads, {machine['instruction_sets'][0]}, {libraries}, {machine['date']}"


def _time(row: Row) -> str:
    low, high = (f"{end(row['ratios']):.2f}" for end in (min, max))
    return f"{row['ratio']:.2f} ({low} to {high})" if low != high else f"{row['ratio']:.2f}"


def _own_memory(row: Row) -> str:
    return f"{round((row['peak_bytes'] - row['returned_bytes']) / MIB):,} MiB"


def _both(row: Row) -> str:
    return f"{_time(row)}, {_own_memory(row)}"


def _missing(rows: list[Row]) -> str:
    """What was not measured, and why: a line for each contender and reason."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        for kind in ("failed", "skipped"):
            if kind in row:
                at = f"{row['loss']} at {row['head']} {row['dtype']}, N = {row['tokens']:,}, V = {row['vocab']:,}"
                found.setdefault((row["contender"], kind, row[kind]), []).append(at)
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
    lines = [
        "| largest relative error | " + " | ".join(f"{dtype} {title}" for dtype in dtypes for title in ERRORS.values()) + " |",
        "|---|" + "---|" * (len(dtypes) * len(ERRORS)),
    ]
    for contender in dict.fromkeys(row["contender"] for row in measured):
        of = {dtype: [row for row in measured if (row["contender"], row["dtype"]) == (contender, dtype)] for dtype in dtypes}
        lines.append(f"| {contender} | {' | '.join(_largest(of[dtype], error) for dtype in dtypes for error in ERRORS)} |")
    return "\n".join(lines)


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
        f"{_where(results['machine'])}. Time of a step over its four bare products, the median (lowest to highest), and peak "
        "memory above inputs and returned gradients; forward KL of all tokens. Tokens are few here, so that a step takes seconds: "
        "how memory grows with them is below.",
        _grid("forward KL", heads, plain, setting, _both),
        "The other losses, and half of the tokens masked: time over the products of the tokens that count, so that a contender "
        "that computes the masked ones too is near 2. A table for each head:",
    ]
    for one, title in heads.items():
        here = [row for row in rows if setting(row) == one]
        of = [(loss, masked) for loss in contenders.LOSSES for masked in (False, True) if (loss, masked) in set(map(kind, here))]
        if len(of) > 1:
            columns = {(loss, masked): loss + (", masked" if masked else "") for loss, masked in of}
            table = _grid(title, columns, here, kind, _time)
            sections.append(f"<details><summary>{title}</summary>\n\n{table}\n\n</details>")
    sections += [
        "Errors against float64 on the inputs as rounded to the dtype, logits of standard deviation 3; dW on 512 of its rows.",
        _error_table(rows),
        _missing(rows),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def growth_table(results: dict[str, Any]) -> str:
    """Time and memory against N and against V. results: what growth.json holds."""
    rows: list[Row] = results["rows"]
    sections = [
        f"{_where(results['machine'])}. Forward KL, as above: time over the four bare products, and peak memory above inputs and "
        "returned gradients."
    ]
    for sweep, fixed in (("tokens", "vocab"), ("vocab", "tokens")):
        here = [row for row in rows if row["sweep"] == sweep]
        if here:
            symbols = {"tokens": "N", "vocab": "V"}
            one = here[0]
            corner = f"{symbols[fixed]} = {one[fixed]:,}, D_s = {one['student_dim']}, D_t = {one['teacher_dim']}"
            columns = {size: f"{symbols[sweep]} = {size:,}" for size in sorted({row[sweep] for row in here})}
            sections.append(_grid(corner, columns, here, operator.itemgetter(sweep), _both))
    sections.append(_missing(rows))
    return "\n\n".join(section for section in sections if section) + "\n"


def _on_a_gpu(row: Row) -> str:
    return f"{row['median_ms']:.1f} ms, {row['ratio']:.2f}; {row['peak_bytes'] / GIB:.1f} GiB"


def gpu_table(path: Path) -> str:
    """Times and memory of a result file of benchmarks.gpu, and how its checks went."""
    machines, found, _ = gpu_report.read(path)
    facts, results = machines[-1], gpu_report.latest(found)
    rows = [row for row in results if row["stage"] in ("ours", "others") and "ratio" in row]
    checks = [row for row in results if "check" in row and "skipped" not in row]
    passed = sum(row["passed"] for row in checks)
    columns = {(row["head"], row["loss"]): f"{row['student']} ← {row['teacher']}, {row['loss']}" for row in rows}
    versions = ", ".join(f"{name} {facts['versions'][name]}" for name in ("torch", "triton", "liger-kernel", "trl"))
    return (
        f"{facts['device']}, {versions}, {facts['date'][:10]}; {passed} of {len(checks)} checks passed. "
        f"{rows[0]['tokens']:,} tokens, {rows[0]['dtype']}: a step's time, also over that of its four bare products, and its peak memory above inputs, returned "
        f"gradients in it.\n\n{_grid('', columns, rows, lambda row: (row['head'], row['loss']), _on_a_gpu)}\n"
    )


def _between(readme: str, mark: str, content: str) -> str:
    before, rest = readme.split(f"<!-- {mark} -->\n")
    return f"{before}<!-- {mark} -->\n{content}{END}{rest.split(END, 1)[1]}"


# What is between the marks of a name: the table of a result file.
SECTIONS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "compare": ("compare.json", compare_table),
    "growth": ("growth.json", growth_table),
    "limits": ("limits.json", limits_table),
    "measured": ("linear.json", table),
    "methods": ("methods.json", methods_table),
}


def updated(readme: str) -> str:
    """The README with the tables of the result files between their marks."""
    for mark, (file, make) in SECTIONS.items():
        readme = _between(readme, mark, make(json.loads(RESULTS.with_name(file).read_text())))
    return _between(readme, "gpu", gpu_table(RESULTS.with_name("gpu-h100.jsonl")))


if __name__ == "__main__":
    README.write_text(updated(README.read_text()))

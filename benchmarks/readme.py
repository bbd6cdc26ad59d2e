"""Writes the README's tables from benchmarks/results: ``python -m benchmarks.readme``."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.linear import DTYPES, LOSSES, RESULTS, SHAPES, Case, name
from benchmarks.measure import MIB

README = Path(__file__).parent.parent / "README.md"
METHODS = RESULTS.with_name("methods.json")
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


def _between(readme: str, mark: str, content: str) -> str:
    before, rest = readme.split(f"<!-- {mark} -->\n")
    return f"{before}<!-- {mark} -->\n{content}{END}{rest.split(END, 1)[1]}"


def updated(readme: str, measured: dict[str, Any], methods: dict[str, Any]) -> str:
    """The README with its tables between their marks. measured: what linear.json holds; methods: methods.json."""
    return _between(_between(readme, "measured", table(measured)), "methods", methods_table(methods))


if __name__ == "__main__":
    README.write_text(updated(README.read_text(), *(json.loads(path.read_text()) for path in (RESULTS, METHODS))))

"""What the GPU suite found, as text: a line for each result while it runs, and the tables of a result file.

A result file is JSON Lines: the machine's facts, then results, each with its ``stage``; a run that was appended begins with the
machine's facts again. Of two results of the same thing the later one counts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.contenders import CROSS_ENTROPY
from benchmarks.runner import Result

_SAME_LOSS = 0.01  # relative; rounded logits of one contender differ by less


def read(path: Path) -> tuple[list[Result], list[Result], int]:
    """The machine's facts of each run, the results, and how many lines were cut off. Raises ValueError if it is no result file."""
    machines: list[Result] = []
    found: list[Result] = []
    lines = [text for text in path.read_text(errors="replace").splitlines() if text.strip()]
    for record in map(_record, lines):
        if "stage" in record:
            found.append(record)
        elif "device" in record:
            machines.append(record)
    if not machines:
        raise ValueError(f"{path} has no line with the facts of a machine: it is no result file of this suite")
    return machines, found, len(lines) - len(machines) - len(found)


def _record(text: str) -> Result:
    """A line's object; empty if it was cut off."""
    try:
        record = json.loads(text)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def about(result: Result) -> str:
    """What a result is about, in a few words."""
    if "head" in result:
        names = [result["head"], result["loss"], f"{result['tokens']} tokens"]
    elif "vocab" in result:
        names = [result["loss"], f"{result['tokens']} x {result['vocab']}"]
    else:
        names = [result[name] for name in ("check", "strategy", "dtype", "divergence", "spread", "rate") if name in result]
    of = [result[name] for name in ("contender", "candidate") if name in result]
    return ", ".join([" ".join(map(str, names)), *of])


def line(result: Result) -> str:
    """A result, for the terminal."""
    if "not_run" in result:
        missing = f"; not run: {', '.join(result['not_run'])}" if result["not_run"] else ""
        return f"{result['stage']}: {result['seconds']:.0f} of {result['limit_s']:.0f} s{missing}"
    if "broken" in result:
        return f"  BROKE {result['part']}: {result['broken']}"
    if "failed" in result:
        return f"  -     {about(result)}: {result['failed']}"
    if "skipped" in result:
        return f"  -     {about(result)}: {result['skipped']}"
    if "check" in result:
        if not result["passed"]:
            return f"  FAIL  {about(result)}: {result['reason']}"
        return f"  ok    {about(result)}" + (
            f": at most {result['worst_ratio']:.2f} of the bound" if "worst_ratio" in result else ""
        )
    if "rate" in result:
        return f"  {result['rate']}: {result['median_ms']:.3f} ms, {result['per_second'] / 1e12:.3g} tera{result['unit']}/s"
    if result["stage"] == "profile":
        longest = ", ".join(f"{kernel['name'][:30]} {kernel['ms']:.2f}" for kernel in result["kernels"][:3])
        return f"  {about(result)}: step {result['step_ms']:.2f} ms, kernels {result['kernel_ms']:.2f} ms: {longest}"
    if "median_ms" not in result:
        return f"  {about(result)}: compiled and started in {result['first_s']:.1f} s"
    if "contender" in result:
        peak = "" if result["peak_bytes"] is None else f", {result['peak_bytes'] / 2**30:.2f} GiB"
        share = f"{result['share_of_product_rate']:.0%} of the product rate"
        return f"  {about(result)}: {result['median_ms']:.2f} ms, {result['ratio']:.3f}x, {share}{peak}"
    return f"  {about(result)}: {result['median_ms']:.3f} ms"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Columns side by side, the last one to the left."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(row[at]) for row in lines) for at in range(len(header))]
    return [
        "  " + "  ".join([*(text.rjust(width) for text, width in zip(row, widths[:-1], strict=False)), row[-1]]) for row in lines
    ]


def _by(results: Iterable[Result], *names: str) -> dict[tuple[Any, ...], list[Result]]:
    groups: dict[tuple[Any, ...], list[Result]] = {}
    for result in results:
        groups.setdefault(tuple(result.get(name) for name in names), []).append(result)
    return groups


def _checks(results: list[Result]) -> list[str]:
    checks = [result for result in results if "check" in result]
    if not checks:
        return []
    failed = [check for check in checks if check.get("passed") is False]
    skipped = _by((check for check in checks if "skipped" in check), "skipped")
    passed = len(checks) - len(failed) - sum(map(len, skipped.values()))
    lines = [f"checks: {passed} passed, {len(failed)} failed, {sum(map(len, skipped.values()))} skipped", *map(line, failed)]
    return lines + [f"  skipped {len(some)}: {reason}" for (reason,), some in skipped.items()]


def _times(results: list[Result]) -> list[str]:
    lines = []
    for (head, loss, tokens), rows in _by(results, "head", "loss", "tokens").items():
        ran = [row for row in rows if not {"failed", "skipped"} & row.keys()]
        bare = f": the bare products take {min(row['products_ms'] for row in ran):.2f} ms" if ran else ""
        lines += [f"{head}, {loss}, {tokens} tokens{bare}"]
        cells = [
            (
                f"{row['median_ms']:.2f}",
                f"{row['ratio']:.2f}",
                "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.2f}",
                f"{row['share_of_product_rate']:.0%}",
                f"{row['first_s']:.1f}",
                row["contender"],
            )
            for row in ran
        ]
        if cells:
            lines += table(("ms", "x products", "peak GiB", "product rate", "first step s", "contender"), cells)
        lines += [f"  {row['contender']}: {row.get('failed') or row['skipped']}" for row in rows if row not in ran]
        divergences = [row for row in ran if (row["contender"], row["loss"]) not in CROSS_ENTROPY]
        values = [row["loss_value"] for row in divergences]
        if values and max(values) - min(values) > _SAME_LOSS * abs(min(values)):
            lines += [
                "  THE VALUES OF THE LOSS DIFFER: "
                + ", ".join(f"{row['contender']} {row['loss_value']:.5g}" for row in divergences)
            ]
    return lines


def _profiles(results: list[Result]) -> list[str]:
    lines = []
    for result in results:
        if "failed" in result:
            lines.append(line(result))
            continue
        gaps = result["share_without_kernel"]
        share = "" if gaps is None else f", {gaps:.1%} of it without a kernel"
        replay = f"; from no CUDA graph: {result['not_replayed']}" if "not_replayed" in result else ""
        if "replayed_ms" in result:
            replay = f"; from a CUDA graph {result['replayed_ms']:.2f} ms, {result['replayed_ratio']:.2f} x products"
        lines.append(f"{about(result)}: a step takes {result['step_ms']:.2f} ms{share}{replay}")
        lines += table(
            ("ms", "calls", "kernel"),
            ((f"{kernel['ms']:.3f}", str(kernel["calls"]), kernel["name"]) for kernel in result["kernels"]),
        )
    return lines


def _candidates(results: list[Result]) -> list[str]:
    """By time, the best marked; for blocks also the best of each kernel."""
    lines = []
    of_problem = _by((row for row in results if "median_ms" in row), "stage", "head", "vocab", "loss")
    for (stage, head, vocab, loss), some in of_problem.items():
        rows = sorted(some, key=lambda row: float(row["median_ms"]))
        lines.append(f"{stage}: {head or f'V = {vocab:,}'}, {loss}")
        kernels = list(dict.fromkeys(name for row in rows for name in row.get("kernels", ())))
        best = {name: min(row["kernels"].get(name, float("inf")) for row in rows) for name in kernels}
        cells = []
        for row in rows:
            mark = "*" if row is rows[0] else ""
            if stage == "rows":
                more = [f"{row['bytes_per_second'] / 1e12:.2f}"]
            else:
                times = ((name, row["kernels"].get(name)) for name in kernels)
                more = ["-" if ms is None else f"{'*' * (ms == best[name])}{ms:.2f}" for name, ms in times]
            cells.append((f"{mark}{row['median_ms']:.3f}", *more, row["candidate"]))
        lines += table(("ms", *(["TB/s"] if stage == "rows" else kernels), "candidate"), cells)
    return lines + [line(row) for row in results if "failed" in row or "skipped" in row]


def _machine(facts: Result) -> str:
    memory = f", {facts['memory_bytes'] / 2**30:.0f} GiB" if "memory_bytes" in facts else ""
    versions = ", ".join(f"{name} {version}" for name, version in facts.get("versions", {}).items() if version)
    return f"{facts['device']}{memory}; {facts.get('date')}\n  {versions}\n  {facts.get('command')}"


def latest(found: Iterable[Result]) -> list[Result]:
    """Of each thing that was looked at the last result; a candidate that was only compiled was not."""
    told = (row for row in found if {"check", "rate", "contender", "candidate"} & row.keys())
    looked_at = (row for row in told if "candidate" not in row or {"median_ms", "failed", "skipped"} & row.keys())
    return list({(row["stage"], about(row)): row for row in looked_at}.values())


def text(path: Path) -> str:
    """The tables of a result file, also of one whose run was cut off."""
    machines, found, cut = read(path)
    results = latest(found)
    of_stage = {
        stage: [row for row in results if row["stage"] == stage] for stage in dict.fromkeys(row["stage"] for row in results)
    }
    sections = [
        list(map(_machine, machines)),
        [line(row) for row in found if "not_run" in row],
        [line(row) for row in found if "broken" in row],
        _checks(results),
        [line(row) for row in results if "rate" in row],
        # A stage may begin with small losses, which compile what it times.
        _times([row for stage in ("ours", "others") for row in of_stage.get(stage, []) if "contender" in row]),
        _profiles([row for row in of_stage.get("profile", []) if "contender" in row]),
        _candidates(of_stage.get("rows", []) + of_stage.get("blocks", [])),
        [f"{cut} line{'s' * (cut > 1)} of {path} cut off, and ignored"] if cut else [],
    ]
    return "\n\n".join("\n".join(section) for section in sections if section)

"""Checks and times of ``linear_kd_loss`` on the GPU of this machine, and of what else computes the same loss.

    python -m benchmarks.gpu --out FILE              # everything
    python -m benchmarks.gpu --out FILE --quick      # fewer settings, one head, two token counts
    python -m benchmarks.gpu --out FILE --only "times: gemma3 jsd"
    python -m benchmarks.gpu --out FILE --interpret  # the same code at toy size on the CPU, through the Triton interpreter

First the checks (gpu_checks.py), side by side, then the times (gpu_times.py) of the contenders (contenders.py), one after another.
Each part runs in a process of its own, so that a kernel that takes the device down takes only its part with it. FILE is JSON,
written anew after every result; it must not exist yet. The exit status is 1 if a check failed or a part broke off, and 2 if nothing
could be measured.

Needs the development requirements (the checks share their oracle with the tests). liger_kernel and trl are measured where they are
installed. Times that the interpreter took say nothing about a GPU: such a file has ``"interpreter": true``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

PEERS = ("liger-kernel", "trl")
PATIENCE = 1200  # seconds without any result after which what still runs is taken for hung
Part = tuple[str, Any, Any]


def parts(size: str) -> dict[str, Part]:
    """What runs in a process of its own, by the name that --only looks at."""
    from benchmarks import contenders, gpu_checks, gpu_times

    dtypes = tuple(gpu_checks.DTYPES)
    groups = (dtypes,) if size == "toy" else tuple((dtype,) for dtype in dtypes)
    checks: dict[str, Part] = {
        f"checks: {strategy} {' '.join(group)}": ("checks", strategy, group) for strategy in ("tokens", "vocab") for group in groups
    }
    return checks | {
        f"times: {head} {loss}": ("times", head, loss) for head in gpu_times.EXTENTS[size].heads for loss in contenders.LOSSES
    }


def work(size: str, part: Part, sender: Connection) -> None:
    """Sends the part's results, each as it is known; runs in a process of its own."""
    from benchmarks import gpu_checks, gpu_times

    kind, first, second = part
    if kind == "checks" or size == "toy":
        torch.set_num_threads(1)  # problems are small, and checks run side by side
    with sender, ExitStack() as stack:
        if size == "toy":
            # On a GPU the device chooses the backend, its dtypes and its blocks; CPU tensors have to be told.
            warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton.runtime.interpreter")  # inf - inf in NumPy
            from benchmarks.interpreter import as_on_a_gpu  # Triton may not be installed

            stack.enter_context(as_on_a_gpu(gpu_checks.BACKEND))
        for result in (gpu_checks if kind == "checks" else gpu_times).run(size, first, second):
            sender.send(result)


def said(*command: str) -> str | None:
    """The last line that a command prints, None if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, cwd=Path(__file__).parent)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[-1] if lines else None


def machine(size: str) -> dict[str, Any]:
    """Device, versions, date and command."""
    from benchmarks.measure import version
    from kdkernels import info

    facts = info.facts()
    found: dict[str, Any] = {"device": f"{facts['processor']}, through the Triton interpreter", "capability": None}
    driver = None
    if size != "toy":
        properties = torch.cuda.get_device_properties(0)
        found = {"device": properties.name, "capability": f"{properties.major}.{properties.minor}"}
        found |= {"memory_bytes": properties.total_memory, "multiprocessors": properties.multi_processor_count}
        driver = said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        driver = driver or said("rocm-smi", "--showdriverversion", "--csv")
    return {
        **found,
        "interpreter": size == "toy",
        "extent": size,
        "versions": {
            **{"driver": driver, "cuda": torch.version.cuda, "hip": torch.version.hip},
            **{name: facts[name] for name in ("torch", "triton", "python", "kdkernels")},
            **{peer: version(peer) for peer in PEERS},
            "commit": said("git", "describe", "--always", "--dirty"),
        },
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "benchmarks.gpu", *sys.argv[1:]]),
    }


def written(path: Path, report: dict[str, Any]) -> None:
    """Replaces the file as a whole: who interrupts finds the one before or this one."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(beside, path)


def line(result: dict[str, Any]) -> str:
    """A result, for the terminal."""
    if "check" in result:
        about = " ".join(str(result[key]) for key in ("strategy", "dtype", "divergence", "check", "spread") if key in result)
        if "skipped" in result:
            return f"  -     {about}: {result['skipped']}"
        if not result["passed"]:
            return f"  FAIL  {about}: {result['reason']}"
        return f"  ok    {about}" + (f": at most {result['worst_ratio']:.2f} of the bound" if "worst_ratio" in result else "")
    about = f"  {result['tokens']:>6} tokens  {result['contender']:14}"
    if "failed" in result:
        return f"{about} {result['failed']}"
    peak = "" if result["peak_bytes"] is None else f"  {result['peak_bytes'] / 2**30:6.2f} GiB"
    times = f"{result['median_ms']:9.2f} ms ({result['p20_ms']:.2f}-{result['p80_ms']:.2f})"
    return f"{about} {times}  {result['ratio']:6.3f}x{peak}  {result['share_of_product_rate']:.0%} of the product rate"


def table(rows: list[dict[str, Any]]) -> str:
    """Time over the bare products, and peak memory, of every contender (a dash where it failed)."""
    names = list(dict.fromkeys(row["contender"] for row in rows))
    problems = dict.fromkeys((row["head"], row["loss"], row["tokens"]) for row in rows)
    by_key = {(row["head"], row["loss"], row["tokens"], row["contender"]): row for row in rows}

    def cell(row: dict[str, Any] | None) -> str:
        if row is None or "failed" in row:
            return "-"
        peak = "" if row["peak_bytes"] is None else f" {row['peak_bytes'] / 2**30:.1f}G"
        return f"{row['ratio']:.2f}x{peak}"

    header = ["head", "loss", "tokens", *names]
    lines = [header] + [[*map(str, key), *(cell(by_key.get((*key, name))) for name in names)] for key in problems]
    widths = [max(len(row[at]) for row in lines) for at in range(len(header))]
    return "\n".join("  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in lines)


def results(size: str, together: dict[str, Part]) -> Iterator[dict[str, Any]]:
    """Runs the parts side by side, each in a process of its own; one that breaks off is a failed check."""
    context = multiprocessing.get_context("spawn")
    running: dict[Any, tuple[str, Any]] = {}
    for name, part in together.items():
        print(name, flush=True)
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(size, part, sender), daemon=True)
        process.start()
        sender.close()  # so that the process holds the only end, and its death is the end of the results
        running[receiver] = name, process
    while running:
        ready = wait(list(running), PATIENCE)
        if not ready:
            for _, process in running.values():
                process.kill()
        for receiver in [one for one in running if one in ready]:
            result = received(receiver)
            if result is not None:
                yield result
                continue
            name, process = running.pop(receiver)
            process.join()
            if process.exitcode != 0:
                reason = f"the process ended with exit status {process.exitcode}"
                yield {"check": f"{name} ran to its end", "passed": False, "reason": reason}


def received(receiver: Connection) -> dict[str, Any] | None:
    """A part's next result, None after the last."""
    try:
        result: dict[str, Any] = receiver.recv()
    except EOFError:
        return None
    return result


def measure(path: Path, size: str, chosen: dict[str, Part]) -> int:
    """Runs the parts, checks side by side and times one by one; keeps the file up to date; returns the exit status."""
    report: dict[str, Any] = {**machine(size), "checks": [], "rows": []}
    written(path, report)
    checks = {name: part for name, part in chosen.items() if part[0] == "checks"}
    alone = [{name: part} for name, part in chosen.items() if name not in checks]
    for together in (checks, *alone):
        for result in results(size, together):
            report["checks" if "check" in result else "rows"].append(result)
            print(line(result), flush=True)
            written(path, report)
    failed = [check for check in report["checks"] if check.get("passed") is False]
    if report["rows"]:
        print(f"\ntime over the bare products{' (of the interpreter)' if size == 'toy' else ', peak memory'}")
        print(table(report["rows"]))
    print(f"\n{len(report['checks'])} checks, {len(failed)} failed")
    print("\n".join([*map(line, failed), f"wrote {path}"]))
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="where the results go; must not exist")
    parser.add_argument("--only", default="", metavar="NAME", help="run the parts whose name contains this")
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--quick", action="store_true", help="fewer settings and sizes")
    extent.add_argument("--interpret", action="store_true", help="toy sizes on the CPU, through the Triton interpreter")
    arguments = parser.parse_args()
    out: Path = arguments.out
    if out.exists():
        parser.error(f"--out {out} exists; results are never overwritten")
    if not out.parent.is_dir():
        parser.error(f"--out {out}: there is no folder {out.parent}")
    if arguments.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, here and in the parts' processes
    elif not torch.cuda.is_available():
        parser.error(f"no GPU here (torch {torch.__version__}); --interpret runs the same code at toy size on the CPU")
    else:
        os.environ.pop("TRITON_INTERPRET", None)  # left over from something else, it would time the interpreter
    size = "toy" if arguments.interpret else "quick" if arguments.quick else "full"
    chosen = {name: part for name, part in parts(size).items() if arguments.only in name}
    if not chosen:
        parser.error(f"--only {arguments.only!r} is part of no name; there are: {', '.join(parts(size))}")
    return measure(out, size, chosen)


if __name__ == "__main__":
    raise SystemExit(main())

"""Checks and times of ``linear_kd_loss`` on the GPU of this machine, and of what else computes the same loss, in stages that fit a
short lease.

    python -m benchmarks.gpu --out FILE                             # all stages: planned to take at most 17 minutes on an H100
    python -m benchmarks.gpu --out FILE --stages smoke,checks,ours,profile                   # at most 5.5 minutes of them
    python -m benchmarks.gpu --out FILE --append --stages rows,blocks,others        # as many, into the same file
    python -m benchmarks.gpu --out FILE --append --stages sanitizer                 # as many, by itself
    python -m benchmarks.gpu --out FILE --only "gemma3 8192 jsd"    # the items whose name contains this
    python -m benchmarks.gpu --out FILE --full                      # more settings, token counts and losses: hours
    python -m benchmarks.gpu --out FILE --interpret                 # the same code at toy size on the CPU, in Triton's interpreter
    python -m benchmarks.gpu --report FILE                          # the tables of a file, also of an unfinished one

Stages, in order of worth:
    smoke    products as the library asks for them, the rates of products and copies, a small loss through every kernel
    checks   values, gradients and the rest of the contract against float64 (gpu_checks.py)
    ours     both strategies at two memory budgets, and eager, on three heads (gpu_times.py)
    profile  the kernels of a step (gpu_kernels.py)
    rows     the row kernel alone, with the table's sizes and others
    blocks   the kernels of the strategy vocab with other blocks than the table's
    others   the losses of Liger, TRL, flash-linear-attention and torchtune, and torch.compile
    sanitizer  every kernel under compute-sanitizer, where it is found (gpu_sanitizer.py)

FILE is JSON Lines: the machine's facts, then each result as soon as it is known. Each stage and each item has a time limit of its
own; what hangs, or takes its process down, costs only its item, and a stage ends with what it had no time for. The exit status is 1
if a check failed or anything broke off or was not run, and 2 if nothing could be measured.

Runs from a checkout, nothing of it installed: PyTorch, Triton, NumPy and pytest are enough, and no compiled extension. The wheels
liger-kernel, trl (with datasets, dill and multiprocess), fla-core (with einops) and torchtune add contenders. Times that the
interpreter took say nothing about a GPU: such a file has ``"interpreter": true``.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import kdkernels as kd
from benchmarks import gpu_checks, gpu_kernels, gpu_report, gpu_sanitizer, gpu_smoke, gpu_times
from benchmarks.cases import DTYPES
from benchmarks.gpu_device import interpreted
from benchmarks.gpu_report import line
from benchmarks.measure import PEERS, version
from benchmarks.runner import Part, Result, results
from kdkernels.console import info
from kdkernels.divergences import resolve

# Seconds of each stage on a GPU: the first four, the next three, and the last one, are to fit 5.5 minutes each. The last compiles
# every kernel first: 60 seconds were not enough for that on an H200.
LIMITS = {"smoke": 65, "checks": 125, "ours": 90, "profile": 45, "rows": 70, "blocks": 90, "others": 165, "sanitizer": 330}
# How much longer each stage, and each item, may take.
SLOWER = {"short": (1, 1), "full": (60, 4), "toy": (3, 3)}
STRATEGIES = ("vocab", "tokens")  # the one that compiles more first


def _cost(divergence: str) -> int:
    """The divergences with more kernels first."""
    return len(resolve(divergence).one_sweep)


def _shards(size: str, part: Part) -> list[Part]:
    """A part for each item, side by side; at toy size, where starting a process takes longest, they stay together."""
    if size == "toy":
        return [part]
    return [replace(part, items=(item,), together=True) for item in part.items]


def _losses(size: str, divergences: Any, dtypes: tuple[str, ...]) -> list[Part]:
    """Small losses, which also compile the kernels that the times take."""
    items = tuple(itertools.product(sorted(divergences, key=_cost), dtypes))
    parts = [Part(f"loss {strategy}", gpu_smoke.opened_losses, (size, strategy), items, 40) for strategy in STRATEGIES]
    return [shard for part in parts for shard in _shards(size, part)]


def _checks(size: str) -> list[Part]:
    """One for each strategy, divergence and dtype, then those of each dtype; at toy size one for each strategy."""
    divergences = gpu_checks.TOY_DIVERGENCES if size == "toy" else sorted(kd.divergences(), key=_cost)
    dtypes = DTYPES
    of_16_bits = (gpu_checks.OFFSETS, gpu_checks.OFFSETS_CUDA)
    strategies = (*STRATEGIES, gpu_checks.CLUSTER, *of_16_bits)
    taken = [(one, dtype) for one, dtype in itertools.product(strategies, dtypes) if dtype != "fp32" or one not in of_16_bits]
    shards = [
        *((strategy, gpu_checks.items(size, dtype, of, strategy)) for of in divergences for strategy, dtype in taken),
        *((strategy, gpu_checks.items_of_dtype(dtype, strategy)) for strategy, dtype in taken),
    ]
    if size == "toy":
        shards = [(strategy, [item for of, items in shards if of == strategy for item in items]) for strategy in strategies]
    return [
        Part(f"check {strategy}", gpu_checks.opened, (size, strategy), tuple(items), 75, together=True)
        for strategy, items in shards
        if items
    ]


def parts(size: str) -> dict[str, list[Part]]:
    """What runs in each stage."""
    extent = gpu_times.EXTENTS[size]
    toy = size == "toy"
    divergences = gpu_checks.TOY_DIVERGENCES if toy else kd.divergences()
    timed = ("forward_kl", "jsd")
    compiled = [] if toy else _losses(size, timed, ("bf16",))

    settings = tuple(itertools.product(extent.tokens, extent.losses))
    ours = tuple((*setting, contender) for setting in settings for contender in gpu_times.OURS)
    others = tuple((*setting, contender) for contender in extent.others for setting in settings)
    profiled = tuple(itertools.product(timed, gpu_kernels.PROFILED))
    profiled_heads = tuple(extent.heads) if toy else gpu_kernels.PROFILED_HEADS
    labels = gpu_kernels.ROW_CANDIDATES[: 2 if toy else None]
    vocabularies = (150,) if toy else gpu_kernels.ROW_VOCABULARIES
    tried = gpu_kernels.TOY_BLOCKS if toy else gpu_kernels.BLOCK_CANDIDATES
    blocks = tuple((loss, dress, *each) for dress, some in tried.items() for each in some for loss in timed[::-1])

    def compiled_then_timed(
        name: str, opened: Callable[..., Any], first: tuple[Any, ...], all_of_them: tuple[Any, ...]
    ) -> list[Part]:
        return [
            *_shards(size, Part(f"compile {name}", opened, (size, True), first, 60)),
            Part(f"time {name}", opened, (size, False), all_of_them, 30),
        ]

    found = {
        "smoke": [
            Part("device", gpu_smoke.opened, (size,), (("backend",), ("kept_product",), ("added_product",), ("rates",)), 25),
            *_losses(size, divergences, ("bf16", "fp32")),
        ],
        "checks": _checks(size),
        "ours": [*compiled, *(Part(f"time {head}", gpu_times.opened, (size, head), ours, 40) for head in extent.heads)],
        "profile": [
            *compiled,
            *(Part(f"profile {head}", gpu_kernels.opened_profile, (size, head), profiled, 20) for head in profiled_heads),
        ],
        "rows": compiled_then_timed(
            *("rows", gpu_kernels.opened_rows),
            tuple(itertools.product(timed, vocabularies[:1], labels)),
            tuple(itertools.product(timed, vocabularies, labels)),
        ),
        "blocks": compiled_then_timed("blocks", gpu_kernels.opened_blocks, blocks, blocks),
        "others": [Part(f"time {head}", gpu_times.opened, (size, head), others, 75) for head in extent.other_heads],
        "sanitizer": [
            Part("sanitizer", gpu_sanitizer.opened, (size,), ((gpu_sanitizer.LAUNCHES,),), 150),
            *(
                Part("check sanitizer", gpu_sanitizer.opened, (size,), ((tool,),), 180, together=True)
                for tool in gpu_sanitizer.TOOLS
            ),
        ],
    }
    if not toy:
        return found
    # times of the interpreter mean nothing, so nothing has to be alone
    return {stage: [replace(part, together=True, around=interpreted) for part in some] for stage, some in found.items()}


def chosen(size: str, stages: list[str], only: str) -> dict[str, list[Part]]:
    """The stages, and of them the items whose name contains ``only``."""
    found = {}
    for stage in stages:
        some = [
            replace(part, items=tuple(item for item in part.items if only in part.named(item))) if only else part
            for part in parts(size)[stage]
        ]
        some = [part for part in some if part.items]
        if some:
            found[stage] = some
    return found


def said(*command: str) -> str | None:
    """The last line that a command prints, None if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10, cwd=Path(__file__).parent)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[-1] if lines else None


def sources() -> str:
    """Tells one state of the library's files from another."""
    folder = Path(kd.__file__).parent
    files = sorted(file for kind in ("*.py", "*.cu", "*.cuh") for file in folder.rglob(kind))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def device_facts(size: str) -> Result:
    if size == "toy":
        return {"device": f"{info.processor()}, through the Triton interpreter", "capability": None}
    properties = torch.cuda.get_device_properties(0)
    return {
        **{"device": properties.name, "capability": f"{properties.major}.{properties.minor}"},
        **{"memory_bytes": properties.total_memory, "multiprocessors": properties.multi_processor_count},
    }


def command(arguments: list[str]) -> str:
    """As it was given, but for the folders of absolute paths: they are the machine's own, and the file is public."""
    plain = (re.sub(r"^(--\w+=)?/.*/", r"\1", argument) for argument in arguments)
    return shlex.join(["python", "-m", "benchmarks.gpu", *plain])


def machine(size: str) -> Result:
    """Device, versions, date and command."""
    driver = None
    if size != "toy":
        driver = said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        driver = driver or said("rocm-smi", "--showdriverversion", "--csv")
    facts = info.facts()
    return {
        **device_facts(size),
        "interpreter": size == "toy",
        "extent": size,
        "processors": os.cpu_count(),
        "versions": {
            **{"driver": driver, "cuda": torch.version.cuda, "hip": torch.version.hip},
            **{name: facts[name] for name in ("torch", "triton", "transformers", "python", "kdkernels")},
            **{peer: version(peer) for peer in PEERS},
            "commit": said("git", "describe", "--always", "--dirty"),
            "sources": sources(),  # where the checkout was copied without its history
        },
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command(sys.argv[1:]),
    }


def append(path: Path, record: Result) -> None:
    """One line more, on disk when this returns; behind a line that was cut off it begins a new one."""
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(record).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def measured(path: Path, size: str, stages: dict[str, list[Part]]) -> Iterator[Result]:
    """The results of the stages, each in the file before it is yielded."""
    begin = time.monotonic()
    append(path, machine(size))
    done: set[Part] = set()
    slower, slower_items = SLOWER[size]
    for stage, some in stages.items():
        for result in results(some, LIMITS[stage] * slower, done, slower_items):
            record = {"stage": stage, **result, "at_s": round(time.monotonic() - begin, 1)}
            append(path, record)
            yield record


def measure(path: Path, size: str, stages: dict[str, list[Part]]) -> int:
    """Runs the stages and says what they find; returns the exit status."""
    bad = []
    for result in measured(path, size, stages):
        print(line(result), flush=True)
        if result.get("passed") is False or "broken" in result or result.get("not_run"):
            bad.append(result)
    print("\n".join(["", *map(line, bad), f"wrote {path}; python -m benchmarks.gpu --report {path} shows it"]))
    return 1 if bad else 0


def refusal(out: Path, adds: bool, size: str) -> str | None:
    """Why results may not go to this file."""
    if not adds:
        if out.exists():
            return f"--out {out} exists; results are never overwritten, and --append adds to them"
        return None if out.parent.is_dir() else f"--out {out}: there is no folder {out.parent}"
    try:
        machines, _, _ = gpu_report.read(out)
    except (OSError, ValueError) as error:
        return f"--append to {out}: {error}"
    there, here = machines[0]["device"], device_facts(size)["device"]
    return None if there == here else f"--append to {out}: its results are of {there!r}, and this is {here!r}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--out", type=Path, metavar="FILE", help="where the results go; must not exist, but for --append")
    target.add_argument("--report", type=Path, metavar="FILE", help="print what a result file says")
    parser.add_argument("--append", action="store_true", help="add to the results of the same device that --out holds")
    parser.add_argument("--stages", default=",".join(LIMITS), metavar="A,B,...", help="which to run (default: %(default)s)")
    parser.add_argument("--only", default="", metavar="NAME", help="run the items whose name contains this")
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--full", action="store_true", help="more settings, token counts, losses and repeats")
    extent.add_argument("--interpret", action="store_true", help="toy sizes on the CPU, through the Triton interpreter")
    arguments = parser.parse_args()
    if arguments.report is not None:
        try:
            report = gpu_report.text(arguments.report)
        except (OSError, ValueError) as error:
            parser.error(str(error))
        with suppress(BrokenPipeError):
            print(report)
        return 0
    if arguments.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, in the parts' processes
    elif not torch.cuda.is_available():
        parser.error(f"no GPU here (torch {torch.__version__}); --interpret runs the same code at toy size on the CPU")
    else:
        os.environ.pop("TRITON_INTERPRET", None)  # left over from something else, it would time the interpreter
    for asked in ("KDKERNELS_ROWS", "KDKERNELS_LOGITS"):  # each item asks for what it is about
        os.environ.pop(asked, None)
    size = "toy" if arguments.interpret else "full" if arguments.full else "short"
    wanted = arguments.stages.split(",")
    unknown = [stage for stage in wanted if stage not in LIMITS]
    if unknown:
        parser.error(f"--stages: {', '.join(map(repr, unknown))} is none of {', '.join(LIMITS)}")
    stages = chosen(size, [stage for stage in LIMITS if stage in wanted], arguments.only)
    if not stages:
        names = dict.fromkeys(part.name for stage in wanted for part in parts(size)[stage])
        parser.error(f"--only {arguments.only!r} is part of no name in these stages; names begin with: {', '.join(names)}")
    reason = refusal(arguments.out, arguments.append, size)
    if reason:
        parser.error(reason)
    return measure(arguments.out, size, stages)


if __name__ == "__main__":
    raise SystemExit(main())

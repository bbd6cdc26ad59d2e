"""A few small launches of every kernel under compute-sanitizer: accesses out of bounds (memcheck), races in shared memory
(racecheck), barriers that are used wrongly (synccheck). Results are checks, as in gpu_checks.py.

    python -m benchmarks.gpu_sanitizer      # the launches by themselves, on the GPU of this machine
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks.gpu_checks import Setting, cases, checked, moved
from benchmarks.gpu_device import cluster_rows, device_of, offset_logits
from benchmarks.gpu_scale import SkippedError
from benchmarks.runner import Result
from kdkernels.backends import cuda
from kdkernels.backends.cuda import product

PROGRAM = "compute-sanitizer"
ROOT = Path(__file__).parent.parent
INSTALLED = Path("/usr/local/cuda")
TOOLS = ("memcheck", "racecheck", "synccheck")
LAUNCHES = "launches"  # without a tool: what the tools start is compiled then
# Parts of the kernels' names; those of PyTorch and of the matrix libraries are not looked at.
KERNELS = ("row_loss", "statistics_kernel", "sums_kernel", "gradient_kernel", "product", "offsets_row", "scale_kernel")
# Blocks that share a row, warps of a block, blocks of a multiprocessor. Few clusters at a time, so that each takes several rows,
# and in several chunks where a block has much of a row.
CLUSTERS, AT_A_TIME = ((1, 8, 3), (2, 8, 3), (8, 8, 3)), 2
TOKENS, VOCAB, SHOWN = 6, 9001, 3
_SUMMARY = re.compile(r"^========= (?:ERROR|RACECHECK) SUMMARY: (\d+) ", re.MULTILINE)
_FINDING = re.compile(r"^========= (?=\S)(?!COMPUTE-SANITIZER|\w+ SUMMARY)(.*?)\s*$", re.MULTILINE)


def launch() -> None:
    """Each kernel with one sweep and with two, with nothing and with everything that a loss can have."""
    ways = ("offsets",) if product.why_not(torch.device("cuda")) else ("offsets", "offsets-cuda")
    for divergence in ("forward_kl", "jsd"):
        for dressed in (False, True):
            setting = Setting((TOKENS,), VOCAB, dressed=dressed)
            (case,) = (moved(case, "cuda") for case in cases(setting, divergence, torch.bfloat16, 3.0))
            for strategy in ("vocab", "tokens"):
                case.run(strategy=strategy)
            leaves = {name: leaf.detach().requires_grad_() for name, leaf in case.learned().items()}
            (2 * case.loss(leaves)).backward()
            for how in ways[: 1 if dressed else None]:  # of plain heads alone
                with offset_logits(how) as started:
                    case.run(strategy="tokens")
                    leaves = {name: leaf.detach().requires_grad_() for name, leaf in case.learned().items()}
                    case.loss(leaves, strategy="tokens", return_metrics=True)
                if not started:
                    raise LookupError(f"no logits of 16 bits were made by {how}")
            for shape in CLUSTERS if not cuda.compile.missing(torch.device("cuda")) else ():
                with cluster_rows(shape, AT_A_TIME) as started:
                    case.run(strategy="tokens")
                    leaves = {name: leaf.detach().requires_grad_() for name, leaf in case.learned().items()}
                    case.loss(leaves, strategy="tokens", return_metrics=True)
                if not started:
                    raise LookupError(f"the cluster kernel took no rows of {VOCAB} logits in clusters of {shape[0]}")
    torch.cuda.synchronize()


def program() -> str:
    """Where compute-sanitizer is; raises SkippedError where it is not."""
    toolkits = [*(Path(named) for name in ("CUDA_HOME", "CUDA_PATH") if (named := os.environ.get(name))), INSTALLED]
    folders = [toolkit / part for toolkit in toolkits for part in ("bin", PROGRAM)]
    found = shutil.which(PROGRAM) or shutil.which(PROGRAM, path=os.pathsep.join(map(str, folders)))
    if found is None:
        raise SkippedError(f"{PROGRAM} is neither in PATH nor below CUDA_HOME, CUDA_PATH or {INSTALLED}")
    return found


def command(sanitizer: str, name: str) -> list[str]:
    """name: a tool, or LAUNCHES."""
    launches = [sys.executable, "-m", "benchmarks.gpu_sanitizer"]
    if name == LAUNCHES:
        return launches
    kernels = [part for kernel in KERNELS for part in ("--kernel-name", f"kns={kernel}")]
    return [sanitizer, "--tool", name, *kernels, "--print-limit", "20", *launches]


def findings(output: str) -> list[str]:
    """The first line of each; raises LookupError where the tool did not come to its end."""
    counts = [int(count) for count in _SUMMARY.findall(output)]
    if not counts:
        raise LookupError(f"no summary; the last line is: {(output.strip().splitlines() or ['nothing'])[-1]}")
    found: list[str] = _FINDING.findall(output)
    return found if any(counts) else []


def under(name: str, device: str) -> Result:
    """One tool over the launches."""
    if device != "cuda" or torch.version.hip:
        raise SkippedError(f"{PROGRAM} is for NVIDIA GPUs")
    # each allocation by itself, so that an access past its end is one
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "KDKERNELS_ROWS": "triton", "KDKERNELS_LOGITS": "float32"}
    words = command(program(), name)
    done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    output = done.stdout + done.stderr
    found = [] if name == LAUNCHES else findings(output)
    if found:
        raise ArithmeticError(f"{len(found)} findings: {'; '.join(found[:SHOWN])}")
    if done.returncode:
        raise ArithmeticError(f"the launches ended with exit status {done.returncode}: {output.strip().splitlines()[-1:]}")
    return {}


def opened(size: str) -> Callable[[str], Iterator[Result]]:
    def run(name: str) -> Iterator[Result]:
        yield checked({"check": name}, under, name, device_of(size))

    return run


if __name__ == "__main__":
    launch()

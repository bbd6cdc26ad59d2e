"""What this installation is and what it runs on: ``python -m kdkernels info``, and the header of result files."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from pathlib import Path
from typing import Any

import torch

import kdkernels as kd
from kdkernels import backends
from kdkernels.backends import cuda, native
from kdkernels.backends.dtypes import logits_dtype

OPTIONAL = ("triton", "transformers", "tokenizers", "safetensors")


def processor() -> str:
    """The processor's name as the system gives it; on Linux with the family and model that x86 numbers itself by, since virtual
    machines leave out of the name which generation it is."""
    try:
        first, _, _ = Path("/proc/cpuinfo").read_text().partition("\n\n")
    except OSError:
        first = ""
    known = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}
    if "model name" not in known:
        return platform.processor() or platform.machine()
    if "cpu family" not in known or "model" not in known:
        return known["model name"]
    return f"{known['model name']} (family {known['cpu family']}, model {known['model']})"


def facts() -> dict[str, Any]:
    """Versions, machine and backends; plain values, ready for JSON."""
    sets = native.instruction_sets()
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return {
        "kdkernels": kd.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _version(name) for name in OPTIONAL},
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "backends": {device: kd.backend(device) for device in devices},
        "rows": _row_kernel() if "cuda" in devices else None,
        "logits": _logits() if "cuda" in devices else None,
        "instruction_set": sets[0] if sets else None,
        "instruction_sets": list(sets),
        "divergences": list(kd.divergences()),
    }


def _row_kernel() -> str:
    """Which kernel does the row operation on the GPU, and why it is not the one that reads each logit once."""
    why_not = cuda.why_not(torch.device("cuda", torch.cuda.current_device()))
    return f"{kd.backend('cuda')}: {why_not}" if why_not else "cluster"


def _logits() -> str:
    """What a GPU keeps the logits of bfloat16 models in."""
    device, dtype = torch.device("cuda", torch.cuda.current_device()), torch.bfloat16
    keeps = backends.select(device, dtype, dtype).keeps_offsets(device, "", dtype, dtype)
    return "16-bit offsets" if keeps else str(logits_dtype(dtype, device)).removeprefix("torch.")


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library) if importlib.util.find_spec(library) else None
    except importlib.metadata.PackageNotFoundError:
        return None


def text() -> str:
    """The facts for reading, one to a line."""
    known = facts()
    in_use = known["instruction_set"]
    lines = {name: known[name] for name in ("kdkernels", "python", "torch")}
    lines |= {name: known[name] or "not installed" for name in OPTIONAL}
    lines |= {name: known[name] for name in ("system", "processor", "threads")}
    lines |= {f"backend, {device}": name for device, name in known["backends"].items()}
    lines |= {f"{name}, cuda": known[name] for name in ("rows", "logits") if known[name] is not None}
    if in_use is None:
        lines["instruction set"] = (
            f"none: {native.missing or native.NOT_BUILT}, so plain PyTorch does the work; {native.BACKEND.get_it}"
        )
    else:
        lines["instruction set"] = f"{in_use} (usable here: {', '.join(known['instruction_sets'])})"
    lines["divergences"] = ", ".join(known["divergences"])
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items())

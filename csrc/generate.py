"""Writes the functor of every divergence, the columns and the polynomials in C++: setup.py calls ``write`` before it compiles.

So the formulas of kdkernels/divergences.py, the columns and the coefficients of kdkernels/backends are the only ones there are.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def _loaded(file: Path) -> ModuleType:
    """A module of the package without the package, which may not be installed yet."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    return module


def _enum(result: str, prefix: str, columns: tuple[str, ...]) -> str:
    names = [*(f"{prefix}{column}" for column in columns), f"{result}_columns"]
    return f"enum {result.capitalize()}Column {{ {', '.join(names)} }};\n"


def write(repository: Path) -> None:
    """Write csrc/generated/divergences.inc, and the list of names, columns.inc and polynomials.inc beside it."""
    package = repository / "kdkernels"
    divergences = _loaded(package / "divergences.py")
    functors, columns, polynomials = (
        _loaded(package / "backends" / f"{name}.py") for name in ("functors", "columns", "polynomials")
    )
    names = divergences.divergences()
    folder = repository / "csrc" / "generated"
    folder.mkdir(exist_ok=True)
    header = "// Generated from kdkernels/{} by csrc/generate.py. Do not edit.\n"
    of_divergences = header.format("divergences.py")
    structs = "\n".join(functors.functor(divergences, name) for name in names)
    rows = "\n".join(f"KD_DIVERGENCE({name})" for name in names)
    enums = [
        _enum("stats", "", columns.STATS_COLUMNS),
        _enum("sums", "sum_", columns.SUMS_COLUMNS),
        _enum("row", "row_", columns.ROW_COLUMNS),
    ]
    macros = [f"#define {name} {expression}\n" for name, expression in polynomials.macros()]
    written = {
        "divergences.inc": of_divergences + structs,
        "names.inc": f"{of_divergences}{rows}\n",
        "columns.inc": header.format("backends/columns.py") + "".join(enums),
        "polynomials.inc": header.format("backends/polynomials.py") + "".join(macros),
    }
    for file, text in written.items():
        # Written anew it would be newer, and everything that includes it built again.
        if not (folder / file).exists() or (folder / file).read_text() != text:
            (folder / file).write_text(text)

"""Writes the C++ functor of every divergence: setup.py calls ``write`` before it compiles.

So the formulas of kdkernels/divergences.py are the only ones there are.
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


def write(repository: Path) -> None:
    """Write csrc/generated/divergences.inc and the list of names beside it."""
    package = repository / "kdkernels"
    divergences, functors = _loaded(package / "divergences.py"), _loaded(package / "backends" / "functors.py")
    names = divergences.divergences()
    folder = repository / "csrc" / "generated"
    folder.mkdir(exist_ok=True)
    header = "// Generated from kdkernels/divergences.py by csrc/generate.py. Do not edit.\n"
    structs = "\n".join(functors.functor(divergences, name) for name in names)
    rows = "\n".join(f"KD_DIVERGENCE({name})" for name in names)
    for file, text in {"divergences.inc": header + structs, "names.inc": f"{header}{rows}\n"}.items():
        # Written anew it would be newer, and everything that includes it built again.
        if not (folder / file).exists() or (folder / file).read_text() != text:
            (folder / file).write_text(text)

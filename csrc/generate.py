"""Prints the C++ functor of every divergence by tracing its pair function with a recording scalar.

setup.py calls ``write`` before it compiles, so that the formulas of kdkernels/divergences.py are the only ones there are.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any


class Traced:
    """A scalar that writes down what is done to it: each operation becomes one line of C++."""

    def __init__(self, lines: list[str], expression: str) -> None:
        self.lines, self.expression = lines, expression

    def record(self, expression: str) -> Traced:
        name = f"v{len(self.lines)}"
        self.lines.append(f"const auto {name} = {expression};")
        return Traced(self.lines, name)

    def __neg__(self) -> Traced:
        return self.record(f"-{self.expression}")


def _literal(value: Any) -> str:
    return value.expression if isinstance(value, Traced) else f"{float(value)!r}f"


def _operator(symbol: str, swapped: bool = False) -> Any:
    def method(self: Traced, other: Any) -> Traced:
        left, right = (_literal(other), _literal(self)) if swapped else (_literal(self), _literal(other))
        return self.record(f"{left} {symbol} {right}")

    return method


for _name, _symbol in {"add": "+", "sub": "-", "mul": "*", "truediv": "/"}.items():
    setattr(Traced, f"__{_name}__", _operator(_symbol))
    setattr(Traced, f"__r{_name}__", _operator(_symbol, swapped=True))
for _name, _symbol in {"lt": "<", "gt": ">", "le": "<=", "ge": ">=", "eq": "=="}.items():
    setattr(Traced, f"__{_name}__", _operator(_symbol))


class Recorder:
    """The namespace that stands for ``xp`` while tracing; every function is one of vec.h."""

    def __getattr__(self, function: str) -> Any:
        def call(*arguments: Any) -> Traced:
            first = next(argument for argument in arguments if isinstance(argument, Traced))
            return first.record(f"{function}({', '.join(map(_literal, arguments))})")

        return call


def functor(divergences: ModuleType, name: str) -> str:
    """The C++ struct of one divergence."""
    lines: list[str] = []
    lp, lq, d, *shares = (Traced(lines, argument) for argument in ("lp", "lq", "d", "share", "rest", "flat"))
    value, slope, c = divergences.bind(divergences.resolve(name).pair, Recorder())(lp, lq, d, tuple(shares))
    lines += [f"value = {value.expression};", f"slope = {slope.expression};", f"return {_literal(c)};"]
    body = "\n".join(f"    {line}" for line in lines)
    return (
        f"struct {name} {{\n"
        "  template <class F>\n"
        "  KD_INLINE static float apply([[maybe_unused]] F lp, [[maybe_unused]] F lq, F d, [[maybe_unused]] float share,\n"
        "                               [[maybe_unused]] float rest, float temperature, F& value, F& slope) {\n"
        f"    [[maybe_unused]] const float flat = temperature < {_literal(divergences.FLAT)} ? 0.f : 1.f;\n"
        f"{body}\n"
        "  }\n"
        "};\n"
    )


def write(repository: Path) -> None:
    """Write csrc/generated/divergences.inc and the list of names beside it."""
    spec = importlib.util.spec_from_file_location("divergences", repository / "kdkernels" / "divergences.py")
    assert spec is not None
    assert spec.loader is not None
    divergences = importlib.util.module_from_spec(spec)
    sys.modules["divergences"] = divergences
    spec.loader.exec_module(divergences)
    names = divergences.divergences()
    folder = repository / "csrc" / "generated"
    folder.mkdir(exist_ok=True)
    header = "// Generated from kdkernels/divergences.py by csrc/generate.py. Do not edit.\n"
    functors = "\n".join(functor(divergences, name) for name in names)
    rows = "\n".join(f"KD_DIVERGENCE({name})" for name in names)
    for file, text in {"divergences.inc": header + functors, "names.inc": f"{header}{rows}\n"}.items():
        # Written anew it would be newer, and everything that includes it built again.
        if not (folder / file).exists() or (folder / file).read_text() != text:
            (folder / file).write_text(text)

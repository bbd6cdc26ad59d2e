"""The C++ functor of a divergence, printed by tracing its pair function with a recording scalar.

csrc/generate.py writes them for the C++ extension; the CUDA kernels, which are compiled at run time, ask for theirs then. The build
loads this file by itself, so it imports nothing of the package.
"""

from __future__ import annotations

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

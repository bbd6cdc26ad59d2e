"""The mathematics of every divergence, stated once.

A divergence between a target and a student is D = sum over the vocabulary of value(lp, lq), where lp and lq are the
log-probabilities of target and student at one entry. Its slope is d value / d lq, and then the gradient of D with respect
to the student's logits is dx = slope - q * sum(slope), whatever the divergence.

Each is one function ``(lp, lq, a) -> (value, slope)`` written against the name ``xp``:

- here ``xp`` is torch, and the function serves tensors of any dtype and device;
- ``bind`` gives the same function over another namespace. The build traces it into a C++ functor (csrc/generate.py), which the
  CPU row loops take as a template argument; over triton.language and wrapped by triton.jit it is a kernel's constexpr argument.

Only ``exp``, ``log``, ``abs``, ``where``, ``maximum``, comparisons and arithmetic are used, in the form ``xp.exp(v)``: every
namespace has those. Entries that are -inf in either model are dropped by the callers, for all divergences alike.

To add one: write its pair function and its factory here, decorate the factory, and name it in DivergenceName.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

import torch as xp

from kdkernels.scalars import is_number

PairFunction = Callable[[Any, Any, Any], tuple[Any, Any]]
DivergenceName: TypeAlias = Literal["forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "total_variation"]


@dataclass(frozen=True)
class Divergence:
    """A divergence and its parameter; made by the factories of this module.

    name: what ``kd.divergences()`` lists.
    pair: (lp, lq, a) -> (value, slope), element by element; value in nats.
    a: the parameter that ``pair`` takes third; 0 where there is none.
    one_sweep: "target" or "student" where value and slope are p, or q, times a linear function of log p - log q: their sums then
        follow from running sums, before the log-sum-exps are known. "" where they do not.
    """

    name: str
    pair: PairFunction
    a: float = 0.0
    one_sweep: str = ""

    def linear(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """(c0, c1) of value and of slope, where one sweep is enough: each is w (c0 + c1 (lw - lo)), w = e^lw the probability
        of the side that one_sweep names, lo the log-probability of the other. Read off the pair function at w = 1."""
        return _linear(self.pair, self.a, self.one_sweep)


@functools.cache
def _linear(pair: PairFunction, a: float, one_sweep: str) -> tuple[tuple[float, float], tuple[float, float]]:
    # on the CPU, whatever the default device: a GPU would be waited for
    zero, one = xp.zeros((), dtype=xp.float64, device="cpu"), xp.ones((), dtype=xp.float64, device="cpu")
    found = []
    for other in (zero, -one):
        lp, lq = (zero, other) if one_sweep == "target" else (other, zero)
        found.append([float(part) for part in pair(lp, lq, a)])
    (value_0, slope_0), (value_1, slope_1) = found
    return (value_0, value_1 - value_0), (slope_0, slope_1 - slope_0)


_factories: dict[str, Callable[..., Divergence]] = {}


def _listed(factory: Callable[..., Divergence]) -> Callable[..., Divergence]:
    _factories[factory.__name__] = factory
    return factory


def divergences() -> tuple[DivergenceName, ...]:
    """Names of all divergences; each is accepted wherever a divergence is, with its default parameter."""
    return cast("tuple[DivergenceName, ...]", tuple(_factories))


def resolve(divergence: Divergence | str, parameter: float | None = None) -> Divergence:
    """The divergence itself, or the one of that name with this parameter (None: its default)."""
    if isinstance(divergence, Divergence):
        if divergence.name not in _factories:
            raise ValueError(f"divergence {divergence.name!r} is not known; accepted: {', '.join(_factories)}")
        listed = _factories[divergence.name]()
        if listed.a != 0.0 and not (is_number(divergence.a) and 0.0 < divergence.a < 1.0):
            raise ValueError(f"divergence {divergence.name!r} has the parameter {divergence.a}; accepted: a number in (0, 1)")
        if (divergence.pair, divergence.one_sweep) != (listed.pair, listed.one_sweep):
            # the backends know formulas by their names
            formula = getattr(divergence.pair, "__name__", divergence.pair)
            raise ValueError(
                f"divergence {divergence.name!r} came with the formula {formula} (one_sweep={divergence.one_sweep!r}); accepted "
                f"under that name: {listed.pair.__name__} (one_sweep={listed.one_sweep!r}), as kd.{divergence.name}() gives "
                "it. docs/adding-a-divergence.md says how to list another formula"
            )
        return divergence
    if not isinstance(divergence, str):
        raise TypeError(
            f"divergence is a name or a Divergence such as kd.forward_kl(), got {type(divergence).__name__}"
            + (f" (did you mean {divergence.__name__}()?)" if callable(divergence) and hasattr(divergence, "__name__") else "")
        )
    if divergence not in _factories:
        raise ValueError(f"divergence {divergence!r} is not known; accepted: {', '.join(_factories)}")
    factory = _factories[divergence]
    if parameter is None:
        return factory()
    if not inspect.signature(factory).parameters:
        raise ValueError(f"divergence {divergence!r} has no parameter, got {parameter}")
    return factory(parameter)


def bind(pair: PairFunction, namespace: Any, wrap: Callable[[Any], Any] = lambda function: function) -> PairFunction:
    """The same function with ``xp`` meaning ``namespace``; the helpers it calls are bound along with it.

    wrap: what each of them is passed through (a compiler's decorator).
    """
    scope: dict[str, Any] = {"xp": namespace}
    for name, member in globals().items():
        if inspect.isfunction(member) and name.startswith("_"):
            bound = types.FunctionType(member.__code__, scope, name, member.__defaults__)
            bound.__module__ = __name__
            scope[name] = wrap(bound)
    return scope[pair.__name__]  # type: ignore[no-any-return]


def _inside(name: str, value: float, at_the_ends: str) -> float:
    if not is_number(value):
        raise TypeError(f"{name} is a number in (0, 1), got {type(value).__name__}")
    if not 0.0 < value < 1.0:
        raise ValueError(f"{name}={value} is outside (0, 1); at 0 and 1 {at_the_ends}")
    return float(value)


def _log_mixture(lp, lq, b):
    """log(b * p + (1 - b) * q), without leaving log space: p and q may both underflow."""
    e = xp.exp(-xp.abs(lp - lq))
    return xp.maximum(lp, lq) + xp.log(xp.where(lp > lq, b + (1.0 - b) * e, (1.0 - b) + b * e))


def _forward_kl(lp, lq, a):
    p = xp.exp(lp)
    return p * (lp - lq), -p


@_listed
def forward_kl() -> Divergence:
    """KL(p || q), the usual distillation loss. With a target mixed in logit space (t < 1) it is TAID (arXiv 2501.16937)."""
    return Divergence("forward_kl", _forward_kl, one_sweep="target")


def _reverse_kl(lp, lq, a):
    q = xp.exp(lq)
    d = lq - lp
    return q * d, q * (d + 1.0)


@_listed
def reverse_kl() -> Divergence:
    """KL(q || p), mode seeking (MiniLLM, arXiv 2306.08543)."""
    return Divergence("reverse_kl", _reverse_kl, one_sweep="student")


def _jsd(lp, lq, a):
    lm = _log_mixture(lp, lq, a)
    kq = (1.0 - a) * xp.exp(lq) * (lq - lm)
    return a * xp.exp(lp) * (lp - lm) + kq, kq


@_listed
def jsd(beta: float = 0.5) -> Divergence:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q (GKD, arXiv 2306.13649).

    beta lies in (0, 1): at both ends the formula is 0, so ask for forward_kl() or reverse_kl() by name there.
    """
    ends = "the formula vanishes: use forward_kl() or reverse_kl(), which GKD means by them"
    return Divergence("jsd", _jsd, _inside("beta", beta, ends))


def _skew_forward_kl(lp, lq, a):
    lm = _log_mixture(lp, lq, a)
    p = xp.exp(lp)
    return p * (lp - lm), -p * (1.0 - a) * xp.exp(lq - lm)


@_listed
def skew_forward_kl(alpha: float = 0.1) -> Divergence:
    """KL(p || m) with m = alpha p + (1 - alpha) q (DistiLLM, arXiv 2402.03898); alpha in (0, 1)."""
    return Divergence("skew_forward_kl", _skew_forward_kl, _inside("alpha", alpha, "it is forward_kl() or 0: use that name"))


def _skew_reverse_kl(lp, lq, a):
    d = lq - _log_mixture(lp, lq, 1.0 - a)
    q = xp.exp(lq)
    return q * d, q * (d + 1.0 - a * xp.exp(d))


@_listed
def skew_reverse_kl(alpha: float = 0.1) -> Divergence:
    """KL(q || m) with m = (1 - alpha) p + alpha q (DistiLLM, arXiv 2402.03898); alpha in (0, 1)."""
    return Divergence("skew_reverse_kl", _skew_reverse_kl, _inside("alpha", alpha, "it is reverse_kl() or 0: use that name"))


def _total_variation(lp, lq, a):
    q = xp.exp(lq)
    d = q - xp.exp(lp)
    return 0.5 * xp.abs(d), xp.where(d == 0.0, 0.0 * q, xp.where(d > 0.0, 0.5 * q, -0.5 * q))


@_listed
def total_variation() -> Divergence:
    """1/2 sum |p - q|; its gradient at p = q is taken as 0."""
    return Divergence("total_variation", _total_variation)

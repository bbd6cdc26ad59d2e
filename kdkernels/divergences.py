"""The mathematics of every divergence, stated once.

A divergence between a target and a student is D = sum over the vocabulary of value(lp, lq), where lp and lq are the
log-probabilities of target and student at one entry. Its slope is d value / d lq, and then the gradient of D with respect
to the student's logits is dx = slope - q * sum(slope), whatever the divergence.

Each is one function ``(lp, lq, d, shares) -> (value, slope, c)`` written against the name ``xp``:

- d is lq - lp, from logits that were never rounded to log-probabilities; shares is (a, 1 - a, flat): the divergence's parameter,
  and 1 where the temperature makes any two distributions close, else 0.
- value holds c (q - p) more than the textbook has, which sums to nothing over a row, and slope c q more, which leaves dx as it is.
  With the right c no entry's value is negative: terms that would cancel over the row, and leave their rounding errors, do so here,
  entry by entry.
- here ``xp`` is torch, and the function serves tensors of any dtype and device;
- ``bind`` gives the same function over another namespace. Traced, it becomes a C++ functor (backends/functors.py), which the row
  loops of CPUs and of CUDA take as a template argument; over triton.language and wrapped by triton.jit it is a kernel's constexpr
  argument.

Only ``exp``, ``log``, ``abs``, ``where``, ``maximum``, comparisons and arithmetic are used, in the form ``xp.exp(v)``, and three
functions of small numbers that ``Torch`` below explains: every namespace has those. Entries that are -inf in either model are
banned: the textbook's value and slope are 0 there, whatever the function makes of them, so the callers put c (q - p) and c q.

The build loads this file by itself, so it imports nothing of the package. To add a divergence: write its pair function and its
factory here, decorate the factory, and name it in DivergenceName.
"""

from __future__ import annotations

import functools
import inspect
import numbers
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor

PairFunction = Callable[[Any, Any, Any, Any], tuple[Any, Any, Any]]
DivergenceName: TypeAlias = Literal["forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "total_variation"]


# From this temperature on distributions are flat: even logits 16 apart are near each other then.
FLAT = 64.0


def flat(temperature: float) -> bool:
    """Whether the temperature alone makes any two distributions close."""
    return temperature >= FLAT


class Torch:
    """torch, with what pair functions need where p is close to q."""

    exp, log, abs, where, maximum = torch.exp, torch.log, torch.abs, torch.where, torch.maximum

    @staticmethod
    def near(d: Tensor) -> Tensor:
        """Whether to take excess and deficit, which hold for d = lq - lp there; else the textbook's form loses no digit that
        counts."""
        return d.abs() < 0.25

    @staticmethod
    def excess(d: Tensor) -> Tensor:
        """e^d - 1 - d, without the cancellation."""
        wide = d.double()
        return (wide.expm1() - wide).to(d.dtype)

    @staticmethod
    def deficit(g: Tensor) -> Tensor:
        """g - log(1 + g), without the cancellation."""
        wide = g.double()
        return (wide - wide.log1p()).to(g.dtype)


xp = Torch


@dataclass(frozen=True)
class Divergence:
    """A divergence and its parameter; made by the factories of this module.

    name: what ``kd.divergences()`` lists.
    pair: (lp, lq, d, shares) -> (value, slope, c), element by element; value in nats.
    a: the parameter; 0 where there is none.
    one_sweep: "target" or "student" where the textbook's value and slope are p, or q, times a linear function of log p - log q:
        their sums then follow from running sums, before the log-sum-exps are known. "" where they do not.
    """

    name: str
    pair: PairFunction
    a: float = 0.0
    one_sweep: str = ""

    def shares(self, temperature: float = 1.0) -> tuple[float, float, float]:
        """What ``pair`` takes fourth. 1 - a is taken here: in float32 a small a would lose its digits."""
        return self.a, 1.0 - self.a, float(flat(temperature))

    def balanced(self, lp: Tensor, lq: Tensor, d: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Value and slope with c (q - p) and c q in them, over whole rows or blocks of them; banned entries as they should be."""
        value, slope, c = self.pair(lp, lq, d, self.shares(temperature))
        banned = (lp == -torch.inf) | (lq == -torch.inf)
        q = lq.exp()
        return torch.where(banned, c * (q - lp.exp()), value), torch.where(banned, c * q, slope)

    def textbook(self, lp: Tensor, lq: Tensor) -> tuple[Tensor, Tensor]:
        """Value and slope as papers have them, whatever the entries sum to; 0 where banned."""
        value, slope, c = self.pair(lp, lq, lq - lp, self.shares())
        banned = (lp == -torch.inf) | (lq == -torch.inf)
        q = lq.exp()
        return (value - c * (q - lp.exp())).masked_fill(banned, 0.0), (slope - c * q).masked_fill(banned, 0.0)

    def linear(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """(c0, c1) of value and of slope, where one sweep is enough: the textbook's are w (c0 + c1 (lw - lo)), w = e^lw the
        probability of the side that one_sweep names, lo the log-probability of the other. Read off the pair function at w = 1."""
        return _linear(self)[:2]

    def balance(self) -> float:
        """c, where one sweep is enough: what the sum of the slope has more than the textbook's."""
        return _linear(self)[2]

    @property
    def slope_by_target(self) -> bool:
        """Whether the textbook's slope is the target's probability times a constant: then what it sums to is known from how much of
        the target the student bans, mostly nothing, and value and gradient can be made in the same sweep."""
        return self.one_sweep == "target" and abs(self.linear()[1][1]) < 1e-12

    @property
    def weighed_by_student(self) -> bool:
        """Whether the student's own probabilities weigh the terms: then a sum over a part of the vocabulary falls below 0 as the
        student's mass leaves it. The textbook's slope shows it, which is positive at p = q."""
        return self.name in _weighed_by_student


@functools.cache
def _linear(divergence: Divergence) -> tuple[tuple[float, float], tuple[float, float], float]:
    # on the CPU, whatever the default device: a GPU would be waited for
    zero, one = torch.tensor([0.0, 1.0], dtype=torch.float64, device="cpu")
    found = []
    for other in (zero, -one):
        lp, lq = (zero, other) if divergence.one_sweep == "target" else (other, zero)
        found.append([float(part) for part in divergence.textbook(lp, lq)])
    (value_0, slope_0), (value_1, slope_1) = found
    c = divergence.pair(zero, zero, zero, divergence.shares())[2]
    return (value_0, value_1 - value_0), (slope_0, slope_1 - slope_0), float(c)


_factories: dict[str, Callable[..., Divergence]] = {}
# What the package takes from here by ``*``, factories as they are listed. Not as an assignment, which type checkers would read and
# find no factory in: they take every name without an underscore.
_exported = globals()["__all__"] = ["Divergence", "divergences"]
_weighed_by_student: set[str] = set()


def _listed(factory: Callable[..., Divergence]) -> Callable[..., Divergence]:
    _factories[factory.__name__] = factory
    _exported.append(factory.__name__)
    if _linear(factory())[1][0] > 0.0:  # here, as a loss that is being compiled takes no number out of a tensor
        _weighed_by_student.add(factory.__name__)
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
        from kdkernels.errors import nearest  # here, for the build

        accepted = f"{', '.join(_factories)}{nearest(divergence, _factories)}"
        raise ValueError(f"divergence {divergence!r} is not known; accepted: {accepted}")
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


def is_number(value: Any) -> bool:
    """Whether it is a real number, of Python or NumPy; True and False are none."""
    # Python's by name: what a compiled graph holds is a number only by that.
    return isinstance(value, (int, float, numbers.Real)) and not isinstance(value, bool)


def _inside(name: str, value: float, at_the_ends: str) -> float:
    if not is_number(value):
        raise TypeError(f"{name} is a number in (0, 1), got {type(value).__name__}")
    if not 0.0 < value < 1.0:
        raise ValueError(f"{name}={value} is outside (0, 1); at 0 and 1 {at_the_ends}")
    return float(value)


def _log_mixture(lp, lq, d, share, rest):
    """log(share * p + rest * q), without leaving log space: p and q may both underflow."""
    e = xp.exp(-xp.abs(d))
    return xp.maximum(lp, lq) + xp.log(xp.where(d < 0.0, share + rest * e, rest + share * e))


def _forward_kl(lp, lq, d, shares):
    p, q = xp.exp(lp), xp.exp(lq)
    near, excess = xp.near(d), xp.excess(d)
    # p (log p - log q) + (q - p) = p (e^d - 1 - d)
    return xp.where(near, p * excess, q - p * (d + 1.0)), xp.where(near, p * (d + excess), q - p), 1.0


@_listed
def forward_kl() -> Divergence:
    """KL(p || q), the usual distillation loss. With a target mixed in logit space (t < 1) it is TAID (arXiv 2501.16937)."""
    return Divergence("forward_kl", _forward_kl, one_sweep="target")


def _reverse_kl(lp, lq, d, shares):
    p, q = xp.exp(lp), xp.exp(lq)
    # q (log q - log p) - (q - p) = q (e^-d - 1 + d)
    return xp.where(xp.near(d), q * xp.excess(-d), p + q * (d - 1.0)), q * d, -1.0


@_listed
def reverse_kl() -> Divergence:
    """KL(q || p), mode seeking (MiniLLM, arXiv 2306.08543)."""
    return Divergence("reverse_kl", _reverse_kl, one_sweep="student")


def _jsd(lp, lq, d, shares):
    share, rest, _ = shares
    p, q = xp.exp(lp), xp.exp(lq)
    lm = _log_mixture(lp, lq, d, share, rest)
    kq = rest * q * (lq - lm)
    value = share * p * (lp - lm) + kq
    # m / p - 1 and m / q - 1
    over_p, over_q = rest * (d + xp.excess(d)), share * (xp.excess(-d) - d)
    lost_q = xp.deficit(over_q)
    near = xp.near(d)
    value = xp.where(near, share * p * xp.deficit(over_p) + rest * q * lost_q, value)
    return value, xp.where(near, rest * q * (lost_q - over_q), kq), 0.0


@_listed
def jsd(beta: float = 0.5) -> Divergence:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q (GKD, arXiv 2306.13649).

    beta lies in (0, 1): at both ends the formula is 0, so ask for forward_kl() or reverse_kl() by name there.
    """
    ends = "the formula vanishes: use forward_kl() or reverse_kl(), which GKD means by them"
    return Divergence("jsd", _jsd, _inside("beta", beta, ends))


def _skew_forward_kl(lp, lq, d, shares):
    share, rest, flat = shares
    p, q = xp.exp(lp), xp.exp(lq)
    lm = _log_mixture(lp, lq, d, share, rest)
    over = rest * (d + xp.excess(d))  # m / p - 1
    lost = xp.deficit(over)
    near = xp.near(d)
    # Where p is far below m, all of the slope is p / m, and would be rounded away beside c: so c is 0 but where all is flat.
    c = flat * rest
    value = xp.where(near, p * (lost - (1.0 - flat) * over), c * (q - p) + p * (lp - lm))
    log_p_over_m = lost - over
    near_slope = rest * q * ((flat - 1.0) - (log_p_over_m + xp.excess(log_p_over_m)))
    return value, xp.where(near, near_slope, c * q - p * rest * xp.exp(lq - lm)), c


@_listed
def skew_forward_kl(alpha: float = 0.1) -> Divergence:
    """KL(p || m) with m = alpha p + (1 - alpha) q (DistiLLM, arXiv 2402.03898); alpha in (0, 1)."""
    return Divergence("skew_forward_kl", _skew_forward_kl, _inside("alpha", alpha, "it is forward_kl() or 0: use that name"))


def _skew_reverse_kl(lp, lq, d, shares):
    share, rest, _ = shares
    p, q = xp.exp(lp), xp.exp(lq)
    log_q_over_m = lq - _log_mixture(lp, lq, d, rest, share)
    over = rest * (xp.excess(-d) - d)  # m / q - 1
    lost = xp.deficit(over)
    log_m_over_q = over - lost
    near = xp.near(d)
    value = xp.where(near, q * lost, rest * (p - q) + q * log_q_over_m)
    # q (log q / m + share (1 - q / m))
    near_slope = share * (log_m_over_q - xp.excess(-log_m_over_q)) - log_m_over_q
    return value, q * xp.where(near, near_slope, log_q_over_m + share * (1.0 - xp.exp(log_q_over_m))), -rest


@_listed
def skew_reverse_kl(alpha: float = 0.1) -> Divergence:
    """KL(q || m) with m = (1 - alpha) p + alpha q (DistiLLM, arXiv 2402.03898); alpha in (0, 1)."""
    return Divergence("skew_reverse_kl", _skew_reverse_kl, _inside("alpha", alpha, "it is reverse_kl() or 0: use that name"))


def _total_variation(lp, lq, d, shares):
    p, q = xp.exp(lp), xp.exp(lq)
    apart = xp.where(xp.near(d), p * (d + xp.excess(d)), q - p)
    return 0.5 * xp.abs(apart), xp.where(apart == 0.0, 0.0 * q, xp.where(apart > 0.0, 0.5 * q, -0.5 * q)), 0.0


@_listed
def total_variation() -> Divergence:
    """1/2 sum |p - q|; its gradient at p = q is taken as 0."""
    return Divergence("total_variation", _total_variation)

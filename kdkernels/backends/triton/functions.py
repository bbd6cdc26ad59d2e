"""What the formulas of divergences.py call ``xp``, in registers; the kernels use the same exp.

near, excess and deficit, which make a sweep a third longer, are asked for in flat distributions only (launch.pair_function);
elsewhere ``never`` stands for near, and the compiler drops the rest.

Both functions that take many instructions are cheaper than Triton's own, and lose no digit that the formulas can use:

- exp: the hardware's power of two, numbers below 2^-126 taken for 0. Triton's ``tl.exp`` spends three more instructions on those,
  and no probability is that small and counts.
- log: 1.2 units in the last place, near 1 too, where the difference of two close distributions lies. The hardware's own logarithm
  (lg2.approx) is only known to be 2^-22 off near 1, absolutely: a bias that would add up over a vocabulary.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from kdkernels.backends import polynomials
from kdkernels.backends.triton.arch import interpreting

EXCESS, DEFICIT = tl.constexpr(polynomials.EXCESS), tl.constexpr(polynomials.DEFICIT)
TANH, LOG = tl.constexpr(polynomials.TANH), tl.constexpr(polynomials.LOG)

if interpreting():  # which has no libdevice

    @triton.jit
    def exp(v):
        return tl.exp(v)

else:

    @triton.jit
    def exp(v):
        return libdevice.fast_expf(v)


@triton.jit
def polynomial(v, COEFFICIENTS: tl.constexpr):
    """The highest power's coefficient first."""
    p = v * COEFFICIENTS[0] + COEFFICIENTS[1]
    for at in tl.static_range(2, len(COEFFICIENTS.value)):
        p = p * v + COEFFICIENTS[at]
    return p


@triton.jit
def log(v):
    """Of positive normal numbers; NaN stays NaN. v = 2^k m with m in [2/3, 4/3), f = m - 1."""
    bits = v.to(tl.int32, bitcast=True)
    power = (bits - 0x3F2AAAAB) & -0x800000  # k << 23
    f = (bits - power).to(tl.float32, bitcast=True) - 1.0
    r = polynomial(f, LOG) * (f * f) + f
    r = power.to(tl.float32) * 8.262958293901244e-08 + r  # 2^-23 log 2
    return v * 0.0 + r


@triton.jit
def near(d):
    return tl.abs(d) < 0.25


@triton.jit
def never(d):
    return tl.abs(d) < 0.0


@triton.jit
def excess(d):
    """e^d - 1 - d where d is near 0."""
    return d * d * polynomial(d, EXCESS)


@triton.jit
def deficit(g):
    """g - log(1 + g) where g is near 0."""
    return g * g * polynomial(g, DEFICIT)


@triton.jit
def abs(v):
    return tl.abs(v)


@triton.jit
def where(condition, yes, no):
    return tl.where(condition, yes, no)


@triton.jit
def maximum(v, w):
    return tl.maximum(v, w)

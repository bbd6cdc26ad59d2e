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

from kdkernels.backends.triton.arch import interpreting

if interpreting():  # which has no libdevice

    @triton.jit
    def exp(v):
        return tl.exp(v)

else:

    @triton.jit
    def exp(v):
        return libdevice.fast_expf(v)


@triton.jit
def log(v):
    """Of positive normal numbers; NaN stays NaN. v = 2^k m with m in [2/3, 4/3); log m = f - f²/2 + f³ P(f), f = m - 1, with P
    fitted for the least relative error."""
    bits = v.to(tl.int32, bitcast=True)
    power = (bits - 0x3F2AAAAB) & -0x800000  # k << 23
    f = (bits - power).to(tl.float32, bitcast=True) - 1.0
    r = f * 0.13820123672485352 - 0.1512213796377182
    r = r * f + 0.14042332768440247
    r = r * f - 0.16472333669662476
    r = r * f + 0.20007917284965515
    r = r * f - 0.2500423789024353
    r = r * f + 0.3333326578140259
    r = r * f - 0.5
    r = r * (f * f) + f
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
    """e^d - 1 - d where d is near 0 (minimax fits of both, as in csrc/vec.h)."""
    r = d * 0.0013895341 + 0.00834883936
    r = r * d + 0.0416667163
    r = r * d + 0.166666418
    r = r * d + 0.5
    return d * d * r


@triton.jit
def deficit(g):
    """g - log(1 + g) where g is near 0."""
    r = g * -0.0989790931 + 0.135521948
    r = r * g - 0.144471601
    r = r * g + 0.16632323
    r = r * g - 0.199954972
    r = r * g + 0.250003725
    r = r * g - 0.333333611
    r = r * g + 0.5
    return g * g * r


@triton.jit
def abs(v):
    return tl.abs(v)


@triton.jit
def where(condition, yes, no):
    return tl.where(condition, yes, no)


@triton.jit
def maximum(v, w):
    return tl.maximum(v, w)

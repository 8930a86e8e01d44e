"""Quotients as the E4M3 numbers that carry their HiFloat8 values, by arithmetic: a table for each element would be read
from cache a line at a time, which takes longer than to read the operand from memory. Integer operations are few, since
a multiprocessor does half as many of them as of others.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def divide(x, scale):
    """x / scale, rounded as IEEE asks, of fp32 numbers and one positive scale, which may be Inf or NaN.

    By a rounded reciprocal and the remainder, which is exact unless something leaves the range of fp32: a quotient so
    small that the remainder does is far below HiFloat8, and large scales are brought into range together with x."""
    into_range = tl.where(scale > 1e30, 2.0**-64, 1.0)
    divisor = scale * into_range
    inverse = tl.div_rn(1.0, divisor)
    divisor = tl.minimum(divisor, 3e38)  # Inf times a quotient of 0 would be NaN
    x = x * into_range
    quotient = x * inverse
    return tl.fma(tl.fma(-quotient, divisor, x), inverse, quotient)


@triton.jit
def carry(x, scale, SHIFT: tl.constexpr, BELOW_16: tl.constexpr):
    """E4M3 bytes of 2^SHIFT times the HiFloat8 value of each quotient x by `scale`; NaN where that is, and where it
    exceeds 448, which with SHIFT up to 4 no number below 16 does. Numbers below 16 are NaN with their scale alone.
    """
    # Half a step: three bits of mantissa from 2^-3 on, two from 2^-7, then one; what is below 2^-15 has none, and is
    # zero in E4M3 unless the shift is large. Numbers of 16 and more have fewer again.
    magnitude = tl.abs(x)
    half = tl.where(magnitude < 0.125, 1 << 20, 1 << 19)
    half = tl.where(magnitude < 0.0078125, 1 << 21, half)
    if SHIFT > 4:  # then what exceeds 448 is below 16
        half = tl.where(magnitude < 3.0517578125e-05, 1 << 22, half)
    elif not BELOW_16:
        half = tl.where(magnitude >= 16.0, 1 << 20, half)
        if SHIFT < 1:
            half = tl.where(magnitude >= 256.0, 1 << 21, half)
    rounded = (x.to(tl.int32, bitcast=True) + half) & (-half - half)  # halves away from zero, whatever the sign
    # Bits of a NaN may have become those of any number by now: the scale brings it back, or x itself.
    number = tl.fma(rounded.to(tl.float32, bitcast=True), 2.0**SHIFT, scale * 0.0)
    if not BELOW_16:
        number = tl.where((tl.abs(number) <= 448.0) & (x == x), number, float("nan"))
    return number.to(tl.float8e4nv).to(tl.uint8, bitcast=True)

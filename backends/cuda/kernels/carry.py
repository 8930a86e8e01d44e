"""Quotients as the E4M3 numbers that carry their HiFloat8 values, by arithmetic: a table for each element would be read
from cache a line at a time, which takes longer than to read the operand from memory. Integer operations are few, since
a multiprocessor does half as many of them as of others.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .ptx import INTERPRETED, widened


@triton.jit
def divide(x, scale):
    """x / scale, rounded as IEEE asks, of fp32 numbers and one positive scale, which may be Inf or NaN.

    By a rounded reciprocal and the remainder, which is exact unless something leaves the range of fp32: a quotient so
    small that the remainder does is far below HiFloat8, and large scales are brought into range together with x."""
    into_range = tl.where(scale > 1e30, 2.0**-64, 1.0)
    divisor = scale * into_range
    inverse = tl.div_rn(1.0, divisor)
    minus_divisor = -tl.minimum(divisor, 3e38)  # Inf times a quotient of 0 would be NaN
    x = x * into_range
    quotient = x * inverse
    return tl.fma(tl.fma(quotient, minus_divisor, x), inverse, quotient)


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


@triton.jit
def carry_quotient(x, scale, SHIFT: tl.constexpr, BELOW_16: tl.constexpr):
    """`carry` of x / scale, of floating-point numbers and one positive scale."""
    if BELOW_16 and SHIFT == 4 and not INTERPRETED:
        number = _carry_below_16(x, scale)
    else:
        number = carry(divide(widened(x), scale), scale, SHIFT, BELOW_16)
    return number


@triton.jit
def _carry_below_16(x, scale):
    """The same in a third of the instructions, for quotients below 16 and a shift of 4.

    Of 16 times the quotient its 11 leading bits suffice, since halves go away from zero: two numbers of 16 bits share a
    register from there on."""
    inverse, minus_divisor = tl.div_rn(16.0, scale), scale * -0.0625
    wide = widened(x)
    quotient = wide * inverse  # as in `divide`; a scale that makes no quotient of 16 is far from the ends of fp32
    quotient = tl.fma(tl.fma(quotient, minus_divisor, wide), inverse, quotient)
    nan = tl.where(scale == scale, 0, 0x7F7F7F7F)  # of four numbers
    return tl.inline_asm_elementwise(
        _FOUR_TO_E4M3, "=r,f,f,f,f,r,r,r,r", [quotient, nan], dtype=tl.uint8, is_pure=True, pack=4
    )


# Of 16-bit floats v: `fine` has all bits of each half set where |v| < 2 and so less than three bits of mantissa are
# kept, `small` where |v| < 1/8 and one is. Half a step is bit 6, 7 or 8 of v; all below the last kept bit go.
_FOUR_TO_E4M3: tl.constexpr = tl.constexpr(
    """{
    .reg .b32 v<2>, size<2>, fine<2>, small<2>, half<2>, below<2>, two, eighth;
    .reg .b16 pair<2>;
    mov.b32 two, 0x40004000;
    mov.b32 eighth, 0x30003000;
"""
    + "".join(
        f"""
    cvt.rz.f16x2.f32 v{i}, ${2 * i + 2}, ${2 * i + 1};
    abs.f16x2 size{i}, v{i};
    set.lt.u32.f16x2 fine{i}, size{i}, two;
    set.lt.u32.f16x2 small{i}, size{i}, eighth;
    mov.b32 half{i}, 0x00400040;
    lop3.b32 half{i}, fine{i}, 0x00c000c0, half{i}, 0x6a;  // (a & b) ^ c
    lop3.b32 half{i}, small{i}, 0x01800180, half{i}, 0x6a;
    mad.lo.u32 below{i}, half{i}, 2, 0xfffeffff;  // of each half, 2 half - 1
    add.u32 v{i}, v{i}, half{i};
    lop3.b32 v{i}, v{i}, below{i}, 0, 0x30;  // a & ~b
    cvt.rn.satfinite.e4m3x2.f16x2 pair{i}, v{i};
"""
        for i in range(2)
    )
    + """
    mov.b32 $0, {pair0, pair1};
    or.b32 $0, $0, $5;
}"""
)

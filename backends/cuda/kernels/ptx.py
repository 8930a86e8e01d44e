"""Instructions that the compiler does not choose by itself, where they decide how fast a kernel is. Triton's
interpreter has none of them, and takes the plain form instead.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

INTERPRETED: tl.constexpr = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def larger_magnitude(x, y):
    """Of tensors of one floating-point dtype, elementwise; its sign means nothing, and NaN is the largest. One
    instruction for two numbers of bf16, where GPUs have it.
    """
    if x.dtype == tl.bfloat16 and not INTERPRETED and cuda_capability_geq(8, 6):
        largest = tl.inline_asm_elementwise(
            "max.NaN.xorsign.abs.bf16x2 $0, $1, $2;", "=r,r,r", [x, y], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    else:
        largest = tl.maximum(tl.abs(x), tl.abs(y), propagate_nan=tl.PropagateNan.ALL)
    return largest


@triton.jit
def exp2(x):
    """2^x of fp32 numbers to 2 ulp; what would be subnormal is 0."""
    if INTERPRETED:
        power = tl.exp2(x)
    else:
        power = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return power


@triton.jit
def reciprocal(x):
    """1 / x of fp32 numbers to 1 ulp; what would be subnormal is 0."""
    if INTERPRETED:
        inverse = 1.0 / x
    else:
        inverse = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return inverse


@triton.jit
def widened(x):
    """fp32 of floating-point numbers. Two instructions for two of bf16, whose bits are the first half of theirs."""
    if x.dtype == tl.bfloat16 and not INTERPRETED:
        wide = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=f,=f,r", [x], dtype=tl.float32, is_pure=True, pack=2
        )
    else:
        wide = x.to(tl.float32)
    return wide

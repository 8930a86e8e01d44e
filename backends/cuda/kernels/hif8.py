"""HiFloat8 codes of scaled values in one pass: division, rounding and code by arithmetic on the bits of fp32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


def quantize_rows(x: Tensor, scale: Tensor) -> Tensor:
    """uint8 codes of x / scale, contiguous, shape of x; `scale` is one fp32 value, or one for each row of x.

    x is fp32, bf16 or fp16."""
    x = x.contiguous()
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    columns = x.shape[-1] if x.ndim else 1
    if x.numel():
        grid = (triton.cdiv(x.numel(), _BLOCK),)
        _quantize[grid](x, scale.contiguous(), codes, x.numel(), columns, ONE=scale.numel() == 1, BLOCK=_BLOCK)
    return codes


def fake_quantize_rows(x: Tensor, scale: Tensor) -> Tensor:
    """The values of those codes times the scale, in the dtype of x."""
    x = x.contiguous()
    out = torch.empty_like(x)
    columns = x.shape[-1] if x.ndim else 1
    if x.numel():
        grid = (triton.cdiv(x.numel(), _BLOCK),)
        _fake_quantize[grid](x, scale.contiguous(), out, x.numel(), columns, ONE=scale.numel() == 1, BLOCK=_BLOCK)
    return out


@triton.jit
def _rounded(bits):
    """Bits of the magnitude of the nearest grid value, from those of an fp32 number. Halves go up. Zero below 2^-23,
    infinity from 40960, NaN stays NaN.
    """
    magnitude = bits & 0x7FFFFFFF
    exponent = (magnitude >> 23) - 127
    distance = tl.abs(exponent)
    kept = (distance <= 3).to(tl.int32) + (distance <= 7).to(tl.int32) + (distance <= 15).to(tl.int32)
    rounded = ((magnitude + (1 << (22 - kept))) >> (23 - kept)) << (23 - kept)
    rounded = tl.maximum(rounded, (127 - 22) << 23)
    rounded = tl.where(magnitude < ((127 - 23) << 23), 0, rounded)
    rounded = tl.where(magnitude >= 0x47200000, 0x7F800000, rounded)
    return tl.where(magnitude > 0x7F800000, 0x7FC00000, rounded)


@triton.jit
def _code(bits, rounded):
    """The code of a grid value given by the bits of its magnitude; `bits` gives the sign."""
    exponent = (rounded >> 23) - 127
    distance = tl.abs(exponent)
    below = (exponent < 0).to(tl.int32)
    eighths = (rounded >> 20) & 7
    code = 0x08 | eighths
    code = tl.where(distance == 1, 0x10 | (below << 3) | eighths, code)
    code = tl.where(distance >= 2, 0x20 | (below << 4) | ((distance - 2) << 3) | eighths, code)
    code = tl.where(distance >= 4, 0x40 | (below << 4) | ((distance - 4) << 2) | (eighths >> 1), code)
    code = tl.where(distance >= 8, 0x60 | (below << 4) | ((distance - 8) << 1) | (eighths >> 2), code)
    code = tl.where(exponent <= -16, exponent + 23, code)
    code = tl.where(rounded == 0x7F800000, 0x6F, code)
    code = tl.where(bits < 0, code | 0x80, code)
    code = tl.where(rounded == 0, 0, code)  # has no sign
    return tl.where(rounded > 0x7F800000, 0x80, code)


@triton.jit
def _quotient(x_ptr, scale_ptr, at, inside, columns, ONE: tl.constexpr):
    """(x / scale, scale); the division is that of IEEE, as the contract asks."""
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if ONE:
        scale = tl.load(scale_ptr)
    else:
        scale = tl.load(scale_ptr + at // columns, mask=inside, other=1.0)
    return tl.div_rn(x, scale + tl.zeros_like(x)), scale


@triton.jit
def _quantize(x_ptr, scale_ptr, codes_ptr, count, columns, ONE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    quotient, _ = _quotient(x_ptr, scale_ptr, at, inside, columns, ONE)
    bits = quotient.to(tl.int32, bitcast=True)
    tl.store(codes_ptr + at, _code(bits, _rounded(bits)).to(tl.uint8), mask=inside)


@triton.jit
def _fake_quantize(x_ptr, scale_ptr, out_ptr, count, columns, ONE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    quotient, scale = _quotient(x_ptr, scale_ptr, at, inside, columns, ONE)
    bits = quotient.to(tl.int32, bitcast=True)
    rounded = _rounded(bits)
    signed = tl.where(rounded == 0, 0, rounded | (bits & -2147483648))
    value = signed.to(tl.float32, bitcast=True) * scale
    tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=inside)

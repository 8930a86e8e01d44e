"""HiFloat8 codes and values of scaled numbers in one pass: a division, and a table of what each quotient rounds to; or
arithmetic, for codes that are carried.

Halves go away from zero, so that sign, exponent and four bits of mantissa say all: see ospnext/numerics/hif8.py."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ospnext.numerics import carrier, hif8

from .carry import carry, carry_quotient
from .ptx import widened

_BLOCK = 2048


def quantize_rows(x: Tensor, scale: Tensor, shift: int | None = None, below_16: bool = False) -> Tensor:
    """uint8 codes of x / scale, contiguous, shape of x; `scale` is one fp32 value, or one for each row of x. With a
    `shift`, the E4M3 numbers that carry them; faster where no quotient is 16 or more.

    x is fp32, bf16 or fp16."""
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    _run(x, scale, codes, codes_by_key(x.device) if shift is None else None, False, shift, below_16)
    return codes if shift is None else codes.view(carrier.DTYPE)


def fake_quantize_rows(x: Tensor, scale: Tensor) -> Tensor:
    """The values of those codes times the scale, in the dtype of x."""
    return _run(x, scale, torch.empty(x.shape, dtype=x.dtype, device=x.device), _values(x.device), True)


def _run(
    x: Tensor,
    scale: Tensor,
    out: Tensor,
    table: Tensor | None,
    scaled_back: bool,
    shift: int | None = None,
    below_16: bool = False,
) -> Tensor:
    if x.numel():
        columns = x.shape[-1] if x.ndim else 1
        _quantize[(triton.cdiv(x.numel(), _BLOCK),)](
            x.contiguous(),
            scale.contiguous(),
            table,
            out,
            x.numel(),
            columns,
            ONE=scale.numel() == 1,
            SCALED_BACK=scaled_back,
            SHIFT=shift,
            BELOW_16=below_16,
            BLOCK=_BLOCK,
        )
    return out


def _keys() -> Tensor:
    """fp32 [2^13]: a number for each key, which is its 13 leading bits. That of NaN has more bits below."""
    return (torch.arange(1 << 13, dtype=torch.int64) << 19).to(torch.int32).view(torch.float32)


@functools.cache
def codes_by_key(device: torch.device) -> Tensor:
    """uint8 [2^13]: the code of each key."""
    with torch.inference_mode(False):
        return hif8.encode(_keys()).to(device)


@functools.cache
def _values(device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return hif8.round_to_grid(_keys()).to(device)


@triton.jit
def look_up(x, table_ptr):
    """What the table has for each fp32 number."""
    bits = x.to(tl.int32, bitcast=True)
    key = (bits >> 19) & 0x1FFF
    return tl.load(table_ptr + tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x0FF8, key))


@triton.jit
def _quantize(
    x_ptr,
    scale_ptr,
    table_ptr,
    out_ptr,
    count,
    columns,
    ONE: tl.constexpr,
    SCALED_BACK: tl.constexpr,
    SHIFT: tl.constexpr,
    BELOW_16: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    x = tl.load(x_ptr + at, mask=inside, other=0.0)
    if ONE:
        scale = tl.load(scale_ptr)
    else:
        scale = tl.load(scale_ptr + at // columns, mask=inside, other=1.0)
    # The division of IEEE, as the contract asks; Inf stays itself in HiFloat8 codes.
    if ONE and SHIFT is not None:
        found = carry_quotient(x, scale, SHIFT, BELOW_16)
    else:
        x = widened(x)
        quotient = tl.div_rn(x, scale + tl.zeros_like(x))
        found = look_up(quotient, table_ptr) if SHIFT is None else carry(quotient, scale, SHIFT, BELOW_16)
    if SCALED_BACK:
        found = (found * scale).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at, found, mask=inside)

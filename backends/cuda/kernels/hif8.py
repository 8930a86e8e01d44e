"""HiFloat8 codes and values of scaled numbers in one pass: a division, and a table of what each quotient rounds to.

Halves go away from zero, so that sign, exponent and four bits of mantissa say all: see ospnext/numerics/hif8.py."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ospnext.numerics import carrier, hif8

_BLOCK = 2048


def quantize_rows(x: Tensor, scale: Tensor, shift: int | None = None) -> Tensor:
    """uint8 codes of x / scale, contiguous, shape of x; `scale` is one fp32 value, or one for each row of x. With a
    `shift`, the E4M3 numbers that carry them.

    x is fp32, bf16 or fp16."""
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    _run(x, scale, codes, codes_by_key(x.device, shift), False)
    return codes if shift is None else codes.view(carrier.DTYPE)


def fake_quantize_rows(x: Tensor, scale: Tensor) -> Tensor:
    """The values of those codes times the scale, in the dtype of x."""
    return _run(x, scale, torch.empty(x.shape, dtype=x.dtype, device=x.device), _values(x.device), True)


def _run(x: Tensor, scale: Tensor, out: Tensor, table: Tensor, scaled_back: bool) -> Tensor:
    if x.numel():
        columns = x.shape[-1] if x.ndim else 1
        _look_up[(triton.cdiv(x.numel(), _BLOCK),)](
            x.contiguous(),
            scale.contiguous(),
            table,
            out,
            x.numel(),
            columns,
            ONE=scale.numel() == 1,
            SCALED_BACK=scaled_back,
            BLOCK=_BLOCK,
        )
    return out


def _keys() -> Tensor:
    """fp32 [2^13]: a number for each key, which is its 13 leading bits. That of NaN has more bits below."""
    return (torch.arange(1 << 13, dtype=torch.int64) << 19).to(torch.int32).view(torch.float32)


@functools.cache
def codes_by_key(device: torch.device, shift: int | None) -> Tensor:
    """uint8 [2^13]: the code of each key, or with a `shift` the E4M3 number that carries it."""
    with torch.inference_mode(False):
        codes = hif8.encode(_keys())
        return (codes if shift is None else carrier.table(codes.device, shift)[codes.int()]).to(device)


@functools.cache
def _values(device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return hif8.round_to_grid(_keys()).to(device)


@triton.jit
def _look_up(
    x_ptr,
    scale_ptr,
    table_ptr,
    out_ptr,
    count,
    columns,
    ONE: tl.constexpr,
    SCALED_BACK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if ONE:
        scale = tl.load(scale_ptr) + tl.zeros_like(x)
    else:
        scale = tl.load(scale_ptr + at // columns, mask=inside, other=1.0)
    bits = tl.div_rn(x, scale).to(tl.int32, bitcast=True)  # the division of IEEE, as the contract asks
    key = (bits >> 19) & 0x1FFF
    key = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x0FF8, key)
    found = tl.load(table_ptr + key)
    if SCALED_BACK:
        found = (found * scale).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at, found, mask=inside)

"""HiFloat8 codes as E4M3 numbers of a power of two times their value, which FP8 tensor cores multiply; transposed where
they want it so.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ospnext.numerics.carrier import table

_TILE = 64


def carried(codes: Tensor, shift: int) -> Tensor:
    """E4M3 [M, K] of codes [M, K], contiguous: 2^shift times each value. What E4M3 cannot hold becomes NaN, and small
    values are rounded: exact from 2^(-8 - shift) on.
    """
    codes = codes.contiguous()
    out = torch.empty(codes.shape, dtype=torch.uint8, device=codes.device)
    if codes.numel():
        block = 4096
        _look_up[(triton.cdiv(codes.numel(), block),)](codes, table(codes.device, shift), out, codes.numel(), block)
    return out.view(torch.float8_e4m3fn)


def carried_transposed(codes: Tensor, shift: int, multiple: int = 1) -> Tensor:
    """E4M3 [K, M'] of codes [M, K]: M filled up with zeros to a `multiple`."""
    codes = codes.contiguous()
    rows, columns = codes.shape
    padded = triton.cdiv(rows, multiple) * multiple
    out = torch.empty(columns, padded, dtype=torch.uint8, device=codes.device)
    if out.numel():
        grid = (triton.cdiv(padded, _TILE), triton.cdiv(columns, _TILE))
        _look_up_transposed[grid](codes, table(codes.device, shift), out, rows, columns, padded, _TILE)
    return out.view(torch.float8_e4m3fn)


@triton.jit
def _look_up(codes_ptr, table_ptr, out_ptr, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    code = tl.load(codes_ptr + at, mask=inside, other=0).to(tl.int32)
    tl.store(out_ptr + at, tl.load(table_ptr + code), mask=inside)


@triton.jit
def _look_up_transposed(codes_ptr, table_ptr, out_ptr, rows, columns, padded, TILE: tl.constexpr):
    row = (tl.program_id(0) * TILE + tl.arange(0, TILE)).to(tl.int64)
    column = (tl.program_id(1) * TILE + tl.arange(0, TILE)).to(tl.int64)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    code = tl.load(codes_ptr + row[:, None] * columns + column[None, :], mask=inside, other=0).to(tl.int32)
    found = tl.trans(tl.load(table_ptr + code))
    within = (column < columns)[:, None] & (row < padded)[None, :]
    tl.store(out_ptr + column[:, None] * padded + row[None, :], found, mask=within)

"""`reference.hif8`: HiFloat8 casts and scaled quantization as their formulas, a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ospnext.numerics import carrier, hif8
from ospnext.numerics.scaling import Granularity, ScaleMode, amax_of, scale_of

#: Elements of one piece: what is computed on the way stays in cache on a CPU, and small on other devices.
PIECE_ON_CPU, PIECE = 1 << 18, 1 << 25


def encode(x: Tensor, saturate: bool) -> Tensor:
    return hif8.encode(x, saturate=saturate)


def decode(codes: Tensor, dtype: torch.dtype) -> Tensor:
    return hif8.decode(codes, dtype)


def quantize(
    x: Tensor,
    amax: Tensor | None,
    *,
    scale_max: float,
    scale_mode: ScaleMode,
    granularity: Granularity,
    carried: bool = False,
) -> tuple[Tensor, Tensor]:
    """(codes, scale)."""
    scale = _scale(x, amax, scale_max, scale_mode, granularity)
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    for found, given, by in _pieces(codes, x, scale):
        found.copy_(hif8.encode(given / by))
    return carrier.carry(codes, scale, scale_max) if carried else (codes, scale)


def fake_quantize(
    x: Tensor, amax: Tensor | None, *, scale_max: float, scale_mode: ScaleMode, granularity: Granularity
) -> Tensor:
    """The values that `quantize` stands for, in the dtype of x."""
    scale = _scale(x, amax, scale_max, scale_mode, granularity)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for found, given, by in _pieces(out, x, scale):
        found.copy_(hif8.round_to_grid(given / by) * by)
    return out


def _scale(x: Tensor, amax: Tensor | None, scale_max: float, scale_mode: ScaleMode, granularity: Granularity) -> Tensor:
    return scale_of(amax_of(x, granularity) if amax is None else amax, scale_max, scale_mode)


def _pieces(out: Tensor, x: Tensor, scale: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(result, operand in fp32 or fp64, its scale) of some rows at a time; the scale broadcasts to the operand."""
    if x.numel() == 0:
        return
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    columns = x.shape[-1] if x.ndim else 1
    size = max(1, (PIECE_ON_CPU if x.device.type == "cpu" else PIECE) // columns)
    per_channel = x.ndim > 1 and scale.shape[-2] == 1 and scale.shape[-1] == columns > 1
    for found, given, by in zip(*(_matrices(t, per_channel) for t in (out, x, scale)), strict=True):
        bys = by.expand(len(given), -1).split(size)
        yield from zip(found.split(size), (rows.to(wide) for rows in given.split(size)), bys, strict=True)


def _matrices(t: Tensor, each: bool) -> Tensor:
    """[matrices, rows, columns]: those of the batch where `each` has scales of its own, else one of all rows."""
    columns = t.shape[-1] if t.ndim else 1
    return t.reshape(-1, t.shape[-2], columns) if each else t.reshape(1, -1, columns)

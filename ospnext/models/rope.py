"""Angles of the three-axis rotary embedding, in whatever order the stream holds its tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ospnext.sparse import Grid

THETA = 10000.0


def rope_tables(
    grid: Grid, raster_N: Tensor, pairs: tuple[int, int, int], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """cos and sin, each [N, D/2], of the tokens whose raster indices are given.

    `pairs` complex channels go to the axes t, h and w, in this order inside a head. Pair j of an axis with p pairs
    turns by position * 10000^(-j / p). Angles are computed in fp64 and rounded once. Source: Wan2.1.
    """
    _, height, width = grid
    positions = (raster_N // (height * width), raster_N // width % height, raster_N % width)
    angles_NP = torch.cat([p[:, None] * _frequencies(n) for p, n in zip(positions, pairs, strict=True)], dim=1)
    return angles_NP.cos().to(dtype), angles_NP.sin().to(dtype)


def _frequencies(pairs: int) -> Tensor:
    if pairs == 0:
        return torch.empty(0, dtype=torch.float64, device="cpu")
    return THETA ** (-torch.arange(pairs, dtype=torch.float64, device="cpu") / pairs)

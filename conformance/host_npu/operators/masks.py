"""What an attention operator masks out: the documented forms of `atten_mask` and `sparse_mode`. True, or 1, means that
the position takes no part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .rules import require, require_dtype, require_shape

#: Default of pre_tockens and next_tockens: no limit.
UNLIMITED = 2147483647
#: Side of the triangle that stands for a causal mask of any size.
COMPRESSED = 2048


class Mask:
    """Positions of one sequence that take no part."""

    def block(self, heads: slice, rows: slice) -> Tensor:
        """Boolean, broadcasts to [heads, rows, keys]; True where masked out."""
        raise NotImplementedError


@dataclass(frozen=True)
class Stored(Mask):
    """A mask [N or 1, Sq, Sk] that was passed."""

    masked: Tensor

    def block(self, heads: slice, rows: slice) -> Tensor:
        masked = self.masked
        return masked[heads, rows] if len(masked) > 1 else masked[:, rows]


@dataclass(frozen=True)
class Band(Mask):
    """Keys from `before` below the diagonal to `after` above it take part."""

    keys: int
    before: int
    after: int

    def block(self, heads: slice, rows: slice) -> Tensor:
        offset = torch.arange(self.keys)[None, :] - torch.arange(rows.start, rows.stop)[:, None]
        return ((offset > self.after) | (offset < -self.before))[None]


#: (index, query length, key length of a sequence) -> its mask.
MaskOf = Callable[[int, int, int], Mask | None]


def given_mask(op: str, atten_mask: Tensor) -> Tensor:
    """As booleans; a uint8 mask holds 0 and 1."""
    require_dtype(op, "atten_mask", atten_mask, (torch.bool, torch.uint8))
    if atten_mask.dtype == torch.uint8:
        require(op, bool((atten_mask <= 1).all()), "atten_mask holds 0 (takes part) and 1 (masked out)")
    return atten_mask.bool()


def mask_of(
    op: str,
    atten_mask: Tensor | None,
    sparse_mode: int,
    before: int,
    after: int,
    *,
    batch: int,
    heads: int,
    longest: tuple[int, int],
    packed: bool,
) -> MaskOf:
    """Masks of every sequence of a call of npu_fusion_attention. `longest` are the query and key lengths: of all
    sequences if packed, else of each.
    """
    require(
        op, sparse_mode in range(9) and (sparse_mode != 5 if packed else sparse_mode < 7), "sparse_mode", sparse_mode
    )
    if atten_mask is None:
        # Whatever the mode: documented, and the reason why a forgotten mask goes unnoticed on the device.
        return lambda index, rows, keys: None
    require(op, sparse_mode < 5, "sparse_mode 5 to 8 are not emulated", sparse_mode)
    masked = given_mask(op, atten_mask)
    if sparse_mode >= 2:
        return _compressed(op, masked, sparse_mode, before, after, packed)
    rows, keys = longest
    if packed:
        require_shape(op, "atten_mask of a packed call", masked, (rows, keys))
        return lambda index, rows, keys: _part_of_packed(op, masked[:rows, :keys])
    shapes = [(batch, heads, rows, keys), (batch, 1, rows, keys), (1, 1, rows, keys), (rows, keys)]
    require_shape(op, "atten_mask", masked, *shapes)
    if sparse_mode == 0:
        _agrees_with_band(op, masked, before, after)
    whole = masked.expand(1, 1, *masked.shape) if masked.ndim == 2 else masked
    return lambda index, rows, keys: Stored(whole[index if len(whole) > 1 else 0])


def _part_of_packed(op: str, masked: Tensor) -> Mask:
    require(op, not bool(masked.all(-1).any()), "atten_mask of a packed call has no row that is masked out entirely")
    return Stored(masked[None])


def _agrees_with_band(op: str, masked: Tensor, before: int, after: int) -> None:
    rows, keys = masked.shape[-2:]
    if before >= rows and after >= keys:
        return
    outside = Band(keys, before, after).block(slice(0, 1), slice(0, rows))
    rule = "atten_mask masks everything outside pre_tockens and next_tockens (sparse_mode 0)"
    require(op, bool((masked | ~outside).all()), rule)


def _compressed(op: str, masked: Tensor, sparse_mode: int, before: int, after: int, packed: bool) -> MaskOf:
    require_shape(op, f"atten_mask of sparse_mode {sparse_mode}", masked, (COMPRESSED, COMPRESSED))
    triangle = torch.ones(COMPRESSED, COMPRESSED, dtype=torch.bool).triu(1)
    require(op, bool((masked == triangle).all()), f"atten_mask of sparse_mode {sparse_mode} is 1 above the diagonal")

    def of(index: int, rows: int, keys: int) -> Mask:
        corner = keys - rows
        if sparse_mode == 2:
            return Band(keys, UNLIMITED, 0)
        require(op, not packed or corner >= 0, f"Sq <= Skv in every sequence (packed, sparse_mode {sparse_mode})")
        if sparse_mode == 3:
            return Band(keys, UNLIMITED, corner)
        return Band(keys, before - corner, after + corner)

    return of

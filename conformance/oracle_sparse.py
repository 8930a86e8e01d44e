"""Skiparse-2D as it is defined, with pads: the oracle of the packed model. Nothing of ospnext is used.

The token grid is padded with zeros at the bottom and right to multiples of k^2. A sparse block sees the k^2
subsequences folded into the batch (subsequence outermost), with a boolean mask that keeps pads out of self-attention,
and text and modulation repeated for each. Pads are ordinary rows otherwise, and are cut when the stream returns to
raster order. Full blocks run in raster order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import oracle_dense
from .oracle_dense import Weights, block, embed_patches, embed_text, embed_time, head, rotation, weights_of


def block_kinds(num_layers: int, num_full_blocks: int) -> list[str]:
    """Half of the full blocks at each end; between them even blocks are token blocks and odd ones group blocks."""
    kinds = []
    for index in range(num_layers):
        at_an_end = index < num_full_blocks // 2 or num_layers - 1 - index < num_full_blocks // 2
        kinds.append("full" if at_an_end else ("token", "group")[index % 2])
    return kinds


def pad(x_BTHWX: Tensor, k: int, value: float = 0.0) -> Tensor:
    """Zeros (or `value`) at the bottom and right, up to multiples of k^2."""
    b, t, h, w = x_BTHWX.shape[:4]
    unit = k * k
    out = x_BTHWX.new_full((b, t, -(-h // unit) * unit, -(-w // unit) * unit, *x_BTHWX.shape[4:]), value)
    out[:, :, :h, :w] = x_BTHWX
    return out


def members(kind: str, size: int, digit: int, k: int) -> list[int]:
    """The coordinates 0..size-1 of an axis whose token digit (n mod k) or group digit (n // k mod k) is `digit`."""
    return [n for n in range(size) if (n % k if kind == "token" else n // k % k) == digit]


def split(kind: str, x_BTHWX: Tensor, k: int) -> Tensor:
    """[k^2 B, T, H/k, W/k, ...]: subsequence id (k * digit of h + digit of w) outermost, each in raster order."""
    _, _, height, width = x_BTHWX.shape[:4]
    parts = []
    for p in range(k):
        for q in range(k):
            rows, columns = members(kind, height, p, k), members(kind, width, q, k)
            parts.append(x_BTHWX[:, :, rows][:, :, :, columns])
    return torch.cat(parts)


def merge(kind: str, parts: Tensor, k: int) -> Tensor:
    """The inverse of `split`."""
    batch = parts.shape[0] // k**2
    height, width = parts.shape[2] * k, parts.shape[3] * k
    out = parts.new_zeros(batch, parts.shape[1], height, width, *parts.shape[4:])
    for p in range(k):
        for q in range(k):
            rows, columns = members(kind, height, p, k), members(kind, width, q, k)
            part = parts[(p * k + q) * batch : (p * k + q + 1) * batch]
            for i, row in enumerate(rows):
                out[:, :, row, columns] = part[:, :, i]
    return out


def switch(parts: Tensor, k: int) -> Tensor:
    """Token parts to group parts and back, one formula for both ways: swap the two base-k digits.

    Element (p, q; t, i, j) goes to subsequence (i mod k, j mod k), row (i // k) k + p, column (j // k) k + q.
    """
    rows, columns, batch = parts.shape[2] // k, parts.shape[3] // k, parts.shape[0] // k**2
    x = parts.reshape(k, k, batch, parts.shape[1], rows, k, columns, k, *parts.shape[4:])
    # (p, q, b, t, a_h, c_h, a_w, c_w, ...) -> (c_h, c_w, b, t, a_h, p, a_w, q, ...)
    return x.permute(5, 7, 2, 3, 4, 0, 6, 1, *range(8, x.ndim)).reshape(parts.shape)


def folded_block(
    weights: Weights, index: int, kind: str, parts: Tensor, e0_B6C: Tensor, text_BLC: Tensor, turn: Tensor, k: int
) -> Tensor:
    """A sparse block on the stream split by its kind; `turn` is that of the unpadded grid."""
    batch, grid = e0_B6C.shape[0], turn.shape[:3]
    real = pad(torch.ones(1, *grid, dtype=torch.bool), k, value=False)
    padded_turn = pad(turn[None], k, value=1.0)  # pads are turned by angle 0
    mask, part_turn = (split(kind, whole, k).flatten(1, 3).repeat_interleave(batch, 0) for whole in (real, padded_turn))
    copies = [x.repeat(k**2, 1, 1) for x in (e0_B6C, text_BLC)]
    return block(weights, index, parts.flatten(1, 3), *copies, part_turn, mask).reshape(parts.shape)


def raster_block(
    weights: Weights, index: int, kind: str, x_BTHWC: Tensor, e0_B6C: Tensor, text_BLC: Tensor, k: int
) -> Tensor:
    """Any block by itself, in raster order: what the pads hold does not reach the tokens."""
    _, t, h, w, channels = x_BTHWC.shape
    turn = rotation((t, h, w), channels // weights.num_heads)
    if kind == "full":
        x_BNC = block(weights, index, x_BTHWC.flatten(1, 3), e0_B6C, text_BLC, turn.flatten(0, 2))
        return x_BNC.view(x_BTHWC.shape)
    parts = folded_block(weights, index, kind, split(kind, pad(x_BTHWC, k), k), e0_B6C, text_BLC, turn, k)
    return merge(kind, parts, k)[:, :, :h, :w]


def forward(
    weights: Weights, latents_BCTHW: Tensor, timestep_B: Tensor, text_BLC: Tensor, k: int, num_full_blocks: int
) -> Tensor:
    """The sparse model of type dual_end."""
    kinds = block_kinds(weights.num_layers, num_full_blocks)
    e_BC, e0_B6C = embed_time(weights, timestep_B)
    text_BLC = embed_text(weights, text_BLC)
    x_BTHWC = embed_patches(weights, latents_BCTHW)
    _, t, h, w, channels = x_BTHWC.shape
    turn = rotation((t, h, w), channels // weights.num_heads)

    parts = None  # [k^2 B, T, H/k, W/k, C] while the stream is split
    for index, kind in enumerate(kinds):
        if kind == "full":
            if parts is not None:
                x_BTHWC = merge("group", parts, k)[:, :, :h, :w]
                parts = None
            x_BNC = block(weights, index, x_BTHWC.flatten(1, 3), e0_B6C, text_BLC, turn.flatten(0, 2))
            x_BTHWC = x_BNC.unflatten(1, (t, h, w))
            continue
        parts = split("token", pad(x_BTHWC, k), k) if parts is None else switch(parts, k)
        parts = folded_block(weights, index, kind, parts, e0_B6C, text_BLC, turn, k)
    if parts is not None:
        x_BTHWC = merge("group", parts, k)[:, :, :h, :w]
    return head(weights, x_BTHWC, e_BC)


def velocity(weights: Weights, config: Any, *inputs: Tensor) -> Tensor:
    """What a transformer of this shape should return: by this module if it is sparse, else by the plain formulas."""
    if config.skiparse_model_type == "full":
        return oracle_dense.forward(weights, *inputs)
    return forward(weights, *inputs, config.sparse_ratio, config.num_full_blocks)


def reference(model: Any, *inputs: Tensor) -> Tensor:
    """The same for a model's live parameters."""
    return velocity(weights_of(model), model.config, *inputs)

"""Floating-point operations of one forward, from the config and the token grid alone. No tensors here."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ospnext.models.config import BlockKind, TransformerConfig
from ospnext.sparse import Grid
from ospnext.sparse.skiparse import cell_size


@dataclass(frozen=True)
class ForwardFlops:
    """Matrix products of one forward of one sample, summed over blocks; a multiply-add counts as two operations.

    Norms, activations and rotations are left out: they are bound by memory, not by arithmetic.
    """

    #: Projections of the video tokens: q, k, v, o of self-attention, q, o of cross-attention, and the feed-forward.
    linear: int
    #: Keys and values of the text. Paid once per prompt, not once per step, when its `TextContext` is kept.
    text: int
    #: Self-attention: q k^T and weights v, inside each subsequence of a sparse block.
    attention: int
    #: Cross-attention of the video tokens to the text.
    cross: int
    #: What lies outside the blocks: patch, time and text embeddings, and the head.
    embeddings: int

    @property
    def total(self) -> int:
        return self.linear + self.text + self.attention + self.cross + self.embeddings


def forward_flops(config: TransformerConfig, grid: Grid) -> ForwardFlops:
    """Operations for one sample on a token grid (T, H, W). Classifier-free guidance runs two samples."""
    C, F, L, tokens = config.dim, config.ffn_dim, config.num_layers, math.prod(grid)
    return ForwardFlops(
        linear=L * 2 * tokens * (6 * C * C + 2 * C * F),
        text=L * 4 * config.text_len * C * C,
        attention=sum(4 * C * attention_pairs(kind, config.sparse_ratio, grid) for kind in config.block_kinds),
        cross=L * 4 * tokens * config.text_len * C,
        embeddings=_embeddings(config, tokens),
    )


def attention_pairs(kind: BlockKind, k: int, grid: Grid) -> int:
    """(query, key) pairs that a block of this kind scores: the sum of the squared lengths of its subsequences."""
    if kind == "full":
        return math.prod(grid) ** 2
    ids = range(k * k)
    sizes = [[cell_size(grid, k, s, g) for g in ids] for s in ids]
    rows = sizes if kind == "token" else zip(*sizes, strict=True)
    return sum(sum(row) ** 2 for row in rows)


def _embeddings(config: TransformerConfig, tokens: int) -> int:
    C, patch = config.dim, math.prod(config.patch_size)
    patches = tokens * (config.in_dim * patch * C + C * config.out_dim * patch)
    time = config.freq_dim * C + C * C + 6 * C * C
    text = config.text_len * (config.text_dim * C + C * C)
    return 2 * (patches + time + text)

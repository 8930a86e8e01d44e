"""The arithmetic and the traffic of one forward, counted from the config: what no kernel can save. No tensors here.

Everything is for one sample whose text is encoded before. Units are operations (a multiply-add is two) and bytes."""

from __future__ import annotations

import math
from collections import Counter

from ospnext.models.config import BlockKind, TransformerConfig
from ospnext.models.flops import attention_pairs
from ospnext.ops import HiF8Recipe
from ospnext.sparse import Grid

#: Input and output features of a linear.
Shape = tuple[int, int]

#: Of codes in HiFloat8 or FP8.
CODE_BYTES = 1


def block_linears(config: TransformerConfig) -> Counter[Shape]:
    """Products with the stream in all blocks, by shape: q, k, v and o of self-attention, q and o of cross-attention,
    and the feed-forward. Keys and values of the text are made once per prompt.
    """
    C, F, layers = config.dim, config.ffn_dim, config.num_layers
    found: Counter[Shape] = Counter()
    for shape, count in (((C, C), 6), ((C, F), 1), ((F, C), 1)):
        found[shape] += count * layers
    return found


def outer_linears(config: TransformerConfig) -> Counter[Shape]:
    """Patch embedding and head. The embedding of one timestep is left out."""
    patch = math.prod(config.patch_size)
    return Counter([(config.in_dim * patch, config.dim), (config.dim, config.out_dim * patch)])


def linear_flops(config: TransformerConfig, tokens: int) -> int:
    counts = block_linears(config) + outer_linears(config)
    return sum(2 * tokens * inner * outer * count for (inner, outer), count in counts.items())


def self_attention_flops(config: TransformerConfig, kind: BlockKind, grid: Grid) -> int:
    """Of one block."""
    return 4 * config.dim * attention_pairs(kind, config.sparse_ratio, grid)


def cross_attention_flops(config: TransformerConfig, tokens: int) -> int:
    """Of one block."""
    return 4 * config.dim * tokens * config.text_len


def attention_flops(config: TransformerConfig, grid: Grid) -> int:
    own = sum(self_attention_flops(config, kind, grid) for kind in config.block_kinds)
    return own + config.num_layers * cross_attention_flops(config, math.prod(grid))


def elementwise_bytes(config: TransformerConfig, tokens: int, itemsize: int, recipe: HiF8Recipe | None = None) -> int:
    """Reads and writes of the norms, rotations, activations and residual additions, each fused into one pass.

    Per token and block, in elements:

        operator                          reads    writes
        norm before self-attention        C        C *
        norm and rotation of q, and of k  2 C      2 C
        gate and residual                 2 C      C
        norm before cross-attention       C        C *
        norm of its q                     C        C
        residual                          2 C      C
        norm before the feed-forward      C        C *
        GELU, where it is quantized       F        F *
        gate, residual and switch         2 C      C

    and one norm in the head. A GELU that is not quantized can end the product before it. What is marked feeds linears
    alone and is written as their codes; a scale per tensor is known only after the last element, so that it is then
    computed twice: its operand is read again.
    """
    C, F = config.dim, config.ffn_dim
    hidden = F if recipe is not None else 0
    marked = 3 * C + hidden
    reads, writes = 12 * C + hidden, 6 * C + marked
    block = itemsize * (reads + writes)
    if recipe is not None:
        block += (CODE_BYTES - itemsize) * marked + (itemsize * marked if recipe.granularity == "tensor" else 0)
    return tokens * (config.num_layers * block + itemsize * 2 * C)


def quantize_bytes(config: TransformerConfig, tokens: int, itemsize: int, recipe: HiF8Recipe | None) -> int:
    """What quantizing the inputs of the linears of all blocks adds to `elementwise_bytes`.

    Per token and block: what attention returns (2 C elements) is read and written as codes; with a scale per tensor it
    is read twice.
    """
    if recipe is None:
        return 0
    reads = 1 if recipe.granularity == "row" else 2
    return tokens * config.num_layers * 2 * config.dim * (reads * itemsize + CODE_BYTES)

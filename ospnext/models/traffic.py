"""What the ranks of a sample send each other in a forward and in a training step: of this model, of the dense Wan2.1
with Ulysses, and of the published OSP-Next. From the config and the grid alone; see parallel/wire.py for each exchange.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass, replace

import torch

from ospnext.errors import ConfigError
from ospnext.models.config import BlockKind, TransformerConfig
from ospnext.models.layout import block_orders
from ospnext.models.quant_policy import LINEARS
from ospnext.models.weights.quantized import Quantization
from ospnext.parallel import Placement, first_placement
from ospnext.parallel.exchange import Payload
from ospnext.parallel.wire import Transfer, gathered, reduced, side_by_side, switch, total_sent, ulysses
from ospnext.sparse import Grid, OrderKind, skiparse_plan

#: Of the fp32 scale that travels with the codes of a token.
SCALE_BYTES = 4
#: Transfers that a backward pass does not return, or that a checkpointed block does not repeat, by their names.
SCALE, BETWEEN_BLOCKS = "scale", ("switch", "to sparse", "to full")


@dataclass(frozen=True)
class Traffic:
    """Transfers of one forward, in order: those of each block, the switch after it among them, and those after all."""

    ranks: int
    blocks: tuple[tuple[Transfer, ...], ...]
    output: tuple[Transfer, ...]

    @property
    def transfers(self) -> tuple[Transfer, ...]:
        return (*itertools.chain(*self.blocks), *self.output)

    @property
    def sent(self) -> tuple[int, ...]:
        """Bytes that each rank sends."""
        return total_sent(self.transfers, self.ranks)

    @property
    def mean_sent(self) -> float:
        """Bytes that a rank sends on average."""
        return sum(self.sent) / self.ranks


@functools.lru_cache(maxsize=64)
def placements(config: TransformerConfig, grid: Grid, ssp: int, ulysses_ranks: int) -> dict[OrderKind, Placement]:
    """Which rank holds which tokens while blocks of a kind run. Orders inside a rank are those of a start: they do not
    matter to how many there are.

    Raises:
        ConfigError: the layout does not fit the subsequences, or leaves a rank without a token or without a head.
    """
    plan = skiparse_plan(grid, config.sparse_ratio)
    sharing = ulysses_ranks * (ssp if "full" in config.block_kinds else 1)
    if sharing > config.num_heads:
        raise ConfigError(
            f"ssp {ssp} x ulysses {ulysses_ranks}: {sharing} ranks would share {config.num_heads} heads; take as many "
            "at most"
        )
    try:
        found = {
            kind: first_placement(plan, kind, ssp, ulysses_ranks)
            for kind in dict.fromkeys(block_orders(config.block_kinds))
        }
    except ValueError as error:
        raise ConfigError(str(error)) from error
    for held in found.values():
        if 0 in held.tokens:
            raise ConfigError(
                f"ssp {ssp} x ulysses {ulysses_ranks}: a grid of {grid} tokens leaves rank {held.tokens.index(0)} "
                "without any; take fewer ranks or a larger video"
            )
    return found


def forward_traffic(
    config: TransformerConfig,
    grid: Grid,
    ssp: int,
    ulysses_ranks: int,
    *,
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    payload: Payload = "plain",
    shared_scales: int = 0,
) -> Traffic:
    """Of this model; of Wan2.1 with Ulysses where the config is dense.

        full block               Ulysses among all R ranks                                            4 V
        sparse block             Ulysses among the ranks of an ssp group; nothing with ulysses = 1
        switch after a block     s B C |tokens that change rank|                                      V
        after the last           the head's output, padded to the longest part, to everyone

    Args:
        payload: what a switch sends for a token of C channels: s C bytes, or with "hif8" C + 4.
        shared_scales: fp32 numbers on which the ranks agree in each block, one after the other: see `shared_scales`.

    Raises:
        ConfigError: as `placements`.
    """
    ranks, s, C = ssp * ulysses_ranks, dtype.itemsize, config.dim
    held = placements(config, grid, ssp, ulysses_ranks)
    orders = block_orders(config.block_kinds)
    token_bytes = batch * (C * s if payload == "plain" else C + SCALE_BYTES)
    agreed = [reduced(SCALE, ranks, SCALE_BYTES)] * (shared_scales if ranks > 1 else 0)

    def attended(kind: BlockKind, order: OrderKind) -> list[Transfer]:
        tokens, head_bytes = held[order].tokens, batch * config.head_dim * s
        group = ranks if kind == "full" else ulysses_ranks
        if group == 1:
            return []
        of_groups = [ulysses(part, config.num_heads, head_bytes) for part in _in_groups(tokens, group)]
        return [side_by_side(parts[0].name, parts) for parts in zip(*of_groups, strict=True)]

    known = {pair: attended(*pair) for pair in dict.fromkeys(zip(config.block_kinds, orders, strict=True))}
    changes = {(a, b) for a, b in itertools.pairwise(orders) if a != b and ranks > 1}
    switches = {(a, b): switch(held[a], held[b], token_bytes) for a, b in changes}
    following = (*orders[1:], orders[-1])
    blocks = tuple(
        (*known[kind, order], *agreed, *([switches[order, then]] if (order, then) in switches else []))
        for kind, order, then in zip(config.block_kinds, orders, following, strict=True)
    )
    part = batch * max(held[orders[-1]].tokens) * config.out_dim * math.prod(config.patch_size) * s
    return Traffic(ranks, blocks, (gathered("velocity", ranks, part),) if ranks > 1 else ())


def published_traffic(
    config: TransformerConfig, grid: Grid, ranks: int, *, batch: int = 1, dtype: torch.dtype = torch.bfloat16
) -> Traffic:
    """Of OSP-Next as it was published, with SSP alone: H and W padded to multiples of k^2, N' tokens.

        full block                          4 s B C ceil(N / R) (1 - 1 / R)
        switch between two sparse blocks    s B C (N' / R) (1 - 1 / R)
        before the first, after the last    the stream to everyone: s B C ceil(N / R) (R - 1), s B C (N' / R) (R - 1)

    The sizes that each all_gather sends before are left out, a few bytes.

    Raises:
        ConfigError: `ranks` do not divide the k^2 subsequences and the heads.
    """
    k2, s, kinds = config.sparse_ratio**2, dtype.itemsize, config.block_kinds
    if not config.sparse or k2 % ranks or config.num_heads % ranks:
        raise ConfigError(
            f"{ranks} ranks must divide the {k2} subsequences and {config.num_heads} heads of a sparse model"
        )
    t, h, w = grid
    part = -(-t * h * w // ranks)
    padded = t * (-(-h // k2) * k2) * (-(-w // k2) * k2) // ranks
    channels = batch * config.dim * s
    full = ulysses([part] * ranks, config.num_heads, batch * config.head_dim * s)
    change = Transfer("switch", gathered("", ranks, padded // ranks * channels).matrix)
    sparse = [i for i, kind in enumerate(kinds) if kind != "full"]
    blocks: list[tuple[Transfer, ...]] = [full if kind == "full" else () for kind in kinds]
    for i in sparse[:-1]:
        blocks[i] = (change,)
    if sparse[0] > 0:
        blocks[sparse[0] - 1] += (gathered("to sparse", ranks, part * channels),)
    blocks[sparse[-1]] += (gathered("to full", ranks, padded * channels),)
    head = batch * part * config.out_dim * math.prod(config.patch_size) * s
    return Traffic(ranks, tuple(blocks), (gathered("velocity", ranks, head),))


def training_traffic(
    forward: Traffic,
    config: TransformerConfig,
    *,
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    checkpointed: bool,
    gradient_scales: int = 0,
) -> tuple[Transfer, ...]:
    """Transfers of forward and backward: in the adjoint of each goes back what came. The gradients of the text's keys
    and values are summed over ranks: B text_len C numbers of each in every block.

    With `checkpointed` blocks, what a block does to attend is done twice: Ulysses takes 3 times 4 V. The switch is not
    in the block: 2 V.

    Args:
        gradient_scales: those of gradients, in each block.
    """
    ranks = forward.ranks
    text = reduced("text, backward", ranks, batch * config.text_len * config.dim * dtype.itemsize)
    of_gradient = reduced(SCALE, ranks, SCALE_BYTES)
    found = list(forward.transfers)
    for block in forward.blocks if ranks > 1 else ():
        found += [transfer.adjoint for transfer in block if transfer.name != SCALE]
        if checkpointed:
            found += [transfer for transfer in block if transfer.name not in BETWEEN_BLOCKS]
        found += [text, text, *([of_gradient] * gradient_scales)]
    return (*found, *(transfer.adjoint for transfer in forward.output))


def shared_scales(config: TransformerConfig, quantization: Quantization, *, training: bool = False) -> int:
    """Scales of whole tensors in a block, on the mean of blocks: of what enters q, k and v together, both o, the q of
    cross-attention, the two linears of the feed-forward, and in training of the text; and of q, k and v of attention,
    without v where a kernel takes 8 bits.
    """
    alone = _per_tensor(quantization, *(name for name in LINEARS if name not in _READING_ALIKE))
    text = _per_tensor(quantization, "cross_attn.k") if training else 0
    attention = sum(2 if recipe.attention == "native" else 3 for recipe in quantization.attention.values())
    return round((alone + text + attention) / config.num_layers)


def gradient_scales(config: TransformerConfig, quantization: Quantization) -> int:
    """The same of gradients: of the result of each linear, and of q, k and v."""
    return round((_per_tensor(quantization, *LINEARS) + 3 * len(quantization.attention)) / config.num_layers)


#: Linears that read what another one reads.
_READING_ALIKE = ("self_attn.k", "self_attn.v", "cross_attn.k", "cross_attn.v")


def _per_tensor(quantization: Quantization, *names: str) -> int:
    found = quantization.linears.items()
    return sum(recipe.granularity == "tensor" for name, recipe in found if name.endswith(tuple(f".{n}" for n in names)))


def without_sparsity(config: TransformerConfig) -> TransformerConfig:
    """Wan2.1: the same weights with full attention everywhere."""
    return replace(config, skiparse_model_type="full", sparse_ratio=1, num_full_blocks=0)


def _in_groups(tokens: tuple[int, ...], size: int) -> list[tuple[int, ...]]:
    return [tokens[first : first + size] for first in range(0, len(tokens), size)]

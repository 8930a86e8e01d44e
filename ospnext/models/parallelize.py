"""A model among ranks: what of it can be divided, what each rank then holds, and the one call that makes it share its
samples. Geometry is in ospnext.parallel, the layout of a rank in rank_layout.py.
"""

from __future__ import annotations

from typing import Any

from ospnext.errors import ConfigError
from ospnext.models.attend import Attend
from ospnext.models.config import TransformerConfig
from ospnext.models.hif8_linear import HiF8Linear, StoredHiF8Linear
from ospnext.models.layers import CrossAttention
from ospnext.models.traffic import placements
from ospnext.models.transformer import OSPNextTransformer
from ospnext.models.upstream_bf16 import UpstreamBf16Linear
from ospnext.parallel import SequenceParallel
from ospnext.parallel.config import Divisible, ParallelConfig
from ospnext.sparse import Grid

#: Why a model is compiled or shares its samples, but not both.
NOT_TRACED = "exchanges between ranks cannot be traced into a graph"


def divisible(config: TransformerConfig, branches: int = 1) -> Divisible:
    """What a model of this shape and `branches` of guidance have to divide among ranks."""
    return Divisible(config.sparse_ratio**2, config.num_heads, branches, "full" in config.block_kinds)


def rank_tokens(config: TransformerConfig, grid: Grid, parallel: ParallelConfig) -> tuple[int, ...]:
    """The most tokens of a sample that each of its ranks holds in some block.

    Raises:
        ConfigError: the grid is so small that a rank would hold none.
    """
    kinds = placements(config, grid, parallel.ssp, parallel.ulysses).values()
    return tuple(max(tokens) for tokens in zip(*(held.tokens for held in kinds), strict=True))


def share_samples(
    model: OSPNextTransformer, sequence: SequenceParallel | None, *, share_scales: bool = True
) -> OSPNextTransformer:
    """Make `model` compute each sample together with the other ranks of `sequence`, in place; None makes it compute
    alone again. Returns the model.

    All of them call it with the same latents, timesteps and text, and get the same velocity. With `share_scales`,
    HiFloat8 scales of a whole tensor are those of all its parts, as on one process; otherwise of the part on each rank.
    8-bit attention alone (`attention="native"`) scales v on each rank by itself, after taking out its own mean.

    Raises:
        ConfigError: the model cannot be divided so, or is compiled, or quantizes in a form that cannot share scales. It
            is then as it was.
    """
    if sequence is not None:
        ParallelConfig.chosen(divisible(model.config), None, {"ssp": sequence.ssp, "ulysses": sequence.ulysses})
        _require_eager(model)
        if share_scales:
            _require_contracts(model)
    group = sequence.group if sequence is not None and share_scales else None
    for module in model.modules():
        if isinstance(module, CrossAttention):
            # All ranks attend to the same text: gradients of its keys and values are those of all tokens on each.
            module.attend.kv_group = None if sequence is None else sequence.group
        elif isinstance(module, Attend):
            module.amax_group = group
        elif isinstance(module, HiF8Linear | StoredHiF8Linear) and module.recipe.granularity == "tensor":
            module.amax_group = group  # a scale per row is that of one token, and each token is on one rank
    model.sequence = sequence
    return model


def _require_eager(model: OSPNextTransformer) -> None:
    modules: list[Any] = [model, *model.blocks]
    if any(module._compiled_call_impl is not None for module in modules):
        raise ConfigError(f"the model is compiled, and {NOT_TRACED}: set compile=off")


def _require_contracts(model: OSPNextTransformer) -> None:
    for name, module in model.named_modules():
        if isinstance(module, UpstreamBf16Linear) or (isinstance(module, Attend) and module.round_trip is not None):
            raise ConfigError(
                f"{name} quantizes as upstream's training code does (compat=upstream_bf16), which knows one process "
                "only: ranks that share a sample would each have other scales. Use compat=none, or one rank a sample"
            )

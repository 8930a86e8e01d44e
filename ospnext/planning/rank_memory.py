"""Bytes on one rank of a layout, part by part: what models/memory.py knows, for the tokens of a rank. Estimates of
eager code with a kernel for every fused operator."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ospnext.models.config import TransformerConfig
from ospnext.models.memory import (
    activation_peak,
    exchange_peak,
    latent_bytes,
    layout_bytes,
    text_bytes,
    weight_bytes,
)
from ospnext.models.traffic import without_sparsity
from ospnext.models.weights.quantized import Quantization
from ospnext.ops.contracts import CONTRACTS
from ospnext.sparse import Grid

WEIGHTS, ACTIVATIONS = "weights", "activations"

FUSED = tuple(name.removeprefix("fused.") for name, contract in CONTRACTS.items() if contract.family == "fused")


def sampling_memory(
    config: TransformerConfig,
    grid: Grid,
    tokens: int,
    *,
    ssp: int,
    ulysses: int,
    dtype: torch.dtype,
    quantization: Quantization,
    branches: int,
    texts: int,
    fused: Sequence[str] = FUSED,
) -> dict[str, int]:
    """Of a rank that holds `tokens` of each sample and computes one sample at a time.

    Args:
        branches: of guidance, whose velocities a rank keeps; texts: of them, those that this rank computes.

    The text encoder and the autoencoder come on top, unless they have gone before.
    """
    held = (1, 1, tokens)  # the estimates ask how many tokens there are, not where
    layer = sum(activation_peak(config, held, 1, dtype, quantization=quantization, fused=fused).values())
    exchange = exchange_peak(config, tokens, math.prod(grid), ssp, ulysses, dtype)
    return {
        WEIGHTS: weight_bytes(config, dtype, quantization),
        "text keys and values": text_bytes(config, dtype, texts),
        "rotary and index tables": layout_bytes(config, held, dtype),
        "latents, velocities and solver": latent_bytes(config, grid, 1, solver="unipc", branches=branches),
        ACTIVATIONS: max(layer, exchange),
    }


def training_memory(config: TransformerConfig, tokens: int, world: int, dtype: torch.dtype) -> dict[str, int]:
    """Of a rank of fully sharded training with AdamW, every block checkpointed, one sample at a time.

    Weights, gradients, two moments: 16 bytes a parameter, shared by all `world` ranks. Blocks are gathered in `dtype`,
    one ahead, and the gradients of one are whole before they are shared. A checkpoint is the stream before a block.
    While a block is differentiated it has 16 C + 2 F elements a token that its operators kept, and two gradients of
    its F hidden features.
    """
    parameters, dense = config.parameter_count(), without_sparsity(config)
    block = dense.replace(num_layers=2).parameter_count() - dense.replace(num_layers=1).parameter_count()
    return {
        "weights, gradients and moments": 16 * parameters // world,
        "gathered blocks": (3 * dtype.itemsize if world > 1 else dtype.itemsize) * block,
        "checkpoints": config.num_layers * tokens * config.dim * dtype.itemsize,
        ACTIVATIONS: block_backward(config, tokens, dtype),
    }


def block_backward(config: TransformerConfig, tokens: int, dtype: torch.dtype) -> int:
    """Of one block: what its operators kept, and the gradients at the worst moment."""
    return tokens * (16 * config.dim + 4 * config.ffn_dim) * dtype.itemsize

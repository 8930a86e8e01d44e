"""Official Wan names of the UMT5 encoder's weights: the map to transformers' names and the shape they imply."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ospnext.errors import CheckpointError

_BLOCK = {
    "norm1": "layer.0.layer_norm",
    "attn.q": "layer.0.SelfAttention.q",
    "attn.k": "layer.0.SelfAttention.k",
    "attn.v": "layer.0.SelfAttention.v",
    "attn.o": "layer.0.SelfAttention.o",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}
_TOP = {"token_embedding": "shared", "norm": "encoder.final_layer_norm"}
_BLOCK_NAME = re.compile(r"blocks\.(\d+)\.(.+)\.weight")


def to_transformers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename; no tensor changes. Unknown names are kept, so that a strict load reports them."""
    return {_rename(name): tensor for name, tensor in weights.items()}


def _rename(name: str) -> str:
    block = _BLOCK_NAME.fullmatch(name)
    if block and block[2] in _BLOCK:
        return f"encoder.block.{block[1]}.{_BLOCK[block[2]]}.weight"
    module = name.removesuffix(".weight")
    return f"{_TOP[module]}.weight" if name.endswith(".weight") and module in _TOP else name


def umt5_config(weights: Mapping[str, Tensor], source: Path) -> dict[str, Any]:
    """Arguments of transformers' UMT5Config, read off the shapes of weights under their official names.

    The file has no config of its own. What shapes cannot tell is UMT5's: distances from 128 share the last bucket.
    """
    try:
        vocab_size, d_model = weights["token_embedding.weight"].shape
        buckets, num_heads = weights["blocks.0.pos_embedding.embedding.weight"].shape
        inner = weights["blocks.0.attn.q.weight"].shape[0]
        d_ff = weights["blocks.0.ffn.fc1.weight"].shape[0]
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"{source} does not hold Wan's UMT5 encoder (no usable {error}); its first names are {list(weights)[:4]}"
        ) from error
    layers = {int(block[1]) for name in weights if (block := _BLOCK_NAME.fullmatch(name))}
    return {
        "vocab_size": vocab_size,
        "d_model": d_model,
        "d_kv": inner // num_heads,
        "d_ff": d_ff,
        "num_layers": max(layers) + 1,
        "num_heads": num_heads,
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": 128,
    }

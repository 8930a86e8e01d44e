"""Official Wan names of UMT5 and of the autoencoder, written from the published modules, not from ospnext's maps.

Tests turn a diffusers checkpoint into an official download with them. No ospnext import here.
"""

from __future__ import annotations

import re

T5_BLOCK = {
    "layer.0.layer_norm": "norm1",
    "layer.0.SelfAttention.q": "attn.q",
    "layer.0.SelfAttention.k": "attn.k",
    "layer.0.SelfAttention.v": "attn.v",
    "layer.0.SelfAttention.o": "attn.o",
    "layer.0.SelfAttention.relative_attention_bias": "pos_embedding.embedding",
    "layer.1.layer_norm": "norm2",
    "layer.1.DenseReluDense.wi_0": "ffn.gate.0",
    "layer.1.DenseReluDense.wi_1": "ffn.fc1",
    "layer.1.DenseReluDense.wo": "ffn.fc2",
}
RESIDUAL = {
    "norm1": "residual.0",
    "conv1": "residual.2",
    "norm2": "residual.3",
    "conv2": "residual.6",
    "conv_shortcut": "shortcut",
}
TOP = {
    "quant_conv": "conv1",
    "post_quant_conv": "conv2",
    "encoder.conv_in": "encoder.conv1",
    "decoder.conv_in": "decoder.conv1",
    "encoder.norm_out": "encoder.head.0",
    "decoder.norm_out": "decoder.head.0",
    "encoder.conv_out": "encoder.head.2",
    "decoder.conv_out": "decoder.head.2",
}


def official_t5(name: str) -> str | None:
    """None for the second name of the embedding, which official files do not have."""
    if name == "encoder.embed_tokens.weight":
        return None
    if block := re.fullmatch(r"encoder\.block\.(\d+)\.(.+)\.weight", name):
        return f"blocks.{block[1]}.{T5_BLOCK[block[2]]}.weight"
    return {"shared.weight": "token_embedding.weight", "encoder.final_layer_norm.weight": "norm.weight"}[name]


def official_vae(name: str) -> str:
    module, _, leaf = name.rpartition(".")
    if module in TOP:
        return f"{TOP[module]}.{leaf}"
    coder, part, rest = name.split(".", 2)
    if part == "mid_block":
        kind, index, rest = rest.split(".", 2)
        if kind == "attentions":
            return f"{coder}.middle.1.{rest}"
        return f"{coder}.middle.{2 * int(index)}.{_residual(rest)}"
    if part == "down_blocks":
        index, rest = rest.split(".", 1)
        return f"{coder}.downsamples.{index}.{_residual(rest)}"
    block, kind, index, rest = rest.split(".", 3)
    position = 4 * int(block) + (3 if kind == "upsamplers" else int(index))
    return f"{coder}.upsamples.{position}.{_residual(rest)}"


def _residual(rest: str) -> str:
    part, dot, leaf = rest.partition(".")
    return RESIDUAL.get(part, part) + dot + leaf

"""Names and shapes of every parameter a config calls for: what checkpoints are judged by. No files, no tensors here."""

from __future__ import annotations

import math

from ospnext.models.config import TransformerConfig

Shape = tuple[int, ...]


def parameter_shapes(config: TransformerConfig) -> dict[str, Shape]:
    """In official Wan2.1 text-to-video names. Skiparse adds no parameters: sparse and dense configs give the same."""
    C = config.dim
    shapes: dict[str, Shape] = {
        "patch_embedding.weight": (C, config.in_dim, *config.patch_size),
        "patch_embedding.bias": (C,),
        "head.modulation": (1, 2, C),
    }
    shapes |= _linear("text_embedding.0", config.text_dim, C) | _linear("text_embedding.2", C, C)
    shapes |= _linear("time_embedding.0", config.freq_dim, C) | _linear("time_embedding.2", C, C)
    shapes |= _linear("time_projection.1", C, 6 * C)
    for i in range(config.num_layers):
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in _block_shapes(C, config.ffn_dim).items()}
    return shapes | _linear("head.head", C, config.out_dim * math.prod(config.patch_size))


def _block_shapes(C: int, F: int) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {"modulation": (1, 6, C), "norm3.weight": (C,), "norm3.bias": (C,)}
    for attention in ("self_attn", "cross_attn"):
        for x in "qkvo":
            shapes |= _linear(f"{attention}.{x}", C, C)
        shapes |= {f"{attention}.norm_q.weight": (C,), f"{attention}.norm_k.weight": (C,)}
    return shapes | _linear("ffn.0", C, F) | _linear("ffn.2", F, C)


def _linear(name: str, inputs: int, outputs: int) -> dict[str, Shape]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}

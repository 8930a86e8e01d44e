"""Wan2.1's transformer as straight formulas on a dictionary of official-named tensors: the oracle of the dense model.

Computes in the dtype of the tensors throughout (fp64 makes it an oracle, bf16 a yardstick). Nothing of ospnext is used.
RoPE turns complex numbers; attention is a softmax of matrix products; the patch embedding is a convolution.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Weights:
    """Official-named tensors and the few sizes that their shapes do not tell."""

    tensors: Mapping[str, Tensor]
    num_heads: int
    num_layers: int
    out_dim: int
    eps: float

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.tensors[f"{name}.weight"].T + self.tensors[f"{name}.bias"]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors["patch_embedding.weight"].dtype


def weights_of(model: Any) -> Weights:
    """The live parameters of a transformer with a Wan config: gradients flow into them."""
    return named_weights(dict(model.named_parameters()), model.config)


def named_weights(tensors: Mapping[str, Tensor], config: Any) -> Weights:
    return Weights(tensors, config.num_heads, config.num_layers, config.out_dim, config.eps)


def layer_norm(x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred**2).mean(-1, keepdim=True).add(eps).sqrt()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x**2).mean(-1, keepdim=True).add(eps).sqrt() * weight


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def sinusoid(timestep_B: Tensor, size: int) -> Tensor:
    """fp64 [B, size]: cosines first, then sines, of t * 10000^(-j / (size / 2))."""
    rows = []
    for t in timestep_B.tolist():
        angles = [t * 10000.0 ** (-j / (size // 2)) for j in range(size // 2)]
        rows.append([math.cos(a) for a in angles] + [math.sin(a) for a in angles])
    return torch.tensor(rows, dtype=torch.float64)


def rotation(grid: tuple[int, int, int], head_dim: int) -> Tensor:
    """complex128 [T, H, W, D / 2]: the number by which each channel pair of a token at (t, h, w) is multiplied.

    Of D channels, 2 (D // 6) go to h and to w each, the rest to t. Pair j of an axis with `width` channels turns by
    position * 10000^(-2 j / width).
    """
    spatial = 2 * (head_dim // 6)
    widths = (head_dim - 2 * spatial, spatial, spatial)
    per_axis = []
    for axis, (size, width) in enumerate(zip(grid, widths, strict=True)):
        frequencies = torch.tensor([10000.0 ** (-2 * j / width) for j in range(width // 2)], dtype=torch.float64)
        angles = torch.outer(torch.arange(size, dtype=torch.float64), frequencies)
        shape = [1, 1, 1, width // 2]
        shape[axis] = size
        per_axis.append(torch.polar(torch.ones_like(angles), angles).view(shape).expand(*grid, -1))
    return torch.cat(per_axis, dim=-1)


def rotate(x_BNHD: Tensor, turn: Tensor) -> Tensor:
    """`turn` is complex, [N, D / 2] or [B, N, D / 2]; it meets x between the head axis and the pairs."""
    # There are no complex numbers in bf16: below fp64 they are of fp32, the table with them.
    wide = torch.promote_types(x_BNHD.dtype, torch.float32)
    pairs = torch.view_as_complex(x_BNHD.to(wide).unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn.unsqueeze(-2).to(pairs.dtype)).flatten(-2).to(x_BNHD.dtype)


def attend(q_BNHD: Tensor, k_BMHD: Tensor, v_BMHD: Tensor, mask_BM: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v; keys where the mask is False do not take part, and a row without a key is zero."""
    logits_BHNM = torch.einsum("bnhd,bmhd->bhnm", q_BNHD, k_BMHD) / math.sqrt(q_BNHD.shape[-1])
    present = torch.ones_like(logits_BHNM) if mask_BM is None else mask_BM[:, None, None, :].to(logits_BHNM.dtype)
    weights = torch.exp(logits_BHNM - logits_BHNM.detach().amax(-1, keepdim=True)) * present
    total = weights.sum(-1, keepdim=True)
    return torch.einsum("bhnm,bmhd->bnhd", weights / torch.where(total == 0, 1, total), v_BMHD)


def embed_time(weights: Weights, timestep_B: Tensor) -> tuple[Tensor, Tensor]:
    """(e [B, C] for the head, e0 [B, 6, C] for the blocks)."""
    features = sinusoid(timestep_B, weights["time_embedding.0.weight"].shape[1]).to(weights.dtype)
    e_BC = weights.linear("time_embedding.2", silu(weights.linear("time_embedding.0", features)))
    return e_BC, weights.linear("time_projection.1", silu(e_BC)).unflatten(1, (6, -1))


def embed_text(weights: Weights, text_BLC: Tensor) -> Tensor:
    return weights.linear("text_embedding.2", gelu_tanh(weights.linear("text_embedding.0", text_BLC)))


def embed_patches(weights: Weights, latents_BCTHW: Tensor) -> Tensor:
    """[B, T, H, W, C] on the token grid."""
    kernel = weights["patch_embedding.weight"]
    x = F.conv3d(latents_BCTHW, kernel, weights["patch_embedding.bias"], stride=kernel.shape[2:])
    return x.permute(0, 2, 3, 4, 1)


def block(
    weights: Weights,
    index: int,
    x_BNC: Tensor,
    e0_B6C: Tensor,
    text_BLC: Tensor,
    turn: Tensor,
    mask_BN: Tensor | None = None,
) -> Tensor:
    name = f"blocks.{index}"

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (weights.num_heads, -1))

    def normed(projection: str, norm: str, x: Tensor) -> Tensor:
        scaled = weights.linear(f"{name}.{projection}", x)
        return heads(rms_norm(scaled, weights[f"{name}.{norm}.weight"], weights.eps))

    m = (weights[f"{name}.modulation"] + e0_B6C)[:, :, None].unbind(1)

    y = layer_norm(x_BNC, weights.eps) * (1 + m[1]) + m[0]
    q = rotate(normed("self_attn.q", "self_attn.norm_q", y), turn)
    k = rotate(normed("self_attn.k", "self_attn.norm_k", y), turn)
    v = heads(weights.linear(f"{name}.self_attn.v", y))
    out = attend(q, k, v, mask_BN).flatten(2)
    if mask_BN is not None:
        # Queries at pads are not computed: they re-enter as zeros, before the output projection.
        out = out * mask_BN[..., None]
    x_BNC = x_BNC + weights.linear(f"{name}.self_attn.o", out) * m[2]

    y = layer_norm(x_BNC, weights.eps) * weights[f"{name}.norm3.weight"] + weights[f"{name}.norm3.bias"]
    q = normed("cross_attn.q", "cross_attn.norm_q", y)
    k = normed("cross_attn.k", "cross_attn.norm_k", text_BLC)
    v = heads(weights.linear(f"{name}.cross_attn.v", text_BLC))
    x_BNC = x_BNC + weights.linear(f"{name}.cross_attn.o", attend(q, k, v).flatten(2))

    y = layer_norm(x_BNC, weights.eps) * (1 + m[4]) + m[3]
    return x_BNC + weights.linear(f"{name}.ffn.2", gelu_tanh(weights.linear(f"{name}.ffn.0", y))) * m[5]


def head(weights: Weights, x_BTHWC: Tensor, e_BC: Tensor) -> Tensor:
    """Velocity [B, out, T, 2H, 2W]. The channels of a patch decode as (row, column, channel), channel fastest."""
    shift, scale = (weights["head.modulation"] + e_BC[:, None])[:, :, None, None, None].unbind(1)
    patches = weights.linear("head.head", layer_norm(x_BTHWC, weights.eps) * (1 + scale) + shift)
    b, t, h, w, _ = patches.shape
    out = patches.new_zeros(b, weights.out_dim, t, 2 * h, 2 * w)
    for row in range(2):
        for column in range(2):
            start = (row * 2 + column) * weights.out_dim
            out[:, :, :, row::2, column::2] = patches[..., start : start + weights.out_dim].permute(0, 4, 1, 2, 3)
    return out


def forward(weights: Weights, latents_BCTHW: Tensor, timestep_B: Tensor, text_BLC: Tensor) -> Tensor:
    """The dense model."""
    e_BC, e0_B6C = embed_time(weights, timestep_B)
    text_BLC = embed_text(weights, text_BLC)
    x_BTHWC = embed_patches(weights, latents_BCTHW)
    grid = (x_BTHWC.shape[1], x_BTHWC.shape[2], x_BTHWC.shape[3])
    turn = rotation(grid, x_BTHWC.shape[-1] // weights.num_heads).flatten(0, 2)
    x_BNC = x_BTHWC.flatten(1, 3)
    for index in range(weights.num_layers):
        x_BNC = block(weights, index, x_BNC, e0_B6C, text_BLC, turn)
    return head(weights, x_BNC.unflatten(1, grid), e_BC)

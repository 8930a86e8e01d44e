"""The layers of a transformer block. They compute through `ospnext.ops`; parameter names are those of official
Wan2.1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ospnext import ops
from ospnext.models.attend import Attend
from ospnext.models.config import TransformerConfig
from ospnext.models.hif8_linear import project
from ospnext.models.layout import BlockPlan


class RMSNorm(nn.Module):
    """Root-mean-square norm over all heads together."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, x_BNC: Tensor) -> Tensor:
        return ops.rms_norm(x_BNC, self.weight, self.eps)


class AffineLayerNorm(nn.Module):
    """Layer norm with weight and bias, as before cross-attention."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.bias = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, x_BNC: Tensor) -> Tensor:
        return ops.layer_norm_modulate(x_BNC, self.weight, self.bias, eps=self.eps)


class AttentionProjections(nn.Module):
    """q, k, v and o with norms on q and k: the parameters that self- and cross-attention share."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.q = nn.Linear(config.dim, config.dim)
        self.k = nn.Linear(config.dim, config.dim)
        self.v = nn.Linear(config.dim, config.dim)
        self.o = nn.Linear(config.dim, config.dim)
        self.norm_q = RMSNorm(config.dim, config.eps)
        self.norm_k = RMSNorm(config.dim, config.eps)
        self.attend = Attend()

    def split_heads(self, x_BNC: Tensor) -> Tensor:
        return x_BNC.unflatten(-1, (self.heads, -1))


class SelfAttention(AttentionProjections):
    """Attention among video tokens: within each subsequence of a sparse block, among all tokens in a full one."""

    def forward(self, x_BNC: Tensor, plan: BlockPlan) -> Tensor:
        q_BNC, k_BNC, v_BNC = project(x_BNC, self.q, self.k, self.v)
        q_BNHD = ops.rope(self.split_heads(self.norm_q(q_BNC)), plan.cos, plan.sin)
        k_BNHD = ops.rope(self.split_heads(self.norm_k(k_BNC)), plan.cos, plan.sin)
        return self.o(self.attend(q_BNHD, k_BNHD, self.split_heads(v_BNC), plan.subsequences).flatten(2))


class CrossAttention(AttentionProjections):
    """Attention of video tokens to text. Keys and values depend on the prompt alone, so they are computed once and
    kept.
    """

    def project_text(self, text_BLC: Tensor) -> tuple[Tensor, Tensor]:
        k_BLC, v_BLC = project(text_BLC, self.k, self.v)
        return self.split_heads(self.norm_k(k_BLC)), self.split_heads(v_BLC)

    def forward(self, x_BNC: Tensor, text_kv_BLHD: tuple[Tensor, Tensor]) -> Tensor:
        q_BNHD = self.split_heads(self.norm_q(self.q(x_BNC)))
        return self.o(self.attend(q_BNHD, *text_kv_BLHD).flatten(2))


class GeluTanh(nn.Module):
    """A place in an nn.Sequential, so that the linears around it keep their official indices."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.gelu_tanh(x)


class Block(nn.Module):
    """Self-attention, cross-attention and feed-forward on a residual stream [B, N, C], modulated by the timestep."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.self_attn = SelfAttention(config)
        self.norm3 = AffineLayerNorm(config.dim, config.eps)
        self.cross_attn = CrossAttention(config)
        self.ffn = nn.Sequential(
            nn.Linear(config.dim, config.ffn_dim), GeluTanh(), nn.Linear(config.ffn_dim, config.dim)
        )
        self.modulation = nn.Parameter(torch.empty(1, 6, config.dim))

    def forward(self, x_BNC: Tensor, time_B6C: Tensor, text_kv_BLHD: tuple[Tensor, Tensor], plan: BlockPlan) -> Tensor:
        """The last residual addition writes the stream in the order the next block wants."""
        shift_sa, scale_sa, gate_sa, shift_ff, scale_ff, gate_ff = (self.modulation + time_B6C).unbind(1)
        y_BNC = ops.layer_norm_modulate(x_BNC, shift_BC=shift_sa, scale_BC=scale_sa, eps=self.eps)
        x_BNC = ops.gate_residual(x_BNC, self.self_attn(y_BNC, plan), gate_sa)
        x_BNC = ops.gate_residual(x_BNC, self.cross_attn(self.norm3(x_BNC), text_kv_BLHD))
        y_BNC = ops.layer_norm_modulate(x_BNC, shift_BC=shift_ff, scale_BC=scale_ff, eps=self.eps)
        return ops.gate_residual(x_BNC, self.ffn(y_BNC), gate_ff, plan.switch)


class Head(nn.Module):
    """Modulated norm and projection to patch channels."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        pt, ph, pw = config.patch_size
        self.eps = config.eps
        self.head = nn.Linear(config.dim, config.out_dim * pt * ph * pw)
        self.modulation = nn.Parameter(torch.empty(1, 2, config.dim))

    def forward(self, x_BNC: Tensor, time_BC: Tensor) -> Tensor:
        shift_BC, scale_BC = (self.modulation + time_BC[:, None]).unbind(1)
        return self.head(ops.layer_norm_modulate(x_BNC, shift_BC=shift_BC, scale_BC=scale_BC, eps=self.eps))

"""The layers of a transformer block. They compute through `ospnext.ops`; parameter names are those of official
Wan2.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ospnext import ops
from ospnext.models.attend import Attend
from ospnext.models.config import TransformerConfig
from ospnext.models.hif8_linear import input_form, project
from ospnext.models.layout import BlockPlan
from ospnext.ops import Quantized


class RMSNorm(nn.Module):
    """Root-mean-square norm over all heads together."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, x_BNC: Tensor) -> Tensor:
        return ops.rms_norm(x_BNC, self.weight, self.eps)


class PatchEmbedding(nn.Conv3d):
    """A convolution whose windows do not overlap: one linear of patches, each flattened as the weight is."""

    def forward(self, patches_BNP: Tensor) -> Tensor:
        return F.linear(patches_BNP, self.weight.flatten(1), self.bias)


class AffineLayerNorm(nn.Module):
    """Weight and bias of a layer norm, as before cross-attention."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.bias = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, x_BNC: Tensor, *consumers: nn.Module) -> Tensor | Quantized:
        return layer_norm_for(consumers, x_BNC, self.weight, self.bias, eps=self.eps)


def layer_norm_for(
    consumers: Sequence[nn.Module],
    x_BNC: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    shift_BC: Tensor | None = None,
    scale_BC: Tensor | None = None,
    *,
    eps: float,
) -> Tensor | Quantized:
    """`ops.layer_norm_modulate`, in the form in which the linears that read it want it."""
    form = input_form(*consumers)
    if form is None:
        return ops.layer_norm_modulate(x_BNC, weight, bias, shift_BC, scale_BC, eps)
    return ops.layer_norm_modulate_quantize(x_BNC, weight, bias, shift_BC, scale_BC, eps, **form._asdict())


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

    def forward(self, x_BNC: Tensor | Quantized, plan: BlockPlan, dtype: torch.dtype) -> Tensor:
        # Names are given again, and up, so that nothing lives longer than it is needed: each is 0.8 GB at 720P.
        q, k, v = project(x_BNC, self.q, self.k, self.v, dtype=dtype)
        q = ops.rms_norm_rope(q, self.norm_q.weight, plan.cos, plan.sin, self.norm_q.eps)
        k = ops.rms_norm_rope(k, self.norm_k.weight, plan.cos, plan.sin, self.norm_k.eps)
        v = self.split_heads(v)
        if plan.ulysses is not None:
            q, k, v = plan.ulysses.to_heads(q, k, v)
        out_BNHD = self.attend(q, k, v, plan.subsequences)
        del q, k, v
        if plan.ulysses is not None:
            out_BNHD = plan.ulysses.to_tokens(out_BNHD, self.heads)
        return self.o(out_BNHD.flatten(2))


class CrossAttention(AttentionProjections):
    """Attention of video tokens to text. Keys and values depend on the prompt alone, so they are computed once and
    kept.
    """

    def project_text(self, text_BLC: Tensor) -> tuple[Tensor, Tensor]:
        k_BLC, v_BLC = project(text_BLC, self.k, self.v)
        return self.split_heads(self.norm_k(k_BLC)), self.split_heads(v_BLC)

    def forward(self, x_BNC: Tensor | Quantized, text_kv_BLHD: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
        (q,) = project(x_BNC, self.q, dtype=dtype)
        q = self.split_heads(self.norm_q(q))
        out_BNHD = self.attend(q, *text_kv_BLHD)
        del q
        return self.o(out_BNHD.flatten(2))


class GeluTanh(nn.Module):
    """A place in an nn.Sequential, so that the linears around it keep their official indices. In a block it is not
    called: GELU may end the linear before it, or in codes for the one after.
    """

    def forward(self, x: Tensor) -> Tensor:
        return ops.gelu_tanh(x)


class FeedForward(nn.Sequential):
    """Linear, GELU, linear: a sequence, so that the linears have their official indices 0 and 2."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__(nn.Linear(dim, ffn_dim), GeluTanh(), nn.Linear(ffn_dim, dim))

    def forward(self, x_BNC: Tensor | Quantized, dtype: torch.dtype) -> Tensor:  # type: ignore[override]
        into, _, out_of = self
        form = input_form(out_of)
        if form is None and isinstance(x_BNC, Tensor) and _is_plain(into, x_BNC):
            return out_of(ops.linear_gelu_tanh(x_BNC, into.weight, into.bias))
        hidden: Tensor | Quantized = project(x_BNC, into, dtype=dtype)[0]
        if form is None:
            hidden = ops.gelu_tanh(cast(Tensor, hidden))
        else:
            hidden = ops.gelu_tanh_quantize(cast(Tensor, hidden), **form._asdict())
        return project(hidden, out_of, dtype=dtype)[0]


def _is_plain(linear: nn.Module, x: Tensor) -> TypeGuard[nn.Linear]:
    """Whether nothing but its product is asked of a linear: no gradients, no hooks, no other class of it or of its
    weight, and one dtype.
    """
    hooked = linear._forward_hooks or linear._forward_pre_hooks
    if torch.is_grad_enabled() or hooked or type(linear) is not nn.Linear or linear.bias is None:
        return False
    if type(linear.weight) is not nn.Parameter:
        return False
    # "meta" has no autocast to ask for; `torch.amp.is_autocast_available` says so, but breaks graphs of torch 2.11.
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        return False
    return linear.weight.dtype == linear.bias.dtype == x.dtype


class Block(nn.Module):
    """Self-attention, cross-attention and feed-forward on a residual stream [B, N, C], modulated by the timestep."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.self_attn = SelfAttention(config)
        self.norm3 = AffineLayerNorm(config.dim, config.eps)
        self.cross_attn = CrossAttention(config)
        self.ffn = FeedForward(config.dim, config.ffn_dim)
        self.modulation = nn.Parameter(torch.empty(1, 6, config.dim))

    def project_text(self, text_BLC: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, L, H, D] of the text for this block."""
        return self.cross_attn.project_text(text_BLC)

    def forward(self, x_BNC: Tensor, time_B6C: Tensor, text: Tensor | tuple[Tensor, Tensor], plan: BlockPlan) -> Tensor:
        """`text` is what `project_text` gives, or what it takes: then nothing of this block is needed before, nor kept.

        The last residual addition writes the stream in the order the next block wants; `plan.exchange` comes after."""
        text_kv_BLHD = self.cross_attn.project_text(text) if isinstance(text, Tensor) else text
        shift_sa, scale_sa, gate_sa, shift_ff, scale_ff, gate_ff = (self.modulation + time_B6C).unbind(1)
        dtype, sa, ca = x_BNC.dtype, self.self_attn, self.cross_attn
        y_BNC = layer_norm_for((sa.q, sa.k, sa.v), x_BNC, shift_BC=shift_sa, scale_BC=scale_sa, eps=self.eps)
        x_BNC = ops.gate_residual(x_BNC, sa(y_BNC, plan, dtype), gate_sa)
        x_BNC = ops.gate_residual(x_BNC, ca(self.norm3(x_BNC, ca.q), text_kv_BLHD, dtype))
        y_BNC = layer_norm_for((self.ffn[0],), x_BNC, shift_BC=shift_ff, scale_BC=scale_ff, eps=self.eps)
        return ops.gate_residual(x_BNC, self.ffn(y_BNC, dtype), gate_ff, plan.switch)


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

"""The fused operators in plain PyTorch: definition, gradient in closed form, and the naive formula that bounds them.

`naive_*` keeps every intermediate in the dtype of its inputs: the yardstick, and in fp64 the oracle."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _wide(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors in the accumulation dtype of the first; None stays None."""
    assert tensors[0] is not None
    dtype = accumulation_dtype(tensors[0].dtype)
    return tuple(None if t is None else t.to(dtype) for t in tensors)


class _PerToken(torch.autograd.Function):
    """A parameter repeated for each token [B, N, C]; its gradient adds the tokens one after the other.

    Only the yardstick uses it: kernels may add tokens in any order, so the yardstick takes the plainest and least
    accurate one."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, batch: int, tokens: int) -> Tensor:
        ctx.per_sample = parameter.ndim == 2
        return (parameter[:, None] if ctx.per_sample else parameter).expand(batch, tokens, -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        rows = grads[0].unbind(1) if ctx.per_sample else grads[0].flatten(0, 1).unbind(0)
        total = torch.zeros_like(rows[0])
        for row in rows:
            total = total + row
        return total, None, None


def _per_token(parameter: Tensor, x: Tensor) -> Tensor:
    return _PerToken.apply(parameter, *x.shape[:2])


def _inverse_root(x: Tensor) -> Tensor:
    """1 / sqrt(x), with two correct roundings: rsqrt of a GPU is further off, by the same in all of a row."""
    return x.sqrt().reciprocal()


def _mean(x: Tensor) -> Tensor:
    """Of each row, by a correctly rounded division. `Tensor.mean` of a GPU multiplies by a rounded reciprocal, as its
    division by a number does: off by the same in every row, which adds up in sums over tokens.
    """
    return x.sum(-1, keepdim=True) / x.new_full((), x.shape[-1])


# ---- rms_norm
# ----------------------------------------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide_x, wide_weight = _wide(x, weight)
    return (wide_x * _inverse_root(_mean(wide_x.square()) + eps) * wide_weight).to(x.dtype).contiguous()


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float):
    wide_x, wide_grad, wide_weight = _wide(x, grad, weight)
    inverse = _inverse_root(_mean(wide_x.square()) + eps)
    normed, scaled = wide_x * inverse, wide_grad * wide_weight
    dx = inverse * (scaled - normed * _mean(scaled * normed))
    return dx.to(x.dtype), (wide_grad * normed).flatten(0, -2).sum(0).to(weight.dtype), None


def naive_rms_norm(x, weight, eps):
    return _per_token(weight, x) * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


# ---- layer_norm_modulate
# ----------------------------------------------------------------------------------------------------------------------


def layer_norm_modulate(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, shift: Tensor | None, scale: Tensor | None, eps: float
) -> Tensor:
    wide_x, wide_weight, wide_bias, wide_shift, wide_scale = _wide(x, weight, bias, shift, scale)
    y = F.layer_norm(wide_x, x.shape[-1:], wide_weight, wide_bias, eps)
    if wide_scale is not None:
        y = y * (1 + wide_scale[:, None]) + wide_shift[:, None]
    return y.to(x.dtype).contiguous()


def layer_norm_modulate_backward(grad: Tensor, x: Tensor, weight, bias, shift, scale, eps: float):
    wide_x, wide_grad, wide_weight, wide_bias, wide_scale = _wide(x, grad, weight, bias, scale)
    centred = wide_x - _mean(wide_x)
    inverse = _inverse_root(_mean(centred.square()) + eps)
    normed = centred * inverse
    dweight = dbias = dshift = dscale = None
    if wide_scale is not None:
        affine = normed if wide_weight is None else normed * wide_weight + wide_bias
        dscale, dshift = (wide_grad * affine).sum(1).to(scale.dtype), wide_grad.sum(1).to(shift.dtype)
        wide_grad = wide_grad * (1 + wide_scale[:, None])
    if wide_weight is not None:
        dweight, dbias = (wide_grad * normed).sum((0, 1)).to(weight.dtype), wide_grad.sum((0, 1)).to(bias.dtype)
        wide_grad = wide_grad * wide_weight
    dx = inverse * (wide_grad - _mean(wide_grad) - normed * _mean(wide_grad * normed))
    return dx.to(x.dtype), dweight, dbias, dshift, dscale, None


def naive_layer_norm_modulate(x, weight, bias, shift, scale, eps):
    centred = x - x.mean(-1, keepdim=True)
    y = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    y = y if weight is None else y * _per_token(weight, x) + _per_token(bias, x)
    return y if scale is None else y + y * _per_token(scale, x) + _per_token(shift, x)


# ---- rope
# ----------------------------------------------------------------------------------------------------------------------


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide_x, cos_N1P, sin_N1P = _wide(x, cos[:, None], sin[:, None])
    real, imaginary = wide_x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((real * cos_N1P - imaginary * sin_N1P, real * sin_N1P + imaginary * cos_N1P), dim=-1)
    return turned.flatten(-2).to(x.dtype).contiguous()


def rope_backward(grad: Tensor, x: Tensor, cos: Tensor, sin: Tensor):
    return rope(grad, cos, -sin), None, None


def naive_rope(x, cos, sin):
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.complex(cos.double(), sin.double())[:, None]).flatten(-2).to(x.dtype)


# ---- rms_norm_rope
# ----------------------------------------------------------------------------------------------------------------------


def rms_norm_rope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    (wide_x,) = _wide(x)
    heads = rms_norm(wide_x, weight, eps).unflatten(-1, (-1, 2 * cos.shape[-1]))
    return rope(heads, cos, sin).to(x.dtype)


def rms_norm_rope_backward(grad: Tensor, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float):
    (wide_grad,) = _wide(grad)
    turned_back = rope(wide_grad, cos, -sin).flatten(-2)
    dx, dweight, _ = rms_norm_backward(turned_back, x, weight, eps)
    return dx, dweight, None, None, None


def naive_rms_norm_rope(x, weight, cos, sin, eps):
    return naive_rope(naive_rms_norm(x, weight, eps).unflatten(-1, (-1, 2 * cos.shape[-1])), cos, sin)


# ---- gate_residual
# ----------------------------------------------------------------------------------------------------------------------


def gate_residual(x: Tensor, y: Tensor, gate: Tensor | None, permutation: Tensor | None) -> Tensor:
    wide_x, wide_y, wide_gate = _wide(x, y, gate)
    out = wide_x + (wide_y if wide_gate is None else wide_y * wide_gate[:, None])
    out = out.to(x.dtype)
    return (out if permutation is None else out[:, permutation]).contiguous()


def gate_residual_backward(grad: Tensor, x: Tensor, y: Tensor, gate: Tensor | None, permutation: Tensor | None):
    if permutation is not None:
        grad = torch.empty_like(grad).index_copy(1, permutation, grad)
    wide_grad, wide_y, wide_gate = _wide(grad, y, gate)
    dx = grad.to(x.dtype).clone()
    if gate is None:
        return dx, grad.to(y.dtype).clone(), None, None
    return dx, (wide_grad * wide_gate[:, None]).to(y.dtype), (wide_grad * wide_y).sum(1).to(gate.dtype), None


def naive_gate_residual(x, y, gate, permutation):
    z = x + (y if gate is None else y * _per_token(gate, x))
    return z if permutation is None else z.index_select(1, permutation)


# ---- gelu_tanh
# ----------------------------------------------------------------------------------------------------------------------


def gelu_tanh(x: Tensor) -> Tensor:
    # aten's kernel already computes in fp32 and rounds once.
    return F.gelu(x, approximate="tanh").contiguous()


def gelu_tanh_backward(grad: Tensor, x: Tensor):
    return (torch.ops.aten.gelu_backward(grad, x, approximate="tanh"),)


def naive_gelu_tanh(x):
    return x / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))

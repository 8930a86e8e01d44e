"""`ascend.npu`: the fused family on the vendor's operators for norms, rotary embeddings and GELU. Which operator
computes what, and in which dtype; limits are in predicates_numeric.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch_npu
from torch import Tensor

from .predicates_numeric import MOST_TURNED, rotary
from .soc import generation


@dataclass(frozen=True)
class Kernel:
    """Takes the arguments of a contract; `backward` gives one gradient for each, None where it has none."""

    forward: Callable[..., Tensor]
    backward: Callable[..., Sequence[Tensor | None]]


# ---- rms_norm


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch_npu.npu_rms_norm(_rows(x), _gamma(x, weight), eps)[0].view(x.shape)


def _rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor | None, ...]:
    rows, gamma = _rows(x), _gamma(x, weight)
    _, rstd = torch_npu.npu_rms_norm(rows, gamma, eps)
    dx, dgamma = torch_npu.npu_rms_norm_backward(_rows(grad), rows, gamma, rstd)
    return dx.view(x.shape), dgamma.to(weight.dtype), None


def _rows(x: Tensor) -> Tensor:
    """The gradient wants two dimensions at least."""
    return x.reshape(-1, x.shape[-1])


def _gamma(x: Tensor, weight: Tensor) -> Tensor:
    """The operator takes a weight of the dtype of x, or one in fp32."""
    return weight if weight.dtype == x.dtype else weight.float()


# ---- rope


def _rope(x_BNHD: Tensor, cos_NP: Tensor, sin_NP: Tensor) -> Tensor:
    """In fp32: the operator rounds angles to the dtype of x. Its own gradient operator is not used, since turning back
    is the same with the other sign, and leaves out what belongs to cos and sin."""
    cos, sin = (t.float().repeat_interleave(2, -1)[None, :, None] for t in (cos_NP, sin_NP))

    def turned(part: Tensor) -> Tensor:
        return torch_npu.npu_rotary_mul(part.float(), cos, sin, "interleave").to(x_BNHD.dtype)

    if _generation() == "950" or x_BNHD.shape[0] * x_BNHD.shape[2] <= MOST_TURNED:
        return turned(x_BNHD).contiguous()
    parts = (part.split(max(1, MOST_TURNED // part.shape[2])) for part in x_BNHD.split(MOST_TURNED, dim=2))
    return torch.cat([torch.cat([turned(samples) for samples in of_heads]) for of_heads in parts], dim=2)


def _rope_backward(grad: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor | None, ...]:
    return _rope(grad, cos, -sin), None, None


# ---- rms_norm_rope


def _rms_norm_rope(x_BNC: Tensor, weight: Tensor, cos_NP: Tensor, sin_NP: Tensor, eps: float) -> Tensor:
    _require_turnable(cos_NP)
    normed = _rms_norm(x_BNC.float(), weight.float(), eps)
    return _rope(normed.unflatten(-1, (-1, 2 * cos_NP.shape[-1])), cos_NP, sin_NP).to(x_BNC.dtype)


def _rms_norm_rope_backward(
    grad_BNHD: Tensor, x_BNC: Tensor, weight: Tensor, cos_NP: Tensor, sin_NP: Tensor, eps: float
) -> tuple[Tensor | None, ...]:
    _require_turnable(cos_NP)
    turned_back = _rope(grad_BNHD.float(), cos_NP, -sin_NP).flatten(-2)
    dx, dweight, _ = _rms_norm_backward(turned_back, x_BNC.float(), weight.float(), eps)
    assert dx is not None and dweight is not None
    return dx.to(x_BNC.dtype), dweight.to(weight.dtype), None, None, None


def _require_turnable(cos_NP: Tensor) -> None:
    """What the predicate cannot see, since requests do not say how channels are divided into heads."""
    head_dim = 2 * cos_NP.shape[-1]
    for line in rotary(_generation(), head_dim):
        if not line.met:
            raise ValueError(
                f"fused.rms_norm_rope on ascend.npu: {line.reason}; set OSPNEXT_OPS=fused.rms_norm_rope=ascend.torch"
            )


@functools.cache
def _generation() -> str:
    return generation(torch_npu.npu.get_device_name()) or ""


# ---- layer_norm_modulate


def _layer_norm_modulate(x, weight, bias, shift, scale, eps) -> Tensor:
    """The modulation of a sample is one more weight and bias: a single pass over each sample, rounded once."""
    gains, offsets = _folded(x, weight, bias, shift, scale)
    if len(gains) == 1:
        return _layer_norm(x, gains[0], offsets[0], eps)[0].contiguous()
    return torch.stack([_layer_norm(*of_sample, eps)[0] for of_sample in zip(x, gains, offsets, strict=True)])


def _layer_norm_modulate_backward(grad, x, weight, bias, shift, scale, eps) -> tuple[Tensor | None, ...]:
    gains, offsets = _folded(x, weight, bias, shift, scale)
    samples = zip(grad, x, gains, offsets, strict=True) if len(gains) > 1 else ((grad, x, gains[0], offsets[0]),)
    found = [_layer_norm_backward(*of_sample, eps) for of_sample in samples]
    dx = torch.stack([of_x for of_x, _, _ in found]) if len(found) > 1 else found[0][0]
    dgains_SC, doffsets_SC = (torch.stack([of_sample[i] for of_sample in found]) for i in (1, 2))
    dweight = dbias = dshift = dscale = None
    if weight is not None:
        by = 1.0 if scale is None else 1 + scale.float()
        dweight, dbias = ((d * by).sum(0).to(t.dtype) for d, t in ((dgains_SC, weight), (doffsets_SC, bias)))
    if scale is not None:
        dgain = dgains_SC if weight is None else dgains_SC * weight.float() + doffsets_SC * bias.float()
        dshift, dscale = doffsets_SC.to(shift.dtype), dgain.to(scale.dtype)
    return dx, dweight, dbias, dshift, dscale, None


def _folded(x, weight, bias, shift, scale) -> tuple[Tensor, Tensor]:
    """fp32 [S, C], for each sample or for all: what multiplies the normed x, and what is added."""
    gain, offset = (
        x.new_full(x.shape[-1:], value, dtype=torch.float32) if t is None else t.float()
        for t, value in ((weight, 1.0), (bias, 0.0))
    )
    if scale is None:
        return gain[None], offset[None]
    by = 1 + scale.float()
    return gain * by, offset * by + shift.float()


def _layer_norm(x: Tensor, gain: Tensor, offset: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(result in the dtype of x; mean and inverse deviation in fp32, as the weight is)."""
    return torch.native_layer_norm(x, x.shape[-1:], gain, offset, eps)


def _layer_norm_backward(
    grad: Tensor, x: Tensor, gain: Tensor, offset: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, gain and offset. The last is summed by itself: times `bias` it is part of the gradient of
    `scale`, which the order of one sum over all tokens would show.
    """
    _, mean, rstd = _layer_norm(x, gain, offset, eps)
    dx, dgain, _ = torch.ops.aten.native_layer_norm_backward(
        grad, x, x.shape[-1:], mean, rstd, gain, offset, [True, True, False]
    )
    return dx, dgain, grad.reshape(-1, grad.shape[-1]).sum(0, dtype=torch.float32)


# ---- gelu_tanh


def _gelu_tanh(x: Tensor) -> Tensor:
    return torch_npu.npu_gelu(x, approximate="tanh").contiguous()


def _gelu_tanh_backward(grad: Tensor, x: Tensor) -> tuple[Tensor | None, ...]:
    return (torch_npu.npu_gelu_backward(grad, x, approximate="tanh"),)


rms_norm = Kernel(_rms_norm, _rms_norm_backward)
rope = Kernel(_rope, _rope_backward)
rms_norm_rope = Kernel(_rms_norm_rope, _rms_norm_rope_backward)
layer_norm_modulate = Kernel(_layer_norm_modulate, _layer_norm_modulate_backward)
gelu_tanh = Kernel(_gelu_tanh, _gelu_tanh_backward)

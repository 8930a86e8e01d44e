"""Norms: npu_rms_norm, npu_add_layer_norm and their gradients, npu_layer_norm_eval and npu_rms_norm_quant.

Sources: torch_npu's pages of the operators and CANN's pages of aclnnRmsNorm, aclnnRmsNormGrad, aclnnAddLayerNorm and
aclnnRmsNormQuant. Statistics and sums are fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import layouts
from .dtypes import FLOATS, HALVES, encoded, require_hifloat8
from .rules import require, require_dtype, require_shape


def _over(gamma: Tensor, x: Tensor) -> tuple[int, ...]:
    """The dimensions of x that are normalized: as many as gamma has, from the end."""
    return tuple(range(x.ndim - gamma.ndim, x.ndim))


def _check_rms(op: str, x: Tensor, gamma: Tensor) -> None:
    require_dtype(op, "input", x, FLOATS)
    allowed = {x.dtype, torch.float32}
    require(op, gamma.dtype in allowed, "gamma has the dtype of input, or float32", (x.dtype, gamma.dtype))
    require(op, 1 <= gamma.ndim <= x.ndim <= 8, "input has 1 to 8 dimensions, gamma no more", (x.ndim, gamma.ndim))
    require_shape(op, "gamma", gamma, x.shape[x.ndim - gamma.ndim :])


def npu_rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """(y in the dtype of input, 1 / rms in fp32 with the normalized dimensions kept as 1)."""
    _check_rms("npu_rms_norm", input, gamma)
    x = input.float()
    rstd = torch.rsqrt(x.square().mean(_over(gamma, x), keepdim=True) + epsilon)
    return (x * rstd * gamma.float()).to(input.dtype), rstd


def npu_rms_norm_backward(dy: Tensor, input: Tensor, gamma: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """(dx in the dtype of input, dgamma in fp32 whatever the dtype of gamma)."""
    op = "npu_rms_norm_backward"
    _check_rms(op, input, gamma)
    require(op, input.ndim >= 2, "input has 2 to 8 dimensions", input.ndim)
    require_dtype(op, "dy", dy, (input.dtype,))
    require_shape(op, "dy", dy, input.shape)
    over = _over(gamma, input)
    require_dtype(op, "rstd", rstd, (torch.float32,))
    require_shape(op, "rstd", rstd, [*input.shape[: over[0]], *(1 for _ in over)])
    normalized = input.float() * rstd
    scaled = dy.float() * gamma.float()
    dx = (scaled - normalized * (scaled * normalized).mean(over, keepdim=True)) * rstd
    dgamma = (dy.float() * normalized).sum(tuple(range(over[0])))
    return dx.to(input.dtype), dgamma


def npu_rms_norm_quant(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    scale: Tensor,
    offset: Tensor,
    epsilon: float = 1e-6,
    *,
    dst_dtype: int | None = None,
) -> Tensor:
    """HiFloat8 codes of rms_norm(x) * scale + offset: `scale` multiplies."""
    op = "npu_rms_norm_quant"
    require_hifloat8(op, "only HiFloat8 is emulated (dst_dtype 290; None is int8)", dst_dtype)
    require_dtype(op, "x", x, FLOATS)
    for name, tensor in (("gamma", gamma), ("beta", beta)):
        require_dtype(op, name, tensor, (x.dtype,))
        require_shape(op, name, tensor, (x.shape[-1],), (1, x.shape[-1]))
    for name, tensor in (("scale", scale), ("offset", offset)):
        require_shape(op, name, tensor, (1,))
    allowed = [(x.dtype, x.dtype)]
    if x.dtype in HALVES:
        allowed += [(x.dtype, torch.int8), (torch.float32, torch.int32), (torch.float32, torch.float32)]
    dtypes = (scale.dtype, offset.dtype)
    require(op, dtypes in allowed, f"scale and offset go with {x.dtype} as documented", dtypes)
    wide = x.float()
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    y = wide * rstd * gamma.float().view(-1) + beta.float().view(-1)
    return encoded(y * scale.float() + offset.float())


def npu_layer_norm_eval(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """As torch.nn.functional.layer_norm; without a gradient."""
    op = "npu_layer_norm_eval"
    require_dtype(op, "input", input, FLOATS)
    shape = list(normalized_shape)
    found = list(input.shape[input.ndim - len(shape) :])
    require(op, found == shape, f"input ends in normalized_shape {shape}", found)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            require_dtype(op, name, tensor, (input.dtype,))
            require_shape(op, name, tensor, shape)
    wide = [None if t is None else t.float() for t in (weight, bias)]
    return torch.nn.functional.layer_norm(input.float(), shape, *wide, eps).to(input.dtype)


def npu_add_layer_norm(
    x1: Tensor,
    x2: Tensor,
    gamma: Tensor,
    beta: Tensor,
    epsilon: float = 1e-5,
    additional_output: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, mean, 1 / deviation, x1 + x2). The sum is only written if asked for."""
    op = "npu_add_layer_norm"
    out_dtype = _check_add_layer_norm(op, x1, x2, gamma)
    require_dtype(op, "beta", beta, (gamma.dtype,))
    require_shape(op, "beta", beta, gamma.shape)
    x = x1.float() + x2.float()
    over = _over(gamma, x)
    mean = x.mean(over, keepdim=True)
    rstd = torch.rsqrt((x - mean).square().mean(over, keepdim=True) + epsilon)
    y = (x - mean) * rstd * gamma.float() + beta.float()
    added = x.to(out_dtype) if additional_output else layouts.poisoned(x.shape, out_dtype)
    return y.to(out_dtype), mean, rstd, added


def npu_add_layer_norm_backward(
    dy_opt: Tensor | None,
    x1: Tensor,
    x2: Tensor,
    rstd: Tensor,
    mean: Tensor,
    gamma: Tensor,
    dsum_opt: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx1, dx2, dgamma, dbeta), the last two in fp32. `dsum_opt` is the gradient of x1 + x2."""
    op = "npu_add_layer_norm_backward"
    _check_add_layer_norm(op, x1, x2, gamma)
    x = x1.float() + x2.float()
    over = _over(gamma, x)
    for name, tensor in (("rstd", rstd), ("mean", mean)):
        require_dtype(op, name, tensor, (torch.float32,))
        require_shape(op, name, tensor, [*x.shape[: over[0]], *(1 for _ in over)])
    dy = torch.zeros_like(x) if dy_opt is None else dy_opt.float()
    normalized = (x - mean) * rstd
    scaled = dy * gamma.float()
    centred = scaled - scaled.mean(over, keepdim=True) - normalized * (scaled * normalized).mean(over, keepdim=True)
    dx = centred * rstd
    if dsum_opt is not None:
        dx = dx + dsum_opt.float()
    rows = tuple(range(over[0]))
    return dx.to(x1.dtype), dx.to(x2.dtype), (dy * normalized).sum(rows), dy.sum(rows)


def _check_add_layer_norm(op: str, x1: Tensor, x2: Tensor, gamma: Tensor) -> torch.dtype:
    """The dtype of the result."""
    for name, tensor in (("x1", x1), ("x2", x2), ("gamma", gamma)):
        require_dtype(op, name, tensor, FLOATS)
    out_dtype = x1.dtype if x1.dtype == x2.dtype else torch.float32
    require(
        op, out_dtype != torch.float32 or torch.float32 in (x1.dtype, x2.dtype), "x1 or x2 is float32, or both agree"
    )
    allowed = {torch.float32, out_dtype}
    require(op, gamma.dtype in allowed, "gamma and beta have the dtype of the result, or float32", gamma.dtype)
    require_shape(op, "x2", x2, x1.shape)
    require_shape(op, "gamma", gamma, x1.shape[x1.ndim - gamma.ndim :])
    return out_dtype


KERNELS: dict[str, Callable] = {
    "npu_rms_norm": npu_rms_norm,
    "npu_rms_norm_backward": npu_rms_norm_backward,
    "npu_rms_norm_quant": npu_rms_norm_quant,
    "npu_layer_norm_eval": npu_layer_norm_eval,
    "npu_add_layer_norm": npu_add_layer_norm,
    "npu_add_layer_norm_backward": npu_add_layer_norm_backward,
}

"""HiFloat8 as the training code of the released OSP-Next weights simulates it: scales in the dtype of the tensor. Only
for comparing a model with that code; never faster, and in no contract.

In bf16 the scale, its product with x and the last division are rounded. That moves values off the grid, by up to as
much as HiFloat8 itself rounds them. This arithmetic of scales is what is reproduced, as eager kernels round it: a
compiler that fuses steps may leave roundings out. Rounding to HiFloat8 is that of the format, from which each of
upstream's kernels deviates in some corner; and upstream quantizes q and k of self-attention in fp32, as its rotary
embedding returns them, while here they have the dtype of the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ospnext import ops
from ospnext.ops import HiF8Recipe

SMALLEST_AMAX = 1e-8


def fake_quantize(x: Tensor, scale_max: float) -> Tensor:
    """x through HiFloat8 and back with one scale, every step rounded to the dtype of x. Has no gradient."""
    # In torch a number divided by a tensor is its reciprocal, rounded, times the number.
    scale = x.abs().amax().clamp(min=SMALLEST_AMAX).reciprocal() * scale_max
    return ops.hif8_decode(ops.hif8_encode(x * scale), x.dtype) / scale


@dataclass(frozen=True)
class RoundTrip:
    """`fake_quantize` of a tensor, and of its gradient at the other scale."""

    recipe: HiF8Recipe

    def __call__(self, x: Tensor) -> Tensor:
        return _RoundTrip.apply(x, self.recipe.scale_max, self.recipe.grad_scale_max)


class UpstreamBf16Linear(nn.Linear):
    """`nn.Linear` on values that went through `fake_quantize`, and so are the factors of its gradients. Keeps both
    factors in the dtype of the input for the backward pass, the weight too.
    """

    recipe: HiF8Recipe

    @classmethod
    def of(cls, linear: nn.Linear, recipe: HiF8Recipe) -> UpstreamBf16Linear:
        """Take over the parameters of `linear`, not copies of them."""
        made = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        made.weight, made.bias, made.recipe = linear.weight, linear.bias, recipe
        return made.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        recipe = self.recipe
        return _Linear.apply(input, self.weight, self.bias, recipe.scale_max, recipe.grad_scale_max)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.recipe}"


class _RoundTrip(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale_max: float, grad_scale_max: float) -> Tensor:
        ctx.grad_scale_max = grad_scale_max
        return fake_quantize(x, scale_max)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return fake_quantize(grad, ctx.grad_scale_max), None, None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, scale_max: float, grad_scale_max: float
    ) -> Tensor:
        x_q, weight_q = fake_quantize(x, scale_max), fake_quantize(weight, scale_max).to(x.dtype)
        ctx.save_for_backward(x_q, weight_q)
        ctx.grad_scale_max = grad_scale_max
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return F.linear(x_q, weight_q, None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x_q, weight_q = ctx.saved_tensors
        of_weight, of_bias = ctx.dtypes
        grad_q = fake_quantize(grad, ctx.grad_scale_max)
        grad_MN = grad_q.flatten(0, -2)
        dx = grad_q @ weight_q if ctx.needs_input_grad[0] else None
        dweight = (grad_MN.T @ x_q.flatten(0, -2)).to(of_weight) if ctx.needs_input_grad[1] else None
        dbias = grad_MN.sum(0).to(of_bias) if ctx.needs_input_grad[2] else None
        return dx, dweight, dbias, None, None

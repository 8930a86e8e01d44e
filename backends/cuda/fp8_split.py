"""`cuda.fp8_split`: quantized linears on FP8 tensor cores with exact operands, for validation and not for speed.

E4M3 holds a power of two times a HiFloat8 value exactly but for the smallest. Those go into a second operand under a
larger power, each value in one of the two, so that a product is the sum of four whose factors are all exact. What then
still differs from `cuda.bf16_grid` are the tensor cores' sums, and what `cuda.fp8_carrier` loses beyond that is due to
its operands."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ospnext.numerics import hif8
from ospnext.numerics.carrier import DTYPE, LARGEST, shift_for

#: Of the small values: 2^-22 becomes 2^-6, the smallest normal E4M3 number, and nothing reaches 448.
SMALL_SHIFT = 16
#: What cuBLASLt asks of the inner dimension of FP8 products.
MULTIPLE = 16

Part = tuple[Tensor, int]


class Fp8Split:
    """Sums in fp32 as exact as the tensor cores make them, then scales, bias and one rounding."""

    def forward(self, x_codes, x_scale, weight_codes, weight_scale, bias, *, dtype, accumulate, scale_max) -> Tensor:
        shift = shift_for(scale_max)
        sums_MN = product(x_codes.reshape(-1, x_codes.shape[-1]), shift, weight_codes, shift)
        y_MN = sums_MN * x_scale.reshape(-1, 1) * weight_scale.reshape(-1)
        return (y_MN if bias is None else y_MN + bias).to(dtype).view(*x_codes.shape[:-1], len(weight_codes))

    def backward(
        self, grad_codes, grad_scale, x_codes, x_scale, weight_codes, weight_scale, *, dtypes, scale_max,
        grad_scale_max, **settings,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
        of_x, of_weight, of_bias = dtypes
        shift, grad_shift = shift_for(scale_max), shift_for(grad_scale_max)
        grad_MN = grad_codes.reshape(-1, grad_codes.shape[-1])
        dx = dweight = dbias = None
        if of_x is not None:
            dx = product(grad_MN, grad_shift, weight_codes.T, shift) * (grad_scale.view(1, 1) * weight_scale)
            dx = dx.to(of_x).view(x_codes.shape)
        if of_weight is not None:
            x_MK = x_codes.reshape(-1, x_codes.shape[-1])
            sums_NK = product(grad_MN.T, grad_shift, x_MK.T, shift)
            dweight = (sums_NK * (grad_scale.view(1, 1) * x_scale.view(1, 1))).to(of_weight)
        if of_bias is not None:
            dbias = (hif8.decode(grad_MN, torch.float32).sum(0) * grad_scale.reshape(())).to(of_bias)
        return dx, dweight, dbias


def product(a_MK: Tensor, a_shift: int, b_NK: Tensor, b_shift: int) -> Tensor:
    """fp32 [M, N]: a b^T of the values of HiFloat8 codes."""
    if 0 in a_MK.shape or 0 in b_NK.shape:
        return a_MK.new_zeros(len(a_MK), len(b_NK), dtype=torch.float32)
    parts = itertools.product(split(a_MK, a_shift), split(b_NK, b_shift))
    return sum(_scaled(a, b, 2.0 ** -(of_a + of_b)) for (a, of_a), (b, of_b) in parts)  # type: ignore[return-value]


def split(codes: Tensor, shift: int) -> Iterator[Part]:
    """E4M3 numbers and the power of two that they were multiplied by: the values that E4M3 holds with `shift`, and
    those too small for it. What is too large is NaN. The inner dimension is filled up with zeros.
    """
    values = F.pad(hif8.decode(codes, torch.float32), (0, -codes.shape[-1] % MULTIPLE))
    small, large = values.abs() < 2.0 ** (-8 - shift), values.abs() > LARGEST * 2.0**-shift
    yield (values * 2.0**shift).masked_fill(small, 0).masked_fill(large, torch.nan).to(DTYPE), shift
    yield (values * 2.0**SMALL_SHIFT).masked_fill(~small, 0).to(DTYPE), SMALL_SHIFT


def _scaled(a_MK: Tensor, b_NK: Tensor, by: float) -> Tensor:
    scale, one = (torch.full((), value, dtype=torch.float32, device=a_MK.device) for value in (by, 1.0))
    return torch._scaled_mm(a_MK, b_NK.T, scale, one, out_dtype=torch.float32, use_fast_accum=False)


fp8_split = Fp8Split()

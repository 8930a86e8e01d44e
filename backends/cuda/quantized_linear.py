"""`cuda.fp8_carrier` and `cuda.bf16_grid`: quantized linears on tensor cores, with operands that FP8 or bf16 carry.

FP8 E4M3 holds a power of two times a HiFloat8 value exactly but for the smallest ones, and Hopper's tensor cores add
FP8 products with fewer bits than fp32: both are far below the error of HiFloat8 itself. bf16 holds every value."""

from __future__ import annotations

import torch
from torch import Tensor

from ospnext.numerics import hif8
from ospnext.numerics.carrier import carried_scale, shift_for, values
from ospnext.ops.recipe import Accumulate

from .attention.operands import aligned
from .kernels.carrier import carried, carried_transposed

#: What cuBLASLt asks of the inner dimension of FP8 products.
MULTIPLE = 16


class Fp8Carrier:
    """A bf16 result; sums in the tensor cores' fast mode only on request. Scales per row in the forward pass only."""

    def forward(
        self,
        x_codes: Tensor,
        x_scale: Tensor,
        weight_codes: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        *,
        dtype: torch.dtype,
        accumulate: Accumulate,
        scale_max: float,
    ) -> Tensor:
        x_MK, weight_NK = x_codes.reshape(-1, x_codes.shape[-1]), weight_codes
        if x_codes.dtype == torch.uint8:
            shift = shift_for(scale_max)
            x_MK, weight_NK = carried(x_MK, shift), carried(weight_NK, shift)
            x_scale, weight_scale = carried_scale(x_scale, shift), carried_scale(weight_scale, shift)
        y_MN = _product(x_MK, x_scale, weight_NK, weight_scale, dtype, bias, fast=accumulate == "fast")
        return y_MN.view(*x_codes.shape[:-1], len(weight_codes))

    def backward(
        self,
        grad_codes: Tensor,
        grad_scale: Tensor,
        x_codes: Tensor,
        x_scale: Tensor,
        weight_codes: Tensor,
        weight_scale: Tensor,
        *,
        dtypes: tuple[torch.dtype | None, torch.dtype | None, torch.dtype | None],
        accumulate: Accumulate,
        scale_max: float,
        grad_scale_max: float,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        of_x, of_weight, of_bias = dtypes
        shift, grad_shift = shift_for(scale_max), shift_for(grad_scale_max)
        x_scale, weight_scale = carried_scale(x_scale, shift), carried_scale(weight_scale, shift)
        grad_by = carried_scale(grad_scale, grad_shift)
        grad_MN = grad_codes.reshape(-1, grad_codes.shape[-1])
        dx = dweight = dbias = None
        if of_x is not None:
            weight_KN = carried_transposed(weight_codes, shift)
            operand = carried(grad_MN, grad_shift)
            dx = _product(operand, grad_by, weight_KN, weight_scale, of_x).view(x_codes.shape)
        if of_weight is not None:
            grad_NM = carried_transposed(grad_MN, grad_shift, MULTIPLE)
            x_KM = carried_transposed(x_codes.reshape(-1, x_codes.shape[-1]), shift, MULTIPLE)
            dweight = _product(grad_NM, grad_by, x_KM, x_scale, of_weight)
        if of_bias is not None:
            dbias = _sum_of_rows(grad_MN, grad_scale).to(of_bias)
        return dx, dweight, dbias


class Bf16Grid:
    """Exact operands: every HiFloat8 value is a bf16 one. Sums in fp32, then scales, bias and one rounding."""

    def forward(self, x_codes, x_scale, weight_codes, weight_scale, bias, *, dtype, accumulate, scale_max) -> Tensor:
        x_MK, weight_NK = (values(t, torch.bfloat16).reshape(-1, t.shape[-1]) for t in (x_codes, weight_codes))
        y_MN = torch.mm(x_MK, weight_NK.T, out_dtype=torch.float32) * x_scale.reshape(-1, 1) * weight_scale.reshape(-1)
        return (y_MN if bias is None else y_MN + bias).to(dtype).view(*x_codes.shape[:-1], -1)

    def backward(
        self, grad_codes, grad_scale, x_codes, x_scale, weight_codes, weight_scale, *, dtypes, **settings
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        of_x, of_weight, of_bias = dtypes
        grad_codes = grad_codes.reshape(-1, grad_codes.shape[-1])
        grad_MN = hif8.decode(grad_codes, torch.bfloat16)
        dx = dweight = dbias = None
        if of_x is not None:
            weight_NK = hif8.decode(weight_codes, torch.bfloat16)
            product = torch.mm(grad_MN, weight_NK, out_dtype=torch.float32)
            dx = (product * (grad_scale.view(1, 1) * weight_scale)).to(of_x).view(x_codes.shape)
        if of_weight is not None:
            x_MK = hif8.decode(x_codes.reshape(-1, x_codes.shape[-1]), torch.bfloat16)
            product = torch.mm(grad_MN.T, x_MK, out_dtype=torch.float32)
            dweight = (product * (grad_scale.view(1, 1) * x_scale.view(1, 1))).to(of_weight)
        if of_bias is not None:
            dbias = _sum_of_rows(grad_codes, grad_scale).to(of_bias)
        return dx, dweight, dbias


def _product(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    fast: bool = False,
) -> Tensor:
    """a [M, K] b [N, K]^T of E4M3 numbers, with both scales: one value each, or a value for each row of either."""
    if 0 in a.shape or 0 in b.shape:
        rows = a.new_zeros(len(a), len(b), dtype=torch.float32)
        return (rows if bias is None else rows + bias).to(dtype)
    # Fresh memory for both scales, and for a bias of odd strides or offset: cuBLASLt refuses pointers of other
    # alignment.
    if a_scale.numel() == b_scale.numel() == 1:
        by_a, by_b = (a_scale * b_scale).reshape(()), torch.ones_like(a_scale).reshape(())
    else:
        by_a = a_scale.reshape(-1, 1).expand(len(a), 1).clone(memory_format=torch.contiguous_format)
        by_b = b_scale.reshape(1, -1).expand(1, len(b)).clone(memory_format=torch.contiguous_format)
        # cuBLASLt has no fast sums with a bias and scales per row for few output features.
        fast = fast and len(b) % 128 == 0
    bias = None if bias is None else bias.clone(memory_format=torch.contiguous_format)
    a, b = aligned(a), aligned(b)
    return torch._scaled_mm(a, b.T, by_a, by_b, bias=bias, out_dtype=dtype, use_fast_accum=fast)


def _sum_of_rows(grad_codes: Tensor, grad_scale: Tensor) -> Tensor:
    return hif8.decode(grad_codes, torch.bfloat16).sum(0, dtype=torch.float32) * grad_scale.reshape(())


fp8_carrier = Fp8Carrier()
bf16_grid = Bf16Grid()

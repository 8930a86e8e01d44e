"""`ascend.hif8` and `ascend.qdq`: quantized linears on HiFloat8 codes, where the NPU multiplies them, and on bf16
numbers of the same values, where it does not.

The vendor's operator has a bias that its documents put before the scales until July 2026, and after them since. Here
it is added outside, in fp32. npu_add_quant_matmul_, which adds a gradient to what is there, has no use as long as
gradients are returned."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch_npu
from torch import Tensor

from ospnext.numerics import hif8
from ospnext.ops.recipe import Accumulate

from .quantize import HIFLOAT8, decode

Product = Callable[[Tensor, Tensor, Tensor, Tensor, torch.dtype], Tensor]


class Linear:
    """`product(a [M, K], its scale, b [K, N], its scale, dtype)` adds up in fp32, scales in fp32 and rounds once.

    Scales hold one element, or one for each row of a and each column of b. Codes are kept and multiplied as they are,
    or as transposed views."""

    def __init__(self, product: Product, values: Callable[[Tensor, torch.dtype], Tensor]) -> None:
        self.product, self.values = product, values

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
        x_MK = x_codes.reshape(-1, x_codes.shape[-1])
        wide = dtype if bias is None else torch.float32
        y_MN = self.product(x_MK, x_scale, weight_codes.T, weight_scale, wide)
        y_MN = y_MN if bias is None else (y_MN + bias).to(dtype)
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
        grad_MN = grad_codes.reshape(-1, grad_codes.shape[-1])
        dx = dweight = dbias = None
        if of_x is not None:
            dx = self.product(grad_MN, grad_scale, weight_codes, weight_scale, of_x).view(x_codes.shape)
        if of_weight is not None:
            x_MK = x_codes.reshape(-1, x_codes.shape[-1])
            dweight = self.product(grad_MN.T, grad_scale, x_MK, x_scale, of_weight)
        if of_bias is not None:
            summed = self.values(grad_MN, torch.bfloat16).sum(0, dtype=torch.float32)
            dbias = (summed * grad_scale.reshape(())).to(of_bias)
        return dx, dweight, dbias


def _of_codes(a_MK: Tensor, a_scale: Tensor, b_KN: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """npu_quant_matmul with a scale for each row and each column, whatever is given.

    With one scale for each factor it would multiply by their product cut to 11 bits, up to 2^-10 too small: so the
    vendor's sources. A result of one element leaves it no other form, and is scaled outside."""
    rows, columns = (
        scale.reshape(-1).expand(n).contiguous() for scale, n in ((a_scale, len(a_MK)), (b_scale, b_KN.shape[1]))
    )
    if len(rows) > 1 or len(columns) > 1:
        return _multiply(a_MK, rows, b_KN, columns, dtype)
    one = torch.ones_like(rows)
    return (_multiply(a_MK, one, b_KN, one, torch.float32) * rows * columns).to(dtype)


def _multiply(a_MK: Tensor, rows_M: Tensor, b_KN: Tensor, columns_N: Tensor, dtype: torch.dtype) -> Tensor:
    return torch_npu.npu_quant_matmul(
        _dense(a_MK),
        _dense(b_KN),
        columns_N,
        pertoken_scale=rows_M,
        output_dtype=dtype,
        x1_dtype=HIFLOAT8,
        x2_dtype=HIFLOAT8,
    )


def _dense(codes: Tensor) -> Tensor:
    """As the operator takes them: a matrix without gaps or the transpose of one. Others are copied."""
    if codes.dtype != torch.uint8:
        raise ValueError(f"npu_quant_matmul: HiFloat8 codes are uint8 here; got {codes.dtype}")
    return codes if codes.is_contiguous() or codes.T.is_contiguous() else codes.contiguous()


def _of_values(a_MK: Tensor, a_scale: Tensor, b_KN: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Every HiFloat8 value is a bf16 number."""
    sums_MN = torch.mm(*(hif8.decode(t, torch.bfloat16) for t in (a_MK, b_KN)), out_dtype=torch.float32)
    return (sums_MN * a_scale.reshape(-1, 1) * b_scale.reshape(-1)).to(dtype)


native = Linear(_of_codes, decode)
qdq = Linear(_of_values, hif8.decode)

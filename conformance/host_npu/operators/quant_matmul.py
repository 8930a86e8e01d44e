"""npu_quant_matmul and npu_add_quant_matmul_ on HiFloat8 codes: exact products, sums in fp32.

Sources: torch_npu's pages of the operators, CANN's pages of aclnnQuantMatmulV5 and aclnnQuantBatchMatmulInplaceAdd.
The pages do not agree in two places, and here the reading holds that no call may depend on: bias is added before the
scales (pages until July 2026; since August 2026 they say after), and one scale for x1 beside one per column of x2
("T-C") is refused (torch_npu's page asks for one per row, CANN's lists it). With one scale each ("T-T") the published
kernels multiply by the product of both, cut off to the 19 bits that the hardware's output path takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .dtypes import FLOATS, decoded, require_codes, require_hifloat8, torch_dtype
from .rules import require, require_absent, require_dtype, require_shape


def npu_quant_matmul(
    x1: Tensor,
    x2: Tensor,
    scale: Tensor,
    *,
    offset: Tensor | None = None,
    pertoken_scale: Tensor | None = None,
    bias: Tensor | None = None,
    output_dtype: int | None = None,
    x1_dtype: int | None = None,
    x2_dtype: int | None = None,
    pertoken_scale_dtype: int | None = None,
    scale_dtype: int | None = None,
    group_sizes: Sequence[int] | None = None,
    y_scale: Tensor | None = None,
) -> Tensor:
    """(x1 @ x2 + bias) * scale * pertoken_scale of codes x1 [..., M, K] and x2 [..., K, N].

    `scale` belongs to x2 and `pertoken_scale` to x1: [1] and [1] ("T-T"), [1] and [M] ("K-T"), [N] and [M] ("K-C").
    Either operand may be a transposed view, but no other view.
    """
    op = "npu_quant_matmul"
    require_absent(
        op,
        offset=offset,
        y_scale=y_scale,
        pertoken_scale_dtype=pertoken_scale_dtype,
        scale_dtype=scale_dtype,
        group_sizes=group_sizes or None,
    )
    require_hifloat8(op, "only HiFloat8 is emulated (x1_dtype and x2_dtype 290)", x1_dtype, x2_dtype)
    require(op, output_dtype is not None, "output_dtype is given (None means int8)")
    assert output_dtype is not None
    out_dtype = torch_dtype(op, "output_dtype", output_dtype)
    require(op, out_dtype in FLOATS, "output_dtype is float16, bfloat16 or float32", out_dtype)
    for name, tensor in (("x1", x1), ("x2", x2)):
        require_codes(op, name, tensor)
        require(op, 2 <= tensor.ndim <= 6, f"{name} has 2 to 6 dimensions", tensor.ndim)
        require(op, _plain(tensor), f"{name} is contiguous, or the transpose of something contiguous", tensor.stride())
    rows, inner, columns = x1.shape[-2], x1.shape[-1], x2.shape[-1]
    require(op, inner == x2.shape[-2] and inner > 0, "x1 has as many columns as x2 has rows", (inner, x2.shape[-2]))
    _check_scales(op, rows, columns, scale, pertoken_scale)
    assert pertoken_scale is not None
    y = decoded(x1) @ decoded(x2)
    if bias is not None:
        require_dtype(op, "bias", bias, (torch.float32,))
        require_shape(op, "bias", bias, (columns,))
        y += bias
    if len(scale) == len(pertoken_scale) == 1:
        y *= _of_output_path(scale * pertoken_scale)
    else:
        y *= scale
        y *= pertoken_scale.view(-1, 1)
    return y.to(out_dtype)


def npu_add_quant_matmul_(
    input: Tensor,
    x1: Tensor,
    x2: Tensor,
    x2_scale: Tensor,
    *,
    x1_scale: Tensor | None = None,
    group_sizes: Sequence[int] | None = None,
    x1_dtype: int | None = None,
    x2_dtype: int | None = None,
    x1_scale_dtype: int | None = None,
    x2_scale_dtype: int | None = None,
) -> Tensor:
    """Adds x1 @ x2 * x1_scale * x2_scale to input [M, N] in fp32, for codes x1 [M, K] and x2 [K, N].

    x1 is the transposed view of something contiguous [K, M], and x2 is contiguous: the device takes no other form.
    """
    op = "npu_add_quant_matmul_"
    require_absent(op, x1_scale_dtype=x1_scale_dtype, x2_scale_dtype=x2_scale_dtype)
    require(op, not group_sizes or list(group_sizes) == [0, 0, 0], "group_sizes is [0, 0, 0] for HiFloat8", group_sizes)
    require_hifloat8(op, "only HiFloat8 is emulated (x1_dtype and x2_dtype 290)", x1_dtype, x2_dtype)
    require_dtype(op, "input", input, (torch.float32,))
    for name, tensor in (("x1", x1), ("x2", x2)):
        require_codes(op, name, tensor)
        require(op, tensor.ndim == 2, f"{name} has 2 dimensions", tensor.ndim)
    require(op, x1.t().is_contiguous(), "x1 is the transpose of something contiguous", x1.stride())
    require(op, x2.is_contiguous(), "x2 is contiguous", x2.stride())
    inner = (x1.shape[1], x2.shape[0])
    require(op, inner[0] == inner[1] > 0, "x1 has as many columns as x2 has rows", inner)
    require_shape(op, "input", input, (x1.shape[0], x2.shape[1]))
    require(op, x1_scale is not None, "x1_scale is given")
    assert x1_scale is not None
    for name, tensor in (("x1_scale", x1_scale), ("x2_scale", x2_scale)):
        require_dtype(op, name, tensor, (torch.float32,))
        require_shape(op, name, tensor, (1,))
    return input.add_((decoded(x1) @ decoded(x2)).mul_(_of_output_path(x1_scale * x2_scale)))


def _of_output_path(scale: Tensor) -> Tensor:
    """fp32 with 10 bits of mantissa; the others are dropped, not rounded."""
    return (scale.view(torch.int32) & ~0x1FFF).view(torch.float32)


def _plain(codes: Tensor) -> bool:
    return codes.is_contiguous() or codes.transpose(-1, -2).is_contiguous()


def _check_scales(op: str, rows: int, columns: int, scale: Tensor, pertoken_scale: Tensor | None) -> None:
    require(op, pertoken_scale is not None, "pertoken_scale is given beside a float32 scale, for HiFloat8")
    assert pertoken_scale is not None
    for name, tensor in (("scale", scale), ("pertoken_scale", pertoken_scale)):
        require_dtype(op, name, tensor, (torch.float32,))
        require(op, tensor.ndim == 1, f"{name} has one dimension", tensor.ndim)
    sizes = (len(scale), len(pertoken_scale))
    allowed = {(1, 1), (1, rows), (columns, rows)}
    rule = "scale of x2 and pertoken_scale have sizes (1, 1), (1, M) or (N, M)"
    require(op, sizes in allowed, rule, f"{sizes} with M {rows} and N {columns}")


KERNELS: dict[str, Callable] = {
    "npu_quant_matmul": npu_quant_matmul,
    "npu_add_quant_matmul_": npu_add_quant_matmul_,
}

"""`reference.hif8`: the quantized linear layer as its formula, in fp32 (fp64 on request) on values of the grid."""

from __future__ import annotations

import torch
from torch import Tensor

from ospnext.numerics import carrier
from ospnext.ops.recipe import Accumulate


class QuantizedLinear:
    """Readable first: each product is one line, sum before scales before bias before the rounding."""

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
        wide = _wide(accumulate, dtype)
        y = (carrier.values(x_codes, wide) @ carrier.values(weight_codes, wide).T) * x_scale * weight_scale.T.squeeze(0)
        return (y if bias is None else y + bias.to(wide)).to(dtype)

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
        wide = _wide(accumulate, *dtypes)
        grad, grad_scale = carrier.values(grad_codes, wide), grad_scale.reshape(())
        dx = dweight = dbias = None
        if of_x is not None:
            dx = ((grad @ carrier.values(weight_codes, wide)) * grad_scale * weight_scale.squeeze(0)).to(of_x)
        grad_MN = grad.reshape(-1, grad.shape[-1])
        if of_weight is not None:
            x_MK = carrier.values(x_codes, wide).reshape(-1, x_codes.shape[-1])
            dweight = ((grad_MN.T @ x_MK) * grad_scale * x_scale.reshape(())).to(of_weight)
        if of_bias is not None:
            dbias = (grad_MN.sum(0) * grad_scale).to(of_bias)
        return dx, dweight, dbias


def _wide(accumulate: Accumulate, *dtypes: torch.dtype | None) -> torch.dtype:
    return torch.float64 if accumulate == "fp64" or torch.float64 in dtypes else torch.float32


linear = QuantizedLinear()

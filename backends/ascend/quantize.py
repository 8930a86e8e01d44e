"""`ascend.quantize` and `ascend.cast`: HiFloat8 by the vendor's operators, which hold codes as uint8.

By the vendor's sources, npu_quantize saturates: what is not finite becomes 32768 or zero without a word. npu_dtype_cast
keeps Inf and NaN. npu_dynamic_quant is not used: its scale is a product with 1 / scale_max, zeros have a scale of 0,
and it saturates, none of which the contract allows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch_npu
from torch import Tensor

from ospnext.numerics import hif8
from ospnext.numerics.scaling import Granularity, ScaleMode, amax_of, scale_of

#: A number, not a torch.dtype: only operators of torch_npu know it.
HIFLOAT8: int = torch_npu.hifloat8


def encode(x: Tensor, saturate: bool) -> Tensor:
    return _cast(x)


def decode(codes: Tensor, dtype: torch.dtype) -> Tensor:
    return torch_npu.npu_dtype_cast(codes.contiguous(), dtype, input_dtype=HIFLOAT8)


def _cast(x: Tensor) -> Tensor:
    """Codes of x. The operator refuses what requires a gradient, whether or not one is asked for."""
    return torch_npu.npu_dtype_cast(x.detach().contiguous(), HIFLOAT8)


def _divided_and_cast(x: Tensor, scale: Tensor) -> Tensor:
    return _cast(x.to(torch.float32, copy=True).div_(scale))


@dataclass(frozen=True)
class Quantizer:
    """Scales by PyTorch's operators, as everywhere; `codes_of(x, scale)` gives codes of x / scale, which is within the
    range of the format. An amax from elsewhere may be too small for that, and then Inf must show.
    """

    codes_of: Callable[[Tensor, Tensor], Tensor]

    def quantize(
        self, x: Tensor, amax: Tensor | None, *, scale_max: float, scale_mode: ScaleMode, granularity: Granularity
    ) -> tuple[Tensor, Tensor]:
        """(codes, scale)."""
        x = x.detach()
        codes_of = self.codes_of if amax is None else _divided_and_cast
        scale = scale_of(amax_of(x, granularity) if amax is None else amax, scale_max, scale_mode)
        return codes_of(x, scale) if x.numel() else _no_codes(x), scale

    def fake_quantize(
        self, x: Tensor, amax: Tensor | None, *, scale_max: float, scale_mode: ScaleMode, granularity: Granularity
    ) -> Tensor:
        """The values that `quantize` stands for, in the dtype of x."""
        codes, scale = self.quantize(x, amax, scale_max=scale_max, scale_mode=scale_mode, granularity=granularity)
        return decode(codes, torch.float32).mul_(scale).to(x.dtype)


def _by_quantize(x: Tensor, scale: Tensor) -> Tensor:
    """npu_quantize in fp32: for narrower x its scales would have to be as narrow.

    Its scales are one number or a vector along one axis, so that x becomes a matrix. Where a scale is NaN, so must be
    the codes."""
    if scale.numel() == 1:
        codes = _quantized(x.reshape(-1), scale, 0)
    elif scale.shape == (*x.shape[:-1], 1):  # for each row
        codes = _quantized(x.reshape(-1, x.shape[-1]), scale, 0)
    else:  # for each channel: batches stand beside one another
        columns = x.movedim(-2, 0)
        codes = _quantized(columns.reshape(len(columns), -1), scale, 1).view(columns.shape).movedim(0, -2).contiguous()
    return codes.view(x.shape).masked_fill_(scale.isnan(), hif8.NAN)


def _quantized(x: Tensor, scale: Tensor, axis: int) -> Tensor:
    return torch_npu.npu_quantize(x.float(), scale.reshape(-1), None, HIFLOAT8, axis, True)


def _no_codes(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=torch.uint8, device=x.device)


_by_cast, _in_one = Quantizer(_divided_and_cast), Quantizer(_by_quantize)
cast_quantize, cast_fake_quantize = _by_cast.quantize, _by_cast.fake_quantize
quantize, fake_quantize = _in_one.quantize, _in_one.fake_quantize

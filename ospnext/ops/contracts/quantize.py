"""The quantize family: HiFloat8 casts and the products that use them. Request type and meaning; kernels and ops come
with HiF8.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ospnext.ops.contract import Contract

MEANING = """\
Codes       uint8, one HiFloat8 value each. Rounding is to nearest, ties away from zero; magnitudes of 40960 and more
            become Inf (32768 when saturating), below 2^-23 zero, 2^-23 itself 2^-22. NaN is 0x80; there is no negative
            zero.
Scale       s = amax / scale_max in fp32 over the granularity, 1 for an all-zero tensor; code = round(x / s) by
            division.
Linear      product of grid values with fp32 (or better) accumulation, times the two scales, then the bias, then one
            cast.
Attention   q, k and v quantized and dequantized, then the attention contract."""


@dataclass(frozen=True)
class QuantizeRequest:
    """What selection knows of a call; `shape` is that of the tensor to quantize, or (M, N, K) of a linear."""

    device_type: str
    dtype: torch.dtype
    operation: Literal["encode", "decode", "quantize", "linear", "attention"]
    shape: tuple[int, ...]
    granularity: Literal["tensor", "row", "channel"] = "tensor"
    scale_mode: Literal["amax", "pow2"] = "amax"
    saturate: bool = False
    accumulate: Literal["fp32", "fp64"] = "fp32"
    backward: bool = False


#: No contract yet: one is listed only once its op, oracle and cases exist.
CONTRACTS: tuple[Contract, ...] = ()

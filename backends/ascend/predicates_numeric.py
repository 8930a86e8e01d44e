"""What the implementations of the quantize and fused families cannot take, as reasons: limits of the vendor's
operators, for each generation of NPU. Pure functions of the request and the device.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ospnext.ops.contract import Need, need
from ospnext.ops.contracts.fused import FusedRequest
from ospnext.ops.contracts.hif8_cast import CastRequest
from ospnext.ops.contracts.quantize import QuantizeRequest
from ospnext.ops.contracts.quantized_linear import QuantizedLinearRequest
from ospnext.ops.registry import DeviceInfo

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
#: Of the innermost dimension of a factor, as npu_quant_matmul documents it.
LONGEST_ROW = 65_535
#: Samples times heads in one call of npu_rotary_mul, interleaved, before Ascend 950: fused.py makes several of more.
MOST_TURNED = 999


def hif8(request: CastRequest | QuantizeRequest, device: DeviceInfo) -> Iterator[Need]:
    """Casts to and from HiFloat8, alone or after a division."""
    yield _has_hif8(device)
    yield _float(request.dtype)


def hif8_matmul(request: QuantizedLinearRequest, device: DeviceInfo) -> Iterator[Need]:
    """npu_quant_matmul on HiFloat8 codes."""
    _, features, inner = request.shape
    yield _has_hif8(device)
    yield from _linear(request)
    yield need(
        max(features, inner) <= LONGEST_ROW,
        "row",
        got=f"{inner} -> {features}",
        want=f"at most {LONGEST_ROW} input and output features",
    )


def qdq(request: QuantizedLinearRequest, device: DeviceInfo) -> Iterator[Need]:
    """Products in bf16 with fp32 sums, on any generation."""
    yield from _linear(request)


def _linear(request: QuantizedLinearRequest) -> Iterator[Need]:
    yield _float(request.dtype)
    yield need(request.accumulate != "fp64", "accumulate", got=request.accumulate, want="fp32 or fast")
    yield _not_empty(request.shape)


def elements(request: FusedRequest, device: DeviceInfo) -> Iterator[Need]:
    """Operators that take any shape, but no fp64 and nothing empty."""
    yield _float(request.dtype)
    yield _not_empty(request.shape)


def rope(request: FusedRequest, device: DeviceInfo) -> Iterator[Need]:
    """npu_rotary_mul on interleaved pairs, x [B, S, N, D] with angles [1, S, 1, D]."""
    yield from elements(request, device)
    yield from rotary(device.capability, request.shape[-1])


def rotary(generation: str, head_dim: int) -> Iterator[Need]:
    """The limit of npu_rotary_mul that splitting a call does not avoid. Its meta kernel checks none."""
    widest = 1024 if generation == "950" else 894
    yield need(
        head_dim % 2 == 0 and head_dim <= widest, "head_dim", got=head_dim, want=f"an even number up to {widest}"
    )


def _has_hif8(device: DeviceInfo) -> Need:
    return need(device.capability == "950", "soc", got=device.capability, want="950, which computes in HiFloat8")


def _float(dtype: torch.dtype) -> Need:
    return need(dtype in _FLOATS, "dtype", got=dtype, want="fp32, bf16 or fp16")


def _not_empty(shape: tuple[int, ...]) -> Need:
    return need(0 not in shape, "size", got=shape, want="at least one element")

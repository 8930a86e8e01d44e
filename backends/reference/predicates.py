"""What the reference implementations cannot take, as reasons. Pure functions of the request and the device."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ospnext.ops.contract import Need, need
from ospnext.ops.contracts.attention import AttentionRequest
from ospnext.ops.contracts.collective import CollectiveRequest
from ospnext.ops.registry import DeviceInfo

#: PyTorch's kernel adds 16-bit gradients up in 16 bits, block after block: beyond this many tokens the error is more
#: than twice that of plain rounding and grows with the square root of the length.
MAX_16_BIT_GRADIENT = 8192


def sdpa(request: AttentionRequest, device: DeviceInfo) -> Iterator[Need]:
    """PyTorch's flash attention for CPU exists on CPU only, and not for empty tensors."""
    yield need(request.device_type == "cpu", "device", got=request.device_type, want="cpu")
    yield need(
        request.dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16),
        "dtype",
        got=request.dtype,
        want="fp32, fp64, bf16 or fp16",
    )
    yield need(
        request.kv_len > 0 and request.q_len > 0, "length", got=f"{request.q_len}x{request.kv_len}", want="at least 1x1"
    )
    longest = max(request.q_len, request.kv_len)
    yield need(
        not request.backward or request.dtype.itemsize > 2 or longest <= MAX_16_BIT_GRADIENT,
        "gradient_length",
        got=f"{longest} tokens in {request.dtype} with gradients",
        want=f"at most {MAX_16_BIT_GRADIENT}, where 16-bit gradients are added up in 16 bits",
    )


def gloo(request: CollectiveRequest, device: DeviceInfo) -> Iterator[Need]:
    """gloo has no types of eight bits but integers and bool; HiF8 codes are uint8."""
    yield need(
        request.dtype in _SENT_BY_GLOO, "dtype", got=request.dtype, want="fp32, fp64, bf16, fp16, bool or an integer"
    )


_SENT_BY_GLOO = (
    *(torch.float32, torch.float64, torch.bfloat16, torch.float16),
    *(torch.uint8, torch.int8, torch.int32, torch.int64, torch.bool),
)

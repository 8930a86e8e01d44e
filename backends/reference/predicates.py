"""What the reference implementations cannot take, as reasons. Pure functions of the request and the device."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ospnext.ops.contract import Need, need
from ospnext.ops.contracts.attention import AttentionRequest
from ospnext.ops.registry import DeviceInfo


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

"""What the CUDA implementations cannot take, as reasons. Pure functions of the request and the device."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ospnext.ops.contract import Need, need
from ospnext.ops.contracts.attention import AttentionRequest
from ospnext.ops.registry import DeviceInfo

_HALF = (torch.bfloat16, torch.float16)


def fa4(request: AttentionRequest, device: DeviceInfo) -> Iterator[Need]:
    """FlashAttention-4 on Hopper; other generations of its kernels were not run here."""
    yield need(
        device.capability[0] == 9, "capability", got=device.capability, want="9.0 (other kernels of it are untested)"
    )
    yield from _flash(request, 256)


def flash(request: AttentionRequest, device: DeviceInfo) -> Iterator[Need]:
    """PyTorch's FlashAttention-2."""
    yield from _flash(request, 256)


def _flash(request: AttentionRequest, widest: int) -> Iterator[Need]:
    yield need(request.dtype in _HALF, "dtype", got=request.dtype, want="bf16 or fp16")
    yield need(
        request.head_dim % 8 == 0 and request.head_dim <= widest,
        "head_dim",
        got=request.head_dim,
        want=f"a multiple of 8 up to {widest}",
    )
    yield need(
        request.q_len > 0 and request.kv_len > 0, "length", got=f"{request.q_len}x{request.kv_len}", want="at least 1x1"
    )


def cudnn(request: AttentionRequest, device: DeviceInfo) -> Iterator[Need]:
    """cuDNN's fused attention, as PyTorch calls it."""
    yield from _flash(request, 128)
    yield need(device.capability[0] >= 8, "capability", got=device.capability, want="at least 8.0")

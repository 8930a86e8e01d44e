"""What the CUDA implementations cannot take, as reasons. Pure functions of the request and the device."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ospnext.ops.contract import Need, need
from ospnext.ops.contracts.attention import AttentionRequest
from ospnext.ops.contracts.collective import CollectiveRequest
from ospnext.ops.contracts.quantize import QuantizeRequest
from ospnext.ops.contracts.quantized_linear import QuantizedLinearRequest
from ospnext.ops.registry import DeviceInfo

_HALF = (torch.bfloat16, torch.float16)


def fa4(request: AttentionRequest, device: DeviceInfo) -> Iterator[Need]:
    """FlashAttention-4 on Hopper; other generations of its kernels were not run here."""
    yield need(
        device.capability[0] == 9, "capability", got=device.capability, want="9.0 (other kernels of it are untested)"
    )
    yield from _flash(request, 256)
    yield need(
        not request.backward or request.head_dim % 32 == 0,
        "gradient_head_dim",
        got=request.head_dim,
        want="a multiple of 32 with gradients: at 40 and 80 its dq was wrong by a hundred times plain rounding",
    )


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


def nccl(request: CollectiveRequest, device: DeviceInfo) -> Iterator[Need]:
    """NCCL refuses two ranks on one GPU. Only the GPUs of this machine are counted so far."""
    yield need(
        request.ranks <= device.count,
        "ranks",
        got=f"{request.ranks} ranks and {device.count} GPU{'s' if device.count > 1 else ''} on this machine",
        want="a GPU for each rank",
    )
    yield need(request.dtype.itemsize > 1 or request.dtype == torch.uint8, "dtype", got=request.dtype, want="uint8")


def triton_quantize(request: QuantizeRequest, device: DeviceInfo) -> Iterator[Need]:
    """The Triton kernel divides in fp32 and has a scale for all or for each row."""
    yield need(request.dtype != torch.float64, "dtype", got=request.dtype, want="fp32, bf16 or fp16")
    yield need(request.granularity != "channel", "granularity", got=request.granularity, want="tensor or row")


def fp8_carrier(request: QuantizedLinearRequest, device: DeviceInfo) -> Iterator[Need]:
    """FP8 tensor cores, by way of cuBLASLt."""
    _, features, inner = request.shape
    yield need(device.capability >= (8, 9), "capability", got=device.capability, want="at least 8.9, which has FP8")
    yield need(request.dtype == torch.bfloat16, "dtype", got=request.dtype, want="bf16, whose rounding hides FP8 sums")
    yield need(
        features % 16 == 0 and inner % 16 == 0 and features * inner > 0,
        "alignment",
        got=f"{inner} -> {features}",
        want="input and output features that are multiples of 16",
    )
    for name in ("scale_max", "grad_scale_max"):
        largest = getattr(request, name)
        yield need(largest <= 448, name, got=largest, want="at most 448, the largest E4M3 value")
    rows = "row" in (request.x_granularity, request.weight_granularity)
    yield need(not rows, "granularity", got="a scale for each row", want="scales per tensor")
    yield need(request.accumulate == "fp32", "accumulate", got=request.accumulate, want="fp32")


def bf16_grid(request: QuantizedLinearRequest, device: DeviceInfo) -> Iterator[Need]:
    """bf16 tensor cores with fp32 sums."""
    yield need(request.accumulate == "fp32", "accumulate", got=request.accumulate, want="fp32")
    yield need(request.dtype != torch.float64, "dtype", got=request.dtype, want="fp32, bf16 or fp16")
    yield need(0 not in request.shape, "size", got=request.shape, want="at least one token and feature")

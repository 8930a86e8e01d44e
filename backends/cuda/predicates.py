"""What the CUDA implementations cannot take, as reasons. Pure functions of the request and the device."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from ospnext.ops.contract import Need, need
from ospnext.ops.contracts.attention import AttentionRequest
from ospnext.ops.contracts.collective import CollectiveRequest, each_has_a_device
from ospnext.ops.contracts.fused import FusedRequest
from ospnext.ops.contracts.fused_quantize import FusedQuantizeRequest
from ospnext.ops.contracts.native_attention import NativeAttentionRequest
from ospnext.ops.contracts.quantize import QuantizeRequest
from ospnext.ops.contracts.quantized_linear import QuantizedLinearRequest
from ospnext.ops.registry import DeviceInfo

_HALF = (torch.bfloat16, torch.float16)
#: Elements of a row that the registers of a program hold, in the kernels that keep one.
LONGEST_ROW = 16_384


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


def fa3(request: AttentionRequest, device: DeviceInfo) -> Iterator[Need]:
    """FlashAttention-3, which is made for Hopper; its kernels for older GPUs are those of FlashAttention-2."""
    yield need(device.capability[0] == 9, "capability", got=device.capability, want="9.0, Hopper")
    yield from _flash(request, 256)
    yield need(
        not (request.backward and request.deterministic) or request.head_dim <= 192,
        "deterministic_head_dim",
        got=request.head_dim,
        want="at most 192 with deterministic gradients",
    )


def fa2(request: AttentionRequest, device: DeviceInfo) -> Iterator[Need]:
    """FlashAttention-2 of the package flash-attn."""
    yield need(device.capability[0] >= 8, "capability", got=device.capability, want="at least 8.0")
    yield from _flash(request, 256)


def flash(request: AttentionRequest, device: DeviceInfo) -> Iterator[Need]:
    """PyTorch's FlashAttention-2."""
    yield from _flash(request, 256)


def _flash(request: AttentionRequest, widest: int) -> Iterator[Need]:
    yield need(request.dtype in _HALF, "dtype", got=request.dtype, want="bf16 or fp16")
    yield from _shapes(request, widest)


def _shapes(request: AttentionRequest, widest: int) -> Iterator[Need]:
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


def efficient(request: AttentionRequest, device: DeviceInfo) -> Iterator[Need]:
    """PyTorch's memory-efficient attention. No case judges head sizes above 256, which it takes."""
    yield need(
        request.dtype in _HALF,
        "dtype",
        got=request.dtype,
        want="bf16 or fp16 (fp32 it multiplies as three TF32 products, beyond the contract's bounds)",
    )
    yield from _shapes(request, 256)
    yield need(request.batch < 1 << 16, "batch", got=request.batch, want="at most 65535, the third side of a grid")


def nccl(request: CollectiveRequest, device: DeviceInfo) -> Iterator[Need]:
    """NCCL refuses two ranks on one GPU; each may see its own alone."""
    yield each_has_a_device(request, device, "GPU")
    yield need(request.dtype.itemsize > 1 or request.dtype == torch.uint8, "dtype", got=request.dtype, want="uint8")


def triton_quantize(request: QuantizeRequest, device: DeviceInfo) -> Iterator[Need]:
    """The Triton kernel divides in fp32 and has a scale for all or for each row."""
    yield need(request.dtype != torch.float64, "dtype", got=request.dtype, want="fp32, bf16 or fp16")
    yield need(request.granularity != "channel", "granularity", got=request.granularity, want="tensor or row")
    yield _carrier(request.carried, device)


def triton_elements(request: FusedRequest, device: DeviceInfo) -> Iterator[Need]:
    """Triton kernels that compute in fp32, element by element."""
    yield need(request.dtype in (*_HALF, torch.float32), "dtype", got=request.dtype, want="fp32, bf16 or fp16")


def triton_rows(request: FusedRequest, device: DeviceInfo) -> Iterator[Need]:
    """Those of which a program holds a whole row."""
    yield from triton_elements(request, device)
    row = math.prod(request.shape[-1:])
    yield need(row <= LONGEST_ROW, "row", got=f"{row} channels", want=f"at most {LONGEST_ROW}")


def triton_codes(request: FusedQuantizeRequest, device: DeviceInfo) -> Iterator[Need]:
    """The same where rows end in codes."""
    yield from triton_rows(request, device)
    yield _carrier(request.carried, device)


def _carrier(carried: bool, device: DeviceInfo) -> Need:
    has_fp8 = device.capability >= (8, 9)
    return need(not carried or has_fp8, "capability", got=device.capability, want="at least 8.9 for carried codes")


def cublas_epilogue(request: FusedRequest, device: DeviceInfo) -> Iterator[Need]:
    """Products that cuBLASLt ends with an activation."""
    yield need(request.dtype in _HALF, "dtype", got=request.dtype, want="bf16 or fp16")
    yield need(0 not in request.shape, "size", got=request.shape, want="at least one token and feature")


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
    yield need(
        not (rows and request.backward),
        "granularity",
        got="a scale for each row",
        want="scales per tensor in gradients",
    )
    yield need(request.accumulate != "fp64", "accumulate", got=request.accumulate, want="fp32 or fast")


def bf16_grid(request: QuantizedLinearRequest, device: DeviceInfo) -> Iterator[Need]:
    """bf16 tensor cores with fp32 sums."""
    yield need(request.accumulate != "fp64", "accumulate", got=request.accumulate, want="fp32 or fast")
    yield need(request.dtype != torch.float64, "dtype", got=request.dtype, want="fp32, bf16 or fp16")
    yield need(0 not in request.shape, "size", got=request.shape, want="at least one token and feature")


def cudnn_fp8(request: NativeAttentionRequest, device: DeviceInfo) -> Iterator[Need]:
    """cuDNN's FP8 attention on Hopper; on later cards it differs, in the dtypes of its result for one."""
    yield need(device.capability == (9, 0), "capability", got=device.capability, want="9.0, Hopper")
    yield need(request.dtype == torch.bfloat16, "dtype", got=request.dtype, want="bf16")
    yield need(
        request.head_dim % 16 == 0 and 0 < request.head_dim <= 128,
        "head_dim",
        got=request.head_dim,
        want="a multiple of 16 up to 128",
    )
    yield need(
        min(request.batch, request.q_len, request.kv_len) > 0,
        "length",
        got=f"{request.batch} of {request.q_len}x{request.kv_len}",
        want="at least one of 1x1",
    )
    yield need(request.scale_max <= 448, "scale_max", got=request.scale_max, want="at most 448, the largest E4M3 value")

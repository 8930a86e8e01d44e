"""What the attention of Ascend cannot take, as reasons: limits that the vendor's documents state, for each generation
of NPU. Pure functions of the request and the device. Other families have files of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch

from ospnext.ops.contract import Need, need
from ospnext.ops.contracts.attention import AttentionRequest
from ospnext.ops.contracts.native_attention import NativeAttentionRequest
from ospnext.ops.registry import DeviceInfo

from . import masks

_HALF = (torch.bfloat16, torch.float16)
_FLOATS = (*_HALF, torch.float32)
MOST_HEADS = 256
#: Tokens of a sequence, and of a pack, in npu_fusion_attention; in the operator for inference; in that with one query.
MOST_TOKENS = 1_000_000
MOST_TOKENS_INFER = 20_971_520
MOST_KEYS_OF_ONE_QUERY = 262_144
#: Samples, and packed sequences, of npu_fusion_attention: the least that any of the vendor's pages says.
MOST_SAMPLES = 2_000_000
MOST_SEQUENCES = 1024
MOST_SAMPLES_INFER = 65_536
MOST_SEQUENCES_INFER = 4096

#: What npu_quant_fusion_attention takes: (batch, queries, keys, heads, head_dim).
QUANT_FUSION_SHAPES = ((1, 57_600, 57_600, 5, 128), (1, 7200, 512, 40, 128))


class _Sizes(Protocol):
    """What the requests of both contracts have."""

    dtype: torch.dtype
    batch: int
    q_len: int
    kv_len: int
    heads: int
    head_dim: int
    packed: bool


def fusion(request: AttentionRequest, device: DeviceInfo) -> Iterator[Need]:
    """npu_fusion_attention: the same on all generations, by its page and those of aclnnFlashAttentionScore."""
    yield need(request.dtype in _FLOATS, "dtype", got=request.dtype, want="bf16, fp16 or fp32")
    yield from _sizes(request, 768, MOST_TOKENS)
    yield _samples(request, MOST_SEQUENCES if request.packed else MOST_SAMPLES)
    fits = request.batch <= MOST_SEQUENCES and request.batch * max(request.q_len, request.kv_len) <= MOST_TOKENS
    yield need(
        not request.key_mask or fits or masks.is_small(request.batch, request.q_len, request.kv_len),
        "mask",
        got=f"{request.batch} of {request.q_len}x{request.kv_len}",
        want=f"a mask of {masks.MASK_BYTES} bytes at most, or a pack of {MOST_SEQUENCES} sequences and {MOST_TOKENS} "
        "tokens at most",
    )


def infer(request: AttentionRequest, device: DeviceInfo) -> Iterator[Need]:
    """npu_fused_infer_attention_score_v2 without quantization.

    Packs before Ascend 950: by torch_npu's page of the operator, for as many key heads as query heads without a rope,
    and v as wide as q. CANN's page of aclnnFusedInferAttentionScoreV4 (8.5) is another: bf16 only, and heads of 128 or
    192. That of torch_npu has 192 with a v of 128 alone. The item infer/packed-head-size asks the device."""
    yield need(request.dtype in _HALF, "dtype", got=request.dtype, want="bf16 or fp16")
    yield from _sizes(request, 512, MOST_TOKENS_INFER)
    yield _samples(request, MOST_SEQUENCES_INFER if request.packed else MOST_SAMPLES_INFER)
    older = device.capability != "950"
    yield need(
        not older or (request.head_dim in (64, 128) if request.packed else request.head_dim % 16 == 0),
        "alignment",
        got=f"{request.head_dim} on {device.capability}",
        want="64 or 128 in a pack, else a multiple of 16 (950 takes others)",
    )
    yield need(
        request.packed or request.q_len != 1 or request.kv_len <= MOST_KEYS_OF_ONE_QUERY,
        "keys",
        got=f"1x{request.kv_len}",
        want=f"at most {MOST_KEYS_OF_ONE_QUERY} keys for a single query",
    )


def sdpa(request: AttentionRequest, device: DeviceInfo) -> Iterator[Need]:
    """What PyTorch's function hands to npu_fusion_attention, and not to its formula, which holds all logits at once."""
    yield need(request.dtype in _FLOATS, "dtype", got=request.dtype, want="bf16, fp16 or fp32")
    yield from _sizes(request, 512, MOST_TOKENS)
    yield _samples(request, MOST_SAMPLES)
    yield need(
        request.dtype != torch.float32 or request.head_dim % 4 == 0,
        "alignment",
        got=f"{request.head_dim} in {request.dtype}",
        want="a multiple of 4 in fp32",
    )
    yield need(
        not request.key_mask or masks.is_small(request.batch, request.q_len, request.kv_len),
        "mask",
        got=f"{request.batch} of {request.q_len}x{request.kv_len}",
        want=f"a mask of {masks.MASK_BYTES} bytes at most",
    )


def math(request: AttentionRequest, device: DeviceInfo) -> Iterator[Need]:
    """Plain operators: NPUs have none in fp64."""
    yield need(request.dtype in _FLOATS, "dtype", got=request.dtype, want="bf16, fp16 or fp32")


def quant_fusion(request: NativeAttentionRequest, device: DeviceInfo) -> Iterator[Need]:
    """npu_quant_fusion_attention: the operator checks for two shapes and refuses any other."""
    yield from _hif8(request, device)
    shape = (request.batch, request.q_len, request.kv_len, request.heads, request.head_dim)
    yield need(
        shape in QUANT_FUSION_SHAPES,
        "shape",
        got=shape,
        want=f"(batch, queries, keys, heads, head_dim) = {' or '.join(map(str, QUANT_FUSION_SHAPES))}",
    )


def infer_hif8(request: NativeAttentionRequest, device: DeviceInfo) -> Iterator[Need]:
    """npu_fused_infer_attention_score_v2 on HiFloat8."""
    yield from _hif8(request, device)
    yield from _sizes(request, 128, MOST_TOKENS_INFER)
    yield _samples(request, MOST_SAMPLES_INFER)


def _hif8(request: NativeAttentionRequest, device: DeviceInfo) -> Iterator[Need]:
    yield need(device.capability == "950", "soc", got=device.capability, want="950, which multiplies HiFloat8")
    yield need(request.dtype in _FLOATS, "dtype", got=request.dtype, want="bf16, fp16 or fp32")


def _sizes(request: _Sizes, widest: int, longest: int) -> Iterator[Need]:
    yield need(
        0 < request.head_dim <= widest, "head_dim", got=request.head_dim, want=f"at least 1 and at most {widest}"
    )
    yield need(0 < request.heads <= MOST_HEADS, "heads", got=request.heads, want=f"at least 1 and at most {MOST_HEADS}")
    yield need(
        min(request.q_len, request.kv_len) > 0 and max(request.q_len, request.kv_len) <= longest,
        "length",
        got=f"{request.q_len}x{request.kv_len}",
        want=f"at least 1x1 and at most {longest} tokens",
    )


def _samples(request: _Sizes, most: int) -> Need:
    of = "packed sequences" if request.packed else "samples"
    return need(
        0 < request.batch <= most, "batch", got=f"{request.batch} {of}", want=f"at least 1 and at most {most} {of}"
    )

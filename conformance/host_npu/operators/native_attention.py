"""npu_quant_fusion_attention and its gradient: attention on HiFloat8 codes, for training.

Sources: CANN's pages of aclnnQuantFlashAttentionScore and aclnnQuantFlashAttentionScoreGrad. They list the few shapes
that were released; other sizes of the same kind are computed here all the same.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .dtypes import decoded, encoded, require_codes, require_hifloat8
from .rules import require, require_dtype, require_shape
from .softmax import attend, attend_backward

FORWARD, BACKWARD = "npu_quant_fusion_attention", "npu_quant_fusion_attention_backward"

#: Tokens that share a scale.
BLOCKS = {"d_scale_q": 128, "d_scale_k": 256, "d_scale_v": 512}
BLOCK_OF_BACKWARD = 512


def round_trip(factor: float) -> Callable[[Tensor], Tensor]:
    """HiFloat8 of x * factor, over factor."""
    return lambda x: decoded(encoded(x * factor)) / factor


def values_BNSD(codes_BSND: Tensor, scale_BNb1: Tensor, block: int) -> Tensor:
    """fp32 values of codes whose tokens share scales in blocks."""
    tokens = codes_BSND.shape[1]
    return decoded(codes_BSND.transpose(1, 2)) * scale_BNb1.repeat_interleave(block, 2)[:, :, :tokens]


def npu_quant_fusion_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    *,
    d_scale_q: Tensor,
    d_scale_k: Tensor,
    d_scale_v: Tensor,
    p_scale: Tensor | None = None,
    scale: float = 1.0,
    query_dtype: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int, int]:
    """(out in bf16, softmax_max and softmax_sum [B, N, S, 1] in fp32, nothing, 0, 0, 0).

    Probabilities, 1 at most, are multiplied by `p_scale` and rounded to HiFloat8; their sum is not.
    """
    _check_codes(FORWARD, {"query": query, "key": key, "value": value}, head_num, input_layout, query_dtype)
    scales = {"d_scale_q": (d_scale_q, query), "d_scale_k": (d_scale_k, key), "d_scale_v": (d_scale_v, value)}
    q, k, v = (
        values_BNSD(codes, _block_scale(FORWARD, name, tensor, codes, BLOCKS[name]), BLOCKS[name])
        for name, (tensor, codes) in scales.items()
    )
    rounded = round_trip(_number(FORWARD, "p_scale", p_scale))
    found = [attend(*sequence, scale, rounded=rounded) for sequence in zip(q, k, v, strict=True)]
    out, largest, total = (torch.stack(parts) for parts in zip(*found, strict=True))
    out = out.transpose(1, 2).to(torch.bfloat16).contiguous()
    return out, largest, total, out.new_empty(0), 0, 0, 0


def npu_quant_fusion_attention_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dy: Tensor,
    head_num: int,
    input_layout: str,
    d_scale_q: Tensor,
    d_scale_k: Tensor,
    d_scale_v: Tensor,
    d_scale_dy: Tensor,
    *,
    p_scale: Tensor | None = None,
    ds_scale: Tensor | None = None,
    softmax_max: Tensor | None = None,
    softmax_sum: Tensor | None = None,
    attention_in: Tensor | None = None,
    scale_value: float = 1.0,
    query_dtype: int | None = None,
) -> tuple[Tensor | None, ...]:
    """(dq, dk, dv in bf16, then three Nones and an empty tensor for inputs that this operator does not have).

    Scales are those of blocks of 512 tokens, unlike the forward's. The normalized probabilities are multiplied by
    `p_scale`, the gradient of the logits by `ds_scale`, and both rounded to HiFloat8.
    """
    codes = {"query": query, "key": key, "value": value, "dy": dy}
    _check_codes(BACKWARD, codes, head_num, input_layout, query_dtype)
    require(BACKWARD, query.shape[-1] == 128, "head dimension is 128", query.shape[-1])
    require_shape(BACKWARD, "dy", dy, query.shape)
    scales = {"d_scale_q": d_scale_q, "d_scale_k": d_scale_k, "d_scale_v": d_scale_v, "d_scale_dy": d_scale_dy}
    q, k, v, grad = (
        values_BNSD(one, _block_scale(BACKWARD, name, tensor, one, BLOCK_OF_BACKWARD), BLOCK_OF_BACKWARD)
        for one, (name, tensor) in zip(codes.values(), scales.items(), strict=True)
    )
    batch, rows = query.shape[:2]
    for name, statistic in (("softmax_max", softmax_max), ("softmax_sum", softmax_sum)):
        require(BACKWARD, statistic is not None, f"{name} is given")
        assert statistic is not None
        require_dtype(BACKWARD, name, statistic, (torch.float32,))
        require_shape(BACKWARD, name, statistic, (batch, head_num, rows, 1))
    require(BACKWARD, attention_in is not None, "attention_in is given")
    assert softmax_max is not None and softmax_sum is not None and attention_in is not None
    require_dtype(BACKWARD, "attention_in", attention_in, (torch.bfloat16,))
    require_shape(BACKWARD, "attention_in", attention_in, query.shape)
    out = attention_in.transpose(1, 2).float()
    rounding = {
        "rounded": round_trip(_number(BACKWARD, "p_scale", p_scale)),
        "rounded_grad": round_trip(_number(BACKWARD, "ds_scale", ds_scale)),
    }
    found = [
        attend_backward(*sequence, scale_value, **rounding)
        for sequence in zip(grad, q, k, v, out, softmax_max, softmax_sum, strict=True)
    ]
    gradients = [
        torch.stack(parts).transpose(1, 2).to(torch.bfloat16).contiguous() for parts in zip(*found, strict=True)
    ]
    return (*gradients, None, None, None, torch.empty(0))


def _check_codes(op: str, codes: dict[str, Tensor], heads: int, layout: str, query_dtype: int | None) -> None:
    require(op, layout == "BSND", "input_layout is BSND", layout)
    require_hifloat8(op, "query_dtype is HiFloat8 (290)", query_dtype)
    shape = codes["query"].shape
    for name, tensor in codes.items():
        require_codes(op, name, tensor)
        require(op, tensor.ndim == 4, f"{name} has 4 dimensions", tensor.ndim)
        found = (tensor.shape[0], *tensor.shape[2:])
        alike = found == (shape[0], *shape[2:])
        require(op, alike, f"{name} has the batch, heads and head dimension of query", list(tensor.shape))
    require(op, codes["key"].shape == codes["value"].shape, "key and value have one shape", list(codes["value"].shape))
    require(op, heads == shape[2], "head_num is the number of heads", (heads, shape[2]))


def _block_scale(op: str, name: str, scale: Tensor, codes: Tensor, block: int) -> Tensor:
    batch, tokens, heads = codes.shape[:3]
    require_dtype(op, name, scale, (torch.float32,))
    require_shape(op, f"{name}, one for {block} tokens,", scale, (batch, heads, -(-tokens // block), 1))
    return scale


def _number(op: str, name: str, scale: Tensor | None) -> float:
    require(op, scale is not None, f"{name} is given")
    assert scale is not None
    require_dtype(op, name, scale, (torch.float32,))
    require_shape(op, name, scale, (1,))
    return float(scale)


KERNELS: dict[str, Callable] = {
    FORWARD: npu_quant_fusion_attention,
    BACKWARD: npu_quant_fusion_attention_backward,
}

"""The emulated attention on HiFloat8 codes against the documented formulas in fp64, with HiFloat8 by en_dtypes."""

from __future__ import annotations

import math
from typing import Any

import torch
from hif8_by_en_dtypes import codes_of, rounded
from torch import Tensor

from ospnext.conformance.host_npu.operators import infer_attention, native_attention

infer = infer_attention.npu_fused_infer_attention_score_v2
quant_forward = native_attention.npu_quant_fusion_attention
quant_backward = native_attention.npu_quant_fusion_attention_backward
HIFLOAT8 = 290


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_block(scale_BNb1: Tensor, block: int, tokens: int) -> Tensor:
    index = torch.arange(tokens) // block
    return scale_BNb1[:, :, index].double()


def block_scales(tokens: int, block: int, seed: int) -> Tensor:
    return 0.5 + torch.rand(1, 2, math.ceil(tokens / block), 1, generator=torch.Generator().manual_seed(seed))


def relative(found: Tensor, right: Tensor) -> float:
    return float((found.double() - right).norm() / right.norm())


ROWS, KEYS = 700, 1100


def quantized_attention(blocks: tuple[int, int, int], factor: float) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Codes [B, S, N, D] and scales of q, k and v, and the documented formula in fp64."""
    lengths = (ROWS, KEYS, KEYS)
    plain = [1.5 * randn(1, s, 2, 128, seed=i) for i, s in enumerate(lengths)]
    scales = [block_scales(s, b, i) for i, (s, b) in enumerate(zip(lengths, blocks, strict=True))]
    values = [
        rounded(x).transpose(1, 2) * by_block(scale, block, x.shape[1])
        for x, scale, block in zip(plain, scales, blocks, strict=True)
    ]
    s = values[0] @ values[1].transpose(-1, -2) / 128**0.5
    p = (s - s.amax(-1, keepdim=True)).exp()
    out = rounded(p * factor) @ values[2] / factor / p.sum(-1, keepdim=True)
    return [codes_of(x) for x in plain], scales, out.transpose(1, 2)


def test_quant_forward() -> None:
    codes, scales, right = quantized_attention((128, 256, 512), 15.0)
    named = dict(zip(("d_scale_q", "d_scale_k", "d_scale_v"), scales, strict=True))
    options: dict[str, Any] = {"scale": 128**-0.5, "query_dtype": HIFLOAT8}
    out, largest, total, *_ = quant_forward(*codes, 2, "BSND", **named, p_scale=torch.tensor([15.0]), **options)
    assert out.dtype == torch.bfloat16 and largest.shape == total.shape == (1, 2, ROWS, 1)
    # Rounding of the result is 1.1e-3; a probability on the other side of a tie counts for little.
    assert relative(out, right) < 2e-3
    # 15 and 1 round differently, and neither is no rounding.
    for factor in (1.0, 11.0):
        other = quant_forward(*codes, 2, "BSND", **named, p_scale=torch.tensor([factor]), **options)[0]
        assert relative(other, right) > 5e-3


def test_quant_infer() -> None:
    codes, scales, right = quantized_attention((128, 256, 256), 1.0)
    named = {f"dequant_scale_{n}": s for n, s in zip(("query", "key", "value"), scales, strict=True)}
    dtypes = dict.fromkeys(("query_dtype", "key_dtype", "value_dtype"), HIFLOAT8)
    modes = dict.fromkeys(("query_quant_mode", "key_quant_mode", "value_quant_mode"), 7)
    options: dict[str, Any] = {"num_query_heads": 2, "input_layout": "BSND", "softmax_scale": 128**-0.5}
    out, _ = infer(*codes, **options, **dtypes, **modes, **named, out_dtype=torch.bfloat16)
    assert out.dtype == torch.bfloat16 and relative(out, right) < 2e-3
    assert infer(*codes, **options, **dtypes, **modes, **named)[0].dtype == torch.float16


def test_quant_backward() -> None:
    lengths = (ROWS, KEYS, KEYS, ROWS)
    plain = [1.5 * randn(1, s, 2, 128, seed=i) for i, s in enumerate(lengths)]
    scales = [block_scales(s, 512, i) for i, s in enumerate(lengths)]
    q, k, v, dy = (
        rounded(x).transpose(1, 2) * by_block(scale, 512, x.shape[1]) for x, scale in zip(plain, scales, strict=True)
    )
    scale, p_scale, ds_scale = 128**-0.5, 15.0, 37.0
    s = q @ k.transpose(-1, -2) * scale
    largest = s.amax(-1, keepdim=True)
    total = (s - largest).exp().sum(-1, keepdim=True)
    p = (s - largest).exp() / total
    out = (p @ v).to(torch.bfloat16)
    ds = p * (dy @ v.transpose(-1, -2) - (dy * out.double()).sum(-1, keepdim=True))
    p_rounded, ds_rounded = rounded(p * p_scale) / p_scale, rounded(ds * ds_scale) / ds_scale
    right = [ds_rounded @ k * scale, ds_rounded.transpose(-1, -2) @ q * scale, p_rounded.transpose(-1, -2) @ dy]
    found = quant_backward(
        *(codes_of(x) for x in plain),
        2,
        "BSND",
        *scales,
        p_scale=torch.tensor([p_scale]),
        ds_scale=torch.tensor([ds_scale]),
        softmax_max=largest.float(),
        softmax_sum=total.float(),
        attention_in=out.transpose(1, 2),
        scale_value=scale,
        query_dtype=HIFLOAT8,
    )
    assert found[3:6] == (None, None, None)
    for a, b in zip(found[:3], right, strict=True):
        assert a is not None and a.dtype == torch.bfloat16
        assert relative(a, b.transpose(1, 2)) < 3e-3

"""Calls of torch_npu at the sizes of a model, with the shapes and dtypes that they give: one table, for meta tensors
and for the host NPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

HIFLOAT8 = 290
BF16, FP16, FP32, UINT8 = torch.bfloat16, torch.float16, torch.float32, torch.uint8


@dataclass(frozen=True)
class Sizes:
    tokens: int
    text: int
    heads: int
    hidden: int
    wide: int
    dim: int = 128


MODELS = {
    "14B": Sizes(tokens=80_640, text=512, heads=40, hidden=5120, wide=13_824),
    "1.3B": Sizes(tokens=80_640, text=512, heads=12, hidden=1536, wide=8960),
}
SMALL = Sizes(tokens=300, text=40, heads=2, hidden=256, wide=64)

#: dtype and shape of a tensor; None and plain numbers are themselves.
Form = Any


def form(result: Any) -> Form:
    if isinstance(result, Tensor):
        return result.dtype, list(result.shape)
    if isinstance(result, list | tuple):
        return [form(part) for part in result]
    return result


@dataclass(frozen=True)
class Maker:
    """Operands on one device."""

    device: str

    def floats(self, *shape: int, dtype: torch.dtype = BF16) -> Tensor:
        if self.device == "meta":
            return torch.empty(shape, dtype=dtype, device="meta")
        values = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))
        return values.to(dtype).to(self.device)

    def codes(self, *shape: int) -> Tensor:
        return torch.ones(shape, dtype=UINT8, device=self.device)

    def ones(self, *shape: int, dtype: torch.dtype = FP32) -> Tensor:
        return torch.ones(shape, dtype=dtype, device=self.device)

    def mask(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.bool, device=self.device)


Calls = dict[str, tuple[Callable[[], Any], Form]]


def calls(s: Sizes, make: Maker) -> Calls:
    return attention(s, make) | inference(s, make) | quantization(s, make) | fused(s, make)


def attention(s: Sizes, make: Maker) -> Calls:
    npu = torch.ops.npu
    n, t, x, d = s.heads, s.tokens, s.text, s.dim
    q, k = make.floats(1, t, n, d), make.floats(1, x, n, d)
    statistics = (FP32, [1, n, t, 8])
    rest: list[Form] = [(BF16, [0]), 0, 0]
    scale: dict[str, Any] = {"scale": d**-0.5}
    ends = {"actual_seq_qlen": [t // 2, t], "actual_seq_kvlen": [x // 4, x]}

    def forward(*args: Any, **named: Any) -> Any:
        return npu.npu_fusion_attention(*args, **scale, **named)[:6]  # the last number is garbage without dropout

    def backward(*args: Any, statistics: tuple[int, ...], **named: Any) -> Any:
        given = {"softmax_max": make.ones(*statistics), "softmax_sum": make.ones(*statistics), "attention_in": args[3]}
        return npu.npu_fusion_attention_grad(*args, **given, scale_value=d**-0.5, **named)

    def third(*args: Any, **named: Any) -> Any:
        return npu.npu_fusion_attention_v3(*args, **scale, **named)

    by_tensors = {name: torch.tensor(values) for name, values in ends.items()}
    numbers = (torch.int64, [1])
    only_meta: Calls = {
        "attention v3 BSND": (
            lambda: third(q, k, k, n, "BSND"),
            [(BF16, [1, t, n, d]), statistics, statistics, (BF16, [0]), numbers, numbers],
        ),
        "attention v3 TND": (
            lambda: third(q[0], k[0], k[0], n, "TND", **by_tensors),
            [(BF16, [t, n, d]), (FP32, [t, n, 8]), (FP32, [t, n, 8]), (BF16, [0]), numbers, numbers],
        ),
    }
    heads_first = (q.transpose(1, 2), k.transpose(1, 2), k.transpose(1, 2))
    gradients = [(BF16, [1, t, n, d]), (BF16, [1, x, n, d]), (BF16, [1, x, n, d]), None, (FP32, [0])]
    packed = [(BF16, [t, n, d]), (BF16, [x, n, d]), (BF16, [x, n, d]), None, (FP32, [0])]
    return {
        "attention BSND": (lambda: forward(q, k, k, n, "BSND"), [(BF16, [1, t, n, d]), statistics, statistics, *rest]),
        "attention BNSD": (
            lambda: forward(*heads_first, n, "BNSD"),
            [(BF16, [1, n, t, d]), statistics, statistics, *rest],
        ),
        "attention BSH": (
            lambda: forward(q.flatten(2), k.flatten(2), k.flatten(2), n, "BSH"),
            [(BF16, [1, t, n * d]), statistics, statistics, *rest],
        ),
        "attention masked": (
            lambda: forward(q, k, k, n, "BSND", atten_mask=make.mask(1, 1, t, x), sparse_mode=1, inner_precise=2),
            [(BF16, [1, t, n, d]), statistics, statistics, *rest],
        ),
        "attention TND": (
            lambda: forward(q[0], k[0], k[0], n, "TND", **ends),
            [(BF16, [t, n, d]), (FP32, [t, n, 8]), (FP32, [t, n, 8]), *rest],
        ),
        "attention gradient BSND": (lambda: backward(q, k, k, q, n, "BSND", statistics=(1, n, t, 8)), gradients),
        "attention gradient TND": (
            lambda: backward(q[0], k[0], k[0], q[0], n, "TND", statistics=(t, n, 8), **ends),
            packed,
        ),
        **(only_meta if make.device == "meta" else {}),
    }


def inference(s: Sizes, make: Maker) -> Calls:
    npu = torch.ops.npu
    n, t, x, d = s.heads, s.tokens, s.text, s.dim
    q, k = make.floats(1, t, n, d), make.floats(1, x, n, d)
    codes = (make.codes(1, t, n, d), make.codes(1, x, n, d), make.codes(1, x, n, d))
    named: dict[str, Any] = {"num_query_heads": n, "softmax_scale": d**-0.5}
    ends = {"actual_seq_qlen": [t // 2, t], "actual_seq_kvlen": [x // 4, x]}
    hif8: dict[str, Any] = dict.fromkeys(("query_dtype", "key_dtype", "value_dtype"), HIFLOAT8)
    hif8 |= dict.fromkeys(("query_quant_mode", "key_quant_mode", "value_quant_mode"), 7)
    blocks = {"query": -(-t // 128), "key": -(-x // 256), "value": -(-x // 256)}
    hif8 |= {f"dequant_scale_{name}": make.ones(1, n, count, 1) for name, count in blocks.items()}
    out = (BF16, [1, t, n, d])

    def infer(*args: Tensor, **more: Any) -> Any:
        return npu.npu_fused_infer_attention_score_v2(*args, **named, **more)

    return {
        "inference BSND": (lambda: infer(q, k, k, input_layout="BSND"), [out, (FP32, [0])]),
        "inference BSND with logsumexp": (
            lambda: infer(q, k, k, input_layout="BSND", return_softmax_lse=True),
            [out, (FP32, [1, n, t, 1])],
        ),
        "inference TND with logsumexp": (
            lambda: infer(q[0], k[0], k[0], **ends, input_layout="TND", return_softmax_lse=True),
            [(BF16, [t, n, d]), (FP32, [t, n, 1])],
        ),
        "inference HiFloat8": (
            lambda: infer(*codes, **hif8, input_layout="BSND", out_dtype=BF16),
            [out, (FP32, [0])],
        ),
        "inference HiFloat8 without out_dtype": (
            lambda: infer(*codes, **hif8, input_layout="BSND"),
            [(FP16, [1, t, n, d]), (FP32, [0])],
        ),
    }


def quantization(s: Sizes, make: Maker) -> Calls:
    npu = torch.ops.npu
    t, h, w = s.tokens, s.hidden, s.wide
    x, codes, weight = make.floats(t, h), make.codes(t, h), make.codes(w, h)
    one, rows, columns = make.ones(1), make.ones(t), make.ones(w)
    hif8: dict[str, Any] = {"x1_dtype": HIFLOAT8, "x2_dtype": HIFLOAT8}

    def dynamic(mode: str) -> Any:
        return npu.npu_dynamic_quant(x, dst_type=HIFLOAT8, quant_mode=mode, dst_type_max=15.0)

    def product(*args: Tensor, dtype: torch.dtype = BF16, **named: Any) -> Any:
        return npu.npu_quant_matmul(*args, output_dtype=dtype, **hif8, **named)

    def accumulate() -> Any:
        scales = {"x1_scale": one, **hif8}
        return npu.npu_add_quant_matmul_(make.ones(w, h), make.codes(t, w).t(), codes, one, **scales)

    return {
        "cast to HiFloat8": (lambda: npu.npu_dtype_cast(x, HIFLOAT8), (UINT8, [t, h])),
        "cast from HiFloat8": (lambda: npu.npu_dtype_cast(codes, BF16, input_dtype=HIFLOAT8), (BF16, [t, h])),
        "cast from HiFloat8 by number": (lambda: npu.npu_dtype_cast(codes, 6, input_dtype=HIFLOAT8), (FP32, [t, h])),
        "quantize": (lambda: npu.npu_quantize(x.float(), one, None, HIFLOAT8, -1, True), (UINT8, [t, h])),
        "quantize bf16": (
            lambda: npu.npu_quantize(x, make.ones(1, dtype=BF16), None, HIFLOAT8, -1, False),
            (UINT8, [t, h]),
        ),
        "dynamic_quant pertensor": (lambda: dynamic("pertensor"), [(UINT8, [t, h]), (FP32, [1])]),
        "dynamic_quant pertoken": (lambda: dynamic("pertoken"), [(UINT8, [t, h]), (FP32, [t])]),
        "dynamic_quant perchannel": (lambda: dynamic("perchannel"), [(UINT8, [t, h]), (FP32, [h])]),
        "quant_matmul T-T": (lambda: product(codes, weight.t(), one, pertoken_scale=one), (BF16, [t, w])),
        "quant_matmul K-T": (lambda: product(codes, weight.t(), one, pertoken_scale=rows), (BF16, [t, w])),
        "quant_matmul K-C": (lambda: product(codes, weight.t(), columns, pertoken_scale=rows), (BF16, [t, w])),
        "quant_matmul fp32": (
            lambda: product(codes, weight.t(), columns, pertoken_scale=rows, dtype=FP32),
            (FP32, [t, w]),
        ),
        "quant_matmul of a transposed left": (
            lambda: product(make.codes(t, w).t(), codes, one, pertoken_scale=one),
            (BF16, [w, h]),
        ),
        "quant_matmul int8": (
            lambda: product(codes.view(torch.int8), weight.view(torch.int8).t(), one, pertoken_scale=one),
            (BF16, [t, w]),
        ),
        "quant_matmul bias": (
            lambda: product(codes, weight.t(), one, pertoken_scale=one, bias=columns),
            (BF16, [t, w]),
        ),
        "add_quant_matmul_": (accumulate, (FP32, [w, h])),
    }


def fused(s: Sizes, make: Maker) -> Calls:
    npu = torch.ops.npu
    n, t, h, d = s.heads, s.tokens, s.hidden, s.dim
    x, gamma, q = make.floats(1, t, h), make.floats(h), make.floats(1, t, n, d)
    angles = make.floats(1, t, 1, d)
    row = (BF16, [1, t, h])
    statistic = (FP32, [1, t, 1])
    gelu: dict[str, Any] = {"approximate": "tanh", "dst_type": HIFLOAT8, "round_mode": "round"}
    offset = make.ones(1, dtype=torch.int8)

    def turned(mode: str) -> Any:
        return npu.npu_rotary_mul(q, angles, angles, mode)

    found: Calls = {
        "rms_norm": (lambda: npu.npu_rms_norm(x, gamma, 1e-6), [row, statistic]),
        "rms_norm of heads": (
            lambda: npu.npu_rms_norm(q, make.floats(d)),
            [(BF16, [1, t, n, d]), (FP32, [1, t, n, 1])],
        ),
        "rms_norm gradient": (
            lambda: npu.npu_rms_norm_backward(x, x, gamma, make.ones(1, t, 1)),
            [row, (FP32, [h])],
        ),
        "rotary_mul gradient": (
            lambda: npu.npu_rotary_mul_backward(q, q, angles, angles, "interleave"),
            [(BF16, [1, t, n, d]), (BF16, [1, t, 1, d]), (BF16, [1, t, 1, d])],
        ),
        "layer_norm_eval": (lambda: npu.npu_layer_norm_eval(x, [h], eps=1e-6), row),
        "add_layer_norm": (
            lambda: npu.npu_add_layer_norm(x, x, gamma, gamma, 1e-5, True),
            [row, statistic, statistic, row],
        ),
        "gelu": (lambda: npu.npu_gelu(x, approximate="tanh"), row),
        "gelu gradient": (lambda: npu.npu_gelu_backward(x, x, approximate="tanh"), row),
        "gelu_quant dynamic": (lambda: npu.npu_gelu_quant(x, **gelu), [(UINT8, [1, t, h]), (FP32, [1, t])]),
        "gelu_quant static": (
            lambda: npu.npu_gelu_quant(
                x, input_scale=make.ones(1), input_offset=make.ones(1), quant_mode="static", **gelu
            ),
            [(UINT8, [1, t, h]), None],
        ),
        "rms_norm_quant": (
            lambda: npu.npu_rms_norm_quant(x, gamma, gamma, make.ones(1, dtype=BF16), offset, dst_dtype=HIFLOAT8),
            (UINT8, [1, t, h]),
        ),
    }
    for mode in ("half", "interleave", "quarter", "interleave-half"):
        found[f"rotary_mul {mode}"] = (functools.partial(turned, mode), (BF16, [1, t, n, d]))
    return found

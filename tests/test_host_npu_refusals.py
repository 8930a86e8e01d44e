"""What the emulated operators refuse: everything that the vendor's documents forbid or leave open, by name."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from ospnext.conformance.host_npu import device
from ospnext.conformance.host_npu.operators.rules import Refused

K = device.kernels()
HIFLOAT8 = 290
CODES = dict.fromkeys(("query_dtype", "key_dtype", "value_dtype"), HIFLOAT8)


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


bf16 = functools.partial(tensor, dtype=torch.bfloat16)
codes = functools.partial(tensor, dtype=torch.uint8)


def mask(*shape: int, dtype: torch.dtype = torch.bool) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def dense(**changes: Any) -> dict[str, Any]:
    x = tensor(2, 5, 2, 16)
    return {"query": x, "key": x, "value": x, "head_num": 2, "input_layout": "BSND"} | changes


def packed(**changes: Any) -> dict[str, Any]:
    x = tensor(9, 2, 16)
    given = {"query": x, "key": x, "value": x, "head_num": 2, "input_layout": "TND"}
    return given | {"actual_seq_qlen": [4, 9], "actual_seq_kvlen": [4, 9]} | changes


def infer(**changes: Any) -> dict[str, Any]:
    x = bf16(2, 5, 2, 16)
    return {"query": x, "key": x, "value": x, "num_query_heads": 2, "input_layout": "BSND"} | changes


def one_coded_query() -> dict[str, Any]:
    named = {"query": codes(2, 1, 2, 16), "key": codes(2, 5, 2, 16), "value": codes(2, 5, 2, 16)}
    modes = dict.fromkeys(("query_quant_mode", "key_quant_mode", "value_quant_mode"), 7)
    scales = {f"dequant_scale_{name}": tensor(2, 2, 1, 1) for name in named}
    return infer(**named, **modes, **scales, **CODES)


def native(**changes: Any) -> dict[str, Any]:
    x = codes(1, 300, 2, 128)
    named: dict[str, Any] = {"query": x, "key": x, "value": x, "head_num": 2, "input_layout": "BSND"}
    named |= {name: tensor(1, 2, n, 1) for name, n in (("d_scale_q", 3), ("d_scale_k", 2), ("d_scale_v", 1))}
    return named | {"p_scale": tensor(1), "query_dtype": HIFLOAT8} | changes


def product(**changes: Any) -> dict[str, Any]:
    named = {"x1": codes(6, 8), "x2": codes(8, 4), "scale": tensor(1), "pertoken_scale": tensor(1)}
    return named | {"output_dtype": 15, "x1_dtype": HIFLOAT8, "x2_dtype": HIFLOAT8} | changes


def added(**changes: Any) -> dict[str, Any]:
    named = {"input": tensor(6, 4), "x1": codes(8, 6).t(), "x2": codes(8, 4), "x2_scale": tensor(1)}
    return named | {"x1_scale": tensor(1), "x1_dtype": HIFLOAT8, "x2_dtype": HIFLOAT8} | changes


def dynamic(**changes: Any) -> dict[str, Any]:
    return {"input": bf16(4, 8), "dst_type": HIFLOAT8, "dst_type_max": 15.0} | changes


def static(**changes: Any) -> dict[str, Any]:
    return {"input": bf16(4, 8), "scales": bf16(1), "zero_points": None, "dtype": HIFLOAT8} | changes


def rotary(**changes: Any) -> dict[str, Any]:
    return {"input": tensor(2, 5, 3, 8), "r1": tensor(1, 5, 1, 8), "r2": tensor(1, 5, 1, 8)} | changes


def activation(**changes: Any) -> dict[str, Any]:
    return {"input": bf16(4, 8), "dst_type": HIFLOAT8, "round_mode": "round"} | changes


def normed(**changes: Any) -> dict[str, Any]:
    named = {"x": bf16(4, 8), "gamma": bf16(8), "beta": bf16(8), "scale": bf16(1)}
    return named | {"offset": tensor(1, dtype=torch.int8), "dst_dtype": HIFLOAT8} | changes


#: Operator -> (what is wrong, arguments, words of the refusal).
REFUSED: dict[str, list[tuple[str, dict[str, Any], str]]] = {
    "npu_fusion_attention": [
        ("fp64", dense(query=tensor(2, 5, 2, 16, dtype=torch.float64)), "query is float16, bfloat16, float32"),
        ("dtypes", dense(key=bf16(2, 5, 2, 16)), "one dtype"),
        ("layout", dense(input_layout="BSDN"), "input_layout is BSH"),
        ("dimensions", dense(input_layout="BSH"), "query has the dimensions of BSH"),
        ("head_num", dense(head_num=4), "head_num is the number of query heads"),
        ("mask of keys", dense(atten_mask=mask(2, 1, 1, 5)), "atten_mask has shape"),
        ("mask of sequences", dense(atten_mask=mask(2, 5, 5)), "atten_mask has shape"),
        ("float mask", dense(atten_mask=mask(5, 5, dtype=torch.float32)), "atten_mask is bool, uint8"),
        ("mask of twos", dense(atten_mask=2 + mask(5, 5, dtype=torch.uint8)), "0 .takes part. and 1"),
        ("band", dense(atten_mask=mask(5, 5), next_tockens=0), "outside pre_tockens and next_tockens"),
        ("no triangle", dense(atten_mask=mask(2048, 2048), sparse_mode=3), "1 above the diagonal"),
        ("small triangle", dense(atten_mask=mask(5, 5), sparse_mode=2), "has shape .2048, 2048."),
        ("prefix", dense(atten_mask=mask(5, 5), sparse_mode=6), "not emulated"),
        ("sparse_mode", dense(sparse_mode=7), "sparse_mode"),
        ("inner_precise", dense(inner_precise=3), "inner_precise"),
        ("dropout", dense(keep_prob=0.9), "dropout"),
        ("pse", dense(pse=mask(1, 2, 5, 5)), "not emulated; got pse"),
        ("key heads", dense(key=tensor(2, 5, 3, 16), value=tensor(2, 5, 3, 16)), "multiple of key heads"),
        ("head dims", dense(value=tensor(2, 5, 2, 24)), "that of value is no larger"),
        ("batch", dense(key=tensor(1, 5, 2, 16), value=tensor(1, 5, 2, 16)), "one batch"),
        ("no tokens", dense(key=tensor(2, 0, 2, 16), value=tensor(2, 0, 2, 16)), "key has 1 to 1000000 tokens"),
        ("value tokens", dense(value=tensor(2, 4, 2, 16)), "key and value agree"),
        ("softmax_layout", dense(softmax_layout="TND"), "softmax_layout"),
        ("leading 0", packed(actual_seq_qlen=[0, 4, 9], actual_seq_kvlen=[0, 4, 9]), "without a leading 0"),
        ("lengths for ends", packed(actual_seq_qlen=[5, 4], actual_seq_kvlen=[5, 4]), "does not decrease"),
        ("too long", packed(actual_seq_qlen=[4, 12]), "within the 9 tokens"),
        ("no lengths", packed(actual_seq_qlen=None), "actual_seq_qlen is given"),
        ("numbers of lengths", packed(actual_seq_qlen=[9]), "as many entries"),
        ("no keys", packed(actual_seq_kvlen=[9, 9]), "a sequence with queries has keys"),
        ("packed mask", packed(atten_mask=mask(2, 1, 9, 9)), "atten_mask of a packed call"),
        ("packed row", packed(atten_mask=~mask(5, 5)), "masked out entirely"),
    ],
    "npu_fusion_attention_v3": [("Ascend 950", dense(), "Ascend 950 does not have it")],
    "npu_fused_infer_attention_score_v2": [
        ("fp32", infer(query=tensor(2, 5, 2, 16)), "float16, bfloat16"),
        ("codes without dtypes", infer(query=codes(2, 5, 2, 16)), "float16, bfloat16"),
        ("strided", infer(key=bf16(2, 2, 5, 16).transpose(1, 2)), "key is contiguous"),
        ("heads", infer(num_query_heads=4), "num_query_heads and num_key_value_heads"),
        ("layout", infer(input_layout="SBH"), "input_layout is one of"),
        ("mask of keys", infer(atten_mask=mask(2, 1, 1, 5)), "covers 5 queries"),
        ("mask of heads", infer(atten_mask=mask(2, 2, 5, 5)), "covers 5 queries"),
        ("mode 1", infer(sparse_mode=1), "has an atten_mask"),
        ("modes of codes", infer(**CODES), "quantization modes are 7"),
        ("one query of codes", one_coded_query(), "two queries or more"),
        ("one dtype of codes", infer(query_dtype=HIFLOAT8), "are all HiFloat8"),
        ("scales without codes", infer(dequant_scale_key=tensor(1)), "scales are of quantized inputs"),
        ("p scale", infer(quant_scale_p=tensor(1)), "not emulated; got quant_scale_p"),
    ],
    "npu_quant_fusion_attention": [
        ("layout", native(input_layout="BNSD"), "input_layout is BSND"),
        ("dtype", native(query_dtype=None), "query_dtype is HiFloat8"),
        ("values", native(query=bf16(1, 300, 2, 128)), "query holds codes"),
        ("block", native(d_scale_k=tensor(1, 2, 1, 1)), "d_scale_k, one for 256 tokens"),
        ("p_scale", native(p_scale=None), "p_scale is given"),
        ("head_num", native(head_num=1), "head_num is the number of heads"),
    ],
    "npu_quant_matmul": [
        ("T-C", product(scale=tensor(4)), "sizes .1, 1., .1, M. or .N, M."),
        ("no pertoken_scale", product(pertoken_scale=None), "pertoken_scale is given"),
        ("2-D scale", product(pertoken_scale=tensor(6, 1)), "pertoken_scale has one dimension"),
        ("bf16 scale", product(scale=bf16(1)), "scale is float32"),
        ("bf16 bias", product(bias=bf16(4)), "bias is float32"),
        ("bias of rows", product(bias=tensor(6)), "bias has shape"),
        ("int8", product(output_dtype=None), "None means int8"),
        ("one dtype", product(x2_dtype=None), "x1_dtype and x2_dtype 290"),
        ("inner", product(x2=codes(6, 4)), "as many columns"),
        ("slice", product(x1=codes(6, 16)[:, ::2]), "x1 is contiguous, or the transpose"),
        ("values", product(x1=bf16(6, 8)), "x1 holds codes"),
    ],
    "npu_add_quant_matmul_": [
        ("x1 plain", added(x1=codes(6, 8)), "x1 is the transpose"),
        ("x2 transposed", added(x2=codes(4, 8).t()), "x2 is contiguous"),
        ("bf16 sum", added(input=bf16(6, 4)), "input is float32"),
        ("rows of scales", added(x1_scale=tensor(6)), "x1_scale has shape"),
        ("no scale", added(x1_scale=None), "x1_scale is given"),
    ],
    "npu_dynamic_quant": [
        ("fp32", dynamic(input=tensor(4, 8)), "input is float16, bfloat16"),
        ("one dimension", dynamic(input=bf16(8)), "2 to 8 dimensions"),
        ("int8", dynamic(dst_type=None), "None is int8"),
        ("too large", dynamic(dst_type_max=40000.0), "0 to 32768"),
        ("quant_mode", dynamic(quant_mode="per_token"), "quant_mode"),
        ("smooth_scales", dynamic(smooth_scales=bf16(8)), "not emulated; got smooth_scales"),
    ],
    "npu_quantize": [
        ("fp32 scale of bf16", static(scales=tensor(1)), "scales for torch.bfloat16 input is bfloat16"),
        ("size of scale", static(scales=bf16(4)), "scales has shape"),
        ("axis", static(axis=2), "axis is within 2"),
        ("axis of product", static(input=bf16(4, 8, 2), axis=0, div_mode=False), "one of the last two"),
        ("fp64", static(input=tensor(4, 8, dtype=torch.float64)), "input is"),
        ("int8", static(dtype=1), "only HiFloat8"),
    ],
    "npu_rotary_mul": [
        ("mode", rotary(rotary_mode="nonsense"), "rotary_mode is one of"),
        ("half the angles", rotary(r1=tensor(1, 5, 1, 4), r2=tensor(1, 5, 1, 4)), "r1 has shape"),
        ("two dimensions", rotary(r1=tensor(5, 8), r2=tensor(5, 8)), "r1 has shape"),
        ("shared by samples only", rotary(r1=tensor(1, 5, 3, 8), r2=tensor(1, 5, 3, 8)), "r1 has shape"),
        ("sin", rotary(r2=tensor(1, 5, 3, 8)), "r2 has shape"),
        ("odd", rotary(input=tensor(2, 5, 3, 7)), "multiple of 2"),
        ("rotate", rotary(rotate=tensor(8, 8)), "not emulated; got rotate"),
        ("fp64", rotary(r1=tensor(1, 5, 1, 8, dtype=torch.float64)), "r1 is"),
    ],
    "npu_rms_norm": [
        ("gamma", {"input": tensor(4, 8), "gamma": bf16(8)}, "gamma has the dtype of input, or float32"),
        ("size", {"input": tensor(4, 8), "gamma": tensor(4)}, "gamma has shape"),
        ("fp64", {"input": tensor(4, 8, dtype=torch.float64), "gamma": tensor(8)}, "input is"),
    ],
    "npu_rms_norm_backward": [
        ("a vector", dict.fromkeys(("dy", "input", "gamma"), tensor(8)) | {"rstd": tensor(1)}, "2 to 8 dimensions")
    ],
    "npu_rms_norm_quant": [
        ("int8", normed(dst_dtype=None), "None is int8"),
        ("fp32 scale", normed(scale=tensor(1)), "scale and offset go with"),
        ("rows of scales", normed(scale=bf16(8)), "scale has shape"),
    ],
    "npu_gelu_quant": [
        ("rint", activation(round_mode="rint"), "round_mode is round"),
        ("hybrid", activation(round_mode="hybrid"), "hybrid rounding"),
        ("int8", activation(dst_type=None), "None is int8"),
        ("static", activation(quant_mode="static", input_scale=tensor(1)), "has input_scale and input_offset"),
        ("offset", activation(input_offset=tensor(1)), "no input_offset"),
    ],
    "npu_gelu": [("approximate", {"input": tensor(4), "approximate": "erf"}, "approximate is none or tanh")],
    "npu_dtype_cast": [
        ("fp64", {"input": tensor(4), "dtype": torch.float64}, "no float64"),
        ("unknown", {"input": tensor(4), "dtype": 291}, "not emulated"),
        ("values as codes", {"input": tensor(4), "dtype": 15, "input_dtype": HIFLOAT8}, "holds codes"),
    ],
    "npu_layer_norm_eval": [
        ("shape", {"input": tensor(4, 8), "normalized_shape": [4]}, "normalized_shape"),
        ("weight", {"input": bf16(4, 8), "normalized_shape": [8], "weight": tensor(8)}, "weight is bfloat16"),
    ],
    "npu_add_layer_norm": [
        (
            "x1 and x2",
            {"x1": bf16(4, 8), "x2": tensor(4, 8).half(), "gamma": tensor(8), "beta": tensor(8)},
            "both agree",
        )
    ],
}
CASES = [(op, *case) for op, cases in REFUSED.items() for case in cases]


@pytest.mark.parametrize(("op", "named", "words"), [pytest.param(*c[:1], *c[2:], id=f"{c[0]}-{c[1]}") for c in CASES])
def test_refuses(op: str, named: dict[str, Any], words: str) -> None:
    with pytest.raises(Refused, match=words) as refused:
        K[op](**named)
    assert str(refused.value).startswith(f"npu::{op}: ")


#: On the generations before 950: operator -> arguments that are right on a 950.
BEFORE_950: list[tuple[str, dict[str, Any], str]] = [
    ("npu_quant_matmul", product(), "HiFloat8 is of Ascend 950 only"),
    ("npu_add_quant_matmul_", added(), "HiFloat8 is of Ascend 950 only"),
    ("npu_quantize", static(), "HiFloat8 is of Ascend 950 only"),
    ("npu_dynamic_quant", dynamic(), "HiFloat8 is of Ascend 950 only"),
    ("npu_gelu_quant", activation(), "HiFloat8 is of Ascend 950 only"),
    ("npu_rms_norm_quant", normed(), "HiFloat8 is of Ascend 950 only"),
    ("npu_quant_fusion_attention", native(), "HiFloat8 is of Ascend 950 only"),
    ("npu_fused_infer_attention_score_v2", infer(**CODES), "HiFloat8 is of Ascend 950 only"),
    ("npu_dtype_cast", {"input": tensor(4), "dtype": HIFLOAT8}, "HiFloat8 is of Ascend 950 only"),
    ("npu_dtype_cast", {"input": codes(4), "dtype": 15, "input_dtype": HIFLOAT8}, "HiFloat8 is of Ascend 950 only"),
    ("npu_rotary_mul", rotary(rotary_mode="quarter"), "half, interleave before"),
    ("npu_rotary_mul", rotary(r1=tensor(2, 5, 1, 8), r2=tensor(2, 5, 1, 8), rotary_mode="interleave"), "are shared by"),
    ("npu_rotary_mul", rotary(input=tensor(500, 5, 2, 8), rotary_mode="interleave"), "at most 999"),
    ("npu_rotary_mul", {"input": tensor(2, 1, 896), "r1": tensor(2, 1, 896), "r2": tensor(2, 1, 896)}, "at most 894"),
    (
        "npu_fused_infer_attention_score_v2",
        infer(**dict.fromkeys(("query", "key", "value"), bf16(1, 5, 2, 24))),
        "of 16",
    ),
]


@pytest.mark.parametrize(("op", "named", "words"), BEFORE_950)
def test_refuses_before_950(op: str, named: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOST_NPU_SOC", "Ascend910B4")
    with pytest.raises(Refused, match=words):
        K[op](**named)
    monkeypatch.setenv("HOST_NPU_SOC", "Ascend950PR_9599")
    if not CODES.keys() <= named.keys():
        K[op](**named)


VALID = {
    "npu_fusion_attention": [dense(), packed()],
    "npu_fused_infer_attention_score_v2": [infer()],
    "npu_quant_fusion_attention": [native()],
    "npu_quant_matmul": [product()],
    "npu_add_quant_matmul_": [added()],
    "npu_dynamic_quant": [dynamic()],
    "npu_quantize": [static()],
    "npu_rotary_mul": [rotary()],
    "npu_gelu_quant": [activation()],
    "npu_rms_norm_quant": [normed()],
}


@pytest.mark.parametrize("op", VALID)
def test_takes_what_the_refused_calls_start_from(op: str) -> None:
    for named in VALID[op]:
        K[op](**named)


def test_gradient_of_attention() -> None:
    x = tensor(1, 4, 1, 16)
    out, largest, total, *_ = K["npu_fusion_attention"](x, x, x, 1, "BSND")
    call = functools.partial(K["npu_fusion_attention_grad"], x, x, x, x, 1, "BSND", softmax_sum=total, attention_in=out)
    torn = largest.clone()
    torn[..., 1:] = 0
    for statistic, words in ((torn, "eight copies"), (None, "is given"), (largest[..., :1], "softmax_max has shape")):
        with pytest.raises(Refused, match=words):
            call(softmax_max=statistic)
    call(softmax_max=largest)

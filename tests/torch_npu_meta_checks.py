"""Schemas and meta kernels of torch_npu: what they take at the sizes of the models, what they refuse, what they do not
look at, and where the host NPU's kernels agree with them.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch_npu_calls import BF16, FP32, HIFLOAT8, MODELS, SMALL, UINT8, Maker, calls, form
from torch_npu_checks import check

from ospnext.conformance.host_npu import schemas

META = Maker("meta")
BACKEND = Path(__file__).resolve().parents[1] / "backends" / "ascend"


def register() -> None:
    for name in schemas.pinned():
        check(f"schema {name}")(_same_schema(name))
    check("schemas are declared in the library as the dispatcher has them")(library_and_dispatcher_agree)
    for model, sizes in MODELS.items():
        for name in calls(sizes, META):
            check(f"meta {model} {name}")(_gives(sizes, name))
    for name in calls(SMALL, Maker("cpu")):
        check(f"device {name}")(_device_agrees(name))
    for name, (_, words) in REFUSED.items():
        check(f"refused {name}")(_is_refused(name, words))
    for name in UNSEEN:
        check(f"unseen {name}")(_passes(name))


# ---- schemas


def _same_schema(name: str) -> Callable[[], None]:
    def compared() -> None:
        found = str(getattr(torch.ops.npu, name).default._schema)
        comparison = schemas.Comparison(name, schemas.pinned()[name], found)
        assert comparison.same, "\n".join([f"{name} is not what was pinned:", *comparison.difference()])

    return compared


def library_and_dispatcher_agree() -> None:
    declared = schemas.declared(schemas.library_in_use())
    assert declared.keys() == schemas.pinned().keys()
    for name, schema in declared.items():
        assert schemas.canonical(schema) == schemas.canonical(str(getattr(torch.ops.npu, name).default._schema)), name


def called_by_backend() -> Iterator[tuple[str, str]]:
    """(file, operator) of every operator of namespace npu that the Ascend backend names."""
    for path in sorted(BACKEND.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr.lstrip("_").startswith("npu_"):
                yield path.name, node.attr


# ---- calls


def _gives(sizes: Any, name: str) -> Callable[[], None]:
    def run() -> None:
        thunk, expected = calls(sizes, META)[name]
        assert form(thunk()) == expected

    return run


def _device_agrees(name: str) -> Callable[[], None]:
    """Emulated kernels give what the meta kernels promise, contiguous."""

    def run() -> None:
        thunk, expected = calls(SMALL, Maker("npu"))[name]
        result = thunk()
        assert form(result) == expected == form(calls(SMALL, META)[name][0]())
        for part in result if isinstance(result, list | tuple) else (result,):
            assert not isinstance(part, Tensor) or (part.device.type == "npu" and part.is_contiguous())

    return run


# ---- what is refused, and what is not


def _operands() -> dict[str, Tensor]:
    make = META
    q, k = make.floats(1, 72, 4, 16), make.floats(1, 24, 4, 16)
    return {"q": q, "k": k, "x": make.floats(64, 128), "codes": make.codes(64, 128), "weight": make.codes(128, 32)}


def _product(o: dict[str, Tensor], **changes: Any) -> Any:
    named: dict[str, Any] = {"x1": o["codes"], "x2": o["weight"], "scale": META.ones(1), "pertoken_scale": META.ones(1)}
    named |= {"output_dtype": BF16, "x1_dtype": HIFLOAT8, "x2_dtype": HIFLOAT8} | changes
    return torch.ops.npu.npu_quant_matmul(named.pop("x1"), named.pop("x2"), named.pop("scale"), **named)


def _infer(o: dict[str, Tensor], **changes: Any) -> Any:
    named: dict[str, Any] = {"num_query_heads": 4, "input_layout": "BSND"} | changes
    return torch.ops.npu.npu_fused_infer_attention_score_v2(o["q"], o["k"], o["k"], **named)


def _attention(o: dict[str, Tensor], *args: Any, **named: Any) -> Any:
    return torch.ops.npu.npu_fusion_attention(o["q"], o["k"], o["k"], *(args or (4, "BSND")), **named)


def _quant_attention(o: dict[str, Tensor], gradient: bool) -> Any:
    codes, scale = o["q"].to(UINT8), META.ones(1, 4, 1, 1)
    if gradient:
        named = {"softmax_max": META.ones(1, 4, 72, 1), "softmax_sum": META.ones(1, 4, 72, 1), "attention_in": o["q"]}
        named |= {"p_scale": META.ones(1), "ds_scale": META.ones(1)}
        return torch.ops.npu.npu_quant_fusion_attention_backward(
            codes, codes, codes, codes, 4, "BSND", scale, scale, scale, scale, **named, query_dtype=HIFLOAT8
        )
    scales = {"d_scale_q": scale, "d_scale_k": scale, "d_scale_v": scale}
    return torch.ops.npu.npu_quant_fusion_attention(
        codes, codes, codes, 4, "BSND", **scales, p_scale=META.ones(1), query_dtype=HIFLOAT8
    )


def _packed(o: dict[str, Tensor], **named: Any) -> Any:
    return torch.ops.npu.npu_fusion_attention(o["q"][0], o["k"][0], o["k"][0], 4, "TND", **named)


Call = Callable[[dict[str, Tensor]], Any]

#: Name -> (call, words of the error).
REFUSED: dict[str, tuple[Call, str]] = {
    "lengths as a tensor": (
        lambda o: _packed(o, actual_seq_qlen=torch.tensor([72]), actual_seq_kvlen=torch.tensor([24])),
        "Optional[List[int]]",
    ),
    "lengths of v3 as a list": (
        lambda o: torch.ops.npu.npu_fusion_attention_v3(
            o["q"][0], o["k"][0], o["k"][0], 4, "TND", actual_seq_qlen=[72], actual_seq_kvlen=[24]
        ),
        "Optional[Tensor]",
    ),
    # The wheel's own meta kernels of these two are broken: a backend that is traced brings its own.
    "npu_quant_fusion_attention": (lambda o: _quant_attention(o, False), "name 'out_dtype' is not defined"),
    "npu_quant_fusion_attention_backward": (lambda o: _quant_attention(o, True), "name 'out_dtype' is not defined"),
    "inference without heads": (lambda o: _infer(o, num_query_heads=0), "numHeads should be greater than 0"),
    "inference in another layout": (lambda o: _infer(o, input_layout="XXX"), "Layout XXX is not supported"),
    "inference packed with 4 dimensions": (lambda o: _infer(o, input_layout="TND"), "queryDims(4) must be 3"),
    "cast to an unknown dtype": (lambda o: torch.ops.npu.npu_dtype_cast(o["x"], 999), "enum value:999 not found"),
    "product of different inner sizes": (lambda o: _product(o, x2=META.codes(64, 32)), "k dim of x1 and x2"),
    "product with a bias of another size": (lambda o: _product(o, bias=META.ones(31)), "bias_first_dim"),
    "product of values": (lambda o: _product(o, x1=o["x"]), "must be a 1 byte tensor"),
    "product of native fp8 as codes": (lambda o: _product(o, x1_dtype=292, x2_dtype=292), "Pass x1_dtype only when"),
    "product with a scale of 2 dimensions": (
        lambda o: _product(o, pertoken_scale=META.ones(64, 1)),
        "pertoken_scale dim num must be 1",
    ),
    "product with a scale of no dimension": (lambda o: _product(o, scale=META.ones()), "the scale dim num must be 1"),
}

#: What the meta kernels let pass, so that only a device, or the host NPU, objects.
UNSEEN: dict[str, Call] = {
    "layout": lambda o: _attention(o, 4, "XYZ"),
    "head_num": lambda o: _attention(o, 7, "BSND"),
    "no lengths": lambda o: _packed(o),
    "shape of the mask": lambda o: _attention(o, atten_mask=META.mask(1, 1, 1, 24)),
    "dtypes of attention": lambda o: torch.ops.npu.npu_fusion_attention(o["q"], o["k"].float(), o["k"], 4, "BSND"),
    "uint8 without query_dtype": lambda o: _infer(o | {"q": o["q"].to(UINT8)}),
    "rotary_mode": lambda o: torch.ops.npu.npu_rotary_mul(o["q"], o["q"], o["q"], "nonsense"),
    "quant_mode": lambda o: torch.ops.npu.npu_dynamic_quant(o["x"], dst_type=HIFLOAT8, quant_mode="nonsense"),
    "dynamic_quant of fp32": lambda o: torch.ops.npu.npu_dynamic_quant(o["x"].to(FP32), dst_type=HIFLOAT8),
    "dynamic_quant of one dimension": lambda o: torch.ops.npu.npu_dynamic_quant(
        o["x"][0], dst_type=HIFLOAT8, quant_mode="pertensor"
    ),
    "one scale and one for each column": lambda o: _product(o, scale=META.ones(32)),
    "bias in bf16": lambda o: _product(o, bias=META.floats(32)),
    "dtype of one factor": lambda o: _product(o, x2_dtype=None),
}


def _is_refused(name: str, words: str) -> Callable[[], None]:
    def run() -> None:
        try:
            result = REFUSED[name][0](_operands())
        except Exception as error:
            assert words in str(error), f"refused, but with other words: {error}"
        else:
            raise AssertionError(f"not refused any more; gave {form(result)}")

    return run


def _passes(name: str) -> Callable[[], None]:
    def run() -> None:
        UNSEEN[name](_operands())

    return run

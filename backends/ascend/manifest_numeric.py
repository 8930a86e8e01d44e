"""The quantize and fused families of the manifest, pure data. In order of preference: what NPUs do natively, then the
same values in bf16, then plain PyTorch.
"""

import torch

from ospnext.ops.registry import Implementation, Refusal

_HERE = "ospnext.backends.ascend"
_REFERENCE = "ospnext.backends.reference"
_SCALED = frozenset({"scale_max", "scale_mode", "granularity", "given_amax"})
_LINEAR = frozenset(
    {
        *("x_granularity", "weight_granularity", "bias", "mixed_bias"),
        *("accumulate", "scale_max", "grad_scale_max", "backward"),
    }
)
_PLAIN = "plain PyTorch operators on the device: exact, not fast"

_SOC = Refusal("soc", device={"capability": "910B"})
_FP64 = Refusal("dtype", {"dtype": torch.float64})
_EMPTY = Refusal("size", {"shape": (0, 96)})
_OF_LINEAR = (_FP64, Refusal("accumulate", {"accumulate": "fp64"}), Refusal("size", {"shape": (0, 96, 112)}))
_PER_ELEMENT = ("elements", (_FP64, _EMPTY))
_TURNED = (
    "rope",
    (
        _FP64,
        Refusal("size", {"shape": (2, 0, 3, 32)}),
        Refusal("head_dim", {"shape": (1, 4, 1, 1026)}),
    ),
)

#: Fused operator -> (its predicate and what that refuses; features of it and of its definition; what it calls).
_FUSED = {
    "rms_norm": (_PER_ELEMENT, {"backward"}, "npu_rms_norm"),
    "layer_norm_modulate": (
        _PER_ELEMENT,
        {"affine", "modulated", "backward"},
        "layer norm whose weight and bias hold the modulation",
    ),
    "rope": (_TURNED, {"backward"}, "npu_rotary_mul in fp32"),
    "rms_norm_rope": (_PER_ELEMENT, {"backward"}, "npu_rms_norm and npu_rotary_mul in fp32"),
    "gelu_tanh": (_PER_ELEMENT, {"backward"}, "npu_gelu"),
}

NUMERIC = (
    Implementation(
        "ascend.cast",
        "hif8_encode",
        f"{_HERE}.quantize:encode",
        supports=f"{_HERE}.predicates_numeric:hif8",
        refusals=(_SOC, _FP64),
        note="npu_dtype_cast",
    ),
    Implementation(
        "ascend.torch", "hif8_encode", f"{_REFERENCE}.quantize:encode", handles=frozenset({"saturate"}), note=_PLAIN
    ),
    Implementation(
        "ascend.cast",
        "hif8_decode",
        f"{_HERE}.quantize:decode",
        supports=f"{_HERE}.predicates_numeric:hif8",
        refusals=(_SOC, _FP64),
        note="npu_dtype_cast",
    ),
    Implementation("ascend.torch", "hif8_decode", f"{_REFERENCE}.quantize:decode", note=_PLAIN),
    Implementation(
        "ascend.quantize",
        "hif8_quantize",
        f"{_HERE}.quantize:quantize",
        supports=f"{_HERE}.predicates_numeric:hif8",
        handles=_SCALED,
        refusals=(_SOC, _FP64),
        note="scale by PyTorch, codes by npu_quantize, whose quotients may be a unit of fp32 off; as ascend.cast where "
        "amax is given",
    ),
    Implementation(
        "ascend.cast",
        "hif8_quantize",
        f"{_HERE}.quantize:cast_quantize",
        supports=f"{_HERE}.predicates_numeric:hif8",
        handles=_SCALED,
        refusals=(_SOC, _FP64),
        note="scale and quotient by PyTorch, codes by npu_dtype_cast",
    ),
    Implementation("ascend.torch", "hif8_quantize", f"{_REFERENCE}.quantize:quantize", handles=_SCALED, note=_PLAIN),
    Implementation(
        "ascend.quantize",
        "hif8_fake_quantize",
        f"{_HERE}.quantize:fake_quantize",
        supports=f"{_HERE}.predicates_numeric:hif8",
        handles=_SCALED,
        refusals=(_SOC, _FP64),
        note="npu_quantize and back; as ascend.cast where amax is given",
    ),
    Implementation(
        "ascend.cast",
        "hif8_fake_quantize",
        f"{_HERE}.quantize:cast_fake_quantize",
        supports=f"{_HERE}.predicates_numeric:hif8",
        handles=_SCALED,
        refusals=(_SOC, _FP64),
        note="npu_dtype_cast there and back",
    ),
    Implementation(
        "ascend.torch", "hif8_fake_quantize", f"{_REFERENCE}.quantize:fake_quantize", handles=_SCALED, note=_PLAIN
    ),
    Implementation(
        "ascend.hif8",
        "quantized_linear",
        f"{_HERE}.quantized_linear:native",
        supports=f"{_HERE}.predicates_numeric:hif8_matmul",
        handles=_LINEAR,
        refusals=(_SOC, *_OF_LINEAR, Refusal("row", {"shape": (8, 96, 70_000)})),
        note="npu_quant_matmul on HiF8 codes, with scales for each row and column; bias in fp32 outside",
    ),
    Implementation(
        "ascend.qdq",
        "quantized_linear",
        f"{_HERE}.quantized_linear:qdq",
        supports=f"{_HERE}.predicates_numeric:qdq",
        handles=_LINEAR,
        refusals=_OF_LINEAR,
        note="emulates HiF8 in bf16: QDQ; operands exact, sums in fp32",
    ),
    Implementation(
        "ascend.torch",
        "quantized_linear",
        f"{_REFERENCE}.quantized_linear:linear",
        handles=_LINEAR,
        note=_PLAIN,
    ),
    *(
        Implementation(
            "ascend.npu",
            f"fused.{name}",
            f"{_HERE}.fused:{name}",
            supports=f"{_HERE}.predicates_numeric:{predicate}",
            handles=frozenset(features),
            refusals=refusals,
            note=calls,
        )
        for name, ((predicate, refusals), features, calls) in _FUSED.items()
    ),
    *(
        Implementation(
            "ascend.torch",
            f"fused.{name}",
            f"{_REFERENCE}.fused:{name}",
            handles=frozenset(features),
            note="the definition in plain PyTorch, a pass for each operation",
        )
        for name, (_, features, _) in _FUSED.items()
    ),
)

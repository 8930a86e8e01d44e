"""Entries of the manifest for attention, best first, and for attention on HiFloat8. Data only."""

import torch

from ospnext.ops.registry import Implementation, Refusal

_HERE = "ospnext.backends.ascend"
_REFERENCE = "ospnext.backends.reference"
_EVERY_FEATURE = frozenset({"packed", "key_mask", "custom_scale", "logsumexp", "backward", "deterministic"})
_NATIVE = frozenset({"packed", "custom_scale", "scale_max", "scale_mode", "given_amax"})
_HOST_ONLY = "not run on hardware yet; judged on the host NPU"

_FP64 = Refusal("dtype", {"dtype": torch.float64})
#: Of attention, where the documents state limits.
_SIZES = (
    _FP64,
    Refusal("heads", {"heads": 257}),
    Refusal("head_dim", {"head_dim": 1024}),
    Refusal("length", {"kv_len": 0}),
    Refusal("batch", {"batch": 1 << 22}),
)
_MASK = Refusal("mask", {"key_mask": True, "batch": 2048, "q_len": 4096, "kv_len": 4096})
_SOC = Refusal("soc", device={"capability": "910B"})

#: The first is for training and inference alike, so that both see the same numbers.
ATTENTION = (
    Implementation(
        "ascend.fusion",
        "attention",
        f"{_HERE}.attention.fusion:fusion",
        supports=f"{_HERE}.predicates:fusion",
        handles=_EVERY_FEATURE,
        refusals=(*_SIZES, _MASK),
        note=f"npu_fusion_attention, for training and inference; {_HOST_ONLY}",
    ),
    Implementation(
        "ascend.infer",
        "attention",
        f"{_HERE}.attention.infer:infer",
        supports=f"{_HERE}.predicates:infer",
        handles=frozenset({"packed", "custom_scale", "logsumexp"}),
        refusals=(
            *_SIZES,
            Refusal("alignment", {"head_dim": 40}, device={"capability": "910B"}),
            Refusal("keys", {"q_len": 1, "kv_len": 1 << 19}),
        ),
        note=f"npu_fused_infer_attention_score_v2; {_HOST_ONLY}",
    ),
    Implementation(
        "ascend.sdpa",
        "attention",
        f"{_HERE}.attention.sdpa:sdpa",
        supports=f"{_HERE}.predicates:sdpa",
        handles=frozenset({"packed", "key_mask", "custom_scale"}),
        refusals=(*_SIZES, Refusal("alignment", {"dtype": torch.float32, "head_dim": 30}), _MASK),
        note=f"PyTorch's scaled_dot_product_attention, as torch_npu maps it; {_HOST_ONLY}",
    ),
    Implementation(
        "ascend.math",
        "attention",
        f"{_REFERENCE}.attention:math",
        supports=f"{_HERE}.predicates:math",
        handles=_EVERY_FEATURE,
        refusals=(_FP64,),
        note="the formula of the reference in fp32: takes what no kernel does",
    ),
    Implementation(
        "ascend.quant_fusion",
        "native_attention",
        f"{_HERE}.attention.quant_fusion:quant_fusion",
        supports=f"{_HERE}.predicates:quant_fusion",
        handles=_NATIVE - {"packed"},
        refusals=(_SOC, _FP64, Refusal("shape", {"q_len": 7201})),
        note=f"npu_quant_fusion_attention, P rounded to HiF8; two shapes only; {_HOST_ONLY}",
    ),
    Implementation(
        "ascend.infer_hif8",
        "native_attention",
        f"{_HERE}.attention.infer_hif8:infer_hif8",
        supports=f"{_HERE}.predicates:infer_hif8",
        handles=_NATIVE,
        refusals=(_SOC, *_SIZES),
        note=f"npu_fused_infer_attention_score_v2 on HiF8, P rounded to HiF8; {_HOST_ONLY}",
    ),
)

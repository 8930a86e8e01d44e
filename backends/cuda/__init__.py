"""The CUDA backend. This file is its manifest, pure data."""

import torch

from ospnext.ops.registry import Implementation, Manifest, Refusal

_HERE = "ospnext.backends.cuda"
_REFERENCE = "ospnext.backends.reference"
_EVERY_FEATURE = frozenset({"packed", "key_mask", "custom_scale", "logsumexp", "backward", "deterministic"})
_LINEAR = frozenset(
    {
        *("x_granularity", "weight_granularity", "bias", "mixed_bias", "carried"),
        *("accumulate", "scale_max", "grad_scale_max", "backward"),
    }
)
_SCALED = frozenset({"scale_max", "scale_mode", "granularity", "given_amax"})
_PLAIN = "plain PyTorch operators on the device: exact, not fast"
_NOT_RUN = "written against its sources, not run on hardware yet"

_FLASH_REFUSALS = (
    Refusal("dtype", {"dtype": torch.float32}),
    Refusal("head_dim", {"head_dim": 20}),
    Refusal("length", {"kv_len": 0}),
)

_FP8_REFUSALS = (
    Refusal("capability", device={"capability": (8, 0)}),
    Refusal("dtype", {"dtype": torch.float32}),
    Refusal("alignment", {"shape": (8, 96, 100)}),
    Refusal("scale_max", {"scale_max": 512.0}),
    Refusal("grad_scale_max", {"grad_scale_max": 512.0}),
    Refusal("granularity", {"x_granularity": "row", "backward": True}),
    Refusal("accumulate", {"accumulate": "fp64"}),
)

_NO_FP8 = Refusal("capability", {"carried": True}, device={"capability": (8, 6)})
_TRITON_REFUSALS = (Refusal("dtype", {"dtype": torch.float64}), Refusal("granularity", {"granularity": "channel"}))

_FP64 = Refusal("dtype", {"dtype": torch.float64})
#: Predicate of a fused kernel, and what it refuses.
_ELEMENTS = ("triton_elements", (_FP64,))
_ROWS = ("triton_rows", (_FP64, Refusal("row", {"shape": (2, 3, 20_000)})))
_ROWS_OF_CODES = ("triton_codes", (*_ROWS[1], _NO_FP8))
_CODES = {"scale_max", "scale_mode", "granularity", "carried"}
#: Fused operator -> (kind of its kernel, features of it and of its definition).
_FUSED = {
    "rms_norm": (_ROWS, {"backward"}),
    "layer_norm_modulate": (_ROWS, {"affine", "modulated", "backward"}),
    "rope": (_ROWS, {"backward"}),
    "rms_norm_rope": (_ROWS, {"backward"}),
    "gate_residual": (_ELEMENTS, {"gated", "permuted", "backward"}),
    "gelu_tanh": (_ELEMENTS, {"backward"}),
    "layer_norm_modulate_quantize": (_ROWS_OF_CODES, {"affine", "modulated", *_CODES}),
    "gelu_tanh_quantize": (_ROWS_OF_CODES, _CODES),
}
_DEFINED = {name: features for name, (_, features) in _FUSED.items()} | {"linear_gelu_tanh": set()}

MANIFEST = Manifest(
    backend="cuda",
    description="NVIDIA GPUs",
    device_types=("cuda",),
    probe=f"{_HERE}.device:probe",
    priority=100,
    needs="an NVIDIA GPU of compute capability 8.0 or newer, its driver, and a CUDA build of PyTorch",
    # Fastest first, as measured on Hopper; predicates leave out what a generation of GPUs lacks. docs/cuda.md has the
    # order for each.
    implementations=(
        Implementation(
            "cuda.fa4",
            "attention",
            f"{_HERE}.attention.flash4:flash4",
            supports=f"{_HERE}.predicates:fa4",
            handles=_EVERY_FEATURE,
            requires=("flash_attn.cute",),
            compiled_by=("nvidia-cutlass-dsl", "quack-kernels"),
            install="pip install 'ospnext[cuda]'",
            refusals=(
                Refusal("capability", device={"capability": (8, 0)}),
                Refusal("gradient_head_dim", {"head_dim": 80, "backward": True}),
                *_FLASH_REFUSALS,
            ),
            note="FlashAttention-4",
        ),
        Implementation(
            "cuda.fa3",
            "attention",
            f"{_HERE}.attention.flash3:flash3",
            supports=f"{_HERE}.predicates:fa3",
            handles=_EVERY_FEATURE,
            requires=("flash_attn_interface",),
            install="a build of hopper/ of https://github.com/Dao-AILab/flash-attention",
            refusals=(
                Refusal("capability", device={"capability": (8, 0)}),
                Refusal("deterministic_head_dim", {"head_dim": 256, "backward": True, "deterministic": True}),
                *_FLASH_REFUSALS,
            ),
            note=f"FlashAttention-3; {_NOT_RUN}",
        ),
        Implementation(
            "cuda.cudnn",
            "attention",
            f"{_HERE}.attention.cudnn:cudnn",
            supports=f"{_HERE}.predicates:cudnn",
            handles=frozenset({"packed", "custom_scale", "logsumexp"}),
            refusals=(Refusal("capability", device={"capability": (7, 5)}), *_FLASH_REFUSALS),
            note="cuDNN through PyTorch",
        ),
        Implementation(
            "cuda.fa2",
            "attention",
            f"{_HERE}.attention.flash2:flash2",
            supports=f"{_HERE}.predicates:fa2",
            handles=_EVERY_FEATURE,
            requires=("flash_attn.flash_attn_interface",),
            install="pip install flash-attn --no-build-isolation",
            refusals=(Refusal("capability", device={"capability": (7, 5)}), *_FLASH_REFUSALS),
            note=f"FlashAttention-2 of the package flash-attn; {_NOT_RUN}",
        ),
        Implementation(
            "cuda.flash",
            "attention",
            f"{_HERE}.attention.torch_flash:flash",
            supports=f"{_HERE}.predicates:flash",
            handles=_EVERY_FEATURE,
            refusals=_FLASH_REFUSALS,
            note="FlashAttention-2 as PyTorch ships it",
        ),
        Implementation(
            "cuda.efficient",
            "attention",
            f"{_HERE}.attention.efficient:efficient",
            supports=f"{_HERE}.predicates:efficient",
            handles=_EVERY_FEATURE,
            refusals=(Refusal("batch", {"batch": 1 << 16}), *_FLASH_REFUSALS),
            note="memory-efficient attention as PyTorch ships it",
        ),
        Implementation(
            "cuda.math",
            "attention",
            f"{_REFERENCE}.attention:math",
            handles=_EVERY_FEATURE,
            note="the formula of the reference in fp32: takes what no kernel does",
        ),
        Implementation(
            "cuda.nccl",
            "collective",
            f"{_REFERENCE}.device_collective:on_device",
            supports=f"{_HERE}.predicates:nccl",
            handles=frozenset({"uneven", "reduction", "local_ranks", "ranks_per_device"}),
            refusals=(
                Refusal("ranks", {"ranks": 2}, device={"count": 1}),
                Refusal("ranks", {"ranks_per_device": 2}),
                Refusal("dtype", {"dtype": torch.float8_e4m3fn}),
            ),
            note="NCCL, a GPU for each rank",
        ),
        Implementation(
            "cuda.host",
            "collective",
            f"{_REFERENCE}.collective:gloo",
            supports=f"{_REFERENCE}.predicates:gloo",
            handles=frozenset({"uneven", "reduction", "local_ranks", "ranks_per_device"}),
            refusals=(Refusal("dtype", {"dtype": torch.float8_e4m3fn}),),
            note="gloo through the host: any number of ranks can share a GPU",
        ),
        Implementation(
            "cuda.torch", "hif8_encode", f"{_REFERENCE}.quantize:encode", handles=frozenset({"saturate"}), note=_PLAIN
        ),
        Implementation("cuda.torch", "hif8_decode", f"{_REFERENCE}.quantize:decode", note=_PLAIN),
        Implementation(
            "cuda.triton",
            "hif8_quantize",
            f"{_HERE}.quantize:quantize",
            supports=f"{_HERE}.predicates:triton_quantize",
            handles=_SCALED | {"carried"},
            requires=("triton",),
            refusals=(*_TRITON_REFUSALS, _NO_FP8),
            note="codes in one pass after amax",
        ),
        Implementation(
            "cuda.torch", "hif8_quantize", f"{_REFERENCE}.quantize:quantize", handles=_SCALED | {"carried"}, note=_PLAIN
        ),
        Implementation(
            "cuda.triton",
            "hif8_fake_quantize",
            f"{_HERE}.quantize:fake_quantize",
            supports=f"{_HERE}.predicates:triton_quantize",
            handles=_SCALED,
            requires=("triton",),
            refusals=_TRITON_REFUSALS,
            note="values in one pass after amax",
        ),
        Implementation(
            "cuda.torch", "hif8_fake_quantize", f"{_REFERENCE}.quantize:fake_quantize", handles=_SCALED, note=_PLAIN
        ),
        Implementation(
            "cuda.fp8_carrier",
            "quantized_linear",
            f"{_HERE}.quantized_linear:fp8_carrier",
            supports=f"{_HERE}.predicates:fp8_carrier",
            handles=_LINEAR - {"mixed_bias"},
            prefers=frozenset({"carried"}),
            requires=("triton",),
            refusals=_FP8_REFUSALS,
            note="emulates HiF8 on FP8 tensor cores; operands exact from 2^-12 of 15, sums with fewer bits than fp32",
        ),
        Implementation(
            "cuda.bf16_grid",
            "quantized_linear",
            f"{_HERE}.quantized_linear:bf16_grid",
            supports=f"{_HERE}.predicates:bf16_grid",
            handles=_LINEAR,
            requires=("triton",),
            refusals=(
                Refusal("accumulate", {"accumulate": "fp64"}),
                Refusal("dtype", {"dtype": torch.float64}),
                Refusal("size", {"shape": (0, 96, 112)}),
            ),
            note="emulates HiF8 on bf16 tensor cores; operands exact, sums in fp32",
        ),
        Implementation(
            "cuda.cudnn_fp8",
            "native_attention",
            f"{_HERE}.attention.cudnn_fp8:cudnn_fp8",
            supports=f"{_HERE}.predicates:cudnn_fp8",
            handles=frozenset({"packed", "custom_scale", "scale_max", "scale_mode", "given_amax"}),
            requires=("cudnn", "triton"),
            install="pip install --no-deps nvidia-cudnn-frontend==1.32.0",
            refusals=(
                Refusal("capability", device={"capability": (8, 9)}),
                Refusal("scale_max", {"scale_max": 512.0}),
                Refusal("dtype", {"dtype": torch.float32}),
                Refusal("head_dim", {"head_dim": 40}),
                Refusal("length", {"kv_len": 0}),
            ),
            note="emulates HiF8 on FP8 tensor cores; P and the result rounded to E4M3, about 3e-2 from qdq",
        ),
        Implementation(
            "cuda.torch",
            "quantized_linear",
            f"{_REFERENCE}.quantized_linear:linear",
            handles=_LINEAR,
            note=_PLAIN,
        ),
        # Last, and so chosen by name only.
        Implementation(
            "cuda.fp8_split",
            "quantized_linear",
            f"{_HERE}.fp8_split:fp8_split",
            supports=f"{_HERE}.predicates:fp8_carrier",
            handles=_LINEAR - {"mixed_bias", "carried"},
            refusals=_FP8_REFUSALS,
            note=f"emulates HiF8 on FP8 tensor cores with exact operands in four products, to validate; {_NOT_RUN}",
        ),
        *(
            Implementation(
                "cuda.triton",
                f"fused.{name}",
                f"{_HERE}.fused:{name}",
                supports=f"{_HERE}.predicates:{predicate}",
                handles=frozenset(features),
                requires=("triton",),
                refusals=refusals,
                note="one pass over memory",
            )
            for name, ((predicate, refusals), features) in _FUSED.items()
        ),
        Implementation(
            "cuda.cublas",
            "fused.linear_gelu_tanh",
            f"{_HERE}.linear:linear_gelu_tanh",
            supports=f"{_HERE}.predicates:cublas_epilogue",
            refusals=(Refusal("dtype", {"dtype": torch.float32}), Refusal("size", {"shape": (0, 96)})),
            note="GELU in the epilogue of cuBLASLt's product, which saves two passes over the hidden features",
        ),
        *(
            Implementation(
                "cuda.torch",
                f"fused.{name}",
                f"{_REFERENCE}.fused:{name}",
                handles=frozenset(features),
                note="the definition in plain PyTorch, a pass for each operation",
            )
            for name, features in _DEFINED.items()
        ),
    ),
)

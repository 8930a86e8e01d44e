"""The CUDA backend. This file is its manifest, pure data."""

import torch

from ospnext.ops.registry import Implementation, Manifest, Refusal

_HERE = "ospnext.backends.cuda"
_REFERENCE = "ospnext.backends.reference"
_EVERY_FEATURE = frozenset({"packed", "key_mask", "custom_scale", "logsumexp", "backward", "deterministic"})
_LINEAR = frozenset(
    {
        *("x_granularity", "weight_granularity", "bias", "mixed_bias"),
        *("accumulate", "scale_max", "grad_scale_max", "backward"),
    }
)
_SCALED = frozenset({"scale_max", "scale_mode", "granularity", "given_amax"})
_PLAIN = "plain PyTorch operators on the device: exact, not fast"

_FLASH_REFUSALS = (
    Refusal("dtype", {"dtype": torch.float32}),
    Refusal("head_dim", {"head_dim": 20}),
    Refusal("length", {"kv_len": 0}),
)

_TRITON_REFUSALS = (Refusal("dtype", {"dtype": torch.float64}), Refusal("granularity", {"granularity": "channel"}))

MANIFEST = Manifest(
    backend="cuda",
    description="NVIDIA GPUs",
    device_types=("cuda",),
    probe=f"{_HERE}.device:probe",
    priority=100,
    needs="an NVIDIA GPU of compute capability 8.0 or newer, its driver, and a CUDA build of PyTorch",
    # Fastest first, as measured on Hopper.
    implementations=(
        Implementation(
            "cuda.fa4",
            "attention",
            f"{_HERE}.attention.flash4:flash4",
            supports=f"{_HERE}.predicates:fa4",
            handles=_EVERY_FEATURE,
            requires=("flash_attn.cute",),
            refusals=(
                Refusal("capability", device={"capability": (8, 0)}),
                Refusal("gradient_head_dim", {"head_dim": 80, "backward": True}),
                *_FLASH_REFUSALS,
            ),
            note="FlashAttention-4",
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
            "cuda.flash",
            "attention",
            f"{_HERE}.attention.torch_flash:flash",
            supports=f"{_HERE}.predicates:flash",
            handles=_EVERY_FEATURE,
            refusals=_FLASH_REFUSALS,
            note="FlashAttention-2 as PyTorch ships it",
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
            f"{_HERE}.collective:nccl",
            supports=f"{_HERE}.predicates:nccl",
            handles=frozenset({"uneven", "reduction"}),
            refusals=(
                Refusal("ranks", {"ranks": 2}, device={"count": 1}),
                Refusal("dtype", {"dtype": torch.float8_e4m3fn}),
            ),
            note="NCCL, a GPU for each rank",
        ),
        Implementation(
            "cuda.host",
            "collective",
            f"{_REFERENCE}.collective:gloo",
            supports=f"{_REFERENCE}.predicates:gloo",
            handles=frozenset({"uneven", "reduction"}),
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
            handles=_SCALED,
            requires=("triton",),
            refusals=_TRITON_REFUSALS,
            note="codes in one pass after amax",
        ),
        Implementation("cuda.torch", "hif8_quantize", f"{_REFERENCE}.quantize:quantize", handles=_SCALED, note=_PLAIN),
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
            requires=("triton",),
            refusals=(
                Refusal("capability", device={"capability": (8, 0)}),
                Refusal("dtype", {"dtype": torch.float32}),
                Refusal("alignment", {"shape": (8, 96, 100)}),
                Refusal("scale_max", {"scale_max": 512.0}),
                Refusal("grad_scale_max", {"grad_scale_max": 512.0}),
                Refusal("granularity", {"x_granularity": "row"}),
                Refusal("accumulate", {"accumulate": "fp64"}),
            ),
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
            "cuda.torch",
            "quantized_linear",
            f"{_REFERENCE}.quantized_linear:linear",
            handles=_LINEAR,
            note=_PLAIN,
        ),
    ),
)

"""The CUDA backend. This file is its manifest, pure data."""

import torch

from ospnext.ops.registry import Implementation, Manifest, Refusal

_HERE = "ospnext.backends.cuda"
_REFERENCE = "ospnext.backends.reference"
_EVERY_FEATURE = frozenset({"packed", "key_mask", "custom_scale", "logsumexp", "backward", "deterministic"})
_SCALED = frozenset({"scale_max", "scale_mode", "granularity", "given_amax"})
_PLAIN = "plain PyTorch operators on the device: exact, not fast"

_FLASH_REFUSALS = (
    Refusal("dtype", {"dtype": torch.float32}),
    Refusal("head_dim", {"head_dim": 20}),
    Refusal("length", {"kv_len": 0}),
)

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
            refusals=(Refusal("capability", device={"capability": (8, 0)}), *_FLASH_REFUSALS),
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
        Implementation("cuda.torch", "hif8_quantize", f"{_REFERENCE}.quantize:quantize", handles=_SCALED, note=_PLAIN),
        Implementation(
            "cuda.torch", "hif8_fake_quantize", f"{_REFERENCE}.quantize:fake_quantize", handles=_SCALED, note=_PLAIN
        ),
        Implementation(
            "cuda.torch",
            "quantized_linear",
            f"{_REFERENCE}.quantized_linear:linear",
            handles=frozenset({"x_granularity", "weight_granularity", "bias", "accumulate", "backward"}),
            note=_PLAIN,
        ),
    ),
)

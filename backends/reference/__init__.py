"""The reference backend: plain PyTorch, on any device. This file is its manifest, pure data."""

import torch

from ospnext.ops.registry import ANY_DEVICE, Implementation, Manifest, Refusal

_HERE = "ospnext.backends.reference"
_EVERY_FEATURE = frozenset({"packed", "key_mask", "custom_scale", "logsumexp", "backward", "deterministic"})
_LINEAR = frozenset(
    {
        *("x_granularity", "weight_granularity", "bias", "mixed_bias", "carried"),
        *("accumulate", "scale_max", "grad_scale_max", "backward"),
    }
)
_SCALED = frozenset({"scale_max", "scale_mode", "granularity", "given_amax"})
_EXACT = "exact, from the definition of the format"

MANIFEST = Manifest(
    backend="reference",
    description="plain PyTorch; runs on any device",
    device_types=("cpu", ANY_DEVICE),
    probe=f"{_HERE}.device:probe",
    needs="nothing but PyTorch",
    # On a CPU, PyTorch's kernel is several times faster; the formula takes whatever that one does not.
    implementations=(
        Implementation(
            "reference.sdpa",
            "attention",
            f"{_HERE}.sdpa:sdpa",
            supports=f"{_HERE}.predicates:sdpa",
            handles=frozenset({"packed", "custom_scale", "logsumexp", "backward"}),
            refusals=(
                Refusal("device", {"device_type": "meta"}),
                Refusal("dtype", {"dtype": torch.float8_e4m3fn}),
                Refusal("length", {"kv_len": 0}),
                Refusal("gradient_length", {"dtype": torch.bfloat16, "kv_len": 10_000, "backward": True}),
            ),
            note="PyTorch's own flash attention for CPU",
        ),
        Implementation(
            "reference.math",
            "attention",
            f"{_HERE}.attention:math",
            handles=_EVERY_FEATURE,
            note="fp32 softmax in blocks of query rows",
        ),
        Implementation(
            "reference.gloo",
            "collective",
            f"{_HERE}.collective:gloo",
            supports=f"{_HERE}.predicates:gloo",
            handles=frozenset({"uneven", "reduction", "local_ranks", "ranks_per_device"}),
            refusals=(Refusal("dtype", {"dtype": torch.float8_e4m3fn}),),
            note="torch.distributed on the group of the call; gloo on CPUs",
        ),
        Implementation(
            "reference.hif8", "hif8_encode", f"{_HERE}.quantize:encode", handles=frozenset({"saturate"}), note=_EXACT
        ),
        Implementation("reference.hif8", "hif8_decode", f"{_HERE}.quantize:decode", note=_EXACT),
        Implementation(
            "reference.hif8", "hif8_quantize", f"{_HERE}.quantize:quantize", handles=_SCALED | {"carried"}, note=_EXACT
        ),
        Implementation(
            "reference.hif8", "hif8_fake_quantize", f"{_HERE}.quantize:fake_quantize", handles=_SCALED, note=_EXACT
        ),
        Implementation(
            "reference.hif8",
            "quantized_linear",
            f"{_HERE}.quantized_linear:linear",
            handles=_LINEAR,
            note="values of the grid in fp32, so that every product is exact",
        ),
    ),
)

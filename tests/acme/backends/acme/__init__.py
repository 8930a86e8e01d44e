"""The manifest of the Acme backend, whose device is an ordinary CPU."""

from ospnext.ops.registry import Implementation, Manifest, Refusal

_LINEAR = frozenset(
    {
        *("x_granularity", "weight_granularity", "bias", "mixed_bias"),
        *("accumulate", "scale_max", "grad_scale_max", "backward", "carried"),
    }
)
_SCALED = frozenset({"scale_max", "scale_mode", "granularity", "given_amax"})

MANIFEST = Manifest(
    backend="acme",
    description="Acme One, which computes like a CPU",
    device_types=("cpu",),
    probe="backends.acme.device:probe",
    cases="backends.acme.cases:cases",
    needs="nothing",
    implementations=(
        Implementation(
            "acme.sdpa",
            "attention",
            "backends.acme.attention:sdpa",
            handles=frozenset({"custom_scale"}),
            supports="backends.acme.predicates:sdpa",
            refusals=(Refusal("head_dim", {"head_dim": 20}), Refusal("length", {"kv_len": 0})),
        ),
        Implementation(
            "acme.rows",
            "attention",
            "backends.acme.attention:rows",
            handles=frozenset({"packed", "key_mask", "custom_scale", "logsumexp", "backward", "deterministic"}),
        ),
        Implementation(
            "acme.exchange",
            "collective",
            "backends.acme.collective:exchange",
            handles=frozenset({"uneven", "reduction", "local_ranks", "ranks_per_device"}),
        ),
        Implementation("acme.bits", "hif8_encode", "backends.acme.quantize:encode", handles=frozenset({"saturate"})),
        Implementation("acme.bits", "hif8_decode", "backends.acme.quantize:decode"),
        Implementation("acme.bits", "hif8_quantize", "backends.acme.quantize:quantize", handles=_SCALED | {"carried"}),
        Implementation("acme.bits", "hif8_fake_quantize", "backends.acme.quantize:fake_quantize", handles=_SCALED),
        Implementation(
            "acme.bits",
            "quantized_linear",
            "backends.acme.quantize:linear",
            handles=_LINEAR,
        ),
        Implementation(
            "acme.rms_norm",
            "fused.rms_norm",
            "backends.acme.fused:rms_norm",
            handles=frozenset({"backward"}),
        ),
    ),
)

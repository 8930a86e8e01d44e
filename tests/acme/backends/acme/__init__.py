"""The manifest of the Acme backend, whose device is an ordinary CPU."""

from ospnext.ops.registry import Implementation, Manifest, Refusal

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
            handles=frozenset({"uneven", "reduction"}),
        ),
        Implementation(
            "acme.rms_norm",
            "fused.rms_norm",
            "backends.acme.fused:rms_norm",
            handles=frozenset({"backward"}),
        ),
    ),
)

"""The Ascend backend. This file is its manifest, pure data."""

import torch

from ospnext.ops.registry import Implementation, Manifest, Refusal

from .manifest_attention import ATTENTION
from .manifest_numeric import NUMERIC

_HERE = "ospnext.backends.ascend"
_REFERENCE = "ospnext.backends.reference"

MANIFEST = Manifest(
    backend="ascend",
    description="Huawei Ascend NPUs",
    device_types=("npu",),
    probe=f"{_HERE}.device:probe",
    priority=100,
    needs="an Ascend NPU with its driver, CANN (source its set_env.sh), and torch_npu of the same version as torch; "
    "docs/ascend.md says which versions",
    without_device="`ospnext conformance run --backend ascend --host-npu` judges it on an NPU emulated in host memory, "
    "and `python -m ospnext.conformance.host_npu $(which ospnext) COMMAND` runs any command there (docs/host_npu.md)",
    acceptance=f"{_HERE}.acceptance:items",
    implementations=(
        *ATTENTION,
        Implementation(
            "ascend.hccl",
            "collective",
            f"{_REFERENCE}.device_collective:on_device",
            supports=f"{_HERE}.predicates_collective:hccl",
            handles=frozenset({"uneven", "reduction", "local_ranks", "ranks_per_device"}),
            refusals=(
                Refusal("ranks", {"ranks": 2}, device={"count": 1}),
                Refusal("ranks", {"ranks_per_device": 2}),
                Refusal("dtype", {"dtype": torch.float8_e4m3fn}),
            ),
            note="HCCL, an NPU for each rank",
        ),
        Implementation(
            "ascend.host",
            "collective",
            f"{_REFERENCE}.collective:gloo",
            supports=f"{_REFERENCE}.predicates:gloo",
            handles=frozenset({"uneven", "reduction", "local_ranks", "ranks_per_device"}),
            refusals=(Refusal("dtype", {"dtype": torch.float8_e4m3fn}),),
            note="gloo through the host: any number of ranks can share an NPU",
        ),
        *NUMERIC,
    ),
)

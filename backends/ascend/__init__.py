"""The Ascend backend. This file is its manifest, pure data; so far the backend can probe its device and declares no
kernels.
"""

from ospnext.ops.registry import Manifest

MANIFEST = Manifest(
    backend="ascend",
    description="Huawei Ascend NPUs",
    device_types=("npu",),
    probe="ospnext.backends.ascend.device:probe",
    priority=100,
    needs="an Ascend NPU with its driver, CANN (source its set_env.sh), and torch_npu of the same version as torch",
)

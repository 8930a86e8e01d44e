"""The CUDA backend. This file is its manifest, pure data; so far the backend can probe its device and declares no
kernels.
"""

from ospnext.ops.registry import Manifest

MANIFEST = Manifest(
    backend="cuda",
    description="NVIDIA GPUs",
    device_types=("cuda",),
    probe="ospnext.backends.cuda.device:probe",
    priority=100,
    needs="an NVIDIA GPU of compute capability 8.0 or newer, its driver, and a CUDA build of PyTorch",
)

"""Probe of the CUDA backend: which of PyTorch build, driver and device is missing, told apart."""

from __future__ import annotations

import torch

from ospnext.ops.contract import Reason
from ospnext.ops.registry import DeviceInfo, Probe

MINIMUM_CAPABILITY = (8, 0)


def probe() -> Probe:
    """Device 0, or every reason why there is none."""
    if not torch.backends.cuda.is_built():
        return _lacking(
            "pytorch_build",
            f"torch {torch.__version__}, built without CUDA",
            "a CUDA build of PyTorch (pip install torch from a CUDA index)",
        )
    try:
        count = torch.cuda.device_count()
        if count == 0:
            return _lacking(
                "device",
                "no NVIDIA GPU visible (driver absent, or CUDA_VISIBLE_DEVICES hides it)",
                "at least one; see nvidia-smi",
            )
        properties = torch.cuda.get_device_properties(0)
    except Exception as error:
        return _lacking("driver", str(error), f"a driver that serves CUDA {torch.version.cuda}; see nvidia-smi")
    capability = (properties.major, properties.minor)
    if capability < MINIMUM_CAPABILITY:
        return _lacking(
            "capability", f"{properties.name} with compute capability {capability}", f"at least {MINIMUM_CAPABILITY}"
        )
    versions = {
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
    }
    return Probe(DeviceInfo("cuda", properties.name, count, properties.total_memory, capability, versions))


def _lacking(code: str, got: str, want: str) -> Probe:
    return Probe(None, (Reason(code, got, want),))

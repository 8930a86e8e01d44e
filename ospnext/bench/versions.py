"""What a result depends on besides our code: device, PyTorch, and the packages whose kernels the backend may use."""

from __future__ import annotations

import platform
from typing import Any

import torch

from ospnext.bench.device import device_name
from ospnext.ops import tuning
from ospnext.ops.policy import AUTO, current_policy
from ospnext.ops.registry import registry
from ospnext.ops.select import auto_backend
from ospnext.version import __version__


def versions(device: torch.device) -> dict[str, Any]:
    """As JSON types. Packages that are not installed are left out."""
    known, policy = registry(), current_policy()
    backend = auto_backend(device.type, known) if policy.backend == AUTO else policy.backend
    found: dict[str, Any] = {
        "ospnext": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": str(device),
        "backend": backend,
        "policy": str(policy),
    }
    if backend is None:
        return found
    info = known.probe(backend).device
    if info is not None:
        found |= {"device_name": device_name(device) or info.name, **info.versions}
    found["packages"] = tuning.package_versions(known.manifests[backend], more=("diffusers",))
    return found

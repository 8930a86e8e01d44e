"""What a result depends on besides our code: device, PyTorch, and the packages whose kernels the backend may use."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch

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
        found |= {"device_name": info.name, **info.versions}
    modules = {module for i in known.manifests[backend].implementations for module in i.requires}
    found["packages"] = _installed({module.partition(".")[0] for module in modules} | {"diffusers"})
    return found


def _installed(modules: set[str]) -> dict[str, str]:
    """Distribution -> version, of those that bring any of these top-level modules."""
    brought_by = importlib.metadata.packages_distributions()
    names = sorted({name for module in modules for name in brought_by.get(module, ())})
    return {name: importlib.metadata.version(name) for name in names}

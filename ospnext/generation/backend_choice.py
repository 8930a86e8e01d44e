"""From a configuration's `backend` to the device a run uses, and what to record about it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ospnext import ops
from ospnext.ops.device import default_device
from ospnext.ops.policy import AUTO
from ospnext.ops.registry import registry
from ospnext.ops.select import auto_backend, fallbacks


@contextmanager
def chosen_backend(backend: str | None) -> Iterator[torch.device]:
    """Put `backend` in force (None: OSPNEXT_BACKEND, or else the best one found) and yield the device."""
    with ops.use_backend(backend):
        yield default_device()


def backend_record(device: torch.device) -> dict[str, Any]:
    """The backend that serves `device`, the policy that chose it, and the operators that fell back to another."""
    policy = ops.current_policy()
    return {
        "name": auto_backend(device.type, registry()) if policy.backend == AUTO else policy.backend,
        "device": str(device),
        "policy": str(policy),
        "fallbacks": [f"{contract} -> {implementation}" for contract, implementation in sorted(fallbacks)],
    }

"""The device surface: the few things besides operators that the core needs from a device, in vendor-neutral form."""

from __future__ import annotations

import resource
import sys
from typing import Any

import torch

from ospnext.errors import ConfigError
from ospnext.ops.policy import AUTO, current_policy
from ospnext.ops.registry import ANY_DEVICE, registry


class Device:
    """One device. Everything else that depends on hardware is an operator, behind a contract."""

    def __init__(self, device: str | torch.device) -> None:
        self.device = torch.device(device)
        self._module: Any = torch.get_device_module(self.device)

    @property
    def is_cpu(self) -> bool:
        return self.device.type == "cpu"

    def total_memory(self) -> int:
        """Bytes of memory that the device has."""
        return _ram("MemTotal") if self.is_cpu else self._module.get_device_properties(self.device).total_memory

    def free_memory(self) -> int | None:
        """Bytes that could be allocated now; None where that is not known."""
        if self.is_cpu:
            return _ram("MemAvailable") or None
        mem_get_info = getattr(self._module, "mem_get_info", None)
        return None if mem_get_info is None else mem_get_info(self.device)[0]

    def peak_memory(self) -> int:
        """Largest number of bytes in use since the last reset; on a CPU, of the whole process since it started."""
        return _peak_resident() if self.is_cpu else self._module.max_memory_allocated(self.device)

    def reset_peak_memory(self) -> None:
        """Start a new measurement; a CPU has none to start."""
        if not self.is_cpu:
            self._module.reset_peak_memory_stats(self.device)

    def synchronize(self) -> None:
        """Wait until everything queued on the device is done."""
        if not self.is_cpu:
            self._module.synchronize(self.device)


def default_device() -> torch.device:
    """Where a model runs under the policy in force.

    A named backend runs on its own device type. "auto" takes the best available backend that implements attention; the
    reference backend means the CPU.
    """
    policy, known = current_policy(), registry()
    if policy.backend != AUTO:
        manifests = [known.manifests[policy.backend]]
    else:
        manifests = [m for m in known.ordered() if m.offers("attention") and known.probe(m.backend).available]
    types = [t for m in manifests for t in m.device_types if t != ANY_DEVICE]
    return torch.device(types[0] if types else "cpu")


def device_of_rank(device: torch.device, local_rank: int, local_world: int) -> torch.device:
    """The device of one of the `local_world` ranks on this host, of the kind of `device`; it becomes the current one.
    All ranks share the CPU.

    Raises:
        ConfigError: the host has fewer devices than ranks.
    """
    if device.type == "cpu":
        return device
    module: Any = torch.get_device_module(device)
    if local_world > module.device_count():
        raise ConfigError(
            f"{local_world} ranks were started on this host, which has {module.device_count()} devices of type "
            f"{device.type}, and each rank needs its own: lower --nproc-per-node"
        )
    own = torch.device(device.type, local_rank)
    module.set_device(own)
    return own


def _ram(field: str) -> int:
    """Bytes from /proc/meminfo; 0 where there is none (not Linux)."""
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith(field + ":"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def _peak_resident() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

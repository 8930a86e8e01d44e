"""The device surface: the few things besides operators that the core needs from a device, in vendor-neutral form."""

from __future__ import annotations

import resource
import socket
import sys
from pathlib import Path
from typing import Any

import torch

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

    def identity(self) -> str:
        """What tells this physical device from every other one, those of other hosts included: the same text in each
        process that holds it, whichever devices that process sees.

        Where a backend knows how the host numbers devices, it is that number and what tells this host from others;
        else the UUID of the device, or without one its index here.
        """
        if self.is_cpu:
            return f"cpu of {_host()}"
        index = self._module.current_device() if self.device.index is None else self.device.index
        number = _number_on_host(self.device.type, index)
        uuid = str(getattr(self._module.get_device_properties(index), "uuid", ""))
        if not uuid.strip("0-"):  # a driver that knows none says zeros
            return f"{self.device.type} {index if number is None else number} of {_host()}"
        return f"{self.device.type} {uuid}" if number is None else f"{self.device.type} {number} ({uuid}) of {_host()}"

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


def device_of_rank(device: torch.device, local_rank: int) -> torch.device:
    """The device of a rank, of the kind of `device`; it becomes the current one. All ranks share the CPU.

    A rank that sees fewer devices than there are ranks on its host may have been shown its own only. If it was not,
    two ranks get the same one: `rank_devices.require_own_devices` finds that out.
    """
    if device.type == "cpu":
        return device
    module: Any = torch.get_device_module(device)
    own = torch.device(device.type, local_rank % module.device_count())
    module.set_device(own)
    return own


def _number_on_host(device_type: str, index: int) -> int | None:
    """How the host numbers the device that this process calls `index`; None where no backend knows."""
    known = registry()
    for manifest in known.ordered():
        found = known.probe(manifest.backend).device if device_type in manifest.device_types else None
        if found is not None and index < len(found.numbers):
            return found.numbers[index]
    return None


def _host() -> str:
    """Containers of one machine may number its devices alike, and then differ in name; machines may have one name, and
    then differ in when they were started.
    """
    try:
        started = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:  # not Linux
        started = ""
    return f"{socket.gethostname()} ({started})" if started else socket.gethostname()


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

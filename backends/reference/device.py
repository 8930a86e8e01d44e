"""Probe of the reference backend: it always finds the CPU."""

from __future__ import annotations

import os
import platform

import torch

from ospnext.ops.device import Device
from ospnext.ops.registry import DeviceInfo, Probe


def probe() -> Probe:
    """The CPU, with the number of threads PyTorch uses and the machine's memory in bytes."""
    name = f"{platform.machine()} CPU, {torch.get_num_threads()} threads of {os.cpu_count()}"
    return Probe(DeviceInfo("cpu", name, memory=Device("cpu").total_memory(), versions={"torch": torch.__version__}))

"""The probe."""

import torch

from ospnext.ops.registry import DeviceInfo, Probe


def probe():
    return Probe(DeviceInfo("cpu", "Acme One", versions={"torch": torch.__version__}))

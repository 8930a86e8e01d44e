"""Probe of the Ascend backend: which of package, CANN, driver and device is missing, all told at once."""

from __future__ import annotations

import ctypes
import glob
import importlib
import importlib.util
from collections.abc import Iterator

import torch

from ospnext.ops.contract import Reason
from ospnext.ops.registry import DeviceInfo, Probe


def probe() -> Probe:
    """Device 0, or every reason why there is none. torch_npu is imported only when nothing else is missing."""
    reasons = tuple(_lacking())
    if reasons:
        return Probe(None, reasons)
    try:
        importlib.import_module("torch_npu")
    except Exception as error:
        return Probe(
            None, (Reason("import", f"import torch_npu failed: {error}", "torch_npu that matches this torch and CANN"),)
        )
    npu = torch.get_device_module("npu")
    if npu.device_count() == 0:
        return Probe(
            None, (Reason("device", "no NPU visible", "at least one; see npu-smi info and ASCEND_RT_VISIBLE_DEVICES"),)
        )
    properties = npu.get_device_properties(0)
    versions = {"torch": torch.__version__, "torch_npu": str(importlib.import_module("torch_npu").__version__)}
    return Probe(
        DeviceInfo("npu", properties.name, npu.device_count(), properties.total_memory, properties.name, versions)
    )


def _lacking() -> Iterator[Reason]:
    if importlib.util.find_spec("torch_npu") is None:
        yield Reason("package", "torch_npu not installed", f"pip install torch_npu=={torch.__version__.split('+')[0]}")
    if torch.backends.cuda.is_built():
        yield Reason(
            "pytorch_build", f"torch {torch.__version__}, a CUDA build", "a CPU build: torch_npu refuses any other"
        )
    try:
        ctypes.CDLL("libascendcl.so")
    except OSError as error:
        yield Reason("cann", str(error), "CANN on the library path: source <CANN>/set_env.sh")
    if not glob.glob("/dev/davinci[0-9]*"):
        yield Reason("driver", "no /dev/davinci* device node", "the Ascend driver and an NPU; see npu-smi info")

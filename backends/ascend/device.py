"""Probe of the Ascend backend: which of package, version, PyTorch build, CANN, driver, device and chip is wrong, all
that can be known told at once. torch_npu is imported only when nothing else is missing.
"""

from __future__ import annotations

import ctypes
import glob
import importlib
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import torch

from ospnext.ops.contract import Reason
from ospnext.ops.registry import DeviceInfo, Probe

from .soc import Generation, generation

_GENERATIONS = f"a chip of generation {', '.join(get_args(Generation))}"
_RUNTIME = "libascendcl.so"
_RELEASE = re.compile(r"\d+\.\d+\.\d+")
#: Belongs to the driver. CANN's runtime is linked with it, so that without the driver the runtime does not load either.
_DRIVER_LIBRARY = "libascend_hal.so"


def probe() -> Probe:
    """Device 0, or every reason why there is none. `capability` is the generation of its chip: see soc.py."""
    if reasons := tuple(_lacking()):
        return Probe(None, reasons)
    try:
        torch_npu = importlib.import_module("torch_npu")
    except Exception as error:
        want = f"a torch_npu that loads with torch {torch.__version__} and this CANN"
        return _refused("import", f"import torch_npu failed: {_first_line(error)}", want)
    npu: Any = torch.get_device_module("npu")
    try:
        count = npu.device_count()
        if count == 0:
            return _refused("device", f"no NPU visible{_hidden()}", "at least one; see npu-smi info")
        properties = npu.get_device_properties(0)
    except Exception as error:
        return _refused(*_not_started(error))
    chip = generation(properties.name)
    if chip is None:
        return _refused("soc", properties.name, _GENERATIONS)
    played = _host_npu()
    return Probe(
        DeviceInfo(
            "npu",
            f"{properties.name} ({played})" if played else properties.name,
            count,
            properties.total_memory,
            chip,
            {
                "torch": torch.__version__,
                "torch_npu": torch_npu.__version__,
                "cann": npu.utils.get_cann_version() or "unknown",
            },
            played,
            _numbers(count),
        )
    )


def _lacking() -> Iterator[Reason]:
    """What can be seen from outside, without running code of the vendor."""
    wanted = _release(torch.__version__)
    if importlib.util.find_spec("torch_npu") is None:
        yield Reason("package", "torch_npu not installed", f"pip install torch_npu=={wanted}")
    elif (found := _installed_version()) and _release(found) != wanted:
        yield Reason("version", f"torch_npu {found} with torch {wanted}", f"pip install torch_npu=={wanted}")
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None and accelerator.type != "npu":
        build = f"torch {torch.__version__}, built for {accelerator.type}"
        yield Reason("pytorch_build", build, "a CPU build of PyTorch: torch_npu refuses any other")
    missing = _runtime_error()
    if missing and _DRIVER_LIBRARY not in missing:
        yield Reason("cann", missing, "CANN on the library path: source <CANN>/set_env.sh")
    if not _host_npu():
        yield from _lacking_driver(missing)


def _lacking_driver(runtime_error: str) -> Iterator[Reason]:
    if _DRIVER_LIBRARY in runtime_error:
        want = "the driver's libraries on the library path; in a container, mount /usr/local/Ascend/driver"
        yield Reason("driver", runtime_error, want)
    elif not Path("/dev/davinci_manager").exists():
        want = "the Ascend driver, see npu-smi info; in a container, --device /dev/davinci_manager and its companions"
        yield Reason("driver", "no /dev/davinci_manager", want)
    elif not glob.glob("/dev/davinci[0-9]*"):
        want = "an NPU, see npu-smi info; in a container, --device /dev/davinci0"
        yield Reason("device", "the driver runs, but there is no /dev/davinci0 or other device node", want)


def _not_started(error: Exception) -> tuple[str, str, str]:
    text = _first_line(error)
    if "soc version" in text:  # a chip that this torch_npu has never heard of
        return "soc", text, _GENERATIONS
    return (
        "driver",
        f"the device does not start: {text}",
        "a driver that serves this CANN; see npu-smi info",
    )


def _runtime_error() -> str:
    """Why the runtime of CANN does not load; empty where it does."""
    try:
        ctypes.CDLL(_RUNTIME)
    except OSError as error:
        return str(error)
    return ""


def _host_npu() -> str:
    """What an emulated device says of itself; empty where the runtime is CANN's own or there is none."""
    try:
        sentence = ctypes.CDLL(_RUNTIME).ospnext_host_npu
    except (OSError, AttributeError):
        return ""
    sentence.restype = ctypes.c_char_p
    return sentence().decode()


def _installed_version() -> str:
    """Empty for a package that was put on the path without being installed."""
    try:
        return importlib.metadata.version("torch_npu")
    except importlib.metadata.PackageNotFoundError:
        return ""


def _release(version: str) -> str:
    """A torch_npu is built for one release of torch; what follows the third number (rc1, post2) is its own."""
    found = _RELEASE.match(version)
    return found[0] if found else version


def _numbers(count: int) -> tuple[int, ...]:
    """What stands behind anything but digits and commas is ignored, as CANN ignores it."""
    shown = re.match(r"\d+(,\d+)*", os.environ.get("ASCEND_RT_VISIBLE_DEVICES", ""))
    return tuple(map(int, shown[0].split(",")))[:count] if shown else tuple(range(count))


def _hidden() -> str:
    asked = os.environ.get("ASCEND_RT_VISIBLE_DEVICES")
    return "" if asked is None else f", with ASCEND_RT_VISIBLE_DEVICES={asked!r}"


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


def _refused(code: str, got: str, want: str) -> Probe:
    return Probe(None, (Reason(code, got, want),))

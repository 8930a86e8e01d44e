"""What is asked of the real torch_npu, by name: run on the host NPU by test_torch_npu_contract.py, in one process.

    python -m ospnext.conformance.host_npu tests/torch_npu_checks.py RESULTS.json

Importing this imports neither torch_npu nor the device, so that the names are known where there is none."""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

SOC, OLD_SOC = "Ascend950PR_9599", "Ascend910B4"
#: Of each NPU that is played: name -> function.
CHECKS: dict[str, dict[str, Callable[[], None]]] = {SOC: {}, OLD_SOC: {}}


def check(name: str, soc: str = SOC) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Register a function that asserts something about the vendor's package."""

    def register(function: Callable[[], None]) -> Callable[[], None]:
        if name in CHECKS[soc]:
            raise ValueError(f"two checks are named {name}")
        CHECKS[soc][name] = function
        return function

    return register


def main(out: Path) -> None:
    import torch_npu

    found = {}
    for name, function in CHECKS[torch.npu.get_device_name()].items():
        start = time.perf_counter()
        try:
            function()
            error = ""
        except Exception:
            error = traceback.format_exc(limit=-3)
        found[name] = {"error": error, "seconds": time.perf_counter() - start}
    about = {"torch": torch.__version__, "torch_npu": torch_npu.__version__, "device": torch.npu.get_device_name()}
    out.write_text(json.dumps({"about": about, "checks": found}))


# As a program this file is __main__; the checks below register where it is imported.
if __name__ == "__main__":
    import torch_npu_checks

    torch_npu_checks.main(Path(sys.argv[1]))
else:
    import torch_npu_device_checks
    import torch_npu_meta_checks

    torch_npu_meta_checks.register()
    torch_npu_device_checks.register()

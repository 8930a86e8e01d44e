"""The environment of a child Python whose `import torch` brings up the host NPU, and such a child. Imports no torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from .stubs import LIBRARIES, stub_libraries
from .wheel import package, release_for_torch

#: Where an installed CANN is found; its libraries must not mix with the stubs.
CANN_VARIABLES = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME", "ASCEND_OPP_PATH", "ASCEND_CUSTOM_OPP_PATH")


def environment(inherited: Mapping[str, str] | None = None) -> dict[str, str]:
    """Variables for a child process, made from `inherited` (default: this process's).

    What it needs is downloaded and compiled on the first call, a few seconds, and found in the cache afterwards. The
    child, and its children, read from the environment:
      HOST_NPU_SOC: the NPU that is played, by the name that its driver tells; default Ascend950PR_9599.
      HOST_NPU_COUNT: how many of them; default 8.

    Raises:
        HostNpuUnavailableError: this machine, Python or torch cannot have it; the message says what to do.
        ConfigError: the cache cannot be written, or the package is another build than the one that was tried.
    """
    variables = dict(os.environ if inherited is None else inherited)
    for name in CANN_VARIABLES:
        variables.pop(name, None)
    found = package(release_for_torch())
    _prepend(variables, "PYTHONPATH", str(found.site))
    _prepend(variables, "LD_LIBRARY_PATH", str(stub_libraries(found)))
    variables["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "1"
    variables["TASK_QUEUE_ENABLE"] = "0"  # no call may be queued: what follows computes at once
    return variables


def run(arguments: Sequence[str]) -> int:
    """Run Python with `arguments` on the host NPU and return its exit code, as a shell would give it.

    Raises:
        HostNpuUnavailableError, ConfigError: see `environment`.
    """
    process = subprocess.Popen([sys.executable, *arguments], env=environment())
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the child as well, and is for it
    try:
        code = process.wait()
    finally:
        signal.signal(signal.SIGINT, before)
    return code if code >= 0 else 128 - code


def _prepend(variables: dict[str, str], name: str, folder: str) -> None:
    """Put `folder` first, and leave out what is CANN's."""
    rest = [
        part for part in variables.get(name, "").split(os.pathsep) if part and not Path(part, LIBRARIES[0]).exists()
    ]
    variables[name] = os.pathsep.join([folder, *(part for part in rest if part != folder)])

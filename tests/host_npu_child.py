"""Programs on the host NPU, each in a process of its own: it exists from `import torch` on, or never."""

from __future__ import annotations

import functools
import subprocess
import sys

import pytest

from ospnext.conformance import host_npu


@functools.cache
def _variables() -> dict[str, str] | str:
    try:
        return host_npu.environment()
    except host_npu.HostNpuUnavailableError as error:
        return str(error)


def host_npu_variables(**changed: str) -> dict[str, str]:
    """The environment of a child; skips the test where this machine cannot have the device."""
    variables = _variables()
    if isinstance(variables, str):
        pytest.skip(variables)
    return {**variables, "OMP_NUM_THREADS": "1", **changed}


def on_host_npu(*arguments: str, timeout: float = 240, **changed: str) -> subprocess.CompletedProcess[str]:
    """Run Python with `arguments` on the host NPU; the test sees what came of it."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=host_npu_variables(**changed), capture_output=True, text=True, timeout=timeout)

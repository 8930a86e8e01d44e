"""What `import torch` calls in a process that has the host NPU: the vendor's package, then our kernels and groups."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import io
import sys
from typing import Any

#: Registrations last as long as these.
_libraries: list[Any] = []

#: torch_npu prints this on standard output when CANN is not installed, which is the point here.
EXPECTED = "Warning: ASCEND_HOME_PATH environment variable is not set.\n"


def activate() -> None:
    """Import the real torch_npu and make its device compute on host memory."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        importlib.import_module("torch_npu")
    sys.stderr.write(said.getvalue().replace(EXPECTED, ""))
    device = importlib.import_module(f"{__package__}.device")
    if not hasattr(device, "install"):  # it is being imported, and that is what imports torch
        raise ImportError(f"import torch before {__package__}.device")
    _libraries.extend(device.install())
    importlib.import_module(f"{__package__}.process_group").register()
    ctypes.CDLL("libascendcl.so").ospnext_host_npu_ready()

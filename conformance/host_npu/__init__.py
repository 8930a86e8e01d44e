"""A host NPU: the vendor's own torch_npu on a machine without CANN or an NPU, computing on host memory.

The package imports nothing heavy: the child process that has the device imports it while `import torch` runs."""

from .launch import environment, run
from .wheel import HostNpuUnavailableError

#: What the device calls itself wherever it appears. The stub of libascendcl exports the same text as a C function,
#: `ospnext_host_npu`, which tells a backend's probe that no driver is to be expected.
SENTENCE = "host NPU: vendor schemas, meta kernels and autograd on emulated arithmetic"

__all__ = ["SENTENCE", "HostNpuUnavailableError", "environment", "run"]

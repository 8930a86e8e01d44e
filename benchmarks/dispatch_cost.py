"""What the seam adds to a call: microseconds of ops.attention around a kernel that does nothing, and of rms_norm.

    python benchmarks/dispatch_cost.py > benchmarks/results/dispatch_cost.txt

Each figure is the median over repeats of the mean of many calls on tiny tensors, so that arithmetic does not matter.
"""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from ospnext import ops
from ospnext.ops.contracts import fused as definitions
from ospnext.ops.policy import use_registry
from ospnext.ops.registry import DeviceInfo, Implementation, Manifest, Probe, Registry

TARGET_US = 15.0
CALLS, REPEATS = 2000, 9

Q = torch.zeros(1, 4, 2, 8)
OUT, LSE = torch.zeros(1, 4, 2, 8), torch.zeros(1, 2, 4)


class NoOp:
    """The least a kernel can do: hand out tensors that exist already."""

    def forward(self, *args: Any, **named: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return OUT, LSE

    def backward(self, *args: Any, **named: Any) -> tuple[torch.Tensor, ...]:
        return Q, Q, Q


noop = NoOp()


def probe() -> Probe:
    return Probe(DeviceInfo("cpu", "a device that does nothing"))


def main() -> None:
    module = sys.modules[__name__]
    sys.modules["dispatch_cost"] = module
    features = frozenset({"backward", "logsumexp", "packed"})
    kernel = Implementation("noop.nothing", "attention", "dispatch_cost:noop", handles=features)
    manifest = Manifest("noop", "does nothing", ("cpu",), "dispatch_cost:probe", (kernel,), priority=1000)
    leaf = Q.clone().requires_grad_()
    arguments = (Q, Q, Q, None, None, None, 0, 0, None, False)
    with use_registry(Registry([manifest])), ops.use_backend("noop"):
        rows = [
            ("the kernel alone", measure(lambda: noop.forward(*arguments))),
            ("ops.attention, no gradient wanted", measure(lambda: ops.attention(Q, Q, Q))),
            ("ops.attention, torch.no_grad", no_grad(lambda: ops.attention(leaf, Q, Q))),
            ("ops.attention, torch.inference_mode", inference(lambda: ops.attention(Q, Q, Q))),
            ("ops.attention, with a gradient", measure(lambda: ops.attention(leaf, Q, Q))),
        ]
    x, weight = torch.zeros(1, 4, 16), torch.ones(16)
    with ops.use_backend("reference"):
        rows += [
            ("rms_norm, its definition alone", measure(lambda: definitions.rms_norm(x, weight, 1e-6))),
            ("ops.rms_norm", measure(lambda: ops.rms_norm(x, weight))),
        ]
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, one thread")
    for name, microseconds in rows:
        print(f"{name:<40} {microseconds:7.2f} us")
    added = rows[1][1] - rows[0][1]
    print(f"added by the seam to an attention call   {added:7.2f} us (target: under {TARGET_US:.0f} us)")
    print(f"added to a fused function                {rows[-1][1] - rows[-2][1]:7.2f} us")


def measure(call: Callable[[], Any]) -> float:
    """Microseconds per call."""
    means = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        for _ in range(CALLS):
            call()
        means.append((time.perf_counter() - started) / CALLS * 1e6)
    return statistics.median(means)


def no_grad(call: Callable[[], Any]) -> float:
    with torch.no_grad():
        return measure(call)


def inference(call: Callable[[], Any]) -> float:
    with torch.inference_mode():
        return measure(call)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

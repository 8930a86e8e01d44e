"""The torch.library namespace `ospnext` and the memory of decisions behind its ops. No operator is defined here."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from ospnext.ops.contract import Contract
from ospnext.ops.policy import on_change
from ospnext.ops.select import resolve

NAMESPACE = "ospnext"
#: `Library.define` raises if a second copy of this package tries to define the same ops: two identities cannot go
#: unnoticed.
LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def define(
    name: str,
    arguments: str,
    returns: str,
    *,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
    may_wait: bool = False,
) -> Any:
    """Define `ospnext::name` with its kernel for every device, its fake and its gradient; returns the op overload.

    The kernel is opaque to torch.compile: the choice of implementation happens behind it and takes effect without
    recompiling. It runs with the device of its first tensor as the current one. One that `may_wait` for the device is
    kept out of device graphs."""
    tags = (torch.Tag.pt2_compliant_tag, *([torch.Tag.cudagraph_unsafe] if may_wait else []))
    LIBRARY.define(f"{name}({arguments}) -> {returns}", tags=tags)
    LIBRARY.impl(name, _on_its_device(kernel), "CompositeExplicitAutograd")
    qualified = f"{NAMESPACE}::{name}"
    torch.library.register_fake(qualified, fake, lib=LIBRARY)
    if backward is not None:
        torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _on_its_device(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Kernels that are launched without PyTorch go to the current device, wherever their operands are."""

    def run(*arguments: Any, **named: Any) -> Any:
        if _several_devices():
            tensors = (a for a in (*arguments, *named.values()) if isinstance(a, Tensor))
            index = next((t.device.index for t in tensors if t.device.index is not None), None)
            if index is not None:
                with torch.accelerator.device_index(index):
                    return kernel(*arguments, **named)
        return kernel(*arguments, **named)

    return run


@functools.cache
def _several_devices() -> bool:
    return torch.accelerator.is_available() and torch.accelerator.device_count() > 1


class Decided:
    """Kernel objects by call signature, so that a decision costs one dictionary lookup after the first call.

    Forgotten whenever the policy changes, and when more signatures than `LIMIT` were seen (ragged shapes must not leak
    memory)."""

    LIMIT = 4096

    def __init__(self, contract: Contract) -> None:
        self.contract = contract
        self._kernels: dict[Hashable, Any] = {}
        self.get = self._kernels.get
        on_change(self._kernels.clear)

    def decide(self, signature: Hashable, request: Any) -> Any:
        if len(self._kernels) >= self.LIMIT:
            self._kernels.clear()
        kernel = self._kernels[signature] = resolve(self.contract, request)
        return kernel

"""Registration of the host NPU's kernels: every operator that the vendor's package has for its device.

torch_npu keeps what needs no device: allocation, views, conversions, schemas, shapes, autograd formulas, autocast.
`aten::` operators compute as on the CPU, the `npu::` ones of operators/ as written there; any other fails and says its
name."""

from __future__ import annotations

import importlib
import pkgutil
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from . import front_end
from .aliasing import on_cpu, on_host
from .kernel import Kernel

KEY = "PrivateUse1"
AUTOGRAD_KEY = f"Autograd{KEY}"

#: Kernels of torch_npu that stay, besides views: they give or describe memory, or lead to other operators.
VENDORS = {
    *("aten::empty.memory_format", "aten::empty_strided", "aten::empty_like"),
    *("aten::_pin_memory", "aten::is_pinned", "aten::record_stream"),
    *("aten::_to_copy", "aten::scaled_dot_product_attention", "aten::_fused_sdp_choice"),
    *("npu::empty_with_format", "npu::unsafe_empty_with_format", "npu::get_npu_format", "npu::get_storage_size"),
}
#: Composite operators that go the vendor's way to a gradient; the others are taken apart as PyTorch does.
VENDORS_FORMULA = {"aten::matmul", "aten::scaled_dot_product_attention"}


def install() -> list[torch.library.Library]:
    """Register the kernels in this process. They stay for as long as what is returned does."""
    libraries = {name: torch.library.Library(name, "IMPL") for name in ("aten", "npu")}
    computed = kernels()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that kernels are replaced
        for name, op in _registered(KEY):
            kernel = _kernel(name, op, computed)
            if kernel is not None:
                libraries[op.namespace].impl(op, kernel, KEY, allow_override=True)
        for name, op in _registered(AUTOGRAD_KEY):
            if name not in VENDORS_FORMULA and _has_kernel(name, "CompositeImplicitAutograd"):
                libraries[op.namespace].impl(op, op.decompose, AUTOGRAD_KEY, allow_override=True)
    if computed:
        raise RuntimeError(f"torch_npu has no operator of the name {', '.join(sorted(computed))}")
    return list(libraries.values())


def kernels() -> dict[str, Callable[..., Any]]:
    """The CPU arithmetic of `npu::` operators: of the front end, and what the files of operators/ list."""
    found = dict(front_end.NPU)
    package = importlib.import_module(f"{__package__}.operators")
    for module in pkgutil.iter_modules(package.__path__):
        listed = getattr(importlib.import_module(f"{package.__name__}.{module.name}"), "KERNELS", {})
        if twice := found.keys() & listed.keys():
            raise RuntimeError(f"operators/{module.name}.py gives {', '.join(twice)}, which another file gives, too")
        found |= listed
    return found


def _kernel(name: str, op: OpOverload, computed: dict[str, Callable[..., Any]]) -> Callable[..., Any] | None:
    """What computes `op`; None where the vendor's kernel does. Takes what it uses out of `computed`."""
    namespace, _, rest = name.partition("::")
    if name in VENDORS or torch.Tag.inplace_view in op.tags:
        return None
    if namespace == "aten" and rest in ON_THE_DEVICE:
        return ON_THE_DEVICE[rest]
    if op.is_view:
        return None
    if namespace == "npu":
        compute = computed.pop(rest, None)
    else:
        compute = front_end.ATEN.get(rest) or (op if _computes_on_cpu(name) else None)
    return Kernel(op, compute) if compute else _missing(op)


def _registered(key: str) -> list[tuple[str, OpOverload]]:
    """Operators with a kernel of torch_npu, by name. It registers its own ones in aten, too, which has none of them."""
    found = []
    for name in torch._C._dispatch_get_registrations_for_dispatch_key(key):
        namespace, _, rest = name.partition("::")
        base, _, overload = rest.partition(".")
        packet = getattr(getattr(torch.ops, namespace), base, None) if namespace in ("aten", "npu") else None
        if packet is not None:
            found.append((name, getattr(packet, overload or "default")))
    return found


def _computes_on_cpu(name: str) -> bool:
    keys = ("CPU", "CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional", "CompositeImplicitAutograd")
    return any(_has_kernel(name, key) for key in keys)


def _has_kernel(name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, key)


def _missing(op: OpOverload) -> Callable[..., Any]:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            f"the host NPU does not emulate {op.name()}. If a program needs it, write its arithmetic from the vendor's "
            "documents into conformance/host_npu/operators/"
        )

    return fail


# ---- operators that need the tensors of the device themselves


def copy_(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """Either may be on the host."""
    on_host(target).copy_(on_host(source))
    return target


def copy_from_and_resize(source: Tensor, target: Tensor) -> Tensor:
    """Either may be on the host: how results of PyTorch's own CPU fallback come back."""
    return target.resize_(source.shape).copy_(source)


def local_scalar_dense(tensor: Tensor) -> Any:
    return torch.ops.aten._local_scalar_dense.default(on_cpu(tensor))


ON_THE_DEVICE: dict[str, Callable[..., Any]] = {
    "copy_": copy_,
    "contiguous": torch.ops.aten.contiguous.default.decompose,  # the tensor itself or its clone
    "_copy_from_and_resize": copy_from_and_resize,
    "_local_scalar_dense": local_scalar_dense,
}

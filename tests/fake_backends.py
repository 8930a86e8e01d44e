"""Backends made by hand, so that selection, policy and registry can be tested without hardware. Targets of their
manifests are names in this file."""

from __future__ import annotations

from typing import Any

import torch

from ospnext.ops.contract import Reason, need
from ospnext.ops.registry import DeviceInfo, Implementation, Manifest, Probe

HERE = "fake_backends"
DEVICE = DeviceInfo("cpu", "a device made by hand", capability=(9, 0))
ABSENT = Reason("driver", "none", "version 7")

#: How often each function below ran; tests clear it.
calls: list[str] = []


def present() -> Probe:
    calls.append("present")
    return Probe(DEVICE)


def absent() -> Probe:
    calls.append("absent")
    return Probe(None, (ABSENT,))


def exploding_probe() -> Probe:
    calls.append("exploding_probe")
    raise OSError("the driver hung up")


def refuses(request: Any, device: DeviceInfo):
    yield need(request.dtype == torch.float32, "dtype", got=request.dtype, want="fp32")
    yield need(device.capability >= (9, 5), "capability", got=device.capability, want="at least (9, 5)")


def only_fp32(request: Any, device: DeviceInfo):
    yield need(request.dtype == torch.float32, "dtype", got=request.dtype, want="fp32")


class Constant:
    """An attention kernel whose every output is one number, so that a result tells which kernel ran."""

    def __init__(self, value: float) -> None:
        self.value = value

    def forward(self, q, k, v, *, need_lse, **rest):
        calls.append(f"forward {self.value}")
        return torch.full(q.shape, self.value, dtype=q.dtype), torch.zeros(
            (*q.shape[:-3], q.shape[-2], q.shape[-3]) if need_lse else (0,)
        )

    def backward(self, grad_out, q, k, v, *rest, **named):
        calls.append(f"backward {self.value}")
        return tuple(torch.full(t.shape, self.value, dtype=t.dtype) for t in (q, k, v))


class Raising:
    def forward(self, *args, **named):
        calls.append("raising")
        raise FloatingPointError("the kernel failed on the device")


class CountedComposite:
    """A fused kernel: the definition of its contract, counted. `strided` gives gradients in strides of its own."""

    def __init__(self, name: str, *, strided: bool = False) -> None:
        self.name, self.strided = name, strided

    @property
    def definition(self):
        from ospnext.ops.contracts import CONTRACTS

        return CONTRACTS[f"fused.{self.name}"].composite

    def forward(self, *args):
        calls.append(f"{self.name} forward")
        return self.definition.forward(*args)

    def backward(self, grad, *args):
        calls.append(f"{self.name} backward")
        grads = self.definition.backward(grad, *args)
        return [g.mT.contiguous().mT if self.strided and g is not None and g.ndim > 1 else g for g in grads]


one, two, raising = Constant(1.0), Constant(2.0), Raising()
FUSED = ("rms_norm", "layer_norm_modulate", "rope", "rms_norm_rope", "gate_residual", "gelu_tanh")
rms_norm, layer_norm_modulate, rope, rms_norm_rope, gate_residual, gelu_tanh = (
    CountedComposite(name, strided=True) for name in FUSED
)
#: With a quantized result: not of `fused_backend`, whose attention is all it has besides.
layer_norm_modulate_quantize, gelu_tanh_quantize = (
    CountedComposite(f"{name}_quantize") for name in ("layer_norm_modulate", "gelu_tanh")
)

EVERY_FEATURE = frozenset({"packed", "key_mask", "custom_scale", "logsumexp", "backward", "deterministic"})


def kernel(identifier: str, target: str = "one", contract: str = "attention", **fields: Any) -> Implementation:
    fields = {"handles": EVERY_FEATURE} | fields
    supports = f"{HERE}:{fields.pop('supports')}" if "supports" in fields else ""
    return Implementation(identifier, contract, f"{HERE}:{target}", supports=supports, **fields)


def backend(name: str, *kernels: Implementation, probe: str = "present", **fields: Any) -> Manifest:
    fields = {"device_types": ("cpu",)} | fields
    return Manifest(name, f"{name}, made by hand", probe=f"{HERE}:{probe}", implementations=kernels, **fields)


def fused_backend(name: str, **fields: Any) -> Manifest:
    """A backend with a kernel for attention and for every fused operator."""
    features = frozenset({"affine", "modulated", "gated", "permuted", "backward"})
    kernels = [kernel(f"{name}.{f}", f, f"fused.{f}", handles=features) for f in FUSED]
    return backend(name, kernel(f"{name}.one"), *kernels, **fields)

"""The fused functions that models call, and the torch.library ops behind them. The meaning is in contracts/fused.py.

Where the backend in force declares no kernel, a function *is* its plain PyTorch definition: traced, differentiated and
fused by PyTorch, with no lookup per call. Where it declares one, the function calls `ospnext::<name>`, which is opaque
and chooses behind the op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ospnext.ops.contract import Contract
from ospnext.ops.contracts import fused as definitions
from ospnext.ops.contracts.fused import FusedRequest
from ospnext.ops.library import Decided, define
from ospnext.ops.policy import AUTO, COMPOSITE, current_policy, on_change, policy_in_force
from ospnext.ops.registry import registry


class FusedKernel(Protocol):
    """What an implementation's `target` provides: the contract's arguments in, and one gradient (or None) per argument
    back.
    """

    def forward(self, *args: Any) -> Tensor: ...

    def backward(self, grad: Tensor, *args: Any) -> Any: ...


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x [..., C] / sqrt(mean(x^2) + eps) * weight [C], in fp32; result in the dtype of x."""
    return _bound["rms_norm"](x, weight, eps)


def layer_norm_modulate(
    x_BNC: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    shift_BC: Tensor | None = None,
    scale_BC: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """LayerNorm over C, optionally affine (weight, bias [C]) and modulated: n * (1 + scale) + shift, in fp32."""
    return _bound["layer_norm_modulate"](x_BNC, weight, bias, shift_BC, scale_BC, eps)


def rope(x_BNHD: Tensor, cos_NP: Tensor, sin_NP: Tensor) -> Tensor:
    """Rotate interleaved pairs of channels of x by the angles of each token; cos and sin are [N, D/2]."""
    return _bound["rope"](x_BNHD, cos_NP, sin_NP)


def gate_residual(
    x_BNC: Tensor, y_BNC: Tensor, gate_BC: Tensor | None = None, permutation_N: Tensor | None = None
) -> Tensor:
    """x + y * gate, in fp32 with one rounding, written in the order `permutation`: out[:, i] = (x + y * gate)[:,
    permutation[i]].
    """
    return _bound["gate_residual"](x_BNC, y_BNC, gate_BC, permutation_N)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh form, elementwise."""
    return _bound["gelu_tanh"](x)


# ---- behind the functions
# ------------------------------------------------------------------------------------------------------

_SCHEMAS = {
    "rms_norm": "Tensor x, Tensor weight, float eps",
    "layer_norm_modulate": "Tensor x, Tensor? weight, Tensor? bias, Tensor? shift, Tensor? scale, float eps",
    "rope": "Tensor x, Tensor cos, Tensor sin",
    "gate_residual": "Tensor x, Tensor y, Tensor? gate, Tensor? permutation",
    "gelu_tanh": "Tensor x",
}


def _signature(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple((a.shape, a.dtype, a.device) if isinstance(a, Tensor) else a for a in args)


def _request(name: str, args: tuple[Any, ...], backward: bool) -> FusedRequest:
    x = args[0]
    features = {
        "affine": name == "layer_norm_modulate" and args[1] is not None,
        "modulated": name == "layer_norm_modulate" and args[3] is not None,
        "gated": name == "gate_residual" and args[2] is not None,
        "permuted": name == "gate_residual" and args[3] is not None,
    }
    return FusedRequest(x.device.type, x.dtype, tuple(x.shape), backward=backward, **features)


def _check(name: str, args: tuple[Any, ...]) -> None:
    """Shapes of every operand against the contract; a wrong one is named with what was expected."""
    x = args[0]
    expected: list[tuple[str, Any, tuple[int, ...]]] = []
    if name == "rms_norm":
        expected = [("weight", args[1], x.shape[-1:])]
    elif name == "layer_norm_modulate":
        _, weight, bias, shift, scale, _ = args
        if (weight is None) != (bias is None) or (shift is None) != (scale is None):
            raise ValueError(
                "layer_norm_modulate: give both of weight and bias or neither, and both of shift and scale or neither"
            )
        expected = [("weight", weight, x.shape[-1:]), ("bias", bias, x.shape[-1:])]
        expected += [("shift", shift, (x.shape[0], x.shape[-1])), ("scale", scale, (x.shape[0], x.shape[-1]))]
    elif name == "rope":
        expected = [(n, a, (x.shape[1], x.shape[-1] // 2)) for n, a in (("cos", args[1]), ("sin", args[2]))]
    elif name == "gate_residual":
        _, y, gate, permutation = args
        expected = [
            ("y", y, x.shape),
            ("gate", gate, (x.shape[0], x.shape[-1])),
            ("permutation", permutation, (x.shape[1],)),
        ]
    for operand, found, shape in expected:
        if found is not None and tuple(found.shape) != tuple(shape):
            raise ValueError(
                f"{name}: {operand} must have shape {tuple(shape)} for x {tuple(x.shape)}, got {tuple(found.shape)}"
            )


def _gradients(grads: Sequence[Tensor | None], args: tuple[Any, ...]) -> list[Tensor]:
    """One contiguous gradient per tensor argument (a kernel need not follow the strides of the definition), empty where
    there is none.
    """
    pairs = zip(grads, args, strict=True)
    return [args[0].new_empty(0) if g is None else g.contiguous() for g, a in pairs if isinstance(a, Tensor)]


def _define(name: str, contract: Contract) -> Callable[..., Tensor]:
    """`ospnext::<name>` and `ospnext::<name>_backward`, which returns one gradient per tensor argument (empty: it has
    none).
    """
    decided = Decided(contract)
    composite: definitions.Composite = contract.composite

    def kernel_for(args: tuple[Any, ...], backward: bool) -> FusedKernel:
        signature = (backward, *_signature(args))
        kernel = decided.get(signature)
        if kernel is None:
            _check(name, args)
            kernel = decided.decide(signature, _request(name, args, backward))
        return kernel

    def forward(*args: Any) -> Tensor:
        return kernel_for(args, False).forward(*args)

    def backward(grad: Tensor, *args: Any) -> list[Tensor]:
        grads = kernel_for(args, True).backward(grad, *args)
        return _gradients(grads, args)

    def backward_fake(grad: Tensor, *args: Any) -> list[Tensor]:
        return _gradients(composite.backward(grad, *args), args)

    backward_op = define(
        f"{name}_backward", f"Tensor grad, {_SCHEMAS[name]}", "Tensor[]", kernel=backward, fake=backward_fake
    )

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*(a for a in inputs if isinstance(a, Tensor)))
        ctx.layout = [None if isinstance(a, Tensor) else (a,) for a in inputs]

    def autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        args = [next(saved) if constant is None else constant[0] for constant in ctx.layout]
        found = iter(backward_op(grad, *args))
        grads = (next(found) if isinstance(a, Tensor) else None for a in args)
        return tuple(
            g if g is not None and g.numel() and need else None
            for g, need in zip(grads, ctx.needs_input_grad, strict=True)
        )

    return define(
        name,
        _SCHEMAS[name],
        "Tensor",
        kernel=forward,
        fake=composite.forward,
        backward=autograd,
        setup_context=setup_context,
    )


_CONTRACTS = {c.name.removeprefix("fused."): c for c in definitions.CONTRACTS}
_OPS = {name: _define(name, contract) for name, contract in _CONTRACTS.items()}
_bound: dict[str, Callable[..., Tensor]] = {}


def bind() -> None:
    """Point each function at its definition or at its op, as the policy in force says. Models call this before they are
    traced.
    """
    policy = current_policy()
    for name, contract in _CONTRACTS.items():
        wanted, _ = policy.wanted(contract.name, contract.family)
        if wanted == AUTO:
            manifests = [m for m in registry().ordered() if registry().probe(m.backend).available]
        else:
            manifests = [m for m in registry().ordered() if m.backend == wanted.partition(".")[0]]
        declared = wanted != COMPOSITE and any(m.offers(contract.name) for m in manifests)
        _bound[name] = _OPS[name] if declared else contract.composite.forward


def _bind_on_first_call(name: str) -> Callable[..., Tensor]:
    def first(*args: Any) -> Tensor:
        # Not torch.compiler.disable: decorating with it imports the whole compiler, two seconds for every user.
        if torch.compiler.is_compiling():
            raise RuntimeError("the backend policy is read before tracing: call ospnext.ops.bind() first")
        bind()
        return _bound[name](*args)

    return first


def _unbind() -> None:
    _bound.update({name: _bind_on_first_call(name) for name in _OPS})


def _on_policy_change() -> None:
    """Bind at once where a policy is known: a compiled model guards on the bound functions, and a change of policy that
    leaves them the same must not make it trace again.
    """
    if policy_in_force() is None:
        _unbind()
    else:
        bind()


_unbind()
on_change(_on_policy_change)

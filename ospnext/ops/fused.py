"""The fused functions that models call, and the torch.library ops behind them. The meaning is in contracts/fused.py and
contracts/fused_quantize.py.

Where the backend in force declares no kernel, a function *is* its plain PyTorch definition: traced, differentiated and
fused by PyTorch, with no lookup per call. Where it declares one, the function calls `ospnext::<name>`, which is opaque
and chooses behind the op."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ospnext.numerics.hif8 import INFO
from ospnext.numerics.scaling import ScaleMode
from ospnext.ops.contract import Contract
from ospnext.ops.contracts import CONTRACTS, fused_quantize
from ospnext.ops.contracts.fused import Composite, FusedRequest
from ospnext.ops.library import Decided, define
from ospnext.ops.policy import AUTO, COMPOSITE, current_policy, on_change, policy_in_force
from ospnext.ops.quantize import Quantized, check_scaling, quantize_op
from ospnext.ops.recipe import LinearGranularity
from ospnext.ops.registry import registry


class FusedKernel(Protocol):
    """What an implementation's `target` provides: the contract's arguments in, and one gradient (or None) per argument
    back. Where the result is quantized, `forward` returns (codes, scale) and there is no `backward`.
    """

    def forward(self, *args: Any) -> Any: ...

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


def rms_norm_rope(x_BNC: Tensor, weight: Tensor, cos_NP: Tensor, sin_NP: Tensor, eps: float = 1e-6) -> Tensor:
    """`rope` of the heads of `rms_norm`, in fp32 with one rounding; [B, N, H, D], with D twice the columns of cos and
    sin.

    Raises:
        ValueError: D does not divide C.
    """
    head_dim = 2 * cos_NP.shape[-1]
    if not head_dim or x_BNC.shape[-1] % head_dim:
        raise ValueError(
            "rms_norm_rope: the channels of x must be a multiple of the head dimension, which is twice the columns of "
            f"cos; got x {tuple(x_BNC.shape)} and cos {tuple(cos_NP.shape)}"
        )
    return _bound["rms_norm_rope"](x_BNC, weight, cos_NP, sin_NP, eps)


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


def linear_gelu_tanh(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU (tanh) of x [..., K] weight [N, K]^T + bias [N], in the dtype of all three.

    Raises:
        RuntimeError: a gradient is asked for; there is none.
    """
    _refuse_gradient("linear_gelu_tanh", "call a linear and gelu_tanh", x, weight, bias)
    return _bound["linear_gelu_tanh"](x, weight, bias)


def layer_norm_modulate_quantize(
    x_BNC: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    shift_BC: Tensor | None = None,
    scale_BC: Tensor | None = None,
    eps: float = 1e-6,
    *,
    scale_max: float = INFO.max_of_3_bits,
    scale_mode: ScaleMode = "amax",
    granularity: LinearGranularity = "row",
    carried: bool = False,
) -> Quantized:
    """`layer_norm_modulate`, then `hif8_quantize`: codes [B, N, C] and scale [B, N, 1], or [1, 1, 1] for "tensor".

    Raises:
        RuntimeError: a gradient is asked for; there is none.
    """
    operands = (x_BNC, weight, bias, shift_BC, scale_BC)
    _refuse_gradient("layer_norm_modulate_quantize", f"call layer_norm_modulate {_AND_QUANTIZE}", *operands)
    form = (scale_max, scale_mode, granularity, carried)
    return Quantized(*_bound["layer_norm_modulate_quantize"](*operands, eps, *form))


def gelu_tanh_quantize(
    x: Tensor,
    *,
    scale_max: float = INFO.max_of_3_bits,
    scale_mode: ScaleMode = "amax",
    granularity: LinearGranularity = "row",
    carried: bool = False,
) -> Quantized:
    """`gelu_tanh`, then `hif8_quantize`: codes in the shape of x [..., C] and scale [..., 1], or one for "tensor".

    Raises:
        RuntimeError: a gradient is asked for; there is none.
    """
    _refuse_gradient("gelu_tanh_quantize", f"call gelu_tanh {_AND_QUANTIZE}", x)
    return Quantized(*_bound["gelu_tanh_quantize"](x, scale_max, scale_mode, granularity, carried))


_AND_QUANTIZE = "and give its result to quantized_linear"


def _refuse_gradient(name: str, instead: str, *operands: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands):
        raise RuntimeError(
            f"{name} has no gradient, and an operand requires one: call it under torch.no_grad(), or {instead}"
        )


# ---- behind the functions
# ------------------------------------------------------------------------------------------------------

_LAYER_NORM = "Tensor x, Tensor? weight, Tensor? bias, Tensor? shift, Tensor? scale, float eps"
_SCALING = "float scale_max, str scale_mode, str granularity, bool carried"
_SCHEMAS = {
    "rms_norm": "Tensor x, Tensor weight, float eps",
    "layer_norm_modulate": _LAYER_NORM,
    "rope": "Tensor x, Tensor cos, Tensor sin",
    "rms_norm_rope": "Tensor x, Tensor weight, Tensor cos, Tensor sin, float eps",
    "gate_residual": "Tensor x, Tensor y, Tensor? gate, Tensor? permutation",
    "gelu_tanh": "Tensor x",
    "layer_norm_modulate_quantize": f"{_LAYER_NORM}, {_SCALING}",
    "gelu_tanh_quantize": f"Tensor x, {_SCALING}",
    "linear_gelu_tanh": "Tensor x, Tensor matrix, Tensor vector",
}
#: Feature of a request -> the optional operand that it stands for.
_FEATURES = {"affine": "weight", "modulated": "shift", "gated": "gate", "permuted": "permutation"}

Named = Mapping[str, Any]


def _named(name: str, args: tuple[Any, ...]) -> Named:
    return dict(zip((word.split()[1] for word in _SCHEMAS[name].split(", ")), args, strict=True))


def _signature(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple((a.shape, a.dtype, a.device) if isinstance(a, Tensor) else a for a in args)


def _request(name: str, contract: Contract, named: Named, backward: bool) -> FusedRequest:
    x = named["x"]
    features = {
        feature: f"Tensor? {operand}" in _SCHEMAS[name] and named[operand] is not None
        for feature, operand in _FEATURES.items()
    }
    settings = {setting: named[setting] for setting in fused_quantize.SETTINGS if setting in named}
    return contract.request(x.device.type, x.dtype, tuple(x.shape), backward=backward, **features, **settings)


def _check(name: str, named: Named) -> None:
    """Shapes of every operand, and settings, against the contract; a wrong one is named with what was expected."""
    x: Tensor = named["x"]
    for one, other in (("weight", "bias"), ("shift", "scale")):
        if other in named and (named[one] is None) != (named[other] is None):
            raise ValueError(f"{name}: give both of {one} and {other} or neither")
    if name == "linear_gelu_tanh":
        _check_linear(**named)
    per_token = any(named.get(operand) is not None for operand in ("shift", "scale", "gate", "permutation", "cos"))
    rank = 4 if name == "rope" else 3 if per_token else x.ndim
    if x.ndim != rank or x.ndim < 1:
        raise ValueError(
            f"{name}: x must have {rank} dimensions, [B, N, ...], with these operands; got {tuple(x.shape)}"
        )
    permutation = named.get("permutation")
    if permutation is not None and permutation.dtype != torch.int64:
        raise ValueError(f"{name}: permutation must be int64; got {permutation.dtype}")
    devices = {str(operand.device) for operand in named.values() if isinstance(operand, Tensor)}
    if len(devices) > 1:
        raise ValueError(f"{name}: all tensors must be on one device; got {', '.join(sorted(devices))}")
    per_channel, per_sample, tokens = x.shape[-1:], x.shape[:1] + x.shape[-1:], x.shape[1:2]
    angles = (*tokens, x.shape[-1] // 2 if name == "rope" else named["cos"].shape[-1]) if "cos" in named else ()
    expected = {
        **dict.fromkeys(("weight", "bias"), per_channel),
        **dict.fromkeys(("shift", "scale", "gate"), per_sample),
        **dict.fromkeys(("cos", "sin"), angles),
        "y": x.shape,
        "permutation": tokens,
    }
    for operand, shape in expected.items():
        found = named.get(operand)
        if found is not None and tuple(found.shape) != tuple(shape):
            raise ValueError(
                f"{name}: {operand} must have shape {tuple(shape)} for x {tuple(x.shape)}, got {tuple(found.shape)}"
            )
    if "scale_mode" in named:
        scale_max, scale_mode, granularity, carried = (named[setting] for setting in fused_quantize.SETTINGS)
        check_scaling(name, x, None, scale_max, scale_mode, granularity, carried=carried)


def _check_linear(x: Tensor, matrix: Tensor, vector: Tensor) -> None:
    shapes = (tuple(x.shape), tuple(matrix.shape), tuple(vector.shape))
    if x.ndim < 1 or matrix.ndim != 2 or matrix.shape[1] != x.shape[-1] or vector.shape != matrix.shape[:1]:
        raise ValueError(
            "linear_gelu_tanh: x must be [..., K], weight [N, K] and bias [N]; got {}, {}, {}".format(*shapes)
        )
    if not x.dtype == matrix.dtype == vector.dtype:
        dtypes = f"{x.dtype}, {matrix.dtype} and {vector.dtype}"
        raise ValueError(f"linear_gelu_tanh: x, weight and bias must have one dtype; got {dtypes}")


def _gradients(grads: Sequence[Tensor | None], args: tuple[Any, ...]) -> list[Tensor]:
    """One contiguous gradient per tensor argument (a kernel need not follow the strides of the definition), empty where
    there is none.
    """
    pairs = zip(grads, args, strict=True)
    return [args[0].new_empty(0) if g is None else g.contiguous() for g, a in pairs if isinstance(a, Tensor)]


def _quantized_fake(x: Tensor, *rest: Any) -> Any:
    return quantize_op(x, None, *rest[-4:])


KernelFor = Callable[[tuple[Any, ...], bool], FusedKernel]


def _define(name: str, contract: Contract) -> Callable[..., Any]:
    """`ospnext::<name>`, with its gradient where the definition has one."""
    decided = Decided(contract)
    composite: Composite = contract.composite

    def kernel_for(args: tuple[Any, ...], backward: bool) -> FusedKernel:
        signature = (backward, *_signature(args))
        kernel = decided.get(signature)
        if kernel is None:
            named = _named(name, args)
            _check(name, named)
            kernel = decided.decide(signature, _request(name, contract, named, backward))
        return kernel

    def forward(*args: Any) -> Any:
        return kernel_for(args, False).forward(*args)

    if contract in fused_quantize.CONTRACTS:
        return define(name, _SCHEMAS[name], "(Tensor, Tensor)", kernel=forward, fake=_quantized_fake)
    if composite.backward is None:
        return define(name, _SCHEMAS[name], "Tensor", kernel=forward, fake=composite.forward)
    gradient = _define_gradient(name, kernel_for, composite.backward)
    return define(name, _SCHEMAS[name], "Tensor", kernel=forward, fake=composite.forward, **gradient)


def _define_gradient(
    name: str, kernel_for: KernelFor, definition: Callable[..., Sequence[Tensor | None]]
) -> dict[str, Any]:
    """`ospnext::<name>_backward`, which returns one gradient per tensor argument (empty: it has none), and what makes
    it the gradient of `ospnext::<name>`.
    """

    def backward(grad: Tensor, *args: Any) -> list[Tensor]:
        grads = kernel_for(args, True).backward(grad, *args)
        return _gradients(grads, args)

    def backward_fake(grad: Tensor, *args: Any) -> list[Tensor]:
        return _gradients(definition(grad, *args), args)

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

    return {"backward": autograd, "setup_context": setup_context}


_CONTRACTS = {c.name.removeprefix("fused."): c for c in CONTRACTS.values() if c.family == "fused"}
_OPS = {name: _define(name, contract) for name, contract in _CONTRACTS.items()}
_bound: dict[str, Callable[..., Any]] = {}


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


def _bind_on_first_call(name: str) -> Callable[..., Any]:
    def first(*args: Any) -> Any:
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

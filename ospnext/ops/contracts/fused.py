"""The fused family: the elementwise and norm steps between matrix products, each with its plain PyTorch definition and
gradient.

The definition (`composite`) is also the implementation wherever a backend declares no kernel: it is ordinary traced
PyTorch, so that torch.compile can fuse it and a call costs no lookup. All arithmetic is in fp32 (fp64 for fp64 inputs)
with one rounding at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ospnext.ops.contract import Case, Contract


@dataclass(frozen=True)
class FusedRequest:
    """What selection knows of a call; `shape` is that of the first tensor. Optional operands are features."""

    device_type: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    affine: bool = False
    modulated: bool = False
    gated: bool = False
    permuted: bool = False
    backward: bool = False


@dataclass(frozen=True)
class Composite:
    """A definition in plain PyTorch: `forward(*args)`, and `backward(grad, *args)` -> one gradient per argument, None
    where it has none.
    """

    forward: Callable[..., Tensor]
    backward: Callable[..., Sequence[Tensor | None]]


Features = frozenset[str]
Randn = Callable[..., Tensor]
#: Sizes of the cases: two samples, an odd number of tokens, three heads of 32.
_B, _N, _C, _D = 2, 203, 96, 32


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _wide(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors in the accumulation dtype of the first; None stays None."""
    assert tensors[0] is not None
    dtype = accumulation_dtype(tensors[0].dtype)
    return tuple(None if t is None else t.to(dtype) for t in tensors)


class _PerToken(torch.autograd.Function):
    """A parameter repeated for each token [B, N, C]; its gradient adds the tokens one after the other.

    Only the yardstick uses it: kernels may add tokens in any order, so the yardstick takes the plainest and least
    accurate one."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, batch: int, tokens: int) -> Tensor:
        ctx.per_sample = parameter.ndim == 2
        return (parameter[:, None] if ctx.per_sample else parameter).expand(batch, tokens, -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        rows = grads[0].unbind(1) if ctx.per_sample else grads[0].flatten(0, 1).unbind(0)
        total = torch.zeros_like(rows[0])
        for row in rows:
            total = total + row
        return total, None, None


def _per_token(parameter: Tensor, x: Tensor) -> Tensor:
    return _PerToken.apply(parameter, *x.shape[:2])


# ---- rms_norm
# ------------------------------------------------------------------------------------------------------------------

RMS_NORM = """\
y = x / sqrt(mean(x^2) + eps) * weight over the last dimension. x [..., C], weight [C]; y has shape and dtype of x,
contiguous. The weight is applied before the one rounding to the dtype of x."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide_x, wide_weight = _wide(x, weight)
    return (wide_x * torch.rsqrt(wide_x.square().mean(-1, keepdim=True) + eps) * wide_weight).to(x.dtype).contiguous()


def _rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float):
    wide_x, wide_grad, wide_weight = _wide(x, grad, weight)
    inverse = torch.rsqrt(wide_x.square().mean(-1, keepdim=True) + eps)
    normed, scaled = wide_x * inverse, wide_grad * wide_weight
    dx = inverse * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    return dx.to(x.dtype), (wide_grad * normed).flatten(0, -2).sum(0).to(weight.dtype), None


def _naive_rms_norm(x, weight, eps):
    return _per_token(weight, x) * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def _rms_norm_operands(features: Features, randn: Randn) -> dict[str, Any]:
    return {"x": randn(_B, _N, _C), "weight": randn(_C), "eps": 1e-6}


# ---- layer_norm_modulate
# -------------------------------------------------------------------------------------------------------

LAYER_NORM_MODULATE = """\
y = n * (1 + scale) + shift, where n = (x - mean(x)) / sqrt(var(x) + eps) [* weight + bias] over the last dimension,
biased variance. x [B, N, C]; weight and bias [C] both or neither; shift and scale [B, C] both or neither; y has shape
and dtype of x, contiguous.
"""


def layer_norm_modulate(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, shift: Tensor | None, scale: Tensor | None, eps: float
) -> Tensor:
    wide_x, wide_weight, wide_bias, wide_shift, wide_scale = _wide(x, weight, bias, shift, scale)
    y = F.layer_norm(wide_x, x.shape[-1:], wide_weight, wide_bias, eps)
    if wide_scale is not None:
        y = y * (1 + wide_scale[:, None]) + wide_shift[:, None]
    return y.to(x.dtype).contiguous()


def _layer_norm_modulate_backward(grad: Tensor, x: Tensor, weight, bias, shift, scale, eps: float):
    wide_x, wide_grad, wide_weight, wide_bias, wide_scale = _wide(x, grad, weight, bias, scale)
    centred = wide_x - wide_x.mean(-1, keepdim=True)
    inverse = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    normed = centred * inverse
    dweight = dbias = dshift = dscale = None
    if wide_scale is not None:
        affine = normed if wide_weight is None else normed * wide_weight + wide_bias
        dscale, dshift = (wide_grad * affine).sum(1).to(scale.dtype), wide_grad.sum(1).to(shift.dtype)
        wide_grad = wide_grad * (1 + wide_scale[:, None])
    if wide_weight is not None:
        dweight, dbias = (wide_grad * normed).sum((0, 1)).to(weight.dtype), wide_grad.sum((0, 1)).to(bias.dtype)
        wide_grad = wide_grad * wide_weight
    dx = inverse * (wide_grad - wide_grad.mean(-1, keepdim=True) - normed * (wide_grad * normed).mean(-1, keepdim=True))
    return dx.to(x.dtype), dweight, dbias, dshift, dscale, None


def _naive_layer_norm_modulate(x, weight, bias, shift, scale, eps):
    centred = x - x.mean(-1, keepdim=True)
    y = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    y = y if weight is None else y * _per_token(weight, x) + _per_token(bias, x)
    return y if scale is None else y + y * _per_token(scale, x) + _per_token(shift, x)


def _layer_norm_modulate_operands(features: Features, randn: Randn) -> dict[str, Any]:
    weight, bias = (randn(_C) if "affine" in features else None for _ in range(2))
    shift, scale = (randn(_B, _C) if "modulated" in features else None for _ in range(2))
    return {"x": randn(_B, _N, _C) + 3, "weight": weight, "bias": bias, "shift": shift, "scale": scale, "eps": 1e-6}


# ---- rope
# ----------------------------------------------------------------------------------------------------------------------

ROPE = """\
Rotary embedding on interleaved pairs: channels (2m, 2m+1) of each head are the real and imaginary part of a number that
is turned by the angle of (token, m). x [B, N, H, D]; cos and sin [N, D/2], constants without gradient; y has shape and
dtype of x, contiguous.
"""


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide_x, cos_N1P, sin_N1P = _wide(x, cos[:, None], sin[:, None])
    real, imaginary = wide_x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((real * cos_N1P - imaginary * sin_N1P, real * sin_N1P + imaginary * cos_N1P), dim=-1)
    return turned.flatten(-2).to(x.dtype).contiguous()


def _rope_backward(grad: Tensor, x: Tensor, cos: Tensor, sin: Tensor):
    return rope(grad, cos, -sin), None, None


def _naive_rope(x, cos, sin):
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.complex(cos.double(), sin.double())[:, None]).flatten(-2).to(x.dtype)


def _rope_operands(features: Features, randn: Randn) -> dict[str, Any]:
    angles = randn(_N, _D // 2).double()
    return {"x": randn(_B, _N, _C // _D, _D), "cos": angles.cos().float(), "sin": angles.sin().float()}


# ---- gate_residual
# -------------------------------------------------------------------------------------------------------------

GATE_RESIDUAL = """\
z = x + y * gate; out[:, i] = z[:, permutation[i]]. x and y [B, N, C] of one dtype; gate [B, C] or None for 1;
permutation int64 [N], each of 0..N-1 once, or None for the identity. The permutation is how tokens change order between
blocks at no extra pass.
"""


def gate_residual(x: Tensor, y: Tensor, gate: Tensor | None, permutation: Tensor | None) -> Tensor:
    wide_x, wide_y, wide_gate = _wide(x, y, gate)
    out = wide_x + (wide_y if wide_gate is None else wide_y * wide_gate[:, None])
    out = out.to(x.dtype)
    return (out if permutation is None else out[:, permutation]).contiguous()


def _gate_residual_backward(grad: Tensor, x: Tensor, y: Tensor, gate: Tensor | None, permutation: Tensor | None):
    if permutation is not None:
        grad = torch.empty_like(grad).index_copy(1, permutation, grad)
    wide_grad, wide_y, wide_gate = _wide(grad, y, gate)
    dx = grad.to(x.dtype).clone()
    if gate is None:
        return dx, grad.to(y.dtype).clone(), None, None
    return dx, (wide_grad * wide_gate[:, None]).to(y.dtype), (wide_grad * wide_y).sum(1).to(gate.dtype), None


def _naive_gate_residual(x, y, gate, permutation):
    z = x + (y if gate is None else y * _per_token(gate, x))
    return z if permutation is None else z.index_select(1, permutation)


def _gate_residual_operands(features: Features, randn: Randn) -> dict[str, Any]:
    gate = randn(_B, _C) if "gated" in features else None
    # Not its own inverse, which would hide a wrong direction.
    permutation = (torch.arange(_N) * 5 + 7) % _N if "permuted" in features else None
    return {"x": randn(_B, _N, _C), "y": randn(_B, _N, _C), "gate": gate, "permutation": permutation}


# ---- gelu_tanh
# -----------------------------------------------------------------------------------------------------------------

GELU_TANH = """\
y = x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))), elementwise. y has shape and dtype of x, contiguous."""


def gelu_tanh(x: Tensor) -> Tensor:
    # aten's kernel already computes in fp32 and rounds once.
    return F.gelu(x, approximate="tanh").contiguous()


def _gelu_tanh_backward(grad: Tensor, x: Tensor):
    return (torch.ops.aten.gelu_backward(grad, x, approximate="tanh"),)


def _naive_gelu_tanh(x):
    return x / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def _gelu_tanh_operands(features: Features, randn: Randn) -> dict[str, Any]:
    return {"x": randn(_B, _N, _C) * 3}


# ---- cases and contracts
# -------------------------------------------------------------------------------------------------------

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def _evaluate(
    function: Callable[..., Tensor], inputs: Mapping[str, Any], dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """Run `function` with floating operands cast to `dtype` (None: as they are); gradients by autograd of the
    function.
    """
    named = {
        k: v.detach().to(dtype) if dtype and isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in inputs.items()
    }
    grad_out = named.pop("grad_out", None)
    leaves = (
        {k: v.detach().requires_grad_() for k, v in named.items() if _differentiable(k, v)}
        if grad_out is not None
        else {}
    )
    result = {"out": function(*(named | leaves).values())}
    if leaves:
        grads = torch.autograd.grad(result["out"], list(leaves.values()), grad_out)
        result |= {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {name: value.detach() for name, value in result.items()}


def _differentiable(name: str, value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and name not in ("cos", "sin")


def _contract(
    name: str,
    meaning: str,
    composite: Composite,
    naive: Callable[..., Tensor],
    operands: Callable[[Features, Randn], dict[str, Any]],
    features: Sequence[tuple[str, ...]] = ((),),
) -> Contract:
    """`naive` is the formula with every intermediate in the dtype of its inputs: the yardstick, and in fp64 the
    oracle.
    """

    def inputs(case: Case) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(sum(case.id.encode()) * 7919)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(case.request.dtype)

        named = operands(case.options["features"], randn)
        return named | ({"grad_out": randn(*named["x"].shape)} if case.request.backward else {})

    def cases() -> Iterator[Case]:
        for tag, dtype in _DTYPES.items():
            for chosen in features:
                for backward in (False, True):
                    shape = (_B, _N, _C // _D, _D) if name == "rope" else (_B, _N, _C)
                    request = FusedRequest("cpu", dtype, shape, backward=backward, **dict.fromkeys(chosen, True))
                    words = "-".join([*chosen, *(["backward"] if backward else [])]) or "plain"
                    yield Case(
                        f"fused.{name}/optional/{tag}-{words}", "optional", request, {"features": frozenset(chosen)}
                    )

    def call(**named: Any) -> dict[str, Tensor]:
        from ospnext import ops

        return _evaluate(getattr(ops, name), named, None)

    return Contract(
        name=f"fused.{name}",
        family="fused",
        level="optional",
        request=FusedRequest,
        meaning=meaning,
        composite=composite,
        inputs=inputs,
        cases=cases,
        call=call,
        oracle=lambda named: _evaluate(naive, named, torch.float64),
        yardstick=lambda named: _evaluate(naive, named, None),
    )


CONTRACTS = (
    _contract("rms_norm", RMS_NORM, Composite(rms_norm, _rms_norm_backward), _naive_rms_norm, _rms_norm_operands),
    _contract(
        "layer_norm_modulate",
        LAYER_NORM_MODULATE,
        Composite(layer_norm_modulate, _layer_norm_modulate_backward),
        _naive_layer_norm_modulate,
        _layer_norm_modulate_operands,
        ((), ("affine",), ("modulated",), ("affine", "modulated")),
    ),
    _contract("rope", ROPE, Composite(rope, _rope_backward), _naive_rope, _rope_operands),
    _contract(
        "gate_residual",
        GATE_RESIDUAL,
        Composite(gate_residual, _gate_residual_backward),
        _naive_gate_residual,
        _gate_residual_operands,
        ((), ("gated",), ("permuted",), ("gated", "permuted")),
    ),
    _contract("gelu_tanh", GELU_TANH, Composite(gelu_tanh, _gelu_tanh_backward), _naive_gelu_tanh, _gelu_tanh_operands),
)

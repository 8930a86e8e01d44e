"""The fused family: the elementwise and norm steps between matrix products, each with its plain PyTorch definition and
gradient.

The definition (`composite`) is also the implementation wherever a backend declares no kernel: it is ordinary traced
PyTorch, so that torch.compile can fuse it and a call costs no lookup. All arithmetic is in fp32 (fp64 for fp64 inputs)
with one rounding at the end."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ospnext.ops.contract import Case, Contract, Through, as_is
from ospnext.ops.contracts import fused_definitions as define


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
    where it has none. Without a `backward` nothing has one.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Sequence[Tensor | None]] | None = None


@dataclass(frozen=True)
class Sizes:
    """Samples, tokens and channels of a case, in heads of `head_dim`; `x` is multiplied by `magnitude`."""

    B: int = 2
    N: int = 203
    C: int = 96
    head_dim: int = 32
    magnitude: float = 1.0


Shape = Callable[[Sizes], tuple[int, ...]]


def tokens(at: Sizes) -> tuple[int, int, int]:
    return at.B, at.N, at.C


def heads(at: Sizes) -> tuple[int, int, int, int]:
    return at.B, at.N, at.C // at.head_dim, at.head_dim


Features = frozenset[str]
Randn = Callable[..., Tensor]


# ---- rms_norm
# ----------------------------------------------------------------------------------------------------------------------

RMS_NORM = """\
y = x / sqrt(mean(x^2) + eps) * weight over the last dimension. x [..., C], weight [C]; y has shape and dtype of x,
contiguous. The weight is applied before the one rounding to the dtype of x."""


def _rms_norm_operands(at: Sizes, features: Features, randn: Randn) -> dict[str, Any]:
    return {"x": randn(at.B, at.N, at.C) * at.magnitude, "weight": randn(at.C), "eps": 1e-6}


# ---- layer_norm_modulate
# ----------------------------------------------------------------------------------------------------------------------

LAYER_NORM_MODULATE = """\
y = n * (1 + scale) + shift, where n = (x - mean(x)) / sqrt(var(x) + eps) [* weight + bias] over the last dimension,
biased variance. x [B, N, C]; weight and bias [C] both or neither; shift and scale [B, C] both or neither; y has shape
and dtype of x, contiguous.
"""


def _layer_norm_modulate_operands(at: Sizes, features: Features, randn: Randn) -> dict[str, Any]:
    weight, bias = (randn(at.C) if "affine" in features else None for _ in range(2))
    shift, scale = (randn(at.B, at.C) if "modulated" in features else None for _ in range(2))
    x = (randn(at.B, at.N, at.C) + 3) * at.magnitude
    return {"x": x, "weight": weight, "bias": bias, "shift": shift, "scale": scale, "eps": 1e-6}


# ---- rope
# ----------------------------------------------------------------------------------------------------------------------

ROPE = """\
Rotary embedding on interleaved pairs: channels (2m, 2m+1) of each head are the real and imaginary part of a number that
is turned by the angle of (token, m). x [B, N, H, D]; cos and sin [N, D/2], constants without gradient; y has shape and
dtype of x, contiguous.
"""


def _rope_operands(at: Sizes, features: Features, randn: Randn) -> dict[str, Any]:
    angles = randn(at.N, at.head_dim // 2).double()
    return {"x": randn(*heads(at)), "cos": angles.cos().float(), "sin": angles.sin().float()}


# ---- rms_norm_rope
# ----------------------------------------------------------------------------------------------------------------------

RMS_NORM_ROPE = """\
y = rope(heads of rms_norm(x)): the norm is over all channels of a token, the turn within each head. x [B, N, C], weight
[C]; cos and sin [N, D/2], constants without gradient; D divides C, and y [B, N, C/D, D] has the dtype of x, contiguous.
In between nothing is rounded.
"""


def _rms_norm_rope_operands(at: Sizes, features: Features, randn: Randn) -> dict[str, Any]:
    normed, turned = (operands(at, features, randn) for operands in (_rms_norm_operands, _rope_operands))
    return {"x": normed["x"], "weight": normed["weight"], "cos": turned["cos"], "sin": turned["sin"], "eps": 1e-6}


# ---- gate_residual
# ----------------------------------------------------------------------------------------------------------------------

GATE_RESIDUAL = """\
z = x + y * gate; out[:, i] = z[:, permutation[i]]. x and y [B, N, C] of one dtype; gate [B, C] or None for 1;
permutation int64 [N], each of 0..N-1 once, or None for the identity. The permutation is how tokens change order between
blocks at no extra pass.
"""


def _gate_residual_operands(at: Sizes, features: Features, randn: Randn) -> dict[str, Any]:
    gate = randn(at.B, at.C) if "gated" in features else None
    # Not its own inverse, which would hide a wrong direction.
    permutation = (torch.arange(at.N) * 11 + 7) % at.N if "permuted" in features else None
    return {"x": randn(at.B, at.N, at.C), "y": randn(at.B, at.N, at.C), "gate": gate, "permutation": permutation}


# ---- gelu_tanh
# ----------------------------------------------------------------------------------------------------------------------

GELU_TANH = """\
y = x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))), elementwise. y has shape and dtype of x, contiguous."""


def _gelu_tanh_operands(at: Sizes, features: Features, randn: Randn) -> dict[str, Any]:
    return {"x": randn(at.B, at.N, at.C) * 3}


# ---- cases and contracts
# -------------------------------------------------------------------------------------------------------

#: Gradients of parameters add up every token, in an order each kernel chooses: PyTorch's CUDA layer norm needs 3.3
#: times the error of the yardstick (fp32, dweight, one gradient for all).
PARAMETER_GRADIENT_FACTOR = 4.0

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
#: Tag -> sizes of cases beside the plain ones. More tokens than 65,535, a limit of grids on many devices; the channels
#: of the 14B model and of its feed-forward part; inputs so small that eps decides.
SIZES = {
    "": Sizes(),
    "n75600": Sizes(B=1, N=75_600),
    "c5120": Sizes(B=1, N=5, C=5120, head_dim=128),
    "c13824": Sizes(B=1, N=3, C=13_824, head_dim=128),
    "small": Sizes(magnitude=1e-3),
}


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
    operands: Callable[[Sizes, Features, Randn], dict[str, Any]],
    features: Sequence[tuple[str, ...]] = ((),),
    sizes: Sequence[str] = ("n75600", "c5120"),
    of_x: Shape = tokens,
    of_out: Shape = tokens,
) -> Contract:
    """`naive` is the formula with every intermediate in the dtype of its inputs: the yardstick, and in fp64 the
    oracle. `features` are combinations of optional operands, the last one having all of them.
    """

    def inputs(case: Case) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(zlib.crc32(case.id.encode()))

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(case.request.dtype)

        named = operands(case.options["sizes"], case.options["features"], randn)
        return named | ({"grad_out": randn(*of_out(case.options["sizes"]))} if case.request.backward else {})

    def case(tag: str, chosen: tuple[str, ...], backward: bool, size: str = "") -> Case:
        at = SIZES[size]
        request = FusedRequest("cpu", DTYPES[tag], of_x(at), backward=backward, **dict.fromkeys(chosen, True))
        words = "-".join([*chosen, *(["backward"] if backward else [])]) or "plain"
        identifier = f"fused.{name}/optional/{f'{size}-' if size else ''}{tag}-{words}"
        options = {"features": frozenset(chosen), "sizes": at}
        return Case(identifier, "optional", request, options, crossed=backward and chosen == features[-1])

    def cases() -> Iterator[Case]:
        for tag in DTYPES:
            for chosen in features:
                yield case(tag, chosen, False)
                yield case(tag, chosen, True)
        for size in sizes:
            yield case("fp32" if size == "small" else "bf16", features[-1], size != "n75600", size)

    def call(named: Mapping[str, Any], through: Through = as_is) -> dict[str, Tensor]:
        from ospnext import ops

        return _evaluate(through(getattr(ops, name)), named, None)

    def library_calls(named: Mapping[str, Any]) -> Iterator[tuple[Any, tuple[Any, ...]]]:
        arguments = dict(named)
        grad = arguments.pop("grad_out")
        leaves = [v.detach().requires_grad_() if _differentiable(k, v) else v for k, v in arguments.items()]
        yield getattr(torch.ops.ospnext, name).default, tuple(leaves)
        yield getattr(torch.ops.ospnext, f"{name}_backward").default, (grad, *arguments.values())

    return Contract(
        name=f"fused.{name}",
        family="fused",
        level="optional",
        request=FusedRequest,
        meaning=meaning,
        composite=composite,
        hands_on_gradient=True,
        gradient_factor=PARAMETER_GRADIENT_FACTOR,
        inputs=inputs,
        cases=cases,
        call=call,
        library_calls=library_calls,
        oracle=lambda named: _evaluate(naive, named, torch.float64),
        yardstick=lambda named: _evaluate(naive, named, None),
    )


_WITH_SMALL = ("n75600", "c5120", "small")

CONTRACTS = (
    _contract(
        "rms_norm",
        RMS_NORM,
        Composite(define.rms_norm, define.rms_norm_backward),
        define.naive_rms_norm,
        _rms_norm_operands,
        sizes=_WITH_SMALL,
    ),
    _contract(
        "layer_norm_modulate",
        LAYER_NORM_MODULATE,
        Composite(define.layer_norm_modulate, define.layer_norm_modulate_backward),
        define.naive_layer_norm_modulate,
        _layer_norm_modulate_operands,
        ((), ("affine",), ("modulated",), ("affine", "modulated")),
        _WITH_SMALL,
    ),
    _contract(
        "rope",
        ROPE,
        Composite(define.rope, define.rope_backward),
        define.naive_rope,
        _rope_operands,
        of_x=heads,
        of_out=heads,
    ),
    _contract(
        "rms_norm_rope",
        RMS_NORM_ROPE,
        Composite(define.rms_norm_rope, define.rms_norm_rope_backward),
        define.naive_rms_norm_rope,
        _rms_norm_rope_operands,
        sizes=_WITH_SMALL,
        of_out=heads,
    ),
    _contract(
        "gate_residual",
        GATE_RESIDUAL,
        Composite(define.gate_residual, define.gate_residual_backward),
        define.naive_gate_residual,
        _gate_residual_operands,
        ((), ("gated",), ("permuted",), ("gated", "permuted")),
    ),
    _contract(
        "gelu_tanh",
        GELU_TANH,
        Composite(define.gelu_tanh, define.gelu_tanh_backward),
        define.naive_gelu_tanh,
        _gelu_tanh_operands,
    ),
)

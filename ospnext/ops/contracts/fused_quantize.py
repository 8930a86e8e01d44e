"""The fused operators that end in quantization: a norm or an activation as the codes that the next linear layer
multiplies. Everything true about them, stated once; the formats' arithmetic is in quantize_oracle.py.

The definition is a composition of the plain operator and hif8_quantize, each with the kernel that the backend has for
it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ospnext.numerics.scaling import ScaleMode
from ospnext.ops.contract import Case, Contract, Through, as_is
from ospnext.ops.contracts import fused
from ospnext.ops.contracts import quantize_oracle as oracle
from ospnext.ops.contracts.fused import Composite, FusedRequest
from ospnext.ops.recipe import LinearGranularity
from ospnext.ops.tolerance import Interval, max_bound

MEANING = """\
codes, scale = hif8_quantize(y, scale_max, scale_mode, granularity, carried), where y is {plain} rounded to the dtype of
x. x [..., C]; codes have the shape of x, scale is fp32: [..., 1] for "row", one element for "tensor"; both contiguous.
No gradient.

Judged      y may be off by what the contract of {plain} allows, and may so fall on the other side of a tie: codes and
            scale are right if they are those of some such y.
Zero        where y is 0 in all that shares a scale, codes are 0 and the scale is 1 (carried: over its power of two).
Not finite  what shares a scale with something that is not finite is NaN, in codes and scale. Nothing else is."""


@dataclass(frozen=True)
class FusedQuantizeRequest(FusedRequest):
    """What selection knows of a call whose result is quantized."""

    scale_max: float = 15.0
    scale_mode: ScaleMode = "amax"
    granularity: LinearGranularity = "row"
    carried: bool = False


SETTINGS = ("scale_max", "scale_mode", "granularity", "carried")


def _operands(named: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in named.items() if name not in SETTINGS}


def _settings(named: Mapping[str, Any]) -> dict[str, Any]:
    return {name: named[name] for name in SETTINGS}


def _composition(plain: str) -> Composite:
    """In terms of others, through the public functions."""

    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        from ospnext import ops

        *operands, scale_max, scale_mode, granularity, carried = args
        y = getattr(ops, plain)(*operands)
        return ops.hif8_quantize(
            y, scale_max=scale_max, scale_mode=scale_mode, granularity=granularity, carried=carried
        )

    return Composite(forward)


# ---- what is right


def _in_form(values: Tensor, scale: Tensor, scale_max: float, carried: bool) -> tuple[Tensor, Tensor]:
    """What codes stand for before their scale, and the scale, of HiFloat8 values."""
    if not carried:
        return values, scale
    numbers, power = oracle.carried(values, scale_max)
    return numbers, scale / power


def of_some(
    y: Tensor, error: float, *, scale_max: float, scale_mode: str, granularity: str, carried: bool
) -> dict[str, Interval]:
    """Where the codes' values and the scales of anything within `error` of y may lie; NaN where y is not finite.

    What shares a scale is zero throughout, and then exactly, or is taken to be larger than `error`."""
    largest = y.abs().amax(-1 if granularity == "row" else tuple(range(y.ndim)), keepdim=True)
    error_of_row = torch.where(largest == 0, 0.0, error)
    amax = [(largest + by * error_of_row).clamp_min(1e-12) * (largest > 0) for by in (-1, 1)]
    scales = [oracle.scale_of(each.float(), scale_max, scale_mode) for each in amax]
    # Rounding is monotone: the ends of quotients give the ends of values.
    low = torch.minimum(*((y - error_of_row) / scale.double() for scale in scales))
    high = torch.maximum(*((y + error_of_row) / scale.double() for scale in scales))
    ends = (low - low.abs() * oracle.TIE_MARGIN, high + high.abs() * oracle.TIE_MARGIN)
    found = [
        _in_form(oracle.rounded(end.clamp(-scale_max, scale_max)), scale, scale_max, carried)
        for end, scale in zip(ends, scales, strict=True)
    ]
    (low, high), (low_scale, high_scale) = zip(*found, strict=True)
    return {"codes": Interval(low, high), "scale": Interval(low_scale.double(), high_scale.double())}


def _oracle(plain: Contract, named: Mapping[str, Any]) -> dict[str, Interval]:
    operands = _operands(named)
    y, usual = plain.oracle(operands)["out"], plain.yardstick(operands)["out"]
    assert isinstance(y, Tensor)
    rows = torch.isfinite(y).all(-1)
    return of_some(y, max_bound(y[rows], usual[rows], "out"), **_settings(named))


def _yardstick(plain: Contract, named: Mapping[str, Any]) -> dict[str, Tensor]:
    scale_max, scale_mode, granularity, carried = _settings(named).values()
    values, scale = oracle.quantized(plain.yardstick(_operands(named))["out"], scale_max, scale_mode, granularity)
    values, scale = _in_form(values, scale, scale_max, carried)
    return {"codes": values.float(), "scale": scale}


# ---- cases

#: Kind -> where x is put to what.
_PUT: dict[str, tuple[tuple[Any, ...], float]] = {
    "zerorow": ((..., 1, slice(None)), 0.0),
    "nan": ((0, 2, 3), math.nan),
    "inf": ((-1, -1, -1), math.inf),
}
_CARRIED: dict[str, Any] = {"carried": True}
_TENSOR: dict[str, Any] = {"granularity": "tensor"}
#: (name, settings, kind of x, whether with every optional operand: a shift would make a row of zeros another one).
_QUANTIZED: tuple[tuple[str, str, dict[str, Any], str, bool], ...] = (
    ("carried", "bf16 fp32", _CARRIED, "", True),
    ("pow2", "bf16 fp32", {"scale_mode": "pow2"}, "", True),
    ("224", "bf16 fp32", {"scale_max": 224.0}, "", True),
    ("tensor", "bf16 fp32", _TENSOR, "", True),
    ("tensor-carried", "bf16 fp32", _TENSOR | _CARRIED, "", True),
    ("tensor-nan", "bf16", _TENSOR, "nan", True),
    ("tensor-carried-zerorow", "bf16", _TENSOR | _CARRIED, "zerorow", False),
    ("carried-pow2", "fp32", _CARRIED | {"scale_mode": "pow2"}, "", True),
    ("carried-224", "fp32", _CARRIED | {"scale_max": 224.0}, "", True),
    ("zerorow", "bf16 fp32", {}, "zerorow", False),
    ("carried-zerorow", "bf16", _CARRIED, "zerorow", False),
    ("nan", "bf16 fp32", {}, "nan", True),
    ("carried-nan", "bf16", _CARRIED, "nan", True),
    ("inf", "bf16", {}, "inf", True),
)


def _contract(plain: Contract, features: Sequence[tuple[str, ...]], sizes: Sequence[str]) -> Contract:
    """Of `plain`, quantized. `features` are combinations of optional operands, the last one having all of them."""
    of = plain.name.removeprefix("fused.")
    name, every = f"{of}_quantize", features[-1]

    def inputs(case: Case) -> dict[str, Any]:
        named = plain.inputs(case)
        if case.options["kind"]:
            where, value = _PUT[case.options["kind"]]
            named["x"][where] = value
        return named | {setting: getattr(case.request, setting) for setting in SETTINGS}

    def case(
        tag: str, chosen: tuple[str, ...], size: str = "", words: str = "", kind: str = "", **settings: Any
    ) -> Case:
        at = fused.SIZES[size]
        asked: dict[str, Any] = dict.fromkeys(chosen, True) | settings
        request = FusedQuantizeRequest("cpu", fused.DTYPES[tag], fused.tokens(at), **asked)
        words_of_x = [*chosen, words] if chosen or words else ["plain"]
        identifier = "-".join(filter(None, [size, tag, *words_of_x]))
        options = {"features": frozenset(chosen), "sizes": at, "kind": kind}
        # Both dtypes, forms of codes and kinds of scales, in every layout and mode.
        crossed = chosen == every and not size and words in {"bf16": ("carried", "tensor-carried"), "fp32": ("",)}[tag]
        named, costly = f"fused.{name}/optional/{identifier}", size == "n75600"
        return Case(named, "optional", request, options, crossed=crossed, costly=costly)

    def cases() -> Iterator[Case]:
        for tag in fused.DTYPES:
            for chosen in features:
                yield case(tag, chosen)
            for words, tags, settings, kind, with_all in _QUANTIZED:
                if tag in tags.split():
                    yield case(tag, every if with_all else (), words=words, kind=kind, **settings)
        for size in sizes:
            yield case("fp32" if size == "small" else "bf16", every, size)
        yield case("bf16", every, sizes[0], "tensor-carried", **_TENSOR, **_CARRIED)

    def call(named: Mapping[str, Any], through: Through = as_is) -> dict[str, Tensor]:
        from ospnext import ops

        function: Callable[..., Any] = through(getattr(ops, name))
        codes, scale = function(*_operands(named).values(), **_settings(named))
        values = codes if named["carried"] else oracle.decoded(codes.cpu())
        return {"codes": values.float(), "scale": scale}

    def library_calls(named: Mapping[str, Any]) -> Iterator[tuple[Any, tuple[Any, ...]]]:
        yield getattr(torch.ops.ospnext, name).default, tuple(named.values())

    return Contract(
        name=f"fused.{name}",
        family="fused",
        level="optional",
        request=FusedQuantizeRequest,
        meaning=MEANING.format(plain=of),
        composite=_composition(of),
        inputs=inputs,
        cases=cases,
        call=call,
        library_calls=library_calls,
        oracle=lambda named: _oracle(plain, named),
        yardstick=lambda named: _yardstick(plain, named),
    )


_PLAIN = {contract.name: contract for contract in fused.CONTRACTS}

CONTRACTS = (
    _contract(
        _PLAIN["fused.layer_norm_modulate"],
        ((), ("affine",), ("modulated",), ("affine", "modulated")),
        ("n75600", "c5120", "small"),
    ),
    _contract(_PLAIN["fused.gelu_tanh"], ((),), ("n75600", "c13824")),
)

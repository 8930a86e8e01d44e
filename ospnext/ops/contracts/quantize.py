"""Scaled quantization to HiFloat8 and its round trip. Everything true about them, stated once; the arithmetic is in
quantize_oracle.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ospnext.numerics.scaling import Granularity, ScaleMode
from ospnext.ops.contract import Case, Contract, Level, Through, as_is
from ospnext.ops.contracts import quantize_oracle as oracle
from ospnext.ops.contracts.hif8_cast import DTYPES, SHAPE, generator_of, op, quantize_contract

SCALES = """\
Granularity amax is taken over the tensor, over each row (the last dimension) or over each channel (the last dimension
            but one); the scale keeps these dimensions, as 1.
Scale       fp32: s = max(amax, 1e-12) / scale_max by division; "pow2" takes the power of two at or above that (at most
            2^127). Where amax is 0, or there is no element, s = 1.
Not finite  where amax is Inf or NaN, s is NaN and so is every element that it scales: nothing saturates unseen.
Given amax  replaces the one that is taken: fp32, in the shape of the scale. So ranks agree on one, or scales are fixed
            in advance."""

QUANTIZE = f"""\
code = HiFloat8(x / s), with s from the largest magnitude of x. Returns codes (uint8, shape of x) and s, both
contiguous.

{SCALES}
Division    in fp32 (fp64 for fp64), rounded before it is encoded. A product with the reciprocal is not the same: on
            bf16 inputs ties are common, and some would fall on the other side.
Overflow    as in hif8_encode; it takes a given amax that is too small.
Carried     codes are E4M3 numbers instead: 2^n times each value, rounded to even where E4M3 has no such number, with
            s / 2^n for the scale; n is the largest power by which scale_max stays within 448: 4 for 15, 1 for 224.
            What lies beyond 448 is NaN."""

FAKE_QUANTIZE = f"""\
The round trip y = decode(code) * s, with code and s as in hif8_quantize: product in fp32 (fp64 for fp64), then one
rounding to the dtype of x. Shape and dtype of x, contiguous.

{SCALES}
Gradient    straight through: dx = dy, nothing is masked and scales are constants. With grad_scale_max, dx is the round
            trip of dy at that scale_max, with the same scale mode and granularity and its own amax."""


@dataclass(frozen=True)
class QuantizeRequest:
    """What selection knows of a call; `dtype` and `shape` are those of x."""

    device_type: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    scale_max: float = 15.0
    scale_mode: ScaleMode = "amax"
    granularity: Granularity = "tensor"
    given_amax: bool = False
    carried: bool = False


# ---- inputs

Values = Callable[[Tensor], Tensor]


def _one(value: float) -> Values:
    """One element of the last row."""

    def put(x: Tensor) -> Tensor:
        x[..., -1, 3] = value
        return x

    return put


def _zero_row(x: Tensor) -> Tensor:
    x[..., 1, :] = 0
    return x


def _wide(x: Tensor) -> Tensor:
    """Over 45 binades, so that every class of the format and zero are met."""
    return x.sign() * torch.exp2(-45 * (x.abs() % 1))


def _ties(x: Tensor) -> Tensor:
    """Halfway between neighbours of the format, above and below 1, of both signs; the largest is 15."""
    grid = oracle.rounded(torch.exp2(torch.linspace(-22, 3.9, 9_000, dtype=torch.float64))).unique()
    middles = (grid[1:] + grid[:-1]) / 2
    middles = middles.repeat(x.numel() // len(middles) + 1)[: x.numel()].view(x.shape) * x.sign()
    middles[..., 0] = 15.0
    return middles


#: What the values of a case are, beside normally distributed.
_KINDS: dict[str, Values] = {
    "": lambda x: x,
    "wide": _wide,
    "ties": _ties,
    "zero": torch.zeros_like,
    "zerorow": _zero_row,
    "nan": _one(math.nan),
    "inf": _one(-math.inf),
    "tiny": lambda x: x * 1e-20,
    "huge": lambda x: x * 6e37,
}


def _quantize_inputs(case: Case) -> dict[str, Any]:
    request, kind = case.request, case.options["kind"]
    generator = generator_of(case)
    x = _KINDS[kind](torch.randn(request.shape, generator=generator, dtype=torch.float64)).to(request.dtype)
    amax = None
    if request.given_amax:
        factor = case.options.get("factor", 1.7)
        amax = oracle.amax_of(x, request.granularity) * factor
        # Also what a reduction over ranks may bring: nothing anywhere, and what is not finite.
        if request.granularity == "row":
            amax[..., 0, :], amax[..., 1, :], amax[..., 2, :] = 0, math.inf, math.nan
    arguments = (request.scale_max, request.scale_mode, request.granularity)
    named: dict[str, Any] = {
        "x": x if case.options.get("ties") else oracle.away_from_ties(x, *arguments, amax),
        "amax": amax,
        "scale_max": request.scale_max,
        "scale_mode": request.scale_mode,
        "granularity": request.granularity,
        "carried": request.carried,
    }
    if case.options.get("backward"):
        named["grad_scale_max"] = case.options["grad_scale_max"]
        grad = torch.randn(request.shape, generator=generator, dtype=torch.float64).to(request.dtype) * 1e-3
        named["grad_out"] = oracle.away_from_ties(grad, case.options["grad_scale_max"] or 1.0, *arguments[1:])
    return named


def _quantize_oracle(named: Mapping[str, Any]) -> dict[str, Tensor]:
    values, scale = oracle.quantized(
        named["x"], named["scale_max"], named["scale_mode"], named["granularity"], named["amax"]
    )
    if named["carried"]:
        numbers, power = oracle.carried(values, named["scale_max"])
        return {"codes": numbers, "scale": scale.double() / power}
    return {"codes": oracle.codes_of(values), "scale": scale.double()}


def _quantize_yardstick(named: Mapping[str, Any]) -> dict[str, Tensor]:
    found = _quantize_oracle(named)
    return found | {"scale": found["scale"].float()}


def _round_trip(x: Tensor, scale_max: float, named: Mapping[str, Any], amax: Tensor | None) -> Tensor:
    """fp64, before the rounding to the dtype of x."""
    values, scale = oracle.quantized(x, scale_max, named["scale_mode"], named["granularity"], amax)
    return values * scale.double()


def _fake_quantize_oracle(named: Mapping[str, Any]) -> dict[str, Tensor]:
    found = {"out": _round_trip(named["x"], named["scale_max"], named, named["amax"])}
    if "grad_out" in named:
        grad, grad_scale_max = named["grad_out"], named["grad_scale_max"]
        found["dx"] = grad.double() if grad_scale_max is None else _round_trip(grad, grad_scale_max, named, None)
    return found


def _fake_quantize_yardstick(named: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value.to(named["x"].dtype) for name, value in _fake_quantize_oracle(named).items()}


def _settings(named: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in named.items() if k in ("scale_max", "scale_mode", "granularity", "amax")}


def _call_quantize(named: Mapping[str, Any], through: Through = as_is) -> dict[str, Tensor]:
    from ospnext import ops

    codes, scale = through(ops.hif8_quantize)(named["x"], carried=named["carried"], **_settings(named))
    return {"codes": codes.float() if named["carried"] else codes, "scale": scale}


def _call_fake_quantize(named: Mapping[str, Any], through: Through = as_is) -> dict[str, Tensor]:
    from ospnext import ops

    if "grad_out" not in named:
        return {"out": through(ops.hif8_fake_quantize)(named["x"], **_settings(named))}
    x = named["x"].detach().requires_grad_()
    out = through(ops.hif8_fake_quantize)(x, grad_scale_max=named["grad_scale_max"], **_settings(named))
    (dx,) = torch.autograd.grad(out, x, named["grad_out"])
    return {"out": out.detach(), "dx": dx}


def _arguments(named: Mapping[str, Any]) -> tuple[Any, ...]:
    return named["x"], named["amax"], named["scale_max"], named["scale_mode"], named["granularity"]


#: (name, kind of values, dtypes, settings of the request). "given" is an amax that is not the tensor's own; a factor of
#: 1e-4 makes it so small that values overflow.
_SCALED: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("tensor", "", "bf16 fp16 fp32 fp64", {}),
    ("tensor-224", "", "bf16 fp32", {"scale_max": 224.0}),
    ("tensor-pow2", "", "bf16 fp32", {"scale_mode": "pow2"}),
    ("row", "", "bf16 fp32", {"granularity": "row"}),
    ("channel", "", "bf16 fp32", {"granularity": "channel"}),
    ("row-pow2", "", "bf16", {"granularity": "row", "scale_mode": "pow2"}),
    ("given", "", "bf16 fp32", {"given_amax": True}),
    ("given-row", "", "fp32", {"given_amax": True, "granularity": "row"}),
    ("wide", "wide", "bf16 fp32", {"scale_mode": "pow2"}),
    ("ties", "ties", "bf16 fp32", {"scale_mode": "pow2"}),
    ("zero", "zero", "bf16", {}),
    ("zerorow", "zerorow", "bf16", {"granularity": "row"}),
    ("nan", "nan", "bf16 fp32", {}),
    ("nan-row", "nan", "fp32", {"granularity": "row"}),
    ("inf", "inf", "bf16", {}),
    ("inf-channel", "inf", "fp32", {"granularity": "channel"}),
    ("tiny", "tiny", "fp32", {}),
    ("huge", "huge", "fp32", {}),
    ("overflow", "", "bf16", {"given_amax": True, "scale_mode": "pow2"}),
)
#: Carried codes are as exact as HiFloat8 ones. "wide" has values that E4M3 rounds, and zero.
_CARRIED: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("carried", "", "bf16 fp32", {}),
    ("carried-row", "", "bf16 fp32", {"granularity": "row"}),
    ("carried-224", "", "bf16", {"scale_max": 224.0}),
    ("carried-ties", "ties", "bf16", {"scale_mode": "pow2"}),
    ("carried-wide", "wide", "fp32", {"scale_mode": "pow2"}),
    ("carried-row-wide", "wide", "bf16", {"scale_mode": "pow2", "granularity": "row"}),
    ("carried-zerorow", "zerorow", "bf16", {"granularity": "row"}),
    ("carried-nan-row", "nan", "bf16", {"granularity": "row"}),
    ("carried-given", "", "bf16", {"given_amax": True}),
)
_SIZES = (("1x1", (1, 1)), ("0x7", (0, 7)), ("7x0", (7, 0)), ("c13824", (3, 13_824)), ("n75600", (1, 75_600, 17)))
_CROSSED = ("tensor", "row", "carried-row")


def _quantize_cases() -> Iterator[Case]:
    def case(words: str, tag: str, kind: str, shape: Sequence[int], settings: Mapping[str, Any]) -> Case:
        request = QuantizeRequest("cpu", DTYPES[tag], tuple(shape), **settings)
        options = {"kind": kind} | ({"factor": 1e-4} if words == "overflow" else {})
        crossed = words in _CROSSED and tag in ("bf16", "fp32")
        # Nothing asks every device to have FP8.
        level: Level = "optional" if request.carried else "required"
        name = f"hif8_quantize/{level}/{tag}-{words}"
        return Case(name, level, request, options, crossed=crossed, exact=request.carried)

    for words, kind, tags, settings in _SCALED:
        for tag in tags.split():
            yield case(words, tag, kind, SHAPE, settings)
    for words, kind, tags, settings in _CARRIED:
        for tag in tags.split():
            yield case(words, tag, kind, SHAPE, settings | {"carried": True})
    # What only division gives: bf16 values on ties, or next to them. Hardware that multiplies says so by failing.
    request, options = QuantizeRequest("cpu", torch.bfloat16, (512, 93), granularity="row"), {"kind": "", "ties": True}
    yield Case("hif8_quantize/optional/bf16-division", "optional", request, options)
    for words, shape in _SIZES:
        yield case(words, "bf16", "", shape, {})
        yield case(f"{words}-row", "bf16", "", shape, {"granularity": "row"})


def _fake_quantize_cases() -> Iterator[Case]:
    def case(words: str, tag: str, settings: Mapping[str, Any], **options: Any) -> Case:
        request = QuantizeRequest("cpu", DTYPES[tag], SHAPE, **settings)
        # With a power of two for a scale the round trip is exact in every dtype.
        exact = settings.get("scale_mode") == "pow2" and tag == "fp32"
        name = f"hif8_fake_quantize/required/{tag}-{words}"
        options = {"kind": options.pop("kind", "")} | options
        crossed = words == "tensor-backward224"
        return Case(name, "required", request, options, crossed=crossed, exact=exact)

    for tag in ("bf16", "fp32"):
        yield case("tensor", tag, {})
        yield case("tensor-backward", tag, {}, backward=True, grad_scale_max=None)
        yield case("tensor-backward224", tag, {}, backward=True, grad_scale_max=224.0)
        yield case("row", tag, {"granularity": "row"})
        yield case("given", tag, {"given_amax": True})
        yield case("ties", tag, {"scale_mode": "pow2"}, kind="ties")
        yield case("wide-backward224", tag, {"scale_mode": "pow2"}, kind="wide", backward=True, grad_scale_max=224.0)
    yield case("channel", "bf16", {"granularity": "channel"})
    yield case("nan", "bf16", {}, kind="nan")


CONTRACTS: tuple[Contract, ...] = (
    quantize_contract(
        "hif8_quantize",
        QUANTIZE,
        QuantizeRequest,
        inputs=_quantize_inputs,
        oracle=_quantize_oracle,
        yardstick=_quantize_yardstick,
        call=_call_quantize,
        cases=_quantize_cases,
        library_calls=lambda named: iter([(op("hif8_quantize"), (*_arguments(named), named["carried"]))]),
    ),
    quantize_contract(
        "hif8_fake_quantize",
        FAKE_QUANTIZE,
        QuantizeRequest,
        inputs=_quantize_inputs,
        oracle=_fake_quantize_oracle,
        yardstick=_fake_quantize_yardstick,
        call=_call_fake_quantize,
        hands_on_gradient=True,
        cases=_fake_quantize_cases,
        library_calls=lambda named: iter(
            [(op("hif8_fake_quantize"), (*_arguments(named), named.get("grad_scale_max"), ""))]
        ),
    ),
)

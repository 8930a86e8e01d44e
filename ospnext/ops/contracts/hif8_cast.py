"""HiFloat8 casts, encode and decode: all that is true about them. The arithmetic is in quantize_oracle.py."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ospnext.ops.contract import Case, Contract, Through, as_is
from ospnext.ops.contracts import quantize_oracle as oracle

ENCODE = """\
The HiFloat8 code of every element: uint8, shape of x, contiguous.

Rounding    to nearest, halves away from zero, from the exact value of x: not by way of another dtype.
Overflow    magnitudes of 40960 and more, Inf included, become Inf (0x6F, 0xEF), when saturating 32768 (0x6E, 0xEE).
Underflow   magnitudes below 2^-23 become zero; 2^-23 and up become at least 2^-22.
Zero, NaN   zero is 0x00 and has no sign: -0, and negative values that underflow, become it. Every NaN becomes 0x80."""

DECODE = """\
The value of every HiFloat8 code: shape of the codes, contiguous, exact in each dtype (fp64, fp32, bf16, fp16). 0x80 is
NaN, 0x6F and 0xEF are Inf."""


@dataclass(frozen=True)
class CastRequest:
    """What selection knows of an encoding or decoding; `dtype` is that of the values."""

    device_type: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    saturate: bool = False


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}

#: Shape of a plain case: no two dimensions alike, rows that no vector width divides.
SHAPE = (2, 67, 93)


def generator_of(case: Case) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(case.id.encode()))


# ---- casts


def boundaries() -> Tensor:
    """fp32 [N]: every place where a code changes, a few units of fp32 around it, and what is not a number."""
    grid = oracle.rounded(torch.exp2(torch.linspace(-26, 16.5, 20_000, dtype=torch.float64))).unique()
    middles = (grid[1:] + grid[:-1]) / 2
    places = torch.cat((grid, middles, torch.tensor([2.0**-23, 40960.0, 2.0**127, 2.0**-149]))).float()
    places = places[torch.isfinite(places)].view(torch.int32)
    around = (places[:, None] + torch.arange(-2, 3, dtype=torch.int32)).flatten().clamp(0, 0x7F7FFFFF)
    special = torch.tensor([0, 0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF], dtype=torch.int32)
    bits = torch.cat((around, special))
    return torch.cat((bits, bits | -(2**31))).view(torch.float32)


def _values(case: Case) -> Tensor:
    """The x of an encode case, or the codes of a decode case."""
    kind, dtype = case.options["kind"], case.request.dtype
    if kind == "all":
        return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(256, 256)
    if kind == "boundaries":
        return boundaries().to(dtype)
    generator = generator_of(case)
    if kind == "codes":
        return torch.arange(256, dtype=torch.uint8).view(16, 16)[:, torch.randperm(16, generator=generator)]
    shape = case.request.shape
    if case.options.get("of_codes"):
        codes = torch.randint(1, 256, shape, generator=generator, dtype=torch.int32).to(torch.uint8)
        return codes.masked_fill(codes == 0x80, 0)  # comparisons of PyTorch's own opcheck take no NaN
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (x.sign() * torch.exp2(x * 12)).to(dtype)  # over more than the range of the format, either way


def _encode_cases() -> Iterator[Case]:
    def case(name: str, tag: str, kind: str = "", shape: tuple[int, ...] = SHAPE, **more: Any) -> Case:
        request = CastRequest("cpu", DTYPES[tag], shape, saturate=more.pop("saturate", False))
        words = f"hif8_encode/required/{tag}-{name}"
        return Case(words, "required", request, {"kind": kind}, exact=True, **more)

    for tag in ("bf16", "fp16"):
        yield case("all", tag, "all", (256, 256))
        yield case("all-saturate", tag, "all", (256, 256), saturate=True)
    count = len(boundaries())
    for tag in ("fp32", "fp64"):
        yield case("boundaries", tag, "boundaries", (count,))
        yield case("boundaries-saturate", tag, "boundaries", (count,), saturate=True)
    for tag in ("bf16", "fp32"):
        yield case("plain", tag, crossed=True)
        for shape in ((), (1,), (0, 5)):
            yield case("x".join(map(str, shape)) or "scalar", tag, shape=shape)
    yield case("n4194305", "bf16", shape=(4_194_305,))


def _decode_cases() -> Iterator[Case]:
    for tag, dtype in DTYPES.items():
        request = CastRequest("cpu", dtype, (16, 16))
        name = f"hif8_decode/required/{tag}-all"
        yield Case(name, "required", request, {"kind": "codes", "of_codes": True}, exact=True)
    for tag in ("bf16", "fp32"):
        for words, shape in (("plain", SHAPE), ("scalar", ()), ("0x5", (0, 5))):
            options = {"kind": "", "of_codes": True}
            name = f"hif8_decode/required/{tag}-{words}"
            yield Case(
                name, "required", CastRequest("cpu", DTYPES[tag], shape), options, exact=True, crossed=words == "plain"
            )


def _encode_inputs(case: Case) -> dict[str, Any]:
    return {"x": _values(case), "saturate": case.request.saturate}


def _decode_inputs(case: Case) -> dict[str, Any]:
    return {"codes": _values(case), "dtype": case.request.dtype}


def _call_encode(named: Mapping[str, Any], through: Through = as_is) -> dict[str, Tensor]:
    from ospnext import ops

    return {"codes": through(ops.hif8_encode)(named["x"], saturate=named["saturate"])}


def _call_decode(named: Mapping[str, Any], through: Through = as_is) -> dict[str, Tensor]:
    from ospnext import ops

    return {"out": through(ops.hif8_decode)(named["codes"], named["dtype"])}


def _encode_oracle(named: Mapping[str, Any]) -> dict[str, Tensor]:
    return {"codes": oracle.codes_of(oracle.rounded(named["x"], saturate=named["saturate"]))}


def quantize_contract(name: str, meaning: str, request: type, **how: Any) -> Contract:
    """A required contract of the family."""
    return Contract(name=name, family="quantize", level="required", request=request, meaning=meaning, **how)


def op(name: str) -> Any:
    return getattr(torch.ops.ospnext, name).default


CONTRACTS: tuple[Contract, ...] = (
    quantize_contract(
        "hif8_encode",
        ENCODE,
        CastRequest,
        inputs=_encode_inputs,
        oracle=_encode_oracle,
        yardstick=_encode_oracle,
        call=_call_encode,
        cases=_encode_cases,
        library_calls=lambda named: iter([(op("hif8_encode"), (named["x"], named["saturate"]))]),
    ),
    quantize_contract(
        "hif8_decode",
        DECODE,
        CastRequest,
        inputs=_decode_inputs,
        oracle=lambda named: {"out": oracle.decoded(named["codes"])},
        yardstick=lambda named: {"out": oracle.decoded(named["codes"]).to(named["dtype"])},
        call=_call_decode,
        cases=_decode_cases,
        library_calls=lambda named: iter([(op("hif8_decode"), (named["codes"], named["dtype"]))]),
    ),
)

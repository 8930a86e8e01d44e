"""Casts to and from HiFloat8: rounding, overflow, NaN and Inf on every pattern of 16 bits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ospnext.numerics import hif8
from ospnext.ops.acceptance import Finding, Item, RefusedCallError

from .calls import all_of, equal_to, taken, vendors

TABLE = "rounds halves away from zero, keeps NaN and Inf"
SATURATES = "rounds halves away from zero, saturates: NaN 0, Inf 32768"
SATURATES_BUT_NAN = "rounds halves away from zero, saturates, keeps NaN"
EVEN = "rounds halves to even"
TRUNCATES = "cuts off"

_PLAIN = "OSPNEXT_OPS=hif8_encode=ascend.torch,hif8_quantize=ascend.torch,hif8_fake_quantize=ascend.torch until then"
_CAST = "OSPNEXT_OPS=hif8_quantize=ascend.cast,hif8_fake_quantize=ascend.cast"
_NOT_HIF8 = f"the contract rounds halves away from zero: put ascend.torch first in manifest_numeric.py; {_PLAIN}"


def patterns(dtype: torch.dtype) -> Tensor:
    """All 65,536 numbers of bf16 or fp16."""
    return torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(dtype)


def near_halves() -> Tensor:
    """fp32: what lies between two neighbours of the grid, the numbers next to it on both sides, where overflow begins,
    and what is not finite, of both signs.
    """
    grid = _grid()
    halves = torch.cat([(grid[1:] + grid[:-1]) / 2, torch.tensor([hif8.INFO.overflow])])
    around = torch.cat([halves, *(torch.nextafter(halves, halves * scale) for scale in (0.5, 2.0)), grid])
    around = torch.cat([around, torch.tensor([torch.inf, torch.nan])])
    return torch.cat([around, -around])


def casts(x: Tensor) -> dict[str, Tensor]:
    """The codes of x under each way of rounding."""
    clean = x.float().nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
    saturated = hif8.encode(clean, saturate=True)
    return {
        TABLE: hif8.encode(x),
        SATURATES: saturated,
        SATURATES_BUT_NAN: saturated.masked_fill(x.isnan(), hif8.NAN),
        EVEN: _between(x, even=True),
        TRUNCATES: _between(x, even=False),
    }


def _grid() -> Tensor:
    """Magnitudes of the finite values, in order."""
    values = hif8.decode(torch.arange(128, dtype=torch.uint8))
    return values[values.isfinite()].sort().values


def _between(x: Tensor, *, even: bool) -> Tensor:
    """Codes of the grid value below in magnitude, or of the nearest with halves to the even code."""
    grid = _grid()
    magnitude = x.float().abs()
    below = (torch.searchsorted(grid, magnitude.nan_to_num(0.0), right=True) - 1).clamp(0, len(grid) - 2)
    value = grid[below]
    if even:
        half = (grid[below] + grid[below + 1]) / 2
        odd = hif8.encode(grid[below]) & 1 == 1
        value = torch.where((magnitude > half) | ((magnitude == half) & odd), grid[below + 1], value)
    value = torch.where(magnitude >= hif8.INFO.overflow, torch.inf, value)
    return hif8.encode(value.copysign(x.float())).masked_fill(x.isnan(), hif8.NAN)


def cast(device: torch.device) -> Finding:
    npu = vendors()
    found = {}
    inputs = {"bf16": patterns(torch.bfloat16), "fp16": patterns(torch.float16), "fp32": near_halves()}
    for name, x in inputs.items():
        found[name] = equal_to(x, taken(npu.npu_dtype_cast, x.to(device), npu.hifloat8), casts(x))
    return all_of(found)


def cast_back(device: torch.device) -> Finding:
    npu = vendors()
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    found = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        values = taken(npu.npu_dtype_cast, codes.to(device), dtype, input_dtype=npu.hifloat8)
        found[str(dtype)] = equal_to(codes, values, {"the table": hif8.decode(codes, dtype)})
    return all_of(found)


def quantize(device: torch.device) -> Finding:
    npu = vendors()
    found = {}
    inputs = {"bf16": patterns(torch.bfloat16).float(), "fp16": patterns(torch.float16).float(), "fp32": near_halves()}
    for name, x in inputs.items():
        one = torch.ones(1, device=device)
        codes = taken(npu.npu_quantize, x.to(device), one, None, npu.hifloat8, 0, True)
        found[name] = equal_to(x, codes, casts(x))
    return all_of(found)


def quantize_narrow(device: torch.device) -> Finding:
    npu = vendors()
    x = patterns(torch.bfloat16).nan_to_num(0.0, 1.0, 1.0).clamp(-15, 15)
    try:
        codes = taken(npu.npu_quantize, x.to(device), torch.ones(1, device=device), None, npu.hifloat8, 0, True)
    except RefusedCallError as error:
        return Finding("only with scales in bf16", {"error": str(error)})
    return equal_to(x, codes, {"with fp32 scales": hif8.encode(x)})


def dynamic(device: torch.device) -> Finding:
    npu = vendors()
    x = patterns(torch.bfloat16)
    x = x[x.abs() <= hif8.INFO.max].view(1, -1)  # the largest is there, so that the scale is 1
    codes, scale = taken(
        npu.npu_dynamic_quant, x.to(device), dst_type=npu.hifloat8, quant_mode="pertensor", dst_type_max=hif8.INFO.max
    )
    kept = casts(x)
    found = equal_to(x, codes, {words: kept[words] for words in (TABLE, EVEN, TRUNCATES)})
    return Finding(found.answer, {**found.details, "scale": scale.tolist()})


def dynamic_scale(device: torch.device) -> Finding:
    npu = vendors()
    rows = torch.randn(512, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    rows[0], rows[1, 0], rows[2, 0] = 0, torch.nan, torch.inf
    codes, scale = taken(
        npu.npu_dynamic_quant, rows.to(device), dst_type=npu.hifloat8, quant_mode="pertoken", dst_type_max=15.0
    )
    amax = rows.abs().amax(-1).float()
    by = {"amax * fp32(1 / 15)": amax * torch.tensor(15.0).reciprocal(), "amax / 15": amax / torch.tensor(15.0)}
    found = equal_to(amax[3:], scale[3:], {words: values[3:] for words, values in by.items()})
    others = {
        f"row with {name}": {"scale": scale[n].item(), "codes": codes[n, :2].tolist()}
        for n, name in enumerate(("zeros", "NaN", "Inf"))
    }
    return Finding(found.answer, {**found.details, **others})


def items_of_950() -> Iterator[Item]:
    yield Item(
        id="cast/to-hif8",
        question="Which code does npu_dtype_cast give to each bf16 and fp16 pattern, and to fp32 numbers near halves?",
        why="ascend.cast (hif8_encode, hif8_quantize with a given amax): by the contract halves go away from zero, and "
        "NaN and Inf stay",
        calls=("npu_dtype_cast(x, 290)",),
        expected={TABLE: ""},
        otherwise={
            SATURATES: f"quantize.py, _cast: fill 0x80, 0x6F and 0xEF where x is NaN or too large; {_PLAIN}",
            SATURATES_BUT_NAN: f"quantize.py, _cast: fill 0x6F and 0xEF where x is too large; {_PLAIN}",
            EVEN: _NOT_HIF8,
            TRUNCATES: _NOT_HIF8,
        },
        unforeseen=f"read the examples in the details, then {_PLAIN}",
        ask=cast,
    )
    yield Item(
        id="cast/from-hif8",
        question="Which value does npu_dtype_cast give to each of the 256 codes?",
        why="ascend.cast (hif8_decode), and every round trip: all values are exact in bf16, fp16 and fp32",
        calls=("npu_dtype_cast(codes, dtype, input_dtype=290)",),
        expected={"the table": ""},
        otherwise={},
        unforeseen="decode by the table: OSPNEXT_OPS=hif8_decode=ascend.torch, and quantize.decode the same way",
        ask=cast_back,
    )
    yield Item(
        id="quantize/codes",
        question="Which code does npu_quantize give to each pattern when the scale is 1?",
        why="ascend.quantize (hif8_quantize, hif8_fake_quantize), which fills codes with NaN where the scale is",
        calls=("npu_quantize(x.float(), ones, None, 290, 0, True)",),
        expected={
            SATURATES: "",
            SATURATES_BUT_NAN: "quantize.py, _by_quantize: masked_fill_ can go",
            TABLE: "quantize.py: masked_fill_ can go, and a given amax need not fall back to ascend.cast",
        },
        otherwise={EVEN: _NOT_HIF8, TRUNCATES: _NOT_HIF8},
        unforeseen=f"{_CAST} if cast/to-hif8 is as expected, else {_PLAIN}",
        ask=quantize,
    )
    yield Item(
        id="quantize/bf16-input",
        question="Does npu_quantize take bf16 input with an fp32 scale?",
        why="ascend.quantize widens x to fp32 first, 8 bytes an element that a device might save: CANN's page asks for "
        "scales of the dtype of x, its sources do not",
        calls=("npu_quantize(bf16, fp32 ones, None, 290, 0, True)",),
        expected={
            "only with scales in bf16": "",
            "with fp32 scales": "quantize.py, _quantized: hand x over as it is",
        },
        otherwise={},
        unforeseen="none, since x is widened; keep it so",
        ask=quantize_narrow,
    )
    yield Item(
        id="dynamic_quant/codes",
        question="Which code does npu_dynamic_quant give to each finite bf16 pattern when the scale is 1?",
        why="no implementation uses it: with the answer to dynamic_quant/scale it says whether one could",
        calls=("npu_dynamic_quant(x, dst_type=290, quant_mode='pertensor', dst_type_max=32768)",),
        expected={TABLE: ""},
        otherwise={EVEN: "note in docs/ascend.md that it must not be used", TRUNCATES: "as for halves to even"},
        unforeseen="note in docs/ascend.md what it does; nothing uses it",
        ask=dynamic,
    )
    yield Item(
        id="dynamic_quant/scale",
        question="Is the scale of npu_dynamic_quant a quotient, or a product with fp32(1 / dst_type_max)?",
        why="it would move 5 bytes an element in place of 13 to 15. It is not used: a product is beyond the bound that "
        "the contract sets for scales, and zeros get the scale 0",
        calls=("npu_dynamic_quant(x, dst_type=290, quant_mode='pertoken', dst_type_max=15)",),
        expected={
            "amax * fp32(1 / 15)": "",
            "amax / 15": "an ascend.dynamic for hif8_quantize may serve bf16 and fp16 x, if zeros are treated apart",
        },
        otherwise={},
        unforeseen="note it in docs/ascend.md; nothing uses it",
        ask=dynamic_scale,
    )

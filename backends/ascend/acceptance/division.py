"""Quotients: whether dividing by a scale is right to the last bit, which decides about codes at halves."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ospnext.numerics import hif8
from ospnext.ops.acceptance import Finding, Item

from .calls import NONE, equal_to, taken, vendors

#: How near to a half the inputs of the conformance suite come, relative to it.
KEPT_AWAY = 2.0**-20
RIGHT = "right to the last bit"
OFF_BY_A_UNIT = "off by a unit somewhere"


def halves() -> Tensor:
    """What lies between two neighbours of the grid from 1 to 16: few bits, so that products with a scale are exact."""
    grid = torch.cat([torch.arange(8, 16) * 2.0**e / 8 for e in range(4)])
    return (grid[1:] + grid[:-1]) / 2


def scales() -> Tensor:
    """fp32 with mantissas of 16 bits that are no powers of two."""
    odd = torch.arange(1 << 15, 1 << 16, 149) | 1
    return odd.float() * 2.0**-20


def quantize(device: torch.device) -> Finding:
    """x / scale is a half to the bit, then 2^-20 above and below one, for a vector of scales along the rows."""
    npu = vendors()
    half, scale = halves(), scales()
    exact = scale[:, None] * half
    assert bool((exact.double() == scale.double()[:, None] * half.double()).all())
    near = [exact * (1 + KEPT_AWAY), exact * (1 - KEPT_AWAY)]
    for x in near:
        codes = taken(npu.npu_quantize, x.to(device), scale.to(device), None, npu.hifloat8, 0, True)
        wanted = hif8.encode((x.double() / scale.double()[:, None]).float())
        if not codes.equal(wanted):
            return equal_to(x, codes, {RIGHT: wanted})
    codes = taken(npu.npu_quantize, exact.to(device), scale.to(device), None, npu.hifloat8, 0, True)
    by = {
        RIGHT: hif8.encode(exact / scale[:, None]),
        "a product with fp32(1 / scale)": hif8.encode(exact * scale.reciprocal()[:, None]),
    }
    found = equal_to(exact, codes, by)
    if found.answer != NONE:
        return found
    quotient = exact / scale[:, None]
    beside = [hif8.encode(torch.nextafter(quotient, torch.full_like(quotient, end))) for end in (-torch.inf, torch.inf)]
    further = codes.ne(beside[0]) & codes.ne(beside[1]) if codes.shape == exact.shape else torch.ones(1)
    details = {**found.details, "further off than a unit": int(further.sum())}
    return Finding(NONE if bool(further.any()) else OFF_BY_A_UNIT, details)


def divide(device: torch.device) -> Finding:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(2, 1 << 20, generator=generator) + 0.5
    return equal_to(x, taken(torch.div, x.to(device), y.to(device)), {RIGHT: x / y})


def items_of_950() -> Iterator[Item]:
    away = "the contract keeps halves 2^-20 away from inputs, and more than that is wrong here"
    yield Item(
        id="division/quantize",
        question="Does npu_quantize divide by the scale, how exactly, or does it multiply by a reciprocal?",
        why="ascend.quantize: codes at halves depend on it, codes 2^-20 away from halves must not",
        calls=("npu_quantize(x, scales, None, 290, 0, True)",),
        expected={
            RIGHT: "",
            OFF_BY_A_UNIT: "",
            "a product with fp32(1 / scale)": "say so in docs/ascend.md: codes at halves are those of other backends "
            "with scale_mode=pow2 only",
        },
        otherwise={},
        unforeseen=f"{away}: OSPNEXT_OPS=hif8_quantize=ascend.cast,hif8_fake_quantize=ascend.cast, and swap the two in "
        "manifest_numeric.py",
        ask=quantize,
    )


def items() -> Iterator[Item]:
    yield Item(
        id="division/div",
        question="Is torch.div in fp32 right to the last bit?",
        why="ascend.cast and every scale (amax / scale_max) use it: scales and codes then equal those of other "
        "backends bit for bit",
        calls=("aten::div",),
        expected={RIGHT: ""},
        otherwise={},
        unforeseen="conformance run --case 'hif8_quantize/*' says whether scales keep their bound; scale_mode=pow2 is "
        "exact in any case",
        ask=divide,
    )

"""Scales that several ranks share: one contract whose cases are run by as many processes as they have ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ospnext.ops.contract import Case, Through, as_is
from ospnext.ops.contracts import quantize_oracle as oracle
from ospnext.ops.contracts.hif8_cast import DTYPES, generator_of, quantize_contract

MEANING = """\
hif8_fake_quantize with an amax_group, and so every quantizer with one: all ranks of the group scale by the largest
magnitude that any of them has, and by NaN where any has one. The values are those of a single rank that holds
everything. Each rank makes the call, in the same order; it may hold another shape, or nothing."""


@dataclass(frozen=True)
class SharedAmaxRequest:
    """What selection knows of a call."""

    device_type: str
    dtype: torch.dtype
    ranks: int


@dataclass(frozen=True)
class Definition:
    """The contract in terms of others, through the public function."""

    @property
    def forward(self) -> Callable[..., Tensor]:
        from ospnext import ops

        return ops.hif8_fake_quantize


#: Powers of two for scales, so that results are exact.
_SETTINGS: dict[str, Any] = {"scale_max": 15.0, "scale_mode": "pow2"}


def _inputs(case: Case) -> dict[str, dict[str, Any]]:
    """`rank0`, `rank1`, ... -> what that rank holds; each has another size and another largest magnitude."""
    generator, ranks = generator_of(case), case.request.ranks
    named = {}
    for rank in range(ranks):
        x = torch.randn(11 + rank, 7, generator=generator, dtype=torch.float64) * 5.0 ** ((rank + 1) % ranks)
        if case.options["kind"] == "empty" and rank == 0:
            x = x[:0]
        if case.options["kind"] == "nan" and rank == ranks - 1:
            x[3, 2] = math.nan
        named[f"rank{rank}"] = {"x": x.to(case.request.dtype)}
    return named


def _oracle(inputs: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
    everything = torch.cat([held["x"] for held in inputs.values()])
    values, scale = oracle.quantized(everything, _SETTINGS["scale_max"], _SETTINGS["scale_mode"])
    parts = (values * scale.double()).split([len(held["x"]) for held in inputs.values()])
    return dict(zip(inputs, parts, strict=True))


def _call(inputs: Mapping[str, Any], through: Through = as_is) -> dict[str, Tensor]:
    """The call of one rank, on the default group; every rank must make its own."""
    from ospnext import ops

    group = torch.distributed.group.WORLD
    return {"out": through(ops.hif8_fake_quantize)(inputs["x"], amax_group=group, **_SETTINGS)}


def _cases() -> Iterator[Case]:
    for ranks in (2, 3, 4):
        for tag in ("bf16", "fp32"):
            for kind in ("", *(("empty", "nan") if (ranks, tag) == (3, "fp32") else ())):
                words = "-".join(filter(None, (f"r{ranks}", tag, kind)))
                request = SharedAmaxRequest("cpu", DTYPES[tag], ranks)
                yield Case(f"hif8_shared_amax/required/{words}", "required", request, {"kind": kind}, exact=True)


CONTRACT = quantize_contract(
    "hif8_shared_amax",
    MEANING,
    SharedAmaxRequest,
    composite=Definition(),
    composed_of=("hif8_fake_quantize", "collective"),
    by_ranks=True,
    inputs=_inputs,
    oracle=_oracle,
    yardstick=_oracle,
    call=_call,
    cases=_cases,
)

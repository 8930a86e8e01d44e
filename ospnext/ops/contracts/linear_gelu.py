"""A linear layer with GELU at its end, as the products that matrix libraries can finish before they write. Everything
true about it, stated once.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ospnext.ops.contract import Case, Contract, Through, as_is
from ospnext.ops.contracts import fused_definitions as define
from ospnext.ops.contracts.fused import DTYPES, Composite, FusedRequest

MEANING = """\
y = gelu_tanh(x weight^T + bias). x [..., K], weight [N, K], bias [N], all of one dtype; y [..., N] of that dtype,
contiguous. Any strides; no tokens are legal.

Sum         in fp32 (fp64 for fp64) or better, bias included; it may be rounded to the dtype of y before GELU or not.
Gradient    none: it would need the sum, which is not kept."""

#: Name -> tokens, input and output features.
_SIZES: dict[str, tuple[tuple[int, ...], int, int]] = {
    "plain": ((2, 53), 93, 71),
    "aligned": ((2, 56), 96, 112),
    "one": ((1,), 1, 1),
    "m0": ((0,), 96, 112),
    "c5120": ((33,), 5120, 1_728),
    "n75600": ((75_600,), 17, 24),
}


def _linear_gelu_tanh(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    # On CPUs with AMX, oneDNN multiplies what lies beside a bf16 row of odd length by 0: that may be NaN.
    return define.gelu_tanh(F.linear(x.contiguous(), weight, bias))


def _inputs(case: Case) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(zlib.crc32(case.id.encode()))
    tokens, inner, outer = case.options["sizes"]

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    named = {"x": randn(*tokens, inner), "weight": randn(outer, inner) * (3 * inner**-0.5), "bias": randn(outer)}
    return {name: value.to(case.request.dtype) for name, value in named.items()}


def _oracle(named: Mapping[str, Any]) -> dict[str, Tensor]:
    x, weight, bias = (named[name].double() for name in ("x", "weight", "bias"))
    return {"out": define.naive_gelu_tanh(x @ weight.mT + bias)}


def _yardstick(named: Mapping[str, Any]) -> dict[str, Tensor]:
    """Sums in fp32 from the last element to the first; 16 at a time where there are many."""
    x, weight = named["x"].float(), named["weight"].float()
    total, step = torch.zeros(*x.shape[:-1], len(weight)), 16 if x.shape[-1] > 128 else 1
    for left, right in zip(reversed(x.split(step, dim=-1)), reversed(weight.split(step, dim=-1)), strict=True):
        total = total + left @ right.mT
    return {"out": define.naive_gelu_tanh((total + named["bias"]).to(named["x"].dtype))}


def _call(named: Mapping[str, Any], through: Through = as_is) -> dict[str, Tensor]:
    from ospnext import ops

    return {"out": through(ops.linear_gelu_tanh)(named["x"], named["weight"], named["bias"])}


def _cases() -> Iterator[Case]:
    for tag, dtype in DTYPES.items():
        for words, sizes in _SIZES.items():
            if tag == "fp32" and words in ("c5120", "n75600"):
                continue
            request = FusedRequest("cpu", dtype, (*sizes[0], sizes[1]))
            name = f"fused.linear_gelu_tanh/optional/{tag}-{words}"
            yield Case(name, "optional", request, {"sizes": sizes}, crossed=words in ("plain", "aligned"))


CONTRACT = Contract(
    name="fused.linear_gelu_tanh",
    family="fused",
    level="optional",
    request=FusedRequest,
    meaning=MEANING,
    composite=Composite(_linear_gelu_tanh),
    inputs=_inputs,
    oracle=_oracle,
    yardstick=_yardstick,
    call=_call,
    cases=_cases,
    library_calls=lambda named: iter([(torch.ops.ospnext.linear_gelu_tanh.default, tuple(named.values()))]),
)

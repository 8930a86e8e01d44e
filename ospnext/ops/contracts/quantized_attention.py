"""Attention on HiFloat8 values: everything that is true about it, stated once. It is a composition of two contracts, so
that every backend has it; the formulas are in attention_oracle.py and quantize_oracle.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ospnext.ops.contract import Case, Through, as_is
from ospnext.ops.contracts import attention, attention_oracle
from ospnext.ops.contracts import quantize_oracle as oracle
from ospnext.ops.contracts.attention import AttentionRequest
from ospnext.ops.contracts.hif8_cast import DTYPES, quantize_contract
from ospnext.ops.recipe import HiF8Recipe
from ospnext.ops.tolerance import Interval, max_bound

MEANING = """\
The attention contract on q, k and v that each went through hif8_fake_quantize, one scale for each tensor, masked keys
included. Probabilities are not quantized ("QDQ"). dq, dk and dv of attention make the round trip at grad_scale_max, one
scale for each; quantizers pass gradients straight through.

Scales of gradients follow from rounded values, and ties may fall on either side: a gradient is right if it is the round
trip of some value within the bounds of the attention contract."""


@dataclass(frozen=True)
class Definition:
    """The contract in terms of others, through the public functions."""

    @property
    def forward(self) -> Callable[..., Tensor]:
        from ospnext import ops

        return ops.quantized_attention


def _inputs(case: Case) -> dict[str, Any]:
    """Those of the attention contract, away from ties."""
    recipe: HiF8Recipe = case.options["recipe"]
    named = attention.make_inputs(case)
    for name in ("q", "k", "v"):
        named[name] = oracle.away_from_ties(named[name], recipe.scale_max, recipe.scale_mode, "tensor")
    return named | {"recipe": recipe}


def _round_trips(named: Mapping[str, Any]) -> dict[str, Any]:
    """q, k and v as attention sees them, in their dtype."""
    recipe: HiF8Recipe = named["recipe"]
    found = dict(named)
    for name in ("q", "k", "v"):
        values, scale = oracle.quantized(named[name], recipe.scale_max, recipe.scale_mode)
        found[name] = (values * scale.double()).to(named[name].dtype)
    return found


def _oracle(named: Mapping[str, Any]) -> dict[str, Any]:
    through = _round_trips(named)
    found: dict[str, Any] = attention_oracle.oracle(through)
    if "grad_out" in named:
        usual = attention_oracle.yardstick(through)
        for name in ("dq", "dk", "dv"):
            found[name] = _round_trip_of_some(found[name], max_bound(found[name], usual[name], name), named["recipe"])
    return found


def _round_trip_of_some(gradient: Tensor, error: float, recipe: HiF8Recipe) -> Interval:
    """Where the round trip of a value within `error` of `gradient` may lie; the scale may be off by as much, too."""
    largest = gradient.abs().max()
    scale = oracle.scale_of(largest.float(), recipe.grad_scale_max, recipe.scale_mode).double()
    low, high = (oracle.rounded((gradient + by) / scale) * scale for by in (-error, error))
    return Interval(low - error, high + error)


def _yardstick(named: Mapping[str, Any]) -> dict[str, Tensor]:
    return attention_oracle.yardstick(_round_trips(named))


def _call(named: Mapping[str, Any], through: Through = as_is) -> dict[str, Tensor]:
    from ospnext import ops

    arguments = {k: v for k, v in named.items() if k not in ("q", "k", "v", "grad_out", "return_lse")}
    leaves = [named[name].detach().requires_grad_("grad_out" in named) for name in ("q", "k", "v")]
    out = through(ops.quantized_attention)(*leaves, **arguments)
    found = {"out": out.detach()}
    if "grad_out" in named:
        found |= dict(zip(("dq", "dk", "dv"), torch.autograd.grad(out, leaves, named["grad_out"]), strict=True))
    return found


def _case(words: str, tag: str, sizes: tuple[int, int, int, int, int], crossed: bool = False, **options: Any) -> Case:
    features = {name: options.pop(name, False) for name in ("key_mask", "backward", "custom_scale")}
    features["packed"] = "q_lens" in options
    batch, q_len, kv_len, heads, head_dim = sizes
    request = AttentionRequest("cpu", DTYPES[tag], batch, q_len, kv_len, heads, head_dim, **features)
    options = {"recipe": HiF8Recipe()} | options
    return Case(f"quantized_attention/required/{tag}-{words}", "required", request, options, crossed=crossed)


def _cases() -> Iterator[Case]:
    lengths = (93, 93, 88, 88)
    for tag in ("bf16", "fp32"):
        yield _case("plain", tag, (2, 113, 113, 2, 64))
        yield _case("backward", tag, (1, 113, 127, 2, 64), crossed=True, backward=True)
        yield _case("mask-backward", tag, (2, 113, 127, 2, 64), key_mask=True, backward=True)
        yield _case("packed-backward", tag, (4, 93, 93, 2, 64), q_lens=lengths, kv_lens=lengths, backward=True)
        yield _case("scale", tag, (1, 113, 113, 2, 64), custom_scale=True)
    pow2 = HiF8Recipe(scale_mode="pow2", scale_max=224.0, grad_scale_max=15.0)
    yield _case("pow2-backward", "bf16", (1, 113, 113, 3, 128), recipe=pow2, backward=True)


CONTRACT = quantize_contract(
    "quantized_attention",
    MEANING,
    AttentionRequest,
    composite=Definition(),
    composed_of=("attention", "hif8_fake_quantize"),
    inputs=_inputs,
    oracle=_oracle,
    yardstick=_yardstick,
    call=_call,
    cases=_cases,
)

"""Attention on 8-bit operands and probabilities: everything that is true about it, stated once. It approximates
quantized_attention, for inference; the bounds of its error are in native_attention_bounds.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ospnext.numerics.scaling import ScaleMode
from ospnext.ops.contract import Case, Contract, Through, as_is
from ospnext.ops.contracts import attention, attention_oracle
from ospnext.ops.contracts import quantize_oracle as oracle
from ospnext.ops.contracts.attention import AttentionRequest, needle_positions
from ospnext.ops.contracts.hif8_cast import DTYPES, op
from ospnext.ops.contracts.native_attention_bounds import centre_of_rows, centred, result_within
from ospnext.ops.recipe import HiF8Recipe
from ospnext.ops.tolerance import Interval

MEANING = """\
quantized_attention without key mask and gradients, by kernels that multiply 8-bit numbers: less exact, for inference.

Operands    q and k as hif8_quantize gives them, one scale per tensor, carried or not; so v without the mean of each
            channel over all tokens, in fp32.
Centre      is added to the result of every row that has keys: the mean of v less that of what is left after rounding.
            It changes nothing, since probabilities add up to 1, but long sums on 8-bit tensor cores keep few bits and
            lose a third or half of values that do not cancel.
P           probabilities may be rounded to 3 bits of mantissa; below 2^-10 of the largest of their row to multiples of
            2^-13 of that.
Result      may be rounded to E4M3 with one scale for the tensor, by which the largest magnitude that v can have becomes
            448: to 3 bits of mantissa, and below 2^-14 of that magnitude to steps that stay. It is never clipped.
Sums        as of 32 products at a time that keep 14 bits: those of logits and those of the result.
Error       each element within what these add up to at most; and all elements together as near as independent
            roundings would bring them. For values without structure that is 3.9e-2 of the norm of the result, beside
            what the attention contract allows.
Exactness   less rounding is always right: where a backend declares no kernel, attention on rounded values serves.
Given amax  of q and k replaces theirs, so that ranks share scales."""


@dataclass(frozen=True)
class NativeAttentionRequest:
    """What selection knows of a call; fields as in the attention and the quantize contract."""

    device_type: str
    dtype: torch.dtype
    batch: int
    q_len: int
    kv_len: int
    heads: int
    head_dim: int
    packed: bool = False
    custom_scale: bool = False
    scale_max: float = 15.0
    scale_mode: ScaleMode = "amax"
    #: Of q and k.
    given_amax: bool = False


@dataclass(frozen=True)
class Composition:
    """The contract in terms of others, through the public functions."""

    @torch.no_grad()
    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        cu_seqlens_q: Tensor | None,
        cu_seqlens_kv: Tensor | None,
        max_seqlen_q: int,
        max_seqlen_kv: int,
        scale: float,
        scale_max: float,
        scale_mode: ScaleMode,
        amax: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        from ospnext import ops

        settings: dict[str, Any] = {"scale_max": scale_max, "scale_mode": scale_mode}
        given = amax or (None, None)
        q, k = (ops.hif8_fake_quantize(t, **settings, amax=a) for t, a in zip((q, k), given, strict=True))
        wide = v.double() if v.dtype == torch.float64 else v.float()
        mean = wide.flatten(0, -3).mean(0)
        rest = ops.hif8_fake_quantize(wide - mean, **settings)
        centre = mean - rest.flatten(0, -3).mean(0)
        v = rest.to(v.dtype)
        if cu_seqlens_q is None or cu_seqlens_kv is None:
            out = ops.attention(q, k, v, scale=scale)
            return (out + centre).to(q.dtype) if v.shape[1] else out
        out = ops.attention_packed(
            q,
            k,
            v,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_kv=cu_seqlens_kv,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_kv=max_seqlen_kv,
            scale=scale,
        )
        rows = torch.arange(len(q), device=q.device)
        sequence = torch.searchsorted(cu_seqlens_q[1:].contiguous(), rows, right=True)
        has_keys = (cu_seqlens_kv.diff() > 0)[sequence]
        return torch.where(has_keys[:, None, None], out + centre, out).to(q.dtype)


# ---- inputs and the formula


def _inputs(case: Case) -> dict[str, Any]:
    """Those of the attention contract, away from ties."""
    request, recipe = case.request, case.options["recipe"]
    features = {"packed": request.packed, "custom_scale": request.custom_scale}
    sizes = (request.batch, request.q_len, request.kv_len, request.heads, request.head_dim)
    plain = AttentionRequest(request.device_type, request.dtype, *sizes, **features)
    kind = case.options.get("kind")
    options = {**case.options, "kind": None if kind == "offset" else kind}
    named = attention.make_inputs(Case(case.id, case.level, plain, options))
    del named["return_lse"]
    if kind == "offset":
        # Means of each channel over two binades, all mantissas alike.
        heads = named["v"].shape[-2:]
        named["v"] = named["v"] + torch.exp2(torch.linspace(0, 2, heads.numel())).view(heads).to(named["v"].dtype)
    for name in ("q", "k", "v"):
        named[name] = oracle.away_from_ties(named[name], recipe.scale_max, recipe.scale_mode, "tensor")
    return named | {"recipe": recipe}


def _round_trips(named: Mapping[str, Any]) -> dict[str, Any]:
    """q, k and v as the composition sees them, in their dtype."""
    recipe: HiF8Recipe = named["recipe"]
    found = dict(named)
    rest, found["centre"] = centred(named["v"], recipe)
    for name, x in (("q", named["q"]), ("k", named["k"]), ("v", rest)):
        values, scale = oracle.quantized(x, recipe.scale_max, recipe.scale_mode)
        found[name] = (values * scale.double()).to(named[name].dtype)
    return found


def _yardstick(named: Mapping[str, Any]) -> dict[str, Tensor]:
    through = _round_trips(named)
    rows = centre_of_rows(named, through.pop("centre"))
    return {"out": (attention_oracle.yardstick(through)["out"] + rows).to(named["q"].dtype)}


def _oracle(named: Mapping[str, Any]) -> dict[str, Interval]:
    return {"out": result_within(named, _yardstick(named)["out"])}


def _call(named: Mapping[str, Any], through: Through = as_is) -> dict[str, Tensor]:
    from ospnext import ops

    arguments = {name: value for name, value in named.items() if name not in ("q", "k", "v")}
    return {"out": through(ops.quantized_attention)(named["q"], named["k"], named["v"], **arguments)}


def _library_calls(named: Mapping[str, Any]) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """With scales of its own, and with given ones."""
    recipe: HiF8Recipe = named["recipe"]
    operands = [named[name] for name in ("q", "k", "v")]
    pack = [named.get(name) for name in ("cu_seqlens_q", "cu_seqlens_kv")]
    longest = [named.get(f"max_seqlen_{side}", 0) for side in ("q", "kv")]
    for amax in ([], [op("hif8_amax")(t, "tensor", "") for t in operands[:2]]):
        settings = (named.get("scale"), recipe.scale_max, recipe.scale_mode, amax)
        yield op("native_attention"), (*operands, *pack, *longest, *settings)


# ---- cases


def _case(words: str, tag: str, sizes: tuple[int, int, int, int, int], crossed: bool = False, **options: Any) -> Case:
    features = {"packed": "q_lens" in options, "custom_scale": options.pop("custom_scale", False)}
    recipe: HiF8Recipe = options.setdefault("recipe", HiF8Recipe(attention="native"))
    features |= {"scale_max": recipe.scale_max, "scale_mode": recipe.scale_mode}
    request = NativeAttentionRequest("cpu", DTYPES[tag], *sizes, **features)
    return Case(f"native_attention/optional/{tag}-{words}", "optional", request, options, crossed=crossed)


def _cases() -> Iterator[Case]:
    uneven, empty = (93, 93, 88, 88), (33, 0, 70)
    pow2 = HiF8Recipe(scale_mode="pow2", scale_max=224.0, attention="native")
    for tag in ("bf16", "fp32"):
        yield _case("plain", tag, (2, 113, 113, 2, 64), crossed=True)
        yield _case("cross", tag, (1, 239, 77, 3, 128))
        yield _case("packed", tag, (4, 93, 93, 2, 64), crossed=True, q_lens=uneven, kv_lens=uneven)
        yield _case("packed-cross", tag, (4, 93, 31, 2, 64), q_lens=uneven, kv_lens=(31, 5, 17, 1))
        yield _case("packed-empty", tag, (3, 70, 70, 2, 64), q_lens=empty, kv_lens=(0, 40, 70))
        yield _case("scale", tag, (1, 113, 113, 2, 64), custom_scale=True)
        yield _case("zeroscale", tag, (1, 113, 113, 2, 64), custom_scale=True, scale=0.0)
        yield _case("needle", tag, (1, len(needle_positions(1023)), 1023, 2, 64), kind="needle")
        yield _case("large", tag, (1, 203, 239, 2, 64), kind="large")
    yield _case("pow2", "bf16", (1, 113, 127, 3, 128), recipe=pow2)
    yield _case("heads", "bf16", (3, 37, 41, 40, 128))
    yield _case("d16", "bf16", (1, 239, 203, 2, 16))
    # As long as a sparse block of a video; sums of values that cancel, and of values that do not.
    yield _case("k20160", "bf16", (1, 64, 20_160, 1, 128))
    yield _case("k20160-offset", "bf16", (1, 64, 20_160, 1, 128), kind="offset")


CONTRACT = Contract(
    name="native_attention",
    family="quantize",
    level="optional",
    request=NativeAttentionRequest,
    meaning=MEANING,
    composite=Composition(),
    composed_of=("attention", "hif8_fake_quantize"),
    fusible=True,
    inputs=_inputs,
    oracle=_oracle,
    yardstick=_yardstick,
    call=_call,
    cases=_cases,
    library_calls=_library_calls,
)

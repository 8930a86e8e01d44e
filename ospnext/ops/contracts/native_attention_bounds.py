"""How far attention on 8-bit numbers may be from attention on the same operands in fp64: worst case and expectation.

CPU only; no kernel lives here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ospnext.ops.contracts import attention_oracle
from ospnext.ops.contracts import quantize_oracle as oracle
from ospnext.ops.recipe import HiF8Recipe
from ospnext.ops.tolerance import RESULT_FACTOR, UNIT_ROUNDOFF, Interval, max_bound

#: Largest relative error of a rounding to 3 bits of mantissa.
ROUNDING = 2.0**-4
#: The root mean square of the error over that of what is rounded, 2.76e-2: errors evenly spread over a step, values x
#: from m to 2m with a density of 1/x. That gives ((ln 2 + 3 ln m) / 1152)^(1/2) / m, which is largest at ln m = 0.269.
ROUNDING_RMS = math.sqrt(2 ** (2 / 3) / (768 * math.e))
#: Half a step of probabilities too small for 3 bits of mantissa, relative to the largest of their row: normal numbers
#: end at 2^-10 of it, so that a kernel may keep 2^4 of E4M3's range for rows whose maximum it does not know yet.
P_HALF_STEP = 2.0**-14
#: Half of E4M3's smallest step, relative to its largest number; and absolute.
RESULT_HALF_STEP = 2.0**-10 / 448
E4M3_HALF_STEP = 2.0**-10
#: Relative error of a sum, of the sum of magnitudes: tensor cores add FP8 products with fewer bits than fp32.
SUM = 2.0**-12


class _Operand(NamedTuple):
    """fp64 values [S, H, D], and what E4M3 as a carrier may be off by in each."""

    values: Tensor
    tails: Tensor


def result_within(named: Mapping[str, Any], yardstick: Tensor) -> Interval:
    """The result for q, k and v of `named`: its fp64 value, what 8-bit numbers may add to it, and what `yardstick`, the
    plain composition, shows that the attention contract allows.
    """
    recipe: HiF8Recipe = named["recipe"]
    centred_v, centre = centred(named["v"], recipe)
    operands = [_operand(x, recipe) for x in (named["q"], named["k"], centred_v)]
    scale = named.get("scale")
    scale = 1.0 / math.sqrt(named["q"].shape[-1]) if scale is None else scale
    _, v_scale = oracle.quantized(centred_v, recipe.scale_max, recipe.scale_mode)
    smallest = RESULT_HALF_STEP * oracle.rounded(torch.tensor(recipe.scale_max)).item() * v_scale.item()

    values = attention_oracle.sequences(named, *(o.values for o in operands))
    tails = attention_oracle.sequences(named, *(o.tails for o in operands))
    parts = []
    for of_values, of_tails in zip(values, tails, strict=True):
        q, k, v = (_Operand(*pair) for pair in zip(of_values[:3], of_tails[:3], strict=True))
        parts.append(_one_sequence(q, k, v, scale, smallest))
    join = torch.cat if named.get("cu_seqlens_q") is not None else torch.stack
    out, error, variance, bias = (join(part) for part in zip(*parts, strict=True))
    out = out + centre_of_rows(named, centre)

    # What the attention contract allows the composition, which rounds no more than that; independent of the rest.
    plain_max = max_bound(out, yardstick, "out")
    plain_rms = RESULT_FACTOR * _rms(yardstick.double() - out) + UNIT_ROUNDOFF[yardstick.dtype] * _rms(out)
    rms = math.hypot(plain_rms, variance.mean().sqrt().item()) + _rms(bias)
    error = error + plain_max
    return Interval(out - error, out + error, rms / (_rms(out) or 1.0))


def centred(v: Tensor, recipe: HiF8Recipe) -> tuple[Tensor, Tensor]:
    """(v without the mean of each channel in fp32, what is to be added to its rounded values for the mean to be that of
    v, fp64 [H, D]).
    """
    mean = v.double().flatten(0, -3).mean(0)
    rest = (v.double() - mean).float()
    values, scale = oracle.quantized(rest, recipe.scale_max, recipe.scale_mode)
    return rest, mean - (values * scale.double()).flatten(0, -3).mean(0)


def centre_of_rows(named: Mapping[str, Any], centre_HD: Tensor) -> Tensor:
    """The centre of v for every row of q; 0 for rows without keys."""
    rows = attention_oracle.sequences(named, *(named[name] for name in ("q", "k", "v")))
    join = torch.cat if named.get("cu_seqlens_q") is not None else torch.stack
    return join([centre_HD.expand(q.shape) if len(k) else torch.zeros(q.shape) for q, k, *_ in rows])


def _operand(x: Tensor, recipe: HiF8Recipe) -> _Operand:
    values, scale = oracle.quantized(x, recipe.scale_max, recipe.scale_mode)
    numbers, power = oracle.carried(values, recipe.scale_max)
    inexact = numbers / power != values
    return _Operand(values * scale.double(), inexact * (E4M3_HALF_STEP / power * scale.double()))


def _one_sequence(
    q: _Operand, k: _Operand, v: _Operand, scale: float, smallest: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(result, its largest error, the variance of independent roundings, what sums may be off by), each [Q, H, D].

    With o = sum_j p_j v_j, a logit error of at most d changes p_j by a factor between e^-2d and e^2d whose mean is 1,
    and o by no more than (e^2d - 1) sum_j p_j |v_j - o|, which is at most (e^2d - 1) (sum_j p_j v_j^2 - o^2)^(1/2).
    """
    logits_HQK = _logits(q.values, k.values) * scale
    if not k.values.shape[0]:
        nothing = torch.zeros_like(q.values)
        return nothing, nothing, nothing, nothing
    off_HQK = _logits(q.values.abs(), k.tails) + _logits(q.tails, k.values.abs()) + _logits(q.tails, k.tails)
    off_HQK = (off_HQK + SUM * _logits(q.values.abs(), k.values.abs())) * abs(scale)
    off_QH1 = off_HQK.amax(-1).mT[..., None]
    p_HQK = logits_HQK.softmax(-1)
    top_QH1 = p_HQK.amax(-1).mT[..., None]
    values, magnitudes = v.values, v.values.abs()

    out = _weighted(p_HQK, values)
    spread = (_weighted(p_HQK, values.square()) - out.square()).clamp_min(0).sqrt()
    summed = _weighted(p_HQK, magnitudes)
    lost = P_HALF_STEP * top_QH1
    tails = _weighted(p_HQK, v.tails)

    # No logits, however wrong, take the result out of the range of v.
    farthest = 2 * magnitudes.amax(0)
    moved = torch.minimum(torch.expm1(2 * off_QH1.clamp_max(16.0)) * spread, farthest)
    before = moved + ROUNDING * summed + lost * magnitudes.sum(0) + tails + SUM * summed
    error = before * (1 + ROUNDING) + ROUNDING * out.abs() + smallest
    # Independent errors of logits: sum_j p_j^2 (v_j - o)^2 is at most the largest p times the spread's square.
    moved_once = torch.minimum(off_QH1 * top_QH1.sqrt() * spread, farthest)
    noise = _weighted(p_HQK.square(), values.square()) + out.square()
    steps = (lost * values.square().sum(0).sqrt()).square() + smallest**2 + moved_once.square() + tails.square()
    return out, error, ROUNDING_RMS**2 * noise + steps / 3, SUM * summed


def _logits(q_SHD: Tensor, k_SHD: Tensor) -> Tensor:
    return torch.einsum("qhd,khd->hqk", q_SHD, k_SHD)


def _weighted(p_HQK: Tensor, v_SHD: Tensor) -> Tensor:
    return torch.einsum("hqk,khd->qhd", p_HQK, v_SHD)


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()

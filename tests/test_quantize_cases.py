"""What the conformance cases of the quantize family take for granted: inputs that hold what a name says, oracles that
agree with a library nobody here wrote, and a judge that tells wrong results from right ones.
"""

from __future__ import annotations

import dataclasses
import math

import en_dtypes
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ospnext import ops
from ospnext.numerics.carrier import shift_for
from ospnext.ops.contracts import CONTRACTS, attention_oracle
from ospnext.ops.contracts import quantize_oracle as oracle
from ospnext.ops.contracts.hif8_cast import DTYPES, boundaries
from ospnext.ops.recipe import HiF8Recipe
from ospnext.ops.tolerance import Interval, judge_exact, judge_interval


def cases(*names):
    return [pytest.param(CONTRACTS[n], case, id=case.id) for n in names for case in CONTRACTS[n].cases()]


def words(case):
    return case.id.rpartition("/")[2].split("-")


def codes_by_library(x):
    """uint8 [...] of an fp32 or fp64 array; en_dtypes has no cast of bf16."""
    with np.errstate(all="ignore"):
        return torch.from_numpy(x.numpy().astype(en_dtypes.hifloat8).view(np.uint8).copy())


def values_by_library(codes):
    return torch.from_numpy(codes.numpy().view(en_dtypes.hifloat8).astype(np.float32).astype(np.float64))


# ---- the arithmetic of the oracles


def test_the_oracle_rounds_as_the_library_does():
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for x in (patterns.view(torch.bfloat16).float(), patterns.view(torch.float16).float(), boundaries()):
        assert oracle.codes_of(oracle.rounded(x)).equal(codes_by_library(x))


def test_the_oracle_decodes_as_the_library_does():
    codes = torch.arange(256, dtype=torch.uint8)
    torch.testing.assert_close(oracle.decoded(codes), values_by_library(codes), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("scale_max", "power"), [(15.0, 16), (224.0, 2), (1.0, 256), (448.0, 1)])
def test_the_oracle_carries_as_pytorch_rounds_to_e4m3(scale_max, power):
    values = oracle.decoded(torch.arange(256, dtype=torch.uint8))
    found, by = oracle.carried(values, scale_max)
    expected = (values * power).float()
    expected = torch.where(expected.abs() <= 448, expected.to(torch.float8_e4m3fn).double(), torch.nan)
    assert by == power
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_boundaries_lie_on_both_sides_of_every_change():
    x = boundaries()
    x = x[torch.isfinite(x) & (x > 0)].sort().values
    found = oracle.rounded(x)
    at = (found[1:] != found[:-1]).nonzero().flatten()
    assert len(at) == 127  # 126 finite values and Inf, each begins somewhere
    assert torch.nextafter(x[at], torch.tensor(math.inf)).equal(x[at + 1])


# ---- the inputs of a case hold what its name says


@pytest.mark.parametrize(("contract", "case"), cases("hif8_quantize", "hif8_fake_quantize"))
def test_inputs_of_quantize(contract, case):
    request, said = case.request, words(case)
    inputs = contract.inputs(case)
    x, amax = inputs["x"], inputs["amax"]
    assert x.dtype == request.dtype == DTYPES[said[0]] and tuple(x.shape) == request.shape
    assert (request.granularity == "row") == ("row" in said or "zerorow" in said or "division" in said)
    assert (request.granularity == "channel") == ("channel" in said)
    assert request.carried == ("carried" in said)
    assert (request.scale_mode == "pow2") == bool({"pow2", "wide", "ties", "overflow"} & set(said))
    assert (request.scale_max == 224.0) == ("224" in said)
    assert (amax is not None) == request.given_amax == bool({"given", "overflow"} & set(said))
    values, scale = oracle.quantized(x, request.scale_max, request.scale_mode, request.granularity, amax)
    quotient = x.double() / scale.double()
    steady = [oracle.rounded(quotient * (1 + by * oracle.TIE_MARGIN / 2)) for by in (-1, 1)]
    on_a_tie = steady[0].nan_to_num(7).ne(steady[1].nan_to_num(7))
    if request.scale_mode == "amax" and "division" not in said:
        assert not on_a_tie.any()  # any arithmetic that is right to a few units gives these codes
    elif {"ties", "division"} & set(said):
        assert on_a_tie.float().mean() > 0.001
    assert values.isnan().any() == bool({"nan", "inf"} & set(said) or ("given" in said and "row" in said))
    assert values.isinf().any() == ("overflow" in said)
    assert (values[x != 0] == 0).any() == bool({"wide", "tiny"} & set(said))
    if "tiny" in said:
        assert 0 < oracle.amax_of(x, "tensor") < 1e-12
    if "huge" in said:
        assert oracle.amax_of(x, "tensor") > 1e38


@pytest.mark.parametrize(("contract", "case"), cases("quantized_linear"))
def test_inputs_of_quantized_linear(contract, case):
    request, said, inputs = case.request, words(case), contract.inputs(case)
    tokens, features, inner = request.shape
    assert inputs["x"].shape == (*case.options["tokens"], inner) and math.prod(case.options["tokens"]) == tokens
    assert inputs["weight"].shape == (features, inner)
    assert inputs["x"].dtype == request.dtype == DTYPES[said[0]]
    assert (inputs["bias"] is not None) == request.bias
    assert ("grad_out" in inputs) == request.backward == ("backward" in said)
    assert ("weight_scale" in inputs) == bool({"stored", "carried", "scale0", "scaleinf", "scalenan"} & set(said))
    assert (inputs["weight"].dtype == torch.float8_e4m3fn) == request.carried == ("carried" in said)
    assert case.exact == ("exact" in said)
    if case.exact:
        found = contract.oracle(inputs)
        for name, value in found.items():
            assert value.equal(value.round()) and value.abs().max() < 2**24, name
        for name, scale_max in (("x", 15.0), ("weight", 15.0), ("grad_out", 224.0)):
            assert oracle.amax_of(inputs[name], "tensor").item() == scale_max


# ---- the oracle of the linear layer


def by_division(case):
    """Whether scales are amax / scale_max of something, which the test can compute by itself."""
    usual = case.options.get("stored", True) is True and case.options["recipe"].scale_mode == "amax"
    return usual and math.prod(case.request.shape) > 0


@pytest.mark.parametrize(("contract", "case"), [p for p in cases("quantized_linear") if by_division(p.values[1])])
def test_the_linear_oracle_is_a_composition_of_the_library_and_pytorch(contract, case):
    inputs = contract.inputs(case)
    recipe = inputs["recipe"]
    dim = {"tensor": (), "row": -1}[recipe.granularity]

    def dequantized(x, scale_max):
        amax = x.float().abs().amax(dim, keepdim=bool(x.ndim)) if dim else x.float().abs().amax()
        scale = amax / np.float32(scale_max)
        wide = x.double() if x.dtype == torch.float64 else x.float()
        return values_by_library(codes_by_library((wide / scale).contiguous())) * scale.double()

    x = dequantized(inputs["x"], recipe.scale_max).requires_grad_()
    if case.request.carried:
        amax = inputs["x"].float().abs().amax(dim, keepdim=True) if dim else inputs["x"].float().abs().amax()
        unit = (amax / np.float32(recipe.scale_max)).double() / 2 ** shift_for(recipe.scale_max)
        x = (x.detach() / unit).to(torch.float8_e4m3fn).double() * unit
        weight = inputs["weight"].double() * inputs["weight_scale"].double()
    elif "weight_scale" in inputs:
        weight = values_by_library(inputs["weight"]) * inputs["weight_scale"].double()
    else:
        weight = dequantized(inputs["weight"], recipe.scale_max).requires_grad_()
    bias = None if inputs["bias"] is None else inputs["bias"].double()
    found = contract.oracle(inputs)
    out = F.linear(x, weight, bias)
    torch.testing.assert_close(found["out"], out.detach(), rtol=1e-12, atol=1e-13)
    if "grad_out" in inputs:
        grad = dequantized(inputs["grad_out"], recipe.grad_scale_max)
        leaves = [x, weight] if weight.requires_grad else [x]
        for name, expected in zip(("dx", "dweight"), torch.autograd.grad(out, leaves, grad), strict=False):
            torch.testing.assert_close(found[name], expected, rtol=1e-12, atol=1e-13 * expected.abs().max().item())
        if bias is not None:
            summed = inputs["grad_out"].double() if recipe.bias_grad == "raw" else grad
            torch.testing.assert_close(found["dbias"], summed.flatten(0, -2).sum(0), rtol=1e-10, atol=1e-17)


# ---- quantized attention: what the judge must refuse

ATTENTION = CONTRACTS["quantized_attention"]
BACKWARD = next(c for c in ATTENTION.cases() if c.id.endswith("/fp32-backward"))


def attention_verdicts(monkeypatch, function):
    """The names of results that are wrong when `function` stands for quantized attention."""
    inputs = ATTENTION.inputs(BACKWARD)
    monkeypatch.setattr(ops, "quantized_attention", function)
    verdicts = ATTENTION.expect(inputs).judge(ATTENTION.call(inputs, lambda f: f))
    return {name for name, verdict in verdicts.items() if not verdict.ok}


def composed(q, k, v, *, recipe, trips="qkv", grad_scale_max=224.0, **settings):
    through = {
        name: ops.hif8_fake_quantize(t, grad_scale_max=grad_scale_max, **settings) if name in trips else t
        for name, t in zip("qkv", (q, k, v), strict=True)
    }
    return ops.attention(*through.values())


def test_attention_by_hand_passes(monkeypatch):
    assert attention_verdicts(monkeypatch, composed) == set()


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"trips": "qk"}, {"out", "dq", "dk", "dv"}),
        ({"trips": "kv"}, {"out", "dq", "dk", "dv"}),
        ({"grad_scale_max": None}, {"dq", "dk", "dv"}),
        ({"grad_scale_max": 15.0}, {"dq", "dk", "dv"}),
        ({"granularity": "row"}, {"out", "dq", "dk", "dv"}),
        ({"scale_max": 224.0}, {"out", "dq", "dk", "dv"}),
    ],
)
def test_attention_that_quantizes_otherwise_is_found(monkeypatch, changes, wrong):
    def function(q, k, v, *, recipe):
        return composed(q, k, v, recipe=recipe, **changes)

    assert attention_verdicts(monkeypatch, function) == wrong


def test_attention_without_any_quantization_is_far_from_the_oracle():
    inputs = ATTENTION.inputs(BACKWARD)
    expected = ATTENTION.expect(inputs)
    plain = attention_oracle.oracle({k: v for k, v in inputs.items() if k != "recipe"})
    found = {name: plain[name].float() for name in expected.oracle}
    assert not any(verdict.ok for verdict in expected.judge(found).values())


# ---- the judge


def test_codes_must_agree_and_be_codes():
    codes = torch.tensor([0, 0x80, 0x6F], dtype=torch.uint8)
    assert judge_exact(codes.clone(), codes).ok
    assert not judge_exact(codes ^ 1, codes).ok
    with pytest.raises(ValueError, match="uint8"):
        judge_exact(codes.int(), codes)


def test_nan_must_be_where_the_oracle_has_it():
    expected = torch.tensor([1.0, math.nan, math.inf], dtype=torch.float64)
    assert judge_exact(expected.float(), expected).ok
    for at, value in ((1, 0.5), (1, math.inf), (0, math.nan), (2, math.nan), (2, -math.inf)):
        wrong = expected.float()
        wrong[at] = value
        assert not judge_exact(wrong, expected).ok


def test_an_interval_takes_what_lies_inside_and_a_rounding_more():
    low, high = torch.tensor([1.0, -4.0], dtype=torch.float64), torch.tensor([2.0, -4.0], dtype=torch.float64)
    interval = Interval(low, high)
    for value, ok in (([1.0, -4.0], True), ([2.0, -4.0], True), ([2.01, -4.0], False), ([1.5, -4.01], False)):
        assert judge_interval(torch.tensor(value), interval, torch.float32).ok == ok
    assert not judge_interval(torch.tensor([math.nan, -4.0]), interval, torch.float32).ok
    for wrong in (torch.ones(3), torch.ones(2).double()):
        with pytest.raises(ValueError, match="the contract asks for"):
            judge_interval(wrong, interval, torch.float32)


def test_every_setting_of_a_recipe_reaches_some_case():
    recipes = [c.options["recipe"] for n in ("quantized_linear", "native_attention") for c in CONTRACTS[n].cases()]
    for field in dataclasses.fields(HiF8Recipe):
        assert len({getattr(recipe, field.name) for recipe in recipes}) > 1, field.name

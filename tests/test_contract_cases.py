"""Every case of every contract on the reference backend, and the oracles against functions that nobody here wrote."""

from __future__ import annotations

import functools
import hashlib
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ospnext import ops
from ospnext.ops.contract import UNIT_ROUNDOFF, factor_of, judge
from ospnext.ops.contracts import CONTRACTS
from ospnext.ops.policy import COMPOSITE, Policy
from ospnext.ops.registry import registry
from ospnext.ops.select import select

CASES = {case.id: (contract, case) for contract in CONTRACTS.values() for case in contract.cases()}

#: Number of cases and a digest of their sorted ids. Must-pass lists name ids: one that goes or changes is a break.
PINNED = {
    "attention": (82, "18b653677466d7dd"),
    "fused.rms_norm": (4, "aea1c516694b7f9c"),
    "fused.layer_norm_modulate": (16, "7a4325d453054a02"),
    "fused.rope": (4, "fa20378b25571e69"),
    "fused.gate_residual": (16, "99c1338d0e3b6087"),
    "fused.gelu_tanh": (4, "2cdd50cb2447bac2"),
}


def accepted() -> list[tuple[str, str]]:
    """(case, implementation) for every implementation of the reference backend that takes the case."""
    pairs = []
    for name, (contract, case) in CASES.items():
        offers = [i.id for i in registry().manifests["reference"].offers(contract.name)]
        for identifier in offers or [COMPOSITE]:
            policy = Policy("reference", ops=((contract.name, identifier),))
            if select(contract, case.request, policy, registry()).chosen:
                pairs.append((name, identifier))
    return pairs


@functools.lru_cache(maxsize=4)
def expected(name: str):
    contract, case = CASES[name]
    inputs = contract.inputs(case)
    return contract.oracle(inputs), contract.yardstick(inputs)


def test_case_ids_are_unique_and_pinned():
    found = {}
    for contract in CONTRACTS.values():
        ids = sorted(case.id for case in contract.cases())
        assert len(set(ids)) == len(ids)
        assert all(i.startswith(f"{contract.name}/") for i in ids)
        found[contract.name] = (len(ids), hashlib.sha256("\n".join(ids).encode()).hexdigest()[:16])
    assert found == PINNED


def test_every_case_has_an_implementation_and_the_formula_takes_them_all():
    pairs = accepted()
    assert {name for name, _ in pairs} == set(CASES)
    attention = {name for name in CASES if name.startswith("attention/")}
    assert {name for name, identifier in pairs if identifier == "reference.math"} == attention
    unmasked = {name for name in attention if not CASES[name][1].request.key_mask}
    assert {name for name, identifier in pairs if identifier == "reference.sdpa"} == unmasked


@pytest.mark.parametrize(("name", "identifier"), accepted(), ids=map("-".join, accepted()))
def test_case(name, identifier):
    contract, case = CASES[name]
    inputs, untouched = contract.inputs(case), contract.inputs(case)
    oracle, yardstick = expected(name)
    with ops.use_backend("reference", ops={contract.name: identifier}):
        actual = contract.call(**inputs)
    assert actual.keys() == oracle.keys() == yardstick.keys()
    for key, value in actual.items():
        verdict = judge(value, oracle[key], yardstick[key], factor_of(key))
        assert verdict.ok, f"{key}: {verdict.ratio:.2f} times its bound, {verdict}"
        assert value.is_contiguous() or key != "out"
    for key, value in untouched.items():
        tensor = isinstance(value, torch.Tensor)
        same = torch.equal(_bits(inputs[key]), _bits(value)) if tensor else inputs[key] == value
        assert same, f"{key} was written to"


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def test_the_inputs_of_a_case_hold_what_its_name_says():
    for name, (contract, case) in CASES.items():
        inputs = contract.inputs(case)
        assert ("grad_out" in inputs) == case.request.backward == ("backward" in name)
        if contract.name == "attention":
            assert ("key_mask" in inputs) == ("mask" in name)
            assert ("scale" in inputs) == ("scale" in name)
            assert inputs["return_lse"] == ("lse" in name)
            if "key_mask" in inputs:
                assert not inputs["key_mask"][0].any()  # a sample without any key
                assert len(inputs["key_mask"]) == 1 or 0 < inputs["key_mask"][1:].float().mean() < 1
        for feature in case.options.get("features", ()):
            operand = {"affine": "weight", "modulated": "shift", "gated": "gate", "permuted": "permutation"}[feature]
            assert inputs[operand] is not None
        if inputs.get("permutation") is not None:
            order = inputs["permutation"]
            assert order.sort().values.equal(torch.arange(len(order)))
            assert not order[order].equal(torch.arange(len(order)))  # its own inverse would hide a wrong direction


# ---- the oracles


def agree(found, wanted, tolerance=1e-12):
    """Relative to the largest value: both sides are fp64, in different orders of summation."""
    scale = max(1.0, wanted[torch.isfinite(wanted)].abs().max().item() if wanted.numel() else 1.0)
    torch.testing.assert_close(found, wanted.to(found.dtype), rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("name", [n for n in CASES if n.startswith("attention/") and "fp32" in n and "1023" not in n])
def test_the_attention_oracle_is_scaled_dot_product_attention(name):
    contract, case = CASES[name]
    inputs = contract.inputs(case)
    oracle = contract.oracle(inputs)
    leaves = [inputs[key].double().requires_grad_() for key in ("q", "k", "v")]
    starts = [(None, None)]
    if case.request.packed:
        starts = list(zip(*(_spans(inputs, s) for s in ("q", "kv")), strict=True))
    outs, lses = [], []
    for rows, keys in starts:
        q, k, v = (t if rows is None else t[None, s] for t, s in zip(leaves, (rows, keys, keys), strict=True))
        mask = inputs["key_mask"][:, None, None].expand(-1, -1, q.shape[1], -1) if case.request.key_mask else None
        with sdpa_kernel(SDPBackend.MATH):
            out = F.scaled_dot_product_attention(
                *(t.transpose(1, 2) for t in (q, k, v)), attn_mask=mask, scale=inputs.get("scale")
            ).transpose(1, 2)
        logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * inputs.get("scale", q.shape[-1] ** -0.5)
        logits = logits if mask is None else logits.masked_fill(~mask, -math.inf)
        lse = logits.exp().sum(-1).log()
        outs.append(out if rows is None else out[0])
        lses.append(lse if rows is None else lse[0])
    out = torch.cat(outs)
    agree(oracle["out"], out)
    if case.request.logsumexp:
        agree(oracle["lse"], torch.cat(lses, dim=-1 if case.request.packed else 0))
    if case.request.backward:
        grads = torch.autograd.grad(out, leaves, inputs["grad_out"].double())
        for key, grad in zip(("dq", "dk", "dv"), grads, strict=True):
            agree(oracle[key], grad.nan_to_num(0.0))  # PyTorch's formula divides 0 by 0 where there is no key


def _spans(inputs, side):
    ends = inputs[f"cu_seqlens_{side}"].tolist()
    return [slice(a, b) for a, b in itertools.pairwise(ends)]


def _rotation(x, cos, sin):
    matrix_NP22 = torch.stack((torch.stack((cos, -sin), -1), torch.stack((sin, cos), -1)), -2)
    return torch.einsum("npij,bnhpj->bnhpi", matrix_NP22, x.unflatten(-1, (-1, 2))).flatten(-2)


def _layer_norm(x, weight, bias, shift, scale, eps):
    normed = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return normed if scale is None else torch.addcmul(shift[:, None], normed, 1 + scale[:, None])


def _gate(x, y, gate, permutation):
    z = x + y if gate is None else torch.addcmul(x, y, gate[:, None])
    return z if permutation is None else torch.einsum("nm,bmc->bnc", F.one_hot(permutation).to(z), z)


INDEPENDENT = {
    "fused.rms_norm": lambda x, weight, eps: F.rms_norm(x, x.shape[-1:], weight, eps),
    "fused.layer_norm_modulate": _layer_norm,
    "fused.rope": _rotation,
    "fused.gate_residual": _gate,
    "fused.gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@pytest.mark.parametrize("name", [n for n in CASES if n.startswith("fused.") and "fp32" in n])
def test_the_fused_oracles_are_the_functions_of_pytorch(name):
    contract, case = CASES[name]
    inputs = contract.inputs(case)
    oracle = contract.oracle(inputs)
    grad_out = inputs.pop("grad_out", None)
    named = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    leaves = {k: named[k].requires_grad_() for k in named if f"d{k}" in oracle}
    out = INDEPENDENT[contract.name](**named)
    agree(oracle["out"], out)
    assert bool(leaves) == case.request.backward
    if leaves:
        grads = torch.autograd.grad(out, list(leaves.values()), grad_out.double())
        for key, grad in zip(leaves, grads, strict=True):
            agree(oracle[f"d{key}"], grad)


# ---- the judge


def test_the_judge_accepts_plain_rounding_and_refuses_a_few_units_more():
    torch.manual_seed(0)
    oracle = torch.randn(1000, dtype=torch.float64)
    for dtype, unit in UNIT_ROUNDOFF.items():
        rounded = oracle.to(dtype)
        assert judge(rounded, oracle, rounded).ok
        worse = rounded.clone()
        worse[7] += 16 * unit * oracle.abs().max()
        assert not judge(worse, oracle, rounded).ok
        assert not judge((oracle * (1 + 16 * unit)).to(dtype), oracle, rounded).ok


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_the_judge_refuses_what_is_not_finite_and_infinities_must_match(wrong):
    oracle = torch.ones(4, dtype=torch.float64)
    actual = torch.ones(4)
    actual[2] = wrong
    assert judge(actual, oracle, torch.ones(4)).ratio == math.inf
    oracle[0], actual[2] = -math.inf, 1.0
    assert not judge(actual, oracle, torch.ones(4)).ok
    actual[0] = -math.inf
    assert judge(actual, oracle, torch.ones(4)).ok


def test_the_judge_refuses_another_shape_or_dtype_and_a_yardstick_that_bounds_nothing():
    ones = torch.ones(4)
    with pytest.raises(ValueError, match=r"shape \(4, 1\)"):
        judge(ones[:, None], ones.double(), ones)
    with pytest.raises(ValueError, match="bfloat16"):  # its unit roundoff would allow 2^16 times the error
        judge(ones.bfloat16(), ones.double(), ones)
    with pytest.raises(ValueError, match="yardstick"):
        judge(ones, ones.double(), torch.full((4,), math.inf))


def test_zero_must_be_exactly_zero():
    zero = torch.zeros(4)
    assert judge(zero, zero.double(), zero).ok
    assert not judge(zero + 1e-30, zero.double(), zero).ok

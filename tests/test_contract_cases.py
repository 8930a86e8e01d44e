"""What the conformance suite takes for granted: its list of ids, the inputs of its cases, its oracles and its judge.

The suite itself runs the cases."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ospnext.conformance import matrix, release
from ospnext.ops.contracts import CONTRACTS
from ospnext.ops.contracts.attention import DTYPES, VIDEO, needle_positions
from ospnext.ops.tolerance import UNIT_ROUNDOFF, judge, judge_exact

#: Cases by id. Those of the collective contract are inputs of several ranks; tests/test_collective.py has them.
CASES = {
    case.id: (contract, case)
    for contract in CONTRACTS.values()
    if contract.family != "collective"
    for case in contract.cases()
}
ATTENTION = [name for name in CASES if name.startswith("attention/")]
#: Those that end in quantization have tests of their own, test_fused_quantize.py.
FUSED = [name for name, (contract, _) in CASES.items() if contract.family == "fused" and contract.composite.backward]
OPERANDS = {"affine": "weight", "modulated": "shift", "gated": "gate", "permuted": "permutation"}


def test_ids_are_unique_and_are_the_must_pass_list():
    """Reports and waivers name ids: one that goes, or changes what it means, is a break."""
    checks = matrix.all_checks()
    ids = [check.id for check in checks]
    assert len(set(ids)) == len(ids)
    assert [check.id for check in checks if check.id.split("/")[1] != check.level] == []
    listed = [line for line in release.MUST_PASS.read_text().splitlines() if not line.startswith("#")]
    assert ids == listed, (
        f"the checks are not those of {release.MUST_PASS}. If that is meant, put the output of\n"
        "    ospnext conformance list --level required,optional\n"
        f"below its comments. Only listed: {sorted(set(listed) - set(ids))}; "
        f"not listed: {sorted(set(ids) - set(listed))}"
    )
    for level in ("required", "optional"):
        assert release.must_pass(level) == [check.id for check in checks if check.level == level]


def words(name: str) -> list[str]:
    return name.rpartition("/")[2].split("-")


# ---- the inputs of a case hold what its name says


@pytest.mark.parametrize("name", ATTENTION)
def test_inputs_of_attention(name):
    contract, case = CASES[name]
    request, said = case.request, words(name)
    inputs = contract.inputs(case)
    assert request.dtype == DTYPES[next(word for word in said if word in DTYPES)]
    assert {inputs[key].dtype for key in ("q", "k", "v")} == {request.dtype}
    assert ("grad_out" in inputs) == request.backward == ("backward" in said)
    assert ("key_mask" in inputs) == request.key_mask == ("mask" in said)
    assert ("scale" in inputs) == request.custom_scale == bool({"scale", "zeroscale"} & set(said))
    assert inputs["return_lse"] == request.logsumexp == ("lse" in said)
    assert ("cu_seqlens_q" in inputs) == request.packed == ("packed" in said)
    assert request.deterministic == ("deterministic" in said)
    assert case.exact == ("exact" in said)
    if request.packed:
        lengths = {side: inputs[f"cu_seqlens_{side}"].diff() for side in ("q", "kv")}
        assert ("empty" in said) == any((each == 0).any() for each in lengths.values())
        assert [each.max() for each in lengths.values()] == [request.q_len, request.kv_len]
    else:
        assert (f"b{request.batch}" in said, f"q{request.q_len}" in said, f"k{request.kv_len}" in said) == (True,) * 3
        assert inputs["q"].shape == (request.batch, request.q_len, request.heads, request.head_dim)
    if request.key_mask:
        assert not inputs["key_mask"][0].any()  # a sample without any key
        assert 0 < inputs["key_mask"][1:].float().mean() < 1  # and one with some, so that the mask matters
    if "rows" in case.options:
        assert len(inputs["rows"].unique()) == case.options["rows"]
        assert (inputs["rows"][0], inputs["rows"][-1]) == (0, request.q_len - 1)
    kind = case.options.get("kind")
    assert kind == next((word for word in said if word in KINDS), None)
    if kind != "nan":
        assert all(t.isfinite().all() for key, t in inputs.items() if key in ("q", "k", "v"))
    if kind:
        KINDS[kind](case, inputs)


def _needle(case, inputs):
    q, k = (inputs[key][0].double() for key in ("q", "k"))
    positions = needle_positions(len(k))
    found = torch.einsum("qhd,khd->hqk", q, k).argmax(-1)
    assert all(row.tolist() == positions for row in found)
    assert {0, 1, len(k) - 64, *range(len(k) - 16, len(k))} <= set(positions)


def _shifted(case, inputs):
    q, k = inputs["q"][..., 0].double(), inputs["k"][..., 0].double()
    assert (q.unique() * k.unique() * case.request.head_dim**-0.5).tolist() == [-120.0]


def _large(case, inputs):
    logits = torch.einsum("bqhd,bkhd->bhqk", inputs["q"].double(), inputs["k"].double()) * case.request.head_dim**-0.5
    assert logits.max() > 100 and logits.min() < -100  # exp in fp32 overflows at 89
    assert inputs["v"].abs().amax((0, 1, 2)).argmax() == 5


def _exact(case, inputs):
    assert inputs["k"].abs().eq(1).all()
    for value in CASES[case.id][0].oracle(inputs).values():
        rounded = value.to(case.request.dtype).double()
        assert rounded.round().equal(rounded)  # small integers, which any order of summation gives
        assert (rounded - value).abs().max() < 1e-12


def _nan(case, inputs):
    masked = ~inputs["key_mask"]
    assert inputs["k"].isnan().all((-1, -2)).equal(masked) and inputs["k"].isnan().any(-1).any(-1).equal(masked)
    assert inputs["v"].isinf().all((-1, -2)).equal(masked) and inputs["v"].isinf().any(-1).any(-1).equal(masked)


@pytest.mark.parametrize("kv_len", [1023, VIDEO])
def test_needles_lie_in_every_tile_of_keys(kv_len):
    assert {position // 128 for position in needle_positions(kv_len)} == set(range(math.ceil(kv_len / 128)))


KINDS = {"needle": _needle, "shifted": _shifted, "large": _large, "exact": _exact, "nan": _nan}


@pytest.mark.parametrize("name", FUSED)
def test_inputs_of_fused(name):
    contract, case = CASES[name]
    request, said = case.request, words(name)
    inputs = contract.inputs(case)
    x = inputs["x"]
    assert x.dtype == request.dtype == DTYPES[next(word for word in said if word in DTYPES)]
    assert tuple(x.shape) == request.shape
    assert ("grad_out" in inputs) == request.backward == ("backward" in said)
    for feature, operand in OPERANDS.items():
        assert getattr(request, feature) == (feature in said)
        if operand in inputs and not contract.name.startswith("fused.rms_norm"):  # which always has a weight
            assert (inputs[operand] is not None) == (feature in said)
    assert (x.shape[1] == 75_600) == ("n75600" in said)
    assert (x.shape[2:].numel() == 5120) == ("c5120" in said)
    if "norm" in contract.name:
        assert (x.double().var() < 4 * inputs["eps"]) == ("small" in said)  # only then does eps count
    if inputs.get("permutation") is not None:
        order = inputs["permutation"]
        assert order.sort().values.equal(torch.arange(len(order)))
        assert not order[order].equal(torch.arange(len(order)))  # its own inverse would hide a wrong direction


# ---- the oracles


def agree(found, wanted, tolerance=1e-12):
    """Relative to the largest value: both sides are fp64, in different orders of summation."""
    scale = max(1.0, wanted[torch.isfinite(wanted)].abs().max().item() if wanted.numel() else 1.0)
    torch.testing.assert_close(found, wanted.to(found.dtype), rtol=0, atol=tolerance * scale)


def short(dtype: torch.dtype):
    return [n for n in ATTENTION if CASES[n][1].request.dtype == dtype and CASES[n][1].request.kv_len <= 2000]


@pytest.mark.parametrize("name", [*short(torch.float32), *short(torch.float64)])
def test_the_attention_oracle_is_scaled_dot_product_attention(name):
    contract, case = CASES[name]
    inputs = contract.inputs(case)
    oracle = contract.oracle(inputs)
    if case.options.get("kind") == "nan":  # PyTorch multiplies masked values by zero; the contract never reads them
        for key in ("k", "v"):
            inputs[key] = inputs[key].where(inputs["key_mask"][..., None, None], 0.0)
        inputs["q"] = inputs["q"].where(inputs["key_mask"].any(1)[:, None, None, None], 0.0)
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
        lse = logits.logsumexp(-1)
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
    "fused.rms_norm_rope": lambda x, weight, cos, sin, eps: _rotation(
        F.rms_norm(x, x.shape[-1:], weight, eps).unflatten(-1, (-1, 2 * cos.shape[1])), cos, sin
    ),
    "fused.gate_residual": _gate,
    "fused.gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@pytest.mark.parametrize("name", [n for n in FUSED if "fp32" in n or "c5120" in n])
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


def test_an_exact_result_may_not_differ_by_one_unit():
    oracle = torch.tensor([1.0, -3.0, 0.0, -math.inf], dtype=torch.float64)
    for dtype, unit in UNIT_ROUNDOFF.items():
        exact = oracle.to(dtype)
        assert judge_exact(exact, oracle).ratio == 0.0
        assert judge_exact(exact * torch.tensor([1, 1, -1, 1], dtype=dtype), oracle).ok  # -0 is 0
        worse = exact.clone()
        worse[0] += 2 * unit
        assert judge_exact(worse, oracle).ratio == math.inf
        for place, wrong in ((0, math.nan), (3, 0.0)):
            worse = exact.clone()
            worse[place] = wrong
            assert not judge_exact(worse, oracle).ok
    with pytest.raises(ValueError, match="shape"):
        judge_exact(exact[None], oracle)
    assert judge_exact(torch.ones(0), torch.ones(0, dtype=torch.float64)).ok

"""The fused operators that end in quantization, and rms_norm_rope: what the functions return and refuse, which kernel
they call, and whether the intervals that judge codes hold what is right and little else."""

from __future__ import annotations

import dataclasses
import itertools

import fake_backends as fake
import pytest
import torch

from ospnext import ops
from ospnext.backends.reference import MANIFEST as REFERENCE
from ospnext.conformance.matrix import all_checks
from ospnext.conformance.runner import plan, run_step
from ospnext.errors import UnsupportedRequestError
from ospnext.numerics import carrier
from ospnext.ops.contracts import CONTRACTS, fused_quantize
from ospnext.ops.contracts import quantize_oracle as oracle
from ospnext.ops.policy import use_registry
from ospnext.ops.registry import Registry
from ospnext.ops.tolerance import Interval, judge_interval

OPS = torch.ops.ospnext
NAMES = [contract.name.removeprefix("fused.") for contract in fused_quantize.CONTRACTS]
CASES = [
    pytest.param(contract, case, id=case.id)
    for contract in fused_quantize.CONTRACTS
    for case in contract.cases()
    if not case.costly
]
FORMS = [
    {},
    {"carried": True},
    {"scale_mode": "pow2"},
    {"scale_max": 224.0, "carried": True},
    {"granularity": "tensor", "carried": True},
]


@pytest.fixture
def reference():
    with ops.use_backend("reference"):
        yield


@pytest.fixture
def kernels():
    """A backend with a kernel for both operators, and what it needs besides."""
    made = [
        fake.kernel(f"acme.{name}", name, f"fused.{name}", handles=frozenset({"affine", "modulated", "carried"}))
        for name in NAMES
    ]
    (quantizer,) = REFERENCE.offers("hif8_quantize")
    manifest = fake.backend("acme", *made, dataclasses.replace(quantizer, id="acme.hif8"))
    with use_registry(Registry([manifest])), ops.use_backend("acme"):
        fake.calls.clear()
        yield


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def operands(name, dtype=torch.float32):
    """x, and whatever else the operator takes, with every optional operand."""
    x = randn(2, 5, 48, dtype=dtype) + 1
    if name == "gelu_tanh_quantize":
        return (x,)
    return x, *(randn(48, seed=s, dtype=dtype) for s in (1, 2)), *(randn(2, 48, seed=s, dtype=dtype) for s in (3, 4))


def plainly(name, *arguments):
    return getattr(ops, name.removesuffix("_quantize"))(*arguments)


# ---- the functions


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", NAMES)
def test_they_are_the_plain_operator_and_the_quantizer(name, dtype, form, reference):
    given, form = operands(name, dtype), {"granularity": "row"} | form
    codes, scale = found = getattr(ops, name)(*given, **form)
    assert isinstance(found, ops.Quantized)
    assert codes.dtype == (torch.float8_e4m3fn if form.get("carried") else torch.uint8)
    assert (codes.shape, scale.dtype) == ((2, 5, 48), torch.float32)
    assert scale.shape == ((2, 5, 1) if form["granularity"] == "row" else (1, 1, 1))
    wanted = ops.hif8_quantize(plainly(name, *given), **form)
    assert codes.view(torch.uint8).equal(wanted.codes.view(torch.uint8)) and scale.equal(wanted.scale)


def test_without_optional_operands_and_for_any_rank(reference):
    x = randn(2, 5, 48)
    wanted = ops.hif8_quantize(ops.layer_norm_modulate(x), granularity="row")
    assert ops.layer_norm_modulate_quantize(x).codes.equal(wanted.codes)
    assert ops.gelu_tanh_quantize(x[0, 0]).scale.shape == (1,)


@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_is_refused_where_one_is_asked_for(name, reference):
    given = operands(name)
    for at in range(len(given)):
        leaves = [t.clone().requires_grad_(i == at) for i, t in enumerate(given)]
        with pytest.raises(RuntimeError, match=rf"{name} has no gradient.*torch\.no_grad"):
            getattr(ops, name)(*leaves)
        for mode in (torch.no_grad(), torch.inference_mode()):
            with mode:
                assert not getattr(ops, name)(*leaves).scale.requires_grad


@pytest.mark.parametrize("declared", [False, True])
@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"scale_mode": "max"}, "scale_mode is one of amax, pow2"),
        ({"scale_max": 1e9}, "scale_max must lie between"),
        ({"scale_max": 512.0, "carried": True}, "carried codes are at most 448"),
    ],
)
def test_settings_are_checked_with_and_without_a_kernel(declared, form, message, request):
    request.getfixturevalue("kernels" if declared else "reference")
    for name in NAMES:
        with pytest.raises(ValueError, match=message):
            getattr(ops, name)(*operands(name), **form)


def test_operands_are_checked_before_a_kernel_sees_them(kernels):
    x, weight, bias, shift, scale = operands("layer_norm_modulate_quantize")
    with pytest.raises(ValueError, match=r"shift must have shape \(2, 48\) for x \(2, 5, 48\), got \(2, 47\)"):
        ops.layer_norm_modulate_quantize(x, weight, bias, shift[:, 1:], scale)
    with pytest.raises(ValueError, match="both of weight and bias or neither"):
        ops.layer_norm_modulate_quantize(x, weight)
    assert [call for call in fake.calls if call.endswith("forward")] == []


# ---- definition or kernel


def test_a_declared_kernel_is_called_with_every_argument(kernels):
    for name in NAMES:
        given = operands(name)
        codes, scale = getattr(ops, name)(*given, carried=True)
        wanted = ops.hif8_quantize(plainly(name, *given), granularity="row", carried=True)
        assert codes.float().equal(wanted.codes.float()) and scale.equal(wanted.scale)
    assert [call for call in fake.calls if call.endswith("forward")] == [f"{name} forward" for name in NAMES]


def test_a_feature_that_the_kernel_does_not_list_is_refused(kernels):
    for form in ({"scale_mode": "pow2"}, {"scale_max": 224.0}):
        (name, value), *_ = form.items()
        with pytest.raises(UnsupportedRequestError, match=f"{name}: got {value}"):
            ops.gelu_tanh_quantize(randn(2, 5, 48), **form)
    with ops.use_backend(fallback={"fused"}):
        assert ops.gelu_tanh_quantize(randn(2, 5, 48), scale_mode="pow2").codes.shape == (2, 5, 48)


@pytest.mark.parametrize("declared", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_they_compile_in_one_graph(name, declared, request):
    request.getfixturevalue("kernels" if declared else "reference")
    given = operands(name)

    def function(*arguments):
        codes, scale = getattr(ops, name)(*(2 * a for a in arguments), carried=True)
        return codes.view(torch.uint8), scale * 3

    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*given)
        for found, wanted in zip(compiled, function(*given), strict=True):
            assert found.equal(wanted)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, form, reference):
    settings = {"scale_max": 15.0, "scale_mode": "amax", "granularity": "row", "carried": False} | form
    given = operands(name) + ((1e-6,) if name != "gelu_tanh_quantize" else ())
    torch.library.opcheck(getattr(OPS, name).default, (*given, *settings.values()))


# ---- rms_norm_rope


def rotation(tokens=5, head_dim=16):
    angles = randn(tokens, head_dim // 2, seed=9)
    return angles.cos(), angles.sin()


def test_rms_norm_rope_is_both_with_one_rounding(reference):
    x, weight, (cos, sin) = randn(2, 5, 48), randn(48, seed=1), rotation()
    exact = ops.rope(ops.rms_norm(x.double(), weight.double()).unflatten(-1, (3, 16)), cos, sin)
    torch.testing.assert_close(ops.rms_norm_rope(x.double(), weight.double(), cos, sin), exact)
    narrow = x.bfloat16(), weight.bfloat16()
    exact = ops.rms_norm_rope(*(t.double() for t in narrow), cos, sin)
    once = ops.rms_norm_rope(*narrow, cos, sin)
    twice = ops.rope(ops.rms_norm(*narrow).unflatten(-1, (3, 16)), cos, sin)
    assert once.dtype == torch.bfloat16 and once.is_contiguous()
    assert once.equal(exact.float().bfloat16())
    assert not twice.equal(once)


@pytest.mark.parametrize("pairs", [5, 0, 32])
@pytest.mark.parametrize("declared", [False, True])
def test_rms_norm_rope_names_channels_that_are_no_heads(pairs, declared):
    x, weight, angles = randn(2, 5, 48), randn(48, seed=1), randn(5, pairs)
    manifest = fake.fused_backend("acme") if declared else REFERENCE
    message = rf"multiple of the head dimension.*\(2, 5, 48\) and cos \(5, {pairs}\)"
    with use_registry(Registry([manifest])), ops.use_backend(manifest.backend):
        with pytest.raises(ValueError, match=message):
            ops.rms_norm_rope(x, weight, angles, angles)
        with pytest.raises(ValueError if declared else RuntimeError, match="must "):
            ops.rms_norm_rope(x, weight, *(angle[:4] for angle in rotation()))


def test_rms_norm_rope_as_a_kernel_with_gradients():
    x, weight, (cos, sin) = randn(2, 5, 48).requires_grad_(), randn(48, seed=1).requires_grad_(), rotation()
    found = []
    for manifest in (REFERENCE, fake.fused_backend("acme")):
        with use_registry(Registry([manifest])), ops.use_backend(manifest.backend):
            out = ops.rms_norm_rope(x, weight, cos, sin)
            found.append([out, *torch.autograd.grad(out.square().sum(), (x, weight))])
    for plain, declared in zip(*found, strict=True):
        torch.testing.assert_close(declared, plain, rtol=1e-5, atol=1e-5)


# ---- the inputs of a case hold what its name says


@pytest.mark.parametrize(("contract", "case"), CASES)
def test_inputs(contract, case):
    request, said, inputs = case.request, case.id.rpartition("/")[2].split("-"), contract.inputs(case)
    x = inputs["x"]
    assert x.dtype == request.dtype == (torch.float32 if "fp32" in said else torch.bfloat16)
    assert tuple(x.shape) == request.shape and not request.backward
    assert request.carried == inputs["carried"] == ("carried" in said)
    assert request.granularity == inputs["granularity"] == ("tensor" if "tensor" in said else "row")
    assert request.scale_mode == inputs["scale_mode"] == ("pow2" if "pow2" in said else "amax")
    assert request.scale_max == inputs["scale_max"] == (224.0 if "224" in said else 15.0)
    for feature, operand in (("affine", "weight"), ("modulated", "shift")):
        assert getattr(request, feature) == (feature in said) == (inputs.get(operand) is not None)
    rows = torch.isfinite(x).all(-1)
    assert (~rows).sum() == ("nan" in said or "inf" in said)  # one row of many
    assert x.isnan().any() == ("nan" in said)
    assert (x == 0).all(-1).any() == ("zerorow" in said)
    assert (x.shape[-1] in (5120, 13_824)) == bool({"c5120", "c13824"} & set(said))
    y = contract.oracle(inputs)["scale"]
    assert y.low.isnan().equal(~rows[..., None] if request.granularity == "row" else ~rows.all().view(1, 1, 1))


# ---- the judge


def settings_of(inputs):
    return {name: inputs[name] for name in fused_quantize.SETTINGS}


def quantized(y, *, scale_max, scale_mode, granularity, carried):
    """By the numerics of the backends, in fp64: (values of codes, scale)."""
    values, scale = oracle.quantized(y, scale_max, scale_mode, granularity)
    if carried:
        shift = carrier.shift_for(scale_max)
        values, scale = (values * 2.0**shift).float().to(carrier.DTYPE), carrier.carried_scale(scale, shift)
    return {"codes": values.float(), "scale": scale}


def verdicts(intervals, found):
    return {name: judge_interval(found[name], interval, torch.float32) for name, interval in intervals.items()}


@pytest.mark.parametrize(("contract", "case"), CASES)
def test_whatever_lies_within_the_plain_bounds_is_right(contract, case):
    """Not the definition alone: any value that the plain contract would take, its extremes included."""
    inputs = contract.inputs(case)
    plain = CONTRACTS[contract.name.removesuffix("_quantize")]
    given = {k: v for k, v in inputs.items() if k not in fused_quantize.SETTINGS}
    y, usual = plain.oracle(given)["out"], plain.yardstick(given)["out"]
    error = (usual.double() - y).nan_to_num(0).abs().max().item()
    intervals = contract.oracle(inputs)
    generator = torch.Generator().manual_seed(1)
    zero = (y == 0).all(-1, keepdim=True)
    for size in (0.0, 0.3, 2.0):
        noise = torch.randint(-1, 2, y.shape, generator=generator) if size == 2.0 else randn(*y.shape).clamp(-1, 1)
        some = torch.where(zero, 0.0, y + size * error * noise).float()
        wrong = {k: v for k, v in verdicts(intervals, quantized(some, **settings_of(inputs))).items() if not v.ok}
        assert not wrong, size
    assert all(v.ok for v in verdicts(intervals, contract.yardstick(inputs)).values())


@pytest.mark.parametrize(("contract", "case"), [p for p in CASES if "fp32" in p.id])
def test_intervals_of_fp32_hold_little_else(contract, case):
    intervals = contract.oracle(contract.inputs(case))
    codes, scale = intervals["codes"], intervals["scale"]
    usual = torch.isfinite(codes.low)
    usual &= codes.high.abs() > 0.25  # an error relative to the largest value is many steps of a small one
    one = (codes.low == codes.high)[usual]
    assert usual.float().mean() > 0.4 and one.float().mean() > 0.998  # a single code, unless next to a tie
    if "pow2" not in case.id:
        width = (scale.high - scale.low) / scale.low
        assert width[torch.isfinite(width)].max() < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_code_a_wrong_scale_and_a_lost_nan_are_found(name):
    contract = CONTRACTS[f"fused.{name}"]
    case = next(
        p.values[1]
        for p in CASES
        if p.id.startswith(f"fused.{name}/") and p.id.endswith("-nan") and "tensor" not in p.id
    )
    inputs = contract.inputs(case)
    intervals, right = contract.oracle(inputs), contract.yardstick(inputs)
    assert all(v.ok for v in verdicts(intervals, right).values())
    row = (0, 2)  # where the NaN is
    for key, other in itertools.product(right, (1, 2)):
        wrong = {k: v.clone() for k, v in right.items()}
        wrong[key][row if other == 2 else (0, 0)] = 1.0 if other == 2 else torch.nan
        assert {k for k, v in verdicts(intervals, wrong).items() if not v.ok} == {key}
    doubled = {k: v * 2 for k, v in right.items()}
    assert not any(v.ok for v in verdicts(intervals, doubled).values())


def test_an_interval_asks_for_nan_where_its_ends_are_nan():
    low = torch.tensor([1.0, torch.nan, 3.0], dtype=torch.float64)
    interval = Interval(low, low + 1)

    def ok(*values):
        return judge_interval(torch.tensor(values), interval, torch.float32).ok

    assert ok(1.5, torch.nan, 4.0)
    assert not ok(1.5, 2.0, 4.0)
    assert not ok(1.5, torch.inf, 4.0)
    assert not ok(torch.nan, torch.nan, 4.0)
    assert not ok(1.5, torch.nan, 4.1)


# ---- a backend without carried codes


def test_the_definition_is_unsupported_where_a_part_of_it_is():
    """An answer at level optional, in every mode; and no error that a backend would have to waive."""
    (quantizer,) = REFERENCE.offers("hif8_quantize")
    narrower = dataclasses.replace(quantizer, id="acme.hif8", handles=quantizer.handles - {"carried"})
    manifest = fake.backend("acme", narrower)
    of = "fused.gelu_tanh_quantize/optional/bf16-"
    wanted = {f"{of}{words}": "unsupported" for words in ("carried", "carried-opcheck", "carried-compiled")}
    wanted |= {f"{of}plain": "pass", f"{of}224": "pass"}
    checks = [check for check in all_checks() if check.id in wanted]
    with use_registry(Registry([manifest])):
        found = [run_step(step, "acme", torch.device("cpu")) for step in plan(checks, "acme", torch.device("cpu"))]
    assert {result.id: result.status for result in found} == wanted
    reasons = {reason for result in found for reason in result.reasons}
    assert reasons == {"composite: no implementation takes this hif8_quantize request"}

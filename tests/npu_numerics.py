"""Tests of the quantize and fused families of the Ascend backend that need an NPU. test_ascend_numerics.py runs them on
the host NPU; on a machine with the hardware: python -m pytest tests/npu_numerics.py
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch_npu
from broken_ascend_numerics import MUTANTS

from ospnext import ops
from ospnext.backends.ascend import quantized_linear
from ospnext.conformance.matrix import all_checks
from ospnext.conformance.runner import plan, run_step
from ospnext.errors import UnsupportedRequestError
from ospnext.numerics import hif8
from ospnext.ops.contracts import CONTRACTS
from ospnext.ops.policy import use_registry
from ospnext.ops.registry import Registry, registry

NPU = torch.device("npu:0")
CHECKS = {check.id: check for check in all_checks()}
HALF = (torch.bfloat16, torch.float16)

#: Of the device that these tests run on.
GENERATION = registry().probe("ascend").device.capability
needs_hif8 = pytest.mark.skipif(GENERATION != "950", reason=f"{GENERATION} does not compute in HiFloat8; run on a 950")


@pytest.fixture(autouse=True)
def on_the_npu():
    with ops.use_backend("ascend", ops={}, fallback=()):
        yield


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ---- mutants


def results(manifest, ids):
    with use_registry(Registry([manifest])):
        return [run_step(s, manifest.backend, NPU) for s in plan([CHECKS[i] for i in ids], manifest.backend, NPU)]


@needs_hif8
@pytest.mark.parametrize("name", MUTANTS)
def test_the_suite_finds(name):
    mutant = MUTANTS[name]
    for result in results(mutant.manifest, mutant.kills):
        assert result.status == mutant.status, f"{result.id} lets it pass: {result.message}"
        assert mutant.says in result.message, f"{result.id}: {result.message}"
    for result in results(mutant.manifest, mutant.spares):
        assert result.status == "pass", f"{result.id} has nothing to do with it: {result.message}"


def test_every_fault_is_said():
    assert [name for name, mutant in MUTANTS.items() if not mutant.fault or not mutant.kills] == []


# ---- what the suite does not ask


@needs_hif8
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_what_requires_a_gradient_is_quantized(dtype):
    """The vendor's cast raises where its input requires one."""
    x = randn(5, 7, dtype=dtype).to(NPU).requires_grad_()
    wanted = hif8.encode(x.detach().cpu())
    assert ops.hif8_encode(x).cpu().equal(wanted)
    for kernel in ("ascend.quantize", "ascend.cast"):
        with ops.use_backend("ascend", ops={"hif8_quantize": kernel}):
            codes, scale = ops.hif8_quantize(x)
        assert codes.cpu().equal(hif8.encode(x.detach().cpu().float() / scale.cpu()))


@needs_hif8
@pytest.mark.parametrize("shape", [(3, 4, 1), (3, 1, 1), (2, 3, 4, 5), (1, 1)])
def test_a_scale_per_channel_of_batches(shape):
    x = randn(*shape)
    codes, scale = ops.hif8_quantize(x.to(NPU), granularity="channel")
    assert scale.cpu().equal(x.abs().amax(-2, keepdim=True) / torch.tensor(15.0))
    assert codes.cpu().equal(hif8.encode(x / scale.cpu()))


@needs_hif8
def test_an_amax_that_is_too_small_shows():
    x = torch.full((2, 3), 1e6, device=NPU)
    codes, _ = ops.hif8_quantize(x, amax=torch.ones(1, 1, device=NPU))
    assert codes.eq(hif8.INF).all()


@pytest.fixture
def products(monkeypatch):
    """The scales of every call of npu_quant_matmul."""
    seen, honest = [], torch_npu.npu_quant_matmul

    def recorded(x1, x2, scale, *, pertoken_scale, **named):
        seen.append((pertoken_scale, scale))
        return honest(x1, x2, scale, pertoken_scale=pertoken_scale, **named)

    monkeypatch.setattr(torch_npu, "npu_quant_matmul", recorded)
    return seen


@needs_hif8
@pytest.mark.parametrize(("rows", "features"), list(itertools.product((1, 6), (1, 5))))
def test_no_product_of_two_scales_is_left_to_the_operator(products, rows, features):
    x, weight = randn(rows, 4).to(NPU).requires_grad_(), randn(features, 4, seed=1).to(NPU).requires_grad_()
    y = ops.quantized_linear(x, weight)
    y.sum().backward()
    assert len(products) == 3
    for of_rows, of_columns in products:
        one_each = len(of_rows) == len(of_columns) == 1
        assert not one_each or of_rows.item() == of_columns.item() == 1.0
    (x, of_x), (weight, of_weight) = (_on_grid(t.detach().cpu()) for t in (x, weight))
    assert (y.detach().cpu() - x @ weight.T * (of_x * of_weight)).abs().max() <= 2.0**-22 * y.detach().abs().max().cpu()


def _on_grid(x):
    scale = x.abs().max() / 15
    return hif8.round_to_grid(x / scale), scale


def test_codes_of_another_dtype_are_refused():
    with pytest.raises(ValueError, match="codes are uint8"):
        quantized_linear.native.product(
            torch.zeros(2, 2, device=NPU), torch.ones(1), torch.zeros(2, 2, device=NPU), torch.ones(1), torch.float32
        )


@pytest.mark.parametrize("call", [ops.hif8_quantize, ops.gelu_tanh_quantize])
def test_carried_codes_are_refused(call):
    with pytest.raises(UnsupportedRequestError, match="carried: got True"):
        call(randn(4, 8, dtype=torch.bfloat16).to(NPU), carried=True)


@pytest.mark.parametrize(("dtype", "of_weight"), list(itertools.product((torch.float32, *HALF), repeat=2)))
@pytest.mark.parametrize("name", ["rms_norm", "rms_norm_rope", "layer_norm_modulate"])
def test_weights_of_any_dtype(name, dtype, of_weight):
    """The vendor's operators take weights of the dtype of x or in fp32. Against fp64: results are computed in fp32
    (2^-20 of the largest, sums of gradients too) and rounded once to their own dtype, by half a unit at most."""
    x, weight, bias = (
        randn(2, 6, 32, dtype=dtype),
        randn(32, dtype=of_weight, seed=1),
        randn(32, dtype=of_weight, seed=2),
    )
    angles = randn(6, 8, seed=3)
    shift, scale = randn(2, 2, 32, dtype=of_weight, seed=4)
    more = {
        "rms_norm": (weight,),
        "rms_norm_rope": (weight, angles.cos(), angles.sin()),
        "layer_norm_modulate": (weight, bias, shift, scale),
    }[name]
    definition = CONTRACTS[f"fused.{name}"].composite
    wide = [t.double() for t in (x, *more)]
    wanted = definition.forward(*wide, 1e-6)
    grad = randn(*wanted.shape, dtype=dtype, seed=5)
    leaves = [t.to(NPU).requires_grad_(t.ndim == 1 or t is x or t.shape == shift.shape) for t in (x, *more)]
    out = getattr(ops, name)(*leaves)
    found = torch.autograd.grad(out, [t for t in leaves if t.requires_grad], grad.to(NPU))
    expected = (g for g in definition.backward(grad.double(), *wide, 1e-6) if g is not None)
    rounded = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
    for of, one, other in zip(
        (x, *(t for t in leaves if t.requires_grad)), (out, *found), (wanted, *expected), strict=True
    ):
        assert one.dtype == of.dtype and other.dtype == torch.float64
        error = (one.detach().cpu().double() - other).abs().max()
        assert error <= (rounded[one.dtype] + 2.0**-20) * other.abs().max()


def test_angles_are_not_rounded_to_the_dtype_of_x(monkeypatch):
    seen, honest = [], torch_npu.npu_rotary_mul
    monkeypatch.setattr(torch_npu, "npu_rotary_mul", lambda *args: seen.append(args) or honest(*args))
    angles = randn(6, 16)
    ops.rope(randn(2, 6, 3, 32, dtype=torch.bfloat16).to(NPU), angles.cos().to(NPU), angles.sin().to(NPU))
    ((*tensors, mode),) = seen
    assert {t.dtype for t in tensors} == {torch.float32} and mode == "interleave"


@pytest.mark.parametrize(("samples", "heads"), [(25, 40), (1, 1001), (3, 1000), (1000, 1), (9, 111)])
@pytest.mark.parametrize("name", ["rope", "rms_norm_rope"])
def test_any_number_of_samples_and_heads_is_turned(name, samples, heads, monkeypatch):
    """Older chips take 999 of them in a call."""
    seen, honest = [], torch_npu.npu_rotary_mul
    monkeypatch.setattr(torch_npu, "npu_rotary_mul", lambda x, *rest: seen.append(x.shape) or honest(x, *rest))
    x, angles = randn(samples, 3, heads * 4), randn(3, 2, seed=1)
    more = [randn(heads * 4, seed=2)] if name == "rms_norm_rope" else []
    x = x if more else x.unflatten(-1, (heads, 4))
    arguments = (*more, angles.cos(), angles.sin())
    definition, last = CONTRACTS[f"fused.{name}"].composite, (1e-6,) if more else ()
    grad = randn(samples, 3, heads, 4, seed=3)
    wanted = (definition.forward(x, *arguments, *last), definition.backward(grad, x, *arguments, *last)[0])
    leaf = x.to(NPU).requires_grad_()
    with ops.use_backend("ascend", ops={f"fused.{name}": "ascend.npu"}):
        out = getattr(ops, name)(leaf, *(t.to(NPU) for t in arguments))
        (dx,) = torch.autograd.grad(out, leaf, grad.to(NPU))
    for one, other in zip((out.detach(), dx), wanted, strict=True):
        assert one.is_contiguous()
        torch.testing.assert_close(one.cpu(), other, rtol=2.0**-20, atol=2.0**-20)
    one_call_each = GENERATION == "950" or samples * heads < 1000
    assert len(seen) == 2 if one_call_each else len(seen) > 2 and all(b * n < 1000 for b, _, n, _ in seen)


def test_heads_that_a_request_does_not_show_are_refused_by_the_kernel():
    x, angles = randn(1, 4, 2052).to(NPU), torch.zeros(4, 513, device=NPU)
    with pytest.raises(ValueError, match=r"head_dim: got 1026.*OSPNEXT_OPS=fused.rms_norm_rope=ascend.torch"):
        ops.rms_norm_rope(x, torch.ones(2052, device=NPU), angles.cos(), angles)
    with ops.use_backend("ascend", ops={"fused.rms_norm_rope": "ascend.torch"}):
        assert ops.rms_norm_rope(x, torch.ones(2052, device=NPU), angles.cos(), angles).shape == (1, 4, 2, 1026)

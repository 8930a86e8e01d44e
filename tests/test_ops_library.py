"""The torch.library ops: opcheck, gradients, full-graph compilation, and functions bound to definition or op."""

from __future__ import annotations

import contextlib
import re

import pytest
import torch

from ospnext import ops
from ospnext.ops import library
from ospnext.ops.contracts import CONTRACTS
from ospnext.ops.contracts import fused as definitions
from ospnext.ops.contracts.attention import cumulative

OPS = torch.ops.ospnext
FUSED = {c.name.removeprefix("fused."): c for c in definitions.CONTRACTS}
CASES = [
    (name, case)
    for name, contract in FUSED.items()
    for case in contract.cases()
    if case.request.dtype == torch.float32 and case.request.backward
]


@pytest.fixture(autouse=True)
def reference():
    with ops.use_backend("reference"):
        yield


def randn(*shape: int, grad: bool = True) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).requires_grad_(grad)


def attention_arguments(kind: str, *, grad: bool) -> tuple:
    if kind == "packed":
        q, k, v = randn(12, 2, 8, grad=grad), randn(9, 2, 8, grad=grad), randn(9, 2, 8, grad=grad)
        return q, k, v, None, cumulative((5, 0, 7)), cumulative((4, 1, 4)), 7, 4, None
    q, k, v = randn(2, 5, 2, 8, grad=grad), randn(2, 6, 2, 8, grad=grad), randn(2, 6, 2, 8, grad=grad)
    mask = torch.arange(6).expand(2, 6) % 3 > 0 if kind == "masked" else None
    return q, k, v, mask, None, None, 0, 0, 0.2 if kind == "scaled" else None


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("kind", ["dense", "masked", "scaled", "packed"])
def test_opcheck_attention(kind, return_lse):
    torch.library.opcheck(OPS.attention.default, (*attention_arguments(kind, grad=False), return_lse))
    torch.library.opcheck(OPS.attention_differentiable.default, (*attention_arguments(kind, grad=True), return_lse))


@pytest.mark.parametrize("kind", ["dense", "masked", "packed"])
def test_opcheck_attention_backward(kind):
    arguments = attention_arguments(kind, grad=False)
    out, lse = OPS.attention(*arguments, True)
    torch.library.opcheck(
        OPS.attention_backward.default, (torch.ones_like(out), *arguments[:3], out, lse, *arguments[3:])
    )


def test_the_op_without_a_gradient_refuses_to_lose_one():
    with pytest.raises(RuntimeError, match="attention_differentiable"):
        OPS.attention(*attention_arguments("dense", grad=True), False)


def _leaf(key, value):
    constant = key in ("cos", "sin") or not isinstance(value, torch.Tensor) or not value.is_floating_point()
    return value if constant else value.clone().requires_grad_()


@pytest.mark.parametrize(("name", "case"), CASES, ids=[case.id for _, case in CASES])
def test_closed_form_gradients_are_those_of_the_definition(name, case):
    """In fp64, through the op, whose backward is the closed form; the definition is differentiated by autograd."""
    inputs = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
              for k, v in FUSED[name].inputs(case).items()}  # fmt: skip
    grad = inputs.pop("grad_out")

    def gradients(function):
        arguments = [_leaf(key, value) for key, value in inputs.items()]
        leaves = [a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad]
        out = function(*arguments)
        return [out, *torch.autograd.grad(out, leaves, grad)]

    for found, wanted in zip(gradients(getattr(OPS, name)), gradients(FUSED[name].composite.forward), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12 * wanted.abs().max().item())


def everything(x_BNC, weight, shift_BC, cos, sin, permutation, cu_seqlens):
    """A function that calls every operator once."""
    y = ops.layer_norm_modulate(x_BNC, shift_BC=shift_BC, scale_BC=shift_BC)
    q = ops.rope(ops.rms_norm(y, weight).unflatten(-1, (2, -1)), cos, sin)
    dense = ops.attention(q, ops.rms_norm_rope(y, weight, cos, sin), q)
    packed = ops.attention_packed(
        *(q.flatten(0, 1),) * 3, cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens, max_seqlen_q=7, max_seqlen_kv=7
    )
    mixed = (dense + packed.view_as(dense)).flatten(2)
    return ops.gate_residual(x_BNC, ops.gelu_tanh(mixed), shift_BC, permutation)


def test_every_operator_compiles_in_one_graph_with_gradients():
    x, weight, shift = randn(2, 9, 16), randn(16), randn(2, 16)
    rest = (randn(9, 4, grad=False), randn(9, 4, grad=False), torch.arange(9).roll(2), cumulative((7, 2, 4, 5)))
    ops.bind()
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    results = []
    for function in (everything, compiled):
        out = function(x, weight, shift, *rest)
        results.append([out, *torch.autograd.grad(out.square().sum(), (x, weight, shift))])
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-5, atol=1e-6 * eager.abs().max().item())


def test_a_function_without_kernels_is_its_definition():
    from ospnext.ops.fused import _bound

    ops.bind()
    for name, contract in FUSED.items():
        assert _bound[name] is contract.composite.forward


def test_every_contract_has_its_op():
    for name, contract in CONTRACTS.items():
        # Collectives act on process groups, in the layer above torch.library; compositions call the ops of others.
        if contract.family != "collective" and not contract.composed_of:
            assert hasattr(OPS, name.removeprefix("fused."))


class _Nowhere(torch.Tensor):
    """A tensor that says it is on a device, and has no memory."""

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function} computed with it")


def test_a_kernel_runs_with_the_device_of_its_operands(monkeypatch):
    """One that is launched without PyTorch goes to the current device. Here devices are made by hand."""
    current, seen = [0], []

    @contextlib.contextmanager
    def device_index(index):
        before, current[0] = current[0], index
        yield
        current[0] = before

    def kernel(count, x):
        seen.append(current[0])

    monkeypatch.setattr(library, "_several_devices", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_index", device_index)
    for device in ("cuda:1", "cuda:3", "cpu"):
        operand = torch.Tensor._make_wrapper_subclass(_Nowhere, (2,), device=torch.device(device))
        library._on_its_device(kernel)(7, operand)
    assert seen == [1, 3, 0] and current == [0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x: OPS.layer_norm_modulate(x[None], None, None, x[0, :1], x[0, :1], 1e-6),
            "x must have 3 dimensions",
        ),
        (lambda x: OPS.gate_residual(x[0], x[0], x[0], None), "x must have 3 dimensions"),
        (lambda x: OPS.rope(x, x[0], x[0]), "x must have 4 dimensions"),
        (lambda x: OPS.gate_residual(x, x, None, torch.zeros(5)), "permutation must be int64; got torch.float32"),
    ],
)
def test_operands_that_a_kernel_would_read_astray_are_refused(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(torch.zeros(2, 5, 8))

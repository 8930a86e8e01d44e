"""`ops.linear_gelu_tanh`: what it returns and refuses, definition or kernel, and when a feed-forward calls it."""

from __future__ import annotations

import contextlib
import dataclasses

import fake_backends as fake
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ospnext import ops
from ospnext.backends.reference import MANIFEST as REFERENCE
from ospnext.models.hif8_linear import HiF8Linear
from ospnext.models.layers import FeedForward
from ospnext.ops import HiF8Recipe
from ospnext.ops.contracts import CONTRACTS
from ospnext.ops.policy import use_registry
from ospnext.ops.registry import Registry

NAME = "linear_gelu_tanh"
CONTRACT = CONTRACTS[f"fused.{NAME}"]
ONE, OTHER = f"{NAME} forward", "gelu_tanh forward"
DTYPES = [torch.float64, torch.float32, torch.bfloat16]

linear_gelu_tanh, gelu_tanh = fake.CountedComposite(NAME), fake.CountedComposite("gelu_tanh")


@contextlib.contextmanager
def backend(declared: bool):
    """The reference, or one that declares a kernel for this and for GELU alone, and has those of the reference."""
    made = [dataclasses.replace(fake.kernel(f"acme.{n}", n, f"fused.{n}"), target=f"{__name__}:{n}")
            for n in (NAME, "gelu_tanh")]  # fmt: skip
    others = (dataclasses.replace(i, id=f"acme.{i.id.partition('.')[2]}") for i in REFERENCE.implementations)
    manifest = fake.backend("acme", *made, *others) if declared else REFERENCE
    with use_registry(Registry([manifest])), ops.use_backend(manifest.backend):
        fake.calls.clear()
        yield


def calls() -> list[str]:
    return [call for call in fake.calls if call.endswith("forward")]


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def operands(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return randn(2, 5, 48, dtype=dtype), randn(24, 48, dtype=dtype), randn(24, dtype=dtype)


# ---- the function


@pytest.mark.parametrize("declared", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_a_linear_and_gelu(dtype, declared):
    x, weight, bias = operands(dtype)
    with backend(declared):
        found = ops.linear_gelu_tanh(x, weight, bias)
        assert calls() == [ONE] * declared
    assert (found.shape, found.dtype) == ((2, 5, 24), dtype) and found.is_contiguous()
    assert found.equal(F.gelu(F.linear(x, weight, bias), approximate="tanh"))
    with backend(declared):
        one = ops.linear_gelu_tanh(x[0, 0], weight, bias)
        torch.testing.assert_close(one, found[0, 0])  # a sum in another order
        assert ops.linear_gelu_tanh(x[:0], weight, bias).shape == (0, 5, 24)


@pytest.mark.parametrize("declared", [False, True])
def test_a_gradient_is_refused_where_one_is_asked_for(declared):
    with backend(declared):
        for at in range(3):
            leaves = [t.clone().requires_grad_(i == at) for i, t in enumerate(operands())]
            with pytest.raises(RuntimeError, match=rf"{NAME} has no gradient.*no_grad\(\), or call a linear and gelu"):
                ops.linear_gelu_tanh(*leaves)
            for mode in (torch.no_grad(), torch.inference_mode()):
                with mode:
                    assert not ops.linear_gelu_tanh(*leaves).requires_grad


def wrong_operands():
    x, weight, bias = operands()
    shapes = r"x must be \[\.\.\., K\], weight \[N, K\] and bias \[N\]; got "
    yield (x, weight[:, 1:], bias), shapes + r"\(2, 5, 48\), \(24, 47\), \(24,\)"
    yield (x, weight, bias[1:]), shapes + r"\(2, 5, 48\), \(24, 48\), \(23,\)"
    yield (x, weight, bias[:, None]), shapes
    yield (x, weight[None], bias), shapes
    yield (torch.tensor(1.0), weight, bias), shapes + r"\(\)"
    yield (x, weight.bfloat16(), bias), "must have one dtype; got torch.float32, torch.bfloat16 and torch.float32"
    yield (
        (x.bfloat16(), weight.bfloat16(), bias),
        "must have one dtype; got torch.bfloat16, torch.bfloat16 and torch.fl",
    )


@pytest.mark.parametrize(("wrong", "message"), [*wrong_operands()])
def test_operands_are_checked_before_a_kernel_sees_them(wrong, message):
    with backend(declared=True):
        with pytest.raises(ValueError, match=message):
            ops.linear_gelu_tanh(*wrong)
        assert calls() == []


@pytest.mark.parametrize("declared", [False, True])
def test_it_compiles_in_one_graph(declared):
    def function(x, weight, bias):
        return ops.linear_gelu_tanh(2 * x, weight, bias) * 3

    torch._dynamo.reset()
    with backend(declared), torch.no_grad():
        ops.bind()
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*operands())
        assert compiled.equal(function(*operands()))


# ---- the feed-forward of a block


@pytest.fixture
def layer() -> FeedForward:
    made = FeedForward(16, 40)
    for index, parameter in enumerate(made.parameters()):
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
    return made


def test_a_feed_forward_calls_it_where_nothing_else_is_asked_of_its_linear(layer):
    x = randn(2, 5, 16)
    expected = layer[2](F.gelu(layer[0](x), approximate="tanh"))
    with backend(declared=True):
        for mode in (torch.no_grad(), torch.inference_mode()):
            fake.calls.clear()
            with mode:
                assert layer(x, x.dtype).equal(expected)
            assert calls() == [ONE]


def hooked(layer):
    layer[0].register_forward_hook(lambda *_: None)


def hooked_before(layer):
    layer[0].register_forward_pre_hook(lambda *_: None)


def of_another_class(layer):
    class Adapted(nn.Linear):
        pass

    layer[0].__class__ = Adapted


def quantized(layer):
    layer[0] = HiF8Linear.of(layer[0], HiF8Recipe())


@pytest.mark.parametrize("change", [hooked, hooked_before, of_another_class, quantized])
def test_a_linear_of_another_kind_is_called_itself(layer, change):
    change(layer)
    x = randn(2, 5, 16)
    with backend(declared=True), torch.no_grad():
        found = layer(x, x.dtype)
        assert calls() == [OTHER]
        assert found.equal(layer[2](F.gelu(layer[0](x), approximate="tanh")))


def test_hooks_still_run(layer):
    seen = []
    layer[0].register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    with backend(declared=True), torch.no_grad():
        layer(randn(2, 5, 16), torch.float32)
    assert seen == [(2, 5, 40)]


def test_gradients_flow_where_they_are_enabled(layer):
    x = randn(2, 5, 16).requires_grad_()
    with backend(declared=True):
        layer(x, x.dtype).sum().backward()
        assert calls() == [OTHER]
    assert all(p.grad is not None and p.grad.any() for p in (x, *layer.parameters()))


def test_autocast_decides_the_dtype(layer):
    x = randn(2, 5, 16)
    with backend(declared=True), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(x, x.dtype).dtype == torch.bfloat16
        assert calls() == [OTHER]


@pytest.mark.parametrize("words", ["bf16-plain", "fp32-aligned"])
def test_bounds_are_near(words):
    """The definition is right, and four steps of the dtype away from it is not."""
    (case,) = (c for c in CONTRACT.cases() if c.id.endswith(f"optional/{words}"))
    named = CONTRACT.inputs(case)
    expected = CONTRACT.expect(named)
    with backend(declared=False):
        right = CONTRACT.call(named)
    assert all(v.ok for v in expected.judge(right).values())
    off = {"out": right["out"] * (1 + 4 * torch.finfo(case.request.dtype).eps)}
    assert not any(v.ok for v in expected.judge(off).values())

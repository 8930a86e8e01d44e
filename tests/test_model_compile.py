"""torch.compile of the whole model without a graph break, and a change of backend behind a compiled model."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from small_models import SMALL, random_inputs, random_model, relative_error, sparse
from torch._dynamo.testing import CompileCounterWithBackend

from ospnext import ops
from ospnext.backends.reference.attention import MathAttention
from ospnext.backends.reference.sdpa import SdpaAttention

#: Full, token and group blocks; four are enough for every kind of transition.
CONFIG = sparse(num_full_blocks=0).replace(num_layers=4)
FULL_AND_SPARSE = sparse(num_full_blocks=4)
GRID = (2, 5, 6)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def no_plans(monkeypatch):
    monkeypatch.setattr("ospnext.sparse.skiparse._plans", {})


def compiled(model):
    """(the compiled model, the counter of its compilations). aot_eager runs the traced graphs with eager kernels."""
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(model, fullgraph=True, backend=counter), counter


def results(model, run, inputs) -> list[torch.Tensor]:
    """Output, and gradients of every parameter, the latents and the text."""
    latents, timestep, text = inputs
    leaves = [latents.clone().requires_grad_(), text.clone().requires_grad_(), *model.parameters()]
    out = run(leaves[0], timestep, leaves[1])
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


@pytest.mark.parametrize("prepared", [True, False], ids=["prepared", "cold"])
@pytest.mark.parametrize("config", [SMALL.replace(num_layers=2), FULL_AND_SPARSE], ids=["dense", "sparse"])
def test_compiled_equals_eager_with_gradients(config, prepared, no_plans):
    """The same kernels in the same order: the difference is zero, or some fp32 roundings where a sum is regrouped."""
    model = random_model(config, dtype=torch.float32)
    inputs = random_inputs(config, GRID, batch=2, dtype=torch.float32)
    run, counter = compiled(model)
    if prepared:
        model.layout(GRID, 2)
    found = results(model, run, inputs)
    again = results(model, run, inputs)
    assert counter.frame_count == 1
    expected = results(model, model, inputs)
    largest = max(gradient.abs().max().item() for gradient in expected[1:])
    for a, b, c in zip(found, again, expected, strict=True):
        assert torch.equal(a, b)
        assert relative_error(a, c, floor=1e-3 * largest) <= 1e-6


def test_a_layout_built_while_compiling_serves_eager_and_training(no_plans):
    """First use compiled and in inference mode, then eager with gradients: nothing of the first sticks."""
    model, inputs = random_model(CONFIG, dtype=torch.float32), random_inputs(CONFIG, GRID, dtype=torch.float32)
    run, _ = compiled(model)
    with torch.inference_mode():
        out = run(*inputs)
    eager, *gradients = results(model, model, inputs)
    assert relative_error(out, eager) <= 1e-6
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_kept_text_compiles():
    model, inputs = random_model(CONFIG, dtype=torch.float32), random_inputs(CONFIG, GRID, dtype=torch.float32)
    latents, timestep, text = inputs
    model.layout(GRID, 1)
    run, counter = compiled(model)
    with torch.no_grad():
        context = model.encode_text(text)
        for step in (timestep, timestep / 2):
            assert relative_error(run(latents, step, context), model(latents, step, context)) <= 1e-6
    assert counter.frame_count == 1


@pytest.fixture
def calls(monkeypatch) -> Counter:
    """How often each reference attention ran forward."""
    found: Counter = Counter()

    def counting(name, forward):
        def run(self, *args, **kwargs):
            found[name] += 1
            return forward(self, *args, **kwargs)

        return run

    for kernel in (MathAttention, SdpaAttention):
        monkeypatch.setattr(kernel, "forward", counting(kernel.__name__, kernel.forward))
    return found


@pytest.mark.parametrize("training", [False, True])
def test_change_of_backend_takes_effect_without_compiling_again(calls, training):
    """Four blocks with a self- and a cross-attention each: eight calls, all of the kernel in force."""
    with ops.use_backend("reference", ops={"attention": "reference.math"}):
        model, inputs = random_model(CONFIG, dtype=torch.float32), random_inputs(CONFIG, GRID, dtype=torch.float32)
        run, counter = compiled(model)
        model.layout(GRID, 1)

        def forward() -> torch.Tensor:
            if training:
                return results(model, run, inputs)[0]
            with torch.no_grad():
                return run(*inputs)

        outs = {"first": forward()}
        assert calls == {"MathAttention": 8}
        calls.clear()
        with ops.use_backend("reference", ops={"attention": "reference.sdpa"}):
            outs["other"] = forward()
            assert calls == {"SdpaAttention": 8}
            calls.clear()
        outs["back"] = forward()
        assert calls == {"MathAttention": 8}
        assert counter.frame_count == 1
    assert torch.equal(outs["first"], outs["back"])
    assert relative_error(outs["other"], outs["first"]) <= 1e-5

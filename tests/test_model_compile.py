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

#: One block of each kind, as far as a config has it: tracing takes a second per block.
CONFIG = SMALL.replace(num_layers=2, skiparse_model_type="dual_end", sparse_ratio=2)
DENSE = SMALL.replace(num_layers=1)
GRID = (2, 5, 6)
#: fp32 roundings, 2^-24 = 6e-8 each, of a few regrouped sums.
BOUND = 1e-6


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
@pytest.mark.parametrize("config", [DENSE, CONFIG], ids=["dense", "sparse"])
def test_compiled_equals_eager_with_gradients(config, prepared, no_plans):
    """The same kernels in the same order: the difference is zero, or some fp32 roundings where a sum is regrouped.

    A cold model computes its layout inside the first graph, finds it on the next call and is traced once more, with the
    indices as inputs; that is all.
    """
    model = random_model(config, dtype=torch.float32)
    inputs = random_inputs(config, GRID, batch=2, dtype=torch.float32)
    run, counter = compiled(model)
    if prepared:
        model.layout(GRID, 2)
    found = [results(model, run, inputs) for _ in range(3)]
    assert counter.frame_count == (1 if prepared else 2)
    expected = results(model, model, inputs)
    largest = max(gradient.abs().max().item() for gradient in expected[1:])
    for once, twice, thrice, eager in zip(*found, expected, strict=True):
        assert torch.equal(once, twice)
        assert torch.equal(once, thrice)
        assert relative_error(once, eager, floor=1e-3 * largest) <= BOUND


@pytest.mark.slow
def test_full_and_sparse_blocks_compile_together():
    """Every kind of transition: full to token, token to group, group to token, group to full."""
    model = random_model(sparse(num_full_blocks=4), dtype=torch.float32)
    inputs = random_inputs(model.config, GRID, dtype=torch.float32)
    model.layout(GRID, 1)
    run, counter = compiled(model)
    with torch.no_grad():
        assert relative_error(run(*inputs), model(*inputs)) <= BOUND
    assert counter.frame_count == 1


def test_a_layout_built_by_a_compiled_forward_serves_training(no_plans):
    model, inputs = random_model(CONFIG, dtype=torch.float32), random_inputs(CONFIG, GRID, dtype=torch.float32)
    run, _ = compiled(model)
    with torch.no_grad():
        out = run(*inputs)
    eager, *gradients = results(model, model, inputs)
    assert relative_error(out, eager) <= BOUND
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_a_prepared_model_compiles_in_inference_mode(no_plans):
    model, inputs = random_model(CONFIG, dtype=torch.float32), random_inputs(CONFIG, GRID, dtype=torch.float32)
    run, counter = compiled(model)
    with torch.inference_mode():
        model.layout(GRID, 1)
        out = run(*inputs)
    assert counter.frame_count == 1
    assert relative_error(out, results(model, model, inputs)[0]) <= BOUND


def test_kept_text_compiles():
    model, inputs = random_model(CONFIG, dtype=torch.float32), random_inputs(CONFIG, GRID, dtype=torch.float32)
    latents, timestep, text = inputs
    model.layout(GRID, 1)
    run, counter = compiled(model)
    with torch.no_grad():
        context = model.encode_text(text)
        for step in (timestep, timestep / 2):
            assert relative_error(run(latents, step, context), model(latents, step, context)) <= BOUND
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
    """Two blocks with a self- and a cross-attention each: four calls, all of the kernel in force."""
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
        assert calls == {"MathAttention": 4}
        calls.clear()
        with ops.use_backend("reference", ops={"attention": "reference.sdpa"}):
            outs["other"] = forward()
            assert calls == {"SdpaAttention": 4}
            calls.clear()
        outs["back"] = forward()
        assert calls == {"MathAttention": 4}
        assert counter.frame_count == 1
    assert torch.equal(outs["first"], outs["back"])
    assert relative_error(outs["other"], outs["first"]) <= 1e-5

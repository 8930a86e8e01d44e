"""Compiled transformers: equal to eager, without graph breaks, one graph for equal blocks and no more than needed."""

from __future__ import annotations

import pytest
import torch
from small_models import SMALL, random_inputs, random_model, relative_error, sparse
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from ospnext.errors import ConfigError
from ospnext.models.quantization import QuantPolicy, quantize_model
from ospnext.ops import HiF8Recipe
from ospnext.pipelines import OSPNextPipeline
from ospnext.pipelines import compile as compiling
from ospnext.pipelines.compile import CompiledTransformer

#: fp32 roundings, 2^-24 = 6e-8 each, of a few regrouped sums.
BOUND = 1e-6
TWELVE = sparse(SMALL.replace(num_layers=12))
EVEN, UNEVEN = (2, 4, 8), (2, 5, 7)
POLICIES = {
    "plain": None,
    "tensor": QuantPolicy("hif8", "hif8", blocks="1-10"),
    "row": QuantPolicy("hif8", "hif8", blocks="1-10", recipe=HiF8Recipe(granularity="row")),
}


@pytest.fixture
def counter(monkeypatch):
    """Counts graphs, which run with eager kernels: what is tested here is tracing."""
    torch._dynamo.reset()
    counters.clear()
    found = CompileCounterWithBackend("aot_eager")
    options = {"fullgraph": True, "dynamic": False, "backend": found}
    assert all(given.items() >= {"fullgraph": True, "dynamic": False}.items() for given in compiling.OPTIONS.values())
    monkeypatch.setattr(compiling, "OPTIONS", {"blocks": options, "max": options})
    yield found
    torch._dynamo.reset()


def small(config=TWELVE, policy=None, *, store=True):
    model = random_model(config, dtype=torch.float32)
    return model if policy is None else quantize_model(model, policy, store=store)


def kinds_of_blocks(model, grid) -> int:
    """Blocks that differ in what they compute, on this grid."""
    layout = model.layout(grid, 1)
    described = {
        (
            plan.subsequences.lengths,
            plan.subsequences.cu_seqlens is None,
            plan.switch is None,
            tuple((name, type(part)) for name, part in block.named_modules()),
            block.self_attn.attend.recipe,
        )
        for block, plan in zip(model.blocks, layout.blocks, strict=True)
    }
    return len(described)


def compare(model, run, grid, seeds=(0, 1)) -> None:
    """Prompts and timesteps change, and nothing is compiled for that."""
    for seed in seeds:
        latents, timestep, text = random_inputs(model.config, grid, seed=seed, dtype=torch.float32)
        run.prepare(latents, 1)
        with torch.no_grad():
            context = model.encode_text(text)
            found = run(latents, timestep, context)
            calls = [module._compiled_call_impl for module in (model, *model.blocks)]
            for module in (model, *model.blocks):
                module._compiled_call_impl = None
            eager = model(latents, timestep, context)
            for module, call in zip((model, *model.blocks), calls, strict=True):
                module._compiled_call_impl = call
        assert relative_error(found, eager) <= BOUND


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_equal_blocks_share_a_graph(counter, policy):
    """Twelve blocks: full, token and group ones, before and after each other."""
    model = small(policy=policy)
    run, expected = CompiledTransformer(model, "blocks"), 0
    for grid in (UNEVEN, EVEN):
        expected += kinds_of_blocks(model, grid)
        compare(model, run, grid)
        assert 3 <= counter.frame_count <= expected < 12
    before = counter.frame_count
    compare(model, run, UNEVEN)
    assert counter.frame_count == before
    assert not counters["graph_break"]


def test_weights_that_are_quantized_in_each_call(counter):
    model = small(sparse(SMALL), POLICIES["tensor"].__class__("hif8", "hif8"), store=False)
    compare(model, CompiledTransformer(model, "blocks"), UNEVEN)
    assert counter.frame_count <= kinds_of_blocks(model, UNEVEN)
    assert not counters["graph_break"]


@pytest.mark.parametrize("policy", [None, POLICIES["row"]], ids=["plain", "row"])
def test_a_whole_forward_is_one_graph_for_each_size(counter, policy):
    model = small(
        sparse(SMALL.replace(num_layers=4), num_full_blocks=0), policy and QuantPolicy("hif8", recipe=policy.recipe)
    )
    run = CompiledTransformer(model, "max")
    for grid, graphs in ((UNEVEN, 1), (EVEN, 2), (UNEVEN, 2)):
        compare(model, run, grid)
        assert counter.frame_count == graphs
    assert not counters["graph_break"]


def test_a_result_is_its_own_where_graphs_are_replayed(counter):
    """The next replay writes where this one wrote: two branches of guidance must not be one tensor."""
    model = small(sparse(SMALL.replace(num_layers=2), num_full_blocks=0))
    run = CompiledTransformer(model, "max")
    latents, *_ = random_inputs(model.config, UNEVEN, dtype=torch.float32)
    run.prepare(latents, 1)
    memory = torch.empty(1, 3, 2, 10, 14)
    model._compiled_call_impl = lambda x, t, context: memory.fill_(t.item())
    first, second = (run(latents, torch.tensor([t]), None) for t in (1.0, 2.0))
    assert (first == 1).all() and (second == 2).all()


def test_many_sizes_neither_fail_nor_fill_memory(counter, monkeypatch):
    """More than the eight variants of one function that the compiler keeps by itself, and then a limit of ours."""
    model = small(sparse(SMALL.replace(num_layers=2), num_full_blocks=0))
    run = CompiledTransformer(model, "blocks")
    grids = [(1, 4, width) for width in range(2, 9)]
    for grid in grids:
        compare(model, run, grid, seeds=(0,))
    made = counter.frame_count
    assert made > 8
    monkeypatch.setattr(compiling, "MAX_SIZES", len(grids))
    forgotten = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: forgotten.append(1))
    compare(model, run, grids[0], seeds=(0,))
    assert not forgotten
    compare(model, run, (1, 4, 9), seeds=(0,))
    assert forgotten == [1]


def test_undo(counter):
    model = small(sparse(SMALL.replace(num_layers=2), num_full_blocks=0))
    for mode in ("blocks", "max"):
        CompiledTransformer(model, mode).undo()
        compare(model, CompiledTransformer(model, "off"), EVEN, seeds=(0,))
    assert counter.frame_count == 0
    with pytest.raises(ConfigError, match="compile must be one of off, blocks, max; got 'default'"):
        CompiledTransformer(model, "default")


@pytest.mark.parametrize("mode", ["blocks", "max"])
def test_only_ones_own_compilation_is_undone(counter, mode):
    model = small(sparse(SMALL.replace(num_layers=2, in_dim=4, out_dim=4), num_full_blocks=0))
    modules = [model] if mode == "max" else list(model.blocks)
    first = OSPNextPipeline(model, None, None, compile=mode)
    second = OSPNextPipeline(model, None, None)
    second.compile = "off"
    assert all(module._compiled_call_impl is not None for module in modules)
    second.compile = mode  # over that of the first, which is no longer there to be undone
    first.compile = "off"
    assert all(module._compiled_call_impl is not None for module in modules)
    second.compile = "off"
    assert all(module._compiled_call_impl is None for module in (model, *model.blocks))


@pytest.mark.parametrize("mode", ["off", "blocks", "max"])
def test_another_transformer_may_be_assigned(counter, mode):
    config = sparse(SMALL.replace(num_layers=2, in_dim=4, out_dim=4), num_full_blocks=0)
    one, other = (random_model(config, dtype=torch.float32, seed=seed) for seed in (0, 1))
    text = torch.randn(2, 1, config.text_len, config.text_dim, generator=torch.Generator().manual_seed(0))

    def latents(pipe):
        pipe.set_progress_bar_config(disable=True)
        return pipe(
            prompt_embeds=text[0], negative_prompt_embeds=text[1], height=64, width=80, num_frames=5,
            num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="latent",
        ).frames  # fmt: skip

    pipe = OSPNextPipeline(one, None, None, compile=mode)
    before = latents(pipe)
    pipe.transformer = other
    found = latents(pipe)
    compiled = {"off": [], "blocks": list(other.blocks), "max": [other]}[mode]
    assert [m for m in (other, *other.blocks) if m._compiled_call_impl is not None] == compiled
    assert all(m._compiled_call_impl is None for m in (one, *one.blocks))
    assert relative_error(found, before) > 0.01
    pipe.compile = "off"
    assert relative_error(found, latents(OSPNextPipeline(other, None, None))) <= 4 * BOUND


def test_a_result_is_its_own_even_if_another_compiled_the_transformer(counter):
    model = small(sparse(SMALL.replace(num_layers=2), num_full_blocks=0))
    CompiledTransformer(model, "max")
    run, memory = CompiledTransformer(model, "off"), torch.empty(1, 3, 2, 10, 14)
    model._compiled_call_impl = lambda x, t, context: memory.fill_(t.item())
    first, second = (run(memory, torch.tensor([t]), None) for t in (1.0, 2.0))
    assert (first == 1).all() and (second == 2).all()


@pytest.mark.parametrize("mode", ["blocks", "max"])
@pytest.mark.parametrize("batched", ["on", "off"])
def test_the_pipeline_compiles_once_for_all_steps_branches_and_videos(counter, mode, batched):
    config = sparse(SMALL.replace(num_layers=2, in_dim=4, out_dim=4), num_full_blocks=0)
    transformer = random_model(config, dtype=torch.float32)
    pipe = OSPNextPipeline(transformer, None, None, solver="euler", batched_guidance=batched)
    pipe.set_progress_bar_config(disable=True)

    def latents(seed: int):
        generator = torch.Generator().manual_seed(seed)
        text = torch.randn(2, 1, config.text_len, config.text_dim, generator=generator)
        return pipe(
            prompt_embeds=text[0], negative_prompt_embeds=text[1], height=64, width=80, num_frames=5,
            num_inference_steps=3, generator=generator, output_type="latent",
        ).frames  # fmt: skip

    expected = [latents(seed) for seed in (0, 1)]
    pipe.compile = mode
    assert pipe.compile == mode
    found = [latents(seed) for seed in (0, 1)]
    assert counter.frame_count == (1 if mode == "max" else 2)
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other) <= 4 * BOUND


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["blocks", "max"])
def test_the_options_as_they_are_compile(mode):
    """Inductor's own kernels, on the CPU: other sums than eager ones. Bound: fp32 roundings of a two-block model."""
    torch._dynamo.reset()
    model = small(sparse(SMALL.replace(num_layers=2), num_full_blocks=0))
    run = CompiledTransformer(model, mode)
    latents, timestep, text = random_inputs(model.config, UNEVEN, dtype=torch.float32)
    run.prepare(latents, 1)
    with torch.no_grad():
        found = run(latents, timestep, model.encode_text(text))
        expected = random_model(model.config)(latents.double(), timestep, text.double())
        run.undo()
        eager = model(latents, timestep, text)
    torch._dynamo.reset()
    # As far from the fp64 model as the eager one is, times 4.
    assert relative_error(found.double(), expected) <= 4 * relative_error(eager.double(), expected)

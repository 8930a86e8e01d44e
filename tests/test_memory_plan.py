"""Memory estimates against the bytes of tensors that really live in a forward, a denoising run and a decode."""

from __future__ import annotations

import dataclasses
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKLWan
from small_models import random_inputs, random_model

from ospnext import ops
from ospnext.backends import reference
from ospnext.bench.variants import VARIANTS
from ospnext.generation.config import GenerateConfig, SamplingConfig, VaeConfig, VideoConfig
from ospnext.generation.jobs import Run, make_jobs
from ospnext.generation.memory import fused_operators
from ospnext.generation.plan import make_plan
from ospnext.generation.prompt_files import PromptRow
from ospnext.models import TransformerConfig
from ospnext.models.loading import parameter_dtype, stored_quantization
from ospnext.models.memory import activation_peak, latent_bytes, layout_bytes, text_bytes
from ospnext.models.quantization import QuantPolicy, quantize_model
from ospnext.ops import HiF8Recipe
from ospnext.ops.contracts import CONTRACTS
from ospnext.ops.policy import use_registry
from ospnext.ops.registry import Implementation, Registry
from ospnext.parallel.config import ALONE, ParallelConfig
from ospnext.pipelines import OSPNextPipeline, VideoAutoencoder, write_random_checkpoint
from ospnext.pipelines.live_bytes import LiveBytes
from ospnext.pipelines.vae import tiles
from ospnext.pipelines.vae_memory import decode_peak
from ospnext.planning import devices
from ospnext.planning import plan as planning

#: Relative, of what was measured. The estimate counts every tensor [B, N, channels], but no statistics of norms,
#: [B, N, 1], nor sinusoids: less than one of 128 channels.
CLOSE = 0.01

DENSE = TransformerConfig(
    dim=128, ffn_dim=344, num_heads=2, num_layers=2, freq_dim=32, text_dim=32, text_len=16, in_dim=4, out_dim=4
)
SPARSE = DENSE.replace(num_layers=8, skiparse_model_type="dual_end", sparse_ratio=2, num_full_blocks=4)
NARROW = SPARSE.replace(ffn_dim=64)  # its worst moment is in attention
WIDE = DENSE.replace(ffn_dim=1024)
EVEN, UNEVEN, CPU = (3, 8, 8), (2, 5, 7), torch.device("cpu")
FUSED = {name.removeprefix("fused."): contract for name, contract in CONTRACTS.items() if contract.family == "fused"}


def row(quant: str = "hif8", quant_attn: str = "none", **options) -> QuantPolicy:
    return QuantPolicy(quant, quant_attn, recipe=HiF8Recipe(granularity="row"), **options)


POLICIES = {
    "plain": None,
    "tensor": QuantPolicy("hif8"),
    "row": row(),
    "tensor-attention": QuantPolicy("hif8", "hif8"),
    "row-attention": row("hif8", "hif8"),
    "attention": QuantPolicy("none", "hif8"),
    "some": row("hif8", linears=("self_attn.q", "ffn.2"), blocks="0"),
}


@pytest.fixture
def fused_kernels():
    """As on a device with kernels for all fused operators: what they keep on the way is not seen from outside."""
    this = sys.modules[__name__]
    kernels = []
    for name, contract in FUSED.items():
        setattr(this, f"kernel_of_{name}", SimpleNamespace(forward=contract.composite.forward))
        kernels.append(
            Implementation(f"reference.{name}", contract.name, f"{__name__}:kernel_of_{name}", handles=EVERY)
        )
    manifest = dataclasses.replace(reference.MANIFEST, implementations=(*reference.MANIFEST.implementations, *kernels))
    with use_registry(Registry([manifest])), ops.use_backend("reference"):
        yield set(FUSED)


EVERY = frozenset({"affine", "modulated", "gated", "permuted", "scale_max", "scale_mode", "granularity", "carried"})


def small(config: TransformerConfig, dtype: torch.dtype, policy: QuantPolicy | None):
    model = random_model(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():  # as the loader does it
        parameter.data = parameter.data.to(parameter_dtype(name, dtype))
    return model if policy is None else quantize_model(model, policy, store=policy.quant == "hif8")


def measured_peak(model, grid, batch: int) -> int:
    latents, timestep, text = random_inputs(model.config, grid, batch=batch, dtype=torch.float32)
    with torch.no_grad():
        context = model.encode_text(text)
        model(latents, timestep, context)  # kernels are chosen and tables made
        with LiveBytes() as live:
            model(latents, timestep, context)
    assert live.now == 0
    return live.peak


def quantization_of(model, policy):
    found = stored_quantization(model)
    if policy is not None and policy.quant == "none":  # no weights are codes, so that a checkpoint has nothing to say
        attention = dict.fromkeys(policy.attention_names(model.config.num_layers), policy.attention_recipe)
        found = dataclasses.replace(found, attention=attention)
    return found


def assert_close(model, grid, batch, dtype, policy, fused) -> str:
    estimate = activation_peak(
        model.config, grid, batch, dtype, quantization=quantization_of(model, policy), fused=fused
    )
    assert sum(estimate.values()) == pytest.approx(measured_peak(model, grid, batch), rel=CLOSE), estimate
    return " + ".join(name for name, amount in estimate.items() if amount)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("config", [DENSE, SPARSE, NARROW, WIDE], ids=["dense", "sparse", "narrow", "wide"])
class TestForward:
    def test_with_definitions(self, config, policy, dtype):
        model = small(config, dtype, policy)
        with ops.use_backend("reference"):
            assert fused_operators(config, 192, dtype, CPU, quantization_of(model, policy)) == set()
            for grid, batch in ((EVEN, 1), (UNEVEN, 2)):
                assert_close(model, grid, batch, dtype, policy, ())

    def test_with_fused_kernels(self, config, policy, dtype, fused_kernels):
        model = small(config, dtype, policy)
        assert fused_operators(config, 192, dtype, CPU, quantization_of(model, policy)) == fused_kernels
        for grid, batch in ((EVEN, 1), (UNEVEN, 2)):
            assert_close(model, grid, batch, dtype, policy, fused_kernels)


def test_several_moments_are_worst_in_these_cases():
    """Else the tests above would judge one moment of many."""
    worst = {
        " + ".join(name for name, amount in activation_peak(config, EVEN, 1, dtype, fused=fused).items() if amount)
        for config in (SPARSE, NARROW, WIDE)
        for dtype in (torch.bfloat16, torch.float32)
        for fused in ((), FUSED)
    }
    assert len(worst) >= 3, worst
    assert any("GELU" in moment for moment in worst) and any("q, k and v" in moment for moment in worst)


def test_14b_at_720p():
    """By hand, with fused kernels in bf16: at the second linear of the feed-forward live the stream before the block
    and after its attentions, its norm, the hidden features after GELU, and the result.
    """
    config, tokens = TransformerConfig(), 75_600
    found = activation_peak(config, (21, 45, 80), 1, torch.bfloat16, fused=FUSED)
    assert sum(found.values()) == tokens * 2 * (4 * 5120 + 13_824) + 13 * 5120 * 4
    assert sum(activation_peak(config, (21, 45, 80), 2, torch.bfloat16, fused=FUSED).values()) == 2 * sum(
        found.values()
    )


@pytest.mark.parametrize("config", [DENSE, SPARSE], ids=["dense", "sparse"])
def test_what_is_kept_between_steps(config):
    model = random_model(config, dtype=torch.float32)
    with torch.no_grad():
        context = model.encode_text(torch.zeros(2, config.text_len, config.text_dim))
    assert bytes_of(t for pair in context.keys_values for t in pair) == text_bytes(config, torch.float32, 2)
    layout = model.layout(EVEN, 1)
    tables = [layout.enter, layout.leave, *(t for plan in layout.blocks for t in (plan.cos, plan.sin, plan.switch))]
    assert bytes_of(t for t in tables if t is not None) == layout_bytes(config, EVEN, torch.float32)


def bytes_of(tensors) -> int:
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def test_live_bytes_counts_what_was_made_inside_and_lives():
    outside = torch.zeros(100)
    with LiveBytes() as live:
        a = torch.zeros(10)
        b = (a + 1) + 1  # three at once
        outside.add_(1)
        view = b[:5]
        del a, b
        assert live.now == 40
        del view
    assert (live.now, live.peak) == (0, 120)


# ---- denoising, decoding, and the plan of a run


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model") / "tiny"
    write_random_checkpoint(directory, preset="tiny", seed=0)
    return directory


@pytest.mark.parametrize("solver", ["euler", "unipc"])
@pytest.mark.parametrize("batched", ["on", "off"])
def test_a_denoising_run(checkpoint, batched, solver):
    pipe = OSPNextPipeline.from_pretrained(
        checkpoint, text_encoder=None, vae=None, batched_guidance=batched, transformer_overrides={"num_full_blocks": 0}
    )
    pipe.solver, config = solver, pipe.transformer.config
    grid, generator = (3, 12, 20), torch.Generator().manual_seed(0)
    text = {name: torch.randn(1, 64, 32) for name in ("prompt_embeds", "negative_prompt_embeds")}
    latents = torch.randn(1, 16, 3, 24, 40, generator=generator)
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.layout(grid, 2 if batched == "on" else 1)
    with LiveBytes() as live, torch.no_grad():
        pipe._denoise(latents, text, 4, 5.0, None, ())
    estimate = activation_peak(config, grid, 2 if batched == "on" else 1, torch.float32)
    parts = [
        sum(estimate.values()),
        text_bytes(config, torch.float32, 2),
        latent_bytes(config, grid, 1, solver=solver, branches=2),
    ]
    assert sum(parts) == pytest.approx(live.peak, rel=0.1), (parts, estimate)


def autoencoder(base_dim: int = 8, dtype: torch.dtype = torch.float32):
    return torch.nn.Module.to(AutoencoderKLWan(base_dim=base_dim).eval(), dtype)


@pytest.mark.parametrize(
    ("latent", "tiled", "dtype"),
    [
        ((1, 6, 8), False, torch.float32),
        ((4, 6, 8), False, torch.float32),
        ((6, 6, 8), False, torch.bfloat16),
        ((2, 36, 36), True, torch.float32),
        ((2, 6, 8), True, torch.float32),
    ],
    ids=["one-frame", "frames", "bf16", "tiled", "one-tile"],
)
def test_a_decode(latent, tiled, dtype):
    model = autoencoder(dtype=dtype)
    model.use_tiling = tiled
    latents = torch.zeros(1, 16, *latent, dtype=dtype)
    with LiveBytes() as live, torch.no_grad():
        model.decode(latents, return_dict=False)
    assert decode_peak(model.config, latent, dtype, tiled=tiled) == pytest.approx(live.peak, rel=CLOSE)


def test_tiles_are_for_what_does_not_fit():
    """With 15 % for the workspace of kernels, which estimates do not count."""
    assert [tiles("auto", needed=n, free=115) for n in (99, 100, 101)] == [False, False, True]
    assert not tiles("auto", needed=1, free=None)
    assert tiles("on", needed=1, free=10) and not tiles("off", needed=11, free=10)
    # 720p in fp32 with Wan's autoencoder: 17 GiB or 4.
    whole, tiled = (decode_peak({}, (21, 90, 160), torch.float32, tiled=tiled) for tiled in (False, True))
    assert (round(whole / 2**30), round(tiled / 2**30)) == (18, 4)


@pytest.mark.parametrize(
    ("free", "forwards"), [(1 << 40, 1), (1000, 4), (None, 1)], ids=["plenty", "little", "unknown"]
)
def test_auto_tiles_by_free_memory(monkeypatch, free, forwards):
    vae = VideoAutoencoder(autoencoder())
    calls = []
    vae.model.decoder.register_forward_hook(lambda *_: calls.append(1))
    monkeypatch.setattr("ospnext.ops.device.Device.free_memory", lambda self: free)
    vae.decode(torch.zeros(1, 16, 1, 34, 34))
    assert len(calls) == forwards
    vae.decode(torch.zeros(1, 16, 1, 34, 34), tiling="off")
    assert len(calls) == forwards + 1
    assert vae.model.use_tiling is False


def plan_of(model: Path, *, ranks=ALONE, local=None, prompts=None, **settings):
    video = VideoConfig(height=48, width=80, num_frames=9)
    config = GenerateConfig(prompt="a", **{"video": video, **settings})
    jobs = make_jobs(config, [(prompt, "here") for prompt in prompts or [PromptRow("a")]])
    run = Run(config, model, Path("out"), jobs)
    return make_plan(run, run.jobs, torch.device("cpu"), ranks, local)


def test_the_plan_says_what_the_pipeline_will_do(checkpoint, monkeypatch):
    (size,) = plan_of(checkpoint).sizes
    assert (size.needs.batched, size.needs.decode.tiled) == (True, False)  # few tokens and much memory
    assert size.memory["activations"] == sum(size.needs.activations.values())
    text = plan_of(checkpoint).text()
    assert "activations, both branches of guidance in one forward\n" in text
    assert "  latents, velocities and solver\n" in text
    (alone,) = plan_of(checkpoint, sampling=SamplingConfig(batched_guidance="off")).sizes
    assert alone.needs.activations["stream"] == size.needs.activations["stream"] // 2
    (unguided,) = plan_of(checkpoint, sampling=SamplingConfig(guidance_scale=1)).sizes
    assert unguided.memory["text keys and values"] == size.memory["text keys and values"] // 2
    assert not unguided.needs.batched
    (quantized,) = plan_of(checkpoint, quant="hif8").sizes
    assert not quantized.needs.batched  # the branches would share scales


def test_the_plan_tiles_what_does_not_fit(checkpoint, monkeypatch):
    video = VideoConfig(height=480, width=832, num_frames=9)
    whole = plan_of(checkpoint, video=video).sizes[0].memory["VAE decode"]
    assert plan_of(checkpoint, video=video, vae=VaeConfig("on")).sizes[0].memory["VAE decode"] < whole / 2
    monkeypatch.setattr("ospnext.generation.plan.Device.free_memory", lambda self: whole)
    plan = plan_of(checkpoint, video=video)
    assert plan.sizes[0].needs.decode.tiled and "VAE decode, in tiles" in plan.text()
    assert not plan_of(checkpoint, video=video, vae=VaeConfig("off")).sizes[0].needs.decode.tiled


def test_the_plan_where_free_memory_is_unknown(checkpoint, monkeypatch):
    assert ": fits" in plan_of(checkpoint).text()
    monkeypatch.setattr("ospnext.generation.plan.Device.free_memory", lambda self: None)
    plan = plan_of(checkpoint)
    assert (plan.sizes[0].needs.batched, plan.sizes[0].needs.decode.tiled) == (False, False)
    assert plan.text().endswith("free on cpu: unknown")


# ---- the plan of several ranks

ONE_BY_ONE = SamplingConfig(batched_guidance="off")


def test_both_plans_of_a_layout_have_the_same_memory(checkpoint, fused_kernels):
    """`ospnext plan` knows no device, and takes it that there are kernels for all fused operators."""
    alone = plan_of(checkpoint, sampling=ONE_BY_ONE)
    config, grid, dtype = alone.checkpoint.config, alone.sizes[0].grid, alone.checkpoint.dtype
    worst = []
    for row in planning.rows(planning.Question(config, grid, 4, devices.device("h200"), dtype=dtype)):
        (size,) = plan_of(checkpoint, sampling=ONE_BY_ONE, ranks=row.layout).sizes
        assert size.memory["transformer weights"] == row.memory["weights"]
        same = ("text keys and values", "rotary and index tables")
        assert [size.memory[name] for name in same] == [row.memory[name] for name in same]
        assert size.memory["activations"] == row.memory["activations"] + row.memory["latents, velocities and solver"]
        exchanging = "q, k and v while they are exchanged" in size.needs.activations
        assert exchanging == (row.layout.sequence > 1)
        worst.append(exchanging)
    assert set(worst) == {True, False}


def test_both_branches_in_one_forward_exchange_twice_as_much(checkpoint, fused_kernels):
    exchanged = [
        plan_of(checkpoint, sampling=SamplingConfig(batched_guidance=batched), ranks=ParallelConfig(ssp=2))
        .sizes[0]
        .needs.activations["q, k and v while they are exchanged"]
        for batched in ("off", "on")
    ]
    assert exchanged[1] == 2 * exchanged[0] > 0


def test_ranks_on_cpus_share_the_memory_of_their_host(checkpoint, monkeypatch):
    """The first of each replica has the text encoder and the autoencoder, too."""
    ranks = ParallelConfig(dp=2, ssp=2)
    (size,) = plan_of(checkpoint, ranks=ranks, vae=VaeConfig("off")).sizes
    kept = [amount for name, amount in size.memory.items() if name not in ("activations", "VAE decode")]
    owned = size.memory["text encoder"] + size.memory["VAE weights"]
    first = sum(kept) + max(size.memory["activations"], size.memory["VAE decode"])
    other = sum(kept) - owned + size.memory["activations"]
    assert size.memory["VAE decode"] > size.memory["activations"] and owned > 0

    for local, need in ((None, 2 * first + 2 * other), (4, 2 * first + 2 * other), (2, first + other), (1, first)):
        for short in (0, 1):
            free = need - short
            monkeypatch.setattr("ospnext.generation.plan.Device.free_memory", lambda self, free=free: free)
            plan = plan_of(checkpoint, ranks=ranks, local=local, vae=VaeConfig("off"))
            assert plan.sizes[0].peak_memory == first
            assert plan.text().endswith("does NOT fit" if short else ": fits"), (local, short)
            assert ("on one host" in plan.text()) == (local != 1)


def test_the_time_of_a_run_is_that_of_the_replica_with_most_to_make(checkpoint):
    small, large = PromptRow("a", num_frames=5), PromptRow("b", num_frames=21)

    def plan(ranks, *prompts):
        return plan_of(checkpoint, ranks=ranks, prompts=prompts, sampling=ONE_BY_ONE)

    one, other = (plan(ALONE, prompt).rank_tflops for prompt in (small, large))
    assert 0 < one < other
    assert plan(ALONE, small, large, small).rank_tflops == pytest.approx(2 * one + other)
    assert plan(ParallelConfig(dp=8), small).rank_tflops == pytest.approx(one)
    assert plan(ParallelConfig(dp=2, cfg=2, ssp=2), small, small, small).rank_tflops == pytest.approx(2 * one / 4)
    assert plan(ParallelConfig(dp=2), small, large, small, large).rank_tflops == pytest.approx(2 * other)
    assert "dp 8: 7 replicas have no video; " in plan(ParallelConfig(dp=8), small).text()
    assert "no video" not in plan(ParallelConfig(dp=2), small, large).text()


def test_the_benchmark(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["memory_plan", "--tiny", "--out", str(tmp_path / "out.md")])
    runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "memory_plan.py"), run_name="__main__")
    text = (tmp_path / "out.md").read_text()
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith(("| dense", "| osp", "| decode"))]
    assert len(rows) == len(VARIANTS) + 2 and "FAILED" not in text
    assert all(0.9 < float(row[4]) < 1.1 for row in rows)
    assert text.strip() == capsys.readouterr().out.strip()

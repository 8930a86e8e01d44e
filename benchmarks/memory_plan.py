"""What `ospnext generate --dry-run` estimates for a denoising forward and a decode, beside the most that was in use.

    python benchmarks/memory_plan.py --out benchmarks/results/memory_plan.md
    python benchmarks/memory_plan.py --tiny        # on a CPU, in seconds

On a device, memory in use is that of PyTorch's allocator above what was there before, after a first run in which
libraries made their workspaces; on a CPU, that of the tensors that live between operators."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from ospnext.bench.measure import release
from ospnext.bench.report import table
from ospnext.bench.variants import VARIANTS, Variant
from ospnext.bench.versions import versions
from ospnext.bench.weights import random_inputs, random_state
from ospnext.bench.workload import Workload, workload
from ospnext.generation.backend_choice import chosen_backend
from ospnext.generation.memory import fused_operators
from ospnext.models.loading import stored_quantization
from ospnext.models.memory import activation_peak
from ospnext.ops.device import Device
from ospnext.optional import require
from ospnext.pipelines.live_bytes import LiveBytes
from ospnext.pipelines.vae import with_workspace
from ospnext.pipelines.vae_memory import decode_peak

#: Layers do not add up, since their activations are freed; eight have every kind of block.
LAYERS, TINY_LAYERS = 8, 8
SIZES, TINY_SIZES = (("14b", "720p", 1), ("14b", "768p", 1), ("14b", "480p", 2)), (("tiny", "80x112", 2),)
#: (base_dim, latents) of decodes in fp32: Wan's autoencoder at 720p, nine frames.
DECODES, TINY_DECODES = ((96, (3, 90, 160)),), ((8, (1, 34, 34)),)
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a model for a CPU")
    parser.add_argument("--out", type=Path, help="write the result here too")
    arguments = parser.parse_args()
    with chosen_backend(None) as device, torch.no_grad():
        text = "\n".join(report(device, arguments.tiny)) + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


def report(device: torch.device, tiny: bool) -> Iterator[str]:
    found = versions(device)
    yield from ("# Memory, estimated and used", "")
    yield f"{found.get('device_name', device)}, backend {found['backend']}, torch {torch.__version__}. MiB; a forward"
    yield "of the transformer without its weights and text, and a decode without the autoencoder's weights."
    yield from (
        "",
        *table(["what", "batch", "estimate", "used", "estimate / used", "at the worst moment"], [*rows(device, tiny)]),
    )


def rows(device: torch.device, tiny: bool) -> Iterator[list[str]]:
    for preset, resolution, batch in TINY_SIZES if tiny else SIZES:
        work = workload(preset, resolution, 9 if tiny else 81, TINY_LAYERS if tiny else LAYERS)
        state = random_state(work.config, device)
        for variant in VARIANTS.values():
            try:
                yield forward_row(work, variant, batch, state, device)
            except Exception as error:  # one that nothing here can run leaves the others
                yield [f"{variant.name}, {resolution}", str(batch), f"FAILED: {str(error).splitlines()[0]}", "", "", ""]
            release()
        del state
        release()
    for base_dim, latent in TINY_DECODES if tiny else DECODES:
        for tiled in (False, True):
            yield decode_row(base_dim, latent, tiled, device)
            release()


def forward_row(work: Workload, variant: Variant, batch: int, state: dict, device: torch.device) -> list[str]:
    model = variant.build(work.config, state)
    inputs = random_inputs(work, device)
    context = model.encode_text(inputs.text_BLC.expand(batch, -1, -1))
    latents = inputs.latents_BCTHW.expand(batch, -1, -1, -1, -1).float()
    timesteps = inputs.timestep_B.expand(batch)
    quantization = stored_quantization(model)
    fused = fused_operators(model.config, work.tokens, model.dtype, device, quantization)
    estimate = activation_peak(model.config, work.grid, batch, model.dtype, quantization=quantization, fused=fused)
    used = peak_of(lambda: model(latents, timesteps, context), device)
    largest = sorted((name for name, amount in estimate.items() if amount), key=lambda name: -estimate[name])[:3]
    return row(f"{variant.name}, {work.resolution}", batch, sum(estimate.values()), used, ", ".join(largest))


def decode_row(base_dim: int, latent: tuple[int, int, int], tiled: bool, device: torch.device) -> list[str]:
    with torch.device(device):
        model = require("diffusers", extra="t2v").AutoencoderKLWan(base_dim=base_dim).eval()
    model.use_tiling = tiled
    latents = torch.randn(1, 16, *latent, device=device)
    used = peak_of(lambda: model.decode(latents, return_dict=False), device)
    estimate = with_workspace(decode_peak(model.config, latent, torch.float32, tiled=tiled), device)
    return row(f"decode of {latent} latents{', in tiles' if tiled else ''}", 1, estimate, used, "")


def row(what: str, batch: int, estimate: int, used: int, note: str) -> list[str]:
    return [what, str(batch), f"{estimate / MIB:,.1f}", f"{used / MIB:,.1f}", f"{estimate / used:.3f}", note]


def peak_of(call: Callable[[], object], device: torch.device) -> int:
    """Bytes above what is in use before, in the second call."""
    call()
    surface = Device(device)
    if surface.is_cpu:
        with LiveBytes() as live:
            call()
        return live.peak
    release()
    surface.synchronize()
    before = torch.accelerator.memory_allocated(device)
    surface.reset_peak_memory()
    call()
    surface.synchronize()
    return surface.peak_memory() - before


if __name__ == "__main__":
    main()

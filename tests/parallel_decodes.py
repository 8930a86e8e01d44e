"""Decodes that ranks share beside those of one process: autoencoders alone, and pipelines in several layouts. Run by
test_parallel_decode.py.

    python tests/parallel_decodes.py FOLDER

Ranks are forked from a process that has imported everything, two, three and four of them; each writes what it found."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from diffusers import AutoencoderKLWan
from parallel_pipelines import GUIDANCE, TIMEOUT, VIDEO, pipeline
from torch import Tensor

from ospnext.ops.collective import count_bytes, watch
from ospnext.ops.device import Device
from ospnext.parallel.config import ParallelConfig
from ospnext.parallel.mesh import make_mesh
from ospnext.pipelines import OSPNextPipeline, VideoAutoencoder
from ospnext.pipelines.replica import Replica
from ospnext.pipelines.vae import Tiling
from ospnext.pipelines.vae_sharing import Parallel, decode_shared
from ospnext.pipelines.vae_tiles import tiles_of_model

WORLDS, PLENTY = (2, 3, 4), 1 << 40
#: Side and stride: a video of 16 x 20 latent positions has 2 x 2 tiles.
VIDEO_TILES = (16, 12)


@dataclass(frozen=True)
class Latents:
    """Shape of latents, and the side and stride of tiles, in latent positions."""

    name: str
    shape: tuple[int, int, int, int, int]
    side: int = 8
    stride: int = 6

    def drawn(self) -> Tensor:
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(5))


LATENTS = (
    Latents("uneven", (1, 16, 2, 13, 14)),  # 3 x 3 tiles, down to 1 x 2 positions
    Latents("batch", (2, 16, 1, 9, 11)),
    Latents("two-tiles", (1, 16, 2, 6, 12)),
    Latents("one-frame", (1, 16, 1, 8, 9)),
    Latents("library-sizes", (1, 16, 1, 33, 26), side=32, stride=24),
)


def autoencoder(side: int = 8, stride: int = 6) -> VideoAutoencoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = VideoAutoencoder(AutoencoderKLWan(base_dim=8).eval())
    sizes = (8 * side, 8 * side, 8 * stride, 8 * stride)
    vae.model.enable_tiling(*sizes)
    vae.model.disable_tiling()
    return vae


def alone(case: Latents) -> Tensor:
    return autoencoder(case.side, case.stride).decode(case.drawn(), tiling="on")


def decoded(case: Latents, expected: Tensor, replica: Replica) -> dict[str, Any]:
    """Of one rank: what it gets, the areas that it decodes, and the bytes that it sends."""
    vae, latents, areas = autoencoder(case.side, case.stride), case.drawn(), []
    vae.model.decoder.conv_in.register_forward_hook(lambda _, args, out: areas.append(out.shape[-2] * out.shape[-1]))
    with count_bytes() as counted:
        found = decode_shared(vae, latents, replica)
    return {
        "equal": None if found is None else torch.equal(found, expected),
        "areas": areas,
        "sent": counted.total_bytes(),
        "tiles": [tile.area for row in tiles_of_model(vae.model, *latents.shape[3:]) for tile in row],
    }


def broken_on_the_last(timeout: float) -> None:
    """Under watch, as a command runs: a rank fails before it has sent anything."""
    with watch(timeout):
        replica = Replica(make_mesh(ParallelConfig(ulysses=dist.get_world_size()), "cpu", timeout))
        vae = autoencoder()
        if replica.rank == replica.ranks - 1:
            vae.model.decoder.forward = out_of_memory
        decode_shared(vae, LATENTS[0].drawn(), replica)


def out_of_memory(*args: Any, **kwargs: Any) -> Tensor:
    raise RuntimeError("no room for a tile")


# ---- pipelines


@dataclass(frozen=True)
class Way:
    """Settings, and what is particular to the ranks. `free` is the memory of the first and of the others, in bytes."""

    name: str
    tiling: Tiling = "auto"
    parallel: Parallel = "auto"
    free: tuple[int, int] = (PLENTY, PLENTY)
    last_has_none: bool = False
    #: Which frames it makes, and whether ranks share the decode of them.
    expected: str = "tiles"
    shared: bool = True


WAYS = (
    Way("tiles", tiling="on"),
    Way("the first is full", free=(1000, PLENTY)),
    Way("always", parallel="on"),
    Way("off", tiling="on", parallel="off", shared=False),
    Way("never", free=(1000, 1000), tiling="off", expected="whole", shared=False),
    Way("all fits", expected="whole", shared=False),
    Way("another is full", free=(PLENTY, 1000), expected="whole", shared=False),
    Way("one has no autoencoder", tiling="on", last_has_none=True, shared=False),
)
BOTH = ParallelConfig(cfg=2, ssp=2)
PIPELINES: dict[int, tuple[tuple[ParallelConfig, Way], ...]] = {
    2: ((ParallelConfig(cfg=2), WAYS[0]), (ParallelConfig(ssp=2), WAYS[0])),
    4: ((ParallelConfig(dp=2, cfg=2), WAYS[0]), *((BOTH, way) for way in WAYS)),
}


def frames_of(pipe: OSPNextPipeline) -> Tensor | None:
    config, generator = pipe.transformer.config, torch.Generator().manual_seed(0)
    text = torch.randn(2, 1, config.text_len, config.text_dim, generator=generator)
    output = pipe(
        prompt_embeds=text[0],
        negative_prompt_embeds=text[1],
        generator=generator,
        num_inference_steps=1,
        guidance_scale=GUIDANCE,
        output_type="pt",
        **VIDEO,
    )
    return output.frames  # type: ignore[union-attr, return-value]


def made(way: Way, layout: ParallelConfig, one: dict[str, Tensor]) -> dict[str, Any]:
    mesh = make_mesh(layout, "cpu", TIMEOUT)
    pipe, replica = pipeline(quant=False).share(mesh), Replica(mesh)
    last = replica.rank == replica.ranks - 1
    pipe.vae = None if way.last_has_none and last else autoencoder(*VIDEO_TILES)
    pipe.vae_tiling, pipe.vae_parallel = way.tiling, way.parallel
    with patch.object(Device, "free_memory", lambda self: way.free[not mesh.leads]):
        frames = frames_of(pipe)
    equal = [name for name, expected in one.items() if frames is not None and torch.equal(frames, expected)]
    return {"leads": mesh.leads, "frames": equal if frames is not None else None, "decided": pipe.decided}


def rank_main(rank: int, world: int, one: dict[str, Any], folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting-{world}", rank=rank, world_size=world)
    replica = Replica(make_mesh(ParallelConfig(ulysses=world), "cpu", TIMEOUT))
    found: dict[str, Any] = {case.name: decoded(case, one[case.name], replica) for case in LATENTS}
    for layout, way in PIPELINES.get(world, ()):
        found[f"{layout}, {way.name}"] = made(way, layout, one["videos"])
    Path(folder, f"{world}-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def of_one_process() -> dict[str, Any]:
    found: dict[str, Any] = {case.name: alone(case) for case in LATENTS}
    pipe = pipeline(quant=False)
    pipe.vae, found["videos"] = autoencoder(*VIDEO_TILES), {}
    for name, tiling in (("tiles", "on"), ("whole", "off")):
        pipe.vae_tiling = tiling  # type: ignore[assignment]
        found["videos"][name] = frames_of(pipe)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    one = of_one_process()
    for world in WORLDS:
        mp.start_processes(rank_main, (world, one, sys.argv[1]), world, start_method="fork")

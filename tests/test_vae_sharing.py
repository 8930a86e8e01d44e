"""Tiles, their division and the memory that it takes, in one process. Real ranks: test_parallel_decode.py."""

from __future__ import annotations

import itertools
import re
from unittest.mock import patch

import pytest
import torch
from diffusers import AutoencoderKLWan
from hypothesis import given
from hypothesis import strategies as st
from test_memory_plan import CLOSE, plan_of

from ospnext.errors import ConfigError
from ospnext.generation.config import VaeConfig, VideoConfig
from ospnext.models import OSPNextTransformer, preset
from ospnext.parallel.config import ParallelConfig
from ospnext.pipelines import OSPNextPipeline, VideoAutoencoder, write_random_checkpoint
from ospnext.pipelines.live_bytes import LiveBytes
from ospnext.pipelines.vae_memory import decode_peak, shared_peaks
from ospnext.pipelines.vae_sharing import decode, decode_shared, may_share
from ospnext.pipelines.vae_tiles import positions, shares, tiles_of, tiles_of_model

LARGE = {"video": VideoConfig(height=480, width=832, num_frames=9)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model") / "tiny"
    write_random_checkpoint(directory, preset="tiny", seed=0)
    return directory


def autoencoder(dtype: torch.dtype = torch.float32) -> VideoAutoencoder:
    return VideoAutoencoder(torch.nn.Module.to(AutoencoderKLWan(base_dim=8).eval(), dtype))


class Stub:
    """A rank of a replica whose others are not there: it receives zeros."""

    def __init__(self, rank: int, ranks: int, agree: bool = True) -> None:
        self.rank, self.ranks, self.leads, self.agree, self.said = rank, ranks, rank == 0, agree, []

    def to_first(self, x, rows):
        return x.new_zeros(sum(rows[1:]) if self.leads else 0, x.shape[1])

    def all_agree(self, yes, device):
        self.said.append(yes)
        return yes and self.agree


# ---- tiles


def test_tiles_are_those_of_the_library():
    """By what its decoder is given."""
    vae, seen = autoencoder(), []
    vae.model.decoder.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[3:])))
    for size in ((33, 7), (7, 57), (34, 49)):
        seen.clear()
        with torch.no_grad():
            vae.decode(torch.zeros(1, 16, 1, *size), tiling="on")
        assert seen == [(tile.height, tile.width) for row in tiles_of_model(vae.model, *size) for tile in row]
        assert tiles_of_model(vae.model, *size) == tiles_of(*size)
    assert tiles_of(32, 32) == [[(0, 0, 32, 32)]]


@given(st.integers(1, 120), st.integers(1, 200), st.integers(1, 16))
def test_every_tile_has_one_rank_and_no_rank_has_too_much(height, width, ranks):
    tiles = tiles_of(height, width)
    every, divided = list(itertools.chain(*tiles)), shares(tiles, ranks)
    assert sorted(itertools.chain(*divided)) == sorted(every)
    loads = [positions(share) for share in divided]
    assert max(loads) - min(loads) <= max(tile.area for tile in every)


@pytest.mark.parametrize(("size", "ranks", "most"), [((90, 160), 8, 3136), ((60, 104), 8, 1408), ((90, 160), 4, 6208)])
def test_how_even_the_usual_sizes_are(size, ranks, most):
    """720p and 480p: of 2964, 1292 and 5928 latent positions in the mean."""
    assert max(map(positions, shares(tiles_of(*size), ranks))) == most


# ---- who decodes


@pytest.mark.parametrize(
    ("tiling", "parallel", "ranks", "may"),
    [
        ("auto", "auto", 2, True),
        ("auto", "on", 3, True),
        ("on", "auto", 1, False),
        ("off", "auto", 2, False),
        ("on", "off", 2, False),
    ],
)
def test_who_needs_an_autoencoder(tiling, parallel, ranks, may):
    assert may_share(tiling, parallel, ranks) == may


def test_one_tile_is_not_shared():
    latents, replica = torch.zeros(1, 16, 1, 4, 4), Stub(0, 2)
    frames, decided = decode(autoencoder(), latents, replica, tiling="on", parallel="on")
    assert frames.shape == (1, 1, 32, 32, 3) and decided == {"tiled": True, "shared": False}
    assert replica.said == [False]


def test_settings_that_exclude_each_other():
    with pytest.raises(ConfigError, match=r"vae\.parallel=on divides tiles among ranks, vae\.tiling=off makes none"):
        VaeConfig(tiling="off", parallel="on")
    model = OSPNextTransformer(preset("tiny"))
    with pytest.raises(ConfigError, match="vae_parallel='on' divides tiles among ranks, vae_tiling='off' makes none"):
        OSPNextPipeline(model, None, None, vae_parallel="on", vae_tiling="off")
    pipe = OSPNextPipeline(model, None, None, vae_parallel="on")
    pipe._replica = Stub(1, 2)
    text = torch.zeros(1, model.config.text_len, model.config.text_dim)
    with pytest.raises(ConfigError, match="this rank has no autoencoder, and vae_parallel='on' needs one on each"):
        pipe(prompt_embeds=text, guidance_scale=1.0, height=32, width=32, num_frames=5)


# ---- memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("latent", "ranks"), [((2, 36, 36), 2), ((5, 4, 60), 3), ((1, 33, 8), 4)], ids=str)
def test_a_shared_decode(latent, ranks, dtype):
    """Of each rank; the exchange allocates what it receives."""
    vae = autoencoder(dtype)
    for rank, estimate in enumerate(shared_peaks(vae.model.config, latent, dtype, ranks)):
        latents = vae.denormalise(torch.zeros(1, 16, *latent))
        with LiveBytes() as live, patch.object(vae, "denormalise", lambda _, z=latents: z):
            decode_shared(vae, latents, Stub(rank, ranks))
        assert estimate == pytest.approx(live.peak, rel=CLOSE), rank


def test_720p_takes_less_on_the_first_than_alone():
    """By hand: the video, and two steps on the way to 0..1, in fp32."""
    alone = decode_peak({}, (21, 90, 160), torch.float32, tiled=True)
    first, *others = shared_peaks({}, (21, 90, 160), torch.float32, 8)
    assert first == 3 * (81 * 720 * 1280 * 3 * 4)
    assert [round(amount / 2**30, 1) for amount in (alone, first, max(others))] == [3.9, 2.5, 1.4]


def test_the_plan_of_ranks(checkpoint):
    """An autoencoder where one may be needed, a decode where there is one."""

    def needs(layout, **vae):
        return plan_of(checkpoint, ranks=layout, vae=VaeConfig(**vae), **LARGE).sizes[0].needs

    layout = ParallelConfig(dp=2, cfg=2, ssp=2)
    alone = needs(layout, tiling="on", parallel="off")
    assert not alone.others["VAE decode"] and not {"VAE weights", "text encoder"} & alone.others.keys()
    may, never = needs(layout), needs(layout, tiling="off")
    assert may.parts == never.parts and not may.decode.tiled
    assert may.peak_of_others == never.peak_of_others + may.parts["VAE weights"]

    shared = needs(layout, tiling="on")
    assert shared == needs(layout, parallel="on")
    assert shared.decode.ranks == 4 and shared.others["VAE decode"] == shared.decode.other > 0
    assert shared.parts["VAE decode"] <= alone.parts["VAE decode"]
    assert shared.others["VAE weights"] == shared.parts["VAE weights"] and "text encoder" not in shared.others
    text = plan_of(checkpoint, ranks=layout, vae=VaeConfig("on"), **LARGE).text()
    assert "VAE decode, in tiles divided among 4 ranks\n" in text
    assert re.search(r"\n +[\d.]+ MiB  on another of them, at most\n", text)
    assert needs(ParallelConfig(dp=4), tiling="on").decode.ranks == 1
    one_tile = plan_of(checkpoint, ranks=layout, vae=VaeConfig("on"))
    assert one_tile.sizes[0].needs.decode.ranks == 1 and "divided" not in one_tile.text()

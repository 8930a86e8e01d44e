"""Decoding by the ranks that make a video: whether they divide it, and how. Each decodes tiles of it, and the first
joins them, with the bits of one process that decodes in tiles.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ospnext.pipelines.replica import Replica
from ospnext.pipelines.vae import SPATIAL_FACTOR, TEMPORAL_FACTOR, Tiling, VideoAutoencoder, in_0_1
from ospnext.pipelines.vae_tiles import decode_tile, join_tiles, positions, shares, tiles_of_model, unpacked

#: "auto": ranks divide the tiles of a video that is decoded in tiles anyway, so that no pixel depends on them; "on":
#: every video is decoded in tiles, by any number of ranks; "off": the first rank decodes alone.
Parallel = Literal["auto", "on", "off"]


def may_share(tiling: Tiling, parallel: Parallel, ranks: int) -> bool:
    """Whether ranks may have to decode together, so that each needs an autoencoder."""
    return ranks > 1 and tiling != "off" and parallel != "off"


def decode(
    vae: VideoAutoencoder | None, latents_BCTHW: Tensor, replica: Replica, *, tiling: Tiling, parallel: Parallel
) -> tuple[Tensor | None, dict[str, bool]]:
    """(frames of `VideoAutoencoder.decode` on the rank that leads, None on the others; whether they are "tiled" and
    "shared"). The latents are the same on all ranks, and the one that leads has an autoencoder.
    """
    tiled, willing = False, vae is not None and parallel != "off"
    if replica.leads:  # its memory would have to hold the whole
        assert vae is not None
        tiled = vae.needs_tiles(latents_BCTHW, "on" if parallel == "on" else tiling)
        willing = willing and tiled and vae.count_tiles(latents_BCTHW) > 1
    shared = replica.ranks > 1 and replica.all_agree(willing, latents_BCTHW.device)
    decided = {"tiled": tiled or shared, "shared": shared}
    if vae is None or not (shared or replica.leads):
        return None, decided
    if shared:
        return decode_shared(vae, latents_BCTHW, replica), decided
    return vae.decode(latents_BCTHW, tiling="on" if tiled else "off"), decided


@torch.no_grad()
def decode_shared(vae: VideoAutoencoder, latents_BCTHW: Tensor, replica: Replica) -> Tensor | None:
    """`VideoAutoencoder.decode` in tiles, by all ranks of `replica`: the frames on the first, None on the others. One
    video is decoded after the other, each by all ranks.
    """
    videos = (_decode_one(vae.model, latents, replica) for latents in vae.denormalise(latents_BCTHW).split(1))
    made = [in_0_1(video) for video in videos if video is not None]
    return torch.cat(made) if made else None


def _decode_one(model: Any, latents_1CTHW: Tensor, replica: Replica) -> Tensor | None:
    """[1, 3, 4(T-1)+1, 8h, 8w] in -1..1. What was sent is free again when this returns."""
    _, _, t, h, w = latents_1CTHW.shape
    frames, tiles = TEMPORAL_FACTOR * (t - 1) + 1, tiles_of_model(model, h, w)
    of_ranks = shares(tiles, replica.ranks)
    mine, theirs = of_ranks[replica.rank], [tile for share in of_ranks[1:] for tile in share]
    # Where they are sent from, so that no rank has them twice.
    packed = latents_1CTHW.new_empty(positions(mine), 3 * frames * SPATIAL_FACTOR**2)
    made = unpacked(packed, mine, frames)
    for tile, frames_1CTHW in made.items():
        decode_tile(model, latents_1CTHW, tile, frames_1CTHW)
    received = replica.to_first(packed, [positions(share) for share in of_ranks])
    return join_tiles(model, tiles, made | unpacked(received, theirs, frames)) if replica.leads else None

"""One video decoded by all ranks that make it: each decodes its tiles, and the first of them joins all. The bits are those
of one process that decodes in tiles.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ospnext.pipelines.replica import Replica
from ospnext.pipelines.vae_tiles import decode_tile, join_tiles, positions, shares, tiles_of_model, unpacked


def decode_shared(model: Any, latents_1CTHW: Tensor, replica: Replica) -> Tensor | None:
    """Denormalised latents, the same on all ranks of `replica`, to the video [1, 3, 4(T-1)+1, 8h, 8w] in -1..1, on the
    first of them. None on the others.
    """
    _, _, t, h, w = latents_1CTHW.shape
    frames = model.config.scale_factor_temporal * (t - 1) + 1
    tiles = tiles_of_model(model, h, w)
    shared = shares(tiles, replica.ranks)
    rows, mine = [positions(share) for share in shared], shared[replica.rank]
    # As it is sent, so that it exists once: decoding itself needs most of the memory.
    packed = latents_1CTHW.new_empty(positions(mine), 3 * frames * model.spatial_compression_ratio**2)
    made = unpacked(packed, mine, frames)
    for tile, frames_1CTHW in made.items():
        decode_tile(model, latents_1CTHW, tile, frames_1CTHW)
    received = replica.to_first(packed, rows)
    if not replica.leads:
        return None
    made |= unpacked(received, [tile for share in shared[1:] for tile in share], frames)
    return join_tiles(model, tiles, made)

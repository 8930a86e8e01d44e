"""Memory that a decode of Wan's autoencoder needs: the decoder itself is run on tensors without values and watched."""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Mapping
from typing import Any

import torch

from ospnext.optional import require
from ospnext.pipelines.live_bytes import LiveBytes
from ospnext.pipelines.vae_tiles import SIDE, Tile, decode_tile, positions, shares, tiles_of

#: From the third latent frame on every one needs what the one before did: the caches of all convolutions are full.
_FRAMES = 3


def decode_peak(
    config: Mapping[str, Any], latent: tuple[int, int, int], dtype: torch.dtype, *, tiled: bool = False
) -> int:
    """Bytes of the tensors that live at the worst moment of decoding one video, its frames included.

    Args:
        config: of the AutoencoderKLWan, as its `config.json` has it.
        latent: (T, h, w) of the latents. Memory of the decoder does not grow with T, that of the frames does.
        tiled: whether the decoder works on overlapping tiles.
    """
    frames, height, width = latent
    areas = _areas(height, width)
    if not tiled or len(areas) == 1:
        return _whole(_frozen(config), latent, dtype)
    frame_bytes = _values(frames) * dtype.itemsize
    largest = _whole(_frozen(config), (frames, min(SIDE, height), min(SIDE, width)), dtype)
    before = itertools.accumulate(areas, initial=0)
    decoding = max(made * frame_bytes + largest * area // max(areas) for made, area in zip(before, areas, strict=False))
    # All tiles, the rows they are joined to, the video made of those, and the same clamped.
    joining = (sum(areas) + 3 * height * width) * frame_bytes
    return max(decoding, joining)


def shared_peaks(
    config: Mapping[str, Any], latent: tuple[int, int, int], dtype: torch.dtype, ranks: int
) -> tuple[int, ...]:
    """As `decode_peak`, on each of the ranks that divide the tiles of a video. The first joins what all have made."""
    frames, height, width = latent
    tiles, frame_bytes = tiles_of(height, width), _values(frames) * dtype.itemsize
    whole, shared = tiles[0][0], shares(tiles, ranks)
    # The frames of a rank's tiles have their place from the beginning; decoding one does not grow with their number.
    passing = _watch(_frozen(config), (min(frames, _FRAMES), whole.height, whole.width), dtype, as_tile=True)
    first, *others = [
        positions(share) * frame_bytes + max((passing * tile.area // whole.area for tile in share), default=0)
        for share in shared
    ]
    # All tiles and the video, and then the video and two steps on the way to fp32 in 0..1.
    joining = (sum(map(positions, tiles)) + height * width) * frame_bytes
    finishing = height * width * (frame_bytes + 2 * 4 * _values(frames))
    return max(first, joining, finishing), *others


def _areas(height: int, width: int) -> list[int]:
    return [tile.area for row in tiles_of(height, width) for tile in row]


def _values(frames: int) -> int:
    """Of the video, for each latent position."""
    return (4 * frames - 3) * 3 * 8 * 8


def _whole(config: str, latent: tuple[int, int, int], dtype: torch.dtype) -> int:
    """Of a decode in one piece. The frames made so far stay; those of later ones are added to what was watched."""
    frames, height, width = latent
    watched = min(frames, _FRAMES)
    grown = (frames - watched) * 4 * 3 * math.prod((8, 8, height, width)) * dtype.itemsize
    return _watch(config, (watched, height, width), dtype) + grown


@functools.lru_cache(maxsize=64)
def _watch(config: str, latent: tuple[int, int, int], dtype: torch.dtype, *, as_tile: bool = False) -> int:
    """Of a decode; as a tile, without the frames that it makes."""
    model_class = require("diffusers", extra="t2v").AutoencoderKLWan
    with torch.device("meta"), torch.inference_mode():
        model = torch.nn.Module.to(model_class.from_config(json.loads(config)), dtype)
        latents_1CTHW = torch.empty(1, model.config.z_dim, *latent, dtype=dtype)
        frames, height, width = latent
        made_1CTHW = torch.empty(1, 3, 4 * frames - 3, 8 * height, 8 * width, dtype=dtype)
        with LiveBytes() as live:
            if as_tile:
                decode_tile(model, latents_1CTHW, Tile(0, 0, height, width), made_1CTHW)
            else:
                model.decode(latents_1CTHW, return_dict=False)
    return live.peak


def _frozen(config: Mapping[str, Any]) -> str:
    """Without what a library writes about itself, which begins with an underscore."""
    return json.dumps({key: value for key, value in sorted(config.items()) if not key.startswith("_")})

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

#: Latent positions of a tile's side, and between the starts of two: diffusers' defaults of 256 and 192 pixels.
TILE, STRIDE = 32, 24
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
    if not tiled or max(height, width) <= TILE:
        return _whole(_frozen(config), latent, dtype)
    frame_bytes = (4 * frames - 3) * 3 * 8 * 8 * dtype.itemsize  # per latent position
    areas = [h * w for h in _tiles(height) for w in _tiles(width)]
    largest = _whole(_frozen(config), (frames, min(TILE, height), min(TILE, width)), dtype)
    before = itertools.accumulate(areas, initial=0)
    decoding = max(made * frame_bytes + largest * area // max(areas) for made, area in zip(before, areas, strict=False))
    # All tiles, the rows they are joined to, the video made of those, and the same clamped.
    joining = (sum(areas) + 3 * height * width) * frame_bytes
    return max(decoding, joining)


def _tiles(positions: int) -> list[int]:
    return [min(TILE, positions - start) for start in range(0, positions, STRIDE)]


def _whole(config: str, latent: tuple[int, int, int], dtype: torch.dtype) -> int:
    """Of a decode in one piece. The frames made so far stay; those of later ones are added to what was watched."""
    frames, height, width = latent
    watched = min(frames, _FRAMES)
    grown = (frames - watched) * 4 * 3 * math.prod((8, 8, height, width)) * dtype.itemsize
    return _watch(config, (watched, height, width), dtype) + grown


@functools.lru_cache(maxsize=64)
def _watch(config: str, latent: tuple[int, int, int], dtype: torch.dtype) -> int:
    model_class = require("diffusers", extra="t2v").AutoencoderKLWan
    with torch.device("meta"), torch.inference_mode():
        model = torch.nn.Module.to(model_class.from_config(json.loads(config)), dtype)
        latents_1CTHW = torch.empty(1, model.config.z_dim, *latent, dtype=dtype)
        with LiveBytes() as live:
            model.decode(latents_1CTHW, return_dict=False)
    return live.peak


def _frozen(config: Mapping[str, Any]) -> str:
    """Without what a library writes about itself, which begins with an underscore."""
    return json.dumps({key: value for key, value in sorted(config.items()) if not key.startswith("_")})

"""The tiles of a decode, to be divided among ranks: which there are, who decodes which, one decoded, and all joined.
Tiles, decoder and blending are those of diffusers' `AutoencoderKLWan.tiled_decode`. How tiles travel is not known here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

#: Latent positions of a tile's side, and between the starts of two: diffusers' defaults of 256 and 192 pixels.
SIDE, STRIDE = 32, 24


class Tile(NamedTuple):
    """A part of the latents' plane, in latent positions."""

    top: int
    left: int
    height: int
    width: int

    @property
    def area(self) -> int:
        return self.height * self.width


Tiles = list[list[Tile]]


def tiles_of(
    height: int, width: int, side: tuple[int, int] = (SIDE, SIDE), stride: tuple[int, int] = (STRIDE, STRIDE)
) -> Tiles:
    """Rows of tiles that cover `height` x `width` latent positions; one tile if a side of it holds all of them."""
    if height <= side[0] and width <= side[1]:
        return [[Tile(0, 0, height, width)]]
    return [
        [Tile(top, left, min(side[0], height - top), min(side[1], width - left)) for left in range(0, width, stride[1])]
        for top in range(0, height, stride[0])
    ]


def tiles_of_model(model: Any, height: int, width: int) -> Tiles:
    """Those that an AutoencoderKLWan works on, with the sizes that it is set to."""
    factor = model.spatial_compression_ratio
    return tiles_of(
        height,
        width,
        (model.tile_sample_min_height // factor, model.tile_sample_min_width // factor),
        (model.tile_sample_stride_height // factor, model.tile_sample_stride_width // factor),
    )


def shares(tiles: Tiles, ranks: int) -> list[list[Tile]]:
    """The tiles of each rank: the largest first, each to the rank with the least to do so far. So no rank has more than
    4/3 of what it would have in the best division (Graham 1969), and all ranks find the same.
    """
    found: list[list[Tile]] = [[] for _ in range(ranks)]
    for tile in sorted((tile for row in tiles for tile in row), key=lambda tile: -tile.area):
        min(found, key=positions).append(tile)
    return found


def positions(tiles: Sequence[Tile]) -> int:
    """How many latent positions tiles have together."""
    return sum(tile.area for tile in tiles)


def decode_tile(model: Any, latents_1CTHW: Tensor, tile: Tile, frames_1CTHW: Tensor) -> None:
    """Decode one tile of a denormalised video [1, C, T, h, w] into `frames_1CTHW`, as it is before blending."""
    rows, columns = slice(tile.top, tile.top + tile.height), slice(tile.left, tile.left + tile.width)
    # What each causal convolution has seen, filled in the order in which they are called.
    caches: list[Any] = [None] * sum(1 for _ in model.decoder.modules())
    made = 0
    for t in range(latents_1CTHW.shape[2]):
        latent = model.post_quant_conv(latents_1CTHW[:, :, t : t + 1, rows, columns])
        decoded = model.decoder(latent, feat_cache=caches, feat_idx=[0], first_chunk=t == 0)
        frames_1CTHW[:, :, made : made + decoded.shape[2]] = decoded
        made += decoded.shape[2]


def unpacked(packed: Tensor, tiles: Sequence[Tile], frames: int) -> dict[Tile, Tensor]:
    """Views [1, 3, frames, H, W] of each tile in `packed`, which holds one tile after the other: a row for each latent
    position, of as many values as it becomes.
    """
    side = math.isqrt(packed.shape[1] // (3 * frames))
    parts = packed.split([tile.area for tile in tiles])
    return {
        tile: part.view(1, 3, frames, side * tile.height, side * tile.width)
        for tile, part in zip(tiles, parts, strict=True)
    }


def join_tiles(model: Any, tiles: Tiles, made: Mapping[Tile, Tensor]) -> Tensor:
    """The video [1, 3, frames, H, W], in -1..1, of the frames of its tiles; these are blended in place."""
    factor, stride = model.spatial_compression_ratio, (model.tile_sample_stride_height, model.tile_sample_stride_width)
    overlap = (model.tile_sample_min_height - stride[0], model.tile_sample_min_width - stride[1])
    last, some = tiles[-1][-1], made[tiles[0][0]]
    size = (factor * (last.top + last.height), factor * (last.left + last.width))
    video_1CTHW = some.new_empty(*some.shape[:3], *size)
    for i, row in enumerate(tiles):
        for j, tile in enumerate(row):
            blended = made[tile]
            if i > 0:
                blended = model.blend_v(made[tiles[i - 1][j]], blended, overlap[0])
            if j > 0:
                blended = model.blend_h(made[row[j - 1]], blended, overlap[1])
            top, left = factor * tile.top, factor * tile.left
            part = video_1CTHW[..., top : top + stride[0], left : left + stride[1]]
            part.copy_(blended[..., : part.shape[-2], : part.shape[-1]])
    return video_1CTHW.clamp_(-1, 1)

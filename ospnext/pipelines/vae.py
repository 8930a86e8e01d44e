"""Latents to frames: Wan's video autoencoder (diffusers' AutoencoderKLWan), from either checkpoint layout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ospnext.errors import CheckpointError, ConfigError
from ospnext.ops.device import Device
from ospnext.optional import require
from ospnext.pipelines.strict_load import build_and_load, read_json, read_pth, read_safetensors
from ospnext.pipelines.vae_memory import decode_peak
from ospnext.pipelines.vae_tiles import tiles_of_model

# Frames after the first, rows and columns per latent position. The transformer's latent shape is built on them.
TEMPORAL_FACTOR, SPATIAL_FACTOR = 4, 8

#: "on": decode in overlapping tiles that are blended, with a fraction of the memory and other pixels near the seams;
#: "auto": where the whole does not fit.
Tiling = Literal["auto", "on", "off"]

#: Of the tensors' bytes: `decode_peak` does not count the workspace of kernels. On an H200 a decode takes 1.15 to 1.16
#: times the bytes of its tensors, whole and in tiles (benchmarks/memory_plan.py).
WITH_WORKSPACE = 1.15


def with_workspace(tensors: int, device: torch.device) -> int:
    """Bytes that a decode takes whose tensors take `tensors`."""
    return tensors if Device(device).is_cpu else int(tensors * WITH_WORKSPACE)


def tiles(setting: Tiling, *, needed: int, free: int | None) -> bool:
    """Whether a decode whose tensors take `needed` bytes in one piece is tiled; `free` is None if unknown."""
    if setting not in get_args(Tiling):
        raise ConfigError(f"tiling must be one of {', '.join(get_args(Tiling))}; got {setting!r}")
    return setting == "on" or (setting == "auto" and free is not None and needed * WITH_WORKSPACE > free)


class VideoAutoencoder:
    """The decoder side of AutoencoderKLWan, with the normalisation of Wan's latents."""

    def __init__(self, model: Any) -> None:
        config = model.config
        factors = (config.scale_factor_temporal, config.scale_factor_spatial)
        if factors != (TEMPORAL_FACTOR, SPATIAL_FACTOR):
            raise CheckpointError(
                f"this autoencoder turns {factors[0]} frames and {factors[1]} pixels into one; ospnext runs Wan2.1's, "
                f"with {TEMPORAL_FACTOR} and {SPATIAL_FACTOR}"
            )
        self.model = model  # AutoencoderKLWan, whose attributes diffusers hides from type checkers

    @classmethod
    def from_diffusers(
        cls,
        directory: str | Path,
        *,
        dtype: torch.dtype | None = torch.float32,
        device: torch.device | str = "cpu",
    ) -> VideoAutoencoder:
        """From the folder `vae` of a diffusers checkpoint. `dtype=None` keeps the stored one."""
        directory = Path(directory)
        config = read_json(directory / "config.json")
        if config.get("_class_name") != "AutoencoderKLWan":
            raise CheckpointError(f"{directory} holds a {config.get('_class_name')!r}, expected an 'AutoencoderKLWan'")
        return cls(_load(config, read_safetensors(directory, "diffusion_pytorch_model"), directory, dtype, device))

    @classmethod
    def from_official(
        cls, path: str | Path, *, dtype: torch.dtype | None = torch.float32, device: torch.device | str = "cpu"
    ) -> VideoAutoencoder:
        """From Wan's `Wan2.1_VAE.pth`."""
        path = Path(path)
        official = read_pth(path)
        if "encoder.conv1.weight" not in official:
            raise CheckpointError(f"{path} does not hold Wan2.1's autoencoder; first names: {list(official)[:4]}")
        converter = require("diffusers.loaders.single_file_utils", extra="t2v").convert_wan_vae_to_diffusers
        config = {"base_dim": official["encoder.conv1.weight"].shape[0]}
        return cls(_load(config, converter(official), path, dtype, device))

    @property
    def latent_channels(self) -> int:
        return self.model.config.z_dim

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        return self.model.device

    def to(self, device: torch.device | str) -> VideoAutoencoder:
        self.model.to(device)
        return self

    def enable_tiling(self) -> None:
        """Decode in overlapping tiles that are blended: less memory, slightly different pixels near the seams."""
        self.model.enable_tiling()

    @torch.no_grad()
    def decode(self, latents_BCTHW: Tensor, *, tiling: Tiling = "auto") -> Tensor:
        """Normalised latents [B, C, T, h, w] to frames fp32 [B, 4(T-1)+1, 8h, 8w, 3] in 0..1, on this part's device.

        Videos are decoded one after the other: memory is that of one, and one 720p video takes 17 GiB untiled. After
        `enable_tiling`, "auto" is tiled, too.
        """
        latents_BCTHW = self.denormalise(latents_BCTHW)
        with self._tiled(self.needs_tiles(latents_BCTHW, tiling)):
            return torch.cat([self._decode_one(latents) for latents in latents_BCTHW.split(1)])

    def count_tiles(self, latents_BCTHW: Tensor) -> int:
        """Tiles in which `decode` works on these latents, if in any."""
        return sum(map(len, tiles_of_model(self.model, *latents_BCTHW.shape[3:])))

    def needs_tiles(self, latents_BCTHW: Tensor, tiling: Tiling = "auto") -> bool:
        """Whether `decode` of these latents would work on tiles now."""
        if tiling != "auto":
            return tiles(tiling, needed=0, free=0)
        if self.model.use_tiling:
            return True
        device, (t, h, w) = Device(self.device), latents_BCTHW.shape[2:]
        needed, free = decode_peak(self.model.config, (t, h, w), self.dtype), device.free_memory()
        if tiles(tiling, needed=needed, free=free) and not device.is_cpu:
            torch.accelerator.empty_cache()  # what sampling has left in the hands of the allocator is free, too
            free = device.free_memory()
        return tiles(tiling, needed=needed, free=free)

    @contextmanager
    def _tiled(self, wanted: bool) -> Iterator[None]:
        before = self.model.use_tiling
        self.model.use_tiling = wanted
        try:
            yield
        finally:
            self.model.use_tiling = before

    def denormalise(self, latents_BCTHW: Tensor) -> Tensor:
        """`latents * std + mean` per channel, in the autoencoder's dtype and on its device."""
        if latents_BCTHW.ndim != 5 or latents_BCTHW.shape[1] != self.latent_channels:
            raise ConfigError(
                f"latents must be [B, {self.latent_channels}, T, height/8, width/8], got {list(latents_BCTHW.shape)}"
            )
        latents_BCTHW = latents_BCTHW.to(self.device, self.dtype)
        mean, std = (
            latents_BCTHW.new_tensor(values).view(1, -1, 1, 1, 1)
            for values in (self.model.config.latents_mean, self.model.config.latents_std)
        )
        return latents_BCTHW * std + mean

    def _decode_one(self, latents_1CTHW: Tensor) -> Tensor:
        (video_1CTHW,) = self.model.decode(latents_1CTHW, return_dict=False)
        return in_0_1(video_1CTHW)

    def save(self, directory: Path) -> None:
        self.model.save_pretrained(directory)


def in_0_1(video_1CTHW: Tensor) -> Tensor:
    """Frames fp32 [1, T, H, W, C] of what a decoder gives, in -1..1."""
    return (video_1CTHW.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 4, 1)


def _load(
    config: dict[str, Any],
    weights: dict[str, Tensor],
    source: Path,
    dtype: torch.dtype | None,
    device: torch.device | str,
) -> Any:
    model_class = require("diffusers", extra="t2v").AutoencoderKLWan
    return build_and_load(lambda: model_class.from_config(config), weights, source, dtype=dtype, device=device)

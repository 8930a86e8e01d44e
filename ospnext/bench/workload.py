"""What a benchmark runs: a preset, perhaps with fewer layers, and the size of one video. Integers only, no tensors."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from ospnext.config import did_you_mean
from ospnext.errors import ConfigError
from ospnext.models.config import PRESETS as CONFIGS
from ospnext.models.config import TransformerConfig
from ospnext.sparse import Grid

PRESETS = {name.lower(): config for name, config in CONFIGS.items()}

#: (height, width). 1080p is 1088 lines, since sizes are multiples of 16.
RESOLUTIONS = {"480p": (480, 832), "720p": (720, 1280), "768p": (768, 1280), "1080p": (1088, 1920)}

#: Pixels per latent in space and frames per latent in time, of Wan's autoencoder.
SPATIAL, TEMPORAL = 8, 4


@dataclass(frozen=True)
class Workload:
    """One video of one model. `config` is the sparse form of the preset, with as many layers as are run."""

    preset: str
    config: TransformerConfig
    resolution: str
    height: int
    width: int
    frames: int

    @property
    def grid(self) -> Grid:
        """(T, H, W) in tokens."""
        t, h, w = self.latents
        pt, ph, pw = self.config.patch_size
        return t // pt, h // ph, w // pw

    @property
    def latents(self) -> tuple[int, int, int]:
        """(T, H, W) in latents."""
        return (self.frames - 1) // TEMPORAL + 1, self.height // SPATIAL, self.width // SPATIAL

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def shortened(self) -> bool:
        return self.config.num_layers != PRESETS[self.preset].num_layers

    def __str__(self) -> str:
        layers = f", {self.config.num_layers} of {PRESETS[self.preset].num_layers} layers" if self.shortened else ""
        size = f"{self.frames} frames of {self.height}x{self.width}, {self.tokens:,} tokens"
        return f"{self.preset} at {self.resolution} ({size}{layers})"


def workload(preset: str, resolution: str, frames: int = 81, layers: int | None = None) -> Workload:
    """Raises ConfigError: one of them is unknown or does not fit."""
    if preset not in PRESETS:
        raise ConfigError(f"unknown preset {preset!r}{did_you_mean(preset, PRESETS)}; presets: {', '.join(PRESETS)}")
    if frames < 1 or (frames - 1) % TEMPORAL:
        near = max(frames - 1, 0) // TEMPORAL * TEMPORAL + 1
        raise ConfigError(
            f"--frames {frames}: a latent holds {TEMPORAL} frames after the first; {near} or {near + TEMPORAL} fit"
        )
    height, width = _pixels(resolution)
    return Workload(preset, _with_layers(PRESETS[preset], layers), resolution, height, width, frames)


def _pixels(resolution: str) -> tuple[int, int]:
    if resolution in RESOLUTIONS:
        return RESOLUTIONS[resolution]
    step = 2 * SPATIAL
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", resolution)
    if match is None:
        raise ConfigError(
            f"unknown resolution {resolution!r}{did_you_mean(resolution, RESOLUTIONS)}; "
            f"resolutions: {', '.join(RESOLUTIONS)}, or HEIGHTxWIDTH such as 256x448"
        )
    height, width = int(match[1]), int(match[2])
    if height % step or width % step:
        raise ConfigError(f"resolution {resolution}: height and width must be multiples of {step}")
    return height, width


def _with_layers(config: TransformerConfig, layers: int | None) -> TransformerConfig:
    """The same pattern in fewer blocks: about the same share of full ones, some at each end where there is room."""
    if layers is None or layers == config.num_layers:
        return config
    if not 2 <= layers <= config.num_layers or layers % 2:
        raise ConfigError(f"--layers {layers}: give an even number from 2 to the preset's {config.num_layers}")
    share = config.num_full_blocks * layers / config.num_layers
    full = min(max(4, 4 * round(share / 4)), layers // 2 // 4 * 4)
    return config.replace(num_layers=layers, num_full_blocks=full)

"""The result of a pipeline call in the forms diffusers' WanPipeline returns. No models here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from torch import Tensor

from ospnext.optional import require
from ospnext.pipelines.video import to_uint8

if TYPE_CHECKING:
    from PIL.Image import Image

OutputType = Literal["np", "pt", "pil", "latent"]


@dataclass(frozen=True)
class OSPNextPipelineOutput:
    """`frames` by output type.

    "np": [B, T, H, W, 3] and "pt": [B, T, 3, H, W], both fp32 in 0..1. "pil": a list of images per video.
    "latent": the normalised latents, fp32 [B, C, T, h, w]. None on ranks that leave decoding to another one.
    """

    frames: np.ndarray | Tensor | list[list[Image]]


def format_frames(
    frames_BTHWC: Tensor, output_type: Literal["np", "pt", "pil"]
) -> np.ndarray | Tensor | list[list[Image]]:
    """Frames fp32 [B, T, H, W, 3] in 0..1, in the form that `output_type` names."""
    if output_type == "pt":
        return frames_BTHWC.permute(0, 1, 4, 2, 3)
    if output_type == "np":
        return frames_BTHWC.cpu().numpy()
    image = require("PIL.Image", extra="t2v")
    return [[image.fromarray(frame_HWC) for frame_HWC in video] for video in to_uint8(frames_BTHWC)]

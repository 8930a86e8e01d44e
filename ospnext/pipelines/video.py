"""Frames to a video file: H.264 in MP4, by PyAV. Nothing about models here."""

from __future__ import annotations

import os
import uuid
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ospnext.errors import ConfigError
from ospnext.optional import require

# ITU-T H.273 code points of BT.709 and of studio range. Without them a player guesses, by the height of the picture.
_BT709, _STUDIO_RANGE = 1, 1


def to_uint8(frames: np.ndarray | Tensor) -> np.ndarray:
    """Frames in 0..1, any float type and shape, to uint8 by rounding to nearest; values outside are clipped."""
    array = frames.detach().float().cpu().numpy() if isinstance(frames, Tensor) else np.asarray(frames)
    return np.rint(np.clip(array, 0, 1) * 255).astype(np.uint8)


def write_mp4(frames_THWC: np.ndarray | Tensor, path: str | Path, fps: float = 16, quality: float = 8) -> None:
    """Write uint8 frames [T, H, W, 3] as H.264, yuv420p, BT.709. H and W must be even: colour has half the resolution.

    `quality` 0..10 is the constant rate factor 50 - 4 * quality: 10 gives 10, 8 gives 18 (hard to tell from the
    source), 5 gives 30. The file appears under its name only when it is complete.
    """
    av = require("av", extra="t2v")
    frames_THWC = _checked_frames(frames_THWC)
    rate = _checked_rate(fps)
    if not isinstance(quality, (int, float)) or not 0 <= quality <= 10:
        raise ConfigError(f"quality must be a number from 0 to 10, got {quality!r}")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with av.open(str(temporary), "w", format="mp4", options={"movflags": "+faststart"}) as container:
            _encode(av, container, frames_THWC, rate, crf=50 - 4 * quality)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _encode(av: Any, container: Any, frames_THWC: np.ndarray, rate: Fraction, crf: float) -> None:
    # With mbtree, the same frames give other bytes from time to time: its threads depend on when each of them runs.
    options = {"crf": f"{crf:g}", "x264-params": "mbtree=0"}
    stream = container.add_stream("libx264", rate=rate, options=options)
    _, stream.height, stream.width, _ = frames_THWC.shape
    stream.pix_fmt = "yuv420p"
    codec = stream.codec_context
    codec.colorspace = codec.color_primaries = codec.color_trc = _BT709
    codec.color_range = _STUDIO_RANGE
    for i, frame_HWC in enumerate(frames_THWC):
        rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame_HWC), format="rgb24")
        frame = rgb.reformat(format="yuv420p", dst_colorspace=_BT709, dst_color_range=_STUDIO_RANGE)
        frame.pts, frame.time_base = i, 1 / rate
        container.mux(stream.encode(frame))
    container.mux(stream.encode())


def _checked_frames(frames: np.ndarray | Tensor) -> np.ndarray:
    found = getattr(frames, "dtype", type(frames).__name__)
    if found not in (np.uint8, torch.uint8):
        raise ConfigError(
            f"write_mp4 takes frames of dtype uint8, got {found}; ospnext.pipelines.to_uint8 converts floats in 0..1"
        )
    if isinstance(frames, Tensor):
        frames = frames.detach().cpu().numpy()
    if frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ConfigError(f"write_mp4 takes one video of shape [T, H, W, 3], got {list(frames.shape)}")
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise ConfigError(f"H.264 with yuv420p needs even height and width, got {height} x {width}; crop or pad them")
    return frames


def _checked_rate(fps: float) -> Fraction:
    if isinstance(fps, bool) or not isinstance(fps, (int, float, Fraction)) or not 0 < fps < 1000:
        raise ConfigError(f"fps must be a number above 0 and below 1000, got {fps!r}")
    return Fraction(fps).limit_denominator(1001)

"""MP4 files: what is written is read back with PyAV, and a failure leaves nothing behind."""

from __future__ import annotations

from dataclasses import dataclass

import av
import numpy as np
import pytest
import torch

from ospnext.errors import ConfigError
from ospnext.pipelines import to_uint8, write_mp4


@dataclass
class Decoded:
    frames: np.ndarray
    fps: float
    codec: str
    pix_fmt: str
    colorspace: int
    color_range: int
    pts: list[float]


def read_mp4(path) -> Decoded:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = list(container.decode(stream))
        return Decoded(
            np.stack([frame.to_ndarray(format="rgb24") for frame in frames]),
            float(stream.average_rate),
            stream.codec_context.name,
            stream.codec_context.pix_fmt,
            frames[0].colorspace,
            frames[0].color_range,
            [float(frame.pts * frame.time_base) for frame in frames],
        )


def smooth_clip(frames: int = 13, height: int = 48, width: int = 80) -> np.ndarray:
    """Slow waves with another phase per channel and per frame: swapped channels, axes or frames all cost PSNR."""
    t, y, x = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    waves = [np.sin(x / 25 + t / 5), np.cos(y / 20 - t / 7), np.sin((x + y) / 40 + t / 3)]
    return (127.5 + 100 * np.stack(waves, axis=-1)).round().astype(np.uint8)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b.astype(float)) ** 2))


def test_what_is_written_is_read_back(tmp_path):
    clip = smooth_clip()
    write_mp4(clip, tmp_path / "clip.mp4", fps=16)
    decoded = read_mp4(tmp_path / "clip.mp4")
    assert decoded.frames.shape == clip.shape
    assert (decoded.codec, decoded.pix_fmt, decoded.fps) == ("h264", "yuv420p", 16)
    assert (decoded.colorspace, decoded.color_range) == (1, 1)  # BT.709, studio range: no player has to guess
    assert decoded.pts == [i / 16 for i in range(13)]
    # Measured 39.2 dB; 8-bit YUV with half-resolution colour alone gives 42.1. A wrong colour matrix would give 32.7,
    # the neighbouring frame 24.8, red and blue swapped 20.4.
    assert min(psnr(a, b) for a, b in zip(decoded.frames, clip, strict=True)) > 37


def test_quality_orders_error_and_size(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)
    results = []
    for quality in (0, 5, 8, 10):
        path = tmp_path / f"{quality}.mp4"
        write_mp4(noise, path, quality=quality)
        results.append((path.stat().st_size, psnr(read_mp4(path).frames, noise)))
    assert results == sorted(results)
    assert len({size for size, _ in results}) == 4


@pytest.mark.parametrize(("fps", "expected"), [(24, 24), (29.97, 29.97), (7.5, 7.5)])
def test_frame_rates(tmp_path, fps, expected):
    write_mp4(smooth_clip(4), tmp_path / "clip.mp4", fps=fps)
    assert read_mp4(tmp_path / "clip.mp4").fps == pytest.approx(expected, rel=1e-4)


def test_tensors_strided_arrays_and_new_folders(tmp_path):
    clip = smooth_clip(3)
    write_mp4(torch.from_numpy(clip), tmp_path / "new" / "tensor.mp4")
    write_mp4(np.asfortranarray(clip), tmp_path / "new" / "strided.mp4")
    tensor, strided = (read_mp4(tmp_path / "new" / name).frames for name in ("tensor.mp4", "strided.mp4"))
    assert psnr(tensor, clip) > 37
    assert np.array_equal(tensor, strided)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_failure_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, error):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"old")
    convert = av.VideoFrame.from_ndarray
    calls = []

    class BreaksAtFrame120:
        @staticmethod
        def from_ndarray(array, format):
            calls.append(format)
            if len(calls) == 120:  # the encoder holds back some 50 frames: by now the file exists
                assert len(list(tmp_path.iterdir())) == 2
                raise error
            return convert(array, format=format)

    monkeypatch.setattr(av, "VideoFrame", BreaksAtFrame120)
    with pytest.raises(error):
        write_mp4(smooth_clip(frames=150, height=16, width=16), path)
    assert len(calls) == 120
    assert [file.name for file in tmp_path.iterdir()] == ["clip.mp4"]
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize(
    ("frames", "options", "message"),
    [
        (np.zeros((3, 8, 8, 3), np.float32), {}, "uint8, got float32"),
        (torch.zeros(3, 8, 8, 3), {}, "uint8, got torch.float32"),
        ([[0]], {}, "uint8, got list"),
        (np.zeros((8, 8, 3), np.uint8), {}, r"\[T, H, W, 3\], got \[8, 8, 3\]"),
        (np.zeros((3, 3, 8, 8), np.uint8), {}, r"\[T, H, W, 3\], got \[3, 3, 8, 8\]"),
        (np.zeros((0, 8, 8, 3), np.uint8), {}, r"got \[0, 8, 8, 3\]"),
        (np.zeros((3, 8, 9, 3), np.uint8), {}, "even height and width, got 8 x 9"),
        (np.zeros((3, 8, 8, 3), np.uint8), {"fps": 0}, "fps must be"),
        (np.zeros((3, 8, 8, 3), np.uint8), {"fps": float("nan")}, "fps must be"),
        (np.zeros((3, 8, 8, 3), np.uint8), {"quality": 11}, "from 0 to 10, got 11"),
    ],
)
def test_wrong_arguments_are_named_and_write_nothing(tmp_path, frames, options, message):
    with pytest.raises(ConfigError, match=message):
        write_mp4(frames, tmp_path / "clip.mp4", **options)
    assert list(tmp_path.iterdir()) == []


def test_to_uint8_rounds_to_nearest_and_clips():
    values = torch.tensor([-0.1, 0.0, 0.49 / 255, 0.51 / 255, 127.6 / 255, 1.0, 1.5])
    expected = [0, 0, 0, 1, 128, 255, 255]
    assert to_uint8(values).tolist() == to_uint8(values.numpy()).tolist() == expected
    assert to_uint8(torch.tensor([0.0, 1.0], dtype=torch.bfloat16)).tolist() == [0, 255]


def test_the_same_frames_are_the_same_file(tmp_path):
    """Smooth motion: an encoder that looks ahead in threads may decide otherwise from run to run."""
    t, y, x = np.meshgrid(np.arange(5), np.arange(64), np.arange(96), indexing="ij")
    frames = np.stack([4 * t + y + x, 2 * y + 9 * t, 2 * x], axis=-1).astype(np.uint8)
    files = []
    for i in range(10):
        write_mp4(frames, tmp_path / f"{i}.mp4")
        files.append((tmp_path / f"{i}.mp4").read_bytes())
    assert len(set(files)) == 1

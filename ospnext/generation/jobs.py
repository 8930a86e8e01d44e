"""From prompts and a configuration to videos: file name, seed, size and settings of each. No torch, no files."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ospnext.config import to_dict
from ospnext.errors import ConfigError
from ospnext.generation.config import MAX_SEED, GenerateConfig, VideoConfig
from ospnext.generation.prompt_files import LocatedPrompt, PromptRow
from ospnext.pipelines.prompts import WAN_NEGATIVE_PROMPT

T = TypeVar("T")

# File systems allow 255 bytes; the rest is for suffixes and for the temporary name while a video is being written.
MAX_STEM_BYTES = 150


@dataclass(frozen=True)
class VideoJob:
    """One video. `name` is its file's name; `seed` alone, whatever else is generated, decides its noise."""

    name: str
    prompt: str
    negative_prompt: str
    seed: int
    video: VideoConfig


@dataclass(frozen=True)
class Run:
    """A configuration with its videos: what `ospnext generate` was asked for."""

    config: GenerateConfig
    model: Path
    directory: Path
    jobs: tuple[VideoJob, ...]

    def settings(self, job: VideoJob) -> dict[str, Any]:
        """All that decides the content of a video's file, as JSON values: what a resumed run must agree on."""
        return {
            "prompt": job.prompt,
            "negative_prompt": job.negative_prompt,
            "seed": job.seed,
            **to_dict(job.video),
            "num_inference_steps": self.config.sampling.num_inference_steps,
            "guidance_scale": self.config.sampling.guidance_scale,
            "scheduler": to_dict(self.config.scheduler),
            "transformer": to_dict(self.config.transformer),
            "dtype": self.config.dtype,
            "vae_dtype": self.config.vae_dtype,
            "quant": self.config.quant,
            "quant_attn": self.config.quant_attn,
            "quant_policy": to_dict(self.config.quant_policy),
            "payload": None if self.config.parallel.payload == "plain" else self.config.parallel.payload,
            "model": str(self.model.resolve()),
        }


def make_jobs(config: GenerateConfig, prompts: Sequence[LocatedPrompt]) -> tuple[VideoJob, ...]:
    """`num_videos_per_prompt` jobs for each prompt, in order.

    Seeds: a row's own seed, else `config.seed` ("shared"), else `config.seed` plus the position ("per-prompt"); further
    videos of one prompt count on from there, so that no two videos of a run need the same batch to be made again.

    Raises:
        ConfigError: a row's size is not possible, or two ids give the same file name; the message has the row's place.
    """
    copies = config.sampling.num_videos_per_prompt
    jobs: list[tuple[VideoJob, str]] = []
    for position, (row, where) in enumerate(prompts):
        stem = file_stem(row.id, position)
        offset = 0 if config.seed_mode == "shared" else position * copies
        first_seed = _first_given(row.seed, config.seed + offset)
        video = _video_of_row(config.video, row, where)
        negative = _first_given(row.negative_prompt, config.sampling.negative_prompt, WAN_NEGATIVE_PROMPT)
        for copy in range(copies):
            if not 0 <= first_seed + copy <= MAX_SEED:
                raise ConfigError(f"{where}: the seed {first_seed + copy} is not between 0 and {MAX_SEED}")
            name = f"{stem}.mp4" if copies == 1 else f"{stem}_{copy}.mp4"
            jobs.append((VideoJob(name, row.prompt, negative, first_seed + copy, video), where))
    _require_distinct_names(jobs)
    return tuple(job for job, _ in jobs)


def file_stem(identifier: str | int | None, position: int) -> str:
    """`video_{position}`, or the id with everything but letters, digits, `.`, `_` and `-` replaced by `_`."""
    if identifier is None:
        return f"video_{position}"
    # A leading dot would hide the file, and a leading dash would make it look like an option.
    safe = re.sub(r"[^\w.-]", "_", str(identifier).strip()).lstrip(".-") or "_"
    return safe.encode()[:MAX_STEM_BYTES].decode(errors="ignore")


def _first_given(*values: T | None) -> T:
    return next(value for value in values if value is not None)


def _video_of_row(video: VideoConfig, row: PromptRow, where: str) -> VideoConfig:
    sizes = {name: getattr(row, name) for name in ("height", "width", "num_frames")}
    try:
        return dataclasses.replace(video, **{name: size for name, size in sizes.items() if size is not None})
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _require_distinct_names(jobs: Iterable[tuple[VideoJob, str]]) -> None:
    """Refuse two videos under one name; letter case does not tell files apart on every system."""
    first: dict[str, str] = {}
    for job, where in jobs:
        key = job.name.casefold()
        if key in first:
            raise ConfigError(f"{where}: the file name {job.name!r} is already taken by {first[key]}; change one id")
        first[key] = where

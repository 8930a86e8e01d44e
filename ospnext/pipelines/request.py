"""What a call of the pipeline asks for: checked, rounded to what the model can make, frozen. Computes no tensors."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from ospnext.errors import ConfigError
from ospnext.models.config import TransformerConfig
from ospnext.pipelines.output import OutputType
from ospnext.pipelines.vae import SPATIAL_FACTOR, TEMPORAL_FACTOR

CALLBACK_TENSORS = ("latents", "prompt_embeds", "negative_prompt_embeds")


@dataclass(frozen=True)
class TextRequest:
    """One side of guidance: prompts still to encode, or their embeddings. Exactly one of the two is set."""

    prompts: list[str] | None
    embeds: Tensor | None

    @property
    def count(self) -> int:
        if self.prompts is not None:
            return len(self.prompts)
        assert self.embeds is not None
        return len(self.embeds)


@dataclass(frozen=True)
class NoiseRequest:
    """Initial latents fp32 [B, C, T, h, w]: given, or drawn on the CPU."""

    shape: tuple[int, int, int, int, int]
    generators: list[torch.Generator] | None
    latents: Tensor | None


def text_request(
    prompt: str | Sequence[str] | None, embeds: Tensor | None, config: TransformerConfig, *, name: str = "prompt"
) -> TextRequest:
    """Either prompts or embeddings [P, L, text_dim] with L <= text_len, never both and never none."""
    if (prompt is None) == (embeds is None):
        fault = "one is needed" if prompt is None else "not both"
        raise ConfigError(f"pass either {name} or {name}_embeds, {fault}")
    if embeds is None:
        assert prompt is not None
        return TextRequest(_prompt_list(prompt, name), None)
    _require_tensor(embeds, f"{name}_embeds")
    fits = embeds.ndim == 3 and 1 <= embeds.shape[1] <= config.text_len and embeds.shape[2] == config.text_dim
    if not fits or not len(embeds):
        raise ConfigError(
            f"{name}_embeds must be [prompts, up to {config.text_len} tokens, {config.text_dim}] for this transformer, "
            f"got {list(embeds.shape)}"
        )
    return TextRequest(None, embeds)


def negative_request(
    prompt: str | Sequence[str] | None, embeds: Tensor | None, config: TransformerConfig, *, count: int
) -> TextRequest:
    """The unconditional side for `count` prompts: None is the empty prompt, and one string serves all of them."""
    if prompt is None and embeds is None:
        prompt = ""
    prompts = [prompt] * count if isinstance(prompt, str) else prompt
    request = text_request(prompts, embeds, config, name="negative_prompt")
    if request.count != count:
        raise ConfigError(f"there are {count} prompts but {request.count} negative ones; give a string, or one each")
    return request


def _prompt_list(prompt: object, name: str) -> list[str]:
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, (list, tuple)) or not prompts or not all(isinstance(text, str) for text in prompts):
        raise ConfigError(f"{name} must be a string or a non-empty list of strings, got {prompt!r}")
    return list(prompts)


def noise_request(
    config: TransformerConfig,
    *,
    videos: int,
    num_frames: int,
    height: int,
    width: int,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    latents: Tensor | None,
) -> NoiseRequest:
    """Round the video's size to the latent grid (a warning says so) and check latents and generators against it."""
    num_frames, height, width = _round_size(config, num_frames, height, width)
    frames = (num_frames - 1) // TEMPORAL_FACTOR + 1
    shape = (videos, config.in_dim, frames, height // SPATIAL_FACTOR, width // SPATIAL_FACTOR)
    if latents is not None:
        _require_tensor(latents, "latents")
        if latents.shape != shape:
            raise ConfigError(
                f"latents must be {list(shape)} for {videos} videos of {num_frames} frames, {height} x {width}; "
                f"got {list(latents.shape)}"
            )
    return NoiseRequest(shape, _generators(generator, videos), latents)


def _round_size(config: TransformerConfig, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
    multiples = [SPATIAL_FACTOR * patch for patch in config.patch_size[1:]]
    require_count("num_frames", num_frames)
    require_count("height", height, at_least=multiples[0])
    require_count("width", width, at_least=multiples[1])
    asked = (num_frames, height, width)
    # The first frame stands alone in the latents, each later position holds four. 80 frames become 81, as in diffusers.
    frames = num_frames if num_frames % TEMPORAL_FACTOR == 1 else num_frames // TEMPORAL_FACTOR * TEMPORAL_FACTOR + 1
    rounded = (frames, height - height % multiples[0], width - width % multiples[1])
    if rounded != asked:
        warnings.warn(
            f"num_frames must be 4k + 1, height a multiple of {multiples[0]} and width of {multiples[1]}: "
            f"{asked[0]} frames of {asked[1]} x {asked[2]} become {rounded[0]} of {rounded[1]} x {rounded[2]}",
            stacklevel=5,
        )
    return rounded


def _generators(generator: object, videos: int) -> list[torch.Generator] | None:
    if generator is None:
        return None
    generators = [generator] if isinstance(generator, torch.Generator) else generator
    if not isinstance(generators, (list, tuple)) or not all(isinstance(item, torch.Generator) for item in generators):
        raise ConfigError(f"generator must be a torch.Generator or a list of them, got {generator!r}")
    if len(generators) not in (1, videos):
        raise ConfigError(f"there are {len(generators)} generators for {videos} videos; give one, or one per video")
    devices = {item.device.type for item in generators} - {"cpu"}
    if devices:
        raise ConfigError(
            f"generator is on {', '.join(devices)}; noise is drawn on the CPU, so that a seed means the same noise on "
            "every device: use torch.Generator('cpu')"
        )
    return list(generators)


def check_settings(
    *,
    num_inference_steps: int,
    guidance_scale: float,
    num_videos_per_prompt: int,
    max_sequence_length: int,
    output_type: str,
    callback: object,
    callback_inputs: Sequence[str],
) -> None:
    """The arguments of a call that stand alone."""
    require_count("num_inference_steps", num_inference_steps)
    require_count("num_videos_per_prompt", num_videos_per_prompt)
    require_count("max_sequence_length", max_sequence_length)
    number = isinstance(guidance_scale, (int, float)) and not isinstance(guidance_scale, bool)
    if not number or not math.isfinite(guidance_scale):
        raise ConfigError(f"guidance_scale must be a finite number, got {guidance_scale!r}")
    if output_type not in get_args(OutputType):
        raise ConfigError(f"output_type must be one of {', '.join(get_args(OutputType))}, got {output_type!r}")
    if callback is not None and not callable(callback):
        raise ConfigError(f"callback_on_step_end must be callable, got {callback!r}")
    unknown = [name for name in callback_inputs if name not in CALLBACK_TENSORS]
    if unknown:
        raise ConfigError(
            f"callback_on_step_end_tensor_inputs may name {', '.join(CALLBACK_TENSORS)}; got {', '.join(unknown)}"
        )


def require_count(name: str, value: object, *, at_least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ConfigError(f"{name} must be an integer of at least {at_least}, got {value!r}")


def _require_tensor(value: object, name: str) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        found = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise ConfigError(f"{name} must be a floating-point tensor, got {found}")

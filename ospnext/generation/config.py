"""The configuration of `ospnext generate`: keys, defaults and the ranges of single values. No torch, no files."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

from ospnext.errors import ConfigError

# 8 pixels per latent cell times 2 latent cells per token; 4 frames per latent frame after the first.
SIZE_MULTIPLE = 16
FRAMES_PER_LATENT = 4
MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class VideoConfig:
    """Size in pixels, length in frames, frames per second, and the quality of the mp4 from 0 to 10."""

    height: int = 480
    width: int = 832
    num_frames: int = 81
    fps: float = 16
    quality: float = 8

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            _require_grid(f"video.{name}", getattr(self, name), SIZE_MULTIPLE, offset=0)
        _require_grid("video.num_frames", self.num_frames, FRAMES_PER_LATENT, offset=1)
        _require_range("video.fps", self.fps, 1, 240)
        _require_range("video.quality", self.quality, 0, 10)


@dataclass(frozen=True)
class SamplingConfig:
    """`negative_prompt` null is Wan's default one, empty text is none at all; `guidance_scale` 1 turns guidance off.
    `batched_guidance` "on" runs both branches of guidance in one forward, "auto" where that is faster and exact.
    """

    num_inference_steps: int = 50
    guidance_scale: float = 5.0
    negative_prompt: str | None = None
    num_videos_per_prompt: int = 1
    batched_guidance: Literal["auto", "on", "off"] = "auto"

    def __post_init__(self) -> None:
        _require_range("sampling.num_inference_steps", self.num_inference_steps, 1, 1000)
        _require_range("sampling.guidance_scale", self.guidance_scale, 0, 100)
        _require_range("sampling.num_videos_per_prompt", self.num_videos_per_prompt, 1, 10_000)


@dataclass(frozen=True)
class VaeConfig:
    """`tiling` "on" decodes in tiles that are blended, which takes less memory; "auto" where the whole does not fit.
    `parallel` "auto" divides tiles, where there are any, among the ranks that make a video; "on" always decodes in
    tiles, for any number of ranks; "off" leaves all to the first rank.
    """

    tiling: Literal["auto", "on", "off"] = "auto"
    parallel: Literal["auto", "on", "off"] = "auto"

    def __post_init__(self) -> None:
        if self.parallel == "on" and self.tiling == "off":
            raise ConfigError("vae.parallel=on divides tiles among ranks, vae.tiling=off makes none; change one")


@dataclass(frozen=True)
class SchedulerConfig:
    """null: what the checkpoint says. Setting `shift` alone also turns dynamic shifting off, which would ignore it."""

    shift: float | None = None
    use_dynamic_shifting: bool | None = None
    solver: Literal["euler", "unipc"] | None = None

    def __post_init__(self) -> None:
        if self.shift is not None and self.shift <= 0:
            raise ConfigError(f"scheduler.shift must be above 0, found {self.shift}")
        if self.shift is not None and self.use_dynamic_shifting:
            raise ConfigError("scheduler.shift has no effect with scheduler.use_dynamic_shifting=true; set one of them")


@dataclass(frozen=True)
class TransformerOverrides:
    """null: what the checkpoint says. `timestep_rounding` "bf16" repeats the rounding OSP-Next was trained with."""

    skiparse_model_type: Literal["full", "dual_end"] | None = None
    sparse_ratio: int | None = None
    num_full_blocks: int | None = None
    timestep_rounding: Literal["none", "bf16"] = "none"


@dataclass(frozen=True)
class QuantPolicyConfig:
    """What `quant` and `quant_attn` apply to, and how. Names are a list or text with commas; null is all that there is:
    the ten linears of a block, both attentions, and for `attention_blocks` what `blocks` says. Which names and blocks
    exist is judged with the model at hand.
    """

    linears: tuple[str, ...] | str | None = None
    attention: tuple[str, ...] | str | None = None
    blocks: str | int = "all"
    scale_mode: Literal["amax", "pow2"] = "amax"
    granularity: Literal["tensor", "row"] = "tensor"
    compat: Literal["none", "upstream_bf16"] = "none"
    attention_blocks: str | int | None = None

    def __post_init__(self) -> None:
        for name in ("linears", "attention"):
            given = getattr(self, name)
            if isinstance(given, str):
                object.__setattr__(self, name, tuple(word.strip() for word in given.split(",")))


@dataclass(frozen=True)
class ParallelSettings:
    """How the ranks that torchrun starts divide the work, see docs/parallel.md. Sizes: null is the best choice for the
    number of ranks. `payload` "hif8" sends the tokens that change ranks in 8 bits. `timeout`: seconds that a rank may
    wait for another one.
    """

    dp: int | None = None
    cfg: int | None = None
    ssp: int | None = None
    ulysses: int | None = None
    payload: Literal["plain", "hif8"] = "plain"
    timeout: float = 1800

    def __post_init__(self) -> None:
        _require_range("parallel.timeout", self.timeout, 1, 7 * 24 * 3600)


#: Keys of `quant_policy` that act on one of the two only; attention always has one scale per tensor.
_ACTS_ON = {
    "linears": ("quant",),
    "granularity": ("quant",),
    "attention": ("quant_attn",),
    "attention_blocks": ("quant_attn",),
}


@dataclass(frozen=True)
class GenerateConfig:
    """Everything `ospnext generate` can be told. Either `prompt` or `prompts` (a file) is set.

    `seed_mode` "per-prompt" gives every video its own noise (seed + position), "shared" the same noise to every prompt.
    `dtype` null is the checkpoint's own; `backend` null follows OSPNEXT_BACKEND. `quant` is for linears, `quant_attn`
    for q, k and v of attention; "hif8_native" lets kernels round probabilities and results of it to 8 bits as well.
    `compile` "blocks" compiles the transformer's blocks at the first video of each size, "max" the whole, which takes
    minutes.
    """

    model: str | None = None
    output: str = "outputs"
    prompt: str | None = None
    prompts: str | None = None
    seed: int = 0
    seed_mode: Literal["shared", "per-prompt"] = "per-prompt"
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    vae_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    backend: str | None = None
    compile: Literal["off", "blocks", "max"] = "off"
    quant: Literal["none", "hif8"] = "none"
    quant_attn: Literal["none", "hif8", "hif8_native"] = "none"
    video: VideoConfig = field(default_factory=VideoConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    vae: VaeConfig = field(default_factory=VaeConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    transformer: TransformerOverrides = field(default_factory=TransformerOverrides)
    quant_policy: QuantPolicyConfig = field(default_factory=QuantPolicyConfig)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)

    def __post_init__(self) -> None:
        _require_range("seed", self.seed, 0, MAX_SEED)
        for item in fields(QuantPolicyConfig):
            users = _ACTS_ON.get(item.name, ("quant", "quant_attn"))
            given = getattr(self.quant_policy, item.name)
            if given != item.default and all(getattr(self, user) == "none" for user in users):
                needed = " or ".join(f"{user}=hif8" for user in users)
                raise ConfigError(f"quant_policy.{item.name} has no effect without {needed}; set that, or leave it out")


def _require_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{name} must be between {low} and {high}, found {value}")


def _require_grid(name: str, value: int, step: int, offset: int) -> None:
    """Refuse a value that is not a positive `step * k + offset`, and name its neighbours."""
    if value >= max(1, offset) and (value - offset) % step == 0 and value > 0:
        return
    below = max((value - offset) // step * step + offset, offset or step)
    rule = f"a multiple of {step}" if offset == 0 else f"{step}k + {offset}"
    nearest = f"{below} or {below + step}" if value > below else str(below)
    raise ConfigError(f"{name} must be {rule}, found {value}; nearest: {nearest}")

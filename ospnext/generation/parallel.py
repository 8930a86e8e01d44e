"""How the ranks of a run divide it: the layout that its settings, checkpoint and videos allow, and what each rank does.
No process groups.
"""

from __future__ import annotations

from collections.abc import Sequence

from ospnext.diffusion import needs_guidance
from ospnext.errors import ConfigError
from ospnext.generation.config import GenerateConfig, VideoConfig
from ospnext.generation.jobs import Run, VideoJob
from ospnext.generation.videos import transformer_overrides
from ospnext.models.config import TransformerConfig
from ospnext.models.loading import inspect_checkpoint
from ospnext.models.parallelize import NOT_TRACED, divisible, rank_tokens
from ospnext.parallel.config import ALONE, DIMENSIONS, ParallelConfig
from ospnext.pipelines.layout import detect_layout
from ospnext.sparse import Grid


def layout_of(run: Run, world: int | None) -> ParallelConfig:
    """The layout of `world` ranks, or without ranks (None) the one that the settings name.

    Raises:
        ConfigError: it is not legal for the checkpoint, or another setting or a video does not go with it.
    """
    asked = run.config.parallel
    if world is None and all(getattr(asked, name) is None for name in DIMENSIONS) and asked.payload == "plain":
        return ALONE
    folder = detect_layout(run.model, ["transformer"]).transformer
    transformer = inspect_checkpoint(folder, config_overrides=transformer_overrides(run.config)).config
    return chosen_layout(run.config, transformer, run.jobs, world)


def chosen_layout(
    config: GenerateConfig, transformer: TransformerConfig, jobs: Sequence[VideoJob], world: int | None
) -> ParallelConfig:
    """As `layout_of`, for a transformer of this shape."""
    branches = 2 if needs_guidance(config.sampling.guidance_scale) else 1
    asked = {name: getattr(config.parallel, name) for name in DIMENSIONS}
    layout = ParallelConfig.chosen(divisible(transformer, branches), world, asked)
    if layout.cfg > 1 and config.sampling.batched_guidance == "on":
        raise ConfigError(
            "sampling.batched_guidance=on computes both branches of guidance in one forward, parallel.cfg=2 on "
            "different ranks; set parallel.cfg=1, or leave batched_guidance out"
        )
    if layout.sequence > 1:
        _require_shareable(config, layout)
        for video in dict.fromkeys(job.video for job in jobs):
            rank_tokens(transformer, token_grid(video), layout)
    if layout.ssp == 1 and config.parallel.payload != "plain":
        raise ConfigError(
            f"parallel.payload={config.parallel.payload} has no effect with ssp 1 ({layout}): leave it out"
        )
    return layout


def _require_shareable(config: GenerateConfig, layout: ParallelConfig) -> None:
    if config.compile != "off":
        raise ConfigError(f"compile={config.compile}: {NOT_TRACED}, and ranks share samples here ({layout})")
    if config.quant_policy.compat != "none":
        raise ConfigError(
            f"quant_policy.compat={config.quant_policy.compat} knows one process only, as upstream's code, and ranks "
            f"share samples here ({layout}): set parallel.ssp=1 parallel.ulysses=1, or compat=none"
        )


def token_grid(video: VideoConfig) -> Grid:
    return (video.num_frames - 1) // 4 + 1, video.height // 16, video.width // 16

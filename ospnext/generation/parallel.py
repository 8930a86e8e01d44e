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
from ospnext.parallel.config import ALONE, DIMENSIONS, Divisible, ParallelConfig, legal
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
    divides = divisible(transformer, branches)
    layout = ParallelConfig.chosen(divides, world, _completed(asked, config, divides, world))
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
            f"parallel.payload={config.parallel.payload} has no effect with ssp 1 ({layout}): leave it out, or "
            "take ssp 2 or more, as a run that is resumed with it needs"
        )
    return layout


def idle_replicas(layout: ParallelConfig, videos: int) -> str | None:
    """A line about replicas that have nothing to make; None if all have."""
    idle = layout.dp - videos
    if idle <= 0:
        return None
    said = "1 replica has" if idle == 1 else f"{idle} replicas have"
    return f"dp {layout.dp}: {said} no video; give more videos, a smaller parallel.dp, or fewer ranks"


def _completed(
    asked: dict[str, int | None], config: GenerateConfig, divides: Divisible, world: int | None
) -> dict[str, int | None]:
    """`asked`, with 1 for sizes that were not asked for and that other settings forbid. Unchanged where no layout has
    that: then the setting is refused by its name, and not sizes that nobody gave.
    """
    forbidden: set[str] = set()
    if config.compile != "off" or config.quant_policy.compat != "none":
        forbidden |= {"ssp", "ulysses"}
    if config.sampling.batched_guidance == "on":
        forbidden.add("cfg")
    wanted = {name: 1 if size is None and name in forbidden else size for name, size in asked.items()}
    given = {name: size for name, size in wanted.items() if size is not None}
    layouts = () if world is None else legal(divides, world)
    fits = any(all(getattr(layout, name) == size for name, size in given.items()) for layout in layouts)
    return wanted if fits else asked


def _require_shareable(config: GenerateConfig, layout: ParallelConfig) -> None:
    if config.compile != "off":
        raise ConfigError(
            f"compile={config.compile}: {NOT_TRACED}, and ranks share samples here ({layout}): "
            "set parallel.ssp=1 parallel.ulysses=1, or compile=off"
        )
    if config.quant_policy.compat != "none":
        raise ConfigError(
            f"quant_policy.compat={config.quant_policy.compat} knows one process only, as upstream's code, and ranks "
            f"share samples here ({layout}): set parallel.ssp=1 parallel.ulysses=1, or compat=none"
        )


def token_grid(video: VideoConfig) -> Grid:
    return (video.num_frames - 1) // 4 + 1, video.height // 16, video.width // 16

"""The two branches of guidance in one denoising run: their text, kept for all steps, and the velocity of a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ospnext.diffusion import BatchedGuidance, batches_branches, guide, needs_guidance
from ospnext.errors import ConfigError
from ospnext.models.attend import Attend
from ospnext.models.config import TransformerConfig
from ospnext.models.flops import forward_flops
from ospnext.models.memory import activation_peak
from ospnext.ops.device import Device
from ospnext.pipelines.replica import Replica
from ospnext.sparse import Grid

if TYPE_CHECKING:
    from ospnext.models import OSPNextTransformer, TextContext

Forward = Callable[[Tensor, Tensor, "TextContext"], Tensor]


class Branches:
    """Velocities of one run, with guidance if `text` has negative embeddings and the scale asks for it.

    `forward` is the transformer, perhaps compiled; `batched` says whether both branches share a call of it. Where
    `replica` divides the branches among ranks, this one computes its own and receives the other.
    """

    def __init__(
        self,
        transformer: OSPNextTransformer,
        forward: Forward,
        text: dict[str, Tensor | None],
        guidance_scale: float,
        *,
        batched: bool,
        replica: Replica | None = None,
    ) -> None:
        self._transformer, self._forward, self._scale = transformer, forward, guidance_scale
        self._batched, self._replica = batched, replica or Replica()
        self._divided = False
        self._forwards: list[tuple[Tensor, ...]] = []  # embeddings of the branches of each forward of a step
        self._contexts: list[TextContext] = []
        self.replace_text(text)

    @property
    def per_forward(self) -> int:
        """Branches that share a forward."""
        return len(self._forwards[0])

    def replace_text(self, text: dict[str, Tensor | None]) -> None:
        """Compute keys and values of the text where it is another tensor than before. Guidance ends and begins with
        the negative embeddings.
        """
        positive, negative = text["prompt_embeds"], text["negative_prompt_embeds"]
        if positive is None:
            raise ConfigError("prompt_embeds must be a tensor, but a callback made it None; leave it out to keep it")
        sides = [positive] if negative is None or not needs_guidance(self._scale) else [positive, negative]
        self._divided = self._replica.divides_branches and len(sides) > 1
        if self._divided:
            sides = [sides[self._replica.branch]]
        forwards: list[tuple[Tensor, ...]] = [tuple(sides)] if self._batched else [(side,) for side in sides]
        known = {_identity(embeds): context for embeds, context in zip(self._forwards, self._contexts, strict=True)}
        self._contexts = [
            known[_identity(embeds)] if _identity(embeds) in known else self._transformer.encode_text(torch.cat(embeds))
            for embeds in forwards
        ]
        self._forwards = forwards

    def velocity(self, latents_BCTHW: Tensor, timestep: Tensor) -> Tensor:
        """At latents [B, C, T, H, W] and a timestep [] on their device. Nothing here waits for the device."""
        timestep_B = timestep.expand(len(latents_BCTHW))
        if self.per_forward > 1:
            twice = torch.cat([latents_BCTHW, latents_BCTHW])
            v_cond, v_uncond = self._forward(twice, timestep_B.repeat(2), self._contexts[0]).chunk(2)
            return guide(v_cond, v_uncond, self._scale)
        v_cond, *others = [self._forward(latents_BCTHW, timestep_B, context) for context in self._contexts]
        if self._divided:
            v_cond, *others = self._replica.of_branches(v_cond)
        return guide(v_cond, others[0], self._scale) if others else v_cond


def _identity(embeds: tuple[Tensor, ...]) -> tuple[int, ...]:
    return tuple(map(id, embeds))


def batched(setting: BatchedGuidance, transformer: OSPNextTransformer, latents_BCTHW: Tensor) -> bool:
    """`batches_branches` for this transformer, latents and device."""
    config, videos, grid = transformer.config, len(latents_BCTHW), transformer.token_grid(latents_BCTHW)
    ranks = 1 if transformer.sequence is None else transformer.sequence.ranks
    return batches_branches(
        setting,
        block_flops=block_flops(config, grid, videos) / ranks,
        activations=sum(activation_peak(config, grid, 2 * videos, transformer.dtype).values()) // ranks,
        free=Device(transformer.device).free_memory() if setting == "auto" else 0,
        scales_span_batch=scales_span_batch(transformer),
    )


def block_flops(config: TransformerConfig, grid: Grid, videos: int) -> float:
    """Operations of a block for the videos of one branch, on average."""
    flops = forward_flops(config, grid)
    return videos * (flops.linear + flops.attention + flops.cross) / config.num_layers


def scales_span_batch(transformer: OSPNextTransformer) -> bool:
    """Whether some layer quantizes with one scale for a whole tensor, and so for all that share a batch."""
    modules = list(transformer.modules())
    attends = (module for module in modules if isinstance(module, Attend))
    if any(attend.recipe is not None or attend.round_trip is not None for attend in attends):
        return True
    recipes = (getattr(module, "recipe", None) for module in modules)
    return any(recipe is not None and recipe.granularity == "tensor" for recipe in recipes)

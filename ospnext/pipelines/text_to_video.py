"""The text-to-video pipeline: prompts in, videos out, as with diffusers' WanPipeline. No kernels, no file formats."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
from torch import Tensor

from ospnext.diffusion import SOLVERS, BatchedGuidance, FlowMatchSchedule, make_solver, needs_guidance
from ospnext.errors import ConfigError, OSPNextError
from ospnext.models.parallelize import share_samples
from ospnext.optional import require
from ospnext.pipelines import storage, vae_sharing
from ospnext.pipelines.branches import Branches, batched
from ospnext.pipelines.compile import CompiledTransformer, CompileMode
from ospnext.pipelines.output import OSPNextPipelineOutput, OutputType, format_frames
from ospnext.pipelines.replica import Replica
from ospnext.pipelines.request import (
    NoiseRequest,
    TextRequest,
    check_settings,
    negative_request,
    noise_request,
    require_count,
    text_request,
)
from ospnext.pipelines.text_encoder import TextEncoder
from ospnext.pipelines.vae import Tiling, VideoAutoencoder
from ospnext.pipelines.vae_sharing import Parallel

if TYPE_CHECKING:
    from ospnext.models import OSPNextTransformer
    from ospnext.models.quant_policy import QuantPolicy
    from ospnext.parallel.mesh import Mesh

StepCallback = Callable[["OSPNextPipeline", int, Tensor, dict[str, Tensor | None]], dict[str, Tensor] | None]


class OSPNextPipeline:
    """Text encoder, transformer and autoencoder, sampled along a flow-matching schedule.

    `schedule` and `solver` ("euler" or "unipc") may be assigned between calls. `text_encoder` may be None if embeddings
    are passed, `vae` if `output_type="latent"` is asked for: set either to None to free its memory.

    How it runs may be assigned too: `compile` "blocks" or "max" compiles the transformer, in place, at the first call
    for each size; `batched_guidance` "on" runs both branches of guidance in one forward, "auto" does where that is
    faster and changes roundings only; `vae_tiling` "on" decodes in tiles that are blended, with other pixels near the
    seams, "auto" does where memory would not hold the whole; `vae_parallel` "auto" divides tiles, where there are any,
    among the ranks that `share` a video, "on" always decodes in tiles and divides them, "off" leaves all to the first.
    `decided` says what the last call did: "batched", "tiled", "shared" (the decode).
    """

    def __init__(
        self,
        transformer: OSPNextTransformer,
        text_encoder: TextEncoder | None,
        vae: VideoAutoencoder | None,
        *,
        schedule: FlowMatchSchedule | None = None,
        solver: str = "unipc",
        compile: CompileMode = "off",
        batched_guidance: BatchedGuidance = "auto",
        vae_tiling: Tiling = "auto",
        vae_parallel: Parallel = "auto",
    ) -> None:
        storage.check_fit(transformer.config, text_encoder, vae)
        if solver not in SOLVERS:
            raise ConfigError(f"unknown solver {solver!r}; solvers: {', '.join(SOLVERS)}")
        self.transformer = transformer
        self.text_encoder = text_encoder
        self.vae = vae
        self.schedule = schedule or FlowMatchSchedule()
        self.solver = solver
        self.batched_guidance, self.vae_tiling, self.vae_parallel = batched_guidance, vae_tiling, vae_parallel
        self._require_choices()
        self._compiled = CompiledTransformer(transformer, compile)
        self._replica = Replica()
        self.decided: dict[str, bool] = {}
        self._interrupt = False
        self._progress_bar_config: dict[str, Any] = {}

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype | None = None,
        vae_dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        transformer: OSPNextTransformer | None = None,
        text_encoder: TextEncoder | EllipsisType | None = ...,
        vae: VideoAutoencoder | EllipsisType | None = ...,
        transformer_overrides: dict[str, Any] | None = None,
        timestep_rounding: Literal["none", "bf16"] = "none",
        quant: QuantPolicy | None = None,
        compile: CompileMode = "off",
        batched_guidance: BatchedGuidance = "auto",
        vae_tiling: Tiling = "auto",
        vae_parallel: Parallel = "auto",
    ) -> OSPNextPipeline:
        """Load a local checkpoint in diffusers' layout or in that of an official Wan download.

        `dtype` is that of the transformer and the text encoder; None keeps what is stored. A part that is passed is
        not loaded; `text_encoder=None` or `vae=None` leaves it out. `transformer_overrides` changes config fields, such
        as `{"skiparse_model_type": "full"}`. `quant` makes layers compute in HiFloat8, with weights that are stored as
        codes and can no longer be trained. An incomplete checkpoint is a CheckpointError, never random weights.
        """
        parts = storage.load_parts(
            Path(path),
            dtype=dtype,
            vae_dtype=vae_dtype,
            device=device,
            transformer=transformer,
            text_encoder=text_encoder,
            vae=vae,
            transformer_overrides=transformer_overrides,
            timestep_rounding=timestep_rounding,
            quant=quant,
        )
        return cls(
            **parts,
            compile=compile,
            batched_guidance=batched_guidance,
            vae_tiling=vae_tiling,
            vae_parallel=vae_parallel,
        )

    def save_pretrained(self, directory: str | Path) -> None:
        """Write diffusers' layout; `diffusers.WanPipeline.from_pretrained` opens it too (a sparse one as dense).

        A WanPipeline checkpoint already at `directory` is replaced; a folder with anything else in it is an error.
        """
        if self.text_encoder is None or self.vae is None:
            raise ConfigError("save_pretrained writes whole pipelines, but the text encoder or the autoencoder is None")
        storage.save_parts(
            directory, self.transformer, self.text_encoder, self.vae, self.schedule, self.solver, overwrite=True
        )

    def to(self, device: torch.device | str) -> OSPNextPipeline:
        for part in (self.transformer, self.text_encoder, self.vae):
            if part is not None:
                part.to(device)
        return self

    def share(self, mesh: Mesh | None) -> OSPNextPipeline:
        """Make videos together with the other ranks of a replica of `mesh`; None makes this pipeline work alone again.

        All of them then make the same calls with the same arguments. The first encodes text, gives the others text and
        noise, and gets the frames: the others need no text encoder, and get `frames=None`, or the latents if these are
        asked for. Tiles of the decode are divided if every rank has an autoencoder (see `vae_parallel`); one without
        makes the first decode alone. Callbacks run on all ranks and must do the same on each.

        Raises:
            ConfigError: the transformer is compiled, or quantizes in a form that ranks cannot share.
        """
        share_samples(self.transformer, None if mesh is None else mesh.sequence)
        self._replica = Replica(mesh)
        return self

    @property
    def compile(self) -> CompileMode:
        """How the transformer runs."""
        return self._compiled.mode

    @compile.setter
    def compile(self, mode: CompileMode) -> None:
        before, self._compiled = self._compiled, CompiledTransformer(self.transformer, mode)
        before.undo()

    def set_progress_bar_config(self, **options: Any) -> None:
        """Options of tqdm for the bar over the steps. By default it is drawn only when stderr is a terminal."""
        self._progress_bar_config = options

    @property
    def interrupt(self) -> bool:
        """Whether sampling stops early: a callback sets `pipe._interrupt = True`, as with diffusers; calls reset it."""
        return self._interrupt

    def encode_prompt(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        do_classifier_free_guidance: bool = True,
        max_sequence_length: int = 512,
    ) -> tuple[Tensor, Tensor | None]:
        """(prompt_embeds, negative_prompt_embeds), each [P, text_len, text_dim], to be passed to a later call.

        With them the text encoder is no longer needed: `pipe.text_encoder = None` frees it before the transformer runs.
        """
        config = self.transformer.config
        request = text_request(prompt, None, config)
        negative = None
        if do_classifier_free_guidance:
            negative = negative_request(negative_prompt, None, config, count=request.count)
        require_count("max_sequence_length", max_sequence_length)
        self._require_parts([request, negative], decode=False)
        embeds = self._embed(request, 1, max_sequence_length)
        return embeds, None if negative is None else self._embed(negative, 1, max_sequence_length)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        height: int = 480,
        width: int = 832,
        num_frames: int = 81,
        num_inference_steps: int = 50,
        guidance_scale: float = 5.0,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: OutputType = "np",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = 512,
    ) -> OSPNextPipelineOutput | tuple[Any]:
        """Sample videos; names, order, defaults and outputs are those of diffusers' WanPipeline.

        Sizes are rounded to what the model can make, with a warning. Noise is drawn on the CPU from `generator` (one or
        one per video), the same for every device. `guidance_scale <= 1` turns guidance off and halves the work.
        `negative_prompt=None` is the empty prompt; Wan's own is `ospnext.pipelines.WAN_NEGATIVE_PROMPT`. Text is cut at
        `max_sequence_length` tokens or the transformer's `text_len`, and always padded to the latter, as in training.
        Videos of one prompt follow each other in the batch.
        """
        check_settings(
            num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, output_type=output_type,
            num_videos_per_prompt=num_videos_per_prompt, max_sequence_length=max_sequence_length,
            callback=callback_on_step_end, callback_inputs=callback_on_step_end_tensor_inputs,
        )  # fmt: skip
        self._require_choices()
        config = self.transformer.config
        positive = text_request(prompt, prompt_embeds, config)
        negative = None
        if needs_guidance(guidance_scale):
            negative = negative_request(negative_prompt, negative_prompt_embeds, config, count=positive.count)
        noise = noise_request(
            config, videos=positive.count * num_videos_per_prompt, num_frames=num_frames, height=height, width=width,
            generator=generator, latents=latents,
        )  # fmt: skip
        self._require_parts([positive, negative], decode=output_type != "latent")

        text: dict[str, Tensor | None] = {
            name: None if side is None else self._embed(side, num_videos_per_prompt, max_sequence_length)
            for name, side in (("prompt_embeds", positive), ("negative_prompt_embeds", negative))
        }
        x_BCTHW = self._denoise(
            self._initial_latents(noise), text, num_inference_steps, guidance_scale,
            callback_on_step_end, callback_on_step_end_tensor_inputs,
        )  # fmt: skip
        frames: Any = x_BCTHW
        if output_type != "latent":
            decoded = self._decode(x_BCTHW)
            frames = None if decoded is None else format_frames(decoded, output_type)
        return OSPNextPipelineOutput(frames) if return_dict else (frames,)

    def _require_choices(self) -> None:
        known = {"batched_guidance": BatchedGuidance, "vae_tiling": Tiling, "vae_parallel": Parallel}
        for name, choices in known.items():
            if getattr(self, name) not in get_args(choices):
                listing = ", ".join(get_args(choices))
                raise ConfigError(f"{name} must be one of {listing}; got {getattr(self, name)!r}")
        if self.vae_parallel == "on" and self.vae_tiling == "off":
            raise ConfigError("vae_parallel='on' divides tiles among ranks, vae_tiling='off' makes none; change one")

    def _require_parts(self, texts: Sequence[TextRequest | None], *, decode: bool) -> None:
        if not self._replica.leads:
            if self.vae is None and decode and self.vae_parallel == "on":
                raise ConfigError("this rank has no autoencoder, and vae_parallel='on' needs one on each: load it")
            return
        if self.text_encoder is None and any(text is not None and text.prompts is not None for text in texts):
            raise ConfigError(
                "this pipeline has no text encoder: pass prompt_embeds, and with guidance negative_prompt_embeds too"
            )
        if self.vae is None and decode:
            raise ConfigError("this pipeline has no autoencoder: ask for output_type='latent'")

    def _embed(self, request: TextRequest, videos_per_prompt: int, max_tokens: int) -> Tensor:
        """[P * videos_per_prompt, text_len, text_dim] on the transformer's device; padded by zero rows, as in Wan."""
        text_len, text_dim = self.transformer.config.text_len, self.transformer.config.text_dim
        embeds = request.embeds
        if not self._replica.leads:
            embeds = torch.zeros(request.count, text_len, text_dim)
        elif embeds is None:
            encoder, prompts = cast(TextEncoder, self.text_encoder), cast(list[str], request.prompts)
            embeds = encoder.encode(prompts, min(max_tokens, text_len))
        embeds_PLC = embeds.to(self.transformer.device, self.transformer.dtype)
        embeds_PLC = torch.nn.functional.pad(embeds_PLC, (0, 0, 0, text_len - embeds_PLC.shape[1]))
        return self._replica.from_first(embeds_PLC).repeat_interleave(videos_per_prompt, dim=0)

    def _initial_latents(self, noise: NoiseRequest) -> Tensor:
        return self._replica.from_first(self._noise(noise).to(self.transformer.device, torch.float32))

    def _noise(self, noise: NoiseRequest) -> Tensor:
        if noise.latents is not None:
            return noise.latents
        if noise.generators is None or len(noise.generators) == 1:
            draws = [(noise.shape, noise.generators[0] if noise.generators else None)]
        else:
            draws = [((1, *noise.shape[1:]), generator) for generator in noise.generators]
        return torch.cat(
            [torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu") for shape, generator in draws]
        )

    def _denoise(
        self,
        latents_BCTHW: Tensor,
        text: dict[str, Tensor | None],
        num_steps: int,
        guidance_scale: float,
        callback: StepCallback | None,
        callback_inputs: Sequence[str],
    ) -> Tensor:
        _, patch_h, patch_w = self.transformer.config.patch_size
        spatial_tokens = latents_BCTHW.shape[3] // patch_h * (latents_BCTHW.shape[4] // patch_w)
        # On the CPU: the loop and the solver read single sigmas, and reading them from a device would make it wait.
        sigmas = self.schedule.sigmas(num_steps, spatial_tokens=spatial_tokens)
        # Uploaded at once: each upload waits for all that the device has been given before.
        timesteps = self.schedule.timesteps(sigmas[:-1]).to(latents_BCTHW.device)
        solver = make_solver(self.solver, sigmas)
        together = needs_guidance(guidance_scale) and self._batched(latents_BCTHW)
        if self._compiled.transformer is not self.transformer:  # which may be assigned
            self.compile = self._compiled.mode
        branches = Branches(
            self.transformer, self._compiled, text, guidance_scale, batched=together, replica=self._replica
        )
        self.decided = {"batched": branches.per_forward > 1}
        self._compiled.prepare(latents_BCTHW, len(latents_BCTHW) * branches.per_forward)
        self._interrupt = False
        with self._progress_bar(num_steps) as bar:
            for i, timestep in enumerate(timesteps):
                latents_BCTHW = solver.step(i, branches.velocity(latents_BCTHW, timestep), latents_BCTHW)
                if callback is not None:
                    offered = {"latents": latents_BCTHW, **text}
                    changed = callback(self, i, timestep, {name: offered[name] for name in callback_inputs}) or {}
                    latents_BCTHW = changed.get("latents", latents_BCTHW)
                    text |= {name: changed[name] for name in text.keys() & changed.keys()}
                    branches.replace_text(text)
                    self._compiled.prepare(latents_BCTHW, len(latents_BCTHW) * branches.per_forward)
                bar.update()
                if self._interrupt:
                    break
        return latents_BCTHW

    def _batched(self, latents_BCTHW: Tensor) -> bool:
        if self._replica.divides_branches:
            if self.batched_guidance == "on":
                raise ConfigError(
                    "batched_guidance='on' is one forward for both branches, which are on different ranks"
                )
            return False
        wanted = batched(self.batched_guidance, self.transformer, latents_BCTHW)
        return self._replica.all_agree(wanted, latents_BCTHW.device)

    def _decode(self, latents_BCTHW: Tensor) -> Tensor | None:
        """Frames on the rank that leads, None elsewhere."""
        if not torch.isfinite(latents_BCTHW).all():
            raise OSPNextError(
                "the latents are not finite after sampling: a kernel or a number format overflowed. Try bfloat16 or "
                "float32, or OSPNEXT_BACKEND=reference; 'ospnext explain' says which kernel serves what"
            )
        frames_BTHWC, decided = vae_sharing.decode(
            self.vae, latents_BCTHW, self._replica, tiling=self.vae_tiling, parallel=self.vae_parallel
        )
        self.decided |= decided
        return frames_BTHWC

    def _progress_bar(self, total: int) -> Any:
        # disable=None is tqdm's own "only when the output is a terminal".
        return require("tqdm", extra="t2v").tqdm(total=total, **{"disable": None, **self._progress_bar_config})

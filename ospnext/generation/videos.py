"""The working half of `ospnext generate`: the pipeline as configured, and each video with its manifest entry."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from ospnext import atomic
from ospnext.diffusion import FlowMatchSchedule
from ospnext.generation.backend_choice import backend_record
from ospnext.generation.config import SIZE_MULTIPLE, GenerateConfig, SchedulerConfig, VideoConfig
from ospnext.generation.jobs import Run, VideoJob
from ospnext.generation.manifest import append_entry, sha256_of
from ospnext.generation.quantization import quant_policy, require_fit, require_reportable
from ospnext.models.loading import inspect_checkpoint
from ospnext.models.quant_report import QuantReport
from ospnext.models.quantization import prepare_for_inference
from ospnext.optional import require
from ospnext.pipelines.layout import detect_layout
from ospnext.pipelines.output import OSPNextPipelineOutput
from ospnext.pipelines.text_to_video import OSPNextPipeline
from ospnext.pipelines.vae_sharing import may_share
from ospnext.pipelines.video import to_uint8, write_mp4
from ospnext.version import __version__

if TYPE_CHECKING:
    from ospnext.parallel.mesh import Mesh

REPORT_NAME = "quant_report.json"


def check_checkpoint(run: Run) -> None:
    """Everything about the checkpoint that file names and headers tell; reads no weights.

    Raises:
        CheckpointError, ConfigError: parts are missing, tensors do not fit the config, or an override or quantization
            is not possible.
    """
    layout = detect_layout(run.model, ("transformer", "text_encoder", "vae"))
    report = inspect_checkpoint(layout.transformer, config_overrides=transformer_overrides(run.config))
    require_fit(quant_policy(run.config), report)
    require("av", extra="t2v")  # else it would be missed only once the first video had been sampled


def check_quant_report(run: Run) -> None:
    """Before weights are read: ConfigError if there is nothing that --report-quant could count."""
    transformer = detect_layout(run.model, ["transformer"]).transformer
    require_reportable(quant_policy(run.config), inspect_checkpoint(transformer))


def load_pipeline(run: Run, device: torch.device, mesh: Mesh | None = None) -> OSPNextPipeline:
    """The checkpoint's pipeline on `device`, with the configured dtypes, quantization, transformer overrides, schedule
    and solver. A rank of a mesh shares its videos; it loads the text encoder only if it leads, and the autoencoder if
    it may have to decode.
    """
    config = run.config
    decodes = mesh is None or mesh.leads or may_share(config.vae.tiling, config.vae.parallel, mesh.config.replica)
    leading = mesh is None or mesh.leads
    pipeline = OSPNextPipeline.from_pretrained(
        run.model,
        dtype=None if config.dtype is None else getattr(torch, config.dtype),
        vae_dtype=getattr(torch, config.vae_dtype),
        device=device,
        text_encoder=... if leading else None,
        vae=... if decodes else None,
        transformer_overrides=transformer_overrides(config),
        timestep_rounding=config.transformer.timestep_rounding,
        quant=quant_policy(config),
        compile=config.compile,
        batched_guidance=config.sampling.batched_guidance,
        vae_tiling=config.vae.tiling,
        vae_parallel=config.vae.parallel,
    )
    pipeline.schedule = configured_schedule(pipeline.schedule, config.scheduler)
    pipeline.solver = config.scheduler.solver or pipeline.solver
    prepare_for_inference(pipeline.transformer)
    return pipeline if mesh is None else pipeline.share(mesh)


@contextmanager
def quant_reported(pipeline: OSPNextPipeline, directory: Path) -> Iterator[None]:
    """Count what HiFloat8 does to the transformer meanwhile; at the end print the table and write REPORT_NAME."""
    with QuantReport(pipeline.transformer) as report:
        yield
    print(report.table())
    atomic.write_text(directory / REPORT_NAME, json.dumps(report.as_dict(), indent=2) + "\n")


def configured_schedule(schedule: FlowMatchSchedule, config: SchedulerConfig) -> FlowMatchSchedule:
    """The checkpoint's schedule with what `config` sets; a shift turns dynamic shifting off, which would ignore it."""
    if config.shift is not None:
        schedule = dataclasses.replace(schedule, shift=config.shift, dynamic_shift=False)
    if config.use_dynamic_shifting is not None:
        schedule = dataclasses.replace(schedule, dynamic_shift=config.use_dynamic_shifting)
    return schedule


def make_video(
    run: Run, job: VideoJob, pipeline: OSPNextPipeline, device: torch.device, mesh: Mesh | None = None
) -> dict[str, Any] | None:
    """Sample and encode one video, add its manifest entry, and only then give the file its name. Returns the entry.

    Ranks of a mesh that do not lead take part in sampling and perhaps decoding, write nothing and return None.
    """
    started = time.perf_counter()
    sampling = run.config.sampling
    output = pipeline(
        prompt=job.prompt,
        negative_prompt=job.negative_prompt,
        height=job.video.height,
        width=job.video.width,
        num_frames=job.video.num_frames,
        num_inference_steps=sampling.num_inference_steps,
        guidance_scale=sampling.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(job.seed),
    )
    if mesh is not None and not mesh.leads:
        return None
    frames_THWC = cast(np.ndarray, cast(OSPNextPipelineOutput, output).frames)[0]
    # A folder of its own, because an interruption at any point then leaves nothing behind.
    with tempfile.TemporaryDirectory(dir=run.directory, prefix=".writing-") as folder:
        unnamed = Path(folder) / job.name
        write_mp4(to_uint8(frames_THWC), unnamed, job.video.fps, job.video.quality)
        entry = {
            "file": job.name,
            **run.settings(job),
            **_schedule_record(pipeline, job.video, sampling.num_inference_steps),
            "backend": backend_record(device),
            "execution": _execution_record(run.config, pipeline, mesh),
            "versions": {"ospnext": __version__, "torch": torch.__version__},
            "seconds": round(time.perf_counter() - started, 3),
            "sha256": sha256_of(unnamed),
        }
        # The entry goes first: an entry without its video is made again, a video without its entry would be a riddle.
        append_entry(run.directory, entry, 0 if mesh is None else mesh.place.dp)
        os.replace(unnamed, run.directory / job.name)
    return entry


def _execution_record(config: GenerateConfig, pipeline: OSPNextPipeline, mesh: Mesh | None) -> dict[str, Any]:
    """How a video was computed, as asked for and as decided: on record, but a resumed run may have it otherwise."""
    return {
        "compile": config.compile,
        "batched_guidance": config.sampling.batched_guidance,
        "vae_tiling": config.vae.tiling,
        "vae_parallel": config.vae.parallel,
        **pipeline.decided,
        **({} if mesh is None else {"ranks": dataclasses.asdict(mesh.config)}),
    }


def transformer_overrides(config: GenerateConfig) -> dict[str, Any]:
    names = ("skiparse_model_type", "sparse_ratio", "num_full_blocks")
    values = {name: getattr(config.transformer, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def _schedule_record(pipeline: OSPNextPipeline, video: VideoConfig, num_steps: int) -> dict[str, Any]:
    """What was really sampled along; the hash tells two runs apart whose schedules were described alike."""
    spatial_tokens = video.height // SIZE_MULTIPLE * (video.width // SIZE_MULTIPLE)
    sigmas = pipeline.schedule.sigmas(num_steps, spatial_tokens=spatial_tokens)
    return {
        "solver": pipeline.solver,
        "shift": pipeline.schedule.shift_for(spatial_tokens),
        "sigmas_sha256": hashlib.sha256(sigmas.numpy().astype("<f4").tobytes()).hexdigest(),
    }

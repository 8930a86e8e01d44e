"""`ospnext generate`: reads the command line, checks everything that can be checked, and only then loads the model."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ospnext import atomic
from ospnext.cli import EXIT_INTERRUPTED
from ospnext.cli.ranks import Ranks, ranks_of_command
from ospnext.config import leaf_keys, nearest_key, parse_overrides, read_yaml, resolve, to_dict
from ospnext.errors import ConfigError
from ospnext.generation.config import GenerateConfig
from ospnext.generation.jobs import Run, VideoJob, make_jobs
from ospnext.generation.manifest import merge_parts
from ospnext.generation.prompt_files import LocatedPrompt, PromptRow, read_prompts
from ospnext.generation.resume import unfinished
from ospnext.yaml_text import dump_yaml

if TYPE_CHECKING:
    import torch

    from ospnext.parallel.config import ParallelConfig

HELP = """Generate videos. Writes video_0.mp4, ... (or ID.mp4), config.yaml and manifest.jsonl to the output folder.

Settings come from the command line, then --config, then the defaults; --print-config shows the result. Any setting can
be given as key=value, the value as a YAML scalar (null, true, 5.0, text):
  ospnext generate "a red fox in snow" --model DIR video.num_frames=33 sampling.guidance_scale=4
A word is taken as a setting if it begins with the name of a known key or section and ends it with =, as in seed=1; any
other word is the prompt. After -- everything is the prompt.

A prompt file has one prompt per line, or JSONL rows with the keys prompt, negative_prompt, seed, num_frames, height,
width and id. Video i gets the seed + i (seed_mode=per-prompt), or every prompt the same noise (seed_mode=shared); with
the seed in the manifest a video can be made again on its own.

quant=hif8 computes linears in HiFloat8, with weights of one byte; quant_attn=hif8 sends q, k and v of attention through
it, and quant_attn=hif8_native computes on their 8 bits where a kernel can. quant_policy.* says which layers and how;
names are a list or text with commas:
  ospnext generate "a red fox in snow" --model DIR quant=hif8 quant_policy.linears=ffn.0,ffn.2 quant_policy.blocks=2-37
--report-quant counts what falls off either end of the format, and writes quant_report.json next to the videos.

compile=blocks compiles the transformer's blocks at the first video of each size (seconds), compile=max all of it
(minutes). sampling.batched_guidance and vae.tiling are decided by size and memory unless they are on or off; --dry-run
says how. Tiling changes pixels near seams, the others mostly roundings; --resume may change all three.

On several devices, each process of torchrun takes one; they divide the branches of guidance (parallel.cfg), the tokens
of a video (parallel.ssp, parallel.ulysses) and videos (parallel.dp), by themselves unless sizes are given, and the
tiles of a decode unless vae.parallel=off:
  torchrun --nproc-per-node 8 -m ospnext generate "a red fox in snow" --model DIR parallel.dp=2"""

OPTIONS = ("model", "output", "prompts", "seed", "backend")  # each sets the key of its name
_SETTING = re.compile(r"([a-z_]+)(\.[a-z_]+)*=")
COMMAND_LINE = "command line"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="*", metavar="PROMPT | key=value", help="the prompt, and settings")
    parser.add_argument("--model", metavar="DIR", help="checkpoint folder, in diffusers' or Wan's layout")
    parser.add_argument("--output", metavar="DIR", help="folder for the videos (default: outputs)")
    parser.add_argument("--prompts", metavar="FILE", help="prompt file, instead of PROMPT")
    parser.add_argument("--seed", metavar="N", type=int, help="seed of the first video (default: 0)")
    parser.add_argument("--backend", metavar="NAME", help="where to run; wins over OSPNEXT_BACKEND")
    parser.add_argument("--config", metavar="YAML", help="file with settings")
    parser.add_argument("--resume", action="store_true", help="keep videos that are finished and make the others")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, and stop")
    parser.add_argument("--print-config", action="store_true", help="print the resolved settings as YAML and stop")
    parser.add_argument("--report-quant", action="store_true", help="count what HiFloat8 saturates and loses")
    parser.add_argument("--quiet", action="store_true", help="no progress bars, only a line per video")
    parser.set_defaults(verbatim=[])


def run(args: argparse.Namespace) -> int:
    with ranks_of_command() as ranks:
        return _run(args, ranks)


def _run(args: argparse.Namespace, ranks: Ranks) -> int:
    with ranks.in_step():
        config = read_config(args)
        asked = None if args.print_config else _asked(config)
        todo = [] if asked is None else unfinished(asked, resume=args.resume)
    if asked is None:
        ranks.say(dump_yaml(to_dict(config)).rstrip("\n"))
        return 0
    if len(todo) < len(asked.jobs):
        ranks.say(f"{len(asked.jobs) - len(todo)} of {len(asked.jobs)} videos are already in {asked.directory}")
    if not todo and not args.dry_run and ranks.world is None:
        return 0
    return _generate(args, asked, todo, ranks)


def _asked(config: GenerateConfig) -> Run:
    if config.model is None:
        raise ConfigError("no model was given; add --model DIR (`ospnext init-random --output DIR` writes one to try)")
    model, directory = Path(config.model).expanduser(), Path(config.output).expanduser()
    asked = Run(config, model, directory, make_jobs(config, _prompts(config)))
    _require_writable(directory)
    return asked


def read_config(args: argparse.Namespace) -> GenerateConfig:
    """Defaults, then --config, then the command line."""
    given = _command_line_values(args)
    layers = [(COMMAND_LINE, given)]
    if args.config:
        values = read_yaml(args.config)
        if given.keys() & {"prompt", "prompts"}:  # either of them replaces whichever the file has
            values = {key: value for key, value in values.items() if key not in ("prompt", "prompts")}
        layers.insert(0, (args.config, values))
    return resolve(GenerateConfig, *layers)


def split_words(words: Sequence[str], verbatim: Sequence[str]) -> tuple[str | None, list[str]]:
    """(prompt, settings) among the positional words; those in `verbatim` came after `--` and are never settings.

    Raises:
        ConfigError: more than one prompt, or a word that looks like a setting with a misspelled key.
    """
    known = {key.partition(".")[0] for key in leaf_keys(GenerateConfig)}
    prompts, settings = [], []
    for word in words:
        match = _SETTING.match(word)
        if match and match[1] in known:
            settings.append(word)
            continue
        meant = match and nearest_key(GenerateConfig, match[0][:-1])
        if match and (meant or not re.search(r"\s", word)):
            raise ConfigError(
                f"{word!r} looks like a setting, but {match[1]!r} is no key{meant}. "
                "If it is a prompt, put it after -- or into a file for --prompts"
            )
        prompts.append(word)
    prompts += verbatim
    if len(prompts) > 1:
        listing = ", ".join(map(repr, prompts))
        raise ConfigError(
            f"{len(prompts)} prompts were given: {listing}; quote a prompt that has spaces, "
            "and put several prompts into a file for --prompts"
        )
    return (prompts[0] if prompts else None), settings


def _command_line_values(args: argparse.Namespace) -> dict[str, Any]:
    prompt, settings = split_words(args.words, args.verbatim)
    values = parse_overrides(settings)
    options = {name: getattr(args, name) for name in OPTIONS} | {"prompt": prompt}
    for name, value in options.items():
        if value is None:
            continue
        if name in values:
            raise ConfigError(f"{name!r} was given twice, as {name}={values[name]} and as {value!r}; leave one out")
        values[name] = value
    if {"prompt", "prompts"} <= values.keys():
        raise ConfigError("both a prompt and a prompt file were given; leave one out")
    return values


def _prompts(config: GenerateConfig) -> tuple[LocatedPrompt, ...]:
    if config.prompts is not None and config.prompt is not None:
        raise ConfigError("the settings have both `prompt` and `prompts`; leave one out")
    if config.prompts is not None:
        return read_prompts(Path(config.prompts).expanduser())
    if config.prompt is None or not config.prompt.strip():
        raise ConfigError("no prompt was given; add one in quotes, or --prompts FILE")
    return (LocatedPrompt(PromptRow(config.prompt), COMMAND_LINE),)


def _require_writable(directory: Path) -> None:
    """Refuse an output folder that cannot be written or created; creates nothing."""
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ConfigError(f"--output {directory}: {existing} is a file; give a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"--output {directory}: no permission to write in {existing}; give another folder")


def _generate(args: argparse.Namespace, run: Run, todo: Sequence[VideoJob], ranks: Ranks) -> int:
    from ospnext.generation import videos  # torch is imported from here on, diffusers and transformers later still
    from ospnext.generation.backend_choice import chosen_backend
    from ospnext.generation.parallel import idle_replicas, layout_of

    with ExitStack() as stack:
        with ranks.in_step():
            device = ranks.device(stack.enter_context(chosen_backend(run.config.backend)))
            videos.check_checkpoint(run)
            layout = layout_of(run, ranks.world)
            if args.report_quant:
                _check_report(run, ranks)
            if layout.world > 1 and ranks.world is None and not args.dry_run:
                raise ConfigError(
                    f"the layout {layout} needs {layout.world} processes, this is one: start it with "
                    f"`torchrun --nproc-per-node {layout.world} -m ospnext generate ...`"
                )
        with ranks.in_step():
            ranks.agree(_facts(run, todo), device)
        if not todo and not args.dry_run:
            return 0
        if args.dry_run:
            if ranks.first:
                from ospnext.generation.plan import make_plan

                local = None if ranks.launch is None else ranks.launch.local_world
                print(make_plan(run, todo, device, layout, local).text())
            return 0
        with ranks.in_step():
            if ranks.first:
                run.directory.mkdir(parents=True, exist_ok=True)
                merge_parts(run.directory)
                atomic.write_text(run.directory / "config.yaml", dump_yaml(to_dict(run.config)))
        if idle := idle_replicas(layout, len(todo)):
            ranks.say(idle)
        return _make_videos(args, run, todo, device, layout, ranks)


def _facts(run: Run, todo: Sequence[VideoJob]) -> dict[str, str]:
    """What must be the same on all ranks: settings, and which videos the output folder has."""
    values: dict[str, Any] = {"videos to make": ", ".join(job.name for job in todo)}
    for name, value in to_dict(run.config).items():
        section = value if isinstance(value, dict) else {}
        values |= {f"{name}.{key}": inner for key, inner in section.items()} or {name: value}
    return {name: str(value) for name, value in values.items()}


def _check_report(run: Run, ranks: Ranks) -> None:
    from ospnext.generation import videos

    if run.config.compile != "off":
        raise ConfigError("--report-quant looks into layers, which a compiled graph has not; use compile=off")
    if ranks.world is not None:
        raise ConfigError("--report-quant counts what one process computes; leave it out, or start one process")
    videos.check_quant_report(run)


def _make_videos(
    args: argparse.Namespace,
    run: Run,
    todo: Sequence[VideoJob],
    device: torch.device,
    layout: ParallelConfig,
    ranks: Ranks,
) -> int:
    from ospnext.generation import videos

    show_progress = sys.stderr.isatty() and not args.quiet and ranks.first
    parallel, finished = run.config.parallel, 0
    try:
        with ranks.watched(parallel.timeout):
            mesh = ranks.mesh(layout, device, parallel.timeout, parallel.payload)
            if show_progress:
                print(f"loading {run.model} for {device}", file=sys.stderr)
            with ranks.in_step(parallel.timeout):
                _require_shared(run)
                pipeline = videos.load_pipeline(run, device, mesh)
            with videos.quant_reported(pipeline, run.directory) if args.report_quant else nullcontext():
                for i, job in enumerate(todo):
                    if mesh is not None and i % layout.dp != mesh.place.dp:
                        continue
                    pipeline.set_progress_bar_config(disable=not show_progress, desc=job.name, leave=False)
                    entry = videos.make_video(run, job, pipeline, device, mesh)
                    finished += 1
                    if entry is not None:
                        size = f"{job.video.num_frames} frames of {job.video.height}x{job.video.width}"
                        line = f"{run.directory / job.name}  {size}, seed {job.seed}, {entry['seconds']:.1f} s"
                        print(f"[{i + 1}/{len(todo)}] {line}", flush=True)
            ranks.wait_for_all()
            if ranks.first:
                merge_parts(run.directory)
    except KeyboardInterrupt:
        if ranks.first:
            made = f"{finished} of {len(todo)} videos were made" if layout.dp == 1 else "videos that were made are kept"
            print(f"interrupted: {made}; the same command with --resume makes the rest", file=sys.stderr)
        return ranks.ended(EXIT_INTERRUPTED)
    return 0


def _require_shared(run: Run) -> None:
    """Every rank must see what the first has written, or each host would have some of the videos."""
    if not (run.directory / "config.yaml").exists():
        raise ConfigError(f"--output {run.directory}: not the folder of rank 0; give one that all hosts share")

"""`ospnext bench model`: time one denoising forward of the whole model, in several variants, and say where it goes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ospnext.errors import ConfigError

HELP = """Time one denoising forward (one branch of guidance) of a model with random weights, and say where it goes.

  ospnext bench model --preset 14b --resolution 720p,768p --variants dense,osp,osp-hif8,osp-hif8-attn
  ospnext bench model --preset 14b --layers 10 --variants dense,osp --against diffusers --json bench.json --out bench.md
  ospnext bench model --preset tiny --resolution 64x96 --frames 9                    # on a CPU, in seconds

Variants: dense (Wan2.1), osp (Skiparse-2D), osp-hif8 (HiFloat8 linears with scales per tensor, as published),
osp-hif8-row, osp-hif8-fast (and sums of 14 bits), osp-hif8-attn(-fast) (8-bit attention). The text is encoded
before. What each part of a forward takes stands next to what its kernels take alone, measured in the same run.
docs/performance.md explains the report. Exits with 1 if a variant failed; the others are measured all the same."""

COMPILE = ("off", "blocks", "max")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", default="14b", metavar="NAME", help="14b, 1.3b or tiny (default: 14b)")
    parser.add_argument(
        "--resolution",
        default="720p",
        metavar="LIST",
        help="comma-separated: 480p, 720p, 768p, 1080p or HEIGHTxWIDTH (default: 720p)",
    )
    parser.add_argument("--frames", type=int, default=81, metavar="N", help="frames of the video (default: 81)")
    parser.add_argument("--layers", type=int, metavar="N", help="a shorter model of the same pattern")
    parser.add_argument(
        "--variants", default="dense,osp,osp-hif8", metavar="LIST", help="(default: dense,osp,osp-hif8)"
    )
    parser.add_argument(
        "--compile",
        choices=COMPILE,
        default="off",
        help="blocks: one graph for all alike; max: one for the forward, kernels tuned, in minutes (default: off)",
    )
    parser.add_argument("--against", choices=("diffusers",), help="time diffusers' compiled model as well")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="timed forwards of each (default: 3)")
    parser.add_argument("--backend", metavar="NAME", help="wins over OSPNEXT_BACKEND")
    parser.add_argument("--device", help="device to run on, e.g. a second card (default: the backend's first)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers here, after each variant")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the report (Markdown) here, after each variant")
    parser.add_argument("--quiet", action="store_true", help="say nothing about progress")


def run(args: argparse.Namespace) -> int:
    import json

    from ospnext import atomic
    from ospnext.bench import report, variants
    from ospnext.bench.device import chosen_device
    from ospnext.bench.rows import Row
    from ospnext.bench.session import Session
    from ospnext.bench.versions import versions
    from ospnext.bench.workload import workload
    from ospnext.generation.backend_choice import chosen_backend
    from ospnext.optional import require

    if args.repeats < 1:
        raise ConfigError(f"--repeats {args.repeats}: at least one forward must be timed")
    for path in filter(None, (args.json, args.out)):
        atomic.check_writable(path)
    if args.against == "diffusers":
        require("diffusers", extra="t2v")
    sizes = [word.strip() for word in args.resolution.split(",") if word.strip()]
    works = tuple(workload(args.preset, size, args.frames, args.layers) for size in dict.fromkeys(sizes))
    if not works:
        raise ConfigError(f"--resolution {args.resolution!r} names none")
    with chosen_backend(args.backend) as default:
        device = chosen_device(args.device, default)
        session = Session(
            device,
            works,
            variants.named(args.variants),
            compile=args.compile,
            repeats=args.repeats,
            against_diffusers=args.against == "diffusers",
            tell=(lambda line: None) if args.quiet else lambda line: print(line, file=sys.stderr, flush=True),
        )
        found, rows = versions(device) | {"settings": _settings(args)}, list[Row]()
        for row in session.rows():
            rows.append(row)
            if args.json:
                atomic.write_text(args.json, json.dumps(report.document(rows, found), indent=2) + "\n")
            if args.out:
                atomic.write_text(args.out, report.markdown(rows, found))
    print(report.markdown(rows, found))
    return 1 if any(row.error for row in rows) else 0


def _settings(args: argparse.Namespace) -> dict[str, str | int]:
    """What the result depends on, by option, so that a file says how it was made."""
    names = (
        "preset",
        "resolution",
        "frames",
        "layers",
        "variants",
        "compile",
        "against",
        "repeats",
        "backend",
        "device",
    )
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}

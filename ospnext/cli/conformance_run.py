"""`ospnext conformance run`: run the suite on a backend and write the report."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = """Run the conformance suite on a backend.

  ospnext conformance run --backend reference --level required
  ospnext conformance run --backend acme --device acme:0 --out report
  ospnext conformance run --backend acme --case 'attention/*-needle*' --case 'model/*'
  ospnext conformance run --backend acme --shard 1/4 --out report     # four of these make one report folder
  ospnext conformance run --backend ascend --host-npu                 # without an NPU; see docs/host_npu.md

Every implementation that the backend declares is run on every check whose request it takes. --out writes report.json
and report.md; `ospnext conformance verify` checks them without running anything. Exits with 1 if anything failed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", metavar="NAME", help="the backend to run (default: OSPNEXT_BACKEND)")
    parser.add_argument(
        "--level", default="required,optional,extension", metavar="LEVELS", help="comma-separated; default: all three"
    )
    parser.add_argument(
        "--case", action="append", default=[], metavar="GLOB", help="only checks whose id matches; repeatable"
    )
    parser.add_argument("--device", help="device to run on, e.g. a second card (default: the backend's first)")
    parser.add_argument("--shard", default="1/1", metavar="I/N", help="run part I of N")
    parser.add_argument("--waivers", type=Path, metavar="FILE", help="known failures, see docs/conformance.md")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for report.json and report.md")
    parser.add_argument(
        "--host-npu", action="store_true", help="emulate an Ascend NPU in host memory, with the vendor's own torch_npu"
    )
    parser.add_argument("--quiet", action="store_true", help="print failures and the last line only")


def run(args: argparse.Namespace) -> int:
    if args.host_npu:
        return _run_on_host_npu([word for word in args.command_line if word != "--host-npu"])
    from ospnext.conformance import render
    from ospnext.conformance.progress import Progress
    from ospnext.conformance.session import Session, named_backend, parse_levels, parse_shard, succeeded

    session = Session(
        named_backend(args.backend),
        device=args.device,
        levels=parse_levels(args.level),
        patterns=args.case,
        shard=parse_shard(args.shard),
        waivers=args.waivers,
        out=args.out,
    )
    with Progress(len(session.steps)) as progress:
        for step, result in session.run():
            progress.advance(ok=result.status in ("pass", "unsupported"), label=step.label)
    report = session.finish()
    text = render.summary(report, str(args.out) if args.out else None)
    print(text.splitlines()[-1] if args.quiet and succeeded(report) else text)
    return 0 if succeeded(report) else 1


def _run_on_host_npu(command_line: list[str]) -> int:
    """The same command in a process that has the emulated device, which is there from `import torch` on or never."""
    from ospnext.conformance import host_npu

    return host_npu.run(["-c", "import sys; from ospnext.cli import main; sys.exit(main())", *command_line])

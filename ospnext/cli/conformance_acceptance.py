"""`ospnext conformance device-acceptance`: ask a device what only it can answer."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = """Ask a device what no document and no other machine can answer, and say what each answer means for the backend.

  ospnext conformance device-acceptance --backend ascend --dry-run            # the questions; needs no device
  ospnext conformance device-acceptance --backend ascend --out acceptance     # on the device
  ospnext conformance device-acceptance --backend ascend --item 'cast/*'      # some of them, again
  ospnext conformance device-acceptance --backend ascend --host-npu           # on an emulation: tests the questions

Meant for the first hour on new hardware, before the conformance suite. An item that fails, hangs or loses the device
ends no other. --out keeps acceptance.json and acceptance.md, written after every item. Exits with 1 if an answer
differs from what the backend relies on, or an item that this machine could answer could not run."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", metavar="NAME", required=True, help="the backend whose questions are asked")
    parser.add_argument(
        "--item", action="append", default=[], metavar="GLOB", help="only items whose id matches; repeatable"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for acceptance.json and acceptance.md")
    parser.add_argument("--dry-run", action="store_true", help="print the checklist, and ask nothing")
    parser.add_argument(
        "--host-npu", action="store_true", help="emulate an Ascend NPU in host memory, with the vendor's own torch_npu"
    )


def run(args: argparse.Namespace) -> int:
    from ospnext.conformance import host_npu
    from ospnext.conformance.acceptance import render
    from ospnext.conformance.acceptance.ask import items_of, words_of
    from ospnext.conformance.acceptance.run import Acceptance, select_items, succeeded

    listed = [words_of(item) for item in items_of(args.backend, None)]
    chosen = select_items(listed, args.item, args.backend)
    if args.dry_run:
        print(render.plan(args.backend, chosen))
        return 0
    variables = host_npu.environment() if args.host_npu else None
    acceptance = Acceptance(args.backend, patterns=args.item, variables=variables, out=args.out)
    print(render.head(acceptance.report()), flush=True)
    for record in acceptance.run():
        print(render.line(record), flush=True)
    found = acceptance.report()
    print(f"\n{render.summary(found, str(args.out) if args.out else None)}")
    return 0 if succeeded(found) else 1

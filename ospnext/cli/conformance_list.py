"""`ospnext conformance list`: the ids of the checks."""

from __future__ import annotations

import argparse

HELP = """Print the ids of the conformance checks, one a line, in order.

  ospnext conformance list --level required
  ospnext conformance list --backend acme --case 'attention/*'     # with the backend's own extension checks"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", metavar="NAME", help="include this backend's extension checks")
    parser.add_argument(
        "--level", default="required,optional,extension", metavar="LEVELS", help="comma-separated; default: all three"
    )
    parser.add_argument("--case", action="append", default=[], metavar="GLOB", help="only ids that match; repeatable")


def run(args: argparse.Namespace) -> int:
    from ospnext.conformance import matrix
    from ospnext.conformance.session import named_backend, parse_levels
    from ospnext.ops import use_backend
    from ospnext.ops.registry import registry

    manifest = None
    if args.backend:
        with use_backend(args.backend):
            manifest = registry().manifests[named_backend(args.backend)]
    for check in matrix.select_checks(matrix.all_checks(manifest), parse_levels(args.level), args.case):
        print(check.id)
    return 0

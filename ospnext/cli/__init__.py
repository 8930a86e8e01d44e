"""The `ospnext` command: picks the subcommand and turns errors into exit codes. Each subcommand is a module of its own.

A subcommand module has `HELP` (its description), `add_arguments(parser)` and `run(args) -> exit code`. It is imported
only when it is called, so that `ospnext --help` costs nothing.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

from ospnext.config import did_you_mean
from ospnext.errors import ConfigError, OSPNextError
from ospnext.launch import on_rank

# name, of one or two words: (module, one line for `ospnext --help`)
COMMANDS = {
    "generate": ("ospnext.cli.generate", "generate videos from prompts"),
    "convert": ("ospnext.cli.convert", "rewrite a transformer checkpoint in another naming, dtype or sharding"),
    "init-random": ("ospnext.cli.init_random", "write a checkpoint with random weights, for trying things out"),
    "doctor": ("ospnext.cli.doctor", "say what this machine can run, and why not more"),
    "explain": ("ospnext.cli.explain", "say which kernel would run an operator, and why"),
    "plan": ("ospnext.cli.plan", "predict how a number of devices would share a model: layouts, memory, bytes, time"),
    "tune": ("ospnext.cli.tune", "time every kernel at a model's shapes, and write down which is fastest here"),
    "bench model": ("ospnext.cli.bench_model", "time a denoising forward of the whole model, and say where it goes"),
    "conformance run": ("ospnext.cli.conformance_run", "judge a backend by the conformance suite"),
    "conformance list": ("ospnext.cli.conformance_list", "print the ids of the conformance checks"),
    "conformance verify": ("ospnext.cli.conformance_verify", "check a conformance report without running anything"),
    "conformance device-acceptance": (
        "ospnext.cli.conformance_acceptance",
        "ask new hardware what only a device can answer",
    ),
}

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line as every other error is reported: one `error:` line, no usage dump."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; `{self.prog} --help` shows what can be given")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code: 0, 2 for an error that was foreseen, 130 for Ctrl-C."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            return _run(list(sys.argv[1:] if argv is None else argv))
    except OSPNextError as error:
        print(f"error{on_rank()}: {error}", file=sys.stderr)
        return EXIT_ERROR
    except RuntimeError as error:
        # From `import torch`, which loads what vendors' packages tell it to.
        if "Failed to load the backend extension" not in str(error):
            raise
        cause = str(error.__cause__ or error).strip().splitlines()[0]
        print(f"error: import torch: {error} Cause: {cause}. `ospnext doctor` says what is lacking", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output (head, less) has closed it: nothing is wrong
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run(argv: list[str]) -> int:
    if not argv or argv[0].startswith("-"):
        _top_parser().parse_args(argv or ["--help"])
        return 0
    words = 2 if any(name.startswith(f"{argv[0]} ") for name in COMMANDS) else 1
    name, rest = " ".join(argv[:words]), argv[words:]
    if words == 2 and (len(argv) == 1 or argv[1].startswith("-")):
        _top_parser(argv[0]).parse_args(argv[1:] or ["--help"])
        return 0
    if name not in COMMANDS:
        raise ConfigError(f"unknown command {name!r}{did_you_mean(name, COMMANDS)}; commands: {', '.join(COMMANDS)}")
    command = importlib.import_module(COMMANDS[name][0])
    parser = Parser(
        prog=f"ospnext {name}",
        description=command.HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_arguments(parser)
    # Words after `--` are kept apart for a command that takes them as they are (it declares a default for `verbatim`).
    split = rest.index("--") if "--" in rest and parser.get_default("verbatim") is not None else len(rest)
    args = parser.parse_intermixed_args(rest[:split])
    args.verbatim = rest[split + 1 :]
    args.command_line = argv
    return command.run(args)


def _show_warning(message: Warning | str, category: type, filename: str, lineno: int, file=None, line=None) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _top_parser(group: str = "") -> argparse.ArgumentParser:
    """The parser that only has --help and --version; a `group` is the first word of the commands that it lists."""
    shown = {name: summary for name, (_, summary) in COMMANDS.items() if name.startswith(group)}
    width = max(map(len, shown))
    listing = "\n".join(f"  {name:<{width}}  {summary}" for name, summary in shown.items())
    parser = Parser(
        prog=f"ospnext {group}".strip(),
        usage=f"ospnext {group or 'COMMAND'} ...",
        description="OSP-Next text-to-video on any accelerator.",
        epilog=f"commands:\n{listing}\n\n`ospnext COMMAND --help` explains a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=_version())
    return parser


def _version() -> str:
    from ospnext.version import __version__

    return f"ospnext {__version__}"

"""`python -m ospnext.conformance.host_npu SCRIPT [ARGUMENTS]`: run a program on the host NPU.

Takes what Python takes: a script, `-m MODULE` or `-c CODE`, each with arguments."""

from __future__ import annotations

import os
import sys

from ospnext.errors import OSPNextError

from .launch import environment

USAGE = "usage: python -m ospnext.conformance.host_npu (SCRIPT | -m MODULE | -c CODE) [ARGUMENTS]"


def main(arguments: list[str]) -> int:
    """Become the program; returns only when it cannot be started."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"{__doc__}\n\n{USAGE}" if arguments else USAGE, file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    try:
        variables = environment()
    except OSPNextError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return os.execve(sys.executable, [sys.executable, *arguments], variables)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

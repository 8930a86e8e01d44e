"""The process that has the device: `python -m ospnext.conformance.acceptance.worker BACKEND`.

It reads ids of items, one a line, and answers each with a line of JSON. It may die or hang; run.py sees to that."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from typing import Any

from ospnext.errors import OSPNextError
from ospnext.ops.registry import registry

from .. import report
from ..runner import default_device, is_lost
from .ask import ask, items_of, words_of


def main(backend: str) -> int:
    # The vendor's libraries print on standard output whenever they like: that becomes standard error.
    with os.fdopen(os.dup(1), "w", buffering=1) as lines:
        os.dup2(2, 1)

        def say(record: dict[str, Any]) -> None:
            lines.write(json.dumps(record) + "\n")

        try:
            device = default_device(backend)
        except OSPNextError as error:
            say({"unavailable": str(error)})
            return 2
        info = registry().probe(backend).device
        assert info is not None
        items = {item.id: item for item in items_of(backend, info)}
        say(
            {
                "device": {**asdict(info), "name": report.device_name(registry().manifests[backend], device)},
                "environment": report.environment(),
                "items": [words_of(item) for item in items.values()],
            }
        )
        for line in sys.stdin:
            record = ask(items[line.strip()], device, info.emulation)
            say(record | {"lost": is_lost(device)})
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

"""One item and what came of it, as JSON types."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ospnext.errors import ConfigError
from ospnext.ops.acceptance import REFUSED, CannotAskError, Finding, Item, RefusedCallError
from ospnext.ops.registry import DeviceInfo, load, registry

AS_EXPECTED, DIFFERS, COULD_NOT_RUN = VERDICTS = ("as expected", "differs", "could not run")


def items_of(backend: str, device: DeviceInfo | None) -> list[Item]:
    """What `backend` wants to know of `device`; without one, of the device that its list was made for.

    Raises:
        ConfigError: there is no such backend, or it has no such list.
    """
    known = registry().manifests
    listed = ", ".join(sorted(name for name, manifest in known.items() if manifest.acceptance)) or "none here"
    if backend not in known:
        raise ConfigError(f"--backend {backend}: there is none of this name; backends with items to ask: {listed}")
    if not known[backend].acceptance:
        raise ConfigError(
            f"--backend {backend} has no items to ask a device (Manifest.acceptance); with items: {listed}"
        )
    return list(load(known[backend].acceptance)(device))


def words_of(item: Item) -> dict[str, Any]:
    """All of an item but what finds the answer."""
    return {
        "id": item.id,
        "question": item.question,
        "why": item.why,
        "calls": list(item.calls),
        "expected": dict(item.expected),
        "otherwise": dict(item.otherwise),
        "unforeseen": item.unforeseen,
        "estimated_seconds": item.seconds,
        "hardware_only": item.hardware_only,
    }


def ask(item: Item, device: torch.device, emulation: str = "") -> dict[str, Any]:
    """The item with its verdict. `emulation` says what plays the device; empty for hardware.

    `excused` marks a "could not run" that is no fault: this machine is known to lack what the item takes.
    """
    if emulation and item.hardware_only:
        return could_not_run(item, f"not asked of an emulated device: {item.hardware_only}", excused=True)
    started = time.perf_counter()
    try:
        finding = item.ask(device)
    except RefusedCallError as refusal:
        finding = Finding(REFUSED, {"error": str(refusal)})
    except CannotAskError as reason:
        return could_not_run(item, str(reason), excused=True)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {error} ({place.name}, {place.filename}:{place.lineno})"
        return could_not_run(item, text, seconds=time.perf_counter() - started)
    return judged(item, finding, time.perf_counter() - started)


def judged(item: Item, finding: Finding, seconds: float = 0.0) -> dict[str, Any]:
    """The item with the verdict on a finding, and what follows from the answer."""
    expected = finding.answer in item.expected
    follows = item.expected.get(finding.answer, item.otherwise.get(finding.answer, item.unforeseen))
    return {
        **words_of(item),
        "verdict": AS_EXPECTED if expected else DIFFERS,
        "answer": finding.answer,
        "follows": follows,
        "details": plain(finding.details),
        "error": "",
        "excused": False,
        "seconds": round(seconds, 2),
    }


def could_not_run(item: Item, error: str, *, excused: bool = False, seconds: float = 0.0) -> dict[str, Any]:
    return without_answer(words_of(item), error, excused=excused, seconds=seconds)


def without_answer(
    words: Mapping[str, Any], error: str, *, excused: bool = False, seconds: float = 0.0
) -> dict[str, Any]:
    rest = {
        "answer": "",
        "follows": "",
        "details": {},
        "error": error,
        "excused": excused,
        "seconds": round(seconds, 2),
    }
    return {**words, "verdict": COULD_NOT_RUN, **rest}


def plain(value: Any) -> Any:
    """As JSON holds it: numbers that are not finite become words."""
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [plain(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value

"""How long each implementation took for a request, on one device with one set of versions: the file that `ospnext tune`
writes and a policy may hold. Nothing is measured here.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ospnext.atomic import write_text
from ospnext.errors import PolicyError
from ospnext.ops.contract import Contract
from ospnext.ops.registry import Manifest, Registry
from ospnext.version import __version__

FORMAT = "ospnext tuning 1"

#: Implementation id -> milliseconds.
Times = Mapping[str, float]


@dataclass(frozen=True)
class Machine:
    """What measured times hold for: a backend, its device, and the versions of all that runs there."""

    backend: str
    device: str
    versions: Mapping[str, str] = field(hash=False)

    def differences(self, here: Machine) -> Iterator[str]:
        """What is another than on the machine `here`, as lines."""
        if self.device != here.device:
            yield f"device: {self.device!r} there, {here.device!r} here"
        for name in sorted(self.versions.keys() | here.versions.keys()):
            there, now = (m.versions.get(name, "not installed") for m in (self, here))
            if there != now:
                yield f"{name}: {there} there, {now} here"


@dataclass(frozen=True)
class Tuning:
    """Times by request, as `request_key` writes it. `path` is the file they come from."""

    path: str
    machine: Machine
    requests: Mapping[str, Times] = field(hash=False)

    def ranked(self, contract: Contract, request: Any, eligible: Iterable[str]) -> list[tuple[float, str]]:
        """(milliseconds, id) of those that were measured for exactly this request, fastest first."""
        times = self.requests.get(request_key(contract, request), {})
        return sorted(((times[name], name) for name in eligible if name in times), key=lambda pair: pair[0])


def request_key(contract: Contract, request: Any) -> str:
    """The request in words, every field that says anything: equal keys are equal requests to the same contract."""
    required = [f.name for f in dataclasses.fields(request) if f.default is dataclasses.MISSING]
    words = {name: getattr(request, name) for name in required} | contract.features(request)
    return f"{contract.name}.v{contract.version} " + " ".join(f"{name}={value}" for name, value in words.items())


def machine_of(backend: str, known: Registry) -> Machine | None:
    """This machine as `backend` sees it; None where it cannot run."""
    device = known.probe(backend).device
    if device is None:
        return None
    versions = {"ospnext": __version__} | package_versions(known.manifests[backend]) | device.versions
    return Machine(backend, device.name, versions)


def package_versions(manifest: Manifest, more: Iterable[str] = ()) -> dict[str, str]:
    """Distribution -> version, of what the kernels of a backend require or are compiled by, and of `more`. What is not
    installed is left out.
    """
    modules = {name.partition(".")[0] for i in manifest.implementations for name in i.requires}
    brought_by = importlib.metadata.packages_distributions() if modules else {}
    names = {package for module in modules for package in brought_by.get(module, ())}
    found = {}
    for name in sorted(names.union(more, *(i.compiled_by for i in manifest.implementations))):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def save(path: Path, machine: Machine, requests: Mapping[str, Times]) -> None:
    """Write a tuning file in one step, in place of one that is there."""
    content = {"format": FORMAT, **dataclasses.asdict(machine), "milliseconds": requests}
    write_text(path, json.dumps(content, indent=1) + "\n")


def read(path: str, known: Registry, setting: str) -> Tuning:
    """The table in `path`; `setting` is what named it.

    Raises:
        PolicyError: there is no such file, it is not of this kind, or it was measured on another device or with other
            versions; the message says which.
    """
    try:
        tuning = _parsed(path, json.loads(Path(path).read_text(encoding="utf-8")))
    except OSError as error:
        raise PolicyError(f"{setting}={path}: {error.strerror}. `ospnext tune --out FILE` writes such a file") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise PolicyError(
            f"{setting}={path} is no file of `ospnext tune` ({type(error).__name__}: {error}); "
            "`ospnext tune --out FILE` writes one"
        ) from None
    machine = tuning.machine
    here = machine_of(machine.backend, known) if machine.backend in known.manifests else None
    if here is None:
        raise PolicyError(
            f"{setting}={path} holds times of backend {machine.backend!r} on {machine.device!r}, "
            f"which cannot run here; leave {setting} out, or measure here: ospnext tune --out FILE"
        )
    differences = list(machine.differences(here))
    if differences:
        raise PolicyError(
            f"{setting}={path} was measured elsewhere, so that its order need not hold here:\n  "
            + "\n  ".join(differences)
            + f"\nMeasure again (ospnext tune --out {path}), or leave {setting} out."
        )
    return tuning


def _parsed(path: str, content: Any) -> Tuning:
    if content["format"] != FORMAT:
        raise ValueError(f"format {content['format']!r}, want {FORMAT!r}")
    machine = Machine(str(content["backend"]), str(content["device"]), dict(content["versions"]))
    requests = {
        str(key): {str(name): float(ms) for name, ms in times.items()} for key, times in content["milliseconds"].items()
    }
    return Tuning(path, machine, requests)

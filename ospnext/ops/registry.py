"""Who offers what: manifests found by entry point, probed late, with every failure remembered. No policy here.

A manifest is pure data. Kernel modules and vendor packages are imported when an implementation is first chosen, never
before."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import pkgutil
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ospnext.errors import RegistryError
from ospnext.ops.contract import API_VERSION, Reason

ENTRY_POINT_GROUP = "ospnext.backends"

#: Words that stand in the place of a backend's name in a policy: the best available one, and plain PyTorch.
AUTO = "auto"
COMPOSITE = "composite"

#: In `Manifest.device_types`: this backend computes wherever PyTorch does.
ANY_DEVICE = "*"


@dataclass(frozen=True)
class Refusal:
    """A request that an implementation refuses with reason `code`: how it differs from one that is taken.

    `request` and `device` hold fields of the request and of DeviceInfo. The conformance suite refuses a predicate whose
    codes have no such example."""

    code: str
    request: Mapping[str, Any] = field(default_factory=dict)
    device: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Implementation:
    """One way to compute a contract, as data.

    `target` and `supports` are dotted paths ("package.module:name"). `supports(request, device)` yields a `need(...)`
    per condition, met or not, and must depend on nothing else. `refusals` holds an example for every code it knows.
    `handles` lists the request features taken into account; any other feature refuses the call. `prefers` lists those
    of them that make it faster, where the caller may choose. `install` says how to get what `requires` names, where
    that is not `pip install` of the same name. `compiled_by` names further distributions on whose versions its speed
    depends: results and tuning files record them."""

    id: str
    contract: str
    target: str
    handles: frozenset[str] = frozenset()
    requires: tuple[str, ...] = ()
    supports: str = ""
    refusals: tuple[Refusal, ...] = ()
    note: str = ""
    prefers: frozenset[str] = frozenset()
    install: str = ""
    compiled_by: tuple[str, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """One backend, as data. Implementations stand in order of preference.

    `cases` is the dotted path of a function that yields conformance cases of level "extension", for what a vendor
    promises beyond the contracts' own cases. `acceptance` is that of a function of DeviceInfo, or of None, that yields
    what only a device can answer: see `ospnext.ops.acceptance`. `without_device` says what can be done on a machine
    that cannot run the backend."""

    backend: str
    description: str
    device_types: tuple[str, ...]
    probe: str
    implementations: tuple[Implementation, ...] = ()
    priority: int = 0
    needs: str = ""
    cases: str = ""
    acceptance: str = ""
    without_device: str = ""
    api: int = API_VERSION

    def offers(self, contract: str) -> tuple[Implementation, ...]:
        return tuple(i for i in self.implementations if i.contract == contract)


@dataclass(frozen=True)
class DeviceInfo:
    """What predicates may know of a device. `capability` is the vendor's (major, minor) or chip name, `memory` is in
    bytes. `emulation` says what plays the device; empty for hardware. `numbers` are those by which the
    host knows the devices that this process sees, in the order of their indices here; empty where that is not known.
    """

    type: str
    name: str
    count: int = 1
    memory: int = 0
    capability: Any = None
    versions: dict[str, str] = field(default_factory=dict)
    emulation: str = ""
    numbers: tuple[int, ...] = ()


@dataclass(frozen=True)
class Probe:
    """What a backend's probe found: a device, or every reason why there is none."""

    device: DeviceInfo | None
    reasons: tuple[Reason, ...] = ()

    @property
    def available(self) -> bool:
        return self.device is not None


class Registry:
    """The backends of this process. `manifests` replaces entry-point discovery in tests."""

    def __init__(self, manifests: Iterable[Manifest] | None = None) -> None:
        self.manifests: dict[str, Manifest] = {}
        #: Backend or entry-point name -> traceback of what went wrong while loading it.
        self.failures: dict[str, str] = {}
        self._probes: dict[str, Probe] = {}
        self._loaded: dict[str, Any] = {}
        if manifests is None:
            self._discover()
        else:
            for manifest in manifests:
                self._add(manifest)

    def _discover(self) -> None:
        for entry in sorted(importlib.metadata.entry_points(group=ENTRY_POINT_GROUP), key=lambda e: (e.name, e.value)):
            try:
                manifest = entry.load()
            except Exception:
                self.failures[entry.name] = traceback.format_exc()
                continue
            if getattr(manifest, "api", None) != API_VERSION:
                self.failures[entry.name] = (
                    f"{entry.value} speaks backend API {getattr(manifest, 'api', None)!r}; "
                    f"this ospnext speaks {API_VERSION}"
                )
                continue
            self._add(manifest)

    def _add(self, manifest: Manifest) -> None:
        if manifest.backend in self.manifests:
            raise RegistryError(
                f"two backends call themselves {manifest.backend!r}: uninstall one, or rename it "
                f"(entry points of group {ENTRY_POINT_GROUP!r})"
            )
        if manifest.backend in (AUTO, COMPOSITE) or not manifest.backend.isidentifier():
            raise RegistryError(
                f"a backend cannot be called {manifest.backend!r}: a name is letters, digits and underscores "
                f"(ids are '<backend>.<kernel>'), and neither {AUTO!r} nor {COMPOSITE!r}"
            )
        seen: set[str] = set()
        for implementation in manifest.implementations:
            if not implementation.id.startswith(manifest.backend + "."):
                raise RegistryError(
                    f"backend {manifest.backend!r} declares {implementation.id!r}: ids start with the backend's name"
                )
            key = f"{implementation.contract}:{implementation.id}"
            if key in seen:
                raise RegistryError(
                    f"backend {manifest.backend!r} declares {implementation.id!r} twice for {implementation.contract}"
                )
            seen.add(key)
        self.manifests[manifest.backend] = manifest

    def ordered(self) -> list[Manifest]:
        """Manifests by priority, highest first."""
        return sorted(self.manifests.values(), key=lambda m: (-m.priority, m.backend))

    def probe(self, backend: str) -> Probe:
        """Probe once and remember; a probe that raises is an unavailable device whose reason is the error."""
        if backend not in self._probes:
            try:
                self._probes[backend] = load(self.manifests[backend].probe)()
            except Exception as error:
                self._probes[backend] = Probe(None, (Reason("probe", repr(error), "a probe that returns"),))
        return self._probes[backend]

    def missing_packages(self, implementation: Implementation) -> tuple[str, ...]:
        return tuple(name for name in implementation.requires if not _installed(name))

    def kernel(self, implementation: Implementation) -> Any:
        """Import the kernel object on first selection. A failure is remembered and raised again, never retried."""
        target = implementation.target
        if target not in self._loaded:
            try:
                self._loaded[target] = load(target)
            except Exception as error:
                self.failures[implementation.id] = traceback.format_exc()
                error.add_note(f"while loading {implementation.id} from {target}")
                self._loaded[target] = error
        found = self._loaded[target]
        if isinstance(found, Exception):
            raise found
        return found


def load(path: str) -> Any:
    """Import "package.module:name"."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


@functools.cache
def _installed(module: str) -> bool:
    """Whether a module can be found, without importing the packages it is in: those may load libraries, or fail to."""
    name, *inner = module.split(".")
    spec = importlib.util.find_spec(name)
    for part in inner:
        name, folders = f"{name}.{part}", spec.submodule_search_locations if spec else None
        finders = filter(None, map(pkgutil.get_importer, folders or ()))
        spec = next(filter(None, (finder.find_spec(name) for finder in finders)), None)
    return spec is not None


_in_force: Registry | None = None


def registry() -> Registry:
    """The registry in force: that of the installed backends, discovered on first use."""
    global _in_force
    if _in_force is None:
        _in_force = Registry()
    return _in_force


def replace_registry(known: Registry | None) -> Registry | None:
    """Put another registry in force (None: discover again) and return the former one. Callers that decide by policy
    want `ospnext.ops.policy.use_registry`, which forgets decisions as well.
    """
    global _in_force
    before, _in_force = _in_force, known
    return before

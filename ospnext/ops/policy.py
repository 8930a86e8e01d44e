"""What the user asked for, as one frozen value. The only reader of OSPNEXT_* variables."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from ospnext.errors import BackendUnavailableError, PolicyError
from ospnext.ops import contracts
from ospnext.ops import tuning as tunings
from ospnext.ops.registry import AUTO, COMPOSITE, Registry, registry, replace_registry

PREFIX = "OSPNEXT_"
VARIABLES = {
    "OSPNEXT_BACKEND": "auto, or the name of a backend",
    "OSPNEXT_OPS": "comma-separated overrides, e.g. attention=cuda.cudnn,quantize=reference",
    "OSPNEXT_FALLBACK": "comma-separated families that may fall back to plain PyTorch, e.g. fused",
    "OSPNEXT_TUNING": "a file of `ospnext tune`: for the requests in it, the fastest implementation comes first",
}


@dataclass(frozen=True)
class Policy:
    """`backend` names one backend or "auto"; `ops` maps a family or contract to a backend or implementation id;
    `fallback` holds the families that may fall back; `tuning` are measured times that reorder what is inside a backend;
    `source` says where each field came from."""

    backend: str = AUTO
    ops: tuple[tuple[str, str], ...] = ()
    fallback: frozenset[str] = frozenset()
    tuning: tunings.Tuning | None = None
    source: tuple[tuple[str, str], ...] = field(default=(), compare=False)

    def wanted(self, contract: str, family: str) -> tuple[str, str]:
        """(backend or implementation id, where that was said) for a contract: the most specific word wins."""
        ops, source = dict(self.ops), dict(self.source)
        for key in (contract, family):
            if key in ops:
                return ops[key], source.get("ops", "argument")
        return self.backend, source.get("backend", "default")

    def __str__(self) -> str:
        source = dict(self.source)
        text = f"backend={self.backend} ({source.get('backend', 'default')})"
        if self.ops:
            text += f", ops={','.join(f'{k}={v}' for k, v in self.ops)} ({source.get('ops', 'argument')})"
        if self.tuning is not None:
            text += f", tuning={self.tuning.path} ({source.get('tuning', 'argument')})"
        allowed = ",".join(sorted(self.fallback))
        return text + (f", fallback={allowed} ({source.get('fallback', 'argument')})" if allowed else ", no fallback")


def policy_from_env(environ: Mapping[str, str], known: Registry) -> Policy:
    """Parse and check every OSPNEXT_* variable; an unknown name or value is an error that lists what exists."""
    for name in sorted(environ):
        if name.startswith(PREFIX) and name not in VARIABLES:
            listing = "\n".join(f"  {key}: {what}" for key, what in VARIABLES.items())
            raise PolicyError(
                f"unknown environment variable {name}{_nearest(name, VARIABLES)}. Known variables:\n{listing}"
            )
    source = [
        (f, f"OSPNEXT_{f.upper()}")
        for f in ("backend", "ops", "fallback", "tuning")
        if environ.get(f"OSPNEXT_{f.upper()}", "").strip()
    ]
    backend = environ.get("OSPNEXT_BACKEND", "").strip() or AUTO
    ops = _pairs(environ.get("OSPNEXT_OPS", ""))
    fallback = [word.strip() for word in environ.get("OSPNEXT_FALLBACK", "").split(",") if word.strip()]
    path = environ.get("OSPNEXT_TUNING", "").strip()
    table = tunings.read(path, known, "OSPNEXT_TUNING") if path else None
    return _checked(Policy(backend, tuple(ops), frozenset(fallback), table, tuple(source)), known)


def variables_set() -> dict[str, str]:
    """The OSPNEXT_* variables of this process that are set, as they are written there."""
    return {name: os.environ[name] for name in sorted(os.environ) if name.startswith(PREFIX)}


def _pairs(text: str) -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    for word in filter(None, (w.strip() for w in text.split(","))):
        key, equals, value = (part.strip() for part in word.partition("="))
        if not (key and equals and value):
            raise PolicyError(f"OSPNEXT_OPS: {word!r} is not of the form family=backend or family=implementation")
        if key in dict(pairs):
            raise PolicyError(f"OSPNEXT_OPS: {key} is given twice, as {dict(pairs)[key]} and as {value}; keep one")
        pairs.append((key, value))
    return pairs


def _checked(policy: Policy, known: Registry) -> Policy:
    source = dict(policy.source)
    if policy.backend != AUTO:
        _check_backend(policy.backend, source.get("backend", "use_backend"), known)
    families = {c.family for c in contracts.CONTRACTS.values()}
    keys = families | set(contracts.CONTRACTS)
    for key, value in policy.ops:
        where = source.get("ops", "use_backend(ops=...)")
        if key not in keys:
            raise PolicyError(
                f"{where}: unknown operator {key!r}{_nearest(key, keys)}. Known: {', '.join(sorted(keys))}"
            )
        chosen = [c for c in contracts.CONTRACTS.values() if key in (c.name, c.family)]
        ids = sorted({i.id for m in known.ordered() for c in chosen for i in m.offers(c.name)})
        allowed = [*ids, *known.manifests, *([COMPOSITE] if any(c.composite for c in chosen) else [])]
        if value not in allowed:
            _check_loaded(value.partition(".")[0], f"{where}: {key}={value}", known)
            raise PolicyError(
                f"{where}: {key}={value} names nothing{_nearest(value, allowed)}. "
                f"For {key} there are: {', '.join(allowed)}"
            )
    for name in sorted(policy.fallback):
        if name not in families:
            where = source.get("fallback", "use_backend(fallback=...)")
            raise PolicyError(
                f"{where}: unknown family {name!r}{_nearest(name, families)}. Known: {', '.join(sorted(families))}"
            )
    return policy


def _check_backend(name: str, where: str, known: Registry) -> None:
    if name in known.manifests:
        return
    _check_loaded(name, f"{where}={name}", known)
    names = [AUTO, *sorted(known.manifests)]
    hint = (
        ""
        if known.manifests
        else " No backend is registered: install the package (pip install -e .), do not just put it on PYTHONPATH."
    )
    raise PolicyError(f"{where}: unknown backend {name!r}{_nearest(name, names)}. Known: {', '.join(names)}.{hint}")


def _check_loaded(name: str, asked: str, known: Registry) -> None:
    if name in known.failures:
        raise BackendUnavailableError(f"{asked}: the backend is installed but did not load:\n{known.failures[name]}")


def require_available(name: str, known: Registry, where: str = "backend") -> None:
    """Raise BackendUnavailableError, with every reason the probe gave, unless backend `name` can run here."""
    probe = known.probe(name)
    if not probe.available:
        manifest = known.manifests[name]
        reasons = "\n".join(f"  {reason}" for reason in probe.reasons)
        needs = f"\nIt needs: {manifest.needs}." if manifest.needs else ""
        needs += f"\nWithout that: {manifest.without_device}." if manifest.without_device else ""
        raise BackendUnavailableError(
            f"{where}={name} was asked for, but this machine cannot run it:\n{reasons}{needs}\n"
            "Choose another backend (OSPNEXT_BACKEND=reference runs anywhere); `ospnext doctor` shows all of them."
        )


def _nearest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


# ---- the policy in force
# ------------------------------------------------------------------------------------------------------- Process-wide
# on purpose: backward passes run on autograd's own threads, which must decide as the forward did.

_current: Policy | None = None
_listeners: list[Callable[[], object]] = []


def current_policy() -> Policy:
    """The policy in force; the environment is read on the first call."""
    global _current
    if _current is None:
        policy = policy_from_env(os.environ, registry())
        if policy.backend != AUTO:
            require_available(policy.backend, registry(), "OSPNEXT_BACKEND")
        _set(policy)
        assert _current is not None
    return _current


def policy_in_force() -> Policy | None:
    """The policy in force, or None if nothing has asked for one yet; never reads the environment."""
    return _current


def on_change(listener: Callable[[], object]) -> None:
    """Call `listener` whenever another policy takes force (caches of decisions register here)."""
    _listeners.append(listener)


def _set(policy: Policy | None) -> None:
    global _current
    _current = policy
    for listener in _listeners:
        listener()


@contextmanager
def use_registry(known: Registry) -> Iterator[None]:
    """Put `known` in the place of the installed backends until the end of the block, for tests and for backends broken
    on purpose. Inside, the policy is read anew from the environment; at the end the former one is back in force.
    """
    policy, installed = _current, replace_registry(known)
    _set(None)
    try:
        yield
    finally:
        replace_registry(installed)
        _set(policy)


class use_backend:
    """Choose a backend for this process; as a context manager, until the end of the block. Arguments beat the
    environment.

    Args:
        backend: a backend's name, or "auto". None keeps the present one.
        ops: overrides per family or contract, e.g. `{"attention": "cuda.cudnn"}`.
        fallback: families that may fall back to plain PyTorch, e.g. `{"fused"}`.
        tuning: a file of `ospnext tune`, whose order then holds; "" goes back to that of the backends.

    Raises:
        PolicyError: a name is unknown; the message lists what exists.
        BackendUnavailableError: this machine cannot run the backend; the message says why.
    """

    def __init__(
        self,
        backend: str | None = None,
        *,
        ops: Mapping[str, str] | None = None,
        fallback: Iterable[str] | None = None,
        tuning: str | os.PathLike[str] | None = None,
    ) -> None:
        self._before = before = _current
        # A file that is no longer right must not be in the way of another one.
        environ = {k: v for k, v in os.environ.items() if tuning is None or k != "OSPNEXT_TUNING"}
        base = before or policy_from_env(environ, registry())
        source = dict(base.source)
        changes: dict[str, object] = {}
        if backend is not None:
            changes["backend"], source["backend"] = backend, "use_backend"
        if ops is not None:
            changes["ops"], source["ops"] = tuple(ops.items()), "use_backend"
        if fallback is not None:
            changes["fallback"], source["fallback"] = frozenset(fallback), "use_backend"
        if tuning is not None:
            path = os.fspath(tuning)
            changes["tuning"] = tunings.read(path, registry(), "tuning") if path else None
            source["tuning"] = "use_backend"
        policy = _checked(replace(base, **changes, source=tuple(source.items())), registry())  # type: ignore[arg-type]
        if policy.backend != AUTO:
            where = source.get("backend", "")
            require_available(policy.backend, registry(), where if where.startswith(PREFIX) else "backend")
        _set(policy)

    def __enter__(self) -> Policy:
        return current_policy()

    def __exit__(self, *exc: object) -> None:
        _set(self._before)

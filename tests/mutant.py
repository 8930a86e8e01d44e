"""A backend that is broken on purpose, and the checks that must find it; what the lists of mutants are written with."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass

from ospnext.backends.reference import MANIFEST
from ospnext.ops.contracts import CONTRACTS
from ospnext.ops.registry import Implementation, Manifest


@dataclass(frozen=True)
class Mutant:
    """A broken backend, checks that must find it and checks that must not."""

    manifest: Manifest
    kills: tuple[str, ...]
    spares: tuple[str, ...]
    #: Part of the message of every killing check: it fails for the fault's own reason.
    says: str = ""
    #: "error": the kernel raises.
    status: str = "fail"
    #: What is wrong, in a line.
    fault: str = ""

    @property
    def contract(self) -> str:
        """The contract that the broken implementation is of."""
        return self.manifest.implementations[0].contract

    @property
    def complaint(self) -> str:
        """The report of a user whom this fault hurt."""
        return next(iter(re.findall(r"https://\S+", self.fault)), "")


#: Parts of messages.
BEYOND = " times its bound"
OVERWRITTEN = "was written to"

#: Spared by whatever is wrong with every call of a kernel: no kernel is judged here.
NO_KERNEL = "selection/required/predicates-are-pure"


def backend(name: str, *kernels: Implementation) -> Manifest:
    return dataclasses.replace(MANIFEST, backend=name, implementations=kernels)


def name_of(kernel: type) -> str:
    words = re.sub(r"(?<=[a-z])(?=[A-Z\d])|(?<=\d)(?=[A-Z])", "_", kernel.__name__).lower()
    return re.sub(r"\b(\w*)(bf|fp)_(16|32)", r"\1\2\3", words)


def ids(prefix: str, words: str) -> tuple[str, ...]:
    """Ids separated by blanks, in full or without `prefix`."""
    return tuple(word if "/" in word else prefix + word for word in words.split())


def fault_of(kernel: object) -> str:
    return " ".join((type(kernel).__doc__ or "").split())


def known(contract: str, features: Iterable[str]) -> frozenset[str]:
    """Those of `features` that requests of the contract have: a manifest that lists another is found for that."""
    return frozenset(features) & {f.name for f in dataclasses.fields(CONTRACTS[contract].request)}

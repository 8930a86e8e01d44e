"""Manifests and predicates that are broken on purpose, and the checks that must find each."""

from __future__ import annotations

import dataclasses
import itertools

import torch
from mutant import Mutant, backend, ids

from ospnext.backends.reference import MANIFEST
from ospnext.ops.contract import need
from ospnext.ops.registry import Refusal

(_, MATH) = MANIFEST.offers("attention")


def code_without_example(request, device):
    yield need(True, "dtype", got=request.dtype, want="any")


def camel_case_code(request, device):
    yield need(request.dtype != torch.float8_e4m3fn, "dType", got=request.dtype, want="a dtype of more than 8 bits")


def impure_predicate(request, device):
    yield need(True, "memory", got=next(_counter), want="any number of bytes")


_counter = itertools.count()


def refuses_nothing(request, device):
    yield need(True, "dtype", got=request.dtype, want="any")


def _of_selection(name: str, fault: str, kills: str, spares: str, says: str, **fields) -> tuple[str, Mutant]:
    checks = (ids("selection/required/", part) for part in (kills, spares))
    kernel = dataclasses.replace(MATH, id=f"{name}.math", **fields)
    return name, Mutant(backend(name, kernel), *checks, says, fault=fault)


_NO_FP8 = {"dtype": torch.float8_e4m3fn}
_PURE = "predicates-are-pure"
MUTANTS = (
    _of_selection(
        "refuses_nothing",
        "The predicate takes what the manifest says it refuses.",
        "refusals-give-their-code",
        f"codes-have-a-refusal {_PURE}",
        "must be refused with 'dtype'",
        supports=f"{__name__}:refuses_nothing",
        refusals=(Refusal("dtype", _NO_FP8),),
    ),
    _of_selection(
        "code_without_example",
        "The predicate knows a code without an example.",
        "codes-have-a-refusal",
        f"refusals-give-their-code {_PURE}",
        "has no example of it",
        supports=f"{__name__}:code_without_example",
    ),
    _of_selection(
        "camel_case_code",
        "A reason code that is not lower_snake.",
        "codes-have-a-refusal",
        f"refusals-give-their-code {_PURE}",
        "is not lower_snake",
        supports=f"{__name__}:camel_case_code",
        refusals=(Refusal("dType", _NO_FP8),),
    ),
    _of_selection(
        "impure_predicate",
        "The predicate depends on something beside the request and the device.",
        _PURE,
        "unknown-fields-are-refused",
        "in several ways",
        supports=f"{__name__}:impure_predicate",
    ),
    _of_selection(
        "handles_what_does_not_exist",
        "The manifest lists a feature that no request has.",
        "unhandled-features-are-refused",
        f"unknown-fields-are-refused {_PURE}",
        "handles 'causal'",
        handles=MATH.handles | {"causal"},
    ),
)

"""How an item calls the vendor's operators, and how it tells which of several formulas the device computes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ospnext.ops.acceptance import Finding, RefusedCallError

#: What an item answers where the device computes by none of its formulas.
NONE = "none of these"
#: Lines of a refusal that are kept: those of aclnn go on with a trace of the runtime.
_LINES = 3
#: PyTorch's words for arguments that the operator's schema does not have: the call is wrong, whatever a device can do.
_NOT_THE_SCHEMA = re.compile(
    r"expected at most \d+ argument|Unknown keyword argument|is missing value for argument|Expected a value of type"
)
#: Words of the runtime for work that was taken and then failed (its codes 507xxx). Sought in the whole text: a refusal
#: that is taken for a fault is read by a person, a fault that is taken for a refusal may pass as expected. Refusals of
#: the operator store name the "AIcoreEngine".
_FAULT = re.compile(r"\b507\d{3}\b|\bAI ?Core\b(?! ?engine)|vector core|time(d )?out", re.IGNORECASE)


def taken(operator: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """The result of a call on the CPU, a tensor or a tuple; copying it waits for the device.

    Raises:
        RefusedCallError: the device, or torch_npu in front of it, does not take the call.
        RuntimeError: as it came, where it is no refusal: the call does not fit the schema, or its work failed.
    """
    try:
        result = operator(*arguments, **named)
        if isinstance(result, Tensor):
            return result.cpu()
        return tuple(part.cpu() if isinstance(part, Tensor) else part for part in result)
    except (NotImplementedError, torch.OutOfMemoryError):  # says nothing about the operator
        raise
    except RuntimeError as error:
        if _NOT_THE_SCHEMA.search(str(error)) or _FAULT.search(str(error)):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise RefusedCallError(" ".join(lines[:_LINES])[:500]) from error


def nearest(found: Tensor, candidates: Mapping[str, Tensor], tolerance: float) -> Finding:
    """The formula whose result is closest to `found`, if it is within `tolerance` (relative, of the rms); the details
    are the distances from all of them.
    """
    distances = {words: _distance(found, expected) for words, expected in candidates.items()}
    return least("relative error", distances, tolerance)


def least(measure: str, distances: Mapping[str, float], tolerance: float) -> Finding:
    """The formula with the least of the distances, which are called `measure`, if that is within `tolerance`."""
    best = min(distances, key=lambda words: distances[words])
    return Finding(best if distances[best] <= tolerance else NONE, {measure: dict(distances)})


def _distance(found: Tensor, expected: Tensor) -> float:
    """Infinite where one holds NaN or Inf."""
    found, expected = found.double(), expected.double()
    if found.shape != expected.shape or not bool((found.isfinite() & expected.isfinite()).all()):
        return torch.inf
    size = expected.square().mean().sqrt()
    return float((found - expected).square().mean().sqrt() / size) if size else float((found - expected).abs().max())


def equal_to(given: Tensor, found: Tensor, candidates: Mapping[str, Tensor]) -> Finding:
    """The formula of which `found` has every element; the details count what differs, with the first examples from
    the formula that is closest.
    """
    wrong = {words: _differ(found, expected) for words, expected in candidates.items()}
    counts = {words: int(places.sum()) for words, places in wrong.items()}
    best = min(counts, key=lambda words: counts[words])
    details: dict[str, Any] = {"elements": found.numel(), "that differ": counts}
    if counts[best]:
        details[f"examples against {best!r}"] = [
            f"{given.flatten()[n].item()!r} -> {found.flatten()[n].item()!r}, not "
            f"{candidates[best].flatten()[n].item()!r}"
            for n in wrong[best].flatten().nonzero()[:4, 0].tolist()
        ]
        return Finding(NONE, details)
    return Finding(best, details)


def _differ(found: Tensor, expected: Tensor) -> Tensor:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return torch.ones(found.shape, dtype=torch.bool)
    same = found == expected
    return ~(same | (found.isnan() & expected.isnan())) if found.is_floating_point() else ~same


def all_of(findings: Mapping[str, Finding]) -> Finding:
    """One finding from several of one question: their common answer, or every answer by its name."""
    answers = {name: finding.answer for name, finding in findings.items()}
    details = {name: {"answer": f.answer, **f.details} for name, f in findings.items()}
    if len({*answers.values()}) == 1:
        return Finding(next(iter(answers.values())), details)
    return Finding("; ".join(f"{name}: {answer}" for name, answer in answers.items()), details)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same numbers on every machine."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def vendors() -> Any:
    """The vendor's operators; its package is imported only when an item is asked."""
    import torch_npu

    return torch_npu

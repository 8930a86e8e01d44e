"""One measured row, and what follows from rows side by side. No measuring and no text here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ospnext.bench.kernels import Kernels
from ospnext.bench.measure import Timing
from ospnext.bench.workload import Workload

DENSE, DIFFUSERS = "dense", "diffusers-compiled"


@dataclass(frozen=True)
class Row:
    """One variant on one workload. With an `error` it has no more than times, if that.

    `parts` and `floors` are milliseconds by the names of parts.py; `differences` are relative to the outputs of other
    variants, by their names, in Frobenius norms.
    """

    work: Workload
    variant: str
    compile: str
    timing: Timing | None = None
    peak_bytes: int = 0
    tflop: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    floors: dict[str, float] = field(default_factory=dict)
    kernels: Kernels = field(default_factory=dict)
    differences: dict[str, float] = field(default_factory=dict)
    #: What a reader has to know, of a row that is right otherwise.
    remark: str | None = None
    error: str | None = None

    @property
    def milliseconds(self) -> float | None:
        return self.timing.median if self.timing else None

    @property
    def of_kernels(self) -> float | None:
        """Share of the time that its linear and attention kernels would take, run alone and nothing else."""
        if self.timing is None or not self.floors:
            return None
        return (self.floors["linear"] + self.floors["attention"]) / self.timing.median

    @property
    def idle(self) -> float | None:
        """Milliseconds of the median in which no operator ran: gaps between kernels, and the host."""
        return max(0.0, self.timing.median - sum(self.parts.values())) if self.timing and self.parts else None


def ratio(row: Row, baseline: str, rows: Iterable[Row]) -> float | None:
    """How many times faster `row` is than `baseline` on the same workload; None if either has no time."""
    base = next((r.milliseconds for r in rows if r.work == row.work and r.variant == baseline), None)
    return base / row.milliseconds if base and row.milliseconds else None


def as_json(row: Row, rows: Iterable[Row]) -> dict[str, Any]:
    """Plain values; what was not measured is null."""
    work, timing, rows = row.work, row.timing, list(rows)
    return {
        "preset": work.preset,
        "resolution": work.resolution,
        "height": work.height,
        "width": work.width,
        "frames": work.frames,
        "tokens": work.tokens,
        "layers": work.config.num_layers,
        "shortened": work.shortened,
        "variant": row.variant,
        "compile": row.compile,
        "milliseconds": row.milliseconds,
        "min": timing.shortest if timing else None,
        "max": timing.longest if timing else None,
        "repeats": len(timing.times) if timing else 0,
        "ratio_to_dense": ratio(row, DENSE, rows),
        "ratio_to_diffusers_compiled": ratio(row, DIFFUSERS, rows),
        "peak_gib": row.peak_bytes / 2**30 if timing else None,
        "tflop": row.tflop if timing else None,
        "of_kernels": row.of_kernels,
        "parts": row.parts,
        "floors": row.floors,
        "idle": row.idle,
        "difference_to": row.differences,
        "kernels": row.kernels,
        "remark": row.remark,
        "error": row.error,
    }

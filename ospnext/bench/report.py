"""The rows of a benchmark as Markdown and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ospnext.bench.parts import PARTS
from ospnext.bench.rows import DENSE, DIFFUSERS, Row, as_json, ratio
from ospnext.bench.variants import VARIANTS
from ospnext.bench.workload import PRESETS, Workload


def document(rows: Sequence[Row], versions: dict[str, Any]) -> dict[str, Any]:
    """Everything, as JSON types."""
    return {"versions": versions, "rows": [as_json(row, rows) for row in rows]}


def markdown(rows: Sequence[Row], versions: dict[str, Any]) -> str:
    lines = ["# One denoising forward", "", _where(versions), "", *_made_by(versions)]
    for work in dict.fromkeys(row.work for row in rows):
        lines += _workload(work, [row for row in rows if row.work == work])
    return "\n".join(lines)


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table; the first column is text, all others are numbers."""
    return [
        "| " + " | ".join(head) + " |",
        "|" + "|".join([" --- ", *(" ---: " for _ in head[1:])]) + "|",
        *("| " + " | ".join(row) + " |" for row in body),
    ]


def _where(versions: dict[str, Any]) -> str:
    shown = {
        key: value for key, value in versions.items() if key not in ("packages", "device_name", "policy", "settings")
    }
    shown |= versions.get("packages", {})
    return f"{versions.get('device_name', versions['device'])}; " + ", ".join(f"{k} {v}" for k, v in shown.items())


def _made_by(versions: dict[str, Any]) -> list[str]:
    if "settings" not in versions:
        return []
    options = " ".join(f"--{name} {value}" for name, value in versions["settings"].items())
    return [f"Made by `ospnext bench model {options}`.", ""]


def _workload(work: Workload, rows: list[Row]) -> Iterator[str]:
    yield from (f"## {work}", "")
    if work.shortened:
        config = work.config
        yield (
            f"Shortened: {config.num_layers} layers ({config.num_full_blocks} full where the model is sparse) instead "
            f"of {PRESETS[work.preset].num_layers}. Ratios are those of this model, not of the whole one."
        )
        yield ""
    yield from _times(rows)
    yield ""
    for row in rows:
        if row.variant == DENSE and row.of_kernels is not None:
            yield f"dense reaches {row.of_kernels:.0%} of its kernels: of its linear and attention kernels run alone."
            yield ""
    for row in rows:
        if row.remark:
            yield from (f"{row.variant}: {row.remark}.", "")
    for row in rows:
        if row.parts:
            yield from _parts(row)
    yield from _kernels(rows)


def _times(rows: list[Row]) -> Iterator[str]:
    against = any(row.variant == DIFFUSERS for row in rows)
    head = ["variant", "compile", "ms", "min to max", "times dense", *(["times diffusers"] if against else [])]
    head += ["TFLOP/s", "of its kernels", "peak GiB", "from dense", "from osp"]
    body = []
    for row in rows:
        timing = row.timing
        if timing is None:
            continue
        ratios = [ratio(row, DENSE, rows), *([ratio(row, DIFFUSERS, rows)] if against else [])]
        body.append(
            [
                *(
                    row.variant,
                    row.compile,
                    f"{timing.median:,.1f}",
                    f"{timing.shortest:,.1f} to {timing.longest:,.1f}",
                ),
                *(_number(value, ".2f") for value in ratios),
                f"{1e3 * row.tflop / timing.median:,.3g}",
                _number(row.of_kernels, ".0%"),
                f"{row.peak_bytes / 2**30:.2f}",
                *(_number(row.differences.get(name), ".1e") for name in (DENSE, "osp")),
            ]
        )
    yield from table(head, body)
    yield ""
    yield f"Medians of {max((len(r.timing.times) for r in rows if r.timing), default=0)}. `from dense` and `from osp`"
    yield "are relative differences of outputs. Sparse attention makes another model than dense: a difference is an"
    yield "error of arithmetic only between variants with the same blocks."
    failed = [row for row in rows if row.error is not None]
    if failed:
        yield ""
        for row in failed:
            yield f"- {row.variant} FAILED: {' '.join((row.error or '').split())}"


def _parts(row: Row) -> Iterator[str]:
    assert row.timing is not None
    yield from (f"### {row.variant}", "")
    if row.variant in VARIANTS:
        says = VARIANTS[row.variant].says
        yield from (f"{says[0].upper()}{says[1:]}.", "")
    body = [[part, *_reached(row.parts[part], row.floors.get(part), row.timing.median)] for part in PARTS]
    both = [sum(of[part] for part in ("elementwise", "quantize")) for of in (row.parts, row.floors)]
    if row.floors["quantize"]:
        body.insert(4, ["elementwise and quantize", *_reached(both[0], both[1], row.timing.median)])
    body.append(["no operator", *_reached(row.idle or 0.0, None, row.timing.median)])
    yield from table(["part", "ms", "of the forward", "floor ms", "reached"], body)
    yield ""


def _reached(milliseconds: float, floor: float | None, whole: float) -> list[str]:
    reached = floor / milliseconds if floor and milliseconds else None
    return [
        f"{milliseconds:,.1f}",
        f"{milliseconds / whole:.0%}",
        _number(floor or None, ",.1f"),
        _number(reached, ".0%"),
    ]


def _kernels(rows: list[Row]) -> Iterator[str]:
    """Each implementation once, with the variants that it ran in."""
    users: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        for contract, chosen in row.kernels.items():
            for name, note in chosen.items():
                users.setdefault((contract, name, note), []).append(row.variant)
    yield from ("### Kernels", "")
    for (contract, name, note), variants in sorted(users.items()):
        yield f"- {contract}: {name}" + (f" ({note})" if note else "") + f": {', '.join(variants)}"
    yield ""


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)

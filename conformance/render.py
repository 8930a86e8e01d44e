"""A report as Markdown and as the few lines that a terminal shows. Everything here is read from the JSON."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

#: Cases listed by name under "closest to their bounds".
CLOSEST = 10

ORDER = ("pass", "waived", "unsupported", "fail", "error")


def markdown(report: dict[str, Any]) -> str:
    """The report for people: what ran where, what came of it, and how much room was left."""
    backend, source = report["backend"], report["source"]
    commit = f"commit `{source['commit'][:12]}`" if source["commit"] else "installed wheel"
    commit += " with uncommitted changes" if source["dirty"] else ""
    facts = {
        "device": f"{backend['device_name']} (`{backend['device']}`)",
        "verdict": verdict(report),
        "levels": ", ".join(report["run"]["levels"]),
        "suite": f"ospnext {report['suite']['version']}, hash `{report['suite']['hash'][:16]}`, {commit}",
        "software": ", ".join(f"{k} {v}" for k, v in _software(report)),
        "variables": ", ".join(f"`{k}={v}`" for k, v in report["environment"]["variables"].items()) or "none set",
        "run": f"{report['run']['started']}, {report['run']['seconds']:.0f} s, {len(report['cases'])} results",
    }
    parts = [f"# Conformance of `{backend['name']}`", "", *_table(["", ""], facts.items())]
    parts += ["", "## Implementations", "", *_table(IMPLEMENTATION_COLUMNS, _implementations(report))]
    wrong = [case for case in report["cases"] if case["status"] in ("fail", "error")]
    if wrong or report["problems"]:
        parts += ["", "## What is wrong", "", *(f"- {line}" for line in _wrong(report, wrong))]
    for status, title in (("waived", "Waived"), ("unsupported", "Unsupported")):
        rows = [
            (f"`{_label(c)}`", "; ".join(c["reasons"]) or c["message"])
            for c in report["cases"]
            if c["status"] == status
        ]
        if rows:
            parts += ["", f"## {title}", "", *_table(["check", "why"], rows)]
    parts += ["", "## Closest to their bounds", "", "Errors over bounds; above 1 fails.", ""]
    parts += _table(["check", "result", "ratio", "max error / bound", "rms error / bound"], _closest(report))
    parts += ["", "## Every check", "", *_table(["check", "status", "ratio", "seconds"], _every(report))]
    return "\n".join(parts) + "\n"


def together(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The shards of one run as one report, for people: it has no digest, and proves nothing by itself."""
    first = min(reports, key=lambda report: str(report["run"]["started"]))
    devices = ", ".join(sorted({report["backend"]["device"] for report in reports}))
    counts: Counter[str] = sum((Counter(report["summary"]) for report in reports), Counter())
    return {name: value for name, value in first.items() if name != "digest"} | {
        "backend": first["backend"] | {"device": devices},
        "run": first["run"] | {"seconds": max(report["run"]["seconds"] for report in reports)},
        "summary": dict(counts),
        "problems": [problem for report in reports for problem in report["problems"]],
        "cases": sorted((case for report in reports for case in report["cases"]), key=_label),
    }


def summary(report: dict[str, Any], where: str | None = None) -> str:
    """The end of a run in a terminal."""
    lines = []
    for case in report["cases"]:
        if case["status"] in ("fail", "error"):
            lines.append(f"{case['status'].upper():5}  {_label(case)}\n         {_last_line(case['message'])}")
    lines += [f"PROBLEM  {problem}" for problem in report["problems"]]
    for identifier, contract, count, statuses, worst, _ in _implementations(report):
        ratio = f"  worst ratio {worst}" if worst else ""
        lines.append(f"  {identifier:<28} {contract:<26} {count:>4} checks  {statuses}{ratio}")
    backend, seconds = report["backend"], report["run"]["seconds"]
    lines.append(f"{backend['name']} on {backend['device_name']}: {_counts(report) or 'nothing run'}, {seconds:.0f} s")
    if where:
        lines.append(f"report: {where}")
    return "\n".join(lines)


def verdict(report: dict[str, Any]) -> str:
    wrong = bool(report["problems"]) or bool({"fail", "error"} & report["summary"].keys())
    return f"**{'does not conform' if wrong else 'conforms'}** ({_counts(report)})"


def _counts(report: dict[str, Any]) -> str:
    return ", ".join(f"{report['summary'][s]} {s}" for s in ORDER if s in report["summary"])


IMPLEMENTATION_COLUMNS = ["implementation", "contract", "checks", "status", "worst ratio", "seconds"]


def _implementations(report: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for implementation in report["backend"]["implementations"]:
        groups[implementation["id"], implementation["contract"]] = []
    for case in report["cases"]:
        groups[case["implementation"] or "(the backend)", case["id"].split("/")[0]].append(case)
    for (identifier, contract), cases in groups.items():
        counts = ", ".join(f"{n} {s}" for s in ORDER if (n := sum(c["status"] == s for c in cases)))
        ratios = [ratio for case in cases if (ratio := _ratio(case)) is not None]
        seconds = sum(case["seconds"] for case in cases)
        worst = f"{max(ratios):.2f}" if ratios else ""
        yield identifier, contract, str(len(cases)), counts or "took no check of this run", worst, f"{seconds:.1f}"


def _wrong(report: dict[str, Any], cases: list[dict[str, Any]]) -> Iterator[str]:
    yield from report["problems"]
    for case in cases:
        yield f"`{_label(case)}` ({case['status']}): {_last_line(case['message'])}"


def _closest(report: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    rows = [
        (numbers["ratio"], _label(case), name, numbers)
        for case in report["cases"]
        for name, numbers in case["results"].items()
        if numbers["ratio"] is not None
    ]
    for ratio, label, name, numbers in sorted(rows, key=lambda row: -row[0])[:CLOSEST]:
        pairs = (f"{numbers[f'{k}_error']:.2e} / {numbers[f'{k}_bound']:.2e}" for k in ("max", "rms"))
        yield f"`{label}`", name, f"{ratio:.2f}", *pairs


def _every(report: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for case in report["cases"]:
        ratio = _ratio(case)
        yield f"`{_label(case)}`", case["status"], "" if ratio is None else f"{ratio:.2f}", f"{case['seconds']:.2f}"


def _software(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "python", report["environment"]["python"]
    yield from (report["environment"]["packages"] | report["backend"]["versions"]).items()


def _ratio(case: dict[str, Any]) -> float | None:
    return max((r["ratio"] for r in case["results"].values() if r["ratio"] is not None), default=None)


def _label(case: dict[str, Any]) -> str:
    return f"{case['id']} [{case['implementation']}]" if case["implementation"] else case["id"]


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1] if text.strip() else ""


def _table(header: list[str], rows: Any) -> list[str]:
    escaped = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *escaped)]

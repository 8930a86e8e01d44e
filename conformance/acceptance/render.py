"""Items before they are asked, and what came of them: for a terminal and as Markdown. Read from JSON types only."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .ask import AS_EXPECTED, COULD_NOT_RUN, DIFFERS, VERDICTS

_NOTICE = "answers come from an emulation, not from a device"


def plan(backend: str, items: Sequence[Mapping[str, Any]]) -> str:
    """The checklist, without a device."""
    seconds = sum(item["estimated_seconds"] for item in items)
    lines = [
        f"{len(items)} questions for a device of {backend}, in this order; about {seconds / 60:.0f} minutes on one "
        "(an estimate: first calls load kernels)",
    ]
    for number, item in enumerate(items, 1):
        lines += ["", f"{number:>2}. {item['id']}   ({item['estimated_seconds']:.0f} s)   {item['question']}"]
        lines.append(f"    matters    {item['why']}")
        lines.append(f"    calls      {', '.join(item['calls'])}")
        lines += _answers(item, "    ")
        if item["hardware_only"]:
            lines.append(f"    emulated   cannot answer: {item['hardware_only']}")
    return "\n".join(lines)


def _answers(item: Mapping[str, Any], indent: str) -> Iterator[str]:
    for answer, follows in item["expected"].items():
        yield f"{indent}expected   {answer}" + (f": then {follows}" if follows else "")
    for answer, follows in item["otherwise"].items():
        yield f"{indent}otherwise  {answer}: {follows}"
    yield f"{indent}otherwise  anything else: {item['unforeseen']}"


def head(found: Mapping[str, Any]) -> str:
    device = found["device"]
    versions = ", ".join(f"{name} {version}" for name, version in device["versions"].items())
    told = f"{found['backend']} on {device['name']}; {versions}"
    return f"{told}\nEMULATED: {_NOTICE}; they test this program" if device["emulation"] else told


def line(record: Mapping[str, Any]) -> str:
    """One item in a terminal, as soon as it is answered."""
    said = record["answer"] or record["error"]
    return f"{record['verdict']:<13}  {record['id']:<30} {record['seconds']:>6.1f} s  {said}"


def summary(found: Mapping[str, Any], where: str | None = None) -> str:
    """The end of a run in a terminal: what is to be done, and the counts."""
    lines = []
    for record in found["items"]:
        if record["verdict"] == DIFFERS:
            lines += [f"\n{record['id']}: {record['question']}", f"  answer   {record['answer']}"]
            lines += [f"  matters  {record['why']}", f"  change   {record['follows']}"]
        elif record["follows"] and not found["device"]["emulation"]:
            lines += [f"\n{record['id']}: {record['answer']}", f"  allows   {record['follows']}"]
    emulated = f", {_NOTICE}" if found["device"]["emulation"] else ""
    lines.append(f"\n{counts(found)}, {found['run']['seconds']:.0f} s{emulated}")
    if where:
        lines.append(f"report: {where}")
    return "\n".join(lines).lstrip("\n")


def counts(found: Mapping[str, Any]) -> str:
    parts = [f"{found['summary'][verdict]} {verdict}" for verdict in VERDICTS if verdict in found["summary"]]
    left = found["run"]["items"] - len(found["items"])
    return ", ".join([*parts, *([f"{left} not asked"] if left else [])])


def markdown(found: Mapping[str, Any]) -> str:
    """The report for people, complete: whoever changes the project by it needs no other file."""
    device, source = found["device"], found["source"]
    commit = f"commit `{source['commit'][:12]}`" if source["commit"] else "installed wheel"
    facts = {
        "device": f"{device['name']}, {device['count']} visible, {device['memory'] / 2**30:.1f} GiB",
        "result": counts(found),
        "software": ", ".join(
            f"{k} {v}" for k, v in {**found["environment"]["packages"], **device["versions"]}.items()
        ),
        "ospnext": f"{found['ospnext']}, {commit}{' with uncommitted changes' if source['dirty'] else ''}",
        "variables": ", ".join(f"`{k}={v}`" for k, v in found["environment"]["variables"].items()) or "none set",
        "run": f"{found['run']['started']}, {found['run']['seconds']:.0f} s",
    }
    parts = [f"# Acceptance of a device by `{found['backend']}`", ""]
    if device["emulation"]:
        parts += [
            f"**This run is emulated: {_NOTICE}** ({device['emulation']}). It shows that the questions can be asked.",
            "",
        ]
    parts += _table(["", ""], facts.items())
    for verdict, title in ((DIFFERS, "What differs, and what to change"), (COULD_NOT_RUN, "What could not run")):
        records = [record for record in found["items"] if record["verdict"] == verdict]
        if records:
            parts += ["", f"## {title}", *(line for record in records for line in _section(record))]
    allowed = [r for r in found["items"] if r["verdict"] == AS_EXPECTED and r["follows"]]
    if allowed and not device["emulation"]:
        parts += ["", "## What the answers allow", ""]
        parts += _table(["item", "answer", "allows"], ((f"`{r['id']}`", r["answer"], r["follows"]) for r in allowed))
    parts += ["", "## Every answer", ""]
    rows = (
        (f"`{r['id']}`", r["question"], r["verdict"], r["answer"] or r["error"], f"{r['seconds']:.1f}")
        for r in found["items"]
    )
    parts += _table(["item", "question", "verdict", "answer", "seconds"], rows)
    parts += ["", "## Numbers behind them", ""]
    parts += [f"- `{r['id']}`: `{json.dumps(r['details'])}`" for r in found["items"] if r["details"]]
    return "\n".join(parts) + "\n"


def _section(record: Mapping[str, Any]) -> Iterator[str]:
    yield from ("", f"### `{record['id']}`", "", record["question"], "")
    yield from _table(
        ["", ""],
        {
            "answer" if record["answer"] else "error": record["answer"] or record["error"],
            "expected": "; ".join(record["expected"]),
            "change": record["follows"] or "none before it is answered",
            "relies on it": record["why"],
            "calls": ", ".join(f"`{call}`" for call in record["calls"]),
        }.items(),
    )


def _table(header: Sequence[str], rows: Any) -> list[str]:
    escaped = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *escaped)]

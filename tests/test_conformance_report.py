"""Reports of the conformance suite: what a run leaves behind, and the commands."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
from pathlib import Path

import fake_backends as fake
import jsonschema
import pytest

from ospnext.backends.reference import MANIFEST
from ospnext.cli import main
from ospnext.conformance import matrix, release, render, report, runner, verify
from ospnext.conformance.session import Session
from ospnext.ops.policy import use_registry
from ospnext.ops.registry import Registry, registry

SMALL = "attention/required/b1-q1-k3-*"
PLAIN = "attention/required/b1-q1-k3-h2-d64-bf16-plain"
SELECTION = "selection/required/predicates-are-pure"
SCHEMA = json.loads((release.HERE / "data" / "report.schema.json").read_text())


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("OSPNEXT_BACKEND", "OSPNEXT_OPS", "OSPNEXT_FALLBACK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What a small run leaves behind."""
    out = tmp_path_factory.mktemp("run") / "new" / "report"
    session = Session("reference", patterns=[SMALL, SELECTION], out=out)
    assert len(list(session.run())) == len(session.steps)
    session.finish()
    return out


@pytest.fixture(scope="module")
def small(folder) -> dict:
    return json.loads((folder / "report.json").read_text())


def valid(made: dict) -> None:
    jsonschema.Draft202012Validator(SCHEMA).validate(made)


def labels(made: dict) -> list[str]:
    return [f"{c['id']} [{c['implementation']}]" if c["implementation"] else c["id"] for c in made["cases"]]


# ---- what a run leaves behind


def test_the_schema_is_one_and_allows_nothing_unknown(small):
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    valid(small)
    for where in ("", "suite", "backend", "run", "source", "environment"):
        made = copy.deepcopy(small)
        (made[where] if where else made)["surprise"] = 1
        with pytest.raises(jsonschema.ValidationError, match="surprise"):
            valid(made)
    for kind in ("cases", "decisions"):
        made = copy.deepcopy(small)
        made[kind][0]["surprise"] = 1
        with pytest.raises(jsonschema.ValidationError, match="surprise"):
            valid(made)


def test_a_report_says_what_ran(folder, small):
    assert sorted(path.name for path in folder.iterdir()) == ["report.json", "report.md"]  # the journal is gone
    steps = Session("reference", patterns=[SMALL, SELECTION]).steps
    assert labels(small) == [step.label for step in steps]
    assert {c["implementation"] for c in small["cases"]} == {"reference.sdpa", "reference.math", None}
    assert small["summary"] == {"pass": len(steps)}
    assert small["digest"] == report.digest(small)
    assert small["backend"]["capability"] is None
    assert small["suite"]["hash"] == release.suite_hash()
    assert small["run"]["patterns"] == [SMALL, SELECTION]
    for case in small["cases"]:
        if case["implementation"]:
            decision = small["decisions"][case["decision"]]
            assert case["chosen"] == (decision["chosen"] == case["implementation"])
            assert all(0 <= numbers["ratio"] <= 1 for numbers in case["results"].values())


def test_the_markdown_names_every_check_and_says_what_a_terminal_says(folder, small):
    text = (folder / "report.md").read_text()
    assert text == render.markdown(small)
    every = text.partition("## Every check")[2]
    assert all(f"| `{label}` | pass |" in every for label in labels(small))
    assert "What is wrong" not in text and "**conforms** (17 pass)" in text
    wheel = small | {"source": {"commit": None, "dirty": None}}
    assert "installed wheel\n" in render.markdown(wheel).replace(" |\n", "\n")
    assert "uncommitted" in render.markdown(small | {"source": {"commit": "c" * 40, "dirty": True}})


def test_the_summary_names_what_failed_and_ends_with_one_line(small):
    assert render.summary(small, "here").splitlines()[-1] == "report: here"
    counts, last = render.summary(small).splitlines()[:-1], render.summary(small).splitlines()[-1]
    assert last.startswith("reference on ") and ": 17 pass, " in last
    rows = [line.split()[:4] for line in counts]
    assert {(i.id, i.contract) for i in MANIFEST.implementations} <= {(row[0], row[1]) for row in rows}
    assert [row for row in rows if row[2] != "0"] == [
        ["reference.sdpa", "attention", "8", "checks"],
        ["reference.math", "attention", "8", "checks"],
        ["(the", "backend)", "selection", "1"],
    ]
    made = copy.deepcopy(small)
    made["cases"][0] |= {"status": "fail", "message": "first line\nout is 7 times its bound"}
    made |= {"summary": {"pass": 16, "fail": 1}, "problems": ["a stale waiver"]}
    lines = render.summary(made).splitlines()
    assert lines[:3] == [f"FAIL   {labels(made)[0]}", "         out is 7 times its bound", "PROBLEM  a stale waiver"]
    assert ": 16 pass, 1 fail, " in lines[-1]
    assert "**does not conform** (16 pass, 1 fail)" in render.markdown(made)


def test_after_a_lost_device_nothing_is_judged(monkeypatch):
    """A kernel that reads astray takes every later call with it: one check is to blame, and the report names it."""
    session = Session("reference", patterns=[SMALL])
    real = runner.run_step

    def run_step(step, *rest):
        result = real(step, *rest)
        return dataclasses.replace(result, status="error") if step is session.steps[1] else result

    monkeypatch.setattr(runner, "run_step", run_step)
    monkeypatch.setattr(runner, "is_lost", lambda device: True)
    results = [result for _, result in session.run()]
    assert [r.status for r in results[:3]] == ["pass", "error", "error"]
    assert all(f"the device was lost in {session.steps[1].label}" in r.message for r in results[2:])
    assert len(results) == len(session.steps) > 3


def test_a_crash_leaves_a_journal_that_names_the_check(tmp_path, monkeypatch):
    session = Session("reference", patterns=[SMALL], out=tmp_path)
    real = runner.run_step

    def run_step(step, *rest):
        if step is session.steps[2]:
            raise SystemExit("the driver took the process down")
        return real(step, *rest)

    monkeypatch.setattr(runner, "run_step", run_step)
    with pytest.raises(SystemExit):
        list(session.run())
    assert [path.name for path in tmp_path.iterdir()] == ["report.jsonl"]
    lines = [json.loads(line) for line in (tmp_path / "report.jsonl").read_text().splitlines()]
    assert [line["status"] for line in lines] == ["started", "pass", "started", "pass", "started"]
    assert lines[-1]["id"] == session.steps[2].label
    Session("reference", patterns=[SMALL], out=tmp_path)  # a new run starts a new journal
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_was_stopped_is_no_success(tmp_path):
    session = Session("reference", patterns=[SMALL], out=tmp_path)
    next(session.run())
    assert (tmp_path / "report.jsonl").exists()
    made = session.finish()
    assert made["problems"] == [f"{len(session.steps) - 1} checks of this run were not run"]
    valid(made)


# ---- commands


def conformance(*words: str) -> int:
    return main(["conformance", *words])


def error_line(words: list[str], capsys, *fragments: str) -> None:
    """The command exits with 2, and all it says is one `error:` line with these fragments."""
    assert conformance(*words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith("error: ")
    for fragment in fragments:
        assert fragment in line


def test_exit_codes(tmp_path, capsys):
    assert conformance("run", "--backend", "reference", "--case", PLAIN, "--out", str(tmp_path / "a")) == 0
    assert capsys.readouterr().out.endswith(f"report: {tmp_path / 'a'}\n")
    assert conformance("run", "--backend", "reference", "--case", PLAIN, "--quiet") == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert conformance("verify", str(tmp_path / "a")) == 1  # it is not complete
    assert "refused: " in capsys.readouterr().err
    with use_registry(Registry([fake.backend("acme", fake.kernel("acme.one"))])):
        assert conformance("run", "--backend", "acme", "--case", PLAIN, "--quiet", "--out", str(tmp_path / "b")) == 1
        assert f"FAIL   {PLAIN} [acme.one]\n         out is " in capsys.readouterr().out
        valid(json.loads((tmp_path / "b" / "report.json").read_text()))


def test_the_group_lists_its_commands(capsys):
    with pytest.raises(SystemExit) as exit:
        conformance()
    assert exit.value.code == 0
    said = capsys.readouterr().out
    assert [line.split()[1] for line in said.splitlines() if line.startswith("  conformance ")] == [
        "run",
        "list",
        "verify",
        "device-acceptance",
    ]
    assert "generate" not in said


def test_mistakes_are_one_clear_line(capsys, tmp_path):
    (tmp_path / "file").touch()
    mistakes = {
        ("--level", "requierd"): "unknown level 'requierd'; levels: required, optional, extension",
        ("--level", ""): "unknown level ''; levels:",
        ("--case", "atention/*"): "no check matches 'atention/*'; `ospnext conformance list` prints all",
        ("--shard", "0/3"): "--shard '0/3': give i/n with 1 <= i <= n, such as 2/8",
        ("--shard", "4/3"): "--shard '4/3': give i/n",
        ("--shard", "half"): "--shard 'half': give i/n",
        ("--device", "tpuu"): "--device 'tpuu': Expected one of cpu, ",
        ("--out", str(tmp_path / "file")): f"--out {tmp_path / 'file'}: File exists",
        ("--waivers", str(tmp_path / "absent.toml")): "absent.toml",
    }
    for words, message in mistakes.items():
        error_line(["run", "--backend", "reference", *words], capsys, message)
    error_line(["run", "--backend", "reference", "--device", "hpu:7"], capsys, "--device hpu:7: ")
    error_line(["run", "--backend", "referense"], capsys, "unknown backend 'referense'", "reference")
    for command in ("run", "list"):
        error_line([command, "--backend", "auto"], capsys, "Give --backend NAME", "known: ascend, cuda, reference")
    error_line(["run"], capsys, "Give --backend NAME or set OSPNEXT_BACKEND; known: ascend, cuda, reference")
    error_line(["list", "--case", "nothing"], capsys, "no check matches 'nothing'")
    error_line(["verify", str(tmp_path / "file"), "--level", "x"], capsys, "file: not a report")
    with use_registry(Registry([fake.backend("acme", fake.kernel("acme.one"))])):
        error_line(["run", "--backend", "acme", "--device", "meta"], capsys, "backend acme computes on cpu")


def test_the_backend_may_be_named_by_the_environment(monkeypatch, capsys):
    monkeypatch.setenv("OSPNEXT_BACKEND", "reference")
    with use_registry(registry()):  # forgets what was read before
        assert conformance("run", "--case", PLAIN, "--quiet") == 0
    assert capsys.readouterr().out.startswith("reference on ")


def test_shards_are_a_partition_that_keeps_oracles_together(tmp_path):
    whole = Session("reference").steps
    parts = [[step.label for step in Session("reference", shard=(i, 3)).steps] for i in (1, 2, 3)]
    assert sorted(itertools.chain(*parts)) == sorted(step.label for step in whole)
    owner = {label: i for i, part in enumerate(parts) for label in part}
    groups: dict[str, set[int]] = {}
    for step in whole:
        groups.setdefault(step.check.group or step.check.id, set()).add(owner[step.label])
    assert all(len(owners) == 1 for owners in groups.values())
    for i in (1, 2, 3):
        words = ("--backend", "reference", "--case", SMALL, "--quiet", "--out", str(tmp_path))
        assert conformance("run", *words, "--shard", f"{i}/3") == 0
    assert sorted(p.name for p in tmp_path.glob("*.json")) == [f"report-{i}-of-3.json" for i in (1, 2, 3)]
    found = [label for made in verify.read(tmp_path) for label in labels(made)]
    one = render.together(verify.read(tmp_path))
    assert (labels(one), one["summary"]) == (sorted(found), {"pass": len(found)})
    assert f"**conforms** ({len(found)} pass)" in render.markdown(one)
    device = runner.default_device("reference")
    small = runner.plan(matrix.select_checks(matrix.all_checks(), ["required"], [SMALL]), "reference", device)
    assert sorted(found) == sorted(step.label for step in small)

"""`verify`: what proves a backend's conformance is accepted, and whatever spoils it is refused with a reason."""

from __future__ import annotations

import copy
import datetime
import json
import subprocess
import sys

import jsonschema
import pytest

from ospnext.cli import main
from ospnext.conformance import release, report, verify
from ospnext.conformance.session import Session
from ospnext.errors import ConfigError

PLAIN = "attention/required/b1-q1-k3-h2-d64-bf16-plain"
SCHEMA = json.loads((release.HERE / "data" / "report.schema.json").read_text())
TODAY = datetime.date(2026, 11, 25)


def finished(made: dict, **changes) -> dict:
    """The report with changes, and a digest that fits."""
    made = made | changes
    return made | {"digest": report.digest(made)}


@pytest.fixture(scope="module")
def complete() -> dict:
    """A report in which every required check has passed: a small run, and copies of one of its results."""
    session = Session("reference", patterns=[PLAIN, "selection/required/predicates-are-pure"])
    assert len(list(session.run())) == 3
    made = json.loads(json.dumps(session.finish()))
    model = made["cases"][-1]
    done = {case["id"] for case in made["cases"]}
    made["cases"] += [
        copy.deepcopy(model) | {"id": i, "implementation": None, "chosen": True, "results": {}, "decision": None}
        for i in release.must_pass("required")
        if i not in done
    ]
    return finished(made, source={"commit": "c" * 40, "dirty": False}, summary={"pass": len(made["cases"])})


def problems(*reports: dict, levels=("required",)) -> list[str]:
    reports = json.loads(json.dumps(reports))
    return verify.problems(reports, TODAY, levels)


def waiver(**fields) -> dict:
    return {
        "cases": [PLAIN],
        "backend": "reference",
        "reason": "known",
        "issue": "https://example.org/1",
        "owner": "us",
        "granted": "2026-11-01",
        "expires": "2026-11-25",
        "implementation": "",
        "device": "",
    } | fields


def test_a_complete_report_is_accepted(complete):
    jsonschema.Draft202012Validator(SCHEMA).validate(complete)
    assert problems(complete) == []
    half = len(complete["cases"]) // 2
    shards = [finished(complete, cases=complete["cases"][part]) for part in (slice(half), slice(half, None))]
    assert problems(*shards) == []
    assert len(problems(shards[0])) == 1
    elsewhere = finished(shards[1], backend=shards[1]["backend"] | {"device": "acme:1"})
    assert problems(shards[0], elsewhere) == []
    waived = copy.deepcopy(complete)
    waived["cases"][0]["status"] = "waived"
    assert problems(finished(waived, waivers=[waiver()])) == []


def refused(message: str):
    """Mark a function that spoils a complete report with what `verify` must then say."""
    return lambda spoil: SPOILED.append((message, spoil)) or spoil


SPOILED: list = []


@refused("the digest does not fit the contents: the file was changed after the run")
def fail_edited_to_pass_with_the_old_digest(made):
    made["cases"][0]["status"] = "fail"
    old = report.digest(made)
    made["cases"][0]["status"] = "pass"
    return made | {"digest": old}


@refused(f"{PLAIN} [reference.sdpa]: called a pass, and out is not within its bound")
def fail_edited_to_pass_with_a_new_digest(made):
    numbers = made["cases"][0]["results"]["out"]
    numbers |= {"max_error": 2 * numbers["max_bound"], "ratio": 0.5}
    return finished(made)


@refused(f"{PLAIN} [reference.sdpa]: called a pass, and out is not within its bound")
def error_that_is_no_number(made):
    made["cases"][0]["results"]["out"]["rms_error"] = None
    return finished(made)


@refused(f"{PLAIN} [reference.sdpa]: fail: out is 3 times its bound")
def failure(made):
    made["cases"][0] |= {"status": "fail", "message": "out is 3 times its bound"}
    return finished(made)


@refused("1 required checks were not run: model/required/dual_end-k2-fp32-blocks")
def missing_id(made):
    made["cases"] = [case for case in made["cases"] if case["id"] != "model/required/dual_end-k2-fp32-blocks"]
    return finished(made)


@refused("model/required/dual_end-k2-fp32-blocks: run twice, or not on exactly one chosen implementation")
def doubled_id(made):
    made["cases"] += [case for case in made["cases"] if case["id"] == "model/required/dual_end-k2-fp32-blocks"]
    return finished(made)


@refused(f"{PLAIN}: run twice, or not on exactly one chosen implementation")
def only_an_implementation_that_is_not_chosen(made):
    del made["cases"][0]
    return finished(made)


@refused("made from a checkout with uncommitted changes")
def dirty_tree(made):
    return finished(made, source={"commit": "c" * 40, "dirty": True})


@refused("made by another suite, 0123456789ab of ospnext 9.9; this one is {hash}")
def other_suite(made):
    return finished(made, suite=made["suite"] | {"hash": "0123456789abcdef", "version": "9.9"})


@refused("its list of required checks is not that of this suite")
def other_list(made):
    return finished(made, suite=made["suite"] | {"must_pass": made["suite"]["must_pass"] | {"required": "0"}})


@refused(f"the waiver of {PLAIN} expired on 2026-11-24 (https://example.org/1)")
def expired_waiver(made):
    made["cases"][0]["status"] = "waived"
    return finished(made, waivers=[waiver(expires="2026-11-24")])


@refused(f"{PLAIN}: waived without a waiver")
def waived_without_a_waiver(made):
    made["cases"][0]["status"] = "waived"
    return finished(made)


@refused(f"{PLAIN} [reference.sdpa]: unsupported, which needs a reason and is no answer at level required")
def unsupported_at_level_required(made):
    made["cases"][0] |= {"status": "unsupported", "reasons": ["dtype: got bf16, want fp32"]}
    return finished(made)


@refused("1 checks are unknown to this suite: attention/required/easy")
def unknown_id(made):
    made["cases"].append(made["cases"][-1] | {"id": "attention/required/easy"})
    return finished(made)


@refused(f"{PLAIN} [reference.sdpa]: level 'optional' or status 'pass' is not what the id says or the suite knows")
def level_that_is_not_the_id_s(made):
    made["cases"][0]["level"] = "optional"
    return finished(made)


@refused("the run ended with problems: a stale waiver")
def problems_of_the_run(made):
    return finished(made, problems=["a stale waiver"])


@refused("malformed report: IndexError: list index out of range")
def id_without_slashes(made):
    made["cases"][-1]["id"] = "easy"
    return finished(made)


@refused("malformed report: KeyError: 'hash'")
def no_suite_hash(made):
    return finished(made, suite={"version": "1"})


@refused("malformed report: TypeError: 'int' object is not iterable")
def cases_that_are_none(made):
    return finished(made, cases=3)


@pytest.mark.parametrize(("message", "spoil"), SPOILED, ids=[spoil.__name__ for _, spoil in SPOILED])
def test_a_spoiled_report_is_refused_for_its_own_reason(message, spoil, complete):
    assert problems(spoil(copy.deepcopy(complete))) == [message.replace("{hash}", complete["suite"]["hash"][:12])]


def test_shards_must_be_of_one_run(complete):
    half = len(complete["cases"]) // 2
    first = finished(complete, cases=complete["cases"][:half])
    rest = {"cases": complete["cases"][half:]}
    commit = finished(complete, **rest, source={"commit": "d" * 40, "dirty": False})
    assert problems(first, commit) == ["the reports differ in source: they are not shards of one run"]
    device = finished(complete, **rest, backend=complete["backend"] | {"device_name": "another"})
    assert problems(first, device) == ["the reports differ in backend: they are not shards of one run"]


def test_a_level_is_proven_only_where_it_was_asked_for(complete):
    (missing,) = problems(complete, levels=("required", "optional"))
    assert missing.startswith(f"{len(release.must_pass('optional'))} optional checks were not run: attention/optional/")
    for levels in (("extension",), ("requierd",), ()):
        with pytest.raises(ConfigError, match="a report can prove required and optional"):
            problems(complete, levels=levels)


def test_what_is_no_report_is_an_error(tmp_path, complete, capsys):
    def error_line(name: str, message: str) -> None:
        assert main(["conformance", "verify", str(tmp_path / name)]) == 2
        said = capsys.readouterr()
        (line,) = said.err.splitlines()
        assert (said.out, line.startswith("error: "), message in line) == ("", True, True), line

    texts = {
        "{": "not a report: ",
        "[]": "not a conformance report of schema 1",
        json.dumps(complete | {"schema": 2}): "not a conformance report of schema 1",
        json.dumps({k: v for k, v in complete.items() if k != "digest"}): "not a conformance report of schema 1",
    }
    for text, message in texts.items():
        (tmp_path / "report.json").write_text(text)
        error_line("report.json", "report.json: " + message)
    (tmp_path / "empty").mkdir()
    error_line("empty", "empty holds no *.json")
    error_line("absent.json", "absent.json: not a report: ")


def test_verify_needs_no_torch(tmp_path, complete):
    (tmp_path / "report.json").write_text(json.dumps(complete))
    code = """
        import sys
        from ospnext.cli import main
        code = main(["conformance", "verify", sys.argv[1]])
        print(code, "torch" in sys.modules, "numpy" in sys.modules)
    """
    command = [sys.executable, "-c", "\n".join(line.strip() for line in code.splitlines()), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    accepted, facts = done.stdout.splitlines()
    assert accepted.startswith("accepted: reference on ") and accepted.endswith("results, level required")
    assert facts == "0 False False"


def test_exit_codes(tmp_path, capsys, complete):
    file = tmp_path / "report.json"
    broken = finished(complete, cases=3)
    for made, code, said in (
        (complete, 0, "accepted: "),
        (failure(copy.deepcopy(complete)), 1, "refused: "),
        (broken, 1, "refused: malformed"),
    ):
        file.write_text(json.dumps(made))
        assert main(["conformance", "verify", str(file)]) == code
        streams = capsys.readouterr()
        assert (streams.err if code else streams.out).startswith(said)
    assert main(["conformance", "verify", str(file), "--level", "requierd"]) == 2
    assert "a report can prove required and optional" in capsys.readouterr().err


def test_the_table_of_all_shards_is_written_if_they_are_accepted(tmp_path, capsys, complete):
    half = len(complete["cases"]) // 2
    (tmp_path / "shards").mkdir()
    for i, part in enumerate((slice(half), slice(half, None))):
        cases = complete["cases"][part]
        shard = finished(
            complete,
            cases=cases,
            summary={"pass": len(cases)},
            backend=complete["backend"] | {"device": f"acme:{i}"},
        )
        (tmp_path / "shards" / f"{i}.json").write_text(json.dumps(shard))
    verify_ = ["conformance", "verify", str(tmp_path / "shards"), "--markdown"]
    assert main([*verify_, str(tmp_path / "absent" / "table.md")]) == 2
    assert "give a file in a folder that is there" in capsys.readouterr().err
    table = tmp_path / "table.md"
    assert main([*verify_, str(table), "--level", "required,optional"]) == 1
    assert not table.exists()
    assert main([*verify_, str(table)]) == 0
    count = len(complete["cases"])
    assert f"({count} pass)" in table.read_text() and f", {count} results |" in table.read_text()
    assert "`acme:0, acme:1`" in table.read_text()

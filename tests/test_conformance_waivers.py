"""Waivers: a known failure is waived while it is owned and dated, and everything else about a waiver is a failure."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import fake_backends as fake
import pytest

from ospnext.cli import main
from ospnext.conformance.session import SHIPPED_WAIVERS
from ospnext.conformance.waivers import MAX_DAYS, read_waivers
from ospnext.errors import ConfigError
from ospnext.ops.policy import use_registry
from ospnext.ops.registry import Registry

WRONG = "attention/required/b1-q1-k3-h2-d64-bf16-plain"
OTHER = "attention/required/b1-q1-k3-h2-d64-fp32-plain"
TODAY = datetime.date.today()
ACME = Registry([fake.backend("acme", fake.kernel("acme.one"), fake.kernel("acme.two", "two"))])


def day(days: int) -> datetime.date:
    return TODAY + datetime.timedelta(days)


def entry(**changes: Any) -> dict[str, Any]:
    """A valid waiver, with changes; a value of None leaves a key out."""
    fields = {
        "cases": [WRONG],
        "backend": "acme",
        "reason": "the kernel gives ones",
        "issue": "https://example.org/issues/7",
        "owner": "kernels@example.org",
        "granted": day(-10),
        "expires": day(10),
    }
    return {key: value for key, value in (fields | changes).items() if value is not None}


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """Run a few checks on a backend whose kernels are wrong, with waivers: (exit code, report, what was printed)."""
    for name in ("OSPNEXT_BACKEND", "OSPNEXT_OPS", "OSPNEXT_FALLBACK"):
        monkeypatch.delenv(name, raising=False)

    def run(*entries: dict[str, Any], backend: str = "acme", case: str = WRONG) -> tuple[int, dict[str, Any], str]:
        words = ["--backend", backend, "--case", case, "--waivers", str(write(tmp_path, *entries))]
        if backend == "acme":
            with use_registry(ACME):
                code = main(["conformance", "run", *words, "--out", str(tmp_path / "out")])
        else:
            code = main(["conformance", "run", *words, "--out", str(tmp_path / "out")])
        return code, json.loads((tmp_path / "out" / "report.json").read_text()), capsys.readouterr().out

    return run


def write(folder: Path, *entries: dict[str, Any], extra: str = "") -> Path:
    lines = [extra]
    for each in entries:
        lines += ["[[waiver]]"]
        lines += [f"{k} = {v if isinstance(v, datetime.date) else json.dumps(v)}" for k, v in each.items()]
    (folder / "waivers.toml").write_text("\n".join(lines) + "\n")
    return folder / "waivers.toml"


def statuses(report: dict[str, Any]) -> list[str]:
    return [case["status"] for case in report["cases"]]


# ---- waivers in force


def test_without_a_waiver_a_wrong_kernel_fails(run):
    code, report, said = run()
    assert (code, statuses(report), report["problems"]) == (1, ["fail", "fail"], [])
    assert f"FAIL   {WRONG} [acme.one]" in said


def test_a_valid_waiver_turns_failures_into_waived(run):
    code, report, said = run(entry())
    assert (code, statuses(report), report["problems"]) == (0, ["waived", "waived"], [])
    assert report["summary"] == {"waived": 2}
    assert [each["expires"] for each in report["waivers"]] == [str(day(10))]
    message = f"waiver of {WRONG} (https://example.org/issues/7, kernels@example.org, until {day(10)}): out is "
    assert all(case["message"].startswith(message) for case in report["cases"])
    assert "acme on a device made by hand: 2 waived" in said


def test_today_is_in_force_on_the_first_and_on_the_last_day(run):
    for dates in ({"granted": TODAY}, {"expires": TODAY}, {"granted": TODAY, "expires": TODAY}):
        assert run(entry(**dates))[0] == 0


def test_a_waiver_covers_only_what_it_names(run):
    code, report, _ = run(entry(implementation="acme.two"))
    assert (code, statuses(report), report["problems"]) == (1, ["fail", "waived"], [])
    code, report, _ = run(entry(), case="attention/required/b1-q1-k3-h2-d64-*-plain")
    assert (code, statuses(report)) == (1, ["waived", "waived", "fail", "fail"])
    for elsewhere in ({"backend": "emca"}, {"device": "Another One"}):
        code, report, _ = run(entry(**elsewhere))
        assert (code, statuses(report), report["problems"]) == (1, ["fail", "fail"], [])
    assert run(entry(device="made by hand"))[0] == 0
    # Of another check of the suite that this run does not hold: nothing is wrong with that.
    assert run(entry(), entry(cases=[OTHER]))[0] == 0


def test_a_kernel_that_raises_can_be_waived_too(run, monkeypatch):
    monkeypatch.setattr(fake.Constant, "forward", fake.Raising.forward)
    assert statuses(run()[1]) == ["error", "error"]
    code, report, _ = run(entry())
    assert (code, statuses(report)) == (0, ["waived", "waived"])


# ---- waivers that are failures themselves


def problem(run, message: str, expected: list[str], *entries: dict[str, Any], **where: str) -> None:
    code, report, said = run(*entries, **where)
    assert code == 1
    assert statuses(report) == expected
    assert report["problems"]
    for text in report["problems"]:
        assert message in text
        assert f"PROBLEM  {text}" in said


def test_an_expired_waiver_covers_nothing_and_is_named(run):
    message = f"in force from {day(-10)} to {day(-1)}, and today is {TODAY}"
    problem(run, message, ["fail", "fail"], entry(expires=day(-1)))


def test_a_waiver_of_the_future_covers_nothing_and_is_named(run):
    message = f"in force from {day(1)} to {day(10)}, and today is {TODAY}"
    problem(run, message, ["fail", "fail"], entry(granted=day(1)))


def test_an_id_that_no_check_has_is_named(run):
    absent = "attention/required/b1-q1-k3-h2-d64-bf16-plan"
    problem(run, f"there is no check '{absent}'", ["waived", "waived"], entry(cases=[WRONG, absent]))


def test_a_check_that_passes_now_needs_no_waiver(run):
    message = f"{WRONG} passes now; remove it from the file"
    problem(run, message, ["pass", "pass"], entry(backend="reference"), backend="reference")


# ---- files that are no waivers


MISTAKES = {
    "too long": (entry(expires=day(MAX_DAYS - 9)), "expires 181 days after it was granted; 0 to 180 are allowed"),
    "ends before it begins": (entry(granted=day(11)), "expires -1 days after it was granted"),
    "wildcard": (entry(cases=["attention/required/*"]), "full ids without wildcards, got ['attention/required/*']"),
    "other wildcards": (entry(cases=["attention/required/b[12]"]), "full ids without wildcards"),
    "no case": (entry(cases=[]), "full ids without wildcards, got []"),
    "one case as text": (entry(cases=WRONG), "full ids without wildcards"),
    "missing key": (entry(owner=None), "missing ['owner'], unknown []; keys: cases, backend, reason, issue, owner"),
    "unknown key": (entry(severity="low"), "missing [], unknown ['severity']; keys: "),
    "wrong url": (entry(issue="ISSUE-7"), "issue must be a URL, got 'ISSUE-7'"),
    "date as text": (entry(expires="2026-12-01"), "expires must be a date such as 2026-11-01, got '2026-12-01'"),
    "no owner": (entry(owner=" "), "owner must say something, got ' '"),
    "reason that is a number": (entry(reason=7), "reason must say something, got 7"),
    "implementation that is a number": (entry(implementation=7), "implementation must be text, got 7"),
    "device that is a list": (entry(device=["a"]), "device must be text, got ['a']"),
}


@pytest.mark.parametrize(("wrong", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_in_an_entry_is_named(wrong, message, tmp_path):
    path = write(tmp_path, entry(), wrong)
    with pytest.raises(ConfigError) as error:
        read_waivers(path)
    assert str(error.value).startswith(f"{path}, waiver 2: ")
    assert message in str(error.value)


def test_180_days_are_allowed(tmp_path):
    (waiver,) = read_waivers(write(tmp_path, entry(expires=day(MAX_DAYS - 10))))
    assert (waiver.expires - waiver.granted).days == MAX_DAYS == 180


def test_a_file_that_holds_something_else_is_named(tmp_path):
    for extra, message in (
        ("waiver = 3", "only [[waiver]] tables"),
        ("[waiver]\ncases = []", "two brackets"),
        ("[[waivers]]", "found ['waivers']"),
        ("[", ""),
    ):
        path = write(tmp_path, extra=extra)
        with pytest.raises(ConfigError) as error:
            read_waivers(path)
        assert str(path) in str(error.value)
        assert message in str(error.value)


def test_the_file_that_ships_is_valid():
    for waiver in read_waivers(SHIPPED_WAIVERS):
        assert waiver.granted <= TODAY

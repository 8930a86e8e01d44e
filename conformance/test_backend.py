"""The suite as pytest tests: one test per check and implementation, and the same report at the end."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ospnext.errors import OSPNextError

from .check import Result
from .plugin import REFUSAL
from .runner import Step
from .session import Session, named_backend, parse_levels, parse_shard


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "step" in metafunc.fixturenames:
        try:
            steps = _session(metafunc.config).steps
        except OSPNextError as error:
            steps, metafunc.config.stash[REFUSAL] = [], str(error)
        metafunc.parametrize("step", steps, ids=[step.label for step in steps])


def _session(config: pytest.Config) -> Session:
    """One for the whole pytest run."""
    if _KEY not in config.stash:
        option = config.getoption
        config.stash[_KEY] = Session(
            named_backend(option("--backend")),
            device=option("--device"),
            levels=parse_levels(option("--level")),
            patterns=option("--case"),
            shard=parse_shard(option("--shard")),
            waivers=option("--waivers"),
            out=option("--out"),
        )
    return config.stash[_KEY]


_KEY = pytest.StashKey[Session]()


@pytest.fixture(scope="session")
def session(request: pytest.FixtureRequest) -> Iterator[Session]:
    session = _session(request.config)
    yield session
    session.finish()


def test_check(step: Step, session: Session) -> None:
    result: Result = session.run_step(step)
    if result.status in ("fail", "error") and not session.is_waived(result):
        pytest.fail(f"{step.label}: {result.message}", pytrace=False)
    if result.status == "unsupported":
        print(f"unsupported: {'; '.join(result.reasons)}")


def test_waivers_are_in_force(session: Session) -> None:
    """Runs last: an expired, unmatched or now passing waiver is a failure of its own."""
    problems = session.waiver_problems()
    assert not problems, "\n".join(problems)

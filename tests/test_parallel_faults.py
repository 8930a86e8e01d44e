"""What goes wrong among ranks ends all of them, within the limit, with a message that names the cause."""

from __future__ import annotations

import contextlib
import multiprocessing
import re
import signal
import socket
from types import SimpleNamespace

import failing_ranks
import pytest
import torch
import torch.distributed as dist
from rank_processes import Ended, results, run_ranks

from ospnext.ops import collective_watch
from ospnext.ops.group_store import store_of

#: Seconds that a collective may take.
TIMEOUT = 2.0
#: Seconds within which every rank has ended by itself: to start, the timeout, to find out who is where, and to part.
WITHIN = 10.0 + 4 * TIMEOUT


def all_end(function, ranks: int, *arguments, timeout: float = TIMEOUT) -> list[Ended]:
    """How the ranks ended, none of them well, and none by this process."""
    found = run_ranks(function, ranks, *arguments, timeout=timeout)
    for rank, one in enumerate(found):
        assert one.exit_code is not None, f"rank {rank} had to be killed:\n{one.stderr}"
        assert one.exit_code != 0, f"rank {rank} took it for a success:\n{one.stderr}"
        assert one.seconds < WITHIN, f"rank {rank} ended after {one.seconds:.1f} s only:\n{one.stderr}"
    assert multiprocessing.active_children() == []
    return found


# ---- under watch


def test_a_rank_that_is_killed_mid_step_ends_the_others_and_is_named() -> None:
    *others, killed = all_end(failing_ranks.steps, 4, "killed", TIMEOUT)
    assert killed.exit_code == -signal.SIGKILL
    for rank, one in enumerate(others):
        assert one.exit_code == 1
        assert re.search(
            rf"CollectiveError: \w+ among ranks 0, 1, 2, 3 failed on rank {rank} after .*: rank 3 is", one.stderr
        )
        assert "rank 3: no sign of life" in one.stderr
        assert "Connection" in one.stderr  # what gloo said


def test_the_death_of_the_rank_that_holds_the_store_is_told() -> None:
    _, *others = all_end(failing_ranks.steps, 3, "killed", TIMEOUT, 0)
    for one in others:
        assert re.search(r"CollectiveError: \w+ among ranks 0, 1, 2 failed on rank \d", one.stderr)
        assert "the store of the job, in the process of rank 0 or of the launcher, does not answer" in one.stderr


def test_a_rank_that_is_stuck_elsewhere_is_named_and_ended() -> None:
    """The others run into the timeout; the one that hangs would stay for ever, and is told why it is ended."""
    *others, stuck = all_end(failing_ranks.steps, 3, "stuck", TIMEOUT)
    for rank, one in enumerate(others):
        assert re.search(
            rf"all_to_all among ranks 0, 1, 2 failed on rank {rank} after 2\.\d s: rank 2 is not in it", one.stderr
        )
        assert "with float32 [3, 3] on cpu; transport: " in one.stderr
        assert "rank 2: all_reduce, its collective 9 of the group: left it" in one.stderr
    assert stuck.exit_code == -signal.SIGTERM
    assert "ospnext: rank 2 is ended, since the job cannot go on. rank " in stuck.stderr
    assert "all_to_all among ranks 0, 1, 2 failed on rank" in stuck.stderr


def test_an_error_of_one_rank_is_told_to_all() -> None:
    first, last = all_end(failing_ranks.steps, 2, "raises", TIMEOUT)
    assert "the first to end was rank 1: ValueError: no such video: clip_17.mp4" in first.stderr
    assert last.stderr.rstrip().endswith("ValueError: no such video: clip_17.mp4")


def test_ranks_in_different_collectives_are_told_apart() -> None:
    for rank, one in enumerate(all_end(failing_ranks.steps, 2, "other_operation", TIMEOUT)):
        assert f"failed on rank {rank}" in one.stderr
        for other, operation in enumerate(("all_to_all", "all_gather")):  # who gave up first has ended by then
            place = rf"rank {other}: (has ended; )?{operation}, its collective 10 of the group: in it"
            assert re.search(place, one.stderr), one.stderr


def test_a_rank_that_is_done_early_is_no_success_where_others_wait_for_it() -> None:
    _, left = all_end(failing_ranks.steps, 2, "leaves", TIMEOUT)
    assert "rank 1 was done, but the job cannot go on. rank 0: all_to_all among ranks 0, 1" in left.stderr


def test_a_collective_that_a_device_does_not_finish_is_named() -> None:
    """With an event that never comes in the place of a device; the transport's own timeout is far away."""
    first, second = all_end(failing_ranks.late_on_its_device, 2, TIMEOUT, timeout=60.0)
    for rank, one in enumerate((first, second)):
        assert one.exit_code == -signal.SIGTERM
        assert (
            f"rank {rank} is ended, since the job cannot go on. rank 0: all_gather, collective 4 of its group"
            in one.stderr
        )
        assert re.search(r"is not done after \d\.\d s: rank 1 is not in it", one.stderr)
        assert "rank 1: all_reduce, its collective 3 of the group: left it" in one.stderr


def test_a_late_device_is_told_before_its_transport_ends_the_process() -> None:
    first, _ = all_end(failing_ranks.late_under_a_watchdog, 2, 2 * TIMEOUT, timeout=60.0)
    assert first.exit_code == -signal.SIGABRT
    assert re.search(r"rank 0 is ended, .* rank 0: all_gather, collective 4 of its group, is not done", first.stderr)
    assert first.stderr.count("is ended") == 1


def test_a_device_is_asked_as_the_current_one(monkeypatch) -> None:
    """By a thread that has none: it would open the first device of the host, on every rank."""
    current = []

    @contextlib.contextmanager
    def device(asked):
        current.append(asked)
        yield
        current.remove(asked)

    def event():
        return SimpleNamespace(record=lambda stream: None, query=lambda: current == [torch.device("cuda", 1)])

    module = SimpleNamespace(Event=event, current_stream=lambda device: None, device=device)
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    assert collective_watch._event_behind(torch.device("cuda", 1)).query()
    assert not current


def test_the_store_of_a_group_that_does_not_know_it(monkeypatch) -> None:
    """As groups of torch_npu: PyTorch has noted it beside them."""

    class Group:
        def get_group_store(self):
            return None

    group = Group()
    monkeypatch.setitem(dist.distributed_c10d._world.pg_map, group, ("hccl", "the store"))
    assert store_of(group) == "the store"


def test_ranks_may_be_done_at_different_times() -> None:
    """Later than the timeout after each other: who is done waits for who lives."""
    assert results(run_ranks(failing_ranks.done, 3, 0.8)) == ["done"] * 3


# ---- without


def test_without_a_watch_the_error_says_what_is_known() -> None:
    *others, slept = results(run_ranks(failing_ranks.unwatched, 3, TIMEOUT, timeout=TIMEOUT))
    assert slept == "slept"
    for rank, text in enumerate(others):
        assert re.search(
            rf"^CollectiveError: all_reduce among ranks 0, 1, 2 failed on rank {rank} after [23]\.\d s", text
        )
        assert "with bfloat16 [5, 2] on cpu; transport: " in text
        assert "`with ops.collective.watch(timeout):` around the job tells" in text


def test_a_barrier_names_who_did_not_come() -> None:
    first, late, last = results(run_ranks(failing_ranks.meeting, 3, 1.0))
    assert late == "late"
    for rank, (text, seconds) in ((0, first), (2, last)):
        assert text.startswith(
            f"CollectiveError: barrier of ranks 0, 1, 2: on rank {rank}, rank 1 did not come within 1."
        )
        assert 1.0 <= seconds < 3.0


def test_a_barrier_returns_when_the_last_rank_has_come() -> None:
    found = results(run_ranks(failing_ranks.meetings, 3))
    for number in range(4):
        last = max(came[number] for came, _ in found)
        assert all(left[number] >= last for _, left in found)


def test_a_barrier_waits_after_a_second_set_up_too() -> None:
    """Its keys are not those that the first one left in the store."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    waited, _ = results(run_ranks(failing_ranks.set_up_twice, 2, port))
    assert waited > 0.8


# ---- agreement

SAME = {"model config": "6e1b", "mesh": "dp 1, ssp 3"}


def errors(facts: list[dict[str, str]], environ: dict[int, dict[str, str]] | None = None) -> list:
    return results(run_ranks(failing_ranks.agree, len(facts), facts, environ=environ))


def test_ranks_that_agree_go_on() -> None:
    assert errors([SAME] * 3, {rank: {"OSPNEXT_BACKEND": "reference"} for rank in range(3)}) == [None] * 3


def test_another_backend_stops_the_job_with_a_diff() -> None:
    found = errors([SAME] * 3, {0: {"OSPNEXT_BACKEND": "reference"}, 2: {"OSPNEXT_BACKEND": "reference"}})
    assert [kind for kind, _, _ in found] == ["DisagreementError"] * 3
    (text,) = {text for _, text, _ in found}
    assert text.startswith("ranks 0, 1, 2 do not agree, and would compute different things or wait for each other")
    assert "\n  OSPNEXT_BACKEND\n    ranks 0, 2: reference\n    rank 1: not set\n  policy\n" in text
    assert "model config" not in text and "mesh" not in text
    assert text.endswith("Start every rank with the same environment, packages and configuration.")


def test_other_implementations_stop_the_job_with_a_diff() -> None:
    found = errors([SAME] * 2, {1: {"OSPNEXT_OPS": "attention=reference.math"}})
    (text,) = {text for _, text, _ in found}
    assert re.search(
        r"  implementations of attention\n    rank 0: reference\.\w+ for .*\n    rank 1: reference\.math for 121 of",
        text,
    )


@pytest.mark.parametrize("wrong", ["cuda", "cudda"])
def test_a_backend_that_one_rank_cannot_run_is_told_to_all(wrong: str) -> None:
    first, second = errors([SAME] * 2, {1: {"OSPNEXT_BACKEND": wrong}})
    assert first[:2] == second[:2]
    said = {"cuda": "BackendUnavailableError: OSPNEXT_BACKEND=cuda was asked", "cudda": "PolicyError: OSPNEXT_BACKEND"}
    assert f"  error at start-up\n    rank 1: {said[wrong]}" in first[1]
    assert (first[2], second[2]) == ("NoneType", "BackendUnavailableError" if wrong == "cuda" else "PolicyError")


def test_another_model_config_stops_the_job_with_a_diff() -> None:
    found = errors([SAME, SAME | {"model config": "77c0"}, SAME, SAME])
    (text,) = {text for _, text, _ in found}
    assert text.splitlines()[1:-1] == ["  model config", "    ranks 0, 2, 3: 6e1b", "    rank 1: 77c0"]


def test_a_fact_that_one_rank_does_not_tell_is_a_difference() -> None:
    ((_, text, _), _) = errors([SAME, {"mesh": SAME["mesh"]}])
    assert text.splitlines()[1:-1] == ["  model config", "    rank 0: 6e1b", "    rank 1: (nothing said)"]


def test_a_difference_is_told_though_the_store_is_gone_by_then() -> None:
    facts = [SAME, SAME | {"model config": "77c0"}]
    found = results(run_ranks(failing_ranks.agree_without_store, 2, facts))
    assert [kind for kind, _, _ in found] == ["DisagreementError"] * 2

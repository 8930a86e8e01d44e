"""Collectives: what their arguments must be, the reference among real ranks, and what the suite says of broken ones."""

from __future__ import annotations

import multiprocessing

import pytest
import torch
import torch.distributed as dist
from broken_collectives import broken

from ospnext import ops
from ospnext.conformance import by_ranks
from ospnext.conformance.check import Check, CheckFailure, Target
from ospnext.conformance.ranks import LIMITS, Job, Limits, run_cases
from ospnext.errors import UnsupportedRequestError
from ospnext.launch import Launch
from ospnext.ops import collective
from ospnext.ops.contracts.collective import CONTRACT, RANKS
from ospnext.ops.policy import use_registry
from ospnext.ops.registry import Registry

CPU = torch.device("cpu")
REFERENCE = Target("reference", CPU, "reference.gloo")


def checks(ranks: int, limits: Limits = LIMITS) -> dict[str, Check]:
    """By the part of the id that says what is special."""
    found = [c for c in by_ranks.checks(limits) if c.contract is CONTRACT and c.request.ranks == ranks]
    return {check.id.removeprefix("collective/required/"): check for check in found}


# ---- the reference


@pytest.mark.parametrize("ranks", RANKS)
def test_the_reference_passes(ranks: int) -> None:
    for check in checks(ranks).values():
        verdicts = check.run(REFERENCE)
        assert list(verdicts) == [f"rank{rank}" for rank in range(ranks)], check.id
        assert all(verdict.ok and verdict.max_bound == 0 for verdict in verdicts.values()), check.id


def test_no_rank_may_hold_or_receive_what_another_does() -> None:
    """Else a case would not tell them apart. In uneven exchanges one part is empty and no direction is as its
    reverse; where all is sent to the first rank, it alone sends nothing and receives anything.
    """
    for case in CONTRACT.cases():
        inputs = CONTRACT.inputs(case)
        assert all((arguments["x"] != 0).all() for arguments in inputs.values())
        held = [arguments["x"].flatten()[:6].tolist() for arguments in inputs.values()]
        assert len({tuple(values) for values in held}) == case.request.ranks, case.id
        received, form = CONTRACT.oracle(inputs), case.options.get("form")
        if case.options["splits"] == "to_first":
            assert [len(arguments["x"]) > 0 for arguments in inputs.values()] == [False, *[True] * (len(held) - 1)]
            assert [len(out) > 0 for out in received.values()] == [True, *[False] * (len(held) - 1)]
            continue
        if form == "backward":
            held = [arguments["grad_out"].flatten()[:6].tolist() for arguments in inputs.values()]
            assert len({tuple(values) for values in held}) == case.request.ranks, case.id
        elif form != "roundtrip" and case.request.operation in ("all_to_all", "reduce_scatter"):
            assert len({tuple(out.flatten()[:6].tolist()) for out in received.values()}) == case.request.ranks
        if case.request.uneven:
            sizes = [arguments["send_splits"] for arguments in inputs.values()]
            assert sizes[1][0] == 0 != sizes[0][1]
            assert [list(column) for column in zip(*sizes, strict=True)] != sizes


# ---- broken backends


def failures(name: str, ranks: int = 2, limits: Limits = LIMITS) -> dict[str, str]:
    """The checks that a broken backend fails, and what is said of each."""
    target, found = Target(name, CPU, f"{name}.gloo"), {}
    with use_registry(Registry([broken(name)])):
        for tag, check in checks(ranks, limits).items():
            try:
                verdicts = check.run(target)
            except CheckFailure as failure:
                found[tag] = str(failure)
            else:
                wrong = [rank for rank, verdict in verdicts.items() if not verdict.ok]
                if wrong:
                    found[tag] = f"wrong on {', '.join(wrong)}"
    assert multiprocessing.active_children() == []
    return found


def tags(ranks: int, *starts: str, but: str = "") -> set[str]:
    return {tag for tag in checks(ranks) if tag.startswith(starts) and not (but and tag.endswith(but))}


def test_zeros_from_the_third_rank_on_are_found_on_three_ranks() -> None:
    """The gradient of a gather calls no gather; that of a reduce_scatter does."""
    found = failures("zeros_after_2_ranks", 3)
    adjoint = {"reduce_scatter-r3-fp32-backward", "reduce_scatter-r3-fp32-roundtrip"}
    assert set(found) == tags(3, "all_to_all") | tags(3, "all_gather", but="backward") | adjoint
    assert found["all_gather-r3-fp32"] == "wrong on rank0, rank1, rank2"


def test_swapped_peers_are_found() -> None:
    """But by an exchange in which there is only one peer."""
    assert set(failures("swapped_peers")) == tags(2, "all_to_all") - {"all_to_all-r2-to_first-bf16"}


def test_a_stale_buffer_is_found() -> None:
    adjoint = {"reduce_scatter-r2-fp32-backward", "reduce_scatter-r2-fp32-roundtrip"}
    assert set(failures("stale_buffer")) == tags(2, "all_gather", but="backward") | adjoint


def test_a_sum_that_keeps_its_own_slice_is_found_in_the_gradient_of_a_gather() -> None:
    assert set(failures("own_slice")) == tags(2, "reduce_scatter", "all_gather-r2-strided-fp32-backward") - {
        "reduce_scatter-r2-fp32-backward"
    } | {"all_gather-r2-fp32-backward", "all_gather-r2-fp32-roundtrip"}


def test_one_buffer_for_two_exchanges_is_found() -> None:
    assert set(failures("one_buffer")) == {tag for tag in checks(2) if tag.endswith("async")}


def test_memory_sent_without_regard_to_strides_is_found() -> None:
    strided = {tag for tag in tags(2, "all_to_all", "reduce_scatter") if "strided" in tag}
    assert set(failures("assumes_contiguous")) == strided | {"all_gather-r2-strided-fp32-backward"}


def test_written_and_returned_inputs_are_found() -> None:
    found = failures("in_place")
    assert set(found) == tags(2, "all_reduce", "broadcast")
    assert "rank 0: x, or memory next to it, was written to" in found["all_reduce-r2-max-fp32"]
    assert found["broadcast-r2-fp32"].startswith("rank 1: the result shares memory")


def test_a_hanging_rank_is_named_and_the_other_cases_are_run() -> None:
    """Rank 1 never answers; rank 0 is told so by PyTorch after its own, shorter timeout."""
    found = failures("hang", limits=Limits(group=2.0, answer=5.0))
    assert set(found) == {"all_to_all-r2-even-u8"}
    text = found["all_to_all-r2-even-u8"]
    assert "rank 1: no answer in 5 s, stuck in all_to_all (broken_collectives.py:" in text
    assert "rank 0: CollectiveError in finish (collective.py:" in text
    assert "all_to_all among ranks 0, 1 failed on rank 0 after 2." in text


def test_a_rank_that_waits_is_named_with_where() -> None:
    """The parent gives up first: nobody answers, and the one that waits is told from the one waited for."""
    (case,) = (case for case in CONTRACT.cases() if case.id.endswith("all_to_all-r2-even-u8"))
    job = Job(CONTRACT.name, broken("hang"), "hang.gloo", "cpu", ranks=2, limits=Limits(group=60.0, answer=1.0))
    text = run_cases(job, [case])[case.id]
    assert "rank 1: no answer in 1 s, stuck in all_to_all (broken_collectives.py:" in text
    assert "rank 0: no answer in 1 s, stuck in finish (collective.py:" in text
    assert multiprocessing.active_children() == []


def test_a_dying_rank_is_named_with_its_exit_code() -> None:
    found = failures("death")
    assert set(found) == {"all_reduce-r2-max-fp32"}
    assert "rank 1: died with exit code 7" in found["all_reduce-r2-max-fp32"]


# ---- arguments


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process believes to be rank 0 of two; nothing may be sent."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
    monkeypatch.setattr(dist, "get_rank", lambda group=None: 0)


X = torch.ones(5, 3)
WRONG = [
    (lambda: collective.all_to_all(X, [5], [5]), r"send_splits must hold 2 sizes, one per rank, got \[5\]"),
    (lambda: collective.all_to_all(X, [2, 3], [2, -1]), r"receive_splits must hold 2 sizes, one per rank, got \[2, -1"),
    (lambda: collective.all_to_all(X, [2, 2], [2, 2]), r"send_splits \[2, 2\] must add up to the 5 rows of x"),
    (lambda: collective.all_to_all(X, [2, 3], [1, 3]), "rank 0 sends 2 rows to itself and expects 1"),
    (lambda: collective.all_gather(X.sum()), "all_gather: x must have a dimension 0"),
    (lambda: collective.reduce_scatter(X), "the 5 rows of x are not divisible by 2 ranks"),
    (lambda: collective.reduce_scatter(X[:4].byte()), r"torch\.uint8 cannot be reduced"),
    (lambda: collective.all_reduce(X, "mean"), "reduction must be 'sum' or 'max', got 'mean'"),
    (lambda: collective.all_reduce(X.bool(), "max"), r"torch\.bool cannot be reduced"),
    (lambda: collective.broadcast(X, 2), "source must be a rank from 0 to 1, got 2"),
]


@pytest.mark.parametrize(("call", "message"), WRONG)
def test_a_wrong_argument_is_named(two_ranks: None, call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_dtype_that_gloo_cannot_send_is_refused(two_ranks: None) -> None:
    with ops.use_backend("reference"), pytest.raises(UnsupportedRequestError, match=r"dtype: got torch\.float8_e4m3fn"):
        collective.all_gather(X.to(torch.float8_e4m3fn))


def test_one_rank_gets_a_copy() -> None:
    x = torch.arange(12.0).reshape(3, 4).T
    for out in (
        collective.all_to_all(x, [4], [4]),
        collective.all_gather(x),
        collective.reduce_scatter(x),
        collective.all_reduce(x, "max"),
        collective.broadcast(x, 0),
    ):
        assert torch.equal(out, x)
        assert out.is_contiguous()
        assert out.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


def test_ranks_on_several_hosts_are_told_apart(monkeypatch):
    """16 ranks, 8 on each host: a transport needs devices for its own eight."""
    launch = Launch(rank=9, world=16, local_rank=1, local_world=8)
    monkeypatch.setattr(collective, "launched", lambda: launch)
    assert [collective._local_ranks(ranks) for ranks in (2, 8, 16)] == [None, None, 8]
    monkeypatch.setattr(collective, "launched", lambda: None)
    assert collective._local_ranks(16) is None

"""Selection as a pure function: manifests made by hand, no hardware, no kernel imported."""

from __future__ import annotations

import dataclasses
import logging
import sys
from dataclasses import dataclass

import fake_backends as fake
import pytest
import torch

from ospnext import ops
from ospnext.errors import UnsupportedRequestError
from ospnext.ops.contracts import CONTRACTS
from ospnext.ops.contracts.attention import AttentionRequest
from ospnext.ops.contracts.fused import FusedRequest
from ospnext.ops.policy import Policy, use_registry
from ospnext.ops.registry import ANY_DEVICE, Registry
from ospnext.ops.select import auto_backend, fallbacks, select

ATTENTION, RMS_NORM = CONTRACTS["attention"], CONTRACTS["fused.rms_norm"]
REQUEST = AttentionRequest("cpu", torch.bfloat16, batch=1, q_len=8, kv_len=8, heads=2, head_dim=64)
NORM = FusedRequest("cpu", torch.bfloat16, (1, 8, 64))


def decide(*manifests, policy=None, request=REQUEST, contract=ATTENTION):
    return select(contract, request, policy or Policy(), Registry(manifests))


def statuses(decision):
    return {c.id: c.status for c in decision.candidates}


def candidate(decision, identifier):
    return next(c for c in decision.candidates if c.id == identifier)


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in ("OSPNEXT_BACKEND", "OSPNEXT_OPS", "OSPNEXT_FALLBACK"):
        monkeypatch.delenv(name, raising=False)
    fake.calls.clear()
    fallbacks.clear()


# ---- auto


def test_auto_takes_the_available_backend_of_highest_priority():
    decision = decide(
        fake.backend("slow", fake.kernel("slow.a"), priority=1),
        fake.backend("fast", fake.kernel("fast.a"), priority=9),
        fake.backend("fastest", fake.kernel("fastest.a"), priority=99, probe="absent"),
    )
    assert decision.chosen_id == "fast.a"
    assert statuses(decision) == {"fastest.a": "unavailable", "fast.a": "chosen", "slow.a": "not asked"}
    assert candidate(decision, "fastest.a").reasons == (fake.ABSENT,)


def test_auto_passes_over_backends_that_do_not_claim_the_device_or_do_not_declare_the_contract():
    decision = decide(
        fake.backend("other", fake.kernel("other.a"), priority=9, device_types=("gpu",)),
        fake.backend("bare", priority=8),
        fake.backend("plain", fake.kernel("plain.a")),
    )
    assert decision.chosen_id == "plain.a"
    assert decision.asked == "auto (default) -> plain"


def test_auto_looks_for_a_backend_per_contract():
    """The best backend for attention need not be one that has the fused kernel, and the other way round."""
    manifests = (
        fake.backend("attends", fake.kernel("attends.a"), priority=9),
        fake.backend("norms", fake.kernel("norms.n", contract="fused.rms_norm")),
    )
    assert decide(*manifests).chosen_id == "attends.a"
    assert decide(*manifests, request=NORM, contract=RMS_NORM).chosen_id == "norms.n"


def test_a_backend_that_names_the_device_beats_one_that_takes_any():
    anywhere = fake.backend("anywhere", fake.kernel("anywhere.a"), priority=9, device_types=(ANY_DEVICE,))
    known = Registry([anywhere, fake.backend("named", fake.kernel("named.a"))])
    assert auto_backend("cpu", known) == "named"
    assert auto_backend("gpu", known) == "anywhere"
    assert auto_backend("gpu", Registry([fake.backend("named", fake.kernel("named.a"))])) is None


# ---- a named backend or implementation


def test_a_named_backend_never_falls_back():
    picky = fake.backend("picky", fake.kernel("picky.a", supports="only_fp32"), priority=9)
    decision = decide(picky, fake.backend("plain", fake.kernel("plain.a")), policy=Policy("picky"))
    assert decision.chosen is None
    assert statuses(decision) == {"picky.a": "rejected", "plain.a": "not asked"}


def test_auto_does_not_go_on_to_the_next_backend_either():
    picky = fake.backend("picky", fake.kernel("picky.a", supports="only_fp32"), priority=9)
    assert decide(picky, fake.backend("plain", fake.kernel("plain.a"))).chosen is None


def test_inside_a_backend_the_first_kernel_that_takes_the_request_is_chosen():
    decision = decide(
        fake.backend("a", fake.kernel("a.1", supports="only_fp32"), fake.kernel("a.2"), fake.kernel("a.3"))
    )
    assert statuses(decision) == {"a.1": "rejected", "a.2": "chosen", "a.3": "eligible"}


def test_a_named_implementation_is_the_only_one_looked_at():
    manifest = fake.backend("a", fake.kernel("a.1"), fake.kernel("a.2", supports="only_fp32"))
    decision = decide(manifest, policy=Policy(ops=(("attention", "a.2"),)))
    assert decision.chosen is None
    assert statuses(decision) == {"a.1": "not asked", "a.2": "rejected"}


def test_the_most_specific_word_of_the_policy_wins():
    manifests = tuple(
        fake.backend(name, fake.kernel(f"{name}.n", contract="fused.rms_norm"), fake.kernel(f"{name}.a"))
        for name in ("a", "b", "c")
    )
    policy = Policy("a", ops=(("fused.rms_norm", "c"), ("fused", "b"), ("attention", "b.a")))
    assert decide(*manifests, policy=policy, request=NORM, contract=RMS_NORM).chosen_id == "c.n"
    assert decide(*manifests, policy=policy).chosen_id == "b.a"
    family = dataclasses.replace(policy, ops=(("fused", "b"),))
    assert decide(*manifests, policy=family, request=NORM, contract=RMS_NORM).chosen_id == "b.n"
    assert decide(*manifests, policy=family).chosen_id == "a.a"


# ---- reasons

FEATURES = [f.name for f in dataclasses.fields(AttentionRequest) if f.default is False]


@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature_that_a_kernel_does_not_list_refuses_the_call(feature):
    request = dataclasses.replace(REQUEST, **{feature: True})
    decision = decide(fake.backend("a", fake.kernel("a.1", handles=frozenset(FEATURES) - {feature})), request=request)
    assert decision.chosen is None
    assert [r.code for r in candidate(decision, "a.1").reasons] == [feature]
    assert decide(fake.backend("a", fake.kernel("a.1", handles=frozenset({feature}))), request=request).chosen


def test_a_field_that_came_after_a_plugin_was_written_cannot_be_ignored_by_it():
    @dataclass(frozen=True)
    class Newer(AttentionRequest):
        window: int = 0

    newer = dataclasses.replace(ATTENTION, request=Newer)
    manifest = fake.backend("old", fake.kernel("old.a"))
    fields = {f.name: getattr(REQUEST, f.name) for f in dataclasses.fields(REQUEST)}
    assert decide(manifest, request=Newer(**fields), contract=newer).chosen_id == "old.a"
    refused = decide(manifest, request=Newer(**fields, window=4), contract=newer)
    assert [(r.code, r.got) for r in candidate(refused, "old.a").reasons] == [("window", "4")]


def test_every_reason_is_given_not_only_the_first():
    request = dataclasses.replace(REQUEST, key_mask=True)
    manifest = fake.backend("a", fake.kernel("a.1", supports="refuses", handles=frozenset()), device_types=("gpu",))
    reasons = candidate(decide(manifest, policy=Policy("a"), request=request), "a.1").reasons
    assert [r.code for r in reasons] == ["device", "key_mask", "dtype", "capability"]
    assert str(reasons[0]) == "device: got tensors on cpu, want gpu"
    assert str(reasons[3]) == "capability: got (9, 0), want at least (9, 5)"


def test_a_missing_package_is_named_with_the_command_that_installs_it():
    decision = decide(fake.backend("a", fake.kernel("a.1", requires=("torch", "no_such_package", "no.such.parent"))))
    found = candidate(decision, "a.1")
    assert found.status == "not loaded"
    assert [r.want for r in found.reasons] == ["pip install no_such_package", "pip install no.such.parent"]


def test_an_unavailable_device_gives_the_reasons_of_its_probe():
    manifests = (
        fake.backend("a", fake.kernel("a.1"), probe="absent"),
        fake.backend("b", fake.kernel("b.1"), probe="exploding_probe"),
    )
    decision = decide(*manifests, policy=Policy("a"))
    assert statuses(decision) == {"a.1": "unavailable", "b.1": "unavailable"}
    assert candidate(decision, "a.1").reasons == (fake.ABSENT,)
    assert "the driver hung up" in candidate(decision, "b.1").reasons[0].got


# ---- optional contracts


def test_where_no_backend_declares_a_kernel_the_definition_is_used_and_is_no_fallback():
    decision = decide(fake.backend("a", fake.kernel("a.1")), request=NORM, contract=RMS_NORM)
    assert (decision.chosen_id, decision.fell_back) == ("composite", False)
    named = decide(fake.backend("a"), policy=Policy("a"), request=NORM, contract=RMS_NORM)
    assert (named.chosen_id, named.fell_back) == ("composite", False)


@pytest.mark.parametrize("fallback", [frozenset(), frozenset({"fused"}), frozenset({"attention"})])
def test_a_declared_kernel_that_refuses_gives_way_to_the_definition_only_where_that_is_allowed(fallback):
    manifest = fake.backend("a", fake.kernel("a.n", contract="fused.rms_norm", supports="only_fp32"))
    decision = decide(manifest, policy=Policy(fallback=fallback), request=NORM, contract=RMS_NORM)
    allowed = "fused" in fallback
    assert (decision.chosen_id, decision.fell_back) == (("composite", True) if allowed else (None, False))
    fp32 = dataclasses.replace(NORM, dtype=torch.float32)
    taken = decide(manifest, policy=Policy(fallback=fallback), request=fp32, contract=RMS_NORM)
    assert (taken.chosen_id, taken.fell_back) == ("a.n", False)


def test_the_definition_can_be_asked_for_by_name():
    manifest = fake.backend("a", fake.kernel("a.n", contract="fused.rms_norm"))
    decision = decide(manifest, policy=Policy(ops=(("fused", "composite"),)), request=NORM, contract=RMS_NORM)
    assert statuses(decision) == {"a.n": "not asked", "composite": "chosen"}
    assert not decision.fell_back


# ---- fallback of required contracts

TWO = (
    fake.backend("picky", fake.kernel("picky.a", supports="only_fp32"), priority=9),
    fake.backend("gone", fake.kernel("gone.a"), priority=8, probe="absent"),
    fake.backend("plain", fake.kernel("plain.f", supports="only_fp32"), fake.kernel("plain.a", "two")),
)


def test_fallback_takes_the_first_other_implementation_that_fits_and_only_if_its_family_is_allowed():
    allowed = decide(*TWO, policy=Policy("picky", fallback=frozenset({"attention"})))
    assert (allowed.chosen_id, allowed.fell_back) == ("plain.a", True)
    assert statuses(allowed) == {
        "picky.a": "rejected",
        "gone.a": "unavailable",
        "plain.f": "rejected",
        "plain.a": "chosen",
    }
    assert decide(*TWO, policy=Policy("picky", fallback=frozenset({"fused"}))).chosen is None


def test_a_fallback_is_logged_once_with_the_reason_and_counted(caplog):
    q = torch.randn(1, 3, 2, 8, dtype=torch.bfloat16)
    with use_registry(Registry(TWO)), ops.use_backend("picky", fallback={"attention"}), caplog.at_level(logging.INFO):
        for tokens in (3, 3, 2, 1):
            assert (ops.attention(q[:, :tokens], q, q) == 2.0).all()
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "attention falls back to plain.a" in record.getMessage()
    assert "dtype: got torch.bfloat16, want fp32" in record.getMessage()
    assert fallbacks == {("attention", "plain.a"): 3}  # three shapes, one decision each


def test_a_kernel_that_raises_is_not_retried_elsewhere():
    manifests = (
        fake.backend("a", fake.kernel("a.1", "raising"), fake.kernel("a.2", "two"), priority=9),
        fake.backend("b", fake.kernel("b.1", "two")),
    )
    q = torch.randn(1, 3, 2, 8)
    with use_registry(Registry(manifests)), ops.use_backend(fallback={"attention"}):
        for _ in range(2):
            with pytest.raises(FloatingPointError, match="failed on the device"):
                ops.attention(q, q, q)
    assert [c for c in fake.calls if c != "present"] == ["raising", "raising"]
    assert not fallbacks


def test_an_impossible_request_fails_every_time():
    q = torch.randn(1, 3, 2, 8, dtype=torch.bfloat16)
    with use_registry(Registry(TWO)), ops.use_backend("picky"):
        for _ in range(2):
            with pytest.raises(UnsupportedRequestError, match=r"dtype: got torch\.bfloat16, want fp32"):
                ops.attention(q, q, q)


# ---- purity


def test_selection_imports_no_kernel_and_gives_the_same_answer_twice():
    target = "json.no_such_kernel_module"
    manifest = fake.backend("a", dataclasses.replace(fake.kernel("a.1"), target=f"{target}:kernel"))
    known = Registry([manifest])
    before = set(sys.modules)
    first, second = (select(ATTENTION, REQUEST, Policy(), known) for _ in range(2))
    assert first == second
    assert first.chosen_id == "a.1"
    assert set(sys.modules) == before
    assert fake.calls == ["present"]  # a probe runs once

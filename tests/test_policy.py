"""The policy: what the environment and `use_backend` may say, what they may not, and for how long it holds."""

from __future__ import annotations

import threading

import fake_backends as fake
import pytest
import torch

from ospnext import ops
from ospnext.errors import BackendUnavailableError, PolicyError
from ospnext.ops.policy import Policy, current_policy, policy_from_env, policy_in_force, use_registry
from ospnext.ops.registry import Registry

KNOWN = Registry(
    [
        fake.backend("acme", fake.kernel("acme.flash"), fake.kernel("acme.slow", "two"), priority=9),
        fake.backend("plain", fake.kernel("plain.math", "two")),
        fake.backend("gone", fake.kernel("gone.a"), probe="absent"),
        fake.backend("norms", fake.kernel("norms.rms", contract="fused.rms_norm")),
    ]
)
KNOWN.failures["broken"] = "Traceback (most recent call last):\nImportError: libacme.so.3: cannot open shared object"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """No OSPNEXT_* variable and the backends above, whatever the surroundings say."""
    for name in ("OSPNEXT_BACKEND", "OSPNEXT_OPS", "OSPNEXT_FALLBACK"):
        monkeypatch.delenv(name, raising=False)
    with use_registry(KNOWN):
        yield monkeypatch


def number(q=None) -> float:
    """Which kernel runs: 1 is acme.flash, 2 is acme.slow or plain.math."""
    q = torch.zeros(1, 2, 1, 4) if q is None else q
    return ops.attention(q, q, q)[0, 0, 0, 0].item()


# ---- the environment


def test_nothing_set_means_auto_without_fallback():
    assert policy_from_env({"PATH": "/bin", "OSPNEX_BACKEND": "not ours"}, KNOWN) == Policy()
    assert str(Policy()) == "backend=auto (default), no fallback"
    assert policy_from_env({"OSPNEXT_BACKEND": " ", "OSPNEXT_OPS": "", "OSPNEXT_FALLBACK": " , "}, KNOWN) == Policy()


def test_all_three_variables_are_read():
    environ = {
        "OSPNEXT_BACKEND": "acme",
        "OSPNEXT_OPS": "attention=acme.slow, fused=composite ,fused.rms_norm=norms",
        "OSPNEXT_FALLBACK": "fused,attention",
    }
    policy = policy_from_env(environ, KNOWN)
    assert policy.backend == "acme"
    assert policy.ops == (("attention", "acme.slow"), ("fused", "composite"), ("fused.rms_norm", "norms"))
    assert policy.fallback == {"fused", "attention"}
    assert policy.wanted("attention", "attention") == ("acme.slow", "OSPNEXT_OPS")
    assert policy.wanted("fused.rms_norm", "fused") == ("norms", "OSPNEXT_OPS")
    assert policy.wanted("fused.rope", "fused") == ("composite", "OSPNEXT_OPS")
    assert policy.wanted("elsewhere", "elsewhere") == ("acme", "OSPNEXT_BACKEND")
    assert "fallback=attention,fused (OSPNEXT_FALLBACK)" in str(policy)


WRONG = {
    "variable": ({"OSPNEXT_BACKENDS": "acme"}, ["OSPNEXT_BACKENDS", "did you mean OSPNEXT_BACKEND?", "OSPNEXT_OPS:"]),
    "variable with a right one beside it": ({"OSPNEXT_BACKEND": "acme", "OSPNEXT_OP": "x"}, ["OSPNEXT_OP "]),
    "foreign variable": ({"OSPNEXT_ZZZ": "1"}, ["OSPNEXT_ZZZ", "OSPNEXT_FALLBACK:"]),
    "backend": (
        {"OSPNEXT_BACKEND": "acmee"},
        ["'acmee'", "did you mean acme?", "Known: auto, acme, gone, norms, plain"],
    ),
    "backend in capitals": ({"OSPNEXT_BACKEND": "ACME"}, ["'ACME'", "Known: auto, acme"]),
    "implementation as backend": ({"OSPNEXT_BACKEND": "acme.flash"}, ["'acme.flash'", "Known: auto, acme"]),
    "operator": ({"OSPNEXT_OPS": "atention=acme"}, ["'atention'", "did you mean attention?", "fused.rope"]),
    "implementation": ({"OSPNEXT_OPS": "attention=acme.flsh"}, ["acme.flsh", "mean acme.flash?", "acme.slow"]),
    "implementation of another operator": ({"OSPNEXT_OPS": "attention=norms.rms"}, ["norms.rms", "acme.flash"]),
    "composite of a required operator": ({"OSPNEXT_OPS": "attention=composite"}, ["names nothing"]),
    "pair without value": ({"OSPNEXT_OPS": "attention="}, ["'attention='", "family=backend"]),
    "pair without sign": ({"OSPNEXT_OPS": "attention"}, ["'attention'", "family=backend"]),
    "operator twice": ({"OSPNEXT_OPS": "attention=acme,attention=plain"}, ["twice", "acme", "plain"]),
    "family": ({"OSPNEXT_FALLBACK": "fussed"}, ["'fussed'", "did you mean fused?", "attention, collective, fused"]),
    "contract as family": ({"OSPNEXT_FALLBACK": "fused.rope"}, ["'fused.rope'", "Known:"]),
}


@pytest.mark.parametrize(("environ", "fragments"), WRONG.values(), ids=WRONG.keys())
def test_a_mistake_in_the_environment_is_an_error_that_lists_what_exists(environ, fragments):
    with pytest.raises(PolicyError) as error:
        policy_from_env(environ, KNOWN)
    for fragment in fragments:
        assert fragment in str(error.value)


def test_the_environment_is_checked_on_the_first_call_of_an_operator(environment):
    environment.setenv("OSPNEXT_BAKEND", "acme")
    for _ in range(2):
        with pytest.raises(PolicyError, match="OSPNEXT_BAKEND"):
            number()
    assert policy_in_force() is None


@pytest.mark.parametrize("environ", [{"OSPNEXT_BACKEND": "broken"}, {"OSPNEXT_OPS": "attention=broken.flash"}])
def test_a_backend_that_did_not_load_is_answered_with_its_traceback(environ):
    with pytest.raises(BackendUnavailableError, match=r"libacme\.so\.3"):
        policy_from_env(environ, KNOWN)


def test_a_backend_without_device_is_answered_with_its_reasons(environment):
    environment.setenv("OSPNEXT_BACKEND", "gone")
    with pytest.raises(BackendUnavailableError, match=r"OSPNEXT_BACKEND=gone(.|\n)*driver: got none, want version 7"):
        current_policy()
    with pytest.raises(BackendUnavailableError, match="driver: got none, want version 7"):
        ops.use_backend("gone")


def test_without_any_backend_the_error_says_how_to_install_one():
    with pytest.raises(PolicyError, match="No backend is registered: install"):
        policy_from_env({"OSPNEXT_BACKEND": "acme"}, Registry([]))


# ---- use_backend


def test_an_argument_beats_the_environment_and_the_rest_stays(environment):
    environment.setenv("OSPNEXT_BACKEND", "acme")
    environment.setenv("OSPNEXT_FALLBACK", "fused")
    assert number() == 1.0
    with ops.use_backend("plain") as policy:
        assert policy is current_policy()
        assert number() == 2.0
        assert policy.fallback == {"fused"}
        assert str(policy) == "backend=plain (use_backend), fallback=fused (OSPNEXT_FALLBACK)"
    assert number() == 1.0
    with ops.use_backend(ops={"attention": "acme.slow"}, fallback=()):
        assert (number(), current_policy().backend, current_policy().fallback) == (2.0, "acme", frozenset())


def test_an_argument_helps_where_the_environment_asks_for_the_impossible(environment):
    environment.setenv("OSPNEXT_BACKEND", "gone")
    with ops.use_backend("plain"):
        assert number() == 2.0


def test_as_a_plain_call_it_holds_from_then_on():
    ops.use_backend("plain")
    assert number() == 2.0
    ops.use_backend("acme")
    assert number() == 1.0


def test_blocks_nest_and_an_exception_restores_too():
    assert policy_in_force() is None
    with ops.use_backend("acme"):
        with pytest.raises(KeyError), ops.use_backend("plain"):
            with ops.use_backend(ops={"attention": "acme.flash"}):
                assert (number(), current_policy().backend) == (1.0, "plain")
            assert number() == 2.0
            raise KeyError
        assert (number(), current_policy().backend) == (1.0, "acme")
    assert policy_in_force() is None  # as before: the environment is still to be read


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        ({"backend": "plane"}, "did you mean plain?"),
        ({"ops": {"atention": "plain"}}, "did you mean attention?"),
        ({"ops": {"attention": "plain.maths"}}, "did you mean plain.math?"),
        ({"fallback": {"fusd"}}, "did you mean fused?"),
    ],
)
def test_a_mistake_in_an_argument_changes_nothing(arguments, fragment):
    with ops.use_backend("plain"):
        with pytest.raises(PolicyError) as error:
            ops.use_backend(**arguments)
        assert fragment in str(error.value)
        assert "use_backend" in str(error.value)
        assert number() == 2.0


def test_decisions_are_forgotten_when_the_policy_changes():
    """The same signature every time: a remembered decision would show as the wrong number."""
    q = torch.zeros(1, 2, 1, 4, requires_grad=True)
    for name, expected in (("acme", 1.0), ("plain", 2.0), ("acme", 1.0)):
        with ops.use_backend(name):
            assert number(q) == expected
            (grad,) = torch.autograd.grad(ops.attention(q, q.detach(), q.detach()).sum(), q)
            assert (grad == expected).all()


def test_a_decision_costs_one_selection_per_signature(monkeypatch):
    import ospnext.ops.library as library

    resolved = []
    resolve = library.resolve
    monkeypatch.setattr(library, "resolve", lambda *args: resolved.append(args) or resolve(*args))
    q = torch.zeros(1, 2, 1, 4)
    with ops.use_backend("plain"):
        for x in (q, q.clone(), q.double(), q):
            number(x)
    assert [request.dtype for _, request in resolved] == [torch.float32, torch.float64]


def test_every_thread_sees_the_policy_autograd_ones_included():
    q = torch.zeros(1, 2, 1, 4, requires_grad=True)
    seen = {}

    def work():
        seen["policy"], seen["number"] = current_policy(), number()
        loss.backward()

    with ops.use_backend("plain") as policy:
        loss = ops.attention(q, q.detach(), q.detach()).sum()
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert seen == {"policy": policy, "number": 2.0}
        assert (q.grad == 2.0).all()


# ---- use_registry


def test_another_registry_holds_until_the_end_of_the_block():
    with ops.use_backend("plain"):
        with use_registry(Registry([fake.backend("other", fake.kernel("other.a"))])):
            assert number() == 1.0
            with pytest.raises(PolicyError, match="Known: auto, other"):
                ops.use_backend("plain")
        assert (number(), current_policy().backend) == (2.0, "plain")

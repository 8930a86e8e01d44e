"""Tuning: what a file of `ospnext tune` changes in a selection and what it must not, which files are refused, and the
command that writes one."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import time
from contextlib import contextmanager
from typing import Any

import fake_backends as fake
import pytest
import torch
from small_models import random_inputs, random_model

from ospnext import ops
from ospnext.bench.workload import workload
from ospnext.cli import main, tune
from ospnext.errors import PolicyError
from ospnext.models import QuantPolicy, quantize_model
from ospnext.ops import tuning
from ospnext.ops.contracts import CONTRACTS
from ospnext.ops.contracts.attention import AttentionRequest
from ospnext.ops.contracts.quantized_linear import QuantizedLinearRequest
from ospnext.ops.explain import as_json, as_text
from ospnext.ops.policy import Policy, current_policy, policy_from_env, use_registry
from ospnext.ops.registry import Registry
from ospnext.ops.select import observers, select

ATTENTION = CONTRACTS["attention"]
REQUEST = AttentionRequest("cpu", torch.float32, 1, 8, 8, 2, 64)
BACKEND = fake.backend(
    "acme",
    fake.kernel("acme.one", note="the vendor's favourite"),
    fake.kernel("acme.two", "two"),
    fake.kernel("acme.half", supports="refuses"),
    fake.kernel("acme.absent", requires=("no_such_package",)),
    priority=9,
)
KNOWN = Registry([BACKEND, fake.backend("plain", fake.kernel("plain.math", "two"))])
TIMES = {"acme.two": 1.25, "acme.one": 3.0, "acme.half": 0.5, "acme.absent": 0.25, "plain.math": 0.125}


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    for name in ("OSPNEXT_BACKEND", "OSPNEXT_OPS", "OSPNEXT_FALLBACK", "OSPNEXT_TUNING"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def file(tmp_path):
    """A tuning file of this machine, and changes to it."""

    def write(times=TIMES, request=REQUEST, **changes) -> str:
        machine = tuning.machine_of("acme", KNOWN)
        path = tmp_path / "tuning.json"
        tuning.save(path, dataclasses.replace(machine, **changes), {tuning.request_key(ATTENTION, request): times})
        return str(path)

    return write


def policy_with(path: str, **fields) -> Policy:
    return Policy(**fields, tuning=tuning.read(path, KNOWN, "OSPNEXT_TUNING"))


def decide(policy: Policy, request=REQUEST):
    return select(ATTENTION, request, policy, KNOWN)


# ---- selection


def test_the_fastest_that_takes_the_request_comes_first_and_the_text_says_by_what(file):
    path = file()
    policy = policy_with(path)
    decision = decide(policy)
    assert decision.chosen_id == "acme.two"
    statuses = {c.id: c.status for c in decision.candidates}
    assert statuses == {
        "acme.one": "eligible",
        "acme.two": "chosen",
        "acme.half": "rejected",
        "acme.absent": "not loaded",
        "plain.math": "not asked",
    }
    text = as_text(decision)
    assert f"first by tuning file {path} (1.25 ms against 3 ms of acme.one)" in text
    assert f"tuning={path} (argument)" in text
    assert as_json(decision)["policy"]["tuning"] == path
    assert decide(Policy()).chosen_id == "acme.one" and as_json(decide(Policy()))["policy"]["tuning"] is None


def test_it_is_said_where_measurement_and_manifest_agree_too(file):
    (chosen,) = (c for c in decide(policy_with(file({"acme.one": 2.0}))).candidates if c.status == "chosen")
    assert chosen.id == "acme.one"
    assert (
        chosen.note.startswith("the vendor's favourite; first by tuning file") and "none other measured" in chosen.note
    )


@pytest.mark.parametrize(
    "change",
    [
        *({f.name: True} for f in dataclasses.fields(AttentionRequest) if f.default is False),
        *({name: 3} for name in ("batch", "q_len", "kv_len", "heads", "head_dim")),
        {"dtype": torch.bfloat16},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_request_that_differs_in_anything_is_decided_as_ever(file, change):
    request = dataclasses.replace(REQUEST, **change)
    policy = policy_with(file())
    assert tuning.request_key(ATTENTION, request) != tuning.request_key(ATTENTION, REQUEST)
    assert decide(policy, request).chosen_id == "acme.one"
    assert [c.note for c in decide(policy, request).candidates] == [
        c.note for c in decide(Policy(), request).candidates
    ]


def test_every_field_of_a_request_is_in_its_key():
    base = QuantizedLinearRequest("cpu", torch.bfloat16, (8, 16, 32))
    contract = CONTRACTS["quantized_linear"]
    others = {"x_granularity": "row", "weight_granularity": "row", "accumulate": "fp64", "shape": (8, 32, 16)}
    others |= {"scale_max": 224.0, "grad_scale_max": 15.0, "dtype": torch.float32, "device_type": "gpu"}
    others |= {f.name: True for f in dataclasses.fields(base) if f.default is False}
    assert others.keys() == {f.name for f in dataclasses.fields(base)}
    keys = [tuning.request_key(contract, dataclasses.replace(base, **{k: v})) for k, v in others.items()]
    assert len({*keys, tuning.request_key(contract, base)}) == len(others) + 1


def test_a_named_implementation_or_backend_is_obeyed(file):
    policy = policy_with(file(), ops=(("attention", "acme.one"),))
    assert decide(policy).chosen_id == "acme.one"
    assert "first by tuning" not in as_text(decide(policy))
    assert decide(policy_with(file(), backend="plain")).chosen_id == "plain.math"
    assert decide(policy_with(file(), backend="acme")).chosen_id == "acme.two"


def test_nothing_that_refuses_is_chosen_for_being_fast(file):
    only = {"acme.half": 0.5, "acme.absent": 0.25, "plain.math": 0.1, "acme.forgotten": 0.01}
    assert decide(policy_with(file(only))).chosen_id == "acme.one"


def test_of_equal_times_the_first_of_the_manifest_stays_first(file):
    known = Registry([fake.backend("acme", fake.kernel("acme.two", "two"), fake.kernel("acme.one"))])
    policy = policy_with(file({"acme.one": 1.0, "acme.two": 1.0}))
    assert select(ATTENTION, REQUEST, policy, known).chosen_id == "acme.two"


def test_selection_stays_pure_and_a_policy_comparable(file):
    path = file()
    first, second = policy_with(path), policy_with(path)
    assert first == second and hash(first) == hash(second) and first != Policy()
    assert decide(first) == decide(second)


# ---- the policy


def number() -> float:
    """Which kernel runs: 1 is acme.one, 2 is acme.two or plain.math."""
    q = torch.zeros(1, 8, 2, 64)
    return ops.attention(q, q, q)[0, 0, 0, 0].item()


def test_only_the_variable_or_an_argument_puts_a_file_in_force(file, monkeypatch):
    path = file()
    with use_registry(KNOWN):
        assert number() == 1.0
    monkeypatch.setenv("OSPNEXT_TUNING", path)
    with use_registry(KNOWN):
        assert number() == 2.0
        assert str(current_policy()) == f"backend=auto (default), tuning={path} (OSPNEXT_TUNING), no fallback"
        with ops.use_backend(tuning=""):
            assert number() == 1.0
        with ops.use_backend("acme"):
            assert number() == 2.0
        assert number() == 2.0
    monkeypatch.setenv("OSPNEXT_TUNING", " ")
    with use_registry(KNOWN), ops.use_backend(tuning=path):
        assert number() == 2.0
        assert "(use_backend)" in str(current_policy())


def test_a_file_in_the_way_is_overruled_by_an_argument(file, monkeypatch):
    monkeypatch.setenv("OSPNEXT_TUNING", "no/such/file")
    with use_registry(KNOWN):
        with pytest.raises(PolicyError, match="OSPNEXT_TUNING=no/such/file"):
            number()
        with ops.use_backend(tuning=""):
            assert number() == 1.0


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"device": "another card"}, ["device: 'another card' there, 'a device made by hand' here"]),
        (
            {"versions": {"torch": "1.0", "ospnext": "0.0"}},
            ["ospnext: 0.0 there", "torch: 1.0 there, not installed here"],
        ),
        ({"versions": {}}, ["ospnext: not installed there"]),
        ({"backend": "gone"}, ["backend 'gone'", "cannot run here"]),
    ],
    ids=["device", "versions", "fewer versions", "backend"],
)
def test_a_file_of_another_machine_is_refused_and_the_text_says_what_differs(file, changes, fragments):
    path = file(**changes)
    with pytest.raises(PolicyError) as error:
        policy_from_env({"OSPNEXT_TUNING": path}, KNOWN)
    for fragment in [*fragments, f"OSPNEXT_TUNING={path}", "ospnext tune --out"]:
        assert fragment in str(error.value)


def test_a_device_that_is_gone_is_refused_too(file):
    lost = Registry([dataclasses.replace(BACKEND, probe="fake_backends:absent")])
    with pytest.raises(PolicyError, match="cannot run here"):
        policy_from_env({"OSPNEXT_TUNING": file()}, lost)


@pytest.mark.parametrize(
    "content",
    [
        *("", "[]", "{}", '{"format": "ospnext tuning 1", "backend": "acme"}'),
        '{"format": "ospnext tuning 0", "backend": "acme", "device": "", "versions": {}, "milliseconds": {}}',
        '{"format": "ospnext tuning 1", "backend": "acme", "device": "", "versions": {}, "milliseconds": []}',
    ],
)
def test_what_is_no_tuning_file_is_refused(content, tmp_path):
    path = tmp_path / "file"
    path.write_text(content)
    with pytest.raises(PolicyError, match=r"is no file of `ospnext tune`.*`ospnext tune --out FILE` writes one"):
        policy_from_env({"OSPNEXT_TUNING": str(path)}, KNOWN)
    with pytest.raises(PolicyError, match="No such file"):
        policy_from_env({"OSPNEXT_TUNING": str(tmp_path / "none")}, KNOWN)


def test_the_versions_are_those_of_the_packages_that_kernels_require():
    manifest = fake.backend("acme", fake.kernel("acme.a", requires=("yaml.inner", "no_such_package")))
    versions = tuning.machine_of("acme", Registry([manifest])).versions
    assert {"ospnext", "PyYAML"} == versions.keys()


def test_and_of_the_packages_that_compile_them():
    kernel = dataclasses.replace(fake.kernel("acme.a"), compiled_by=("numpy", "no-such-package"))
    versions = tuning.machine_of("acme", Registry([fake.backend("acme", kernel)])).versions
    assert {"ospnext", "numpy"} == versions.keys()


# ---- the command

TINY = ["tune", "--preset", "tiny", "--resolution", "48x80", "--frames", "5", "--dtype", "fp32", "--repeats", "1"]


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    tune.add_arguments(parser)
    return parser.parse_args(words)


def requests(*words: str) -> list[tune.Timed]:
    return list(tune._requests(arguments(*words), list(tune.OPERATORS), torch.float32, torch.device("cpu")))


@contextmanager
def asked():
    """What the operators ask selection for inside the block."""
    found: list[tuple[str, Any]] = []

    def tell(decision):
        found.append((decision.contract.name, decision.request))

    observers.append(tell)
    try:
        with ops.use_backend("reference"):
            yield found
    finally:
        observers.remove(tell)


@pytest.mark.parametrize("words", [TINY[1:], ["--preset", "tiny", "--tokens", "12"]], ids=["video", "tokens"])
def test_the_requests_timed_are_those_that_the_operators_make(words):
    """Else a file would never be of use."""
    for timed in requests(*words, "--backward"):
        with asked() as found:
            timed.prepare(1)()
        assert (timed.contract, timed.request) in found, timed.title


@pytest.mark.parametrize("granularity", [None, "tensor", "row"])
def test_the_requests_of_a_model_are_among_those_timed(granularity):
    work = workload("tiny", "48x80", 5)
    model = random_model(work.config, dtype=torch.float32)
    training = granularity is None
    if granularity:
        policy = QuantPolicy(quant="hif8", recipe=ops.HiF8Recipe(granularity=granularity))
        model = quantize_model(model, policy, store=True)
    with asked() as found, torch.set_grad_enabled(training):
        out = model(*random_inputs(work.config, work.grid, dtype=torch.float32))
        if training:
            out.sum().backward()
    timed = {(t.contract, t.request) for t in requests(*TINY[1:], "--backward")}
    made = {(name, request) for name, request in found if name in tune.OPERATORS}
    # Keys and values of the text are computed once a video.
    made = {r for r in made if r[0] == "attention" or r[1].shape[0] != work.config.text_len}
    assert len(made) >= 3 and made <= timed, made - timed


def test_a_file_from_the_command_is_used_as_it_says(tmp_path, capsys, monkeypatch):
    out = tmp_path / "tuning.json"
    assert main([*TINY, "--operators", "attention", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "full self-attention, forward (30 queries, 30 keys)" in printed
    assert f"OSPNEXT_TUNING={out}" in printed and "first without tuning" in printed
    written = json.loads(out.read_text())
    (key,) = (k for k in written["milliseconds"] if "q_len=30 kv_len=30" in k)
    assert all(ms > 0 for ms in written["milliseconds"][key].values())
    written["milliseconds"][key] = {"reference.math": 0.5, "reference.sdpa": 0.75}
    out.write_text(json.dumps(written))
    monkeypatch.setenv("OSPNEXT_TUNING", str(out))
    with ops.use_backend(tuning=out):
        assert (
            main(["explain", "attention", "--tokens", "30", "--heads", "2", "--head-dim", "24", "--dtype", "fp32"]) == 0
        )
    explained = capsys.readouterr().out
    assert f"first by tuning file {out} (0.5 ms against 0.75 ms of reference.sdpa)" in explained


def test_an_interruption_keeps_what_was_timed(tmp_path, monkeypatch):
    out, timed = tmp_path / "tuning.json", tune._rows

    def rows(request, *rest):
        if out.exists():
            raise KeyboardInterrupt
        return timed(request, *rest)

    monkeypatch.setattr(tune, "_rows", rows)
    with pytest.raises(KeyboardInterrupt):
        tune.run(arguments(*TINY[1:], "--operators", "attention", "--out", str(out)))
    assert len(json.loads(out.read_text())["milliseconds"]) == 1


def test_times_of_another_card_than_the_first_are_refused(monkeypatch, capsys):
    """Selection asks what the first card can do, and a file is refused by its name."""
    monkeypatch.setattr("ospnext.bench.device.device_name", lambda device: "another card")
    with use_registry(KNOWN):
        assert main([*TINY, "--device", "cpu:0"]) == 2
    said = capsys.readouterr()
    assert "--device cpu:0 is 'another card', but backend 'acme' decides for its first card" in said.err
    assert not said.out


class Sleeping(fake.Constant):
    """Takes as long as its name says, and says when it runs on all rows."""

    def __init__(self, milliseconds: float) -> None:
        super().__init__(milliseconds)
        self.rows: list[int] = []

    def forward(self, q, k, v, *, need_lse, **rest):
        self.rows.append(q.shape[-3])
        time.sleep(self.value / 1e3)
        return super().forward(q, k, v, need_lse=need_lse, **rest)


def test_the_hopeless_are_left_out_and_the_broken_are_a_line(capsys, monkeypatch):
    for name, milliseconds in (("brisk", 2.0), ("slow", 100.0)):
        monkeypatch.setattr(fake, name, Sleeping(milliseconds), raising=False)
    kernels = [fake.kernel(f"acme.{name}", name) for name in ("brisk", "slow", "raising")]
    with use_registry(Registry([fake.backend("acme", *kernels, fake.kernel("acme.half", supports="refuses"))])):
        assert main(["tune", "--preset", "tiny", "--tokens", "640", "--operators", "attention", "--dtype", "fp32"]) == 0
    printed = capsys.readouterr().out
    assert "acme.brisk" in printed and "1.00 x  first without tuning" in printed
    assert "acme.slow     left out:" in printed and "times the fastest in a trial" in printed
    assert "acme.raising  failed: FloatingPointError: the kernel failed on the device" in printed
    assert "acme.half" not in printed
    assert set(fake.slow.rows) == {10} and set(fake.brisk.rows) == {10, 640}


def test_a_limit_leaves_out_what_takes_too_long(capsys, monkeypatch):
    monkeypatch.setattr(fake, "brisk", Sleeping(20.0), raising=False)
    with use_registry(Registry([fake.backend("acme", fake.kernel("acme.brisk", "brisk"))])):
        words = ["tune", "--preset", "tiny", "--tokens", "640", "--operators", "attention", "--dtype", "fp32"]
        assert main([*words, "--limit", "1"]) == 1
    assert re.search(r"acme.brisk  left out: about \d+ s a call \(--limit\)", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        (["--operators", "atention"], "did you mean 'attention'?"),
        (["--operators", ","], "names none of"),
        (["--preset", "15b"], "unknown preset '15b'"),
        (["--preset", "15b", "--tokens", "8"], "--preset '15b'"),
        (["--tokens", "many"], "--tokens 'many'"),
        (["--tokens", "0"], "--tokens '0'"),
        (["--resolution", "719p"], "unknown resolution '719p'"),
        (["--resolution", ","], "names none"),
        (["--out", "no/such/folder/file.json"], "no folder"),
        (["--out", "/"], "it is a folder"),
        (["--device", "foo"], "--device 'foo' is no device; devices here: "),
        (["--repeats", "0"], "above 0"),
    ],
)
def test_a_wrong_command_line_says_what_is_right(words, fragment, capsys):
    assert main(["tune", *words]) == 2
    printed = capsys.readouterr()
    assert fragment in printed.err and not printed.out

"""The registry: manifests found by entry point, faults remembered, nothing imported before it is needed."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import types

import fake_backends as fake
import pytest

from ospnext.errors import BackendUnavailableError, RegistryError
from ospnext.ops.contract import API_VERSION
from ospnext.ops.policy import policy_from_env
from ospnext.ops.registry import ENTRY_POINT_GROUP, Implementation, Registry, load, registry

EntryPoint = importlib.metadata.EntryPoint


@pytest.fixture
def plugins(monkeypatch):
    """`plugins(name=manifest, ...)` discovers those entry points; a manifest that is an exception is raised on load."""

    def discover(**named):
        module = types.ModuleType("plugin_made_by_hand")
        entries = []
        for name, manifest in named.items():
            if not isinstance(manifest, Exception):
                setattr(module, name, manifest)
            where = f"{module.__name__}:{name}" if not isinstance(manifest, Exception) else f"no_such_{name}:MANIFEST"
            entries.append(EntryPoint(name, where, ENTRY_POINT_GROUP))
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda *, group: entries)
        return Registry()

    return discover


# ---- discovery


def test_the_backends_in_the_tree_are_found_by_entry_point():
    known = Registry()
    assert set(known.manifests) >= {"reference", "cuda", "ascend"}
    assert known.failures == {}
    assert [m.priority for m in known.ordered()] == sorted((m.priority for m in known.ordered()), reverse=True)


def test_a_plugin_is_found_as_the_in_tree_backends_are(plugins):
    manifest = fake.backend("acme", fake.kernel("acme.flash"))
    assert plugins(acme=manifest).manifests == {"acme": manifest}


def test_a_plugin_that_does_not_load_is_remembered_with_its_traceback_and_harms_nobody(plugins):
    known = plugins(broken=ImportError(), plain=fake.backend("plain", fake.kernel("plain.a")))
    assert set(known.manifests) == {"plain"}
    assert "ModuleNotFoundError: No module named 'no_such_broken'" in known.failures["broken"]
    assert known.failures["broken"].startswith("Traceback")
    with pytest.raises(BackendUnavailableError, match="No module named 'no_such_broken'"):
        policy_from_env({"OSPNEXT_BACKEND": "broken"}, known)


@pytest.mark.parametrize("api", [API_VERSION + 1, API_VERSION - 1])
def test_another_api_version_is_a_reason_and_not_a_crash(plugins, api):
    known = plugins(acme=fake.backend("acme", api=api), plain=fake.backend("plain"))
    assert set(known.manifests) == {"plain"}
    with pytest.raises(BackendUnavailableError, match=f"backend API {api}; this ospnext speaks {API_VERSION}"):
        policy_from_env({"OSPNEXT_BACKEND": "acme"}, known)


def test_an_entry_point_that_is_no_manifest_is_a_reason_too(plugins):
    assert "speaks backend API None" in plugins(acme=lambda: None).failures["acme"]


# ---- manifests that contradict themselves or each other


def test_two_backends_of_one_name_raise(plugins):
    with pytest.raises(RegistryError, match="two backends call themselves 'acme'"):
        plugins(acme=fake.backend("acme"), other=fake.backend("acme"))


def test_one_id_twice_for_a_contract_raises_but_may_serve_two_contracts():
    with pytest.raises(RegistryError, match=r"'a\.x' twice for attention"):
        Registry([fake.backend("a", fake.kernel("a.x"), fake.kernel("a.x", "two"))])
    both = fake.backend("a", fake.kernel("a.x"), fake.kernel("a.x", contract="fused.rope"))
    assert len(Registry([both]).manifests["a"].offers("fused.rope")) == 1


@pytest.mark.parametrize("identifier", ["b.x", "x", "ab.x", "a"])
def test_an_id_that_does_not_start_with_the_backend_raises(identifier):
    with pytest.raises(RegistryError, match="ids start with the backend's name"):
        Registry([fake.backend("a", fake.kernel(identifier))])


@pytest.mark.parametrize("name", ["auto", "composite", "a.b", "a,b", "a=b", ""])
def test_names_that_a_policy_could_not_tell_apart_raise(name):
    with pytest.raises(RegistryError, match="a backend cannot be called"):
        Registry([fake.backend(name)])


# ---- probes and kernels


def test_a_probe_runs_once_and_one_that_raises_is_an_unavailable_device():
    fake.calls.clear()
    known = Registry([fake.backend("a", probe="present"), fake.backend("b", probe="exploding_probe")])
    for _ in range(3):
        assert known.probe("a").available
        assert not known.probe("b").available
    assert fake.calls == ["present", "exploding_probe"]
    assert "the driver hung up" in known.probe("b").reasons[0].got


def test_a_kernel_that_does_not_load_raises_the_same_error_again_and_is_remembered(tmp_path, monkeypatch):
    (tmp_path / "kernel_that_dies.py").write_text(
        "import fake_backends\n"
        "fake_backends.calls.append('imported')\n"
        "raise OSError('libacme.so: cannot open shared object file')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    fake.calls.clear()
    broken = Implementation("a.x", "attention", "kernel_that_dies:kernel")
    known = Registry([fake.backend("a", broken)])
    errors = []
    for _ in range(2):
        with pytest.raises(OSError, match=r"libacme\.so") as caught:
            known.kernel(broken)
        errors.append(caught.value)
    assert errors[0] is errors[1]
    assert fake.calls == ["imported"]
    assert "kernel_that_dies.py" in known.failures["a.x"]
    assert "while loading a.x from kernel_that_dies:kernel" in errors[0].__notes__


def test_a_kernel_is_loaded_once():
    known = Registry([fake.backend("a", fake.kernel("a.x"))])
    assert known.kernel(fake.kernel("a.x")) is known.kernel(fake.kernel("a.x")) is fake.one
    with pytest.raises(AttributeError):
        load("fake_backends:no_such_name")


def test_the_registry_in_force_is_discovered_once():
    assert registry() is registry()


# ---- import cost


def test_importing_the_operators_imports_no_backend_and_a_decision_only_the_kernel_chosen():
    """In a fresh interpreter, since this one has imported much already."""
    program = """
import sys
import ospnext, ospnext.ops
def backends():
    return sorted(m for m in sys.modules if m.startswith("ospnext.backends."))
assert backends() == [], backends()
import torch
q = torch.zeros(1, 2, 1, 8)
ospnext.ops.use_backend("reference", ops={"attention": "reference.math"})
assert "ospnext.backends.reference.attention" not in sys.modules
ospnext.ops.attention(q, q, q)
loaded = backends()
assert "ospnext.backends.reference.attention" in loaded
assert not {"ospnext.backends.reference.sdpa", "ospnext.backends.cuda.attention", "torch_npu"} & set(sys.modules)
for optional in ("diffusers", "transformers", "av", "ftfy", "triton"):
    assert optional not in sys.modules, optional
"""
    environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr

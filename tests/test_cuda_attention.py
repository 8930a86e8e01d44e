"""The attention implementations of the cuda backend without a GPU: what each hands its library and makes of the answer,
which is chosen on which GPU, and that none waits for the device.

Libraries are replaced by modules with the parameters of their sources that compute by the formula of the reference.
Kernels themselves are judged by the conformance suite, on a GPU."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import fake_flash_attention as fake
import pytest
import torch
from torch import Tensor

from ospnext.backends import cuda
from ospnext.backends.reference.attention import math
from ospnext.ops import registry as registry_module
from ospnext.ops.contracts import CONTRACTS
from ospnext.ops.contracts.attention import AttentionRequest
from ospnext.ops.policy import Policy
from ospnext.ops.registry import DeviceInfo, Probe, Registry
from ospnext.ops.select import Decision, select

#: id -> (module, object in it, what stands for its library)
KERNELS: dict[str, tuple[str, str, Callable[[], dict[str, Any]]]] = {
    "fa4": ("flash4", "flash4", fake.flash_attn_4),
    "fa3": ("flash3", "flash3", fake.flash_attn_3),
    "fa3, earlier build": ("flash3", "flash3", lambda: fake.flash_attn_3(earlier=True)),
    "fa2": ("flash2", "flash2", fake.flash_attn_2),
    "fa2 2.7": ("flash2", "flash2", lambda: fake.flash_attn_2("2.7.0.post2")),
    "flash": ("torch_flash", "flash", dict),
    "efficient": ("efficient", "efficient", dict),
}


@pytest.fixture
def load(monkeypatch) -> Iterator[Callable[[str], Any]]:
    """Imports the kernel object of an implementation anew, over its library's stand-in."""
    package, loaded = "ospnext.backends.cuda.attention", []

    def load(name: str) -> Any:
        module, target, modules = KERNELS[name]
        for key, value in modules().items():
            monkeypatch.setitem(sys.modules, key, value)
        sys.modules.pop(f"{package}.{module}", None)
        loaded.append(module)
        return getattr(importlib.import_module(f"{package}.{module}"), target)

    yield load
    for module in loaded:
        sys.modules.pop(f"{package}.{module}", None)


# ---- arguments and results


def pack(*lengths: tuple[int, int]) -> dict[str, Any]:
    q_lens, kv_lens = zip(*lengths, strict=True)
    ends = [torch.tensor([0, *lens]).cumsum(0).int() for lens in (q_lens, kv_lens)]
    return {
        "key_mask": None,
        "cu_seqlens_q": ends[0],
        "cu_seqlens_kv": ends[1],
        "max_seqlen_q": max(q_lens),
        "max_seqlen_kv": max(kv_lens),
    }


DENSE = {"key_mask": None, "cu_seqlens_q": None, "cu_seqlens_kv": None, "max_seqlen_q": 0, "max_seqlen_kv": 0}
PACKS = {
    "even": pack((7, 7), (7, 7)),
    "empty": pack((5, 7), (0, 3), (40, 0), (1, 13)),
    "no keys at all": pack((5, 0), (3, 0)),
    "no queries at all": pack((0, 5), (0, 1)),
}


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def packed_case(named: dict[str, Any]) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    q_tokens, kv_tokens = (int(named[f"cu_seqlens_{side}"][-1]) for side in ("q", "kv"))
    q, grad = randn(q_tokens, 2, 8), randn(q_tokens + 1, 2, 8)[1:]
    return (q, randn(kv_tokens, 2, 8), randn(kv_tokens, 2, 8) + 1, grad), named | {"scale": 0.3}


def mask(rows: int) -> Tensor:
    chosen = torch.zeros(3, rows, dtype=torch.bool)
    chosen[1, 3], chosen[2, ::2] = True, True  # a sample has no key at all
    return chosen


def strided_case() -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Rows that do not start on 16 bytes, and heads before tokens."""
    q, k, v = randn(2, 9, 2, 9)[..., 1:], randn(2, 2, 5, 8).transpose(1, 2), randn(2, 5, 2, 10)[..., :8]
    return (q, k, v, randn(2, 2, 9, 8).transpose(1, 2)), DENSE | {"scale": 0.3}


CASES = {name: packed_case(named) for name, named in PACKS.items()} | {
    "dense": ((randn(2, 5, 2, 8), randn(2, 37, 2, 8), randn(2, 37, 2, 8) + 1, randn(2, 5, 2, 8)), DENSE | {"scale": 1}),
    "strided": strided_case(),
    "zero scale": ((randn(1, 5, 2, 8), randn(1, 4, 2, 8), randn(1, 4, 2, 8), randn(1, 5, 2, 8)), DENSE | {"scale": 0}),
    "mask": (
        (randn(3, 5, 2, 8), randn(3, 6, 2, 8), randn(3, 6, 2, 8) + 1, randn(3, 5, 2, 8)),
        DENSE | {"key_mask": mask(6), "scale": 0.3},
    ),
    "mask without keys": (
        (randn(3, 5, 2, 8), randn(3, 6, 2, 8), randn(3, 6, 2, 8) + 1, randn(3, 5, 2, 8)),
        DENSE | {"key_mask": torch.zeros(3, 6, dtype=torch.bool), "scale": 0.3},
    ),
}


def stand_in(monkeypatch, name: str) -> None:
    """PyTorch's own functions have no CPU kernels: those of `efficient` are replaced too."""
    if name == "efficient":
        module = sys.modules["ospnext.backends.cuda.attention.efficient"]
        functions = {
            "_efficient_attention_forward": staticmethod(fake.efficient_forward),
            "_efficient_attention_backward": staticmethod(fake.efficient_backward),
        }
        monkeypatch.setattr(module, "_ATEN", type("aten", (), functions))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", [name for name in KERNELS if name != "flash"])
def test_a_library_is_asked_for_what_the_contract_says(name, case, load, monkeypatch):
    kernel = load(name)
    stand_in(monkeypatch, name)
    (q, k, v, grad), named = CASES[case]
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]  # kernels get tensors that require gradients, too
    out, lse = kernel.forward(*leaves, **named, need_lse=True)
    expected = math.forward(q, k, v, **named, need_lse=True)
    torch.testing.assert_close((out, lse), expected, equal_nan=False)
    assert out.is_contiguous() and lse.is_contiguous() and not out.requires_grad
    assert kernel.forward(q, k, v, **named, need_lse=False)[1].numel() == 0
    found = kernel.backward(grad, q, k, v, *expected, **named)
    for gradient, wanted in zip(found, math.backward(grad, q, k, v, *expected, **named), strict=True):
        torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("name", ["fa4", "fa3", "fa3, earlier build", "fa2", "efficient"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_gradients_are_asked_for(name, deterministic, load, monkeypatch):
    kernel = load(name)
    stand_in(monkeypatch, name)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    fake.calls.clear()
    for case in ("dense", "even"):
        (q, k, v, grad), named = CASES[case]
        kernel.backward(grad, q, k, v, *math.forward(q, k, v, **named, need_lse=True), **named)
    assert [asked for _, asked in fake.calls] == [deterministic] * 2


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_stand_in_for_pytorch_has_the_parameters_of_pytorch(direction):
    schema = getattr(torch.ops.aten, f"_efficient_attention_{direction}").default._schema
    function = getattr(fake, f"efficient_{direction}")
    names = function.__code__.co_varnames[: function.__code__.co_argcount + function.__code__.co_kwonlyargcount]
    kept = [a.name for a in schema.arguments if a.name in names]
    assert list(names) == kept
    left_out = [a for a in schema.arguments if a.name not in names]
    assert all(a.kwarg_only and a.has_default_value() for a in left_out), left_out


def test_a_flash_attn_too_old_says_so(load, monkeypatch):
    monkeypatch.setitem(KERNELS, "fa2", ("flash2", "flash2", lambda: fake.flash_attn_2("2.6.3")))
    with pytest.raises(
        ImportError, match=r"flash-attn 2\.6\.3 is installed; .* 2\.7 or newer: pip install -U flash-attn"
    ):
        load("fa2")


# ---- no waiting for the device


@pytest.mark.parametrize("name", [name for name in KERNELS if name != "fa3, earlier build"])
@pytest.mark.parametrize("packed", [False, True])
def test_calls_without_mask_read_nothing_back(name, packed, load, monkeypatch):
    """Tensors on the meta device hold no numbers, so that whatever reads one on the host raises."""
    kernel = load(name)
    (q, k, v, grad), named = CASES["even" if packed else "dense"]
    operands = [t.to("meta", torch.bfloat16) for t in (q, k, v)]
    named = {key: t.to("meta") if isinstance(t, Tensor) else t for key, t in named.items()}
    out, lse = kernel.forward(*operands, **named, need_lse=True)
    assert out.shape == q.shape and lse.shape == (*q.shape[:-3], q.shape[-2], q.shape[-3])
    if name == "efficient":  # PyTorch's meta function for this one lacks a parameter: `out`
        backward = staticmethod(lambda grad, q, k, v, *rest, **named: (*map(torch.empty_like, (q, k, v)), None))
        monkeypatch.setattr(
            sys.modules[type(kernel).__module__], "_ATEN", type("aten", (), {"_efficient_attention_backward": backward})
        )
    grads = kernel.backward(grad.to("meta", torch.bfloat16), *operands, out, lse, **named)
    assert [g.shape for g in grads] == [t.shape for t in operands]


def test_the_meta_device_does_notice_a_read(load):
    """A mask is what needs one: how many keys are left."""
    (q, k, v, _), named = CASES["mask"]
    operands = [t.to("meta", torch.bfloat16) for t in (q, k, v)]
    with pytest.raises((RuntimeError, NotImplementedError)):
        load("fa2").forward(*operands, **named | {"key_mask": named["key_mask"].to("meta")}, need_lse=False)


# ---- the order

REQUEST = AttentionRequest("cuda", torch.bfloat16, 1, 75_600, 75_600, 40, 128)
TRAINING = dataclasses.replace(REQUEST, backward=True)
SINGLE = dataclasses.replace(REQUEST, dtype=torch.float32)
FROM_PYTORCH = ["cuda.cudnn", "cuda.flash", "cuda.efficient", "cuda.math"]


def decide(request: AttentionRequest, capability: tuple[int, int], *, packages: bool = True) -> Decision:
    class Machine(Registry):
        def probe(self, backend):
            return Probe(DeviceInfo("cuda", "a card", capability=capability))

        def missing_packages(self, implementation):
            return () if packages else implementation.requires

    return select(CONTRACTS["attention"], request, Policy("cuda"), Machine([cuda.MANIFEST]))


def taking(decision: Decision) -> list[str]:
    return [c.id for c in decision.candidates if c.status in ("chosen", "eligible")]


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_the_order_on_each_generation(capability):
    packages = {(9, 0): ["cuda.fa4", "cuda.fa3"]}.get(capability, [])
    after = ["cuda.fa2", "cuda.flash", "cuda.efficient", "cuda.math"]
    assert taking(decide(REQUEST, capability)) == [*packages, "cuda.cudnn", *after]
    assert taking(decide(TRAINING, capability)) == [*packages, *after]
    assert taking(decide(REQUEST, capability, packages=False)) == FROM_PYTORCH
    assert taking(decide(SINGLE, capability)) == ["cuda.math"]


def test_why_fp32_is_not_for_memory_efficient_attention():
    (candidate,) = (c for c in decide(SINGLE, (9, 0)).candidates if c.id == "cuda.efficient")
    assert [r.code for r in candidate.reasons] == ["dtype"] and "TF32" in candidate.reasons[0].want


def test_deterministic_gradients_at_the_widest_heads_are_beyond_fa3():
    wide = dataclasses.replace(TRAINING, head_dim=256)
    assert "cuda.fa3" in taking(decide(wide, (9, 0)))
    assert "cuda.fa3" not in taking(decide(dataclasses.replace(wide, deterministic=True), (9, 0)))


def test_a_missing_package_is_named_with_the_way_to_get_it():
    decision = decide(REQUEST, (9, 0), packages=False)
    lacking = {c.id: str(c.reasons[0]) for c in decision.candidates if c.status == "not loaded"}
    assert lacking["cuda.fa2"] == (
        "package: got flash_attn.flash_attn_interface not installed, want pip install flash-attn --no-build-isolation"
    )
    assert "ospnext[cuda]" in lacking["cuda.fa4"] and "hopper/" in lacking["cuda.fa3"]


def test_a_module_is_looked_for_without_importing_its_package(tmp_path, monkeypatch):
    """flash-attn and flash-attn-4 share the package flash_attn, whose import loads a library that may not fit."""
    package = tmp_path / "shared_name"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('undefined symbol')")
    (package / "inner").mkdir()
    (package / "inner" / "deep.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    installed = registry_module._installed
    installed.cache_clear()
    assert installed("shared_name.inner") and installed("shared_name.inner.deep")
    assert not installed("shared_name.other") and not installed("shared_name.inner.other.deep")
    assert not installed("no_such_name.inner")
    assert "shared_name" not in sys.modules

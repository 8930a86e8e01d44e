"""The FP8 attention kernel of the cuda backend on a cuDNN made by hand, which computes what the documentation of the
real one says: operands, strides, scales and lengths are right, or the suite's bounds are broken.

On a GPU the conformance suite judges the kernel itself."""

from __future__ import annotations

import contextlib
import importlib
import math
import sys
import types

import pytest
import torch
from broken_native_attention import E4M3

from ospnext.backends.reference import quantize as reference_quantize
from ospnext.ops.contracts import CONTRACTS

CONTRACT = CONTRACTS["native_attention"]
CASES = {case.id.rpartition("/")[2]: case for case in CONTRACT.cases()}


def judged(name: str, out: torch.Tensor):
    return CONTRACT.expect(CONTRACT.inputs(CASES[name])).judge({"out": out})["out"]


class _Named:
    def __init__(self, **about):
        self.about = about

    def __getattr__(self, setter):
        def set_it(value):
            self.about[setter.removeprefix("set_")] = value
            return self

        return set_it


class HandMade:
    """`cudnn.pygraph`, of which only `sdpa_fp8` is there. Reads operands through the strides it was told."""

    made: list[HandMade] = []  # noqa: RUF012

    def __init__(self, **types_):
        self.types, self.runs = types_, 0
        HandMade.made.append(self)

    def tensor(self, **about):
        return _Named(**about)

    def sdpa_fp8(self, *, attn_scale, generate_stats, name, **operands):
        assert generate_stats is False
        self.scale, self.operands = attn_scale, operands
        self.results = [_Named() for _ in range(4)]
        return self.results

    def build(self, modes):
        assert modes == ["A", "FALLBACK"]

    def get_workspace_size(self):
        return 0

    def execute(self, by_uid, workspace, *, handle):
        assert workspace.dtype == torch.uint8 and workspace.numel()
        self.runs += 1
        given = {name: self._view(by_uid, operand) for name, operand in self.operands.items()}
        q, k, v = (given[name].float() for name in ("q", "k", "v"))
        logits = q @ k.mT * given["descale_q"] * given["descale_k"] * self.scale
        exponentials = (logits - logits.amax(-1, keepdim=True)).exp()
        p = (exponentials * given["scale_s"]).clamp(max=448).to(E4M3).float() * given["descale_s"]
        out = p @ v * given["descale_v"] / exponentials.sum(-1, keepdim=True)
        of_out, _, *amax = self.results
        out = out.nan_to_num(0.0)  # nothing is said of NaN
        self._view(by_uid, of_out).copy_((out * given["scale_o"]).nan_to_num(0.0).clamp(-448, 448).to(E4M3))
        for of_amax, found in zip(amax, (p.amax(), out.abs().amax()), strict=True):
            self._view(by_uid, of_amax).fill_(found)

    @staticmethod
    def _view(by_uid, operand):
        about = operand.about
        tensor = by_uid[about["uid"]]
        assert tensor.dtype == {"fp8": E4M3, "fp32": torch.float32}[about["data_type"]]
        return tensor.as_strided(about["dim"], about["stride"])


def _widen(numbers, scale, centre, dtype):
    return (numbers.flatten(-2).float() * scale + centre).to(dtype).view(numbers.shape)


def _quantize_centred(x, scale_max, scale_mode):
    mean = x.float().mean(0)
    settings = {"scale_max": scale_max, "scale_mode": scale_mode, "granularity": "tensor", "carried": True}
    codes, scale = reference_quantize.quantize(x.float() - mean, None, **settings)
    return codes, scale.reshape(()), x.float().mean(0) - codes.float().mean(0) * scale.reshape(())


@pytest.fixture
def cudnn_fp8(monkeypatch):
    """The kernel's module, on the CPU: the packages that it needs, Triton's kernels and streams are made by hand."""
    here = "ospnext.backends.cuda"
    cudnn = types.ModuleType("cudnn")
    cudnn.pygraph = HandMade
    cudnn.data_type = types.SimpleNamespace(FP8_E4M3="fp8", FLOAT="fp32")
    cudnn.heur_mode = types.SimpleNamespace(A="A", FALLBACK="FALLBACK")
    cudnn.create_handle, cudnn.set_stream = lambda: "handle", lambda handle, stream: None
    widened = types.ModuleType(f"{here}.kernels.widen")
    widened.widen = _widen
    centred = types.ModuleType(f"{here}.kernels.centre")
    centred.quantize_centred = _quantize_centred
    quantized = types.ModuleType(f"{here}.quantize")
    quantized.quantize = reference_quantize.quantize
    for module in (cudnn, widened, centred, quantized):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=0))
    monkeypatch.delitem(sys.modules, f"{here}.attention.cudnn_fp8", raising=False)
    HandMade.made.clear()
    yield importlib.import_module(f"{here}.attention.cudnn_fp8")
    del sys.modules[f"{here}.attention.cudnn_fp8"]


def by_cudnn(module, name: str) -> torch.Tensor:
    case = CASES[name]
    named = CONTRACT.inputs(case)
    recipe, scale = named["recipe"], named.get("scale")
    pack = {key: named.get(key) for key in ("cu_seqlens_q", "cu_seqlens_kv")}
    return module.cudnn_fp8.forward(
        *(named[key] for key in ("q", "k", "v")),
        **pack,
        max_seqlen_q=case.request.q_len,
        max_seqlen_kv=case.request.kv_len,
        scale=case.request.head_dim**-0.5 if scale is None else scale,
        scale_max=recipe.scale_max,
        scale_mode=recipe.scale_mode,
        amax=None,
    )


@pytest.mark.parametrize("name", [n for n in CASES if n.startswith("bf16") and "k20160" not in n and "heads" not in n])
def test_the_cudnn_kernel_is_within_the_bounds(cudnn_fp8, name):
    out = by_cudnn(cudnn_fp8, name)
    assert out.is_contiguous()
    assert judged(name, out).ok


@pytest.mark.parametrize(("name", "scale"), [("P_SCALE", 2.0**-6), ("_unit", None)])
def test_a_wrong_scale_in_the_cudnn_kernel_is_found(cudnn_fp8, monkeypatch, name, scale):
    if scale is None:
        right = cudnn_fp8._unit
        monkeypatch.setattr(cudnn_fp8, "_unit", lambda scale_max: right(scale_max) / 2)
        assert not judged("bf16-needle", by_cudnn(cudnn_fp8, "bf16-needle")).ok
    else:
        run = cudnn_fp8.run_graph
        monkeypatch.setattr(cudnn_fp8, "run_graph", lambda *arguments: run(*arguments, p_scale=scale))
        assert not judged("bf16-plain", by_cudnn(cudnn_fp8, "bf16-plain")).ok


def test_graphs_are_built_once_for_each_shape(cudnn_fp8):
    for _ in range(2):
        by_cudnn(cudnn_fp8, "bf16-packed")  # lengths 93, 93, 88, 88
    assert [graph.runs for graph in HandMade.made] == [4, 4]
    by_cudnn(cudnn_fp8, "bf16-packed-empty")  # of three sequences one has no queries and one no keys
    assert [graph.runs for graph in HandMade.made] == [4, 4, 1]


def test_what_is_not_finite_makes_everything_nan(cudnn_fp8):
    settings = {"cu_seqlens_q": None, "cu_seqlens_kv": None, "max_seqlen_q": 0, "max_seqlen_kv": 0}
    settings |= {"scale": 0.2, "scale_max": 15.0, "scale_mode": "amax", "amax": None}
    for which in range(3):
        q, k, v = torch.randn(3, 1, 37, 2, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
        (q, k, v)[which][0, 5, 1, 3] = math.inf
        assert cudnn_fp8.cudnn_fp8.forward(q, k, v, **settings).isnan().all()

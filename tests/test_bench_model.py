"""The benchmark of a forward: what it runs, weights and variants, its rows, and the command on a CPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ospnext import atomic
from ospnext.bench import measure, parts, report, rows, variants, weights
from ospnext.bench.device import chosen_device
from ospnext.bench.measure import Timing
from ospnext.bench.rows import Row
from ospnext.bench.session import Session
from ospnext.bench.variants import VARIANTS, Variant
from ospnext.bench.versions import versions
from ospnext.bench.workload import PRESETS, workload
from ospnext.cli import main
from ospnext.errors import ConfigError
from ospnext.models import TransformerConfig
from ospnext.ops import use_backend
from ospnext.ops.device import Device
from ospnext.pipelines.compile import OPTIONS

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
CPU = torch.device("cpu")
SIZE = ["--preset", "tiny", "--resolution", "64x96", "--frames", "5", "--repeats", "1", "--quiet"]
#: C = 8, F = 20, one layer, patches of 4 channels: all small enough to add up by hand.
HAND = TransformerConfig(dim=8, ffn_dim=20, num_heads=2, num_layers=1, text_len=3, in_dim=1, out_dim=1, freq_dim=2)


# ---- what a benchmark runs


def test_workloads_have_the_known_tokens():
    """Section 2.2 of arXiv 2605.28691 and the published shapes of Wan2.1."""
    known = {"480p": 32_760, "720p": 75_600, "768p": 80_640}
    assert {name: workload("14b", name).tokens for name in known} == known
    assert workload("14b", "720p").grid == (21, 45, 80)
    assert workload("1.3b", "1080p").grid == (21, 68, 120)
    assert workload("tiny", "64x96", frames=5).grid == (2, 4, 6)


@pytest.mark.parametrize(
    ("layers", "full"), [(40, 8), (20, 4), (10, 4), (8, 4), (6, 0), (2, 0)], ids=lambda value: str(value)
)
def test_a_shorter_model_keeps_the_pattern(layers, full):
    work = workload("14b", "480p", layers=layers)
    assert (work.config.num_layers, work.config.num_full_blocks) == (layers, full)
    assert work.shortened == (layers != 40)
    assert ("of 40 layers" in str(work)) == (layers != 40)
    assert set(work.config.block_kinds) == {"token", "group"} | ({"full"} if full else set())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--preset", "14bb"], "unknown preset '14bb' (did you mean '14b'?); presets: 14b, 1.3b, tiny"),
        (["--resolution", "720"], "unknown resolution '720' (did you mean '720p'?)"),
        (["--resolution", "720p,100x96"], "resolution 100x96: height and width must be multiples of 16"),
        (["--frames", "80"], "--frames 80: a latent holds 4 frames after the first; 77 or 81 fit"),
        (["--layers", "7"], "--layers 7: give an even number from 2 to the preset's 8"),
        (["--variants", "osp,sparse"], "unknown variant 'sparse'"),
        (["--variants", "osp,osp-hif"], "did you mean 'osp-hif8'?); variants: dense, osp, osp-hif8"),
        (["--variants", "osp,osp"], "name each variant once"),
        (["--repeats", "0"], "--repeats 0: at least one forward must be timed"),
        (["--json", "no/such/folder/a.json"], "there is no folder no/such/folder"),
        (["--out", "/"], "cannot write /: it is a folder"),
        (["--device", "foo"], "--device 'foo' is no device; devices here: "),
        (["--device", "cpu:7"], "--device cpu:7: there is no such device here; devices here: cpu"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_word_is_named_before_anything_runs(options, said, capsys, monkeypatch):
    monkeypatch.setattr(Session, "rows", lambda self: pytest.fail("it ran"))
    assert main(["bench", "model", *SIZE, *options]) == 2
    assert said in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_to_is_named_before_anything_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Session, "rows", lambda self: pytest.fail("it ran"))
    monkeypatch.setattr(atomic.os, "access", lambda path, mode: path != tmp_path)
    assert main(["bench", "model", *SIZE, "--out", str(tmp_path / "a.md")]) == 2
    assert f"folder {tmp_path} is not yours to write to" in capsys.readouterr().err


@pytest.fixture
def two_cards(monkeypatch):
    """An accelerator with two cards; the indices that were made current."""
    current: list[int] = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "set_device_index", current.append)
    return current


def test_a_card_that_is_named_becomes_the_current_one(two_cards):
    assert chosen_device("cuda:1", CPU) == torch.device("cuda", 1)
    assert two_cards == [1]
    assert chosen_device("cuda", CPU) == torch.device("cuda")
    assert chosen_device(None, CPU) == chosen_device("cpu", CPU) == CPU
    assert two_cards == [1]


@pytest.mark.parametrize("asked", ["cuda:2", "xpu", "xpu:0", "meta"])
def test_a_card_that_is_not_there_is_refused_with_those_that_are(two_cards, asked):
    with pytest.raises(ConfigError, match=f"--device {asked}: there is no such .*: cpu, cuda:0, cuda:1. Give one of"):
        chosen_device(asked, CPU)
    assert two_cards == []


def test_versions_name_the_card_that_was_asked_for(two_cards, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device.index}")
    with use_backend("reference"):
        assert versions(torch.device("cuda", 1))["device_name"] == "card 1"
        assert versions(CPU)["device_name"] not in ("", None)


# ---- weights and variants


def test_variants_share_the_very_weights():
    config = PRESETS["tiny"]
    state = weights.random_state(config, CPU)
    dense, sparse = (VARIANTS[name].build(config, state) for name in ("dense", "osp"))
    for model in (dense, sparse):
        assert {name: t.data_ptr() for name, t in model.state_dict().items()} == {
            name: t.data_ptr() for name, t in state.items()
        }
    assert not dense.config.sparse
    assert sparse.config.sparse


def test_no_branch_of_the_random_model_is_switched_off():
    """Branches have about the size of the stream and gates that of 1: an error in any of them shows in the output."""
    work = workload("tiny", "64x96", frames=5)
    model = VARIANTS["dense"].build(work.config, weights.random_state(work.config, CPU, torch.float32))
    inputs = weights.random_inputs(work, CPU, torch.float32)
    branches: list[float] = []
    gates: list[float] = []

    def size(tensor: torch.Tensor) -> float:
        return tensor.square().mean().sqrt().item()

    for block in model.blocks:
        block.register_forward_pre_hook(lambda block, given: gates.append(size((block.modulation + given[1])[:, 2::3])))
        for branch in (block.self_attn, block.cross_attn, block.ffn):
            branch.register_forward_hook(lambda _, given, out: branches.append(size(out)))
    out = model(inputs.latents_BCTHW, inputs.timestep_B, inputs.text_BLC)
    assert len(branches) == 3 * len(gates) == 3 * 8
    assert min(branches) > 0.1
    assert min(gates) > 0.4
    assert out.std() > 0.1


def test_weights_take_what_is_said_before():
    config = PRESETS["tiny"]
    for dtype in (torch.bfloat16, torch.float32):
        state = weights.random_state(config, CPU, dtype)
        assert weights.state_bytes(config, dtype) == sum(tensor.nbytes for tensor in state.values())


def test_weights_that_do_not_fit_are_refused_before_they_are_drawn(capsys, monkeypatch):
    wanted = weights.state_bytes(variants.dense(PRESETS["tiny"]))
    monkeypatch.setattr("ospnext.bench.session.random_state", lambda *given: pytest.fail("drawn"))
    monkeypatch.setattr(Device, "free_memory", lambda self: wanted - 1)
    assert main(["bench", "model", *SIZE]) == 2
    said = capsys.readouterr().err
    assert "the weights of tiny with 8 layers take" in said
    assert "GiB free; give fewer --layers, or a smaller --preset" in said


def test_memory_that_fits_or_is_unknown_is_no_reason_to_refuse(monkeypatch):
    wanted = weights.state_bytes(variants.dense(PRESETS["tiny"]))
    lines: list[str] = []
    session = Session(CPU, (workload("tiny", "64x96", frames=5),), (), tell=lines.append)
    for free in (wanted, None):
        monkeypatch.setattr(Device, "free_memory", lambda self, free=free: free)
        assert list(session.rows()) == []
    assert lines == [f"drawing {wanted / 2**30:.1f} GiB of weights on cpu"] * 2


def test_weights_that_wait_for_other_variants_are_not_in_the_peak():
    from ospnext.bench.session import _parked

    config = PRESETS["tiny"]
    state = weights.random_state(config, CPU)
    assert _parked(state, VARIANTS["osp"].build(config, state)) == 0
    quantized = sum(
        t.nbytes for name, t in state.items() if t.ndim == 2 and name.startswith("blocks") and "norm" not in name
    )
    assert _parked(state, VARIANTS["osp-hif8"].build(config, state)) == quantized


# ---- rows and reports


def row(variant: str, times: tuple[float, ...] = (), **more) -> Row:
    timing = Timing(times) if times else None
    return Row(workload("tiny", "64x96", frames=5), variant, "off", timing=timing, **more)


def test_ratios_say_how_many_times_faster():
    found = [row("dense", (10.0, 12.0, 11.0)), row("osp", (5.0,)), row("osp-hif8", error="no")]
    assert rows.ratio(found[1], "dense", found) == pytest.approx(2.2)
    assert rows.ratio(found[2], "dense", found) is None
    assert rows.ratio(found[1], "diffusers-compiled", found) is None
    elsewhere = replace(found[1], work=workload("tiny", "64x64", frames=5))
    assert rows.ratio(elsewhere, "dense", found) is None


def test_share_of_kernels_and_idle_time():
    times = {"linear": 30.0, "attention": 40.0, "elementwise": 10.0, "quantize": 0.0, "other": 5.0}
    floors = {"linear": 28.0, "attention": 38.0, "elementwise": 5.0, "quantize": 0.0}
    found = row("dense", (100.0,), parts=times, floors=floors)
    assert found.of_kernels == pytest.approx(0.66)
    assert found.idle == pytest.approx(15.0)
    text = report.markdown([found], {"device": "cpu"})
    assert "dense reaches 66% of its kernels" in text
    assert "| linear | 30.0 | 30% | 28.0 | 93% |" in text
    assert "| no operator | 15.0 | 15% |  |  |" in text


def test_repeats_are_timed_one_by_one():
    calls = []
    found = measure.timed(lambda: calls.append(None), CPU, repeats=4, warm_up=2)
    assert len(calls) == 6
    assert len(found.times) == 4
    assert found.shortest <= found.median <= found.longest


# ---- the command

ROW_KEYS = {
    *("preset", "resolution", "height", "width", "frames", "tokens", "layers", "shortened", "variant", "compile"),
    *("milliseconds", "min", "max", "repeats", "ratio_to_dense", "ratio_to_diffusers_compiled", "peak_gib", "tflop"),
    *("of_kernels", "parts", "floors", "idle", "difference_to", "kernels", "remark", "error"),
}


def bench(tmp_path, *options: str, code: int = 0) -> dict:
    path = tmp_path / "bench.json"
    assert main(["bench", "model", *SIZE, "--json", str(path), "--out", str(tmp_path / "bench.md"), *options]) == code
    return json.loads(path.read_text())


def test_the_command_from_end_to_end(tmp_path, capsys):
    found = bench(tmp_path, "--backend", "reference", "--variants", ",".join(VARIANTS))
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["backend"] == "reference"
    assert found["versions"]["settings"] == {
        "preset": "tiny",
        "resolution": "64x96",
        "frames": 5,
        "variants": ",".join(VARIANTS),
        "compile": "off",
        "repeats": 1,
        "backend": "reference",
    }
    by_name = {r["variant"]: r for r in found["rows"]}
    assert list(by_name) == list(VARIANTS)
    for name, r in by_name.items():
        assert r.keys() == ROW_KEYS
        assert r["error"] is None and r["remark"] is None
        assert r["tokens"] == 48
        assert 0 < r["min"] <= r["milliseconds"] <= r["max"]
        assert r["ratio_to_dense"] == pytest.approx(by_name["dense"]["milliseconds"] / r["milliseconds"])
        assert r["ratio_to_diffusers_compiled"] is None
        assert r["parts"].keys() == set(parts.PARTS)
        assert r["floors"].keys() == set(parts.PARTS) - {"other"}
        assert r["parts"]["linear"] > 0 < r["parts"]["attention"]
        assert (r["parts"]["quantize"] > 0) == ("hif8" in name) == (r["floors"]["quantize"] > 0)
        assert r["kernels"]["attention"].keys() <= {"reference.sdpa", "reference.math"}
        assert ("quantized_linear" in r["kernels"]) == ("hif8" in name)
        assert ("native_attention" in r["kernels"]) == ("-attn" in name)
    # A sparse model is another one; HiFloat8 is the same with an error of some percent (docs/hif8.md).
    assert by_name["osp"]["difference_to"]["dense"] > 0.05
    for name in (name for name in VARIANTS if "hif8" in name):
        assert 1e-3 < by_name[name]["difference_to"]["osp"] < 0.15
    text = capsys.readouterr().out
    assert text.strip() == (tmp_path / "bench.md").read_text().strip()
    assert "dense reaches" in text
    assert "reference.hif8" in text
    assert "Made by `ospnext bench model --preset tiny --resolution 64x96 --frames 5 --variants dense,osp," in text


def test_a_variant_that_fails_leaves_the_others_alone(tmp_path, capsys, monkeypatch):
    def build(self, config, state):
        if self.name == "osp":
            raise torch.OutOfMemoryError("out of memory: tried to allocate 1 TiB")
        return built(self, config, state)

    built = Variant.build
    monkeypatch.setattr(Variant, "build", build)
    found = bench(tmp_path, "--variants", "dense,osp,osp-hif8", code=1)
    assert [r["error"] is None for r in found["rows"]] == [True, False, True]
    failed = found["rows"][1]
    assert failed["error"] == "OutOfMemoryError: out of memory: tried to allocate 1 TiB"
    assert failed["milliseconds"] is failed["ratio_to_dense"] is failed["peak_gib"] is None
    assert "- osp FAILED: OutOfMemoryError: out of memory" in capsys.readouterr().out


def test_times_are_kept_where_nothing_can_be_said_about_parts(tmp_path, monkeypatch, capsys):
    def timed_parts(*given, **settings):
        raise RuntimeError("no counters")

    monkeypatch.setattr("ospnext.bench.session.timed_parts", timed_parts)
    (found,) = bench(tmp_path, "--variants", "dense", code=1)["rows"]
    assert found["error"] == "times only: RuntimeError: no counters"
    assert found["milliseconds"] > 0
    assert found["parts"] == found["floors"] == {}
    assert found["of_kernels"] is found["idle"] is None
    text = capsys.readouterr().out
    assert "- dense FAILED: times only" in text
    assert "| dense | off |" in text


def test_an_output_that_is_not_finite_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "ospnext.models.transformer.OSPNextTransformer._unpatchify",
        lambda self, patches, leave, grid: torch.full((1, 1), float("nan")),
    )
    assert bench(tmp_path, "--variants", "dense", code=1)["rows"][0]["error"] == (
        "RuntimeError: the output is not finite"
    )


def test_files_are_written_after_each_variant(tmp_path, monkeypatch):
    """What was measured survives an interruption."""
    written = []
    write = atomic.write_text
    monkeypatch.setattr(atomic, "write_text", lambda path, text: (written.append(path.suffix), write(path, text)))
    bench(tmp_path, "--variants", "dense,osp", "--layers", "2")
    assert written == [".json", ".md", ".json", ".md"]
    assert "Shortened: 2 layers (0 full where the model is sparse) instead of 8." in (tmp_path / "bench.md").read_text()


def test_compiled_blocks_are_traced_once_per_kind(tmp_path, monkeypatch):
    """aot_eager runs the traced graphs with eager kernels; a trace that breaks, or one too many, is an error row."""
    monkeypatch.setitem(OPTIONS["blocks"], "backend", "aot_eager")
    found = bench(tmp_path, "--variants", "dense,osp", "--compile", "blocks")
    assert [r["error"] for r in found["rows"]] == [None, None]
    assert {r["compile"] for r in found["rows"]} == {"blocks"}
    assert {r["remark"] for r in found["rows"]} == {"no parts: compiled, its kernels belong to no operator"}


def test_one_graph_has_no_parts(tmp_path, monkeypatch):
    monkeypatch.setitem(OPTIONS["max"], "backend", "aot_eager")
    monkeypatch.setitem(OPTIONS["max"], "mode", None)
    (found,) = bench(tmp_path, "--variants", "dense", "--layers", "2", "--compile", "max")["rows"]
    assert found["error"] is None
    assert found["remark"] == "no parts: compiled, its kernels belong to no operator"
    assert found["parts"] == {} and found["floors"].keys() == set(parts.PARTS) - {"other"}
    assert "| linear |" not in (tmp_path / "bench.md").read_text()

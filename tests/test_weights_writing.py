"""Transformer checkpoints written: shards, round trips, atomic writes, conversion."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_checkpoints import (
    DENSE,
    INDEX,
    TINY,
    WEIGHTS,
    as_diffusers,
    assert_same,
    diffusers_model,
    public_config,
    random_state,
    snapshot,
    tiny_folder,  # noqa: F401  (a fixture)
)

from ospnext.errors import CheckpointError, ConfigError
from ospnext.models.convert import convert
from ospnext.models.loading import inspect_checkpoint, load_transformer, save_transformer
from ospnext.models.weights import writer

# --- shards ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path, folder):
    path = tmp_path / "sharded"
    save_transformer(load_transformer(folder), path, naming="official", max_shard_size=300_000)
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


def test_shards_respect_the_size_and_the_index(sharded):
    index = json.loads((sharded / INDEX).read_text())
    sizes = []
    for file in sorted(sharded.glob("*.safetensors")):
        state = load_file(file)
        sizes.append(sum(tensor.nbytes for tensor in state.values()))
        assert {name for name, shard in index["weight_map"].items() if shard == file.name} == state.keys()
    assert max(sizes) <= 300_000
    assert index["metadata"]["total_size"] == sum(sizes) == 4 * TINY.parameter_count()


def test_plan_gives_a_tensor_above_the_limit_its_own_shard():
    sizes = {"a": 3, "b": 3, "c": 20, "d": 1, "e": 9, "f": 1}
    assert writer.plan_shards(sizes, 10) == [["a", "b"], ["c"], ["d", "e"], ["f"]]
    with pytest.raises(ConfigError, match="max_shard_size"):
        writer.plan_shards({"a": 1}, 0)


@pytest.mark.parametrize("indexed", [True, False])
def test_absent_shards_are_named(sharded, indexed):
    if not indexed:
        (sharded / INDEX).unlink()
    assert_same(load_transformer(sharded).state_dict(), random_state())
    first, *_, last = sorted(sharded.glob("*.safetensors"))
    with pytest.raises(CheckpointError, match="one shard of several"):
        load_transformer(first)
    first.unlink()
    with pytest.raises(CheckpointError, match=f"lacks 1 of its .*{first.name}"):
        load_transformer(sharded)
    last.unlink()
    if indexed:
        with pytest.raises(CheckpointError, match=f"lacks 2 of its .*{first.name}, {last.name}"):
            load_transformer(sharded)


def test_index_may_not_point_outside_its_folder(sharded):
    (sharded / INDEX).write_text(json.dumps({"weight_map": {"a": "../model/" + WEIGHTS}}))
    with pytest.raises(CheckpointError, match="outside its folder"):
        load_transformer(sharded)


def test_the_same_tensor_in_two_files_is_refused(folder):
    (folder / WEIGHTS).rename(folder / "fp32.safetensors")
    save_file({"head.modulation": torch.zeros(1, 2, 48)}, folder / "ema.safetensors")
    with pytest.raises(CheckpointError, match=r"head.modulation is both in ema.safetensors and in fp32.safetensors"):
        load_transformer(folder)


# --- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_shard_size", [300_000, 10**9])
@pytest.mark.parametrize("naming", ["official", "diffusers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_exact(tmp_path, folder, dtype, naming, max_shard_size):
    model = load_transformer(folder, dtype=dtype)
    save_transformer(model, tmp_path / "out", naming=naming, max_shard_size=max_shard_size)
    again = load_transformer(tmp_path / "out")
    assert again.config == model.config
    assert inspect_checkpoint(tmp_path / "out").naming == naming
    assert_same(again.state_dict(), model.state_dict())


@pytest.mark.parametrize("max_shard_size", [300_000, 10**9])
def test_diffusers_loads_what_we_write(tmp_path, folder, max_shard_size):
    diffusers = pytest.importorskip("diffusers")
    model = load_transformer(folder)
    save_transformer(model, tmp_path / "out", max_shard_size=max_shard_size)
    theirs, info = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert_same(theirs.state_dict(), as_diffusers(model.state_dict()))
    assert public_config(theirs) == public_config(diffusers_model(TINY))


def test_we_load_what_diffusers_writes(tmp_path):
    theirs = diffusers_model(TINY)
    theirs.save_pretrained(tmp_path / "out", max_shard_size="300KB")
    model = load_transformer(tmp_path / "out", config_overrides={"text_len": TINY.text_len})
    assert model.config == TINY.replace(**DENSE)
    assert_same(as_diffusers(model.state_dict()), dict(theirs.state_dict()))


def fail_on_second_call(function):
    calls = []

    def wrapped(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise OSError("no space left on device")
        return function(*args, **kwargs)

    return wrapped


@pytest.mark.parametrize("exists", [True, False])
def test_failed_write_leaves_the_destination_untouched(tmp_path, sharded, monkeypatch, exists):
    target = sharded if exists else tmp_path / "new"
    before = snapshot(target) if exists else None
    model = load_transformer(sharded)
    monkeypatch.setattr(writer, "save_file", fail_on_second_call(writer.save_file))
    with pytest.raises(OSError, match="no space left"):
        save_transformer(model, target, max_shard_size=300_000)
    assert (snapshot(target) if exists else target.exists()) == (before or False)


def test_interrupted_publication_is_refused_by_the_reader(sharded, monkeypatch):
    model = load_transformer(sharded)
    monkeypatch.setattr(writer.os, "replace", fail_on_second_call(writer.os.replace))
    with pytest.raises(OSError, match="no space left"):
        save_transformer(model, sharded, max_shard_size=200_000)
    with pytest.raises(CheckpointError, match=r"no config.json"):
        load_transformer(sharded)


def test_saving_over_a_checkpoint_replaces_it_and_spares_other_files(sharded):
    (sharded / "README.md").write_text("mine")
    model = load_transformer(sharded)
    save_transformer(model, sharded)
    assert set(snapshot(sharded)) == {"README.md", "config.json", WEIGHTS}
    assert_same(load_transformer(sharded).state_dict(), random_state())
    assert (sharded / WEIGHTS).stat().st_mode == (sharded / "README.md").stat().st_mode


def test_saving_needs_a_folder_and_a_plain_model(tmp_path, folder):
    model = load_transformer(folder)
    with pytest.raises(CheckpointError, match="a file is there"):
        save_transformer(model, folder / WEIGHTS)
    model.adapter = torch.nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match=r"adapter.weight is no parameter"):
        save_transformer(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- conversion ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("naming", ["official", "diffusers"])
def test_conversion_keeps_every_stored_bit(tmp_path, folder, naming):
    state = {n: t.bfloat16() if i % 2 else t for i, (n, t) in enumerate(random_state().items())}
    torch.save({"model": {f"module.{n}": t for n, t in state.items()}}, folder / "w.pth")
    convert(folder / "w.pth", tmp_path / "out", naming=naming, max_shard_size=300_000)
    found = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        found |= load_file(file)
    assert_same(found, state if naming == "official" else as_diffusers(state))
    assert inspect_checkpoint(tmp_path / "out").config == TINY


def test_conversion_to_a_dtype_equals_loading_in_it(tmp_path, folder):
    sparse = {"num_full_blocks": 0}
    report = convert(folder, tmp_path / "out", naming="diffusers", dtype=torch.bfloat16, config_overrides=sparse)
    model = load_transformer(folder, dtype=torch.bfloat16, config_overrides=sparse)
    assert report.config == model.config == inspect_checkpoint(tmp_path / "out").config == TINY.replace(**sparse)
    assert_same(load_file(tmp_path / "out" / WEIGHTS), as_diffusers(model.state_dict()))


def test_conversion_in_place(folder):
    convert(folder, folder, naming="diffusers", max_shard_size=300_000)
    assert inspect_checkpoint(folder).naming == "diffusers"
    assert_same(load_transformer(folder).state_dict(), random_state())

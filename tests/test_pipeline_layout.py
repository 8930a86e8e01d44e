"""Checkpoint folders: both layouts load the same model, incomplete ones are refused by name, writing never destroys."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from wan_official_names import official_t5, official_vae

from ospnext.errors import CheckpointError
from ospnext.models import save_transformer
from ospnext.pipelines import OSPNextPipeline, storage, write_random_checkpoint
from ospnext.pipelines.checkpoint_folder import replace_folder


@pytest.fixture(scope="module")
def diffusers_layout(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diffusers") / "tiny"
    write_random_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def official_layout(tmp_path_factory, diffusers_layout):
    """The same weights as a download of an official Wan repository."""
    folder = tmp_path_factory.mktemp("official") / "Wan2.1"
    save_transformer(OSPNextPipeline.from_pretrained(diffusers_layout).transformer, folder, naming="official")
    t5 = load_file(diffusers_layout / "text_encoder" / "model.safetensors")
    torch.save({official_t5(n): t for n, t in t5.items() if official_t5(n)}, folder / "models_t5_umt5-xxl-enc-bf16.pth")
    vae = load_file(diffusers_layout / "vae" / "diffusion_pytorch_model.safetensors")
    torch.save({official_vae(name): tensor for name, tensor in vae.items()}, folder / "Wan2.1_VAE.pth")
    shutil.copytree(diffusers_layout / "tokenizer", folder / "google" / "umt5-xxl")
    return folder


@pytest.fixture
def copy(tmp_path, request):
    return shutil.copytree(request.getfixturevalue(request.param), tmp_path / "copy")


def test_both_layouts_give_the_same_video(diffusers_layout, official_layout):
    size = {"height": 32, "width": 48, "num_frames": 5}
    request = {"prompt": "a cat", **size, "num_inference_steps": 2, "output_type": "pt"}
    first, second = (
        OSPNextPipeline.from_pretrained(folder)(**request, generator=torch.Generator().manual_seed(0)).frames
        for folder in (diffusers_layout, official_layout)
    )
    assert torch.equal(first, second)
    assert first.std() > 0.05


def test_official_layout_has_wans_schedule(official_layout):
    pipe = OSPNextPipeline.from_pretrained(official_layout)
    assert (pipe.schedule.shift, pipe.schedule.dynamic_shift, pipe.solver) == (5.0, False, "unipc")


@pytest.mark.parametrize(
    ("copy", "part", "message"),
    [
        ("diffusers_layout", "transformer/config.json", "transformer: transformer/config.json"),
        ("diffusers_layout", "transformer/diffusion_pytorch_model.safetensors", r"transformer/\*.safetensors"),
        ("diffusers_layout", "text_encoder", "text_encoder: text_encoder/config.json"),
        ("diffusers_layout", "tokenizer", "text_encoder: tokenizer/tokenizer_config.json"),
        ("diffusers_layout", "vae/diffusion_pytorch_model.safetensors", r"vae: vae/\*.safetensors"),
        ("official_layout", "config.json", "transformer: config.json"),
        ("official_layout", "diffusion_pytorch_model.safetensors", r"transformer: \*.safetensors"),
        ("official_layout", "models_t5_umt5-xxl-enc-bf16.pth", "text_encoder: models_t5_umt5-xxl-enc-bf16.pth"),
        ("official_layout", "google", "text_encoder: google/umt5-xxl/tokenizer_config.json"),
        ("official_layout", "Wan2.1_VAE.pth", "vae: Wan2.1_VAE.pth"),
    ],
    indirect=["copy"],
)
def test_a_missing_part_is_named(copy, part, message):
    path = copy / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(CheckpointError, match=rf"lacks .*{message}.* Found: "):
        OSPNextPipeline.from_pretrained(copy)


def test_a_part_that_is_passed_or_left_out_need_not_be_there(diffusers_layout, official_layout, tmp_path):
    folder = tmp_path / "transformer only"
    folder.mkdir()
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        shutil.copy(official_layout / name, folder)
    whole = OSPNextPipeline.from_pretrained(diffusers_layout)
    pipe = OSPNextPipeline.from_pretrained(folder, text_encoder=whole.text_encoder, vae=None)
    assert pipe.text_encoder is whole.text_encoder
    assert pipe.vae is None
    with pytest.raises(CheckpointError, match=r"lacks vae: Wan2\.1_VAE\.pth"):
        OSPNextPipeline.from_pretrained(folder, text_encoder=None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "WanImageToVideoPipeline"}, "'WanImageToVideoPipeline'; ospnext runs 'WanPipeline'"),
        ({"boundary_ratio": 0.875}, "Wan2.2"),
        ({"transformer_2": ["diffusers", "WanTransformer3DModel"]}, "Wan2.2"),
        ({"expand_timesteps": True}, "Wan2.2"),
    ],
)
@pytest.mark.parametrize("copy", ["diffusers_layout"], indirect=True)
def test_other_pipelines_are_refused(copy, change, message):
    index = copy / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), **change}))
    with pytest.raises(CheckpointError, match=message):
        OSPNextPipeline.from_pretrained(copy)


def test_no_checkpoint_at_all(tmp_path):
    (tmp_path / "holiday.jpg").touch()
    with pytest.raises(CheckpointError, match=r"not a text-to-video checkpoint.*Found: holiday\.jpg"):
        OSPNextPipeline.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="is not a directory"):
        OSPNextPipeline.from_pretrained(tmp_path / "absent")


@pytest.mark.parametrize("copy", ["diffusers_layout"], indirect=True)
def test_a_folder_with_other_files_is_never_replaced(copy):
    (copy / "notes.txt").write_text("mine")
    pipe = OSPNextPipeline.from_pretrained(copy)
    for write in (pipe.save_pretrained, lambda folder: write_random_checkpoint(folder, overwrite=True)):
        with pytest.raises(CheckpointError, match=r"it has notes\.txt\); nothing was overwritten"):
            write(copy)
    assert (copy / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("copy", ["diffusers_layout"], indirect=True)
def test_overwrite_must_be_asked_for(copy):
    before = (copy / "model_index.json").stat().st_ino
    with pytest.raises(CheckpointError, match="overwrite=True"):
        write_random_checkpoint(copy, seed=1)
    assert (copy / "model_index.json").stat().st_ino == before
    write_random_checkpoint(copy, seed=1, overwrite=True)
    assert (copy / "model_index.json").stat().st_ino != before
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]


@pytest.mark.parametrize("copy", ["diffusers_layout"], indirect=True)
def test_a_failed_save_changes_nothing(copy, monkeypatch):
    pipe = OSPNextPipeline.from_pretrained(copy)
    before = sorted((str(path), path.stat().st_mtime_ns) for path in copy.rglob("*"))

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(storage, "_model_index", interrupted)  # the last thing to be written
    with pytest.raises(KeyboardInterrupt):
        pipe.save_pretrained(copy)
    assert sorted((str(path), path.stat().st_mtime_ns) for path in copy.rglob("*")) == before
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]


def test_files_have_ordinary_permissions(tmp_path):
    with replace_folder(tmp_path / "new", overwrite=False) as folder:
        (folder / "private").touch(mode=0o600)
        (folder / "deep").mkdir()
        (folder / "deep" / "file").touch(mode=0o600)
    (tmp_path / "ordinary").touch()
    modes = {path.stat().st_mode for path in tmp_path.rglob("*") if path.is_file()}
    assert len(modes) == 1
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["deep", "private"]

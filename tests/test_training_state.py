"""Checkpoints of training that are unfinished, damaged or of something else are refused; one process, no ranks."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from ospnext.errors import CheckpointError
from ospnext.parallel import training_state
from ospnext.parallel.training_state import MANIFEST, load_training_state, save_training_state


def model(width: int = 8) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), nn.Linear(width, 1))


def adamw(of: nn.Module, **settings) -> torch.optim.AdamW:
    return torch.optim.AdamW(of.parameters(), lr=0.1, **settings)


def step(of: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    of(torch.arange(12.0).view(3, 4)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.fixture
def trained():
    found = model()
    optimizer = adamw(found, betas=(0.8, 0.9))
    step(found, optimizer)
    return found, optimizer


@pytest.fixture
def saved(tmp_path, trained):
    save_training_state(tmp_path / "state", *trained, progress={"step": 1, "seen": [3, 1]})
    return tmp_path / "state"


def resumed(path):
    other = model()
    optimizer = adamw(other)
    return other, optimizer, load_training_state(path, other, optimizer)


def test_training_goes_on_bit_for_bit(saved, trained):
    other, optimizer, progress = resumed(saved)
    assert progress == {"step": 1, "seen": [3, 1]}
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)
    for of, by in (trained, (other, optimizer)):
        step(of, by)
    for found, expected in zip(other.parameters(), trained[0].parameters(), strict=True):
        assert torch.equal(found, expected)


def test_an_optimizer_that_made_no_step_is_saved_as_such(tmp_path):
    """And saving it does not make one: its step counter would correct the first real step wrongly."""
    fresh = model()
    optimizer = adamw(fresh)
    save_training_state(tmp_path / "state", fresh, optimizer)
    assert not optimizer.state
    assert not resumed(tmp_path / "state")[1].state


def test_how_a_device_computes_a_step_is_no_state(saved):
    other = model()
    optimizer = adamw(other, foreach=True)
    load_training_state(saved, other, optimizer)
    assert optimizer.param_groups[0]["foreach"] is True


def test_nothing_is_unpickled(saved):
    assert {file.suffix for file in saved.iterdir()} == {".safetensors", ".json"}


def _without_manifest(path):
    (path / MANIFEST).unlink()


def _half_a_manifest(path):
    text = (path / MANIFEST).read_text()
    (path / MANIFEST).write_text(text[: len(text) // 2])


def _file(path):
    return next(path.glob("*.safetensors"))


def _truncated(path):
    _file(path).write_bytes(_file(path).read_bytes()[:-8])


def _missing(path):
    _file(path).unlink()


def _garbage(path):
    _file(path).write_bytes(bytes(255 for _ in _file(path).read_bytes()))


def _of_another_version(path):
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps(manifest | {"format": 99}))


BROKEN = {
    _without_manifest: "was not finished",
    _half_a_manifest: "is damaged",
    _truncated: r"1 of its 1 files are not as they were written: shard-00001.*\(\d+ of \d+ bytes\)",
    _missing: r"\(none of \d+ bytes\)",
    _garbage: r"shard-00001.* is damaged \(.*header",
    _of_another_version: "of format 99",
}


@pytest.mark.parametrize("damage", BROKEN, ids=lambda damage: damage.__name__)
def test_a_broken_checkpoint_is_refused(saved, damage):
    damage(saved)
    other = model()
    before = [parameter.detach().clone() for parameter in other.parameters()]
    with pytest.raises(CheckpointError, match=BROKEN[damage]):
        load_training_state(saved, other, adamw(other))
    assert all(map(torch.equal, other.parameters(), before))


def test_of_another_model_or_optimizer(saved):
    wider = model(9)
    with pytest.raises(CheckpointError, match=r"model.0.weight: saved as \[\[8, 4\], 'float32'\], here \[\[9, 4\]"):
        load_training_state(saved, wider, adamw(wider))
    other = model()
    with pytest.raises(CheckpointError, match=r"other settings: .*betas"):
        load_training_state(saved, other, torch.optim.SGD(other.parameters(), lr=0.1))
    with pytest.raises(CheckpointError, match="group 0 has other parameters"):
        load_training_state(saved, other, torch.optim.AdamW(list(other.parameters())[::-1]))
    with pytest.raises(CheckpointError, match="there is no such folder"):
        load_training_state(saved.with_name("other"), other, adamw(other))


def test_nothing_is_written_over(saved, trained):
    with pytest.raises(CheckpointError, match="something at that path already"):
        save_training_state(saved, *trained)


def test_a_save_that_fails_leaves_nothing(tmp_path, trained, monkeypatch):
    with pytest.raises(CheckpointError, match="nothing that JSON has"):
        save_training_state(tmp_path / "state", *trained, progress={"step": torch.tensor(1)})
    monkeypatch.setattr(training_state, "write_text", lambda *_: 1 / 0)
    with pytest.raises(CheckpointError, match="ZeroDivisionError"):
        save_training_state(tmp_path / "state", *trained)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_job_left_is_no_checkpoint_and_not_in_the_way(tmp_path, trained, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(training_state, "_finish", lambda *_: None)
        save_training_state(tmp_path / "state", *trained)
    assert [file.name for file in tmp_path.iterdir()] == [".unfinished-state"]
    with pytest.raises(CheckpointError, match="was not finished"):
        resumed(tmp_path / ".unfinished-state")
    save_training_state(tmp_path / "state", *trained)
    resumed(tmp_path / "state")
    assert [file.name for file in tmp_path.iterdir()] == ["state"]


def test_state_that_no_other_layout_could_read_is_refused(tmp_path):
    found = model()
    optimizer = torch.optim.Adafactor(found.parameters())
    step(found, optimizer)
    with pytest.raises(CheckpointError, match="in the shape of their parameter"):
        save_training_state(tmp_path / "state", found, optimizer)
    with pytest.raises(CheckpointError, match="4 of the 4 parameters"):
        save_training_state(tmp_path / "state", model(), optimizer)

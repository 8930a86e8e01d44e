"""A sharded model whose ranks share samples trains as one process does, whatever the layout, loads its shards with the
memory of a shard, and resumes in another layout. The ranks of all cases are started once: see parallel_training.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from parallel_training import CASES, CONFIG, LAYOUTS, Case

from ospnext.models.loading import keeps_fp32

SCRIPT = Path(__file__).with_name("parallel_training.py")
#: In fp64, of losses and of each parameter as a whole. What a layout changes is the order of sums: a relative error of
#: some 1e-16 in a gradient. Three steps of SGD add it to parameters with a factor below 1, those of AdamW with one of
#: lr / eps = 100 at most; HiFloat8 rounds both sides alike, or differs by 1e-2.
CLOSE = 1e-13
RIGHT = [pytest.param(case, id=case.name) for case in CASES if not case.mutant]
WRONG = [pytest.param(case, id=case.name) for case in CASES if case.mutant]
#: Beside the pages that were read, the kernel maps some around them; an allocator keeps some of what is given back.
SLACK = 32 * 2**20


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("training")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("case", RIGHT)
def test_training_steps_are_those_of_one_process(results, case: Case):
    found = results[case.name]
    assert max(found["losses"]) < CLOSE
    assert not {name: off for name, off in found["parameters"].items() if off > CLOSE}
    assert found["units"] == CONFIG.num_layers + 4  # the root, both embeddings, the head


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_seen(results, case: Case):
    assert max(results[case.name]["losses"]) > 1e-4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_checkpointing_replays_ulysses_but_no_switch(results, layout: tuple[int, int, int]):
    """Each block sends to other heads and back: twice a forward."""
    kept, again = results[Case(*layout).name], results[Case(*layout, "adamw", checkpointing=True).name]
    dp, _, ulysses = layout
    forwards = 3 * max(1, 2 // dp)
    replayed = 2 * CONFIG.num_layers * forwards if ulysses > 1 else 0
    assert again["exchanges"] - kept["exchanges"] == replayed


def test_mixed_precision_keeps_what_half_precision_models_keep(results):
    """Bit for bit, timestep included, but for gradients of the text: 4 blocks with keys and values each add to them in
    bf16, in another order.
    """
    found = results["mixed precision"]
    assert found["velocity"]
    text = {name: off for name, off in found["gradients"].items() if off}
    assert all(name.startswith("text_embedding.") for name in text)
    assert max(text.values(), default=0.0) < 8 * 2.0**-9
    dtypes = found["dtypes"]
    assert dtypes.pop("x") == "torch.bfloat16"
    assert dtypes.pop("time") == "torch.float32"
    for name, dtype in dtypes.items():
        assert dtype == ("torch.float32" if keeps_fp32(f"blocks.0.{name}") else "torch.bfloat16"), name
    assert found["stored"] == ["torch.float32"]


def test_text_may_be_encoded_in_a_call_of_its_own(results):
    found = results["encoded text"]
    assert max(found["gradients"].values()) < CLOSE
    assert found["velocity"]
    assert found["sharded after"]


@pytest.mark.parametrize("layout", ["uninterrupted", "4-1-1", "1-4-1", "alone"])
def test_a_checkpoint_resumes_in_any_layout(results, layout: str):
    """Losses are those of one process that was never interrupted; see CLOSE."""
    found = results["resumed"]
    assert found[layout] == pytest.approx(found["expected"], rel=CLOSE, abs=0)


def test_shards_are_what_the_whole_checkpoint_has(results):
    assert results["loaded"] == {"official": [], "diffusers": [], "codes": []}


def test_loading_takes_the_memory_of_a_shard(results):
    """The rows of a rank in fp32, the pages of the file that hold them in bf16, and at most one tensor as a whole."""
    found = results["memory"]
    if found["grown"] is None:
        pytest.skip("this system has no /proc/self/clear_refs, so that a process cannot tell its peak memory")
    limit = found["held"] * (4 + 2) + found["largest"] * 4 + SLACK
    assert found["grown"] < limit
    assert found["whole"] > 2 * limit  # so that the measurement would have told


def test_what_cannot_be_sharded_or_saved_is_refused(results):
    found = results["refused"]
    assert "sharded already" in found["twice"]
    assert "compile=off" in found["compiled"]
    assert "replicas must divide the 4 ranks" in found["replicas"]
    assert "make the optimizer after" in found["optimizer made before"]
    assert "quantize the model first" in found["quantized after"]


def test_all_ranks_hear_of_one_that_cannot_write(results):
    for told in results["one rank fails"]:
        assert "No space left on device" in told["told"]
        assert "(rank 2)" in told["told"]
    assert results["one rank fails"][0]["left"] == []

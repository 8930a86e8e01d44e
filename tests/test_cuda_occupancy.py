"""The Triton kernels compile for a GPU that is not there, and leave room for each other on its multiprocessors."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

pytest.importorskip(
    "triton", reason="triton is not installed; `pip install triton` has these kernels compiled, without a GPU"
)
SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "cuda_occupancy.py"
#: Of 64; what the fewest of them have today, so that a change which leaves less room is noticed. On an H200 norms with
#: room for 28 to 32 warps reach 85 to 92 % of the rate of a copy, and came to 55 to 70 % with room for 12; gradients,
#: which read rows ahead, reach 80 to 87 % with two programs of 8 warps.
WARPS_OF_A_FORWARD, WARPS_OF_A_BACKWARD = 24, 16


@pytest.fixture(scope="module")
def found():
    return list(runpy.run_path(str(SCRIPT))["rows"](""))


def test_no_kernel_of_the_model_spills(found):
    assert {(name, which): row.spilled for name, which, row in found if row.spilled} == {}


def test_multiprocessors_hold_several_programs(found):
    few = {
        (name, which): row.programs * row.warps
        for name, which, row in found
        if row.programs * row.warps < (WARPS_OF_A_BACKWARD if which == "backward" else WARPS_OF_A_FORWARD)
    }
    assert few == {}
    assert [(name, which) for name, which, row in found if row.programs < 2] == []
    assert len(found) > 20


@pytest.mark.parametrize("capability", [89, 100])
def test_what_quantizes_compiles_for_other_gpus_that_have_fp8(capability, monkeypatch):
    script = runpy.run_path(str(SCRIPT))
    monkeypatch.setitem(script["rows"].__globals__, "CAPABILITY", capability)
    assert len(list(script["rows"]("quantize"))) > 5


def test_codes_of_hifloat8_need_no_fp8(monkeypatch):
    script = runpy.run_path(str(SCRIPT))
    monkeypatch.setitem(script["rows"].__globals__, "CAPABILITY", 80)
    x = script["meta"](1, 256, 5120)
    for carried in (False, True):
        (launch,) = script["launches"](lambda carried=carried: script["quantize_by_row"](x, 15.0, "amax", carried))
        if carried:  # and this says that the predicates are right to refuse it
            with pytest.raises(Exception, match="sm_80"):
                script["compiled"](*launch)
        else:
            assert script["compiled"](*launch).spilled == 0

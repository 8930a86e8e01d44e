"""The fused family of the cuda backend without a GPU: which kernel is chosen, what takes the rest, and the kernels
themselves in Triton's interpreter."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_cuda_backend import decide

from ospnext.backends.cuda import MANIFEST
from ospnext.backends.cuda.predicates import LONGEST_ROW
from ospnext.backends.reference import fused as definitions
from ospnext.ops.contracts import CONTRACTS
from ospnext.ops.registry import load

NAMES = [i.contract for i in MANIFEST.implementations if i.contract.startswith("fused.") and i.id == "cuda.triton"]
ELEMENTWISE = ("fused.gate_residual", "fused.gelu_tanh")


def requests(contract: str):
    return [dataclasses.replace(case.request, device_type="cuda") for case in CONTRACTS[contract].cases()]


@pytest.mark.parametrize("contract", NAMES)
def test_every_case_has_a_triton_kernel_and_without_triton_a_definition(contract):
    for request in requests(contract):
        assert decide(contract, request).chosen_id == "cuda.triton"
        assert decide(contract, request, missing=("triton",)).chosen_id == "cuda.torch"


@pytest.mark.parametrize("contract", NAMES)
def test_what_the_kernels_refuse_is_taken_by_the_definition(contract):
    plain = requests(contract)[0]
    in_fp64 = dataclasses.replace(plain, dtype=torch.float64)
    long, longest = (dataclasses.replace(plain, shape=(*plain.shape[:-1], n)) for n in (LONGEST_ROW + 1, LONGEST_ROW))
    assert decide(contract, in_fp64).chosen_id == "cuda.torch"
    assert decide(contract, longest).chosen_id == "cuda.triton"
    assert decide(contract, long).chosen_id == ("cuda.triton" if contract in ELEMENTWISE else "cuda.torch")


@pytest.mark.parametrize("contract", [name for name in CONTRACTS if name.startswith("fused.")])
def test_the_definition_of_every_fused_operator_is_offered(contract):
    (plain,) = (i for i in MANIFEST.offers(contract) if i.id == "cuda.torch")
    assert load(plain.target) is CONTRACTS[contract].composite
    assert plain == MANIFEST.offers(contract)[-1]


def test_no_definition_is_made_up():
    with pytest.raises(AttributeError, match="no fused operator is called 'softmax'"):
        _ = definitions.softmax


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed; `pip install triton` has these kernels run in its interpreter, without a GPU",
)
@pytest.mark.parametrize("contract", NAMES)
def test_kernels_in_the_interpreter(contract):
    """In a process of its own: Triton decides at import whether it interprets."""
    program = Path(__file__).with_name("interpreted_fused.py")
    result = subprocess.run(
        [sys.executable, str(program), contract.removeprefix("fused.")],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert int(result.stdout.split()[-2]) >= len(requests(contract))

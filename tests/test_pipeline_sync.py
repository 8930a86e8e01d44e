"""No denoising step makes the host wait for the device, seen on the meta device: whatever reads a value back raises."""

from __future__ import annotations

import runpy
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from small_models import SMALL, random_model, sparse
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ospnext.diffusion import solvers
from ospnext.models import OSPNextTransformer, preset
from ospnext.models.quantization import QuantPolicy, quantize_model
from ospnext.ops import HiF8Recipe
from ospnext.pipelines import OSPNextPipeline, branches

ATEN = torch.ops.aten
#: Operators whose result the host needs: a value, a size that depends on values, or a check.
READS = {ATEN._local_scalar_dense, ATEN.nonzero, ATEN.masked_select, ATEN.equal, ATEN.is_nonzero}
READS |= {ATEN._linalg_check_errors, ATEN._unique2}
COPIES = {ATEN._to_copy, ATEN.copy_}
DEVICE = torch.device("meta")


class Waits(Exception):
    pass


class NoReads(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
        on_device = any(t.device == DEVICE for t in tensors)
        if func.overloadpacket in READS and on_device:
            raise Waits(func)
        out = func(*args, **kwargs)
        if func.overloadpacket in COPIES:
            # A copy from or to pageable memory waits, and one of a single number too.
            devices = {t.device for t in (*tensors, out)}
            if len(devices) > 1:
                raise Waits(f"{func}: {devices}")
        return out


class NoUploads(TorchFunctionMode):
    """Tensors made of Python's numbers, which PyTorch copies below the other mode."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = func in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor, torch.Tensor.tolist)
        if made and any(isinstance(t, torch.Tensor) and t.device == DEVICE for t in (*args, out)):
            raise Waits(func)
        return out


def denoise(*, solver: str, batched: str, policy: QuantPolicy | None = None, grid=(2, 5, 7), spoil=None) -> int:
    """Steps that ran under watch: all but the first, in which solvers move what they need to the device."""
    config = sparse(SMALL.replace(num_layers=2, in_dim=4, out_dim=4), num_full_blocks=0)
    with torch.device(DEVICE):
        transformer = OSPNextTransformer(config)
        if policy is not None:
            quantize_model(transformer, policy, store=policy.compat == "none")
        latents = torch.empty(1, 4, grid[0], 2 * grid[1], 2 * grid[2])
        text = {
            name: torch.empty(1, config.text_len, config.text_dim)
            for name in ("prompt_embeds", "negative_prompt_embeds")
        }
    pipe = OSPNextPipeline(transformer, None, None, solver=solver, batched_guidance=batched)
    pipe.set_progress_bar_config(disable=True)
    steps, watched = 4, []
    with ExitStack() as watch:

        def callback(pipe, i, timestep, tensors):
            if i == 0:
                watch.enter_context(NoReads())
                watch.enter_context(NoUploads())
            else:
                watched.append(i)
            if i == steps - 1:
                watch.close()
            return {"latents": spoil(tensors["latents"])} if spoil and i == 1 else {}

        with torch.no_grad():
            out = pipe._denoise(latents, text, steps, 5.0, callback, ("latents",))
    assert out.device == DEVICE
    return len(watched)


POLICIES = {
    "plain": None,
    "tensor": QuantPolicy("hif8", "hif8"),
    "row": QuantPolicy("hif8", "none", recipe=HiF8Recipe(granularity="row")),
}


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("batched", ["on", "off"])
@pytest.mark.parametrize("solver", ["euler", "unipc"])
@pytest.mark.parametrize("grid", [(2, 4, 8), (2, 5, 7)], ids=["even", "uneven"])
def test_no_step_waits(solver, batched, policy, grid):
    assert denoise(solver=solver, batched=batched, policy=policy, grid=grid) == 3


@pytest.mark.parametrize(
    "spoil",
    [
        lambda x: x * x.sum().item(),
        lambda x: x * x[0, 0, 0, 0].tolist()[0],
        lambda x: x + torch.tensor(1.0, device=x.device),
        lambda x: x + torch.ones(()).to(x.device),
        lambda x: x[x > 0],
        lambda x: x / torch.linalg.solve(torch.eye(2, device=x.device), torch.ones(2, device=x.device))[0],
    ],
    ids=["item", "tolist", "number", "upload", "size", "check"],
)
def test_what_waits_is_found(spoil):
    with pytest.raises((Waits, NotImplementedError, RuntimeError)):
        denoise(solver="euler", batched="off", spoil=spoil)


def test_a_timestep_uploaded_in_the_step_is_found(monkeypatch):
    velocity = branches.Branches.velocity
    monkeypatch.setattr(
        branches.Branches, "velocity", lambda self, x, t: velocity(self, x, torch.full((), 500.0).to(x.device))
    )
    with pytest.raises(Waits, match="_to_copy"):
        denoise(solver="euler", batched="off")


def test_the_check_of_unipc_is_found(monkeypatch):
    """diffusers' own solve, and sigmas left on the host."""
    monkeypatch.setattr(solvers, "_UncheckedSolve", ExitStack)
    with pytest.raises(Waits, match="_linalg_check_errors"):
        denoise(solver="unipc", batched="off")


class Surface:
    """Stands in for the module of a device that can forbid to wait."""

    def __init__(self):
        self.mode, self.modes = "default", []

    def set_sync_debug_mode(self, mode):
        self.mode = mode
        self.modes.append(mode)


@pytest.mark.parametrize("spoilt", [False, True])
def test_the_benchmark_watches_all_steps_but_the_first(monkeypatch, spoilt):
    script = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "step_sync.py"), run_name="step_sync")
    surface = Surface()
    velocity = branches.Branches.velocity

    def waiting(self, latents, timestep):
        if spoilt and surface.mode == "error":
            raise RuntimeError("called a synchronizing operation")
        return velocity(self, latents, timestep)

    monkeypatch.setattr(branches.Branches, "velocity", waiting)
    monkeypatch.setitem(script["outcome"].__globals__, "CONFIG", preset("tiny"))
    transformer = random_model(preset("tiny"), dtype=torch.float32)
    with torch.no_grad():
        result = script["outcome"](transformer, (64, 80, 5), "unipc", "off", surface)
    assert result == ("FAIL: RuntimeError: called a synchronizing operation" if spoilt else "pass")
    assert surface.modes == (["error", "default"] if spoilt else ["error", "error", "default"])

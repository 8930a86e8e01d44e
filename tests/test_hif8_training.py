"""HiF8 in training: what is kept for the backward pass, and that nothing waits, recomputes or compiles otherwise."""

from __future__ import annotations

import pytest
import torch
from hif8_models import ALL, BOUNDS, Calls, random, small
from small_models import SMALL, random_inputs
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from ospnext.models import OSPNextTransformer
from ospnext.models.hif8_linear import HiF8Linear
from ospnext.models.quantization import QuantPolicy, quantize_model
from ospnext.ops import HiF8Recipe


def kept(run, *parameters: Tensor) -> list[Tensor]:
    """One tensor for each storage that `run` keeps for its backward pass; parameters would be there anyway."""
    found: dict[int, Tensor] = {}

    def keep(t: Tensor) -> Tensor:
        found.setdefault(t.untyped_storage()._cdata, t)
        return t

    with saved_tensors_hooks(keep, lambda t: t):
        out = run()
    assert out.requires_grad
    known = {p.untyped_storage()._cdata for p in parameters}
    return [t for storage, t in found.items() if storage not in known]


def bytes_of(tensors: list[Tensor]) -> int:
    return sum(t.untyped_storage().nbytes() for t in tensors)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_a_linear_keeps_codes_and_scales(dtype):
    """One byte per element of x and of the weight; neither of them in another form, not even as parameters."""
    linear = HiF8Linear.of(nn.Linear(48, 20, dtype=dtype), HiF8Recipe())
    x = random(2, 50, 48, dtype=dtype).requires_grad_()
    found = kept(lambda: linear(x))
    codes, scales = ([t for t in found if (t.dtype == torch.uint8) is wanted] for wanted in (True, False))
    assert sorted(t.numel() for t in codes) == [20 * 48, 100 * 48]
    assert [(t.dtype, t.numel()) for t in scales] == [(torch.float32, 1)] * 2
    assert bytes_of(found) == 100 * 48 + 20 * 48 + 2 * 4


def test_a_linear_lets_go_of_its_input():
    linear = HiF8Linear.of(nn.Linear(48, 20), HiF8Recipe())
    x = random(5, 48, dtype=torch.float32).requires_grad_() * 2
    memory = StorageWeakRef(x.untyped_storage())
    y = linear(x)
    del x
    assert memory.expired()
    y.sum().backward()
    assert linear.weight.grad.any()


def test_a_block_keeps_less_than_in_bf16():
    """Half for the inputs of q, k, v (one), cross q and the two of ffn. Attention keeps its output itself, so that the
    codes which both o keep of it come on top; so do those of weights.
    """
    tokens, C, F_ = 2 * 96, SMALL.dim, SMALL.ffn_dim
    measured = {}
    for policy in (QuantPolicy(), QuantPolicy("hif8"), ALL):
        model = quantize_model(small(torch.bfloat16), policy)
        plan, block = model.layout((3, 4, 8), 2).blocks[0], model.blocks[0]
        x, time = (random(2, n, C, dtype=torch.bfloat16).requires_grad_() for n in (96, 6))
        with torch.no_grad():
            text = block.cross_attn.project_text(random(2, 7, C, dtype=torch.bfloat16))
        found = kept(lambda block=block, x=x, time=time, text=text, plan=plan: block(x, time, text, plan),
                     *model.parameters())  # fmt: skip
        measured[policy] = bytes_of(found)
    bf16, linears, attention = measured.values()
    scales = 4 * (6 + 8)
    assert bf16 - linears == tokens * (3 * C + F_) - 2 * tokens * C - (6 * C * C + 2 * C * F_) - scales
    assert attention == linears


def test_nothing_waits_for_the_device():
    """Tensors without values cannot be read: `.item()` or a branch on data around the kernels would raise."""
    for k in (1, 2):
        with torch.device("meta"):
            model = OSPNextTransformer(small(k=k).config)
        quantize_model(model, ALL)
        latents, timestep, text = (t.to("meta") for t in random_inputs(model.config, (2, 4, 8), dtype=torch.float32))
        model(latents, timestep, text).sum().backward()
        assert all(p.grad.is_meta and p.grad.shape == p.shape for p in model.parameters())


def test_checkpointed_blocks_recompute_the_same_codes():
    model = quantize_model(small(torch.bfloat16), ALL)
    plan, block = model.layout((3, 4, 8), 1).blocks[0], model.blocks[0]
    text = block.cross_attn.project_text(random(1, 7, SMALL.dim, dtype=torch.bfloat16))
    leaves = [random(1, n, SMALL.dim, dtype=torch.bfloat16).requires_grad_() for n in (96, 6)]
    leaves += block.parameters()
    found = []
    for wrapped in (False, True):
        # Recomputation would stop as soon as it has what the backward pass needs.
        with Calls() as first, set_checkpoint_early_stop(False):
            arguments = (leaves[0], leaves[1], text, plan)
            out = checkpoint(block, *arguments, use_reentrant=False) if wrapped else block(*arguments)
        with Calls() as second:
            # The graph of the text is kept for the second run; its parameters get gradients from there.
            found.append(torch.autograd.grad(out.float().sin().sum(), leaves, retain_graph=True))
        again = [codes for codes, scale_max in second.codes if scale_max == 15.0]
        assert len(first.codes) == 6 + 8
        assert len(again) == (14 if wrapped else 0)
        assert all(torch.equal(a, b) for (a, _), b in zip(first.codes, again, strict=False))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("policy", [QuantPolicy("hif8"), ALL], ids=["linears", "attention"])
def test_compiled_model_equals_eager(policy):
    """The same kernels in the same order, in one graph."""
    torch._dynamo.reset()
    model = quantize_model(small(k=2), policy)
    inputs = random_inputs(model.config, (2, 5, 6), batch=2, dtype=torch.float32)
    model.layout((2, 5, 6), 2)
    run = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = []
    for call in (run, model):
        out = call(*inputs)
        found.append([out.detach(), *torch.autograd.grad(out.square().sum(), list(model.parameters()))])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))

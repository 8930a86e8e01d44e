"""The packed, pad-free transformer against the padded, masked one and the dense formulas, in fp64, gradients included.

The two sides share nothing but the parameter names: other orders, other attention, other norms, pads instead of ragged
subsequences. They differ by summation order alone, so the bound is some thousand fp64 roundings (2^-53 = 1.1e-16);
measured are 2e-14 for outputs and 1e-13 for gradients.
"""

from __future__ import annotations

import pytest
import torch
from small_models import SMALL, random_inputs, random_model, relative_error, sparse

from ospnext import ops
from ospnext.conformance import oracle_dense, oracle_sparse
from ospnext.conformance.oracle_sparse import reference
from ospnext.models import OSPNextTransformer

BOUND = 1e-12

# Every remainder of H and of W mod k^2, sizes below k and k^2, one axis of length 1, and grids without any pad.
GRIDS_2 = [
    (2, 1, 1),
    (1, 1, 7),
    (3, 2, 3),
    (1, 3, 2),
    (2, 4, 8),
    (1, 5, 6),
    (2, 6, 5),
    (1, 7, 20),
    (1, 14, 9),
    (2, 10, 13),
    (1, 19, 16),
    (1, 20, 11),
]
GRIDS_3 = [
    (1, 1, 1),
    (2, 2, 5),
    (1, 3, 4),
    (1, 4, 10),
    (2, 9, 18),
    (1, 5, 20),
    (1, 6, 7),
    (2, 7, 3),
    (1, 8, 12),
    (1, 10, 2),
    (1, 12, 11),
    (1, 13, 15),
    (1, 20, 17),
]
CASES = [(2, grid) for grid in GRIDS_2] + [(3, grid) for grid in GRIDS_3]


def gradients(model, run, latents, timestep, text) -> dict[str, torch.Tensor]:
    """The output and the gradients of a random projection of it, by name: of every parameter, the latents, the text."""
    latents, text = (x.clone().requires_grad_() for x in (latents, text))
    out = run(latents, timestep, text)
    probe = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
    leaves = {"latents": latents, "text": text, **dict(model.named_parameters())}
    grads = torch.autograd.grad((out * probe).sum(), list(leaves.values()))
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def assert_same(model: OSPNextTransformer, inputs: tuple[torch.Tensor, ...]) -> None:
    found = gradients(model, model, *inputs)
    expected = gradients(model, lambda *args: reference(model, *args), *inputs)
    assert relative_error(found.pop("out"), expected.pop("out")) <= BOUND
    # Some gradients are zero but for rounding (of a query with a single key): those are held to a thousandth of the
    # largest.
    floor = max(value.abs().max().item() for value in expected.values()) / 1000
    errors = {name: relative_error(found[name], value, floor) for name, value in expected.items()}
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= BOUND, worst


@pytest.mark.parametrize(("k", "grid"), CASES)
def test_sparse_model_equals_the_padded_definition(k, grid):
    """Batch 1 to 3, alternately with full blocks at the ends and without any."""
    number = CASES.index((k, grid))
    config = sparse(k=k, num_full_blocks=(4, 0)[number % 2])
    assert_same(random_model(config, seed=number), random_inputs(config, grid, batch=1 + number % 3, seed=number))


@pytest.mark.parametrize("attention", ["reference.math", "reference.sdpa"])
@pytest.mark.parametrize("num_full_blocks", [0, 4])
@pytest.mark.parametrize("k", [2, 3])
def test_both_layouts_with_either_attention(k, num_full_blocks, attention):
    """More channels and heads than elsewhere, head_dim 16: rotary pairs (4, 2, 2)."""
    config = sparse(SMALL.replace(dim=48, num_heads=3), k=k, num_full_blocks=num_full_blocks)
    with ops.use_backend("reference", ops={"attention": attention}):
        assert_same(random_model(config), random_inputs(config, (2, 11, 7), batch=2))


@pytest.mark.parametrize("grid", [(1, 1, 1), (3, 1, 5), (2, 7, 4)])
def test_dense_model_equals_the_plain_formulas(grid):
    assert_same(random_model(SMALL), random_inputs(SMALL, grid, batch=2))


@pytest.mark.parametrize("config", [SMALL, sparse(k=2, num_full_blocks=0), sparse(k=3)])
def test_samples_of_a_batch_do_not_meet(config):
    model = random_model(config)
    latents, timestep, text = random_inputs(config, (2, 6, 7), batch=3)
    with torch.no_grad():
        together = model(latents, timestep, text)
        for i in range(3):
            alone = model(latents[i : i + 1], timestep[i : i + 1], text[i : i + 1])
            assert relative_error(together[i : i + 1], alone) <= BOUND


# ---- the oracle itself
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [2, 3])
def test_the_padded_rearrangements_are_inverse_and_switch_is_the_way_between_them(k):
    x = torch.arange(2 * 2 * k**2 * 2 * k**2).view(2, 2, k**2, 2 * k**2)
    token, group = (oracle_sparse.split(kind, x, k) for kind in ("token", "group"))
    assert not torch.equal(token, group)
    assert torch.equal(oracle_sparse.merge("token", token, k), x)
    assert torch.equal(oracle_sparse.merge("group", group, k), x)
    assert torch.equal(oracle_sparse.switch(token, k), group)
    assert torch.equal(oracle_sparse.switch(group, k), token)


def test_the_mask_of_the_oracle_matters():
    """Attending to pads gives something else: the comparisons above are of a computation that has pads to leave out."""
    config = sparse(k=2, num_full_blocks=0)
    model, inputs = random_model(config), random_inputs(config, (1, 5, 6))
    expected = reference(model, *inputs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(oracle_dense, "attend", lambda q, k, v, mask=None, attend=oracle_dense.attend: attend(q, k, v))
        unmasked = reference(model, *inputs)
    assert relative_error(unmasked, expected) > 1e-3

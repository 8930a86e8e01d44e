"""The public functions of the quantize family: what they refuse, and what several ranks make of them together."""

from __future__ import annotations

import datetime
import multiprocessing
import re
import traceback

import pytest
import torch
import torch.distributed as dist

from ospnext import ops
from ospnext.ops import HiF8Recipe, Quantized


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# ---- what is refused


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.hif8_encode(torch.ones(3, dtype=torch.int32)), "values are fp64, fp32, bf16 or fp16 and codes"),
        (lambda: ops.hif8_decode(torch.ones(3)), "codes uint8; got torch.float32"),
        (lambda: ops.hif8_decode(torch.ones(3, dtype=torch.uint8), torch.float8_e4m3fn), "got torch.uint8 and torch"),
        (lambda: ops.hif8_quantize(torch.ones(3, dtype=torch.bool)), "x must be fp64, fp32, bf16 or fp16; got torch"),
        (lambda: ops.hif8_quantize(randn(3), scale_mode="max"), "scale_mode is one of amax, pow2"),
        (lambda: ops.hif8_quantize(randn(3), granularity="block"), "granularity one of tensor, row, channel"),
        (
            lambda: ops.hif8_quantize(randn(3), granularity="channel"),
            "'channel' needs more dimensions than x has, (3,)",
        ),
        (lambda: ops.hif8_quantize(randn(3), scale_max=65504.0), "between 2^-22 and 32768, the values of HiFloat8"),
        (lambda: ops.hif8_quantize(randn(3), scale_max=0.0), "between 2^-22 and 32768"),
        (lambda: ops.hif8_quantize(randn(3), scale_max=float("nan")), "between 2^-22 and 32768"),
        (lambda: ops.hif8_quantize(randn(3, 5), amax=torch.ones(3)), "amax must be fp32 (1, 1) on cpu for x (3, 5)"),
        (lambda: ops.hif8_quantize(randn(3), amax=torch.ones(1).double()), "got torch.float64 (1,)"),
        (lambda: ops.hif8_fake_quantize(randn(3), grad_scale_max=-1.0), "(gradient): scale_max must lie between"),
        (lambda: HiF8Recipe(scale_max=1e6), "scale_max must lie between 2^-22 and 32768"),
        (lambda: HiF8Recipe(bias_grad="none"), "bias_grad must be one of quant, raw; got 'none'"),
        (lambda: HiF8Recipe(granularity="channel"), "granularity must be one of tensor, row"),
        (lambda: ops.quantized_linear(randn(2, 3), randn(5, 4)), "x must be [..., K] and weight [N, K]; got x (2, 3)"),
        (lambda: ops.quantized_linear(randn(2, 3), randn(3)), "weight [N, K]; got x (2, 3) and weight (3,)"),
        (lambda: ops.quantized_linear(randn(2, 3), randn(5, 3), randn(3)), "bias must be (5,); got (3,)"),
        (
            lambda: ops.quantized_linear(
                randn(2, 3), Quantized(torch.zeros(5, 3, dtype=torch.uint8), torch.ones(1, 3))
            ),
            "the scale of weight must be fp32 (1, 1) or (5, 1) for codes (5, 3)",
        ),
        (
            lambda: ops.quantized_linear(randn(2, 3), Quantized(randn(5, 3), torch.ones(1, 1))),
            "both be uint8, or both carried in float8_e4m3fn; got torch.uint8 and torch.float32",
        ),
        (
            lambda: ops.quantized_linear(randn(2, 3), randn(5, 3), x_quantized=ops.hif8_quantize(randn(4, 3))),
            "x is (2, 3), x_quantized holds (4, 3)",
        ),
    ],
)
def test_a_wrong_argument_is_named_with_what_was_found(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_a_scale_inside_the_sum_of_a_gradient_is_refused():
    x, weight, rows = randn(4, 3), randn(5, 3, seed=1), HiF8Recipe(granularity="row")
    for leaf, what in ((x, "gradient of x"), (weight, "gradient of the weight")):
        leaf.requires_grad_()
        with pytest.raises(ValueError, match=f"scales per row have no {what}"):
            ops.quantized_linear(x, weight, recipe=rows).sum().backward()
        leaf.requires_grad_(False)
    # A weight that is stored with one scale leaves the gradient of x possible, whatever the scales of x are.
    x.requires_grad_()
    stored = ops.hif8_quantize(weight)
    (dx,) = torch.autograd.grad(ops.quantized_linear(x, stored, recipe=rows).sum(), x)
    assert dx.shape == x.shape


def test_carried_codes_give_what_the_others_give_but_for_the_smallest_values():
    x, weight, bias = randn(64, 96), randn(48, 96, seed=1), randn(48, seed=2)
    for granularity in ("tensor", "row"):
        recipe = HiF8Recipe(granularity=granularity)
        plain, carried = (ops.hif8_quantize(weight, granularity=granularity, carried=c) for c in (False, True))
        expected = ops.quantized_linear(x, plain, bias, recipe=recipe)
        found = ops.quantized_linear(x, carried, bias, recipe=recipe)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        # Nothing but the codes is left of x.
        codes = ops.hif8_quantize(x, granularity=granularity, carried=True)
        assert ops.quantized_linear(codes, carried, bias, recipe=recipe, dtype=x.dtype).equal(found)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, w: ops.quantized_linear(ops.hif8_quantize(x), w), "x as codes needs dtype"),
        (
            lambda x, w: ops.quantized_linear(x, w, x_quantized=ops.hif8_quantize(x)),
            "must both be uint8, or both carried",
        ),
        (
            lambda x, w: ops.quantized_linear(x.requires_grad_(), w).sum().backward(),
            "are for inference and give no grad",
        ),
        (lambda x, w: ops.hif8_quantize(x, scale_max=512.0, carried=True), "at most 448; got scale_max=512"),
    ],
)
def test_what_carried_codes_cannot_do_is_said(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(randn(4, 32), ops.hif8_quantize(randn(16, 32), carried=True))


def test_amax_and_a_group_that_finds_one_exclude_each_other(alone):
    with pytest.raises(ValueError, match="amax or amax_group, not both"):
        ops.hif8_quantize(randn(3), amax=torch.ones(1), amax_group=dist.group.WORLD)


def test_a_group_of_one_rank_is_no_group(alone):
    x = randn(5, 3)
    for found, expected in zip(ops.hif8_quantize(x, amax_group=dist.group.WORLD), ops.hif8_quantize(x), strict=True):
        assert found.equal(expected)


@pytest.fixture
def alone(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# ---- several ranks, each with some of the tokens

RANKS, TOKENS, INNER, FEATURES = 3, 12, 7, 5


def tokens_of_all():
    """x and dy [T, ...]; each rank has values of another size, so that its own amax would be another one."""
    sizes = 3.0 ** torch.arange(TOKENS).div(TOKENS // RANKS, rounding_mode="floor")[:, None]
    return randn(TOKENS, INNER) * sizes, randn(TOKENS, FEATURES, seed=1) * sizes.flip(0)


def linear(x, grad, group):
    """Result and gradients of a linear layer and of a round trip on some tokens."""
    x, weight, bias = x.clone().requires_grad_(), randn(FEATURES, INNER, seed=2), randn(FEATURES, seed=3)
    leaves = (x, weight.requires_grad_(), bias.requires_grad_())
    y = ops.quantized_linear(*leaves, amax_group=group)
    trip = ops.hif8_fake_quantize(y, grad_scale_max=224.0, amax_group=group)
    return trip.detach(), *torch.autograd.grad(trip, leaves, grad)


def rank_main(rank, store, pipe):
    try:
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS, timeout=datetime.timedelta(seconds=60)
        )
        share = TOKENS // RANKS
        mine = [t[rank * share : (rank + 1) * share] for t in tokens_of_all()]
        pipe.send([[t.numpy() for t in linear(*mine, group)] for group in (dist.group.WORLD, None)])
        dist.destroy_process_group()
    except Exception:
        pipe.send(traceback.format_exc())


def test_ranks_with_a_group_compute_what_one_rank_does(tmp_path):
    """Without one they do not, so that the test can fail."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for rank in range(RANKS):
        mine, theirs = context.Pipe(duplex=False)
        processes.append(context.Process(target=rank_main, args=(rank, str(tmp_path / "store"), theirs)))
        processes[-1].start()
        pipes.append(mine)
    answers = [pipe.recv() if pipe.poll(120) else "no answer" for pipe in pipes]
    for process in processes:
        process.join(30)
        process.kill()
    assert not any(isinstance(answer, str) for answer in answers), answers
    expected = linear(*tokens_of_all(), None)
    together, apart = ([[torch.from_numpy(t) for t in answer[i]] for answer in answers] for i in (0, 1))
    for found, ok in ((together, True), (apart, False)):
        y, dx, dweight, dbias = zip(*found, strict=True)
        of_all = (torch.cat(y), torch.cat(dx), sum(dweight), sum(dbias))
        for name, value, wanted in zip(("y", "dx", "dweight", "dbias"), of_all, expected, strict=True):
            assert torch.allclose(value, wanted, rtol=1e-5, atol=1e-6 * wanted.abs().max().item()) == ok, name


# ---- traced


def test_a_compiled_call_is_the_call():
    def step(x, weight, bias):
        y = ops.quantized_linear(x, weight, bias)
        return ops.quantized_attention(*(y.view(2, 8, 3, 4) for _ in range(3)))

    def run(function):
        leaves = [randn(2, 8, 7).requires_grad_(), randn(12, 7, seed=1).requires_grad_(), randn(12).requires_grad_()]
        out = function(*leaves)
        return out, *torch.autograd.grad(out.square().sum(), leaves)

    torch._dynamo.reset()
    for found, expected in zip(run(torch.compile(step, fullgraph=True, backend="aot_eager")), run(step), strict=True):
        assert found.equal(expected)


def test_gradients_that_nobody_asks_for_cost_nothing(monkeypatch):
    """A frozen weight has no gradient, and neither has an input; then not even dy is quantized."""
    quantized = []
    real = ops.quantized_linear.__globals__["quantize_op"]

    def counted(*args):
        quantized.append(args[0].shape)
        return real(*args)

    monkeypatch.setitem(ops.quantized_linear.__globals__, "quantize_op", counted)
    x, weight, bias = randn(4, 3), randn(5, 3), randn(5).requires_grad_()
    ops.quantized_linear(x, weight, bias, recipe=HiF8Recipe(bias_grad="raw")).sum().backward()
    assert quantized == [] and bias.grad.eq(4).all()
    ops.quantized_linear(x, weight, bias).sum().backward()
    assert quantized == [(4, 5)]

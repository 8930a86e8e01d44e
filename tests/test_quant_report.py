"""What `QuantReport` counts: by hand where few numbers tell, and that a model does not notice it."""

from __future__ import annotations

import json
import math

import pytest
import torch
from small_models import SMALL, random_inputs, random_model, sparse
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ospnext import ops
from ospnext.errors import ConfigError
from ospnext.models.attend import Attend
from ospnext.models.hif8_linear import HiF8Linear, StoredHiF8Linear, project
from ospnext.models.layout import Subsequences
from ospnext.models.quant_report import QuantReport
from ospnext.models.quantization import LINEARS, QuantPolicy, quantize_model
from ospnext.ops import HiF8Recipe

MODEL = sparse(SMALL.replace(num_layers=2), num_full_blocks=0)
GRID = (2, 4, 4)


def blocks(*layers: nn.Module) -> nn.Module:
    """A model with `layers` as ffn.0, ffn.1, ... of one block each."""
    model = nn.Module()
    model.blocks = nn.ModuleList()
    for number, layer in enumerate(layers):
        block = nn.Module()
        block.ffn = nn.ModuleDict({str(number): layer})
        model.blocks.append(block)
    return model


def linear(kind=HiF8Linear, recipe=None, rows=((15.0, -8.0, 0.0), (2.0**-24, 4.0, 1.0))):
    plain = nn.Linear(3, len(rows))
    with torch.no_grad():
        plain.weight.copy_(torch.tensor(rows))
    return kind.of(plain, recipe or HiF8Recipe())


def counts(elements, saturated, underflow, non_finite, amax):
    return {
        "elements": elements,
        "saturated": saturated,
        "underflow": underflow,
        "non_finite": non_finite,
        "amax": amax,
    }


def quantized_model(*, store=False):
    return quantize_model(random_model(MODEL, dtype=torch.float32), QuantPolicy("hif8", "hif8"), store=store)


def run(model):
    return model(*random_inputs(MODEL, GRID, dtype=torch.float32))


def hooks_in(model) -> int:
    return sum(len(m._forward_hooks) + len(m._backward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# ---- what is counted


def test_every_end_of_the_format_is_counted():
    """With 15 for the largest magnitude the scale is 1: what follows is the format alone."""
    layer = linear()
    x = torch.tensor([[15.0, -15.0, 14.0, 0.0], [2.0**-23, -(2.0**-24), 1e-30, 7.0]])[:, :3]
    with QuantReport(blocks(layer)) as report:
        out = layer(x.requires_grad_())
        out.backward(torch.tensor([[224.0, 0.0], [-224.0, 2.0**-25]]))
    found = report.as_dict()
    assert found == {
        "ffn.0": {
            "x": counts(6, 2, 2, 0, 15.0),
            "weight": counts(6, 1, 1, 0, 15.0),
            "grad": counts(4, 2, 1, 0, 224.0),
        }
    }
    assert list(found["ffn.0"]) == ["x", "weight", "grad"]
    assert json.loads(json.dumps(found)) == found


def test_what_is_not_finite_is_counted_and_stays_visible():
    layer = linear()
    with QuantReport(blocks(layer)) as report:
        layer(torch.ones(2, 3))
        layer(torch.tensor([[1.0, math.nan, 1.0]]))
        layer(torch.ones(2, 3))
    assert report.as_dict()["ffn.0"]["x"] == counts(15, 12, 0, 3, None)
    assert "not finite" in report.table()


@pytest.mark.parametrize(("scale_max", "at_the_top"), [(14.6, 2), (15.0, 1), (16.0, 1)])
def test_the_top_is_the_largest_value_up_to_the_scale(scale_max, at_the_top):
    """14.6 and 13.6 round to 15 and 14; 14 is the largest value that a scale of 14.6 asks for."""
    layer = linear(recipe=HiF8Recipe(scale_max=scale_max))
    with QuantReport(blocks(layer)) as report:
        layer(torch.tensor([[14.6, 13.6, 1.0]]))
    assert report.as_dict()["ffn.0"]["x"]["saturated"] == at_the_top


def test_blocks_are_counted_together_and_layers_apart():
    model = quantized_model()
    with QuantReport(model) as report:
        run(model)
    found = report.as_dict()
    layers, tokens = MODEL.num_layers, math.prod(GRID)
    assert set(found) == {*LINEARS, "self_attn.attend", "cross_attn.attend"}
    assert found["ffn.2"]["x"]["elements"] == layers * tokens * MODEL.ffn_dim
    assert found["ffn.2"]["weight"]["elements"] == layers * MODEL.dim * MODEL.ffn_dim
    assert found["self_attn.attend"]["q"]["elements"] == layers * tokens * MODEL.dim
    assert found["cross_attn.attend"]["v"]["elements"] == layers * MODEL.text_len * MODEL.dim
    assert list(found["self_attn.attend"]) == ["q", "k", "v"]  # a graph is made, but nothing runs backward


def test_codes_that_layers_share_are_what_is_counted():
    """Also with a scale that is not the input's own: the layer computes with the codes that it is given."""
    q, k = linear(), linear()
    x = torch.tensor([[15.0, 7.0, 1.0]])
    shared = ops.hif8_quantize(x, amax=torch.full((1, 1), 7.0))
    model = blocks(q, k)
    with QuantReport(model) as report:
        q(x, shared)
        k(x, x_quantized=shared)
        project(x, q, k)
    found = report.as_dict()
    assert found["ffn.0"] == found["ffn.1"]
    assert found["ffn.0"]["x"] == counts(6, 3, 0, 0, 15.0)  # 15 and 7 of the first call, 15 of the second


@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_stored_weights_count_once(granularity):
    recipe = HiF8Recipe(granularity=granularity)
    rows = ((15.0, -8.0, 0.0), (0.5, 0.25, 0.125))
    layer, other = linear(StoredHiF8Linear, recipe, rows), linear(HiF8Linear, recipe, rows)
    report = QuantReport(blocks(layer, other))
    for _ in range(2):
        with report:
            layer(torch.ones(1, 3))
            other(torch.ones(1, 3))
    found = report.as_dict()
    saturated = 1 if granularity == "tensor" else 2
    assert found["ffn.0"]["weight"] == counts(6, saturated, None, 0, 15.0)
    assert found["ffn.1"]["weight"] == counts(12, 2 * saturated, 0, 0, 15.0)
    assert found["ffn.0"]["x"]["elements"] == 6
    assert " 6 " in report.table()
    assert "not known" in report.table()


def lost_and_saturated(x, scale_max):
    codes, _ = ops.hif8_quantize(x, scale_max=scale_max)
    values = ops.hif8_decode(codes)
    return int(((values == 0) & (x != 0)).sum()), int((values.abs() == scale_max).sum())


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_of_attention_are_counted_before_their_round_trip(packed):
    """After it, what was lost is zero already."""
    lengths = (3, 4)
    cu_seqlens = torch.tensor([0, 3, 7], dtype=torch.int32)
    pieces = Subsequences(lengths, cu_seqlens) if packed else None
    q, k, v, grad = (torch.randn(1, 7, 2, 8, generator=torch.Generator().manual_seed(i)) for i in range(4))
    # Gradients over many binades, so that some underflow.
    grad = grad * torch.exp2(-8.0 * torch.arange(7))[None, :, None, None]
    attend = Attend()
    attend.recipe = HiF8Recipe()
    model = blocks(attend)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    with QuantReport(model) as report:
        attend(*leaves[:2], v_BSHD=leaves[2], pieces=pieces).backward(grad)
    found = report.as_dict()["ffn.0"]

    through = [ops.hif8_fake_quantize(t).requires_grad_() for t in (q, k, v)]
    if packed:
        pack = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_kv": cu_seqlens, "max_seqlen_q": 4, "max_seqlen_kv": 4}
        out = ops.attention_packed(*(t.flatten(0, 1) for t in through), **pack).view(grad.shape)
    else:
        out = ops.attention(*through)
    gradients = dict(zip("qkv", torch.autograd.grad(out, through, grad), strict=True))
    for operand, gradient in gradients.items():
        lost, saturated = lost_and_saturated(gradient, 224.0)
        seen = found[f"grad of {operand}"]
        assert (seen["underflow"], seen["saturated"], seen["elements"]) == (lost, saturated, gradient.numel())
        assert seen["amax"] == pytest.approx(gradient.abs().max().item())
    assert found["grad of q"]["underflow"] > 0
    for operand, t in zip("qkv", (q, k, v), strict=True):
        assert (found[operand]["underflow"], found[operand]["saturated"]) == lost_and_saturated(t, 15.0)


def test_only_gradients_that_are_asked_for_are_counted():
    attend = Attend()
    attend.recipe = HiF8Recipe()
    q, k, v = (torch.randn(1, 5, 2, 8) for _ in range(3))
    with QuantReport(blocks(attend)) as report:
        attend(q, k.requires_grad_(), v).sum().backward()
        with torch.no_grad():
            attend(q, k, v)
    assert list(report.as_dict()["ffn.0"]) == ["q", "k", "v", "grad of k"]


def test_training_counts_every_gradient():
    model = quantized_model()
    with QuantReport(model) as report:
        run(model).square().mean().backward()
    found = report.as_dict()
    for name in LINEARS:
        assert found[name]["grad"]["elements"] > 0
        assert found[name]["grad"]["saturated"] >= MODEL.num_layers  # the largest of each tensor
        assert found[name]["grad"]["non_finite"] == 0
    assert list(found["cross_attn.attend"]) == ["q", "k", "v", "grad of q", "grad of k", "grad of v"]


# ---- what a model does not notice


@pytest.mark.parametrize("store", [False, True])
def test_results_and_gradients_are_bit_for_bit_those_without_it(store):
    found = []
    for reports in (False, True):
        model = quantized_model(store=store)
        if reports:
            with QuantReport(model):
                out = run(model)
                out.square().mean().backward()
        else:
            out = run(model)
            out.square().mean().backward()
        found.append((out, {name: p.grad for name, p in model.named_parameters()}))
    (plain, gradients), (reported, others) = found
    assert torch.equal(plain, reported)
    assert all(torch.equal(gradients[name], others[name]) for name in gradients)


def test_nothing_is_left_behind_and_nothing_counted_outside():
    model = quantized_model()
    report = QuantReport(model)
    run(model)
    assert report.as_dict() == {}
    assert report.table() == "HiFloat8: no quantized layer has run"
    with pytest.raises(ZeroDivisionError), report:
        assert hooks_in(model) == (len(LINEARS) + 2) * MODEL.num_layers
        loss = run(model).square().mean()
        1 / 0  # noqa: B018
    assert hooks_in(model) == 0
    before = report.as_dict()
    loss.backward()  # of a graph that was made inside
    run(model)
    assert report.as_dict() == before
    with report:  # it goes on where it was
        run(model)
    assert report.as_dict()["ffn.0"]["x"]["elements"] == 2 * before["ffn.0"]["x"]["elements"]


class Waits(TorchDispatchMode):
    """Counts the operators that read a value from the device, or whose shape is one."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        if name.startswith(("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::is_nonzero")):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def test_counting_never_waits_for_the_device():
    layer, attend = linear(), Attend()
    attend.recipe = HiF8Recipe()
    x = torch.randn(1, 5, 3, requires_grad=True)
    q = torch.randn(1, 5, 2, 8, requires_grad=True)
    with QuantReport(blocks(layer, attend)) as report, Waits() as waits:
        layer(x).sum().backward()
        attend(q, q, q).sum().backward()
    assert waits.found == []
    with Waits() as waits:
        report.as_dict()
    assert waits.found


def test_counts_go_on_from_inference_to_training():
    layer = linear()
    with QuantReport(blocks(layer)) as report:
        with torch.inference_mode():
            layer(torch.ones(1, 3))
        layer(torch.ones(1, 3)).sum().backward()
        with torch.inference_mode():
            layer(torch.ones(1, 3))
    assert report.as_dict()["ffn.0"]["x"]["elements"] == 9


def test_a_model_without_quantized_layers_is_refused():
    with pytest.raises(ConfigError, match=r"set quant=hif8 or quant_attn=hif8 .*quantize_model"):
        QuantReport(random_model(MODEL))
    upstream = quantize_model(random_model(MODEL), QuantPolicy("hif8", "hif8", compat="upstream_bf16"))
    with pytest.raises(ConfigError, match="compat are not counted"):
        QuantReport(upstream)
    report = QuantReport(quantized_model())
    with report, pytest.raises(RuntimeError, match="entered already"), report:
        pass


def test_the_table_has_a_line_for_each_operand():
    layer = linear()
    with QuantReport(blocks(layer)) as report:
        layer(torch.tensor([[15.0, 1.0, 2.0**-25]]))
    assert report.table().splitlines()[2:] == [
        "layer  operand  elements  saturated  underflow  non-finite  largest amax",
        "ffn.0  x               3      33.3%      33.3%           0            15",
        "ffn.0  weight          6      16.7%      16.7%           0            15",
    ]

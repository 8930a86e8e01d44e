"""What each rank does in tests/test_collective_gradients.py; ranks import it by the names in this file."""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist

from ospnext.backends.reference import MANIFEST
from ospnext.ops import collective
from ospnext.ops.policy import use_registry
from ospnext.ops.registry import Registry


def uneven(ranks):
    """Rows that each rank (row) sends each other: an exchange is not as its reverse, and something is empty."""
    return [[(2 * source + 3 * to + 3) % 5 for to in range(ranks)] for source in range(ranks)]


def operations(ranks, rank):
    """Name -> (function, rows of x on this rank)."""
    sizes = uneven(ranks)
    sent, received = sizes[rank], [row[rank] for row in sizes]
    return {
        "all_to_all": (lambda x: collective.all_to_all(x, sent, received), sum(sent)),
        "all_gather": (collective.all_gather, 2),
        "reduce_scatter": (collective.reduce_scatter, 2 * ranks),
        "all_reduce": (collective.all_reduce, 3),
        "broadcast": (lambda x: collective.broadcast(x, ranks - 1), 3),
    }


def numeric_and_analytic():
    """Per operation: the derivative of a nonlinear total over ranks, by central differences on every rank's x in turn
    and by the backward pass; and that of a function of the gradient, which is a second backward pass."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    found = {}
    for name, (function, rows) in operations(ranks, rank).items():
        torch.manual_seed(17 + rank)
        x = torch.randn(rows, 2, dtype=torch.float64)

        def total(x, function=function):
            return (function(x).sin() * (1.0 + rank)).sum()

        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(total(leaf), leaf, create_graph=True)
        (second,) = torch.autograd.grad((grad * grad).sum(), leaf)
        found[name] = {
            "first": (differences(total, x), grad.detach()),
            "second": (differences(lambda x: (gradient(total, x) ** 2).sum(), x), second),
        }
    return found


def gradient(total, x):
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(total(leaf), leaf)[0]


def differences(total, x, step=1e-6):
    """Central differences of the sum over ranks of `total`. All ranks step through the elements of all."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    sizes = [None] * ranks
    dist.all_gather_object(sizes, x.numel())
    result = torch.zeros_like(x)
    for owner in range(ranks):
        for index in range(sizes[owner]):
            sides = []
            for sign in (1, -1):
                moved = x.clone()
                if owner == rank:
                    moved.flatten()[index] += sign * step
                local = total(moved).detach()
                dist.all_reduce(local)
                sides.append(local)
            if owner == rank:
                result.flatten()[index] = (sides[0] - sides[1]) / (2 * step)
    return result


def counted():
    """Forward and backward of each operation, as text, and what a counter that is no longer in force has counted."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    pair = dist.new_group([0, ranks - 1])
    texts = {}
    for name, (function, rows) in operations(ranks, rank).items():
        x = torch.ones(rows, 4, requires_grad=True)
        with collective.count_bytes() as both, collective.count_bytes() as forward:
            out = function(x)
        with collective.count_bytes() as backward:
            out.sum().backward()
        assert str(both) == str(forward)
        texts[name] = (forward, backward)
    with collective.count_bytes() as in_a_pair:
        if rank in (0, ranks - 1):
            collective.all_reduce(torch.ones(8, dtype=torch.bfloat16), "max", pair)
    texts["pair"] = (in_a_pair, in_a_pair)
    return {name: [(c.total_calls(), c.total_bytes(), dict(c.bytes)) for c in both] for name, both in texts.items()}


class Eager:
    """Collectives that know nothing of asynchronous calls."""

    def all_to_all(self, x, send_splits, receive_splits, group):
        out = x.new_empty(sum(receive_splits), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), list(receive_splits), list(send_splits), group=group)
        return out


eager = Eager()


def two_in_flight():
    """The results of two exchanges that are on their way at once, waited for in the other order, by an implementation
    that can start one and by one that cannot."""
    (honest,) = MANIFEST.offers("collective")
    without = dataclasses.replace(honest, id="eager.gloo", target=f"{__name__}:eager")
    found = []
    for manifest in (MANIFEST, dataclasses.replace(MANIFEST, backend="eager", implementations=(without,))):
        with use_registry(Registry([manifest])):
            x = torch.full((2, 1), float(dist.get_rank()))
            first = collective.all_to_all(x, [1, 1], [1, 1], async_op=True)
            second = collective.all_to_all(x + 10, [1, 1], [1, 1], async_op=True)
            results = [second.wait(), first.wait()]
            assert first.wait() is results[1]
            found.append(torch.cat(results).flatten().tolist())
    return found

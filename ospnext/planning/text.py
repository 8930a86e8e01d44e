"""A plan as text and as JSON types."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

from ospnext.models.weights.quantized import Quantization
from ospnext.planning.plan import Question, Row, of_dense, rows

PREDICTION = (
    "Prediction, not a measurement: operations over rates, bytes over bandwidths and a latency for each exchange, from "
    "the figures below."
)
HEAD = ("dp", "cfg", "ssp", "ulysses", "tokens", "over mean", "GiB", "GB sent", "exchanges", "s a step", "times one")


def document(question: Question, found: Sequence[Row]) -> dict[str, Any]:
    """Everything, as JSON types. Bytes, seconds."""
    device = question.device
    return {
        "prediction": PREDICTION,
        "step": _step(question),
        "device": {"name": device.name, "measured": device.measured, **{k: asdict(v) for k, v in device.figures}},
        "seconds_on_one": one_device(question),
        "layouts": [_as_json(row) for row in found],
        "dense": [_as_json(row) for row in dense_rows(question)],
    }


def lines(title: str, question: Question, found: Sequence[Row], most: int) -> Iterator[str]:
    device, best, alone = question.device, found[0], one_device(question)
    yield from (PREDICTION, "", title, f"{question.gpus} x {device.name}; {_step(question)}", "")
    for name, figure in device.figures:
        yield f"  {name:<22} {figure.value:>7g}  {figure.how:<9}  {figure.source}"
    if not device.measured:
        yield f"  No rate of {device.name} was measured: its times say little, how layouts compare says more."
    yield ""
    yield from _table([HEAD, *(_cells(row, alone) for row in found[:most])])
    if len(found) > most:
        yield f"  and {len(found) - most} more; --top {len(found)} shows them"
    yield from ("", f"Best: {best.layout}")
    yield f"  step        {_times(best)}"
    yield f"  memory      {_memory(best, device.memory)}"
    if question.training:
        yield f"  weights     each rank sends {best.weights_sent / 1e9:,.1f} GB of weights and gradients beside that"
    yield from ("", *_against_dense(question, best))


def one_device(question: Question) -> float:
    """Predicted seconds of a step on one."""
    return rows(replace(question, gpus=1, dp=None))[0].step


def dense_rows(question: Question) -> list[Row]:
    """The layouts of Wan2.1, which attends fully everywhere, in bf16 on as many devices. None for a dense model."""
    if not question.config.sparse:
        return []
    return rows(replace(of_dense(question), quantization=Quantization()))


def _step(question: Question) -> str:
    if question.training:
        return "a step of training on one sample for each dp: forward and backward, blocks checkpointed, AdamW, sharded"
    forwards = "a forward" if question.branches == 1 else f"{question.branches} branches of guidance"
    return f"a step of denoising: {forwards} for each video, dp of them at a time"


def _cells(row: Row, alone: float) -> tuple[str, ...]:
    fewest, fullest = min(row.tokens), max(row.tokens)
    return (
        *map(str, row.layout.sizes),
        f"{fullest:,}" if fewest == fullest else f"{fewest:,}-{fullest:,}",
        f"{row.imbalance:+.1%}",
        f"{row.needed / 2**30:.1f}" + ("" if row.fits else " does NOT fit"),
        f"{max(row.sent) / 1e9:.2f}",
        str(row.exchanges),
        f"{row.step:.3f}",
        f"{alone * row.rate:.2f}",
    )


def _table(body: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(row[i]) for row in body) for i in range(len(body[0]))]
    for row in body:
        yield "  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))


def _times(row: Row) -> str:
    parts = {**row.seconds.parts, "waiting for weights": row.weights_waiting}
    said = ", ".join(f"{name} {1e3 * spent:,.1f}" for name, spent in parts.items() if spent > 1e-6)
    return f"{1e3 * row.step:,.1f} ms: {said}"


def _memory(row: Row, memory: float) -> str:
    parts = ", ".join(f"{name} {amount / 2**30:.2f}" for name, amount in row.memory.items())
    return f"{row.needed / 2**30:.1f} of {memory / 2**30:.1f} GiB: {parts}"


def _against_dense(question: Question, best: Row) -> Iterator[str]:
    dense = dense_rows(question)
    if not dense:
        return
    fastest = dense[0]
    yield f"Wan2.1 (full attention, bf16) on the same {question.gpus}, predicted in the same way:"
    yield f"  its best    {fastest.layout}: {fastest.step:.3f} s a step; the best above is {_faster(best, fastest)}"
    for row in dense if not question.training else []:
        if row.layout.ulysses == question.gpus > 1:
            ours, theirs = max(best.sent) / 1e9, max(row.sent) / 1e9
            yield f"  Ulysses     {row.layout}: {row.step:.3f} s a step; the best above is {_faster(best, row)}"
            yield f"              and sends {ours:.2f} GB where that sends {theirs:.2f} ({ours / theirs - 1:+.0%})"


def _faster(row: Row, other: Row) -> str:
    return f"{row.rate / other.rate:.2f} times as fast"


def _as_json(row: Row) -> dict[str, Any]:
    return {
        **asdict(row.layout),
        "tokens": list(row.tokens),
        "memory": row.memory,
        "fits": row.fits,
        "sent": list(row.sent),
        "weights_sent": row.weights_sent,
        "exchanges": row.exchanges,
        "seconds": {**row.seconds.parts, "waiting for weights": row.weights_waiting},
        "seconds_a_step": row.step,
        "steps_a_second": row.rate,
    }

"""`ospnext tune`: time every implementation of attention and of the HiFloat8 linear at the shapes of a model."""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ospnext.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from ospnext.models.config import TransformerConfig
    from ospnext.sparse import Grid

HELP = """Time every implementation of attention and of the HiFloat8 linear at the shapes of a model, on this device.

  ospnext tune --resolution 720p,768p --out tuning.json     # then: OSPNEXT_TUNING=tuning.json ospnext generate ...
  ospnext tune --tokens 75600 --operators attention
  ospnext tune --backward                                   # and with gradients, for training

Prints a table. The file is used where OSPNEXT_TUNING names it and nowhere else: for exactly these requests, the fastest
implementation then comes first, and `ospnext explain` says so. It holds for this device and these versions only; with
others it is refused. Inputs are random. Exits with 1 if nothing could be timed."""

OPERATORS = ("attention", "quantized_linear")
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}

#: A trial has this fraction of the rows. One that takes this many times that of the fastest is not run in full.
TRIAL, HOPELESS = 64, 10

#: (part of the rows: 1 for all) -> what is to be timed.
Prepare = Callable[[int], Callable[[], object]]


@dataclass(frozen=True)
class Timed:
    """One request, and how to make it."""

    title: str
    contract: str
    request: Any
    prepare: Prepare


@dataclass(frozen=True)
class Row:
    """What became of one implementation: its time, or why it has none."""

    id: str
    milliseconds: float | None
    remark: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", default="14b", metavar="NAME", help="14b, 1.3b or tiny (default: 14b)")
    parser.add_argument(
        "--resolution",
        default="720p",
        metavar="LIST",
        help="comma-separated: 480p, 720p, 768p, 1080p or HEIGHTxWIDTH (default: 720p)",
    )
    parser.add_argument("--frames", type=int, default=81, metavar="N", help="frames of the video (default: 81)")
    parser.add_argument(
        "--tokens", metavar="LIST", help="instead of videos: comma-separated lengths of one dense sequence"
    )
    parser.add_argument("--operators", default=",".join(OPERATORS), metavar="LIST", help="(default: both)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="(default: bf16)")
    parser.add_argument("--backward", action="store_true", help="time requests of training, too")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="timed calls of each (default: 5)")
    parser.add_argument(
        "--limit", type=float, default=30.0, metavar="SECONDS", help="leave out what takes longer a call (default: 30)"
    )
    parser.add_argument("--backend", metavar="NAME", help="wins over OSPNEXT_BACKEND")
    parser.add_argument("--device", help="device to run on, e.g. a second card (default: the backend's first)")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write the times here, after each request, in place of what is there"
    )


def run(args: argparse.Namespace) -> int:
    import torch

    from ospnext.bench.device import chosen_device, device_name
    from ospnext.ops import tuning, use_backend
    from ospnext.ops.contracts import CONTRACTS
    from ospnext.ops.device import default_device
    from ospnext.ops.policy import AUTO
    from ospnext.ops.registry import registry
    from ospnext.ops.select import auto_backend

    _check(args)
    operators = _listed("--operators", args.operators, OPERATORS)
    with use_backend(args.backend, ops={}, fallback=(), tuning="") as policy:
        device, dtype = chosen_device(args.device, default_device()), getattr(torch, DTYPES[args.dtype])
        backend = auto_backend(device.type, registry()) if policy.backend == AUTO else policy.backend
        machine = tuning.machine_of(backend, registry()) if backend else None
        if machine is None:
            raise ConfigError("no backend can run here, so that there is nothing to time; `ospnext doctor` says why")
        if device.index is not None and (device_name(device) or machine.device) != machine.device:
            raise ConfigError(
                f"--device {device} is {device_name(device)!r}, but backend {machine.backend!r} decides for its first "
                f"card, {machine.device!r}, for which the times would not hold; make {device} the only one visible"
            )
        requests = list(_requests(args, operators, dtype, device))
        print(f"{machine.device} ({machine.backend}); {_versions(machine.versions)}", flush=True)
        asked: set[str] = set()
        times: dict[str, dict[str, float]] = {}
        for timed in requests:
            key = tuning.request_key(CONTRACTS[timed.contract], timed.request)
            if key in asked:
                continue
            asked.add(key)
            print(f"\n{timed.title}", flush=True)
            rows = list(_rows(timed, device, args.repeats, args.limit))
            print("\n".join(_table(rows)), flush=True)
            found = {row.id: round(row.milliseconds, 4) for row in rows if row.milliseconds is not None}
            if found:
                times[key] = found
                if args.out:
                    tuning.save(args.out, machine, times)
    if args.out and times:
        print(f"\nwrote {args.out}; OSPNEXT_TUNING={args.out} makes use of it")
    return 0 if times else 1


def _check(args: argparse.Namespace) -> None:
    from ospnext import atomic

    if args.repeats < 1 or args.limit <= 0:
        raise ConfigError(f"--repeats {args.repeats} and --limit {args.limit:g} must be above 0")
    if args.out:
        atomic.check_writable(args.out)


def _listed(option: str, text: str, known: tuple[str, ...]) -> list[str]:
    from ospnext.config import did_you_mean

    words = list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    for word in words:
        if word not in known:
            raise ConfigError(f"{option} {word!r}{did_you_mean(word, known)}; there are: {', '.join(known)}")
    if not words:
        raise ConfigError(f"{option} {text!r} names none of {', '.join(known)}")
    return words


def _versions(versions: Any) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


# ---- what is asked


def _requests(
    args: argparse.Namespace, operators: list[str], dtype: torch.dtype, device: torch.device
) -> Iterator[Timed]:
    from ospnext.bench.workload import PRESETS, workload

    sizes: list[tuple[TransformerConfig, str, int, Grid | None]] = []
    if args.tokens is None:
        for resolution in filter(None, (word.strip() for word in args.resolution.split(","))):
            work = workload(args.preset, resolution, args.frames)
            sizes.append((work.config, f"{args.preset} at {resolution}", work.tokens, work.grid))
    else:
        config = PRESETS[_listed("--preset", args.preset, tuple(PRESETS))[0]]
        sizes = [(config, f"{args.preset}, {n:,} tokens", n, None) for n in _numbers(args.tokens)]
    if not sizes:
        raise ConfigError(f"--resolution {args.resolution!r} names none")
    for config, where, tokens, grid in sizes:
        for backward in (False, True) if args.backward else (False,):
            if "attention" in operators:
                yield from _attentions(config, where, tokens, grid, dtype, device, backward)
            if "quantized_linear" in operators:
                yield from _linears(config, where, tokens, dtype, device, backward)


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(word) for word in text.split(",") if word.strip()]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise ConfigError(f"--tokens {text!r}: give lengths separated by commas, e.g. 75600,80640")
    return numbers


def _attentions(
    config: TransformerConfig,
    where: str,
    tokens: int,
    grid: Grid | None,
    dtype: torch.dtype,
    device: torch.device,
    backward: bool,
) -> Iterator[Timed]:
    """Those of the blocks of a model: as `ospnext generate --dry-run` lists them."""
    import torch

    from ospnext.ops.contracts.attention import AttentionRequest
    from ospnext.sparse import skiparse_plan

    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {"full self-attention": ((tokens,), (tokens,))}
    if grid is not None:
        plan = skiparse_plan(grid, config.sparse_ratio)
        for order in (plan.order("token"), plan.order("group")):
            lengths = tuple(n for n in order.lengths if n)
            shapes[f"{order.kind} self-attention"] = (lengths, lengths)
    shapes["text cross-attention"] = ((tokens,), (config.text_len,))
    for name, (q_lens, kv_lens) in shapes.items():
        packed = len(set(q_lens)) > 1
        request = AttentionRequest(
            device.type,
            dtype,
            len(q_lens),
            max(q_lens),
            max(kv_lens),
            config.num_heads,
            config.head_dim,
            packed=packed,
            backward=backward,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        queries = " + ".join(f"{n:,}" for n in q_lens)
        size = f"{queries} queries, {max(kv_lens):,} keys" + (" at most" if packed else "")
        prepare = functools.partial(_attention, q_lens, kv_lens, (config.num_heads, config.head_dim), request, device)
        passes = "forward and backward" if backward else "forward"
        yield Timed(f"attention, {where}: {name}, {passes} ({size})", "attention", request, prepare)


def _attention(
    q_lens: tuple[int, ...], kv_lens: tuple[int, ...], heads: tuple[int, int], request: Any, device: Any, part: int
) -> Callable[[], object]:
    import torch

    from ospnext import ops

    rows = tuple(max(n // part, 1) for n in q_lens)
    sequences = (rows, kv_lens, kv_lens)
    dense = [(len(lens), lens[0], *heads) for lens in sequences]
    packed = [(sum(lens), *heads) for lens in sequences]
    operands = [
        torch.randn(shape, device=device, dtype=request.dtype, requires_grad=request.backward)
        for shape in (packed if request.packed else dense)
    ]
    call = functools.partial(ops.attention, *operands)
    if request.packed:
        pack: dict[str, Any] = {"max_seqlen_q": max(rows), "max_seqlen_kv": max(kv_lens)}
        for side, lens in (("q", rows), ("kv", kv_lens)):
            pack[f"cu_seqlens_{side}"] = torch.tensor([0, *lens], device=device).cumsum(0).to(torch.int32)
        call = functools.partial(ops.attention_packed, *operands, **pack)
    if not request.backward:
        return call
    grad = torch.randn_like(operands[0])
    return lambda: torch.autograd.grad(call(), operands, grad)


def _linears(
    config: TransformerConfig, where: str, tokens: int, dtype: torch.dtype, device: torch.device, backward: bool
) -> Iterator[Timed]:
    """Of inference every form that a recipe and a backend can choose; of training the backward pass."""
    from ospnext.ops import HiF8Recipe
    from ospnext.ops.contracts.quantized_linear import QuantizedLinearRequest

    inference = itertools.product(("tensor", "row"), ("fp32", "fast"), (False, True))
    forms = [("tensor", "fp32", False)] if backward else list(inference)
    for inner, features in ((config.dim, config.dim), (config.dim, config.ffn_dim), (config.ffn_dim, config.dim)):
        for granularity, accumulate, carried in forms:
            recipe = HiF8Recipe(granularity=granularity, accumulate=accumulate)  # type: ignore[arg-type]
            request = QuantizedLinearRequest(
                device.type,
                dtype,
                (tokens, features, inner),
                recipe.granularity,
                recipe.granularity,
                bias=not backward,  # its gradient is a sum of its own
                accumulate=recipe.accumulate,
                scale_max=recipe.scale_max,
                grad_scale_max=recipe.grad_scale_max,
                backward=backward,
                carried=carried,
            )
            words = (
                "backward"
                if backward
                else f"forward, scales per {granularity}, {accumulate} sums{', carried codes' * carried}"
            )
            title = f"quantized_linear, {where}: {inner} -> {features}, {words} ({tokens:,} tokens)"
            prepare = functools.partial(_linear, recipe, request, device)
            yield Timed(title, "quantized_linear", request, prepare)


def _linear(recipe: Any, request: Any, device: Any, part: int) -> Callable[[], object]:
    """The product alone: what makes the codes has contracts of its own."""
    import torch

    from ospnext import ops

    tokens, features, inner = request.shape
    x, weight, bias = (
        torch.randn(shape, device=device, dtype=request.dtype, requires_grad=request.backward)
        for shape in ((1, max(tokens // part, 1), inner), (features, inner), (features,))
    )
    codes = functools.partial(
        ops.hif8_quantize,
        scale_max=recipe.scale_max,
        scale_mode=recipe.scale_mode,
        granularity=recipe.granularity,
        carried=request.carried,
    )
    of_x = codes(x.detach())
    if not request.backward:
        return functools.partial(ops.quantized_linear, x, codes(weight), bias, recipe=recipe, x_quantized=of_x)
    out = ops.quantized_linear(x, weight, bias, recipe=recipe, x_quantized=of_x)
    grad = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, (x, weight, bias), grad, retain_graph=True)


# ---- what it takes


def _rows(timed: Timed, device: torch.device, repeats: int, limit: float) -> Iterator[Row]:
    """One for each implementation that takes the request, in the order of the manifest."""
    from ospnext.ops import use_backend
    from ospnext.ops.contracts import CONTRACTS
    from ospnext.ops.policy import current_policy
    from ospnext.ops.registry import registry
    from ospnext.ops.select import select

    decision = select(CONTRACTS[timed.contract], timed.request, current_policy(), registry())
    fastest_trial = float("inf")
    for candidate in decision.candidates:
        if candidate.status not in ("chosen", "eligible"):
            continue
        first = "first without tuning" if candidate.status == "chosen" else ""
        with use_backend(ops={timed.contract: candidate.id}):
            try:
                trial = _milliseconds(timed.prepare(TRIAL), device, 1)
                if trial > HOPELESS * fastest_trial:
                    yield Row(candidate.id, None, f"left out: {trial / fastest_trial:.0f} times the fastest in a trial")
                elif trial * TRIAL > 1000 * limit:
                    yield Row(candidate.id, None, f"left out: about {trial * TRIAL / 1000:.0f} s a call (--limit)")
                else:
                    fastest_trial = min(fastest_trial, trial)
                    yield Row(candidate.id, _milliseconds(timed.prepare(1), device, repeats), first)
            except Exception as error:  # a kernel that fails is one row of the table
                yield Row(candidate.id, None, f"failed: {type(error).__name__}: {str(error).strip().splitlines()[0]}")


def _milliseconds(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    from ospnext.bench.measure import release, timed

    try:
        return timed(call, device, repeats=repeats).median
    finally:
        release()


def _table(rows: list[Row]) -> list[str]:
    if not rows:
        return ["  no implementation takes it"]
    width = max(len(row.id) for row in rows)
    fastest = min((row.milliseconds for row in rows if row.milliseconds is not None), default=None)
    lines = []
    for row in rows:
        if row.milliseconds is None or fastest is None:
            lines.append(f"  {row.id:<{width}}  {row.remark}")
        else:
            ratio = f"{row.milliseconds / fastest:.2f} x"
            lines.append(f"  {row.id:<{width}}  {row.milliseconds:10.3f} ms  {ratio:>8}  {row.remark}".rstrip())
    return lines

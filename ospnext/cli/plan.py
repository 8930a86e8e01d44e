"""`ospnext plan`: the legal layouts of a number of devices, best first, and what each is predicted to need and take."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

HELP = """Say how a number of devices could share a model, best first, and predict memory, traffic and time of each way.

  ospnext plan --preset 14b --resolution 720p --gpus 8 --device h200
  ospnext plan --preset 14b --resolution 768p --gpus 16 --device ascend950pr --quant hif8 --payload hif8
  ospnext plan --preset 1.3b --resolution 480p --gpus 4 --device h200 --training

Nothing runs: what is printed is a prediction, with every figure that it is made of and how that is known. A layout is
dp x cfg x ssp x ulysses: videos at a time, branches of guidance on ranks of their own, ranks with whole subsequences,
ranks with parts of them. docs/parallel.md says what each exchanges. --devices FILE takes figures of other devices, in
the form of ospnext/planning/devices.yaml."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", default="14b", metavar="NAME", help="14b, 1.3b or tiny (default: 14b)")
    parser.add_argument(
        "--resolution", default="720p", metavar="SIZE", help="480p, 720p, 768p, 1080p or HEIGHTxWIDTH (default: 720p)"
    )
    parser.add_argument("--frames", type=int, default=81, metavar="N", help="frames of the video (default: 81)")
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="devices, of any vendor")
    parser.add_argument("--device", default="h200", metavar="NAME", help="h200, ascend950pr, ... (default: h200)")
    parser.add_argument("--devices", type=Path, metavar="FILE", help="YAML with figures of more devices")
    parser.add_argument("--dp", type=int, metavar="N", help="videos (in training: samples) at a time (default: any)")
    parser.add_argument("--no-guidance", action="store_true", help="one branch: guidance_scale is 1")
    parser.add_argument("--training", action="store_true", help="a training step instead of a denoising step")
    parser.add_argument("--dense", action="store_true", help="Wan2.1: full attention in every block")
    parser.add_argument("--quant", choices=("none", "hif8"), default="none", help="linears (default: none)")
    parser.add_argument("--quant-attn", choices=("none", "hif8", "hif8_native"), default="none", help="(default: none)")
    parser.add_argument(
        "--payload",
        choices=("plain", "hif8"),
        default="plain",
        help="how tokens travel between blocks (default: plain)",
    )
    parser.add_argument("--top", type=int, default=12, metavar="N", help="layouts to show (default: 12)")
    parser.add_argument("--json", action="store_true", help="print everything, all layouts, as JSON")


def run(args: argparse.Namespace) -> int:
    import json

    from ospnext.bench.workload import workload
    from ospnext.errors import ConfigError
    from ospnext.models.quant_policy import QuantPolicy
    from ospnext.models.traffic import without_sparsity
    from ospnext.models.weights.quantized import Quantization
    from ospnext.parallel.exchange import Payload
    from ospnext.planning.devices import device
    from ospnext.planning.plan import Question, rows
    from ospnext.planning.text import document, lines

    assert args.payload in get_args(Payload)
    if args.top < 1 or (args.dp is not None and args.dp < 1):
        raise ConfigError("--top and --dp must be at least 1")
    if args.training and (args.payload != "plain" or args.quant_attn == "hif8_native"):
        raise ConfigError("--training: --payload hif8 and --quant-attn hif8_native have no gradient; leave them out")
    work = workload(args.preset, args.resolution, args.frames)
    policy = QuantPolicy(quant=args.quant, quant_attn=args.quant_attn)
    config = without_sparsity(work.config) if args.dense else work.config
    question = Question(
        config=config,
        grid=work.grid,
        gpus=args.gpus,
        device=device(args.device, args.devices),
        branches=1 if args.no_guidance else 2,
        quantization=Quantization.of([policy], config.num_layers),
        payload=args.payload,
        training=args.training,
        dp=args.dp,
    )
    found = rows(question)
    if args.json:
        print(json.dumps({"model": str(work), "dense_model": args.dense, **document(question, found)}, indent=2))
        return 0
    forms = [f"linears {args.quant}", f"attention {args.quant_attn}", f"payload {args.payload}"]
    said = ", ".join(form for form in forms if not form.endswith((" none", " plain"))) or "bf16"
    title = f"{'dense ' if args.dense else ''}{work}, {said}"
    print("\n".join(lines(title, question, found, args.top)))
    return 0

"""How large checkpoints are, in bfloat16 and as HiFloat8 codes: a small one in files, the presets computed exactly.

    .venv/bin/python benchmarks/hif8_sizes.py [--out benchmarks/results/hif8_sizes.md]

The large ones are counted from their configs, tensor by tensor; the small one is written both ways, and what is counted
has to be what its files hold."""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from ospnext.models import OSPNextTransformer, TransformerConfig, load_transformer, save_transformer
from ospnext.models.config import PRESETS
from ospnext.models.convert import convert
from ospnext.models.loading import parameter_dtype
from ospnext.models.quantization import QuantPolicy
from ospnext.models.weights.quantized import Quantization
from ospnext.models.weights.shapes import parameter_shapes
from ospnext.ops import HiF8Recipe

BF16 = torch.bfloat16
SMALL = TransformerConfig(dim=192, ffn_dim=768, num_heads=8, num_layers=20, freq_dim=8, text_dim=8)
POLICIES = {
    "bfloat16": None,
    "HiF8": QuantPolicy(quant="hif8"),
    "HiF8, a scale for each row": QuantPolicy(quant="hif8", recipe=HiF8Recipe(granularity="row")),
    "HiF8, ffn.0 and ffn.2 only": QuantPolicy(quant="hif8", linears=("ffn.0", "ffn.2")),
}

HEAD = """Sizes of transformer checkpoints: linears inside blocks as HiFloat8 codes with fp32 scales, the rest as in a
bfloat16 model, where norms, modulation and the time embedding stay fp32. 1.3B and 14B are counted from their configs,
exactly; of the small model (dim 192, 20 blocks) the count is checked against the file. A file is larger than its
tensors by its header. Made by benchmarks/hif8_sizes.py.

"""


def tensor_bytes(config: TransformerConfig, policy: QuantPolicy | None) -> int:
    """Of all tensors of a bfloat16 checkpoint whose linears of `policy` are codes."""
    quantization = Quantization.of([] if policy is None else [policy], config.num_layers)
    shapes, fixed = quantization.shapes(parameter_shapes(config)), quantization.dtypes
    return sum(
        math.prod(shape) * (fixed.get(name) or parameter_dtype(name, BF16)).itemsize for name, shape in shapes.items()
    )


def written_bytes(config: TransformerConfig, policy: QuantPolicy | None, folder: Path) -> tuple[int, int]:
    """(bytes of the tensors, bytes of the file) of a checkpoint of random weights."""
    source, target = folder / "fp32", folder / "out"
    model = OSPNextTransformer(config)
    model.init_weights(torch.Generator().manual_seed(0))
    save_transformer(model, source)
    convert(source, target, naming="diffusers", dtype=BF16, quant=policy)
    load_transformer(target)
    (file,) = target.glob("*.safetensors")
    return sum(tensor.nbytes for tensor in load_file(file).values()), file.stat().st_size


def table() -> str:
    lines = ["| model | checkpoint | bytes of tensors | GiB | of bfloat16 | bytes of the file |"]
    lines.append("|---|---|--:|--:|--:|--:|")
    for model, config in (("small", SMALL), ("1.3B", PRESETS["1.3B"]), ("14B", PRESETS["14B"])):
        whole = tensor_bytes(config, None)
        for kind, policy in POLICIES.items():
            size, file = tensor_bytes(config, policy), "not written"
            if model == "small":
                with tempfile.TemporaryDirectory() as folder:
                    written, on_disk = written_bytes(config, policy, Path(folder))
                if written != size:
                    raise SystemExit(f"{model} {kind}: counted {size:,} bytes, the file holds {written:,}")
                file = f"{on_disk:,}"
            lines.append(f"| {model} | {kind} | {size:,} | {size / 2**30:.3f} | {size / whole:.1%} | {file} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the table to this file as well")
    out = parser.parse_args().out
    text = HEAD + table()
    print(text, end="")
    if out:
        out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

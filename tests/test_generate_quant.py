"""`ospnext generate` in HiFloat8: settings and what is refused, resuming, the pipeline, the plan, the report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ospnext.cli import main
from ospnext.errors import ConfigError
from ospnext.generation.config import GenerateConfig, QuantPolicyConfig
from ospnext.generation.jobs import Run, make_jobs
from ospnext.generation.manifest import read_manifest
from ospnext.generation.plan import make_plan
from ospnext.generation.prompt_files import PromptRow
from ospnext.generation.quantization import quant_policy
from ospnext.models import load_transformer, save_transformer
from ospnext.models.hif8_linear import HiF8Linear, StoredHiF8Linear
from ospnext.models.quantization import LINEARS, QuantPolicy, quantize_model
from ospnext.models.upstream_bf16 import UpstreamBf16Linear
from ospnext.ops import HiF8Recipe
from ospnext.pipelines import OSPNextPipeline, to_uint8, write_mp4, write_random_checkpoint

SMALL = ["video.height=32", "video.width=48", "video.num_frames=5", "sampling.num_inference_steps=1"]
EVERYTHING = QuantPolicy(quant="hif8", quant_attn="hif8")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model") / "tiny"
    write_random_checkpoint(directory, preset="tiny", seed=0)
    return directory


@pytest.fixture(scope="module")
def stored(tmp_path_factory, checkpoint):
    """The same checkpoint with the codes of ffn.0 instead of its weights."""
    directory = tmp_path_factory.mktemp("model") / "stored"
    directory.mkdir()
    for part in checkpoint.iterdir():
        if part.name != "transformer":
            (directory / part.name).symlink_to(part)
    transformer = load_transformer(checkpoint / "transformer")
    quantize_model(transformer, QuantPolicy(quant="hif8", linears=("ffn.0",)), store=True)
    save_transformer(transformer, directory / "transformer")
    return directory


def generate(*arguments) -> int:
    return main(["generate", "a red fox", *map(str, arguments)])


def forward(transformer) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    config = transformer.config
    latents = torch.randn(1, config.in_dim, 2, 4, 6, generator=generator)
    text = torch.randn(1, config.text_len, config.text_dim, generator=generator)
    with torch.inference_mode():
        return transformer(latents, torch.tensor([500.0]), text)


# ---- settings


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["quant=fp8"], "quant must be one of none, hif8, found 'fp8' (text)"),
        (["quant=hif8", "quant_policy.linear=ffn.0"], "unknown key 'quant_policy.linear' (did you mean"),
        (["quant=hif8", "quant_policy.scale_mode=power"], "quant_policy.scale_mode must be one of amax, pow2"),
        (["quant=hif8", "quant_policy.granularity=channel"], "quant_policy.granularity must be one of tensor, row"),
        (["quant=hif8", "quant_policy.linears=ffn.0,ffn.3"], "quant_policy.linears: 'ffn.3' is not one of self_attn.q"),
        (["quant=hif8", "quant_policy.linears=[]"], "quant_policy.linears is empty: quant=hif8 quantizes nothing"),
        (["quant_attn=hif8", "quant_policy.attention=self"], "quant_policy.attention: 'self' is not one of self_attn"),
        (["quant=hif8", "quant_policy.blocks=2-8"], "quant_policy.blocks '2-8': the model has blocks 0 to 7"),
        (["quant=hif8", "quant_policy.blocks=first"], "quant_policy.blocks must be 'all' or numbers"),
        (
            ["quant=hif8", "quant_policy.compat=upstream_bf16", "quant_policy.granularity=row"],
            "quant_policy.compat='upstream_bf16' has no granularity='row'",
        ),
        (["quant_policy.blocks=2"], "quant_policy.blocks has no effect without quant=hif8 or quant_attn=hif8"),
        (["quant_attn=hif8", "quant_policy.linears=ffn.0"], "quant_policy.linears has no effect without quant=hif8;"),
        (["quant=hif8", "quant_policy.attention=self_attn"], "has no effect without quant_attn=hif8;"),
    ],
)
def test_a_wrong_setting_is_refused_before_anything_loads(tmp_path, checkpoint, capsys, settings, expected):
    assert generate("--model", checkpoint, "--output", tmp_path / "out", *SMALL, *settings) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_names_are_a_list_or_text_with_commas(capsys):
    printed = []
    for value in ("[ffn.0, ffn.2]", "ffn.0,ffn.2", "ffn.0, ffn.2"):
        assert generate("--print-config", "quant=hif8", f"quant_policy.linears={value}", "quant_policy.blocks=3") == 0
        printed.append(capsys.readouterr().out)
    assert "  linears:\n  - ffn.0\n  - ffn.2\n  attention: null\n  blocks: 3\n" in printed[0]
    assert printed[0] == printed[1] == printed[2]


def test_settings_become_the_policy():
    assert quant_policy(GenerateConfig()) is None
    assert quant_policy(GenerateConfig(quant="hif8", quant_attn="hif8")) == EVERYTHING
    asked = QuantPolicyConfig(("ffn.2",), ("cross_attn",), "2-5", "pow2", "row")
    assert quant_policy(GenerateConfig(quant="hif8", quant_attn="hif8", quant_policy=asked)) == QuantPolicy(
        "hif8", "hif8", ("ffn.2",), ("cross_attn",), "2-5", HiF8Recipe(scale_mode="pow2", granularity="row")
    )
    compat = QuantPolicyConfig(blocks=2, compat="upstream_bf16")
    found = quant_policy(GenerateConfig(quant_attn="hif8", quant_policy=compat))
    assert found == QuantPolicy(quant_attn="hif8", blocks="2", compat="upstream_bf16")


# ---- the pipeline


@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_stored_codes_give_what_quantizing_in_each_call_gives(checkpoint, granularity):
    policy = QuantPolicy("hif8", "hif8", blocks="1-6", recipe=HiF8Recipe(granularity=granularity))
    pipeline = OSPNextPipeline.from_pretrained(
        checkpoint, dtype=torch.bfloat16, quant=policy, text_encoder=None, vae=None
    )
    plain = load_transformer(checkpoint / "transformer", dtype=torch.bfloat16)
    before = forward(plain)
    expected = forward(quantize_model(plain, policy))
    assert torch.equal(forward(pipeline.transformer), expected)
    assert not torch.equal(before, expected)
    kinds = [type(module) for module in pipeline.transformer.modules()]
    assert (kinds.count(StoredHiF8Linear), kinds.count(HiF8Linear)) == (6 * len(LINEARS), 0)


def test_compat_keeps_plain_weights(checkpoint):
    policy = QuantPolicy(quant="hif8", compat="upstream_bf16")
    pipeline = OSPNextPipeline.from_pretrained(checkpoint, quant=policy, text_encoder=None, vae=None)
    assert isinstance(pipeline.transformer.get_submodule("blocks.0.ffn.0"), UpstreamBf16Linear)


def test_a_transformer_that_is_passed_is_not_touched(checkpoint):
    transformer = load_transformer(checkpoint / "transformer")
    with pytest.raises(ConfigError, match="call quantize_model on the one that is passed"):
        OSPNextPipeline.from_pretrained(checkpoint, transformer=transformer, quant=EVERYTHING)
    assert type(transformer.get_submodule("blocks.0.ffn.0")) is torch.nn.Linear


def test_codes_are_not_quantized_again(tmp_path, stored, capsys):
    out = ["--model", stored, "--output", tmp_path / "out", *SMALL]
    assert generate(*out, "quant=hif8") == 2
    assert "has weights of linears as HiFloat8 codes already; leave quant out" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()  # found in the headers, before weights were read
    with pytest.raises(ConfigError, match="has weights of linears as HiFloat8 codes already; leave quant out"):
        OSPNextPipeline.from_pretrained(stored, quant=EVERYTHING, text_encoder=None, vae=None)
    assert generate(*out, "quant=hif8", "quant_policy.linears=ffn.2", "quant_attn=hif8", "--dry-run") == 0
    others = QuantPolicy("hif8", "hif8", linears=("ffn.2",))
    transformer = OSPNextPipeline.from_pretrained(stored, quant=others, text_encoder=None, vae=None).transformer
    kinds = [type(transformer.get_submodule(f"blocks.0.ffn.{n}")) for n in (0, 2)]
    assert kinds == [StoredHiF8Linear, StoredHiF8Linear]


def test_a_video_from_the_command_line_is_what_the_pipeline_makes(tmp_path, checkpoint, capsys):
    out = tmp_path / "out"
    settings = ["--model", checkpoint, "--output", out, *SMALL, "sampling.guidance_scale=1", "quant_policy.blocks=2-6"]
    assert generate(*settings, "quant=hif8", "quant_attn=hif8") == 0
    policy = QuantPolicy("hif8", "hif8", blocks="2-6")
    pipeline = OSPNextPipeline.from_pretrained(checkpoint, quant=policy)
    noise = torch.Generator().manual_seed(0)
    expected = pipeline("a red fox", None, 32, 48, 5, num_inference_steps=1, guidance_scale=1, generator=noise)
    write_mp4(to_uint8(expected.frames[0]), tmp_path / "expected.mp4", fps=16, quality=8)
    assert (out / "video_0.mp4").read_bytes() == (tmp_path / "expected.mp4").read_bytes()

    entry = read_manifest(out)["video_0.mp4"]
    assert (entry["quant"], entry["quant_attn"]) == ("hif8", "hif8")
    assert entry["quant_policy"] == {
        "linears": None,
        "attention": None,
        "blocks": "2-6",
        "scale_mode": "amax",
        "granularity": "tensor",
        "compat": "none",
        "attention_blocks": None,
    }
    capsys.readouterr()
    assert generate(*settings, "quant=hif8", "quant_attn=hif8", "--resume") == 0
    assert generate(*settings, "quant=hif8", "--resume") == 2
    assert "made with other settings: quant_attn was 'hif8' and is now 'none'" in capsys.readouterr().err
    other = "quant_policy.scale_mode=pow2"
    assert generate(*settings, "quant=hif8", "quant_attn=hif8", other, "--resume") == 2
    assert "quant_policy was " in capsys.readouterr().err

    manifest = out / "manifest.jsonl"  # of a version that did not know attention_blocks
    manifest.write_text(manifest.read_text().replace(', "attention_blocks": null', ""))
    assert "attention_blocks" not in read_manifest(out)["video_0.mp4"]["quant_policy"]
    assert generate(*settings, "quant=hif8", "quant_attn=hif8", "--resume") == 0
    other = "quant_policy.attention_blocks=3"
    assert generate(*settings, "quant=hif8", "quant_attn=hif8", other, "--resume") == 2


# ---- the plan


def plan_of(model: Path, **settings):
    config = GenerateConfig(prompt="a", **settings)
    run = Run(config, model, Path("out"), make_jobs(config, [(PromptRow("a"), "here")]))
    return make_plan(run, run.jobs, torch.device("cpu"))


ROWS = QuantPolicyConfig(("ffn.0", "self_attn.k"), None, "1-6", granularity="row")
UPSTREAM = QuantPolicyConfig(compat="upstream_bf16")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"quant": "hif8"},
        {"quant": "hif8", "quant_policy": ROWS},
        {"quant": "hif8", "quant_policy": UPSTREAM},
    ],
    ids=["none", "all", "rows", "compat"],
)
def test_the_plan_knows_the_memory_of_weights(checkpoint, settings):
    transformer = OSPNextPipeline.from_pretrained(
        checkpoint, dtype=torch.bfloat16, quant=quant_policy(GenerateConfig(**settings)), text_encoder=None, vae=None
    ).transformer
    held = sum(tensor.nbytes for tensor in transformer.state_dict().values())
    plain = sum(t.nbytes for t in load_transformer(checkpoint / "transformer", dtype=torch.bfloat16).parameters())
    plan = plan_of(checkpoint, dtype="bfloat16", **settings)
    (size,) = plan.sizes
    assert size.memory["transformer weights"] == held
    # While the model loads, what was not yet quantized is there too.
    assert size.memory.get("weights, until they are codes", 0) == plain - held
    assert (held < plain) == bool(settings and settings.get("quant_policy") is not UPSTREAM)


def test_the_plan_knows_codes_of_the_checkpoint(stored):
    plan = plan_of(stored)
    held = sum(tensor.nbytes for tensor in load_transformer(stored / "transformer").state_dict().values())
    assert plan.sizes[0].memory["transformer weights"] == held
    assert "weights, until they are codes" not in plan.sizes[0].memory
    assert "quantized_linear 48 -> 96 (ffn.0): reference.hif8" in plan.text()
    more = plan_of(stored, quant="hif8", quant_policy=QuantPolicyConfig(("ffn.2",)))
    freed = 8 * (48 * 96 * 3 - 4)  # 3 of 4 bytes of each ffn.2 in the 8 blocks, but for a scale
    assert more.sizes[0].memory["transformer weights"] == held - freed
    assert more.sizes[0].memory["weights, until they are codes"] == freed


def test_what_is_freed_after_loading_counts_for_the_peak_only_while_loading(checkpoint):
    (size,) = plan_of(checkpoint, quant="hif8").sizes
    memory = dict(size.memory)
    while_loading = memory.pop("weights, until they are codes")
    passing = max(while_loading, memory.pop("activations"), memory.pop("VAE decode"))
    assert size.peak_memory == sum(memory.values()) + passing


def test_the_plan_says_which_kernels_run_what_is_quantized(checkpoint):
    assert "HiFloat8" not in plan_of(checkpoint).text()
    text = plan_of(checkpoint, quant="hif8", quant_attn="hif8", quant_policy=ROWS).text()
    assert "quantize  HiFloat8 in blocks 1-6: ffn.0, self_attn.k (weights stored as codes); q, k and v of " in text
    assert "  quantized_linear 48 -> 96 (ffn.0): reference.hif8\n    reference.hif8  chosen " in text
    assert "quantized_linear 48 -> 48 (self_attn.k): reference.hif8" in text
    assert "quantized_attention: attention as above, of q, k and v after hif8_fake_quantize: reference.hif8" in text
    upstream = plan_of(checkpoint, quant="hif8", quant_policy=UPSTREAM).text()
    assert "weights quantized in each call" in upstream
    assert "compat=upstream_bf16" in upstream
    assert "hif8_encode for upstream_bf16: reference.hif8" in upstream
    assert "quantized_linear" not in upstream


# ---- the report


def test_the_report_is_printed_and_written_next_to_the_videos(tmp_path, checkpoint, capsys):
    out = tmp_path / "out"
    settings = ["--model", checkpoint, *SMALL, "sampling.guidance_scale=1", "--report-quant"]
    assert generate(*settings, "--output", out, "quant=hif8", "quant_policy.linears=ffn.0,self_attn.o") == 0
    report = json.loads((out / "quant_report.json").read_text())
    tokens, blocks, dim, ffn_dim = 2 * 2 * 3, 8, 48, 96
    assert {name: list(operands) for name, operands in report.items()} == {
        "self_attn.o": ["x", "weight"],
        "ffn.0": ["x", "weight"],
    }
    assert report["ffn.0"]["x"]["elements"] == blocks * tokens * dim  # one step, without guidance
    assert report["ffn.0"]["weight"]["elements"] == blocks * dim * ffn_dim
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("[1/1] ")
    assert [line.split()[:2] for line in printed[3:]] == [
        ["layer", "operand"],
        ["self_attn.o", "x"],
        ["self_attn.o", "weight"],
        ["ffn.0", "x"],
        ["ffn.0", "weight"],
    ]
    # What is counted changes no video.
    assert (
        generate(*settings[:-1], "--output", tmp_path / "plain", "quant=hif8", "quant_policy.linears=ffn.0,self_attn.o")
        == 0
    )
    assert (tmp_path / "plain" / "video_0.mp4").read_bytes() == (out / "video_0.mp4").read_bytes()
    assert not (tmp_path / "plain" / "quant_report.json").exists()


def test_codes_of_a_checkpoint_can_be_reported(tmp_path, stored):
    settings = ["--model", stored, "--output", tmp_path / "out", *SMALL, "sampling.guidance_scale=1", "--report-quant"]
    assert generate(*settings) == 0
    report = json.loads((tmp_path / "out" / "quant_report.json").read_text())
    assert list(report) == ["ffn.0"]
    assert report["ffn.0"]["weight"]["underflow"] is None


def test_a_report_on_nothing_is_refused_before_weights_are_read(tmp_path, checkpoint, capsys):
    settings = ["--model", checkpoint, "--output", tmp_path / "out", *SMALL, "--report-quant"]
    assert generate(*settings) == 2
    assert "nothing computes in HiFloat8; add quant=hif8 or quant_attn=hif8" in capsys.readouterr().err
    assert generate(*settings, "quant=hif8", "quant_policy.compat=upstream_bf16") == 2
    assert "--report-quant does not count layers of compat=upstream_bf16" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

"""Sizes of the mesh: which are legal, what is chosen for a number of ranks, and which settings go together. No process
is started."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from small_models import SMALL, random_model, sparse

from ospnext.cli import main
from ospnext.config import resolve
from ospnext.errors import ConfigError
from ospnext.generation.config import GenerateConfig, VideoConfig
from ospnext.generation.manifest import append_entry, merge_parts, read_manifest
from ospnext.generation.parallel import chosen_layout, idle_replicas
from ospnext.launch import Launch, launched
from ospnext.models import TransformerConfig, preset
from ospnext.models.parallelize import divisible, rank_tokens, share_samples
from ospnext.models.quantization import QuantPolicy, quantize_model
from ospnext.ops import HiF8Recipe
from ospnext.ops.device import device_of_rank
from ospnext.parallel import SequenceParallel
from ospnext.parallel.config import DIMENSIONS, Divisible, ParallelConfig, legal
from ospnext.pipelines.compile import CompiledTransformer

GUIDED = divisible(preset("14B"), branches=2)
DENSE = Divisible(1, 12, 2)


def test_what_a_model_has_to_divide():
    assert Divisible(4, 40, 2, full_blocks=True) == GUIDED
    assert divisible(preset("1.3B")) == Divisible(4, 12, 1, full_blocks=True)
    assert divisible(TransformerConfig()) == Divisible(1, 40, 1, full_blocks=True)
    assert divisible(preset("14B").replace(num_full_blocks=0, sparse_ratio=3)).full_blocks is False
    assert divisible(preset("14B").replace(num_full_blocks=0, sparse_ratio=3)).subsequences == 9


@pytest.mark.parametrize(
    ("divides", "world", "sizes"),
    [
        (GUIDED, 1, (1, 1, 1, 1)),
        (GUIDED, 2, (1, 2, 1, 1)),
        (GUIDED, 3, (1, 1, 1, 3)),
        (GUIDED, 4, (1, 2, 2, 1)),
        (GUIDED, 8, (1, 2, 4, 1)),
        (GUIDED, 16, (1, 2, 4, 2)),
        (GUIDED, 128, (2, 2, 4, 8)),  # 16 x 4 ranks would be more than the 40 heads
        (divisible(preset("14B")), 8, (1, 1, 4, 2)),
        (divisible(preset("tiny"), 2), 8, (2, 2, 2, 1)),  # two heads
        (DENSE, 8, (1, 2, 1, 4)),
        (DENSE, 14, (1, 2, 1, 7)),
        (DENSE, 26, (13, 2, 1, 1)),
    ],
)
def test_the_choice_for_a_number_of_ranks(divides, world, sizes):
    assert ParallelConfig.chosen(divides, world).sizes == sizes


def test_what_is_asked_for_is_kept_and_the_rest_chosen():
    def chosen(world, **asked):
        return ParallelConfig.chosen(GUIDED, world, dict.fromkeys(DIMENSIONS) | asked).sizes

    assert chosen(8, cfg=1) == (1, 1, 4, 2)
    assert chosen(8, dp=4) == (4, 2, 1, 1)
    assert chosen(8, ulysses=2) == (1, 2, 2, 2)
    assert chosen(8, dp=2, cfg=2, ssp=2, ulysses=1) == (2, 2, 2, 1)
    assert chosen(None, ssp=4) == (1, 1, 4, 1)
    assert chosen(None) == (1, 1, 1, 1)


def test_every_legal_layout_is_listed_once():
    """Against the rules, tried one after the other."""
    for divides, world in itertools.product([GUIDED, DENSE, Divisible(9, 4, 1, full_blocks=False)], range(1, 33)):
        brute = {
            sizes
            for sizes in itertools.product(range(1, world + 1), (1, 2), range(1, 10), range(1, world + 1))
            if sizes[0] * sizes[1] * sizes[2] * sizes[3] == world
            and sizes[1] <= divides.branches
            and divides.subsequences % sizes[2] == 0
            and sizes[3] * (sizes[2] if divides.full_blocks else 1) <= divides.heads
        }
        found = [layout.sizes for layout in legal(divides, world)]
        assert len(found) == len(set(found))
        assert set(found) == brute


@pytest.mark.parametrize(
    ("divides", "world", "asked", "message"),
    [
        (GUIDED, 3, {"ssp": 3}, "ssp=3: the model has 4 subsequences, .* ssp must be one of 1, 2, 4"),
        (DENSE, 4, {"ssp": 4}, "ssp=4: the model is dense, so ssp must be 1"),
        (
            divisible(preset("14B")),
            2,
            {"cfg": 2},
            r"cfg=2: there is no guidance \(guidance_scale <= 1\), so cfg must be 1",
        ),
        (GUIDED, 3, {"cfg": 3}, "cfg=3: guidance has 2 branches, so cfg must be one of 1, 2"),
        (GUIDED, 64, {"ssp": 4, "ulysses": 16}, "64 ranks would divide the 40 heads .* at most 10 with ssp=4"),
        (divisible(preset("tiny")), 4, {"ssp": 4}, "4 ranks would divide the 2 heads .* at most 1 with ssp=2$"),
        (Divisible(4, 2, 1, full_blocks=False), 4, {"ulysses": 3}, "3 ranks would divide the 2 heads of a block and"),
        (GUIDED, 8, {"dp": 3}, "dp=3: no layout of 8 ranks has that. Layouts: dp 1 x cfg 2 x ssp 4 x ulysses 1; "),
        (GUIDED, 8, {"cfg": 2, "ssp": 4, "dp": 2}, "dp=2: no layout of 8 ranks has that"),
        (GUIDED, 8, {"dp": 0}, "dp must be an integer of at least 1, found 0"),
        (GUIDED, 8, {"sp": 2}, "parallel.sp does not exist; sizes: dp, cfg, ssp, ulysses"),
    ],
)
def test_what_is_not_legal_says_what_is(divides, world, asked, message):
    with pytest.raises(ConfigError, match=message):
        ParallelConfig.chosen(divides, world, asked)


# ---- settings of a run


def run_layout(world, *, transformer=None, video=None, **settings):
    config = resolve(GenerateConfig, ("test", settings))
    jobs = [SimpleNamespace(video=video or VideoConfig())]
    return chosen_layout(config, transformer or preset("14B"), jobs, world)


def test_guidance_decides_how_many_branches_there_are():
    assert run_layout(8).sizes == (1, 2, 4, 1)
    assert run_layout(8, sampling={"guidance_scale": 1.0}).sizes == (1, 1, 4, 2)
    assert run_layout(None, parallel={"ssp": 2}).world == 2


BATCHED, COMPILED = {"sampling": {"batched_guidance": "on"}}, {"compile": "blocks"}
UPSTREAM = {"quant": "hif8", "quant_policy": {"compat": "upstream_bf16"}}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (BATCHED | {"parallel": {"cfg": 2}}, "parallel.cfg=2 on different ranks"),
        (BATCHED | {"parallel": {"dp": 1, "ssp": 4, "ulysses": 1}}, "parallel.cfg=2 on different ranks"),
        (
            COMPILED | {"parallel": {"ssp": 4}},
            r"compile=blocks: exchanges between ranks cannot be traced into a graph, .* share samples here \(dp 1 x "
            r"cfg 2 x ssp 4 x ulysses 1\): set parallel.ssp=1 parallel.ulysses=1, or compile=off$",
        ),
        (COMPILED | {"parallel": {"ulysses": 2}}, "compile=blocks: exchanges between ranks cannot be traced"),
        (COMPILED | {"parallel": {"dp": 1}}, "compile=blocks: exchanges between ranks cannot be traced"),
        (UPSTREAM | {"parallel": {"ssp": 4}}, "knows one process only"),
        (UPSTREAM | {"parallel": {"dp": 1}}, "knows one process only"),
        (
            {"parallel": {"payload": "hif8", "ssp": 1}},
            "payload=hif8 has no effect with ssp 1 .*: leave it out, or take ssp 2 or more, as a run that is resumed",
        ),
        ({"video": VideoConfig(height=32, width=48, num_frames=5)}, "leaves rank . without any"),
    ],
)
def test_settings_that_do_not_go_with_ranks(settings, message):
    with pytest.raises(ConfigError, match=message):
        run_layout(8, **settings)


def test_branches_alone_go_with_compilation():
    """What is exchanged then is outside of the model."""
    assert run_layout(2, compile="blocks").sizes == (1, 2, 1, 1)


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [
        (BATCHED, (1, 1, 4, 2)),
        (COMPILED, (4, 2, 1, 1)),
        (UPSTREAM, (4, 2, 1, 1)),
        (BATCHED | COMPILED, (8, 1, 1, 1)),
        (COMPILED | {"parallel": {"dp": 8}}, (8, 1, 1, 1)),
    ],
)
def test_sizes_that_are_not_given_follow_other_settings(settings, sizes):
    assert run_layout(8, **settings).sizes == sizes


def test_replicas_without_a_video_are_told():
    said = [idle_replicas(ParallelConfig(dp=8, cfg=2), videos) for videos in (1, 7, 8, 9)]
    assert said[2:] == [None, None]
    assert [line.partition(";")[0] for line in said[:2]] == [
        "dp 8: 7 replicas have no video",
        "dp 8: 1 replica has no video",
    ]


def test_tokens_of_ranks_add_up_and_are_counted_at_their_most():
    grid = (21, 45, 80)
    tokens = rank_tokens(preset("14B"), grid, ParallelConfig(ssp=4))
    assert max(tokens) == 19320
    assert 21 * 45 * 80 <= sum(tokens) < 1.03 * 21 * 45 * 80
    assert rank_tokens(TransformerConfig(), (1, 1, 10), ParallelConfig(ulysses=4)) == (3, 2, 3, 2)


# ---- the environment


TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}


def test_torchrun_is_known_by_what_it_sets(monkeypatch):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    assert launched() is None
    monkeypatch.setenv("RANK", "0")  # as platforms set it for hosts
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launched() is None
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert launched() == Launch(rank=5, world=8, local_rank=1, local_world=4)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert launched() is None


def test_half_an_environment_is_an_error_in_one_line(monkeypatch, capsys):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert main(["generate", "a fox", "--model", "nowhere"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "but not RANK, WORLD_SIZE, LOCAL_WORLD_SIZE: start ranks with torchrun, or unset LOCAL_RANK" in said


def test_each_rank_of_a_host_has_a_device_of_its_own(monkeypatch):
    chosen = []
    module = SimpleNamespace(device_count=lambda: 4, set_device=chosen.append)
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    assert device_of_rank(torch.device("cpu"), 3) == torch.device("cpu")
    assert device_of_rank(torch.device("xpu"), 3) == torch.device("xpu", 3)
    assert chosen == [torch.device("xpu", 3)]


# ---- the model


GROUP, OTHER = object(), object()


def sequence():
    return SequenceParallel(2, 1, 1, GROUP, OTHER)  # type: ignore[arg-type]


def groups_in(model):
    return {name: module.amax_group for name, module in model.named_modules() if hasattr(module, "amax_group")}


@pytest.mark.parametrize(("granularity", "shared"), [("tensor", True), ("row", False)])
def test_scales_of_whole_tensors_are_shared_and_those_of_tokens_are_not(granularity, shared):
    model = random_model(sparse(SMALL))
    quantize_model(model, QuantPolicy("hif8", "hif8", recipe=HiF8Recipe(granularity=granularity)), store=True)
    share_samples(model, sequence())
    found = groups_in(model)
    assert len(found) == 8 * 12  # ten linears and two attentions in each block
    for name, group in found.items():
        assert group is (GROUP if shared or name.endswith("attend") else None), name
    share_samples(model, sequence(), share_scales=False)
    assert set(groups_in(model).values()) == {None}
    share_samples(share_samples(model, sequence()), None)
    assert model.sequence is None
    assert set(groups_in(model).values()) == {None}


def test_a_model_is_quantized_before_it_shares_its_samples():
    """Afterwards its layers would scale by the tokens of one rank."""
    model = share_samples(random_model(sparse(SMALL)), sequence())
    with pytest.raises(ConfigError, match="quantize it first, and share it then"):
        quantize_model(model, QuantPolicy("hif8", "hif8"))
    assert type(model.blocks[0].ffn[0]) is torch.nn.Linear


def test_ranks_without_a_head_are_refused_before_they_exchange():
    model = random_model(sparse(SMALL))
    heads = model.config.num_heads
    with pytest.raises(ConfigError, match=f"{heads + 1} ranks would divide the {heads} heads"):
        share_samples(model, SequenceParallel(1, heads + 1, 0, GROUP, GROUP))
    with pytest.raises(ConfigError, match="ssp must be one of 1, 2, 4"):
        share_samples(model, SequenceParallel(3, 1, 0, GROUP, GROUP))
    assert model.sequence is None


def test_a_model_is_compiled_or_shares_its_samples():
    model = random_model(sparse(SMALL))
    compiled = CompiledTransformer(model, "blocks")
    with pytest.raises(ConfigError, match=r"the model is compiled, and exchanges .* set compile=off"):
        share_samples(model, sequence())
    assert model.sequence is None
    compiled.undo()
    share_samples(model, sequence())
    with pytest.raises(ConfigError, match="compile=blocks: the transformer shares its samples"):
        CompiledTransformer(model, "blocks")


def test_upstreams_quantization_shares_no_scales():
    model = quantize_model(random_model(sparse(SMALL)), QuantPolicy("hif8", compat="upstream_bf16"))
    with pytest.raises(ConfigError, match=r"blocks\.0\.self_attn\.q quantizes as upstream's training code"):
        share_samples(model, sequence())
    assert share_samples(model, sequence(), share_scales=False).sequence is not None


# ---- the manifest of several replicas


def test_parts_of_a_manifest_are_read_and_merged(tmp_path):
    append_entry(tmp_path, {"file": "a.mp4", "n": 0})
    append_entry(tmp_path, {"file": "b.mp4", "n": 1}, replica=1)
    append_entry(tmp_path, {"file": "c.mp4", "n": 2}, replica=11)
    append_entry(tmp_path, {"file": "a.mp4", "n": 3}, replica=1)
    assert {path.name for path in tmp_path.iterdir()} == {"manifest.jsonl", "manifest.1.jsonl", "manifest.11.jsonl"}
    expected = {"a.mp4": 3, "b.mp4": 1, "c.mp4": 2}
    assert {name: entry["n"] for name, entry in read_manifest(tmp_path).items()} == expected
    merge_parts(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.jsonl"]
    assert {name: entry["n"] for name, entry in read_manifest(tmp_path).items()} == expected

"""UMT5: the official key map against a plain version of the published encoder; strict loading, cleaning, padding."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from ospnext.errors import CheckpointError, ConfigError
from ospnext.pipelines import TextEncoder, t5_keys
from ospnext.pipelines.prompts import clean_prompt
from ospnext.pipelines.random_tokenizer import make_tokenizer

DIM, INNER, FFN, HEADS, LAYERS, BUCKETS = 24, 32, 40, 4, 3, 32
MAX_LENGTH = 160  # beyond 128, where relative positions share the last bucket
LONG_PROMPT = "a cat walks on the grass and two dogs run along the beach at sunset " * 9
PROMPTS = [LONG_PROMPT, "a red ball", ""]


def official_weights(vocab_size: int) -> dict[str, Tensor]:
    """Random weights under Wan's names. Norm weights are random too, so that swapping two of them shows."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int, std: float) -> Tensor:
        return std * torch.randn(*shape, generator=generator)

    weights = {"token_embedding.weight": normal(vocab_size, DIM, std=1), "norm.weight": 1 + normal(DIM, std=0.3)}
    for i in range(LAYERS):
        block = {
            "norm1": 1 + normal(DIM, std=0.3),
            "attn.q": normal(INNER, DIM, std=(DIM * INNER / HEADS) ** -0.5),
            "attn.k": normal(INNER, DIM, std=DIM**-0.5),
            "attn.v": normal(INNER, DIM, std=DIM**-0.5),
            "attn.o": normal(DIM, INNER, std=INNER**-0.5),
            "pos_embedding.embedding": normal(BUCKETS, HEADS, std=1),
            "norm2": 1 + normal(DIM, std=0.3),
            "ffn.gate.0": normal(FFN, DIM, std=DIM**-0.5),
            "ffn.fc1": normal(FFN, DIM, std=DIM**-0.5),
            "ffn.fc2": normal(DIM, FFN, std=FFN**-0.5),
        }
        weights |= {f"blocks.{i}.{name}.weight": tensor for name, tensor in block.items()}
    return weights


def plain_encoder(weights: dict[str, Tensor], ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
    """Wan's UMT5 encoder as described: pre-norm blocks, unscaled attention, one position bias per layer. In fp64."""
    w = {name.removesuffix(".weight"): tensor.double() for name, tensor in weights.items()}
    x = w["token_embedding"][ids_BL]
    for i in range(LAYERS):
        p = f"blocks.{i}."
        h = rms_norm(x, w[p + "norm1"])
        q, k, v = (
            (h @ w[p + name].T).unflatten(-1, (HEADS, -1)).transpose(1, 2) for name in ("attn.q", "attn.k", "attn.v")
        )
        bias_HLL = w[p + "pos_embedding.embedding"][position_buckets(ids_BL.shape[1])].permute(2, 0, 1)
        scores = (q @ k.transpose(-1, -2) + bias_HLL).masked_fill(mask_BL[:, None, None] == 0, -math.inf)
        x = x + (scores.softmax(-1) @ v).transpose(1, 2).flatten(2) @ w[p + "attn.o"].T
        h = rms_norm(x, w[p + "norm2"])
        gate = F.gelu(h @ w[p + "ffn.gate.0"].T, approximate="tanh")
        x = x + (h @ w[p + "ffn.fc1"].T * gate) @ w[p + "ffn.fc2"].T
    return rms_norm(x, w["norm"]) * mask_BL[..., None]


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def position_buckets(length: int) -> Tensor:
    """T5's relative position buckets, one scalar at a time: 16 per direction, 8 exact, 8 logarithmic up to 128."""

    def bucket(distance: int) -> int:
        side, d = (16, distance) if distance > 0 else (0, -distance)
        return side + (d if d < 8 else min(15, 8 + int(math.log(d / 8) / math.log(128 / 8) * 8)))

    return torch.tensor([[bucket(key - query) for key in range(length)] for query in range(length)])


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def weights(tokenizer_folder):
    return official_weights(len(make_tokenizer()))


@pytest.fixture(scope="module")
def official_file(tmp_path_factory, weights):
    path = tmp_path_factory.mktemp("t5") / "models_t5.pth"
    torch.save(weights, path)
    return path


def relative_error(encoder: TextEncoder, weights: dict[str, Tensor]) -> float:
    tokens = encoder.tokenizer(
        [clean_prompt(prompt) for prompt in PROMPTS], padding="max_length", max_length=MAX_LENGTH, return_tensors="pt"
    )
    assert tokens.attention_mask.sum(1).tolist()[0] > 128
    expected = plain_encoder(weights, tokens.input_ids, tokens.attention_mask)
    return ((encoder.encode(PROMPTS, MAX_LENGTH) - expected).norm() / expected.norm()).item()


def test_official_file_gives_the_published_encoder(official_file, tokenizer_folder, weights):
    encoder = TextEncoder.from_official(official_file, tokenizer_folder)
    # Measured 3e-7. Three layers of fp32 sums over at most 145 terms stay within 1e-5; a wrong key costs 1e-2 or more.
    assert relative_error(encoder, weights) <= 1e-5


@pytest.mark.parametrize(
    "pair", [("attn.q", "attn.k"), ("attn.k", "attn.v"), ("ffn.gate.0", "ffn.fc1"), ("norm1", "norm2")], ids="-".join
)
def test_a_swapped_key_is_seen(official_file, tokenizer_folder, weights, monkeypatch, pair):
    first, second = pair
    swapped = {first: t5_keys._BLOCK[second], second: t5_keys._BLOCK[first]}
    monkeypatch.setattr(t5_keys, "_BLOCK", {**t5_keys._BLOCK, **swapped})
    assert relative_error(TextEncoder.from_official(official_file, tokenizer_folder), weights) > 1e-2


def test_embedding_is_shared(official_file, tokenizer_folder, weights):
    model = TextEncoder.from_official(official_file, tokenizer_folder).model
    assert model.encoder.embed_tokens.weight is model.shared.weight
    assert torch.equal(model.shared.weight, weights["token_embedding.weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_is_applied_to_every_weight(official_file, tokenizer_folder, dtype):
    encoder = TextEncoder.from_official(official_file, tokenizer_folder, dtype=dtype)
    assert {parameter.dtype for parameter in encoder.model.parameters()} == {dtype}
    assert encoder.encode(["a cat"], 8).dtype == dtype


def test_float16_is_refused(official_file, tokenizer_folder):
    with pytest.raises(ConfigError, match="overflows in float16"):
        TextEncoder.from_official(official_file, tokenizer_folder, dtype=torch.float16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("blocks.1.attn.o.weight"), "1 missing: encoder.block.1.layer.0.SelfAttention.o.weight"),
        (lambda w: w.update({"blocks.1.attn.extra.weight": torch.ones(2)}), "1 unexpected: blocks.1.attn.extra.weight"),
        (lambda w: w.update({"blocks.2.ffn.fc2.weight": torch.ones(3, 5)}), r"wo.weight is \[3, 5\], not \[24, 40\]"),
        (lambda w: w.pop("token_embedding.weight"), "does not hold Wan's UMT5 encoder"),
    ],
    ids=["missing", "unexpected", "shape", "foreign"],
)
def test_official_file_is_loaded_strictly(tmp_path, weights, tokenizer_folder, change, message):
    broken = dict(weights)
    change(broken)
    torch.save(broken, tmp_path / "t5.pth")
    with pytest.raises(CheckpointError, match=message):
        TextEncoder.from_official(tmp_path / "t5.pth", tokenizer_folder)


def test_a_pickle_of_objects_is_refused(tmp_path, tokenizer_folder):
    torch.save({"token_embedding.weight": torch.nn.Linear(2, 2)}, tmp_path / "t5.pth")
    with pytest.raises(CheckpointError):
        TextEncoder.from_official(tmp_path / "t5.pth", tokenizer_folder)


@pytest.fixture
def folders(tmp_path, official_file, tokenizer_folder):
    encoder = TextEncoder.from_official(official_file, tokenizer_folder)
    encoder.save(tmp_path / "text_encoder", tmp_path / "tokenizer")
    return tmp_path


def test_diffusers_folder_round_trip(folders, official_file, tokenizer_folder):
    before = TextEncoder.from_official(official_file, tokenizer_folder)
    after = TextEncoder.from_diffusers(folders / "text_encoder", folders / "tokenizer")
    assert torch.equal(before.encode(PROMPTS, MAX_LENGTH), after.encode(PROMPTS, MAX_LENGTH))


def test_diffusers_folder_is_loaded_strictly(folders):
    file = folders / "text_encoder" / "model.safetensors"
    stored = load_file(file)
    del stored["encoder.block.0.layer.0.SelfAttention.q.weight"]
    save_file(stored, file)
    with pytest.raises(CheckpointError, match=r"1 missing: encoder\.block\.0\.layer\.0\.SelfAttention\.q\.weight"):
        TextEncoder.from_diffusers(folders / "text_encoder", folders / "tokenizer")


def test_two_different_embeddings_are_refused(folders):
    file = folders / "text_encoder" / "model.safetensors"
    stored = load_file(file)
    save_file({**stored, "encoder.embed_tokens.weight": stored["shared.weight"] + 1}, file)
    with pytest.raises(CheckpointError, match="UMT5 has one embedding"):
        TextEncoder.from_diffusers(folders / "text_encoder", folders / "tokenizer")


def test_both_names_of_one_embedding_are_accepted(folders):
    file = folders / "text_encoder" / "model.safetensors"
    stored = load_file(file)
    save_file({**stored, "encoder.embed_tokens.weight": stored["shared.weight"].clone()}, file)
    encoder = TextEncoder.from_diffusers(folders / "text_encoder", folders / "tokenizer")
    assert torch.equal(encoder.model.encoder.embed_tokens.weight, stored["shared.weight"])


def test_a_missing_tokenizer_is_named(folders):
    with pytest.raises(CheckpointError, match="not a tokenizer folder"):
        TextEncoder.from_diffusers(folders / "text_encoder", folders / "nothing")


def test_a_foreign_tokenizer_is_refused(tmp_path, tokenizer_folder):
    torch.save(official_weights(vocab_size=40), tmp_path / "t5.pth")
    with pytest.raises(CheckpointError, match="embeds 40"):
        TextEncoder.from_official(tmp_path / "t5.pth", tokenizer_folder)


def test_rows_past_the_text_are_zero_and_do_not_matter(official_file, tokenizer_folder):
    encoder = TextEncoder.from_official(official_file, tokenizer_folder)
    text_BLC = encoder.encode(["a red ball", "a cat walks on the grass"], 32)
    assert text_BLC.shape == (2, 32, DIM)
    used = (text_BLC.abs().sum(-1) > 0).tolist()
    assert used == [[i < length for i in range(32)] for length in (4, 7)]  # words and the end token
    # Alone, in a shorter row: the same text up to the rounding of sums of another length.
    assert torch.allclose(encoder.encode(["a red ball"], 8)[0, :4], text_BLC[0, :4], rtol=0, atol=1e-5)


def test_a_prompt_that_is_cut_is_reported(official_file, tokenizer_folder):
    encoder = TextEncoder.from_official(official_file, tokenizer_folder)
    with pytest.warns(UserWarning, match="has 7 tokens but the model reads 6"):
        encoder.encode(["a cat walks on the grass"], 6)
    encoder.encode(["a cat walks on the grass"], 7)  # fits exactly: no warning, and warnings are errors here


@pytest.mark.parametrize("prompts", ["a cat", [], ["a cat", None], [b"a cat"]])
def test_prompts_must_be_a_list_of_strings(official_file, tokenizer_folder, prompts):
    with pytest.raises(ConfigError, match="list of strings"):
        TextEncoder.from_official(official_file, tokenizer_folder).encode(prompts, 8)


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("  a\n\tcat \u00a0 walks ", "a cat walks"),
        ("R&amp;amp;B &lt;tag&gt;", "R&B <tag>"),
        ("<b> R&amp;amp;B", "<b> R&B"),  # ftfy leaves escapes alone next to a tag
        ("cafÃ©", "café"),
        ("一只猫", "一只猫"),
        ("", ""),
    ],
)
def test_prompt_cleaning(raw, clean):
    pipeline = pytest.importorskip("diffusers.pipelines.wan.pipeline_wan")
    assert clean_prompt(raw) == clean == pipeline.prompt_clean(raw)

"""What a call may ask for: wrong arguments are named before anything is computed, sizes are rounded with a warning."""

from __future__ import annotations

import pytest
import torch

from ospnext.errors import CheckpointError, ConfigError
from ospnext.models import OSPNextTransformer, preset
from ospnext.pipelines import OSPNextPipeline, TextEncoder, VideoAutoencoder, write_random_checkpoint

SMALL = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 1, "output_type": "latent"}
EMBEDS = torch.zeros(1, 64, 32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    write_random_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def pipe(checkpoint):
    return OSPNextPipeline.from_pretrained(checkpoint)


@pytest.fixture
def idle_pipe(pipe, monkeypatch):
    """A pipeline in which nothing may run."""

    def refuse(*args, **kwargs):
        raise AssertionError("work was done before the arguments were checked")

    for owner, name in (
        (pipe.transformer, "forward"), (pipe.transformer, "encode_text"), (pipe.text_encoder.model, "forward"),
        (pipe.vae.model, "decode"), (torch, "randn"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, refuse)
    return pipe


def device_generator() -> torch.Generator:
    """A generator that says it is on an accelerator; this machine may have none."""

    class Elsewhere(torch.Generator):
        device = torch.device("meta")

    return Elsewhere()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": None}, "pass either prompt or prompt_embeds, one is needed"),
        ({"prompt_embeds": EMBEDS}, "pass either prompt or prompt_embeds, not both"),
        ({"prompt": []}, "prompt must be a string or a non-empty list of strings"),
        ({"prompt": ["a", 3]}, "prompt must be a string or a non-empty list of strings"),
        ({"prompt": b"a cat"}, "prompt must be a string or a non-empty list of strings"),
        ({"negative_prompt": 3}, "negative_prompt must be a string"),
        ({"negative_prompt": ["a", "b"]}, "1 prompts but 2 negative ones"),
        ({"prompt": ["a", "b"], "negative_prompt": ["x"]}, "2 prompts but 1 negative ones"),
        ({"negative_prompt": "x", "negative_prompt_embeds": EMBEDS}, "negative_prompt_embeds, not both"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 65, 32)}, r"up to 64 tokens, 32\] .* got \[1, 65, 32\]"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 64, 31)}, r"got \[1, 64, 31\]"),
        ({"prompt": None, "prompt_embeds": torch.zeros(64, 32)}, r"got \[64, 32\]"),
        ({"prompt": None, "prompt_embeds": [[0.0]]}, "prompt_embeds must be a floating-point tensor, got list"),
        ({"prompt": None, "prompt_embeds": EMBEDS.long()}, "must be a floating-point tensor, got torch.int64"),
        ({"height": 15}, "height must be an integer of at least 16, got 15"),
        ({"width": 48.0}, "width must be an integer of at least 16, got 48.0"),
        ({"num_frames": 0}, "num_frames must be an integer of at least 1, got 0"),
        ({"num_inference_steps": 0}, "num_inference_steps must be an integer of at least 1, got 0"),
        ({"num_inference_steps": True}, "num_inference_steps must be an integer"),
        ({"num_videos_per_prompt": 0}, "num_videos_per_prompt must be"),
        ({"max_sequence_length": 0}, "max_sequence_length must be"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a finite number, got nan"),
        ({"guidance_scale": "5"}, "guidance_scale must be a finite number, got '5'"),
        ({"output_type": "mp4"}, "output_type must be one of np, pt, pil, latent, got 'mp4'"),
        ({"generator": 42}, "generator must be a torch.Generator or a list"),
        ({"generator": [torch.Generator()] * 3}, "3 generators for 1 videos"),
        ({"generator": device_generator()}, "noise is drawn on the CPU"),
        ({"latents": torch.zeros(1, 16, 2, 4, 4)}, r"latents must be \[1, 16, 2, 4, 6\] .* got \[1, 16, 2, 4, 4\]"),
        ({"latents": torch.zeros(1, 16, 2, 4, 6).int()}, "latents must be a floating-point tensor"),
        ({"callback_on_step_end": 3}, "callback_on_step_end must be callable"),
        ({"callback_on_step_end_tensor_inputs": ["noise_pred"]}, "may name latents, .* got noise_pred"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_wrong_arguments_are_named_before_any_work(idle_pipe, arguments, message):
    with pytest.raises(ConfigError, match=message):
        idle_pipe(**{"prompt": "a cat", **SMALL, **arguments})


def test_absent_parts_are_named_before_any_work(idle_pipe, checkpoint):
    pipe = OSPNextPipeline.from_pretrained(checkpoint, transformer=idle_pipe.transformer, text_encoder=None, vae=None)
    with pytest.raises(ConfigError, match="no text encoder: pass prompt_embeds"):
        pipe("a cat", **SMALL)
    with pytest.raises(ConfigError, match="no text encoder"):  # the negative prompt needs it too
        pipe(prompt_embeds=EMBEDS, **SMALL)
    with pytest.raises(ConfigError, match="no autoencoder: ask for output_type='latent'"):
        pipe(prompt_embeds=EMBEDS, guidance_scale=1.0, **{**SMALL, "output_type": "np"})
    with pytest.raises(ConfigError, match="whole pipelines"):
        pipe.save_pretrained(checkpoint)


@pytest.mark.parametrize(
    ("asked", "latent_shape"),
    [
        ({"num_frames": 80}, (21, 4, 6)),
        ({"num_frames": 4}, (2, 4, 6)),
        ({"num_frames": 2}, (1, 4, 6)),
        ({"height": 47}, (2, 4, 6)),
        ({"width": 79}, (2, 4, 8)),
    ],
)
def test_sizes_are_rounded_with_a_warning(pipe, asked, latent_shape):
    with pytest.warns(UserWarning, match="become") as caught:
        latents = pipe("a cat", **{**SMALL, **asked}).frames
    assert latents.shape == (1, 16, *latent_shape)
    assert caught[0].filename == __file__  # the warning points at the caller
    assert len(caught) == 1


@pytest.mark.parametrize("frames", [1, 5, 9])
def test_fitting_sizes_are_kept_silently(pipe, frames):
    result = pipe("a cat", **{**SMALL, "num_frames": frames, "output_type": "np"}).frames
    assert result.shape == (1, frames, 32, 48, 3)


def test_videos_of_one_prompt_are_neighbours(pipe):
    """Video i of prompt p is what p gives alone with generator 2p + i."""
    prompts = ["a cat", "two dogs run along the beach"]
    generators = [torch.Generator().manual_seed(i) for i in range(4)]
    together = pipe(prompts, ["", "blue"], **SMALL, num_videos_per_prompt=2, generator=generators).frames
    for i in range(4):
        alone = pipe(prompts[i // 2], ["", "blue"][i // 2], **SMALL, generator=torch.Generator().manual_seed(i)).frames
        # Another batch size: fp32 sums in another order.
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-5)
    assert (together[0] - together[2]).abs().max() > 1e-2


def test_long_prompts_are_cut_at_the_shorter_limit(pipe):
    prompt = "a cat walks on the grass " * 20

    def sample(text, **options):
        return pipe(text, **SMALL, guidance_scale=1.0, generator=torch.Generator().manual_seed(0), **options).frames

    with pytest.warns(UserWarning, match="121 tokens but the model reads 64"):
        whole = sample(prompt)
    with pytest.warns(UserWarning, match="121 tokens but the model reads 7"):
        cut = sample(prompt, max_sequence_length=7)
    # The text encoder sums over 7 keys here and over 64 masked ones there.
    torch.testing.assert_close(cut, sample("a cat walks on the grass"), rtol=0, atol=1e-5)
    assert (cut - whole).abs().max() > 1e-2


def test_parts_of_different_models_do_not_meet(pipe):
    narrow = OSPNextTransformer(preset("tiny").replace(text_dim=16))
    with pytest.raises(CheckpointError, match="text of width 16 but the text encoder gives 32"):
        OSPNextPipeline(narrow, pipe.text_encoder, None)
    fewer = OSPNextTransformer(preset("tiny").replace(in_dim=8, out_dim=8))
    with pytest.raises(CheckpointError, match="8 latent channels in and 8 out but the autoencoder has 16"):
        OSPNextPipeline(fewer, None, pipe.vae)
    with pytest.raises(ConfigError, match="unknown solver 'heun'"):
        OSPNextPipeline(pipe.transformer, None, None, solver="heun")


def test_to_moves_every_part(checkpoint):
    pipe = OSPNextPipeline.from_pretrained(checkpoint)
    assert pipe.to("meta") is pipe
    assert isinstance(pipe.text_encoder, TextEncoder)
    assert isinstance(pipe.vae, VideoAutoencoder)
    devices = {part.device.type for part in (pipe.transformer, pipe.text_encoder, pipe.vae)}
    assert devices == {"meta"}

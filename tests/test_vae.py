"""The video autoencoder: official names, strict loading, normalisation and decoding, against diffusers."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file
from wan_official_names import official_vae

from ospnext.errors import CheckpointError, ConfigError
from ospnext.pipelines import VideoAutoencoder


@pytest.fixture(scope="module")
def reference() -> AutoencoderKLWan:
    torch.manual_seed(0)
    model = AutoencoderKLWan(base_dim=8).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith(("gamma", "bias")):  # ones and zeros by default: every tensor must be told from every other
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def latents() -> torch.Tensor:
    return torch.randn(2, 16, 3, 4, 6, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def official(reference):
    state = reference.state_dict()
    named = {official_vae(name): tensor for name, tensor in state.items()}
    assert len(named) == len(state)
    return named


def test_official_file_loads_every_tensor_to_its_place(tmp_path, reference, official):
    torch.save(official, tmp_path / "vae.pth")
    loaded = VideoAutoencoder.from_official(tmp_path / "vae.pth").model.state_dict()
    expected = reference.state_dict()
    assert loaded.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(loaded[name], expected[name])] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("decoder.upsamples.3.time_conv.weight"), "1 missing: decoder.up_blocks.0.upsamplers"),
        (lambda w: w.update({"decoder.extra.weight": torch.ones(1)}), "1 unexpected: decoder.extra.weight"),
        (lambda w: w.update({"conv2.bias": torch.ones(3)}), r"post_quant_conv.bias is \[3\], not \[16\]"),
        (lambda w: w.pop("encoder.conv1.weight"), "does not hold Wan2.1's autoencoder"),
    ],
    ids=["missing", "unexpected", "shape", "foreign"],
)
def test_official_file_is_loaded_strictly(tmp_path, official, change, message):
    broken = dict(official)
    change(broken)
    torch.save(broken, tmp_path / "vae.pth")
    with pytest.raises(CheckpointError, match=message):
        VideoAutoencoder.from_official(tmp_path / "vae.pth")


def test_diffusers_folder(tmp_path, reference, latents):
    reference.save_pretrained(tmp_path)
    loaded = VideoAutoencoder.from_diffusers(tmp_path)
    expected = reference.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.model.state_dict().items())
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    stored = load_file(file)
    del stored["decoder.conv_in.weight"]
    save_file(stored, file)
    with pytest.raises(CheckpointError, match=r"1 missing: decoder\.conv_in\.weight"):
        VideoAutoencoder.from_diffusers(tmp_path)


def test_decode_is_diffusers_decode_after_denormalisation(reference, latents):
    config = reference.config
    mean = torch.tensor(config.latents_mean, dtype=torch.float64).view(1, 16, 1, 1, 1)
    std = torch.tensor(config.latents_std, dtype=torch.float64).view(1, 16, 1, 1, 1)
    expected = reference.decode((latents.double() * std + mean).float(), return_dict=False)[0]
    frames = VideoAutoencoder(reference).decode(latents)
    assert frames.shape == (2, 9, 32, 48, 3)
    assert frames.dtype == torch.float32
    assert frames.std() > 0.05  # else the next line compares constants
    # The latents differ by one rounding, and videos are decoded one by one: measured 7e-7.
    torch.testing.assert_close(frames, (expected.permute(0, 2, 3, 4, 1) + 1) / 2, rtol=0, atol=1e-5)


def test_decode_keeps_to_0_1(reference, latents):
    frames = VideoAutoencoder(reference).decode(50 * latents)
    assert (frames.min(), frames.max()) == (0, 1)


def test_tiling_changes_little_and_is_on(reference):
    vae = VideoAutoencoder(AutoencoderKLWan(base_dim=8).eval())
    vae.model.load_state_dict(reference.state_dict())
    # One smooth latent larger than a tile (256 pixels = 32 latent positions).
    ramp = torch.linspace(-1, 1, 40)
    latents = (ramp[:, None] + ramp).expand(1, 16, 1, 40, 40).contiguous()
    whole = vae.decode(latents)
    vae.enable_tiling()
    calls = []
    vae.model.decoder.register_forward_hook(lambda *_: calls.append(1))
    tiled = vae.decode(latents)
    assert len(calls) > 1
    assert tiled.shape == whole.shape
    assert (tiled - whole).abs().mean() < 0.1 * whole.std()


def test_wrong_latents_and_wrong_autoencoders_are_refused(reference):
    with pytest.raises(ConfigError, match=r"\[B, 16, T, height/8, width/8\], got \[2, 4, 1, 2, 2\]"):
        VideoAutoencoder(reference).decode(torch.zeros(2, 4, 1, 2, 2))
    with pytest.raises(CheckpointError, match="turns 4 frames and 16 pixels"):
        VideoAutoencoder(AutoencoderKLWan(base_dim=8, scale_factor_spatial=16))


def test_another_model_in_the_folder_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(CheckpointError, match="'AutoencoderKL', expected an 'AutoencoderKLWan'"):
        VideoAutoencoder.from_diffusers(tmp_path)

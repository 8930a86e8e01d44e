"""The pipeline against diffusers' WanPipeline on one checkpoint, and its own habits: guidance, callbacks, storage."""

from __future__ import annotations

import inspect
import json
from collections import Counter

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from diffusers.utils.torch_utils import randn_tensor

from ospnext.errors import ConfigError, OSPNextError
from ospnext.pipelines import OSPNextPipeline, write_random_checkpoint

PROMPTS = ["a cat walks on the grass", "two dogs run along the beach at sunset"]
NEGATIVE = "blurred"
SIZE = {"height": 48, "width": 80, "num_frames": 9}
STEPS = 4
# How far two correct fp32 runs may be apart, relative to the largest value: each may be 4 * 2.6e-6 from the fp64 run of
# test_frames_equal_those_of_wan_pipeline.
TWO_FP32_RUNS = 2e-5


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The tiny random checkpoint, with norms and biases moved off one and zero, so that confusing two of them shows."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    write_random_checkpoint(folder)
    pipe = OSPNextPipeline.from_pretrained(folder)
    generator = torch.Generator().manual_seed(5)
    for model in (pipe.transformer, pipe.vae.model):
        for parameter in model.parameters():
            if parameter.squeeze().ndim == 1:
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sparse(checkpoint):
    """As stored: Skiparse-2D attention, UniPC."""
    pipe = OSPNextPipeline.from_pretrained(checkpoint)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def ours(checkpoint):
    """As the dense Wan2.1 model that diffusers sees in this checkpoint, with Euler."""
    pipe = OSPNextPipeline.from_pretrained(checkpoint, transformer_overrides={"skiparse_model_type": "full"})
    pipe.set_progress_bar_config(disable=True)
    pipe.solver = "euler"
    return pipe


class EulerWithOurSigmas(FlowMatchEulerDiscreteScheduler):
    """diffusers' Euler; it spaces sigmas in another way than Wan does unless it is told them."""

    def set_timesteps(self, num_inference_steps, device=None):
        super().set_timesteps(sigmas=self.ours.sigmas(num_inference_steps)[:-1].tolist(), device=device)


class EulerFp64(EulerWithOurSigmas):
    """The same steps without diffusers' rounding of the latents to fp32."""

    def step(self, velocity, timestep, sample, return_dict=False):
        if self.step_index is None:
            self._init_step_index(timestep)
        i = self._step_index
        self._step_index += 1
        return (sample.double() + (self.sigmas[i + 1] - self.sigmas[i]).double() * velocity,)


def diffusers_pipeline(checkpoint, ours, scheduler=EulerWithOurSigmas):
    pipe = WanPipeline.from_pretrained(checkpoint)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = scheduler(shift=1.0)
    pipe.scheduler.ours = ours.schedule
    return pipe


@pytest.fixture(scope="module")
def theirs(checkpoint, ours):
    return diffusers_pipeline(checkpoint, ours)


def seeded(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_signature_is_that_of_wan_pipeline():
    # guidance_scale_2 is for Wan2.2's second transformer, attention_kwargs for diffusers' processors: we have neither.
    theirs = {
        name: parameter.default
        for name, parameter in inspect.signature(WanPipeline.__call__).parameters.items()
        if name not in ("guidance_scale_2", "attention_kwargs")
    }
    ours = {name: p.default for name, p in inspect.signature(OSPNextPipeline.__call__).parameters.items()}
    assert list(ours) == list(theirs)
    theirs["callback_on_step_end_tensor_inputs"] = tuple(theirs["callback_on_step_end_tensor_inputs"])
    assert ours == theirs


def test_prompts_are_encoded_as_by_wan_pipeline(ours, theirs):
    text_len = ours.transformer.config.text_len
    with torch.no_grad():  # as in its __call__: with gradients, attention takes another kernel
        expected = theirs.encode_prompt(PROMPTS, NEGATIVE, max_sequence_length=text_len)
    found = ours.encode_prompt(PROMPTS, [NEGATIVE, NEGATIVE])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert found[0].std() > 0.1
    assert not torch.equal(found[0][0], found[0][1])


def test_frames_equal_those_of_wan_pipeline(checkpoint, ours, theirs, monkeypatch):
    """Dense, guidance on: each frame is as close to an fp64 run of diffusers as diffusers' own fp32 run, times 4."""
    embeds, negative = ours.encode_prompt(PROMPTS, NEGATIVE)
    latents = torch.randn(2, 16, 3, 6, 10, generator=seeded())
    request = {
        **SIZE, "num_inference_steps": STEPS, "guidance_scale": 5.0, "latents": latents,
        "prompt_embeds": embeds, "negative_prompt_embeds": negative,
    }  # fmt: skip
    diffusers_frames, our_frames = theirs(**request).frames, ours(**request).frames

    oracle = diffusers_pipeline(checkpoint, ours, EulerFp64).to(torch.float64)
    with monkeypatch.context() as patch:
        # diffusers upcasts norms, modulation and timesteps with .float(), which would be a downcast here.
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        exact = oracle(**request, output_type="pt").frames.permute(0, 1, 3, 4, 2).numpy()
    assert exact.dtype == np.float64

    def error_by_frame(frames):
        return np.abs(frames - exact).max(axis=(2, 3, 4)), np.sqrt(np.square(frames - exact).mean(axis=(2, 3, 4)))

    (our_max, our_rms), (their_max, their_rms) = error_by_frame(our_frames), error_by_frame(diffusers_frames)
    assert our_frames.shape == (2, 9, 48, 80, 3)
    assert exact.std() > 0.05  # else the clips are constant and anything would agree
    # Same dtype, other order of sums: both errors are roundings. Measured, on frames in 0..1: ours at most 2.7e-6, and
    # 3.8e-7 rms in any frame; those of diffusers 2.6e-6 and 3.9e-7.
    assert (our_rms <= 4 * their_rms).all()
    assert (our_max <= 4 * their_max.max()).all()


def test_everything_from_prompts_equals_wan_pipeline(ours, theirs):
    request = {
        **SIZE, "prompt": PROMPTS, "negative_prompt": [NEGATIVE, ""], "num_inference_steps": STEPS,
        "guidance_scale": 3.0, "num_videos_per_prompt": 2,
    }  # fmt: skip
    length = {"max_sequence_length": ours.transformer.config.text_len}
    expected = theirs(**request, **length, generator=[seeded(i) for i in range(4)])
    found = ours(**request, generator=[seeded(i) for i in range(4)])
    np.testing.assert_allclose(found.frames, expected.frames, rtol=0, atol=TWO_FP32_RUNS)
    assert np.abs(found.frames[0] - found.frames[1]).max() > 0.1  # the same prompt, another seed


@pytest.mark.parametrize("output_type", ["np", "pt", "pil", "latent"])
def test_output_types_equal_wan_pipeline(ours, theirs, output_type):
    request = {**SIZE, "prompt": PROMPTS[0], "num_inference_steps": 1, "output_type": output_type}
    length = {"max_sequence_length": ours.transformer.config.text_len}
    expected = theirs(**request, **length, generator=seeded()).frames
    found = ours(**request, generator=seeded()).frames
    assert type(found) is type(expected)
    if output_type == "pil":
        assert [len(video) for video in found] == [len(video) for video in expected] == [9]
        assert found[0][0].size == expected[0][0].size == (80, 48)
        found, expected = (np.stack([np.asarray(image) for image in frames[0]]) for frames in (found, expected))
        assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1
    else:
        assert found.dtype == expected.dtype
        assert found.shape == expected.shape
        found, expected = torch.as_tensor(found), torch.as_tensor(expected)
        torch.testing.assert_close(found, expected, rtol=0, atol=TWO_FP32_RUNS * expected.abs().max().item())


def test_return_dict_false_gives_a_tuple(ours):
    request = {**SIZE, "prompt": PROMPTS[0], "num_inference_steps": 1, "output_type": "latent"}
    (frames,) = ours(**request, generator=seeded(), return_dict=False)
    assert torch.equal(frames, ours(**request, generator=seeded()).frames)


def test_latents_are_denormalised_as_in_wan_pipeline(ours, theirs, monkeypatch):
    latents = torch.randn(1, 16, 3, 6, 10, generator=seeded())
    received = []
    decode = theirs.vae.decode
    monkeypatch.setattr(theirs.vae, "decode", lambda z, **kw: received.append(z) or decode(z, **kw))
    # Velocity zero: the latents that go in are those that come out.
    monkeypatch.setattr(theirs.transformer, "forward", lambda hidden_states, **_: (torch.zeros_like(hidden_states),))
    theirs(PROMPTS[0], **SIZE, num_inference_steps=1, latents=latents, max_sequence_length=64)
    # They divide by 1/std, we multiply by std: one rounding apart.
    torch.testing.assert_close(ours.vae.denormalise(latents), received[0], rtol=2**-22, atol=2**-22)


@pytest.mark.parametrize("seeds", [[3], [3, 4]], ids=["one generator", "one per video"])
def test_noise_is_that_of_wan_pipeline(ours, seeds, monkeypatch):
    generators = [seeded(seed) for seed in seeds]
    expected = randn_tensor((2, 16, 3, 6, 10), generator=[seeded(seed) for seed in seeds], dtype=torch.float32)
    first = []
    forward = ours.transformer.forward
    monkeypatch.setattr(ours.transformer, "forward", lambda x, t, text: first.append(x) or forward(x, t, text))
    generator = generators if len(seeds) > 1 else generators[0]
    ours(PROMPTS, **SIZE, num_inference_steps=1, guidance_scale=1, generator=generator, output_type="latent")
    assert torch.equal(first[0], expected)
    assert first[0].dtype == torch.float32


def count_calls(pipe, monkeypatch) -> Counter:
    calls: Counter = Counter()

    def counted(name):
        call = getattr(pipe.transformer, name)
        return lambda *args: calls.update([name]) or call(*args)

    for name in ("forward", "encode_text"):
        monkeypatch.setattr(pipe.transformer, name, counted(name))
    return calls


@pytest.mark.parametrize(
    ("scale", "batched", "passes"), [(5.0, "off", 2), (5.0, "on", 1), (1.0, "on", 1), (0.0, "off", 1)]
)
def test_guidance_doubles_the_passes_or_the_batch_and_text_is_projected_once(
    sparse, monkeypatch, scale, batched, passes
):
    monkeypatch.setattr(sparse, "batched_guidance", batched)
    calls = count_calls(sparse, monkeypatch)
    sparse(PROMPTS[0], **SIZE, num_inference_steps=3, guidance_scale=scale, output_type="latent")
    assert calls == {"forward": 3 * passes, "encode_text": passes}


def test_guidance_off_ignores_the_negative_prompt(sparse):
    request = {**SIZE, "prompt": PROMPTS[0], "num_inference_steps": 2, "output_type": "latent"}
    plain = sparse(**request, guidance_scale=1.0, generator=seeded()).frames
    ignored = sparse(**request, guidance_scale=1.0, negative_prompt=NEGATIVE, generator=seeded()).frames
    assert torch.equal(plain, ignored)
    guided = sparse(**request, guidance_scale=5.0, generator=seeded()).frames
    other = sparse(**request, guidance_scale=5.0, negative_prompt=NEGATIVE, generator=seeded()).frames
    assert not torch.equal(plain, guided)
    assert not torch.equal(guided, other)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_batched_guidance_changes_roundings_only(checkpoint, dtype, bound):
    """Of latents, relative to the largest: four steps multiply the roundings of two passes by the guidance scale."""
    found = []
    for batched in ("on", "off"):
        pipe = OSPNextPipeline.from_pretrained(checkpoint, vae=None, batched_guidance=batched)
        pipe.transformer.to(dtype)
        pipe.set_progress_bar_config(disable=True)
        pipe.solver = "euler"  # whose latents are fp32 all the same
        request = {**SIZE, "prompt": PROMPTS, "negative_prompt": [NEGATIVE, ""], "num_inference_steps": STEPS}
        found.append(pipe(**request, num_videos_per_prompt=2, generator=seeded(), output_type="latent").frames)
    largest = found[1].abs().max()
    assert not torch.equal(found[0][0], found[0][1])
    assert (found[0] - found[1]).abs().max() <= max(bound, 2**-22) * largest


def test_batched_guidance_replaces_both_prompts(sparse, monkeypatch):
    """A callback that changes one side of the text has the effect it has with one pass after the other."""
    embeds, negative = sparse.encode_prompt(PROMPTS, NEGATIVE)
    found = []
    for batched in ("on", "off"):
        monkeypatch.setattr(sparse, "batched_guidance", batched)
        found.append(
            sparse(
                prompt_embeds=embeds[:1], negative_prompt_embeds=negative[:1], **SIZE, num_inference_steps=3,
                generator=seeded(), output_type="latent",
                callback_on_step_end=lambda p, i, t, given: {"prompt_embeds": embeds[1:]} if i == 0 else {},
            ).frames
        )  # fmt: skip
    torch.testing.assert_close(*found, rtol=0, atol=TWO_FP32_RUNS * found[1].abs().max().item())


@pytest.mark.parametrize("batched", ["on", "off"])
def test_a_callback_may_end_guidance_and_begin_it_again(sparse, monkeypatch, batched):
    """The unguided step is that of a run without guidance: a step of Euler's method knows nothing of those before."""
    monkeypatch.setattr(sparse, "batched_guidance", batched)
    monkeypatch.setattr(sparse, "solver", "euler")
    embeds, negative = sparse.encode_prompt(PROMPTS[0], NEGATIVE)
    request = {**SIZE, "prompt_embeds": embeds, "num_inference_steps": 3, "output_type": "latent"}
    seen = {}

    def callback(changes):
        def on_step_end(pipe, i, t, given):
            seen[i] = given["latents"]
            return changes.get(i, {})

        return {"callback_on_step_end": on_step_end, "generator": seeded()}

    off, on = {"negative_prompt_embeds": None}, {"negative_prompt_embeds": negative}
    guided = sparse(**request, **on, **callback({})).frames
    guided_first = seen[0]
    sizes = []
    forward = sparse.transformer.forward
    monkeypatch.setattr(sparse.transformer, "forward", lambda x, *args: sizes.append(len(x)) or forward(x, *args))
    found = sparse(**request, **on, **callback({0: off, 1: on})).frames
    assert sizes == ([2, 1, 2] if batched == "on" else [1] * 5)
    assert torch.equal(seen[0], guided_first) and not torch.equal(found, guided)
    middle = seen[1]
    # Without guidance, from the same latents, the second step is the same.
    steps = []

    def alone(pipe, i, t, given):
        steps.append(given["latents"])
        return {"latents": guided_first} if i == 0 else {}

    sparse(**request, guidance_scale=1.0, generator=seeded(), callback_on_step_end=alone)
    assert torch.equal(steps[1], middle)
    with pytest.raises(ConfigError, match="prompt_embeds must be a tensor, but a callback made it None"):
        sparse(**request, **on, **callback({0: {"prompt_embeds": None}}))


def test_what_was_decided_is_known(sparse, monkeypatch):
    for setting in ("on", "off"):
        monkeypatch.setattr(sparse, "batched_guidance", setting)
        monkeypatch.setattr(sparse, "vae_tiling", setting)
        sparse(PROMPTS[0], **SIZE, num_inference_steps=1)
        assert sparse.decided == {"batched": setting == "on", "tiled": setting == "on", "shared": False}


@pytest.mark.parametrize("name", ["batched_guidance", "vae_tiling", "vae_parallel", "compile"])
def test_an_unknown_way_to_run_lists_the_known(checkpoint, sparse, monkeypatch, name):
    expected = "off, blocks, max; got 'fast'" if name == "compile" else "auto, on, off; got 'fast'"
    with pytest.raises(ConfigError, match=f"{name} must be one of {expected}"):
        OSPNextPipeline(sparse.transformer, None, None, **{name: "fast"})
    if name == "compile":
        with pytest.raises(ConfigError, match="compile must be one of"):
            sparse.compile = "fast"
    else:
        monkeypatch.setattr(sparse, name, "fast")
        with pytest.raises(ConfigError, match=f"{name} must be one of"):
            sparse(PROMPTS[0], **SIZE)


def test_sparse_attention_is_used_as_stored(sparse, ours):
    request = {**SIZE, "prompt": PROMPTS[0], "num_inference_steps": 2, "output_type": "latent"}
    assert sparse.transformer.config.sparse
    assert not ours.transformer.config.sparse
    sparse_latents, dense_latents = (pipe(**request, generator=seeded()).frames for pipe in (sparse, ours))
    assert (sparse_latents - dense_latents).abs().max() > 1e-3


def test_embeddings_serve_when_the_text_encoder_is_gone(checkpoint, sparse):
    request = {**SIZE, "num_inference_steps": 2, "output_type": "latent"}
    expected = sparse(PROMPTS, NEGATIVE, **request, generator=seeded()).frames
    embeds, negative = sparse.encode_prompt(PROMPTS, NEGATIVE)
    pipe = OSPNextPipeline.from_pretrained(checkpoint, text_encoder=None, vae=None)
    found = pipe(prompt_embeds=embeds, negative_prompt_embeds=negative, **request, generator=seeded()).frames
    assert torch.equal(found, expected)
    # Rows past the text are zero, so leaving them out changes nothing.
    short = {"prompt_embeds": embeds[:, :20], "negative_prompt_embeds": negative[:, :20]}
    assert torch.equal(pipe(**short, **request, generator=seeded()).frames, expected)


def test_callback_sees_and_changes_the_latents(sparse):
    seen = []

    def callback(pipe, i, t, tensors):
        assert pipe is sparse
        seen.append((i, float(t), tensors["latents"].clone()))
        return {"latents": torch.zeros_like(tensors["latents"])} if i == 1 else {}

    request = {**SIZE, "prompt": PROMPTS[0], "num_inference_steps": 3, "output_type": "latent"}
    plain = sparse(**request, generator=seeded()).frames
    changed = sparse(**request, generator=seeded(), callback_on_step_end=callback).frames
    sigmas = sparse.schedule.sigmas(3)
    assert [i for i, _, _ in seen] == [0, 1, 2]
    assert [t for _, t, _ in seen] == pytest.approx((1000 * sigmas[:-1]).tolist())
    assert torch.equal(seen[2][2], changed)
    assert not torch.equal(plain, changed)


def test_callback_can_replace_the_prompt_and_stop(sparse, monkeypatch):
    request = {**SIZE, "num_inference_steps": 3, "guidance_scale": 1.0, "output_type": "latent"}
    embeds, _ = sparse.encode_prompt(PROMPTS)

    def to_second_prompt(pipe, i, t, tensors):
        assert list(tensors) == ["latents", "prompt_embeds"]
        return {"prompt_embeds": embeds[1:]} if i == 0 else {}

    def stop_at_1(pipe, i, t, tensors):
        pipe._interrupt = i == 1
        return {}

    first = sparse(prompt_embeds=embeds[:1], **request, generator=seeded()).frames
    names = ("latents", "prompt_embeds")
    mixed = sparse(
        prompt_embeds=embeds[:1], **request, generator=seeded(), callback_on_step_end=to_second_prompt,
        callback_on_step_end_tensor_inputs=names,
    ).frames  # fmt: skip
    assert not torch.equal(first, mixed)
    calls = count_calls(sparse, monkeypatch)
    sparse(prompt_embeds=embeds[:1], **request, callback_on_step_end=stop_at_1)
    assert calls["forward"] == 2
    sparse(prompt_embeds=embeds[:1], **request)
    assert calls["forward"] == 2 + 3  # a stop does not outlive its call


def test_latents_that_are_not_finite_are_an_error(sparse):
    def break_latents(pipe, i, t, tensors):
        return {"latents": tensors["latents"] * float("nan")}

    with pytest.raises(OSPNextError, match="not finite"):
        sparse(PROMPTS[0], **SIZE, num_inference_steps=1, callback_on_step_end=break_latents)


def test_progress_bar_is_for_terminals(sparse, capsys, monkeypatch):
    request = {**SIZE, "prompt": PROMPTS[0], "num_inference_steps": 1, "output_type": "latent"}
    monkeypatch.setattr(sparse, "_progress_bar_config", {})
    sparse(**request)
    assert capsys.readouterr().err == ""
    sparse.set_progress_bar_config(disable=False, desc="sampling")
    sparse(**request)
    assert "sampling: 100%" in capsys.readouterr().err


def all_weights(pipe) -> dict[str, torch.Tensor]:
    parts = {"transformer": pipe.transformer, "text_encoder": pipe.text_encoder.model, "vae": pipe.vae.model}
    return {f"{part}.{name}": tensor for part, model in parts.items() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_save_and_load_is_exact(checkpoint, tmp_path, dtype):
    before = OSPNextPipeline.from_pretrained(checkpoint, dtype=dtype)
    before.schedule, before.solver = before.schedule.from_dict({"shift": 7.0}), "euler"
    before.save_pretrained(tmp_path / "copy")
    after = OSPNextPipeline.from_pretrained(tmp_path / "copy")
    first, second = all_weights(before), all_weights(after)
    assert first.keys() == second.keys()
    assert [n for n in first if first[n].dtype != second[n].dtype or not torch.equal(first[n], second[n])] == []
    assert before.transformer.config == after.transformer.config
    assert (after.schedule, after.solver) == (before.schedule, "euler")
    request = {**SIZE, "prompt": PROMPTS[0], "negative_prompt": NEGATIVE, "num_inference_steps": 2}
    assert np.array_equal(before(**request, generator=seeded()).frames, after(**request, generator=seeded()).frames)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]


def test_what_is_saved_opens_in_diffusers(checkpoint):
    pipe = WanPipeline.from_pretrained(checkpoint)
    index = json.loads((checkpoint / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers", "WanTransformer3DModel"]
    assert type(pipe.scheduler).__name__ == "UniPCMultistepScheduler"
    assert pipe.scheduler.config.flow_shift == 5.0
    frames = pipe(PROMPTS[0], **SIZE, num_inference_steps=2, max_sequence_length=64, generator=seeded()).frames
    assert frames.std() > 0.05

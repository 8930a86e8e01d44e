"""What a decision says of itself, to people and to programs."""

from __future__ import annotations

import dataclasses
import json

import fake_backends as fake
import pytest
import torch

from ospnext import ops
from ospnext.backends.reference import MANIFEST
from ospnext.cli import main
from ospnext.errors import UnsupportedRequestError
from ospnext.ops.contracts import CONTRACTS
from ospnext.ops.contracts.attention import AttentionRequest
from ospnext.ops.contracts.fused import FusedRequest
from ospnext.ops.explain import as_json, as_text, candidate_lines, describe_request
from ospnext.ops.policy import Policy, policy_from_env, use_registry
from ospnext.ops.registry import Implementation, Registry
from ospnext.ops.select import select

REQUEST = AttentionRequest("cpu", torch.bfloat16, 1, 75600, 512, 40, 128, key_mask=True)
BACKENDS = (
    fake.backend(
        "acme",
        fake.kernel("acme.packaged", requires=("no_such_package",), note="needs a package"),
        fake.kernel("acme.narrow", supports="refuses", handles=frozenset({"packed"})),
        fake.kernel("acme.wide", note="takes everything"),
        fake.kernel("acme.last"),
        priority=9,
    ),
    fake.backend("gone", fake.kernel("gone.a"), probe="absent", priority=8),
    fake.backend("plain", fake.kernel("plain.math", "two")),
)


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    for name in ("OSPNEXT_BACKEND", "OSPNEXT_OPS", "OSPNEXT_FALLBACK"):
        monkeypatch.delenv(name, raising=False)


def explain(policy=None, request=REQUEST, contract="attention", backends=BACKENDS) -> str:
    return as_text(select(CONTRACTS[contract], request, policy or Policy(), Registry(backends)))


def test_the_whole_text_of_a_choice():
    """Word for word: a report quotes it, and a change should be seen in review."""
    assert explain().splitlines() == [
        "attention.v1  device_type=cpu dtype=bfloat16 batch=1 q_len=75600 kv_len=512 heads=40 head_dim=128 "
        "key_mask=True",
        "  policy: backend=auto (default), no fallback",
        "  asked: auto (default) -> acme",
        "    acme.packaged  not loaded   package: got no_such_package not installed, want pip install no_such_package; "
        "needs a package",
        "    acme.narrow    rejected     key_mask: got True, want default (this implementation does not handle the "
        "feature); dtype: got torch.bfloat16, want fp32; capability: got (9, 0), want at least (9, 5)",
        "    acme.wide      chosen       takes everything",
        "    acme.last      eligible",
        "    gone.a         unavailable  driver: got none, want version 7",
        "    plain.math     not asked    the policy asks for auto",
    ]


def test_the_text_says_who_asked():
    known = Registry(BACKENDS)
    environ = {"OSPNEXT_BACKEND": "plain", "OSPNEXT_OPS": "attention=acme.last", "OSPNEXT_FALLBACK": "fused"}
    text = as_text(select(CONTRACTS["attention"], REQUEST, policy_from_env(environ, known), known))
    assert "asked: acme.last (OSPNEXT_OPS)" in text
    assert "backend=plain (OSPNEXT_BACKEND), ops=attention=acme.last (OSPNEXT_OPS), fallback=fused" in text
    assert "acme.wide      not asked    the policy asks for acme.last" in text


def test_the_error_of_an_impossible_request_is_the_explanation():
    q = torch.zeros(1, 3, 2, 8)
    decision = select(
        CONTRACTS["attention"],
        AttentionRequest("cpu", torch.float32, 1, 3, 3, 2, 8, logsumexp=True),
        Policy(ops=(("attention", "acme.narrow"),), source=(("ops", "use_backend"),)),
        Registry(BACKENDS),
    )
    asked = {"attention": "acme.narrow"}
    with (
        use_registry(Registry(BACKENDS)),
        ops.use_backend(ops=asked),
        pytest.raises(UnsupportedRequestError) as error,
    ):
        ops.attention(q, q, q, return_lse=True)
    assert str(error.value) == as_text(decision)
    lines = str(error.value).splitlines()
    assert lines[0] == "no implementation takes this attention request"
    assert "OSPNEXT_FALLBACK=attention would allow" in lines[-2]
    assert "OSPNEXT_BACKEND=reference" in lines[-1]


def test_fallback_is_not_suggested_where_it_is_allowed_already():
    only = (fake.backend("acme", fake.kernel("acme.narrow", supports="refuses")),)
    assert "OSPNEXT_FALLBACK" in explain(backends=only)
    assert "OSPNEXT_FALLBACK" not in explain(Policy(fallback=frozenset({"attention"})), backends=only)


def test_no_backend_at_all():
    text = explain(backends=())
    assert "asked: auto (default) -> no backend" in text
    assert "no backend declares an implementation of this operator" in text


def test_the_definition_of_an_optional_operator_says_why_it_is_used():
    request = FusedRequest("cpu", torch.float32, (1, 8, 64), gated=True)
    assert "plain PyTorch definition of the contract: acme declares no kernel" in explain(
        Policy("acme"), request, "fused.gate_residual"
    )
    asked = explain(Policy(ops=(("fused", "composite"),)), request, "fused.gate_residual")
    assert "composite  chosen       plain PyTorch definition of the contract: asked for by name" in asked
    declared = (fake.fused_backend("acme"),)
    refused = dataclasses.replace(declared[0].offers("fused.rope")[0], supports="fake_backends:refuses")
    blocked = (dataclasses.replace(declared[0], implementations=(refused,)),)
    rope = FusedRequest("cpu", torch.float32, (1, 8, 2, 32))
    assert "set OSPNEXT_FALLBACK=fused to allow it" in explain(Policy("acme"), rope, "fused.rope", blocked)
    allowed = explain(Policy("acme", fallback=frozenset({"fused"})), rope, "fused.rope", blocked)
    assert "composite  chosen       fallback, allowed for fused" in allowed
    taken = explain(Policy("acme"), rope, "fused.rope", declared)
    assert "composite  not asked    a kernel of the backend takes this request" in taken


def test_a_kernel_that_failed_to_load_says_so_ever_after():
    broken = Implementation("acme.x", "attention", "no_such_module:kernel", handles=fake.EVERY_FEATURE)
    known = Registry([fake.backend("acme", broken)])
    before = as_text(select(CONTRACTS["attention"], REQUEST, Policy(), known))
    with pytest.raises(ModuleNotFoundError):
        known.kernel(broken)
    after = as_text(select(CONTRACTS["attention"], REQUEST, Policy(), known))
    assert "failed to load" not in before
    assert "failed to load: ModuleNotFoundError: No module named 'no_such_module'" in after


def test_json_holds_the_whole_decision():
    decision = select(
        CONTRACTS["attention"], REQUEST, Policy("acme", fallback=frozenset({"fused"})), Registry(BACKENDS)
    )
    found = json.loads(json.dumps(as_json(decision)))
    assert found["contract"] == "attention"
    assert found["version"] == 1
    assert found["request"] == dataclasses.asdict(REQUEST) | {"dtype": "bfloat16"}
    assert found["policy"] == {"backend": "acme", "ops": {}, "fallback": ["fused"], "tuning": None}
    assert (found["asked"], found["chosen"], found["fell_back"]) == ("acme (default)", "acme.wide", False)
    assert [(c["id"], c["status"]) for c in found["candidates"]] == [(c.id, c.status) for c in decision.candidates]
    assert found["candidates"][0]["reasons"] == [
        {"code": "package", "got": "no_such_package not installed", "want": "pip install no_such_package"}
    ]


def test_json_of_a_fused_request_and_of_no_choice():
    request = FusedRequest("cpu", torch.float16, (2, 8, 64), affine=True)
    decision = select(CONTRACTS["fused.layer_norm_modulate"], request, Policy(), Registry(()))
    found = json.loads(json.dumps(as_json(decision)))
    assert (found["chosen"], found["request"]["shape"]) == ("composite", [2, 8, 64])
    nothing = json.loads(json.dumps(as_json(select(CONTRACTS["attention"], REQUEST, Policy(), Registry(())))))
    assert (nothing["chosen"], nothing["candidates"]) == (None, [])


def test_a_request_is_described_without_its_defaults():
    assert "packed" not in describe_request(REQUEST)
    assert describe_request(FusedRequest("cpu", torch.float64, (3,), permuted=True)) == (
        "device_type=cpu dtype=float64 shape=(3,) permuted=True"
    )


# ---- the command line, for the quantize family


def command(capsys, *words, code=0) -> str:
    """What `ospnext explain` prints, and the error it ends with."""
    assert main(["explain", *words, "--device", "cpu"]) == code
    found = capsys.readouterr()
    return found.out + found.err


def test_kernels_of_a_backend_that_cannot_run_are_one_line():
    kernels = [fake.kernel(f"gone.{n}") for n in "abc"]
    known = Registry((fake.backend("gone", *kernels, probe="absent"), fake.backend("acme", fake.kernel("acme.a"))))
    decision = select(CONTRACTS["attention"], REQUEST, Policy(), known)
    (line,) = (line for line in as_text(decision).splitlines() if "gone" in line)
    assert line.startswith("    gone (3 kernels)  unavailable  ")
    assert not any("gone" in line for line in candidate_lines(decision, unavailable=False))


def test_the_whole_text_about_a_quantized_linear(capsys):
    with use_registry(Registry((MANIFEST,))):
        text = command(capsys, "quantized_linear", "--feature", "backward", "--feature", "accumulate=fp64")
    assert text.splitlines() == [
        "quantized_linear.v1  device_type=cpu dtype=bfloat16 shape=(75600, 5120, 5120) accumulate=fp64 backward=True",
        "  policy: backend=auto (default), no fallback",
        "  asked: auto (default) -> reference",
        "    reference.hif8  chosen       values of the grid in fp32, so that every product is exact",
        "  shape is (tokens, output features, input features); hif8_quantize makes the codes",
    ]


@pytest.mark.parametrize("name", ["hif8_encode", "hif8_decode", "hif8_quantize", "hif8_fake_quantize"])
def test_casts_and_quantizers_are_explained_by_shape(capsys, name):
    text = command(capsys, name, "--shape", "3,5", "--dtype", "fp32").splitlines()
    assert text[0] == f"{name}.v1  device_type=cpu dtype=float32 shape=(3, 5)"
    assert text[-1].split()[:2] == ["reference.hif8", "chosen"]


def test_features_with_a_value_reach_the_request(capsys):
    words = ["granularity=row", "scale_mode=pow2", "scale_max=224", "given_amax"]
    features = [word for value in words for word in ("--feature", value)]
    found = json.loads(command(capsys, "hif8_quantize", *features, "--json"))["request"]
    assert {name: found[name] for name in ("granularity", "scale_mode", "scale_max", "given_amax")} == {
        "granularity": "row",
        "scale_mode": "pow2",
        "scale_max": 224.0,
        "given_amax": True,
    }
    assert "reduction=max" in command(capsys, "collective", "--feature", "reduction=max")
    assert "ranks=8 elements=48384000 ranks_per_device=1\n" in command(
        capsys, "collective", "--feature", "ranks_per_device=1"
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["hif8_quantize", "--feature", "granularity=column"],
            "granularity=column: the value is one of tensor, row, channel",
        ),
        (
            ["hif8_quantize", "--feature", "granularity"],
            "--feature granularity: give it as granularity=tensor|row|channel",
        ),
        (
            ["hif8_quantize", "--feature", "granularty=row"],
            "--feature granularty (did you mean 'granularity'?): hif8_quant",
        ),
        (["hif8_quantize", "--feature", "scale_max=1e9"], "scale_max=1e9: the value is a number from 2^-22 to 32768"),
        (["hif8_quantize", "--feature", "scale_max=nan"], "scale_max=nan: the value is a number from 2^-22 to 32768"),
        (["hif8_quantize", "--feature", "scale_max=big"], "scale_max=big: the value is a number from 2^-22 to 32768"),
        *(
            (
                ["collective", "--feature", f"local_ranks={word}"],
                f"local_ranks={word}: the value is a whole number from",
            )
            for word in ("0", "-1", "1.5", "all")
        ),
        (["collective", "--feature", "local_ranks"], "--feature local_ranks: give it as local_ranks=COUNT"),
        (["hif8_encode", "--feature", "saturate=yes"], "--feature saturate=yes: give it as saturate"),
        (["hif8_decode", "--feature", "backward"], "hif8_decode knows saturate"),
        (
            ["quantized_linear", "--feature", "backwards"],
            "(did you mean 'backward'?): quantized_linear knows x_granularity=tensor|row, "
            "weight_granularity=tensor|row, bias, mixed_bias, accumulate=fast|fp32|fp64, scale_max=NUMBER, "
            "grad_scale_max=NUMBER, backward, carried",
        ),
        (
            ["quantized_linear", "--shape", "3,4"],
            "takes tokens, output features and input features, such as 75600,5120,5120",
        ),
        (["quantized_linear", "--shape", "3,x,4"], "is not a list of integers such as 75600,5120,5120"),
    ],
)
def test_a_wrong_feature_or_shape_is_refused_with_the_legal_ones(capsys, words, expected):
    assert expected in command(capsys, *words, code=2)


def test_quantized_attention_is_explained_by_what_it_is_made_of(capsys):
    words = ["quantized_attention", "--tokens", "9", "--kv-tokens", "7", "--heads", "2", "--feature", "backward"]
    whole, round_trip, attention = command(capsys, *words).split("\n\n")
    assert "composite  chosen" in whole
    assert "that is hif8_fake_quantize of q, k and v (and of their gradients), then the backend's attention" in whole
    assert round_trip.startswith("hif8_fake_quantize.v1  device_type=cpu dtype=bfloat16 shape=(1, 9, 2, 128)\n")
    assert attention.startswith("attention.v1  device_type=cpu dtype=bfloat16 batch=1 q_len=9 kv_len=7 heads=2 ")
    assert "backward=True" in attention.splitlines()[0]
    parts = json.loads(command(capsys, *words, "--json"))["parts"]
    assert [part["contract"] for part in parts] == ["hif8_fake_quantize", "attention"]
    assert [part["chosen"] for part in parts] == ["reference.hif8", "reference.sdpa"]


def test_quantized_attention_needs_all_of_its_parts(capsys):
    """A backend without one of them fails there, not in the composition."""
    round_trip = fake.kernel("acme.hif8", contract="hif8_fake_quantize")
    with use_registry(Registry((fake.backend("acme", round_trip),))):
        text = command(capsys, "quantized_attention", "--tokens", "9", code=1)
    assert "no implementation takes this attention request" in text


def test_a_kernel_for_a_composition_is_said_not_to_be_called(capsys):
    kernels = [fake.kernel(f"acme.{n}", contract=n) for n in ("attention", "hif8_fake_quantize", "quantized_attention")]
    with use_registry(Registry((fake.backend("acme", *kernels),))):
        text = command(capsys, "quantized_attention", "--tokens", "9")
    assert "acme.quantized_attention  not asked" in text and "always made of others" in text
    assert "acme.attention  chosen" in text and "acme.hif8_fake_quantize  chosen" in text

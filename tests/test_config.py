"""ospnext.config and ospnext.yaml_text: layers, overrides, types, nearest keys, YAML scalars."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from ospnext.config import checked, parse_overrides, read_yaml, resolve, to_dict
from ospnext.errors import ConfigError
from ospnext.yaml_text import dump_yaml, load_yaml


@dataclass(frozen=True)
class Optim:
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Config:
    name: str
    steps: int = 10
    debug: bool = False
    mode: Literal["fast", "exact"] | None = None
    note: str | None = "none given"
    optim: Optim = field(default_factory=Optim)


NAME = ("defaults", {"name": "x"})


def test_later_layers_win_key_by_key(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("name: file\nsteps: 20\noptim:\n  lr: 0.5\n  tags: [a, b]\n")
    overrides = parse_overrides(["optim.lr=1e-5", "steps=30"])
    config = resolve(Config, (str(file), read_yaml(file)), ("command line", overrides))
    assert config == Config(name="file", steps=30, optim=Optim(lr=1e-5, tags=("a", "b")))


def test_null_in_a_later_layer_replaces_a_value():
    assert resolve(Config, ("a", {"name": "x", "note": "text"}), ("b", {"note": None})).note is None


def test_of_an_override_given_twice_the_last_wins():
    assert parse_overrides(["steps=1", "optim.lr=2", "steps=3"]) == {"steps": 3, "optim": {"lr": 2}}


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("stpes", "steps"),
        ("optim.lrr", "optim.lr"),
        ("lr", "optim.lr"),
        ("optmi.lr", "optim"),
        ("optim.steps", "steps"),
    ],
)
def test_an_unknown_key_names_the_one_that_was_meant(key, meant):
    with pytest.raises(ConfigError, match=rf"^command line: unknown key .*did you mean '{meant}'\?"):
        resolve(Config, NAME, ("command line", parse_overrides([f"{key}=1"])))


def test_an_unknown_key_that_resembles_nothing_lists_the_keys():
    with pytest.raises(ConfigError, match="keys of 'optim': lr, betas, tags") as error:
        checked(Config, {"optim": {"zzzzzzz": 1}}, "f.yaml")
    assert "did you mean" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "expected", "found"),
    [
        ("steps=2.5", "an integer", r"2\.5 \(a number\)"),
        ("steps=ten", "an integer", r"'ten' \(text\)"),
        ("steps=true", "an integer", "true"),
        ("steps=null", "an integer", "null"),
        ("debug=1", "true or false", r"1 \(an integer\)"),
        ("debug=yes", "true or false", r"'yes' \(text\)"),
        ("name=123", "text", r"123 \(an integer\); if text is meant, quote it"),
        ("optim.lr=fast", "a number", r"'fast' \(text\)"),
        ("optim.lr=1e999", "a number", "inf"),
        ("mode=slow", "one of fast, exact or null", r"'slow' \(text\)"),
        ("optim.betas=[0.9]", "a list of a number, a number", r"\[0\.9\] \(a list\)"),
        ("optim.tags=[a, 1]", "a list of text, ...", r"\['a', 1\]"),
        ("optim=3", "section with the keys lr, betas, tags", r"3 \(an integer\)"),
        ("steps.x=3", "an integer", "a section with the keys x"),
    ],
)
def test_a_wrong_type_says_what_is_expected_and_what_was_found(override, expected, found):
    with pytest.raises(ConfigError, match=f"{override.partition('=')[0].partition('.')[0]}.*{expected}.*found {found}"):
        resolve(Config, NAME, ("command line", parse_overrides([override])))


@pytest.mark.parametrize(
    ("override", "value"),
    [("optim.lr=3", 3.0), ("optim.lr=1e-5", 1e-5), ("optim.betas=[0, 1]", (0.0, 1.0)), ("optim.tags=[]", ())],
)
def test_numbers_and_lists_become_what_the_field_has(override, value):
    config = resolve(Config, NAME, ("", parse_overrides([override])))
    result = getattr(config.optim, override.partition("=")[0].partition(".")[2])
    assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"),
        ("1:30", "1:30"),
        ("010", "010"),
        ("2024-01-01", "2024-01-01"),
        ("a: b # c", "a: b # c"),
        ("x=y", "x=y"),
        ("it's", "it's"),
        ('"12"', "12"),
        ("'null'", "null"),
        ('""', ""),
        ("~", None),
    ],
)
def test_override_values_are_yaml_1_2_scalars(text, value):
    assert parse_overrides([f"note={text}"]) == {"note": value}


@pytest.mark.parametrize("text", ["steps", "=3", "a..b=3", "steps=", "steps= "])
def test_a_malformed_override_is_refused(text):
    with pytest.raises(ConfigError, match="override"):
        parse_overrides([text])


def test_a_value_and_a_section_under_one_name_are_refused():
    with pytest.raises(ConfigError, match="'a' was given a plain value"):
        parse_overrides(["a=1", "a.b=2"])


def test_a_missing_required_key_is_named():
    with pytest.raises(ConfigError, match="name is required: text"):
        resolve(Config, ("f.yaml", {"steps": 1}))


def test_an_empty_section_and_an_empty_file_change_nothing(tmp_path):
    (tmp_path / "c.yaml").write_text("name: x\noptim:\n  # lr: 1\n")
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    layers = [(name, read_yaml(tmp_path / name)) for name in ("c.yaml", "empty.yaml")]
    assert resolve(Config, *layers) == Config(name="x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2\n", r"c\.yaml:2: .*'a' is given twice"),
        ("a: 1\nb: [1,\n", r"c\.yaml:3: not valid YAML"),
        ("x\ny: 2: 3\n", r"c\.yaml:2: not valid YAML"),
        ("1: 2\n", r"c\.yaml:1: .*the key 1 is not text"),
        ("- a\n", "a config file holds `key: value` lines"),
        ("a: !!python/object/apply:os.system [ls]\n", "not valid YAML"),
    ],
)
def test_a_bad_yaml_file_is_refused_with_its_line(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_yaml(tmp_path / "c.yaml")


def test_a_missing_or_undecodable_file_is_refused(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9\n")
    for name in ("missing.yaml", "latin.yaml"):
        with pytest.raises(ConfigError, match=f"cannot read the config file .*{name}"):
            read_yaml(tmp_path / name)


numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
tricky = st.sampled_from(["no", "1e-5", "1e5", "010", "0x1f", "", "null", "~", "2020-01-01", "a: b", "=", "1_000"])


@given(st.none() | st.booleans() | numbers | st.text() | tricky)
@example("\x85")
@example("a\u2028b")
def test_dumped_yaml_reads_back_unchanged(value):
    text = dump_yaml({"key": value, "list": [value]})
    assert load_yaml(text, "") == {"key": value, "list": [value]}
    assert yaml.safe_load(text)["key"] == value  # a YAML 1.1 reader must not misread it either


def test_to_dict_is_the_inverse_of_resolve():
    config = Config(name="x", mode="exact", optim=Optim(tags=("a",)))
    assert resolve(Config, ("", load_yaml(dump_yaml(to_dict(config)), ""))) == config

"""Configurations: layers of YAML files and `key.sub=value` overrides, checked and turned into frozen dataclasses.

Knows no particular configuration: the dataclass says which keys exist and of which type. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeGuard, TypeVar, Union, get_args, get_origin, get_type_hints

from ospnext.errors import ConfigError
from ospnext.yaml_text import load_yaml, parse_scalar

T = TypeVar("T")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file is an empty mapping."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the config file {str(path)!r}: {error}") from error
    values = load_yaml(text, source=str(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a config file holds `key: value` lines, found {_found(values)}")
    return values


def parse_overrides(texts: Iterable[str]) -> dict[str, Any]:
    """`["video.height=96", "seed=1"]` as `{"video": {"height": 96}, "seed": 1}`; of a key given twice the last wins."""
    result: dict[str, Any] = {}
    for text in texts:
        key, equals, raw = text.partition("=")
        parts = key.split(".")
        if not equals or not all(parts):
            raise ConfigError(f"override {text!r} is not of the form key=value or section.key=value")
        if not raw.strip():
            raise ConfigError(f"override {text!r} has no value; write {key}=null for none, {key}='\"\"' for empty text")
        node = result
        for depth, part in enumerate(parts[:-1], 1):
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ConfigError(f"override {text!r}: {'.'.join(parts[:depth])!r} was given a plain value before it")
        node[parts[-1]] = parse_scalar(raw, source=f"override {text!r}")
    return result


def resolve(cls: type[T], *layers: tuple[str, Mapping[str, Any]]) -> T:
    """Build `cls` from (source, values) layers, later ones winning; what no layer names keeps the dataclass's default.

    Raises:
        ConfigError: an unknown key (the nearest one is named), a value of the wrong type, or a missing required key;
            the message names the source of the offending layer.
    """
    merged: dict[str, Any] = {}
    for source, values in layers:
        _overlay(merged, checked(cls, values, source))
    return _build(cls, merged, " and ".join(source for source, _ in layers))


def checked(cls: type, values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """`values` with every key known to `cls` and every value converted to its field's type; nothing is filled in."""
    return _checked(cls, values, source, root=cls, prefix="")


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain values that YAML and JSON can hold, in declaration order."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {name: _plain(value) for name, value in values.items()}


def leaf_keys(cls: type, prefix: str = "") -> Iterator[str]:
    """Every dotted key of a config class that takes a value."""
    for name, annotation in _annotations(cls).items():
        if _is_section(annotation):
            yield from leaf_keys(annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


def nearest_key(cls: type, key: str) -> str:
    """` (did you mean 'x'?)` with the dotted key that was probably meant: spelled alike, or in its right section."""
    leaves = list(leaf_keys(cls))
    elsewhere = [leaf for leaf in leaves if leaf.rpartition(".")[2] == key.rpartition(".")[2]]
    sections = dict.fromkeys(leaf.rpartition(".")[0] for leaf in leaves if "." in leaf)
    return f" (did you mean {elsewhere[0]!r}?)" if elsewhere else did_you_mean(key, [*leaves, *sections])


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` with the nearest known word, or nothing."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _checked(cls: type, values: Mapping[Any, Any], source: str, *, root: type, prefix: str) -> dict[str, Any]:
    annotations = _annotations(cls)
    result: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if name not in annotations:
            raise ConfigError(
                f"{source}: unknown key {key!r}{nearest_key(root, key)}\n"
                f"  keys {f'of {prefix[:-1]!r}' if prefix else 'here'}: {', '.join(annotations)}"
            )
        annotation = annotations[name]
        if not _is_section(annotation):
            result[name] = _typed(annotation, value, f"{source}: {key}")
        elif isinstance(value, Mapping) or value is None:  # a section whose lines are all commented out reads as null
            result[name] = _checked(annotation, value or {}, source, root=root, prefix=key + ".")
        else:
            keys = ", ".join(_annotations(annotation))
            raise ConfigError(f"{source}: {key!r} is a section with the keys {keys}; found {_found(value)}")
    return result


def _overlay(base: dict[str, Any], top: Mapping[str, Any]) -> None:
    for name, value in top.items():
        if isinstance(value, dict):
            _overlay(base.setdefault(name, {}), value)
        else:
            base[name] = value


def _build(cls: type[T], values: Mapping[str, Any], source: str, prefix: str = "") -> T:
    annotations = _annotations(cls)
    arguments: dict[str, Any] = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]  # a TypeVar cannot say "dataclass"
        annotation = annotations[field.name]
        if _is_section(annotation):
            arguments[field.name] = _build(annotation, values.get(field.name, {}), source, f"{prefix}{field.name}.")
        elif field.name in values:
            arguments[field.name] = values[field.name]
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{source}: {prefix}{field.name} is required: {_expected(annotation)}")
    return cls(**arguments)


def _is_section(annotation: Any) -> TypeGuard[type]:
    return isinstance(annotation, type) and dataclasses.is_dataclass(annotation)


def _annotations(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _typed(annotation: Any, value: Any, where: str) -> Any:
    """`value` as the annotation's type: an integer passes for a number and a list for a tuple, nothing else does."""
    for option in _options(annotation):
        match = _match(option, value)
        if match is not _NO_MATCH:
            return match
    number_for_text = str in _options(annotation) and isinstance(value, int | float) and not isinstance(value, bool)
    hint = f"; if text is meant, quote it: '\"{value}\"'" if number_for_text else ""
    raise ConfigError(f"{where} must be {_expected(annotation)}, found {_found(value)}{hint}")


_NO_MATCH = object()


def _match(option: Any, value: Any) -> Any:
    if get_origin(option) is Literal:
        return value if value in get_args(option) and not isinstance(value, bool) else _NO_MATCH
    if get_origin(option) is tuple:
        return _match_tuple(get_args(option), value)
    if option is float and type(value) is int:
        return float(value)
    if option is float and isinstance(value, float) and not math.isfinite(value):
        return _NO_MATCH
    return value if type(value) is option else _NO_MATCH


def _match_tuple(items: tuple[Any, ...], value: Any) -> Any:
    if not isinstance(value, list | tuple):
        return _NO_MATCH
    wanted = [items[0]] * len(value) if items[1:] == (...,) else list(items)
    matches = [_match(item, element) for item, element in zip(wanted, value, strict=False)]
    return _NO_MATCH if len(wanted) != len(value) or _NO_MATCH in matches else tuple(matches)


def _options(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


_WORDS: dict[Any, str] = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "null"}


def _expected(annotation: Any) -> str:
    return " or ".join(_expected_one(option) for option in _options(annotation))


def _expected_one(option: Any) -> str:
    if get_origin(option) is Literal:
        return "one of " + ", ".join(str(choice) for choice in get_args(option))
    if get_origin(option) is tuple:
        return "a list of " + ", ".join("..." if item is ... else _expected(item) for item in get_args(option))
    return _WORDS[option]


def _found(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a section with the keys {', '.join(map(str, value))}" if value else "an empty section"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    kind = {int: "an integer", float: "a number", str: "text", list: "a list"}.get(type(value), type(value).__name__)
    return f"{value!r} ({kind})"


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value

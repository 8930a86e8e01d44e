"""YAML text with the plain scalars of YAML 1.2: only `true` and `false` are booleans, `1e-5` is a number.

PyYAML's own rules (YAML 1.1) read `no` as false, `1:30` as 90 and `1e-5` as text, and let a key be given twice.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from ospnext.errors import ConfigError

_NULL, _BOOL, _INT, _FLOAT = (f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float"))
_PLAIN_SCALARS = (
    (_NULL, re.compile(r"^(?:null|Null|NULL|~|)$"), ["n", "N", "~", ""]),
    (_BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    (_INT, re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$"), list("-+0123456789")),
    (
        _FLOAT,
        re.compile(r"^[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$"),
        list("-+.0123456789"),
    ),
)


class _Loader(yaml.SafeLoader):
    """The safe loader with the scalars above and without silent repetition of keys."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's own form: drops the inherited YAML 1.1 rules

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str) or key in seen:
                problem = f"the key {key!r} is {'given twice' if isinstance(key, str) else 'not text'}"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """The safe dumper; it quotes text that YAML 1.1 *or* the rules above would read as something else."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # Only double quotes escape Unicode's line separators; PyYAML would write them plainly and read them back as spaces.
    style = '"' if set(text) & set("\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
for _tag, _pattern, _first in _PLAIN_SCALARS:
    _Loader.add_implicit_resolver(_tag, _pattern, _first)
    _Dumper.add_implicit_resolver(_tag, _pattern, _first)


def load_yaml(text: str, source: str) -> Any:
    """Parse a YAML document. `source` names it in errors, which give the line."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{source}{line}: not valid YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{source}: not valid YAML: {error}") from error


def parse_scalar(text: str, source: str) -> Any:
    """The value of `key=TEXT`: a number, true, false, null, a quoted text, a `[list]`, or else TEXT itself.

    Unlike a YAML document, plain text may hold `: ` and ` #`, because prompts do.
    """
    text = text.strip()
    if text[0] + text[-1] in ("''", '""', "[]") and len(text) > 1:
        return load_yaml(text, source)
    loader = _Loader("")
    try:
        return loader.construct_object(yaml.ScalarNode(loader.resolve(yaml.ScalarNode, text, (True, False)), text))
    finally:
        loader.dispose()


def dump_yaml(values: Any) -> str:
    """Plain values as YAML text that `load_yaml` reads back unchanged."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)

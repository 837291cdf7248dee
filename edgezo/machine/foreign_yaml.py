"""YAML that somebody else wrote, as settings: read by PyYAML if it is installed, and checked as TOML is.

Plain words are read as YAML 1.2 has them, so that ``yes``, ``on`` and ``1:30`` are text, as on the command line. PyYAML
alone makes truth values and 90 of them.
"""

from __future__ import annotations

import re
from typing import Any

from edgezo.machine.foreign import MOST_DEPTH, clip

_YAML_WHOLE = re.compile(r"[-+]?[0-9]+", re.ASCII)
_YAML_FRACTION = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", re.ASCII)
_YAML_WORDS = {"true": True, "false": False, "null": None, "~": None, "": None}
_YAML_DIGITS = 400
_YAML_TAGS = ("str", "int", "float", "bool", "null", "timestamp", "merge", "value", "seq", "map")


def parse_yaml(text: str) -> dict[str, Any]:
    """The table of a YAML text. No tag makes an object, and no alias repeats a value: both are refused.

    Raises ValueError where it is not valid, no table, or nested too deeply, and where PyYAML is not installed.
    """
    try:
        import yaml
    except ImportError as problem:
        raise ValueError("PyYAML is not installed: pip install pyyaml, or write TOML") from problem
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        value = {} if node is None else _Reader(yaml).value(node)
    except RecursionError as problem:
        raise ValueError(f"lists or tables are nested more than {MOST_DEPTH} deep") from problem
    except yaml.MarkedYAMLError as problem:
        mark = problem.problem_mark or problem.context_mark
        raise ValueError(f"line {mark.line + 1 if mark else '?'}: {problem.problem}") from problem
    except yaml.YAMLError as problem:  # a character that no YAML may hold
        raise ValueError(" ".join(str(problem).split())) from problem
    if not isinstance(value, dict):
        raise ValueError("it holds no settings; write one on each line, as in model: NAME")
    return value


class _Reader:
    """Values of the nodes of one text."""

    def __init__(self, yaml: Any):
        self._yaml, self._seen = yaml, set[int]()

    def value(self, node: Any, depth: int = 0) -> Any:
        """The value of a node. Raises ValueError, RecursionError."""
        line = node.start_mark.line + 1
        if id(node) in self._seen:
            raise ValueError(f"line {line}: the value has an alias (*); write it out")
        self._seen.add(id(node))
        if node.tag.removeprefix("tag:yaml.org,2002:") not in _YAML_TAGS:
            raise ValueError(
                f"line {line}: {clip(node.tag, 60)!r} makes an object; settings are plain values"
            )
        if depth > MOST_DEPTH:
            raise RecursionError
        if isinstance(node, self._yaml.ScalarNode):
            return _scalar(node.value) if node.style is None else node.value
        if isinstance(node, self._yaml.SequenceNode):
            return [self.value(item, depth + 1) for item in node.value]
        table: dict[str, Any] = {}
        for key, item in node.value:
            if not isinstance(key, self._yaml.ScalarNode):
                raise ValueError(f"line {line}: a key is no text")
            if key.value in table:
                raise ValueError(f"line {line}: the key {clip(key.value, 60)!r} occurs twice")
            table[key.value] = self.value(item, depth + 1)
        return table


def _scalar(text: str) -> Any:
    """What a plain word stands for."""
    if text in _YAML_WORDS:
        return _YAML_WORDS[text]
    if len(text) <= _YAML_DIGITS and _YAML_WHOLE.fullmatch(text):
        return int(text)
    return float(text) if len(text) <= _YAML_DIGITS and _YAML_FRACTION.fullmatch(text) else text

"""docs/options.md and docs/settings-sample.toml, made from the table of settings.

``python -m edgezo.cli.option_pages docs/`` writes both; a test fails where they are not up to date.
"""

from __future__ import annotations

import math
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import click
import tomli_w

from edgezo.cli.main import cli
from edgezo.cli.options import help_text
from edgezo.plan.field import Field, as_text
from edgezo.plan.fields import FIELDS, GROUPS, flag

COLUMNS = 100  # of the sample

PAGE_TOP = """\
# Options

<!-- Made by `python -m edgezo.cli.option_pages docs/`; change edgezo/plan/fields.py instead. -->

Every setting of a run, in the groups of `edgezo finetune --help-all`
(`--help` shows the everyday ones). `edgezo finetune` takes all of them; the last line of
an entry names the other commands that do. A setting may also stand in a TOML or YAML file (`--config FILE`,
[a sample](settings-sample.toml)), under the name that its entry gives; `-` and `_` are alike there. Where several
places give a setting, the first of these counts: command line > file > model card > default.
"""

SAMPLE_TOP = """\
# Settings of a run, for `edgezo finetune --config FILE`; docs/options.md explains them.
# Made by `python -m edgezo.cli.option_pages docs/`; change edgezo/plan/fields.py instead.
#
# Every setting is commented out, with its default as the value, or an example where there is no
# default. Remove the "#" before a setting to change it.
"""


def options_page() -> str:
    """The text of docs/options.md: a section for each group, an entry for each option."""
    commands = _commands()
    parts = [PAGE_TOP]
    for group in GROUPS.values():
        parts.append(f"## {group.title}\n")
        parts += ["\n".join(_entry(field, commands)) + "\n" for field in group.fields]
    parts.append("## Options of `edgezo finetune` that are not settings\n")
    parts.append("".join(_line(option) for option in _other_options()))
    return "\n".join(parts)


def settings_sample() -> str:
    """The text of docs/settings-sample.toml. A setting's line begins with "#" and its name, other lines with "# "."""
    parts = [SAMPLE_TOP]
    for group in GROUPS.values():
        rule = "-" * (COLUMNS - len(group.title) - 3)
        parts.append(f"# {group.title} {rule}\n")
        for field in group.fields:
            lines = [field.help, f"Values: {_values(field)}."]
            if field.default_words:
                lines.append(f"Default: {field.default_words}.")
            parts.append("".join(map(_comment, lines)) + f"#{_in_file(field)}\n")
    return "\n".join(parts)


def _comment(text: str) -> str:
    lines = textwrap.wrap(text, COLUMNS - 2, break_long_words=False, break_on_hyphens=False)
    return "".join(f"# {line}\n" for line in lines)


def write(folder: Path) -> None:
    """Write both files into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "options.md").write_text(options_page(), encoding="utf-8")
    (folder / "settings-sample.toml").write_text(settings_sample(), encoding="utf-8")


def _entry(field: Field, commands: dict[str, list[str]]) -> Iterator[str]:
    value = "" if field.kind == "bool" else f" {field.metavar or 'CHOICE'}"
    yield f"### `{flag(field.name)}{value}`"
    yield ""
    yield _literal(field.help)
    yield ""
    yield f"- Values: {_values(field)}"
    if field.default_words:
        yield f"- Default: {field.default_words}"
    yield f"- In a file: `{_in_file(field)}`"
    others = [name for name in commands[field.name] if name != "finetune"]
    if others:
        yield f"- Also an option of {', '.join(f'`edgezo {name}`' for name in others)}"


def _line(option: click.Option) -> str:
    """A list entry for an option that is not a setting."""
    value = f" {option.metavar}" if option.metavar else ""
    return f"- `{option.opts[0]}{value}`: {option.help}\n"


def _other_options() -> Iterator[click.Option]:
    for parameter in cli.commands["finetune"].params:
        if isinstance(parameter, click.Option) and parameter.name not in FIELDS:
            yield parameter


def _literal(text: str) -> str:
    """Help text for Markdown, where what is quoted is code."""
    return re.sub(r"(?<!\w)'([^']+)'(?!\w)", r"`\1`", text)


def _values(field: Field) -> str:
    """What a setting may be, in words."""
    kinds = {
        "str": "text",
        "int": "a whole number",
        "float": "a number",
        "bool": "true or false",
        "duration": "a time such as 90 (seconds), 120s, 10m, 1.5h or 1h30m",
        "bytes": "a size such as 700MB, 12GB or 12GiB",
        "choice": ", ".join(field.choices),
        "blocks": "a whole number, all or auto",
        "train": f"one or more of {', '.join(field.choices)}, joined by +",
    }
    auto = "; or auto" if field.auto is not None else ""
    everything = "; or all" if field.everything is not None else ""
    return kinds[field.kind] + _bounds(field) + auto + everything


def _bounds(field: Field) -> str:
    if field.kind not in ("int", "float"):
        return ""
    low = f"above {field.low:g}" if field.open_low else f"at least {field.low:g}"
    return f", {low}" + (f", at most {field.high}" if field.high < math.inf else "")


def _in_file(field: Field) -> str:
    """The setting in TOML, with its default or an example."""
    value = field.example if field.usual is None else field.usual
    name = field.alias or field.name
    return tomli_w.dumps({name: as_text(value) if field.kind == "train" else value}).strip()


def _commands() -> dict[str, list[str]]:
    """The commands that take a setting as an option, by setting; those of edgezo bench last."""
    commands: dict[str, list[str]] = {name: [] for name in FIELDS}
    for path, command in sorted(_leaves(cli), key=lambda leaf: leaf[0].startswith("bench ")):
        for parameter in command.params:
            field = FIELDS.get(parameter.name or "")
            if field is not None and getattr(parameter, "help", None) == help_text(field):
                commands[field.name].append(path)
    return commands


def _leaves(group: click.Group, path: str = "") -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from _leaves(command, f"{path}{name} ")
        else:
            yield f"{path}{name}", command


if __name__ == "__main__":
    write(Path(sys.argv[1]))

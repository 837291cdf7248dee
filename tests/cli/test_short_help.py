"""``--help`` of every command fits a screen, and ``--help-all`` has every option."""

from __future__ import annotations

import click
import pytest
from conftest import Command
from writers import every_command

from edgezo.cli.main import cli
from edgezo.plan.fields import FIELDS

SCREEN_LINES, SCREEN_COLUMNS = 40, 80
# What is for research is not among the options of every day.
RESEARCH = ("--directions", "--mask", "--credit", "--rule", "--keep", "--refresh", "--sigma")
COMMANDS = ["", "bench", *(name for name, _ in every_command())]


@pytest.fixture(autouse=True)
def screen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(SCREEN_COLUMNS))


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_a_screen(name: str, edgezo: Command) -> None:
    code, out, _ = edgezo(*name.split(), "--help")
    lines = out.splitlines()
    assert code == 0 and len(lines) <= SCREEN_LINES, "\n".join(lines)
    assert max(map(len, lines)) <= SCREEN_COLUMNS


@pytest.mark.parametrize("name", ["finetune", "plan", "eval", "data", "meta-train", "bench speed"])
def test_the_long_help_has_every_option(name: str, edgezo: Command) -> None:
    code, everything, _ = edgezo(*name.split(), "--help-all")
    _, short, _ = edgezo(*name.split(), "--help")
    assert code == 0 and "--help-all" in short
    command: click.Command = cli
    for word in name.split():
        assert isinstance(command, click.Group)
        command = command.commands[word]
    options = [option for option in command.params if isinstance(option, click.Option)]
    assert (
        not {word for option in options for word in option.opts}
        - {*everything.split()}
        - {f"{word}," for word in everything.split()}
        - {word.rstrip(",") for word in everything.split()}
    )
    assert not set(RESEARCH) & set(short.split())
    assert len(short.splitlines()) < len(everything.splitlines())


def test_a_setting_of_every_day_takes_one_line(edgezo: Command) -> None:
    _, out, _ = edgezo("finetune", "--help")
    for field in FIELDS.values():
        if field.brief:
            assert any(line.rstrip().endswith(field.brief) for line in out.splitlines()), field.name
            assert field.brief[-1] in ".]"


@pytest.mark.parametrize("group", ["", "bench"])
def test_what_a_command_does_is_not_cut_off(group: str, edgezo: Command) -> None:
    commands = edgezo(*group.split(), "--help")[1].partition("\nCommands:\n")[2]
    assert commands and "..." not in commands

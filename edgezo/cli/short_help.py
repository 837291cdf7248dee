"""Help that fits a screen: of a command with many settings ``--help`` shows those of every day, ``--help-all`` all."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import click

from edgezo.cli.options import help_text
from edgezo.plan.field import Field
from edgezo.plan.fields import FIELDS, GROUPS, flag

_EVERYTHING = "edgezo.help_all"  # in click's context: every option is asked for
_REST = "This command"


def _show_everything(ctx: click.Context, param: click.Parameter, asked: bool) -> None:
    if asked:
        ctx.meta[_EVERYTHING] = True
        click.echo(ctx.get_help(), color=ctx.color)
        ctx.exit()


class ShortHelp(click.Command):
    """A command whose help is short, in the groups of the settings. ``rare``: options that only the long help has."""

    def __init__(self, *args: Any, rare: Collection[str] = (), **more: Any):
        super().__init__(*args, **more)
        self.rare = rare
        everything = click.Option(
            ["--help-all"],
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=_show_everything,
            help="Show every option, those for research among them.",
        )
        self.params.append(everything)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, group by group."""
        everything = bool(ctx.meta.get(_EVERYTHING))
        sections = {title: [*self._records(ctx, title, everything)] for title in _titles()}
        rows = [row for records in sections.values() for row in records]
        width = 0 if everything else max(len(name) for name, _ in rows)
        for title, records in sections.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl([(name.ljust(width), text) for name, text in records])

    def _records(
        self, ctx: click.Context, title: str, everything: bool
    ) -> Iterator[tuple[str, str]]:
        """(option, what it does) of a group."""
        for option in self.get_params(ctx):
            record, field = option.get_help_record(ctx), _field_of(option)
            if record is None or title != (_REST if field is None else _title_of(field)):
                continue
            if everything:
                yield record
            elif option.name not in self.rare:
                if field is None:
                    yield record
                elif field.brief:
                    yield f"{flag(field.name)} {field.metavar or 'NAME'}", field.brief


def _field_of(option: click.Parameter) -> Field | None:
    """The setting that an option gives; None for an option of a command's own, whatever its name."""
    field = FIELDS.get(option.name or "")
    return field if field is not None and getattr(option, "help", "") == help_text(field) else None


def _titles() -> list[str]:
    return [*(group.title for group in GROUPS.values()), _REST]


def _title_of(field: Field) -> str:
    """The title of the group that a setting is shown in."""
    return next(group.title for group in GROUPS.values() if field in group.fields)

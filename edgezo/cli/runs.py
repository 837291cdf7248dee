"""Commands about runs that are there: report writes a page, compare and runs show tables, rm removes a run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import click

from edgezo.cli.options import base_option, emit, json_option, printable
from edgezo.errors import UsageError


@click.command(short_help="Write report.html, a page about a run, in its directory.")
@click.argument("directory", metavar="RUN")
@click.option(
    "--ask", is_flag=True, help="First ask base and run: loss of other text, ten written answers."
)
@base_option
@json_option
def report(directory: str, ask: bool, base: str | None, as_json: bool) -> None:
    """Write report.html, a page about a run, in its directory; of an unfinished run too."""
    from edgezo.run.claims import check_ours
    from edgezo.run.overview import Overview
    from edgezo.run.report import write_report

    run = Overview.of(check_ours(Path(directory)))
    if ask:
        from edgezo.run.asked import ask as ask_both

        ask_both(run, lambda text: click.echo(printable(text), err=True), base)
    written = write_report(run)
    shown = f"report {run.files.report}" + ("" if written else " (as it was)")
    result = {"run": directory, "report": str(run.files.report), "state": run.state}
    emit(as_json, {**result, "steps": run.steps}, shown)


@click.command(short_help="Compare runs: results, costs, and settings that differ.")
@click.argument("runs", metavar="RUN RUN...", nargs=-1, required=True)
@json_option
def compare(runs: Sequence[str], as_json: bool) -> None:
    """Compare runs: what they reached, what that took, and in which settings they differ."""
    from edgezo.cli.tables import comparison_table
    from edgezo.run.comparison import comparison
    from edgezo.run.overview import Overview

    result = comparison([Overview.of(Path(run)) for run in runs])
    emit(as_json, result, comparison_table(result))


@click.command("runs", short_help="List the runs in a directory and below it.")
@click.argument("folder", metavar="[DIR]", default="runs")
@json_option
def list_runs(folder: str, as_json: bool) -> None:
    """List the runs in a directory and below it: finished, unfinished with the command that goes on, damaged."""
    from edgezo.cli.tables import runs_table
    from edgezo.run.comparison import figures_of_run
    from edgezo.run.overview import UNFINISHED, runs_below

    lines = []
    for run in runs_below(Path(folder)):
        more = {"problem": run.problem} if run.problem else {}
        more |= {"resume": run.resume_command} if run.state == UNFINISHED else {}
        lines.append({**figures_of_run(run), **more})
    emit(as_json, {"folder": folder, "runs": lines}, runs_table(lines, folder))
    commands = [line["resume"] for line in lines if "resume" in line]
    if commands and not as_json:
        click.echo("\n".join(["\ngo on with", *commands]))  # not wrapped, to be copied


@click.command("rm", short_help="Remove the directory of a run.")
@click.argument("directory", metavar="RUN")
@click.option("--yes", is_flag=True, help="Remove it without a question.")
@json_option
def remove_run(directory: str, yes: bool, as_json: bool) -> None:
    """Remove the directory of a run, if every file in it is edgezo's and nothing runs there."""
    from edgezo.machine.hardware import format_bytes
    from edgezo.run.removal import removable, remove

    run = removable(Path(directory))
    size = f"{len(run.names)} files, {format_bytes(run.size_bytes)}"
    if not yes:
        if as_json or not sys.stdin.isatty():
            raise UsageError(f"{directory} would be removed ({size}). Give --yes if it is to be.")
        click.confirm(f"Remove {directory} ({size})?", abort=True, err=True)
    remove(run)
    result = {"removed": directory, "files": len(run.names), "size_bytes": run.size_bytes}
    emit(as_json, result, f"removed {directory} ({size})")

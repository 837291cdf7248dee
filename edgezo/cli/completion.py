"""``edgezo completion``: the script by which a shell completes commands, options and their choices. It is click's."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from edgezo.cli.options import echo_json, json_option

SHELLS = ("bash", "zsh", "fish")


@click.command(short_help="Print a script that completes commands and options.")
@click.argument("shell", type=click.Choice(SHELLS))
@json_option
@click.pass_context
def completion(context: click.Context, shell: str, as_json: bool) -> None:
    """Print a script that completes edgezo's commands and options: eval "$(edgezo completion bash)" in ~/.bashrc."""
    kind = get_completion_class(shell)
    if kind is None:
        raise TypeError(f"click knows no completion for {shell}")
    script = kind(context.find_root().command, {}, "edgezo", "_EDGEZO_COMPLETE").source()
    if as_json:
        echo_json({"shell": shell, "script": script})
    else:
        click.echo(script)

"""``edgezo chat``: talk to a run or a model, on a wide terminal beside another one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from edgezo.cli.options import echo_json, json_option, options, printable, use_threads
from edgezo.cli.use import TAKES, fitting, note, threads_of

if TYPE_CHECKING:
    from rich.table import Table

    from edgezo.plan.config import RunConfig
    from edgezo.run.chat import Talk

LENGTHS = (2048, 1024, 512, 256)  # tokens of a conversation, where none are asked for
WIDE = 80  # columns of a terminal on which two answers have room beside each other
_BASE = ""  # --compare without a model

Show = Callable[[int, str], None]  # (the place of the model, a piece of its answer)


@click.command()
@click.argument("target", type=click.Path(), metavar="RUN|MODEL")
@click.option(
    "--compare",
    is_flag=False,
    flag_value=_BASE,
    metavar="[MODEL]",
    help="Answer by this model too, first.  [default: the run's base]",
)
@click.option(
    "--temperature", type=float, default=0.0, show_default=True, help="0: the likeliest token."
)
@click.option(
    "--top-p", type=float, default=1.0, show_default=True, help="Of the likeliest tokens only."
)
@click.option("--seed", "chance", type=int, default=0, show_default=True, help="Of the sampling.")
@click.option("--system", metavar="TEXT", help="What the system says first.")
@options("max_length", "max_new_tokens", *TAKES)
@json_option
def chat(
    target: str,
    compare: str | None,
    temperature: float,
    top_p: float,
    chance: int,
    system: str | None,
    as_json: bool,
    **given: str | None,
) -> None:
    """Talk to a run or a model: one line, one answer. Ctrl-C stops an answer, Ctrl-D ends."""
    asked = given["max_length"] is not None
    given = {**given, "max_length": given["max_length"] or str(LENGTHS[0])}
    given["max_new_tokens"] = given["max_new_tokens"] or "256"
    use_threads(threads_of(given))
    from edgezo.network.sampling import Sampler
    from edgezo.run.chat import Talk
    from edgezo.run.predict import predictor_with_room

    Sampler.of(temperature, top_p, chance)  # refuses numbers without a meaning before all else
    with ExitStack() as at_end:
        talks = []
        for name, cfg in _requests(target, compare, given):
            lengths = (cfg.max_length,) if asked else LENGTHS
            used = at_end.enter_context(
                predictor_with_room(name, cfg, lengths, note, "a conversation")
            )
            talks.append(Talk(used, Sampler.of(temperature, top_p, chance), system))
        turns = list(_turns(talks, shown=not as_json))
        if as_json:
            echo_json({"model": target, "turns": turns})


def _requests(
    target: str, compare: str | None, given: Mapping[str, str | None]
) -> list[tuple[str, RunConfig]]:
    """The models that answer, in their order. A base has the precision of its run, so that training is what differs."""
    from edgezo.run.predict import base_of, use_request

    asked = use_request(target, given)
    if compare is None:
        return [(target, asked)]
    if compare != _BASE:
        return [(compare, use_request(compare, given)), (target, asked)]
    base = base_of(target)
    alike = {**given, "precision": given["precision"] or asked.precision}
    return [(base, use_request(base, alike)), (target, asked)]


def _turns(talks: Sequence[Talk], shown: bool) -> Iterator[dict[str, Any]]:
    """Answer line after line, shown piece by piece; each turn with its answers by model."""
    names = [talk.used.target for talk in talks]
    for line in _lines(shown):
        if not line.strip():
            continue
        with page(names) if shown else _nowhere() as show:
            answers = [_answer(talk, line, partial(show, i)) for i, talk in enumerate(talks)]
        cut = {name: talk.most_written for name, talk in zip(names, talks, strict=True)}
        cut = {name: most for name, most in cut.items() if most}
        for name, most in cut.items() if shown else ():
            tokens = "1 token" if most == 1 else f"{most} tokens"
            note(f"{name}: cut at {tokens}, the most that an answer may have (--max-new-tokens)")
        turn = {"prompt": line, "answers": dict(zip(names, answers, strict=True))}
        yield {**turn, **({"cut": list(cut)} if cut else {})}


def _lines(shown: bool) -> Iterator[str]:
    """What the user writes, until the end of standard input (Ctrl-D)."""
    if not (shown and sys.stdin.isatty()):
        for line in sys.stdin:
            yield line.rstrip("\n")
        return
    while True:
        try:
            yield input("> ")
        except EOFError:
            click.echo()
            return


@contextmanager
def _nowhere() -> Iterator[Show]:
    yield lambda place, piece: None


@contextmanager
def page(names: Sequence[str]) -> Iterator[Show]:
    """Where the answers to one line are shown: on a wide terminal beside each other, else one after the other."""
    from edgezo.cli.terminal import stdout

    console = stdout()
    wide = console.is_terminal and not console.is_dumb_terminal and console.width >= WIDE
    with _columns(names, console) if wide and len(names) > 1 else _lines_of(names) as show:
        yield show


@contextmanager
def _lines_of(names: Sequence[str]) -> Iterator[Show]:
    shown = set[int]()

    def show(place: int, piece: str) -> None:
        if place not in shown and len(names) > 1:
            click.echo("\n" * bool(shown) + f"[{printable(names[place])}] ", nl=False)
        shown.add(place)
        click.echo(fitting(printable(piece), sys.stdout), nl=False)
        sys.stdout.flush()

    yield show
    click.echo()


@contextmanager
def _columns(names: Sequence[str], console: Any) -> Iterator[Show]:
    from rich.live import Live

    texts = ["" for _ in names]
    with Live(_beside(names, texts), console=console, auto_refresh=False) as live:

        def show(place: int, piece: str) -> None:
            texts[place] += fitting(printable(piece), sys.stdout)
            live.update(_beside(names, texts), refresh=True)

        yield show


def _beside(names: Sequence[str], texts: Sequence[str]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(expand=True, padding=(0, 2))
    for _ in names:
        table.add_column(ratio=1, overflow="fold")
    table.add_row(*(Text(printable(name), style="bold") for name in names))
    table.add_row(*(Text(text.strip()) for text in texts))
    return table


def _answer(talk: Talk, line: str, show: Callable[[str], None]) -> str:
    """The answer to a line. Ctrl-C ends it where it stands."""
    from edgezo.machine.interrupts import stopping

    show("")
    with stopping() as stopped:
        for piece in talk.answer(line, stopped):
            show(piece)
    return talk.last

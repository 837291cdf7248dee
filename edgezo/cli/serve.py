"""``edgezo serve``: an OpenAI-compatible server of one run or model, for this machine unless it is asked for more."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import click

from edgezo.cli.options import echo_json, json_option, options, use_threads
from edgezo.cli.use import ASKING, TAKES, note, threads_of
from edgezo.errors import EdgezoError, UsageError

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@click.command(short_help="Answer programs that speak OpenAI's form.")
@click.argument("target", type=click.Path(), metavar="RUN|MODEL")
@click.option(
    "--host",
    default=LOOPBACK[0],
    show_default=True,
    help="Address; another one asks for --api-key.",
)
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any."
)
@click.option(
    "--api-key",
    metavar="KEY",
    envvar="EDGEZO_API_KEY",
    show_envvar=True,
    help="Only who has this key is answered.",
)
@options(*ASKING, *TAKES)
@json_option
def serve(
    target: str, host: str, port: int, api_key: str | None, as_json: bool, **given: str | None
) -> None:
    """Answer programs that speak OpenAI's form: /v1/chat/completions and /v1/completions. Ctrl-C ends."""
    if host not in LOOPBACK and not api_key:
        raise UsageError(
            f"--host {host} lets other machines ask: give an --api-key that they must have, or leave out --host"
        )
    given = {**given, "max_length": given["max_length"] or "2048"}
    given["max_new_tokens"] = given["max_new_tokens"] or "256"
    use_threads(threads_of(given))
    from edgezo.machine.interrupts import stopping
    from edgezo.machine.process_memory import Meter
    from edgezo.run.predict import predictor, use_request

    try:
        from edgezo.run.http_server import serving
        from edgezo.run.serving import Desk
    except ImportError as missing:
        raise EdgezoError(
            f"edgezo serve needs {missing.name}: pip install 'edgezo[serve]'. Or use export --format gguf, and "
            "llama.cpp's server"
        ) from missing
    cfg = use_request(target, given)
    meter = Meter()
    with _listening(host, port) as listening, predictor(target, cfg, note) as used:
        desk = Desk(used)
        hosts = (*LOOPBACK, listening.getsockname()[0])
        with stopping(desk.close), serving(desk, listening, hosts, api_key):
            note(f"{desk.name} answers at {_address(listening)}/v1 (Ctrl-C ends)")
            desk.work()
    result = {"model": target, "answered": desk.answered, **meter.summary()}
    if as_json:
        echo_json(result)
    else:
        note(f"{desk.answered} requests answered")


@contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket for a server. Raises EdgezoError where the address is not to be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.create_server((host, port), family=family)
    except OSError as problem:
        raise EdgezoError(
            f"{host} port {port}: {problem.strerror}. Give another --port (0: any that is free), or another --host."
        ) from problem
    with listening:
        yield listening


def _address(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

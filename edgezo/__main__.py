"""``python -m edgezo`` is ``edgezo``. It listens for Ctrl-C before it imports the rest, which takes a while."""

from __future__ import annotations

from typing import NoReturn

from edgezo.machine import interrupts, streams


def main() -> NoReturn:
    """Run the command line; the process ends with its exit code."""
    streams.settle()  # first: what is opened now would take the number of a stream that is closed
    interrupts.listen()
    from edgezo.cli.main import main as command

    command()


if __name__ == "__main__":
    main()

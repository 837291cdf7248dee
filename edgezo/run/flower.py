"""The server of a fleet over Flower (flwr): its messages travel as one bytes field of a ``ConfigRecord``.

The ServerApp is one process for the whole run. It needs ``directory`` in the run's configuration, which
``scripts/fleet/begin.py`` has made, and takes the fields of ``Rules``. The other side is flower_device.py.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp

from edgezo.errors import UsageError
from edgezo.machine.clock import now_s
from edgezo.run.directory import RunFiles
from edgezo.run.fleet import BOOK, Fleet, Rules
from edgezo.run.flower_device import ORDER, REPORT, content, field
from edgezo.run.journal import open_journal

PULL_EVERY_S, REST_S = 0.1, 1.0

server_app = ServerApp()


class FlowerLinks:
    """The connected SuperNodes, as the transport of a fleet."""

    def __init__(self, grid: Grid):
        self.grid = grid

    def nodes(self) -> Sequence[int]:
        return [*self.grid.get_node_ids()]

    def exchange(self, messages: Mapping[int, bytes], wait_s: float) -> Mapping[int, bytes]:
        """Send, and collect answers until all are there or ``wait_s`` are over; a node's error is no answer."""
        begun_s = now_s()
        # A message that is not taken by then is dropped, so that a node does not answer what nobody waits for.
        sent = [
            Message(content(ORDER, data), node, "query", ttl=max(1.0, wait_s))
            for node, data in messages.items()
        ]
        waiting = {number for number in self.grid.push_messages(sent) if number}
        answers: dict[int, bytes] = {}
        while waiting and now_s() - begun_s < wait_s:
            for message in self.grid.pull_messages(waiting):
                waiting.discard(message.metadata.reply_to_message_id)
                data = None if message.has_error() else field(message.content, REPORT)
                if data is not None:
                    answers[message.metadata.src_node_id] = data
            if waiting:
                time.sleep(PULL_EVERY_S)
        return answers

    def rest(self) -> None:
        time.sleep(REST_S)


@server_app.main()
def serve(grid: Grid, context: Context) -> None:
    """The ServerApp: make the steps that the journal lacks. Raises EdgezoError."""
    given: Mapping[str, Any] = context.run_config
    if not given.get("directory"):
        raise UsageError("the run's configuration needs directory, where begin.py has made a fleet")
    files = RunFiles(Path(str(given["directory"])))
    rules = Rules(**{name: given[name] for name in Rules._fields if name in given})
    with open_journal(files.journal, resume=True) as journal:
        journal.repair()
        fleet = Fleet(journal, files.path / BOOK, rules)
        fleet.run(FlowerLinks(grid))
        print(
            f"{files.journal}: {journal.next_step} steps, {fleet.sent_bytes} bytes sent to devices, "
            f"{fleet.received_bytes} received"
        )

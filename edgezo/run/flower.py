"""A fleet over Flower (flwr): its messages travel as one bytes field of a ``ConfigRecord``.

Flower starts a process of the ClientApp for each message, in both of its isolation modes (``flwr-clientapp`` of flwr
1.42). Loading a model each time would take longer than a step, so the ClientApp is a relay: the model stays in a
process that listens on a Unix socket (``scripts/fleet/device.py``), whose path is ``device`` in the node's
configuration. The ServerApp is one process for the whole run. It needs ``directory`` in the run's configuration, which
``scripts/fleet/begin.py`` has made, and takes the fields of ``Rules``.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from edgezo.errors import UsageError
from edgezo.machine.clock import now_s
from edgezo.machine.local_socket import ask
from edgezo.run.directory import RunFiles
from edgezo.run.fleet import Fleet, Rules
from edgezo.run.fleet_begin import BOOK
from edgezo.run.journal import open_journal

RECORD, ORDER, REPORT = "edgezo", "order", "report"  # names of the record, and of its one field
PULL_EVERY_S, REST_S = 0.1, 1.0

server_app, client_app = ServerApp(), ClientApp()


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
            Message(_record(ORDER, data), node, "query", ttl=max(1.0, wait_s))
            for node, data in messages.items()
        ]
        waiting = {number for number in self.grid.push_messages(sent) if number}
        answers: dict[int, bytes] = {}
        while waiting and now_s() - begun_s < wait_s:
            for message in self.grid.pull_messages(waiting):
                waiting.discard(message.metadata.reply_to_message_id)
                data = None if message.has_error() else _field(message.content, REPORT)
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


@client_app.query()
def losses(message: Message, context: Context) -> Message:
    """The ClientApp: hand an order on to the device's process, and its report back. Raises EdgezoError."""
    order = _field(message.content, ORDER)
    if order is None:
        raise UsageError(f"a message has no bytes {ORDER!r} in its record {RECORD!r}")
    report = ask(Path(str(context.node_config["device"])), order)
    return Message(_record(REPORT, report), reply_to=message)


def _record(name: str, data: bytes) -> RecordDict:
    return RecordDict({RECORD: ConfigRecord({name: data})})


def _field(content: RecordDict, name: str) -> bytes | None:
    """The bytes of a message; None where it has none."""
    record = content.config_records.get(RECORD)
    data = None if record is None else record.get(name)
    return data if isinstance(data, bytes) else None

"""The device's side of a fleet over Flower (flwr): a ClientApp that hands orders on to the process with the model.

Flower starts a process of the ClientApp for each message, in both of its isolation modes (``flwr-clientapp`` of flwr
1.42). Loading a model each time would take longer than a step, so the model stays in a process that listens on a Unix
socket (``scripts/fleet/device.py``), whose path is ``device`` in the node's configuration. For the same reason this
module imports next to nothing of edgezo.
"""

from __future__ import annotations

from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from edgezo.errors import UsageError
from edgezo.machine.local_socket import ask

RECORD, ORDER, REPORT = "edgezo", "order", "report"  # names of the record, and of its one field

client_app = ClientApp()


@client_app.query()
def losses(message: Message, context: Context) -> Message:
    """The ClientApp: hand an order on to the device's process, and its report back. Raises EdgezoError."""
    order = field(message.content, ORDER)
    if order is None:
        raise UsageError(f"a message has no bytes {ORDER!r} in its record {RECORD!r}")
    report = ask(Path(str(context.node_config["device"])), order)
    return Message(content(REPORT, report), reply_to=message)


def content(name: str, data: bytes) -> RecordDict:
    """The content of a message with one bytes field."""
    return RecordDict({RECORD: ConfigRecord({name: data})})


def field(message: RecordDict, name: str) -> bytes | None:
    """The bytes of a message; None where it has none."""
    record = message.config_records.get(RECORD)
    data = None if record is None else record.get(name)
    return data if isinstance(data, bytes) else None

"""A device of a fleet: keeps its model in memory, and answers the SuperNode's ClientApp on a Unix socket.

    python scripts/fleet/device.py SETTINGS.toml --name NAME --socket PATH

SETTINGS.toml names the device's rows (`data`), its directory (`out`), and what else it has otherwise than the fleet:
`model` where the base lies elsewhere, `max_mem`, `threads`, `micro_batch`. All else comes with the first order.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from edgezo.errors import EdgezoError
from edgezo.machine.local_socket import listen
from edgezo.plan.request import read_settings
from edgezo.run.device import Device


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("settings")
    parser.add_argument("--name", required=True)
    parser.add_argument("--socket", type=Path, required=True)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    try:
        device = Device(
            read_settings(args.settings), args.name, lambda text: print(text, file=sys.stderr)
        )
        try:
            listen(args.socket, device.answer, lambda: True)
        finally:
            device.close()
    except EdgezoError as problem:
        sys.exit(str(problem))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()

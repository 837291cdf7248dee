"""Begin a fleet: a directory with the base's identity and the settings, for the server.

    python scripts/fleet/begin.py SETTINGS.toml

SETTINGS.toml is a request as `edgezo finetune --config` takes it, with `out`. Its rows show the task; nobody trains on
them.
"""

from __future__ import annotations

import sys

from edgezo.errors import EdgezoError
from edgezo.plan.request import make_config, read_settings
from edgezo.run.fleet_begin import begin_fleet


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    try:
        print(begin_fleet(make_config(read_settings(sys.argv[1]))))
    except EdgezoError as problem:
        sys.exit(str(problem))


if __name__ == "__main__":
    main()

"""One process of several: makes the runs that a file lists, one after the other, and writes down how each ended.

    python ranks_at_work.py SCENARIOS.json ENDS.json        RANK, WORLD_SIZE and MASTER_ADDR are in the environment

A scenario is {"port", "settings": one request for each rank, "resume": whether each rank goes on with a run}.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from edgezo.errors import EdgezoError
from edgezo.machine.links import directory_of_rank
from edgezo.plan.request import make_config
from edgezo.run.train import finetune


def end_of(scenario: dict[str, Any], rank: int) -> dict[str, Any]:
    """The summary of a run, or its error."""
    os.environ["MASTER_PORT"] = str(scenario["port"])
    settings = scenario["settings"][rank]
    out = directory_of_rank(settings["out"])
    cfg = make_config({**settings, "out": out})
    try:
        summary = finetune(cfg, resume=scenario["resume"][rank])
    except EdgezoError as error:
        return {"error": str(error), "code": error.exit_code}
    return {name: summary[name] for name in ("eval_after", "trained_sha256", "steps", "processes")}


if __name__ == "__main__":
    listed = json.loads(Path(sys.argv[1]).read_text())
    ends = [end_of(scenario, int(os.environ["RANK"])) for scenario in listed]
    Path(sys.argv[2]).write_text(json.dumps(ends))

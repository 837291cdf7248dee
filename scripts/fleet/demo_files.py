"""What scripts/fleet_demo.sh begins with: the bundled rows in four slices, and the settings of server and devices.

    python scripts/fleet/demo_files.py FOLDER [--model MODEL] [--steps 6] [--devices 4]

`--model tiny` makes a random model of the tests in place of a real one.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import tomli_w

from edgezo.data.tasks import EXAMPLE_FOLDER, TASKS

NAMES = ("anna", "bert", "cleo", "dora")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--devices", type=int, default=len(NAMES))
    args = parser.parse_args()
    folder: Path = args.folder.resolve()
    folder.mkdir(parents=True)
    model = args.model
    if model == "tiny":
        sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))
        from conftest import make_model

        model = str(make_model(folder / "model", num_hidden_layers=2))
    lines = (EXAMPLE_FOLDER / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    validation = (EXAMPLE_FOLDER / "validation.jsonl").read_bytes()
    names = NAMES[: args.devices]
    size = -(-len(lines) // len(names))
    parts = {name: lines[i * size : (i + 1) * size] for i, name in enumerate(names)}
    for name, part in {"all": lines, **parts}.items():
        (folder / "rows" / name).mkdir(parents=True)
        (folder / "rows" / name / "train.jsonl").write_text("".join(part), encoding="utf-8")
        (folder / "rows" / name / "validation.jsonl").write_bytes(validation)

    task = TASKS["example"]
    intents = sorted({json.loads(line)[task.label_field] for line in lines})
    request = {
        **{"model": model, "template": task.template, "label_field": task.label_field},
        **{"labels": ",".join(f"{intent}={intent}" for intent in intents), "precision": "bf16"},
        **{"train": "lowrank", "batch_size": 8, "micro_batch": 1, "steps": args.steps},
        **{"max_mem": "900MB" if args.model != "tiny" else "4GB", "eval_limit": 40},
    }
    alone = ("max_mem", "micro_batch")
    settings = {
        **{name: {**request, "data": str(folder / "rows" / "all")} for name in ("server", "one")},
        **{n: {k: request[k] for k in alone} | {"data": str(folder / "rows" / n)} for n in names},
    }
    for name, values in settings.items():
        values["out"] = str(folder / name)
        (folder / f"{name}.toml").write_text(tomli_w.dumps(values), encoding="utf-8")


if __name__ == "__main__":
    main()

"""How far is the plan from the measured peak? Random requests, each run in its own process.

    python benchmarks/plan_error.py --out DIR [--count 200] [--seed 0] [--data-root DIR] [--json FILE]

A request is drawn from shapes of models (random weights, few blocks or all), stores, kinds of rows, estimators and
presets, trained parts, residencies, batch and micro-batch sizes. Its error is (planned - measured) / measured, where
measured is VmHWM of the whole process, reading and loading included. With --data-root the draw takes built-in tasks
too. Finished runs are kept, so a second call goes on where the first one ended. Writes DIR/plan-error.json, or FILE;
docs/figures/plan_error.py draws it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from random_models import CONFIGS, KINDS, make_model, make_rows

from edgezo.errors import UsageError
from edgezo.plan.planner import BACKWARD
from edgezo.plan.request import make_config
from edgezo.zo.presets import PRESETS

MB = 1e6
REAL = "smollm2-135m-instruct"
# (name, blocks); None: the published model with its weights, all blocks.
MODELS: list[tuple[str, int | None]] = [
    *[(REAL, None)] * 4,
    *((name, blocks) for name in CONFIGS for blocks in (1, 3)),
    *(
        (name, 12)
        for name in ("smollm2-135m-instruct", "smollm2-360m-instruct", "gpt2", "opt-125m")
    ),
    *((name, 6) for name in ("qwen2.5-0.5b", "qwen3-0.6b", "gemma-3-270m", "phi-3-third")),
]
STORES = ["fp32", "bf16", "int8", "int4"]
TASKS = ["sst2", "trec", "ag_news", "boolq", "copa", "squad", "gsm8k"]
TRAIN = [
    None,
    None,
    None,
    "lowrank",
    "lowrank+head",
    "head",
    "norms",
    "scales",
    "full",
    "full+head",
    "probe",
]
BATCHES, LENGTHS = [2, 4, 8, 16, 32], [24, 48, 96, 200, 400, 800]
# Answers of these tasks are written, here short ones.
WRITTEN = {task: ["--max-new-tokens", "8"] for task in ("squad", "gsm8k")}
WITH_LABELS = ["label", "sst2", "trec", "ag_news", "boolq"]
# A run computes at most about so many products (tokens of a batch x weights of the blocks), to be short.
MOST_WORK = 12e9


@dataclass(frozen=True)
class Request:
    """What a run is asked for."""

    model: str
    blocks: int | None  # None: the published model, all blocks
    rows: str  # a kind of random_models.KINDS, or a built-in task
    tokens: int  # --max-length, and the longest random row
    count: int  # random rows
    estimator: str
    train: str | None
    precision: str
    residency: str
    rank: int | None
    batch: int
    micro_batch: int | None
    steps: int

    @property
    def name(self) -> str:
        return "-".join(str(value) for value in asdict(self).values())

    def options(self) -> list[str]:
        """Options of ``edgezo finetune`` but for model, rows and folder."""
        values = {
            "--precision": self.precision,
            "--estimator": self.estimator,
            "--train": self.train,
            "--residency": self.residency,
            "--batch-size": self.batch,
            "--micro-batch": self.micro_batch,
            "--rank": self.rank,
            "--max-length": self.tokens,
            "--steps": self.steps,
            "--eval-limit": 4,
            "--max-mem": "20GB",
        }
        given = [(key, str(value)) for key, value in values.items() if value is not None]
        more = KINDS[self.rows][1] if self.rows in KINDS else WRITTEN.get(self.rows, [])
        return [*(word for pair in given for word in pair), *more]


def methods(draw: random.Random) -> Iterator[dict[str, Any]]:
    """Random settings of store, trained part and residency for a random estimator; many of them mean nothing."""
    presets = [name for name in PRESETS if "finetuner" not in name]  # those need a file
    forward_only = draw.choice([*presets, *["grzo"] * len(presets)])
    estimator = draw.choice(["lora", "lora", "addax", *[forward_only] * 7])
    while True:
        yield {
            "estimator": estimator,
            "train": None if estimator in BACKWARD else draw.choice(TRAIN),
            "precision": draw.choice(STORES),
            "residency": draw.choice(["resident", "resident", "disk"]),
            "rank": draw.choice([None, None, None, 4, 32]),
        }


def means_something(settings: dict[str, Any]) -> bool:
    """Whether a run would accept these settings."""
    try:
        make_config({"model": "m", "data": "d", **settings})
    except UsageError:
        return False
    return True


def drawn(draw: random.Random, tasks: Sequence[str]) -> Request:
    """A random request that means something and is short."""
    method = next(method for method in methods(draw) if means_something(method))
    model, blocks = draw.choice(MODELS)
    rows = draw.choice([*KINDS, *KINDS, *tasks])
    while rows not in WITH_LABELS and method["train"] == "probe":
        rows = draw.choice([*KINDS, *tasks])
    most = MOST_WORK / weights_of_blocks(model, blocks)
    tokens = draw.choice([n for n in LENGTHS if BATCHES[0] * n <= most] or LENGTHS[:1])
    batch = draw.choice([size for size in BATCHES if size * tokens <= most] or BATCHES[:1])
    return Request(
        model=model,
        blocks=blocks,
        rows=rows,
        tokens=tokens,
        count=draw.choice([40, 200, 200, 200 if rows == "messages" else 3000]),
        batch=batch,
        micro_batch=draw.choice([None, None, max(1, batch // 2), max(1, batch // 4)]),
        steps=draw.choice([1, 2]),
        **method,
    )


def weights_of_blocks(model: str, blocks: int | None) -> int:
    """About the number of weights in the blocks."""
    config = CONFIGS[model]
    hidden = config.get("hidden_size", config.get("n_embd", 0))
    inner = config.get("intermediate_size", config.get("ffn_dim", 4 * hidden))
    depth = config.get("num_hidden_layers", config.get("n_layer", 0))
    return int((blocks or depth) * hidden * (3 * inner + 3 * hidden))


def requests(count: int, seed: int, tasks: Sequence[str]) -> list[Request]:
    """``count`` different requests."""
    draw, made = random.Random(seed), {}
    while len(made) < count:
        request = drawn(draw, tasks)
        made[request.name] = request
    return list(made.values())


def run(request: Request, out: Path, data_root: Path | None, more: Sequence[str]) -> dict[str, Any]:
    """The figures of one run: the request, planned and measured bytes; or its exit code and message."""
    folder = out / "run"
    shutil.rmtree(folder, ignore_errors=True)
    model = (
        request.model
        if request.blocks is None
        else str(make_model(request.model, request.blocks, out))
    )
    if request.rows in KINDS:
        source = ["--data", str(make_rows(request.tokens, request.rows, out, request.count))]
    else:
        source = ["--task", request.rows, "--data-root", str(data_root)]
    # Threads that wait give up their cores: a run is not slowed so much by others, and takes as much memory.
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, "-m", "edgezo", "finetune", "--model", model, *source]
    command += [*request.options(), *more, "--json", "--out", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    line: dict[str, Any] = {"request": asdict(request), "exit": done.returncode}
    if done.returncode:
        return line | {"message": done.stderr[-600:]}
    summary = json.loads(done.stdout)
    plan = json.loads((folder / "plan.json").read_text())
    phases = {key: value for key, value in summary.items() if key.endswith("_rss_bytes")}
    return line | {
        "planned_bytes": summary["planned_peak_bytes"],
        "measured_bytes": summary["peak_rss_bytes"],
        "micro_batch": summary["micro_batch"],
        "trained": summary["trained"],
        "phases": phases,
        "items": {f"{i['name']}/{i['phase']}": i["bytes"] for i in plan["items"]},
    }


def error_of(line: dict[str, Any]) -> float:
    """(planned - measured) / measured."""
    return float(line["planned_bytes"] / line["measured_bytes"] - 1)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that so large a share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


# ---------------------------------------------------------------------------------------------
# Tables

Group = Callable[[dict[str, Any]], str]
GROUPS: dict[str, Group] = {
    "residency": lambda line: line["request"]["residency"],
    "estimator": lambda line: (
        name if (name := line["request"]["estimator"]) in ("lora", "addax") else "forward-only"
    ),
    "trained": lambda line: "full weights" if "full" in line["trained"] else "less",
    "store": lambda line: line["request"]["precision"],
    "rows": lambda line: line["request"]["rows"],
    "model": lambda line: line["request"]["model"],
}


def table_row(name: str, lines: Sequence[dict[str, Any]]) -> str:
    """Number of runs, those under, median, 95th percentile and largest error in % and MB: a row of a Markdown table."""
    errors = [error_of(line) for line in lines]
    over = [(line["planned_bytes"] - line["measured_bytes"]) / MB for line in lines]
    peaks = [line["measured_bytes"] / MB for line in lines]
    cells = [
        str(len(lines)),
        str(sum(error < 0 for error in errors)),
        f"{statistics.median(peaks):.0f} MB",
    ]
    for values, form in ((errors, "{:.1%}"), (over, "{:.0f} MB")):
        middle = (statistics.median(values), percentile(values, 0.95), max(values))
        cells += [form.format(value) for value in middle]
    return f"| {name} | " + " | ".join(cells) + " |"


def tables(lines: Sequence[dict[str, Any]], groups: Sequence[str] = tuple(GROUPS)) -> str:
    """A Markdown table: all runs, then each group."""
    ended = [line for line in lines if not line["exit"]]
    head = "| runs | number | under | peak | median | 95 % | largest | median | 95 % | largest |"
    text = [head, "|---|" + "---|" * 9, table_row("all", ended)]
    for group in groups:
        for name in sorted({GROUPS[group](line) for line in ended}):
            chosen = [line for line in ended if GROUPS[group](line) == name]
            text.append(table_row(f"{group} {name}", chosen))
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--data-root", type=Path, help="folder of data sets: built-in tasks are drawn too"
    )
    parser.add_argument(
        "--json", type=Path, help="file of the figures (default: plan-error.json in --out)"
    )
    parser.add_argument("more", nargs="*", help="further options of edgezo finetune, after --")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.json or args.out / "plan-error.json"
    lines = json.loads(file.read_text()) if file.exists() else []
    ended = {json.dumps(line["request"]) for line in lines}
    for number, request in enumerate(
        requests(args.count, args.seed, TASKS if args.data_root else [])
    ):
        if json.dumps(asdict(request)) in ended:
            continue
        line = run(request, args.out, args.data_root, args.more)
        lines.append(line)
        file.write_text("[\n" + ",\n".join(map(json.dumps, lines)) + "\n]\n")
        if line["exit"]:
            print(f"{number} {request.name}: exit {line['exit']}\n{line['message']}", flush=True)
            continue
        sizes = f"{line['planned_bytes'] / MB:7.0f}{line['measured_bytes'] / MB:7.0f}"
        print(f"{number:4} {sizes} {error_of(line):+7.1%}  {request.name}", flush=True)
    print(tables(lines))


if __name__ == "__main__":
    main()

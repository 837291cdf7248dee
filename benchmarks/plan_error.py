"""How far is the plan from the measured peak? Random requests, each run in its own process.

    python benchmarks/plan_error.py --out DIR [--count 200] [--seed 0] [--data-root DIR] [--json FILE] [--replan]

A request is drawn from shapes of models (random weights, few blocks or all), stores, kinds of rows, estimators and
presets, trained parts, residencies, batch and micro-batch sizes. Its error is (planned - measured) / measured, where
measured is VmHWM of the whole process, reading and loading included. With --data-root the draw takes built-in tasks
too. Finished runs are kept, so a second call goes on where the first one ended. Writes DIR/plan-error.json, or FILE;
docs/figures/plan_error.py draws it.

With --replan nothing runs: finished runs are planned anew, by the planner as it is now, from the size that their
process had when it was planned. So a change of the planner shows at once.
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
from edgezo.plan.planner import make_plan
from edgezo.plan.request import make_config
from edgezo.zo.presets import PRESETS

MB = 1e6
REAL = "smollm2-135m-instruct"
# (name, blocks); None: the published model with its weights, all blocks.
Model = tuple[str, int | None]
MODELS: list[Model] = [
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
# What first-order estimators train here; others draw it.
OF_GRADIENT = {"lora": None, "addax": "lowrank+head"}
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

    def options(self) -> dict[str, str]:
        """Options of ``edgezo finetune`` but for model, rows and folder."""
        values = {
            "precision": self.precision,
            "estimator": self.estimator,
            "train": self.train,
            "residency": self.residency,
            "batch-size": self.batch,
            "micro-batch": self.micro_batch,
            "rank": self.rank,
            "max-length": self.tokens,
            "steps": self.steps,
            "eval-limit": 4,
            "max-mem": "20GB",
        }
        words = KINDS[self.rows][1] if self.rows in KINDS else WRITTEN.get(self.rows, [])
        more = {
            name.removeprefix("--"): value
            for name, value in zip(words[::2], words[1::2], strict=True)
        }
        return {key: str(value) for key, value in values.items() if value is not None} | more


def methods(draw: random.Random) -> Iterator[dict[str, Any]]:
    """Random settings of store, trained part and residency for a random estimator; many of them mean nothing."""
    presets = [name for name in PRESETS if "finetuner" not in name]  # those need a file
    forward_only = draw.choice([*presets, *["grzo"] * len(presets)])
    estimator = draw.choice(["lora", "lora", "addax", *[forward_only] * 7])
    while True:
        yield {
            "estimator": estimator,
            "train": OF_GRADIENT[estimator] if estimator in OF_GRADIENT else draw.choice(TRAIN),
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


def drawn(draw: random.Random, models: Sequence[Model], tasks: Sequence[str]) -> Request:
    """A random request that means something and is short."""
    method = next(method for method in methods(draw) if means_something(method))
    model, blocks = draw.choice(models)
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


def requests(args: argparse.Namespace) -> list[Request]:
    """``args.count`` different requests."""
    draw, made = random.Random(args.seed), {}
    models = [model for model in MODELS if args.models is None or model[0] in args.models]
    tasks = TASKS if args.data_root else []
    while len(made) < args.count:
        request = drawn(draw, models, tasks)
        made[request.name] = request
    return list(made.values())


def asked(request: Request, out: Path, data_root: Path | None) -> dict[str, str]:
    """Options of ``edgezo finetune`` by name, with model and rows."""
    model = request.model
    if request.blocks is not None:
        model = str(make_model(request.model, request.blocks, out, alike=True))
    if request.rows in KINDS:
        rows = make_rows(request.tokens, request.rows, out, request.count)
        source = {"data": str(rows)}
    else:
        source = {"task": request.rows, "data-root": str(data_root)}
    return {"model": model, **source, **request.options()}


def run(options: dict[str, str], out: Path, more: Sequence[str]) -> dict[str, Any]:
    """The figures of one run in a process of its own; or its exit code and message."""
    folder = out / "run"
    shutil.rmtree(folder, ignore_errors=True)
    # Threads that wait give up their cores: a run is not slowed so much by others, and takes as much memory.
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-m", "edgezo", "finetune", *words, *more]
    command += ["--json", "--out", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        return {"exit": done.returncode, "message": done.stderr[-600:]}
    summary = json.loads(done.stdout)
    names = ("base_rss_bytes", "base_peak_rss_bytes", "load_rss_bytes", "load_peak_rss_bytes")
    return {
        "exit": 0,
        "planned_bytes": summary["planned_peak_bytes"],
        "measured_bytes": summary["peak_rss_bytes"],
        "trained": summary["trained"],
        **{name: summary[name] for name in names},
    }


def planned_again(options: dict[str, str], line: dict[str, Any]) -> int:
    """The peak that the planner, as it is now, plans for a finished run, from the process as it was measured."""
    from edgezo.machine.gpu_memory import confirmed
    from edgezo.machine.hardware import machine
    from edgezo.run.session import open_request

    opened = open_request(make_config(options))
    plan = make_plan(
        opened.files.shape,
        opened.cfg,
        confirmed(machine()),
        opened.dataset.token_stats(),
        base_bytes=line["base_rss_bytes"],
        read_peak_bytes=line["base_peak_rss_bytes"],
        source_bytes=opened.files.weight_bytes,
    )
    return plan.planned_peak_bytes


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
    """A row of the table of ``tables``."""
    errors = [error_of(line) for line in lines]
    over = [(line["planned_bytes"] - line["measured_bytes"]) / MB for line in lines]
    within = sum(error <= 0.05 or more <= 40 for error, more in zip(errors, over, strict=True))
    peaks = [line["measured_bytes"] / MB for line in lines]
    cells = [str(len(lines)), str(sum(error < 0 for error in errors)), str(within)]
    cells.append(f"{statistics.median(peaks):.0f} MB")
    for values, form in ((errors, "{:.1%}"), (over, "{:.0f} MB")):
        figures = (min(values), statistics.median(values), percentile(values, 0.95), max(values))
        cells.append(" / ".join(form.format(value) for value in figures))
    return f"| {name} | " + " | ".join(cells) + " |"


def tables(lines: Sequence[dict[str, Any]], groups: Sequence[str] = tuple(GROUPS)) -> str:
    """A Markdown table: all runs, then each group. Errors: least, median, 95th percentile, largest."""
    ended = [line for line in lines if not line["exit"]]
    head = (
        "| runs | number | under | within 5 % or 40 MB | median peak | error | planned - measured |"
    )
    text = [head, "|---|" + "---|" * 6, table_row("all", ended)]
    for group in groups:
        for name in sorted({GROUPS[group](line) for line in ended}):
            chosen = [line for line in ended if GROUPS[group](line) == name]
            text.append(table_row(f"{group} {name}", chosen))
    return "\n".join(text)


def save(file: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Write the figures, one run a line."""
    file.write_text("[\n" + ",\n".join(map(json.dumps, lines)) + "\n]\n")


def run_all(args: argparse.Namespace, file: Path, lines: list[dict[str, Any]]) -> None:
    """Run every request that ``lines`` does not have."""
    ended = {json.dumps(line["request"]) for line in lines}
    for number, request in enumerate(requests(args)):
        if json.dumps(asdict(request)) in ended:
            continue
        figures = run(asked(request, args.out, args.data_root), args.out, args.more)
        line = {"request": asdict(request), **figures}
        lines.append(line)
        save(file, lines)
        if line["exit"]:
            print(f"{number} {request.name}: exit {line['exit']}\n{line['message']}", flush=True)
            continue
        sizes = f"{line['planned_bytes'] / MB:7.0f}{line['measured_bytes'] / MB:7.0f}"
        print(f"{number:4} {sizes} {error_of(line):+7.1%}  {request.name}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--models", nargs="+", choices=CONFIGS, help="draw these alone")
    parser.add_argument("--data-root", type=Path, help="folder of data sets for built-in tasks")
    parser.add_argument("--json", type=Path, help="file of the figures, else --out has it")
    parser.add_argument("--replan", action="store_true", help="plan finished runs anew")
    parser.add_argument("more", nargs="*", help="further options of edgezo finetune, after --")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.json or args.out / "plan-error.json"
    lines = json.loads(file.read_text()) if file.exists() else []
    if not args.replan:
        run_all(args, file, lines)
    for line in lines if args.replan else []:
        if not line["exit"]:
            options = asked(Request(**line["request"]), args.out, args.data_root)
            line["planned_bytes"] = planned_again(options, line)
    save(file, lines)
    print(tables(lines))


if __name__ == "__main__":
    main()

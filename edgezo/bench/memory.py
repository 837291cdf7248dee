"""``edgezo bench memory``: the peak memory of each way to train, on the same rows.

    edgezo's methods    the command itself: ``edgezo finetune``, the whole batch as one micro-batch, without a cap
    inference           edgezo's plain forward over the 2B rows of a step
    baselines           memory_baselines.py: stock transformers, peft and PyTorch, and MeZO in place

Every method learns to predict every token of the rows, in a process of its own. Finished points are kept in
``points.jsonl`` and not measured again.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from edgezo import __version__
from edgezo.errors import EdgezoError, UsageError
from edgezo.machine import children
from edgezo.machine.clock import now_s
from edgezo.machine.files import atomic_path, atomic_write
from edgezo.machine.foreign import parse_json, read_small
from edgezo.machine.hardware import machine
from edgezo.machine.ownership import claim, has_form
from edgezo.machine.process_memory import Meter, allocator_policy, read_status
from edgezo.plan.fields import FIELDS, flag

STEMS = ("memory", "speed", "alignment", "accuracy")  # names of result files, without their ends
LARGEST_RESULT_BYTES = 64 * 10**6
UNLIMITED_BYTES = 10**15  # a cap that no method reaches, since what it takes freely is measured
PAGE_BEGINS = "# Accuracy of "  # of the page that bench accuracy writes
STEPS = 2  # from the second step on an optimizer has its state in memory


class Method(NamedTuple):
    """A way to train that is measured."""

    title: str
    precision: str
    settings: dict[str, str] | None  # of finetune; empty: the plain forward; None: a baseline


GRZO_WITH_SIGNS = {"estimator": "grzo", "directions": "signs"}
METHODS = {
    "inference": Method("plain forward over 2B rows, bf16", "bf16", {}),
    "grzo": Method("GRZO, signs, bf16", "bf16", GRZO_WITH_SIGNS),
    "grzo-rademacher": Method(
        "GRZO, rademacher, bf16", "bf16", {"estimator": "grzo", "directions": "rademacher"}
    ),
    "grzo-int4": Method("GRZO, signs, int4", "int4", GRZO_WITH_SIGNS),
    "inference-int8": Method("plain forward over 2B rows, int8", "int8", {}),
    "grzo-int8": Method("GRZO, signs, int8", "int8", GRZO_WITH_SIGNS),
    "lora-int8": Method(
        "LoRA block by block, int8 base", "int8", {"estimator": "lora", "train": "lora"}
    ),
    "mezo": Method(
        "MeZO, bf16, noise a tile at a time", "bf16", {"estimator": "mezo", "directions": "shared"}
    ),
    "mezo-in-place": Method("MeZO in place, bf16, as published", "bf16", None),
    "lora": Method("LoRA, bf16 base", "bf16", None),
    "lora-checkpoint": Method("LoRA + gradient checkpointing, bf16 base", "bf16", None),
    "lora-checkpoint-int4": Method("LoRA + gradient checkpointing, int4 base", "int4", None),
    "adamw": Method("full AdamW, fp32", "fp32", None),
}


def bench_memory(
    model: str,
    *,
    methods: Sequence[str] = tuple(METHODS),
    batch_sizes: Sequence[int] = (16,),
    tokens: Sequence[int] = (128,),
    threads: int | None = None,
    device: str = "cpu",
    cap_bytes: int | None = None,
    limit_s: float | None = None,
    out: Path,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measure every method at every batch size and every number of tokens in a row.

    Writes points.jsonl, memory.json and memory.png to ``out``. The files also hold the points of earlier calls, which
    are not measured again; the result has those asked for.

    In a row, ``peak_rss_bytes`` is the peak of the process and ``train_peak_rss_bytes`` the peak of the steps (with
    edgezo's methods, of everything after loading). On ``cuda``, ``cuda_peak_bytes`` is what the allocator reserved and
    the driver's context. A method that fails (no memory, a missing package) is a row with ``error``. A baseline that
    takes longer than ``limit_s`` is stopped; its row holds the peak so far and ``stopped_s``. ``cap_bytes`` is only
    drawn into the chart.
    Raises UsageError for unknown methods and sizes, EdgezoError for a model that cannot be loaded.
    """
    if problems := _problems(methods, batch_sizes, tokens):
        raise UsageError(problems)
    from edgezo.network import cards

    path = cards.resolve(model, progress=note)
    claim_results(out)
    log = out / "points.jsonl"
    known = _read_points(log)
    rows = []
    always: dict[str, Any] = {"model": model, "edgezo": __version__, "device": device}
    always["threads"] = threads or machine().cores
    for method, batch_size, length in product(methods, batch_sizes, tokens):
        place = always | {"method": method, "batch_size": batch_size, "tokens": length}
        point = next((p for p in known if place.items() <= p.items() and "error" not in p), None)
        as_before = ": as in points.jsonl" if point else ""
        note(f"{method}, B = {batch_size}, {length} tokens{as_before}")
        if point is None:
            known = [p for p in known if not place.items() <= p.items()]  # without a failed attempt
            known.append(point := place | _measure(path, place, limit_s))
            atomic_write(log, "".join(json.dumps(p) + "\n" for p in known).encode())
        rows.append(_row(point))
    result: dict[str, Any] = {"model": model, "cap_bytes": cap_bytes, "rows": rows}
    together = result | {"rows": [_row(p) for p in known if always.items() <= p.items()]}
    write_results(together, out / "memory", chart, note)
    return result


def _problems(
    methods: Sequence[str], batch_sizes: Sequence[int], tokens: Sequence[int]
) -> list[str]:
    """Problems with the names and sizes that are asked for."""
    unknown = [m for m in methods if m not in METHODS]
    problems = [f"there is no method {m!r}; there are {', '.join(METHODS)}" for m in unknown]
    problems += [f"--batch-sizes: {n} is not 1 or more" for n in batch_sizes if n < 1]
    least = int(FIELDS["max_length"].low or 1)
    return problems + [f"--tokens: {n} is not {least} or more" for n in tokens if n < least]


def claim_results(out: Path) -> None:
    """Make ``out`` a directory for results. Raises UsageError, and changes nothing, where it holds other files."""
    claim(out, "bench", _holds_results, _FORMS)


def _holds_results(folder: Path) -> bool:
    """Whether all files of a directory are results of a version before directories had a marker."""
    results = any((folder / f"{stem}.json").exists() for stem in STEMS)
    return results and all(has_form(path, _FORMS) for path in folder.iterdir())


def _is_result(path: Path) -> bool:
    return isinstance(
        parse_json(read_small(path, LARGEST_RESULT_BYTES).decode("utf-8"))["rows"], list
    )


def _is_chart(path: Path) -> bool:
    return read_small(path, LARGEST_RESULT_BYTES).startswith(b"\x89PNG\r\n\x1a\n")


def _is_page(path: Path) -> bool:
    return read_small(path, LARGEST_RESULT_BYTES).startswith(PAGE_BEGINS.encode())


def _is_points(path: Path) -> bool:
    lines = read_small(path, LARGEST_RESULT_BYTES).decode("utf-8").splitlines()
    return all("method" in parse_json(line) for line in lines)


# By name: what this command's results are. A run in ``runs`` is claimed by the run itself.
_FORMS: dict[str, Callable[[Path], bool]] = {
    **{f"{stem}.json": _is_result for stem in STEMS},
    **{f"{stem}.png": _is_chart for stem in STEMS},
    "points.jsonl": _is_points,
    "accuracy.md": _is_page,
    "runs": lambda path: True,
    **dict.fromkeys(("data", "untouched"), lambda path: path.is_dir()),
}


def write_results(
    result: dict[str, Any],
    stem: Path,
    draw: Callable[[dict[str, Any], Path], None],
    note: Callable[[str], None],
) -> None:
    """Write ``result`` to ``stem``.json, and draw ``stem``.png with ``draw`` unless every row is an error.

    Without matplotlib there is no chart, and ``note`` is called with what to install.
    """
    atomic_write(stem.with_suffix(".json"), (json.dumps(result, indent=1) + "\n").encode())
    if find_spec("matplotlib") is None:
        note("no chart, because matplotlib is missing: pip install 'edgezo[bench]'")
    elif any("error" not in row for row in result["rows"]):
        with atomic_path(stem.with_suffix(".png")) as temporary:
            draw(result, temporary)


def train_peak_bytes(point: dict[str, Any]) -> int:
    """Peak of the training steps: of GPU memory where there is a GPU, else resident memory."""
    peak_bytes: int = point.get("cuda_peak_bytes", point["train_peak_rss_bytes"])
    return peak_bytes


def _row(point: dict[str, Any]) -> dict[str, Any]:
    """A row of memory.json: a point with the estimator, directions and precision of its method."""
    method = METHODS[point["method"]]
    settings = method.settings or {}
    named = {name: settings.get(name) for name in ("estimator", "directions")}
    phases = ("load_peak_rss_bytes", "train_peak_rss_bytes")
    peak_bytes = max((point[phase] for phase in phases if phase in point), default=None)
    return {**named, "precision": method.precision, "peak_rss_bytes": peak_bytes, **point}


def _read_points(log: Path) -> list[dict[str, Any]]:
    """Points of earlier calls; those from before there was a choice of device are the CPU's."""
    try:
        lines = log.read_text().splitlines() if log.exists() else []
        return [{"device": "cpu"} | json.loads(line) for line in lines]
    except ValueError as problem:
        raise EdgezoError(
            f"{log} is damaged ({problem}).\nRemove it, or give another --out."
        ) from problem


def _measure(path: Path, point: dict[str, Any], limit_s: float | None) -> dict[str, Any]:
    """Figures of one point, measured in a process of its own."""
    method = METHODS[point["method"]]
    with tempfile.TemporaryDirectory(prefix="edgezo-bench-") as name:
        folder, threads = Path(name), str(point["threads"])
        data = folder / "rows"
        data.mkdir()
        batch_size, length = point["batch_size"], point["tokens"]
        _write_rows(data / "train.jsonl", batch_size * STEPS, length)
        _write_rows(data / "validation.jsonl", 1, length)
        if method.settings is None:
            rows = str(data / "train.jsonl")
            spec = point | {"model": str(path), "rows": rows, "steps": STEPS}
            command = ("-m", "edgezo.bench.memory_baselines", json.dumps(spec))
            return _child(threads, *command, limit_s=limit_s)
        request = {
            "model": str(path),
            "data": str(data),
            "max_length": length,
            "batch_size": batch_size,
            "micro_batch": batch_size,
            "device": point["device"],
            "max_mem_bytes": UNLIMITED_BYTES,
            "threads": threads,
            "train": "lowrank",
            "precision": method.precision,
            **method.settings,
        }
        if not method.settings:
            return _child(threads, "-m", "edgezo.bench.memory", json.dumps(request))
        return _finetuned(request, threads, folder / "run")


def _finetuned(request: dict[str, Any], threads: str, out: Path) -> dict[str, Any]:
    """Figures of a run of ``edgezo finetune``."""
    options = [part for name, value in request.items() for part in (flag(name), str(value))]
    command = ("-m", "edgezo", "finetune", "--json", "--steps", str(STEPS), "--out", str(out))
    summary = _child(threads, *command, *options)
    if "error" in summary:
        return summary
    kept = ("base_rss_bytes", "load_peak_rss_bytes", "peak_rss_bytes", "planned_peak_bytes")
    figures = {k: summary[k] for k in (*kept, "cuda_peak_bytes", "step_s") if k in summary}
    return figures | {"train_peak_rss_bytes": summary["run_peak_rss_bytes"]}


def _write_rows(file: Path, rows: int, tokens: int) -> None:
    """Write rows of at least ``tokens`` tokens, of texts of the bundled example; readers cut them to length."""
    from edgezo.data.tasks import EXAMPLE_FOLDER

    lines = (EXAMPLE_FOLDER / "train.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    with file.open("w", encoding="utf-8") as out:
        at = 0
        for _ in range(rows):
            words: list[str] = []
            while len(words) < tokens:  # a word is at least one token
                words += texts[at % len(texts)].split()
                at += 1
            out.write(json.dumps({"text": " ".join(words)}) + "\n")


def _child(threads: str, *args: str, limit_s: float | None = None) -> dict[str, Any]:
    """The JSON object that Python prints when it is run with these arguments; ``error`` where it prints none or fails.

    A process that takes longer than ``limit_s`` is killed; the result is then ``stopped_s`` and the peak of its last
    phase so far.
    """
    env = children.environment(OMP_NUM_THREADS=threads, MKL_NUM_THREADS=threads)
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, *args], stdout=pipe, stderr=pipe, text=True, env=env
    ) as process:
        try:
            out, err = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            peak_bytes = _peak_of(process.pid)
            process.kill()
            return {"stopped_s": limit_s, "train_peak_rss_bytes": peak_bytes}
    lines = out.strip().splitlines()
    try:
        printed: dict[str, Any] = json.loads(lines[-1])
    except (IndexError, ValueError):
        printed = {}
    if "error" not in printed and (process.returncode or not printed):
        last = (err.strip().splitlines() or ["no message"])[-1]
        return {"error": f"exit status {process.returncode}: {last}"}
    return printed


def _peak_of(pid: int) -> int:
    """Peak RSS of another process since it last reset it, in bytes; its RSS now where the system keeps no peak."""
    peak_bytes = read_status(process=pid).get("VmHWM")
    return psutil.Process(pid).memory_info().rss if peak_bytes is None else peak_bytes


def inference(request: dict[str, Any]) -> dict[str, Any]:
    """Figures of the plain forward over the 2B rows of a step, measured in this process: what running a model takes."""
    from edgezo.data.batches import pieces
    from edgezo.plan.request import make_config
    from edgezo.run.session import load_model, open_request, settle

    meter = Meter(reset=True)
    opened = open_request(make_config({**request, "train": "head"}))  # nothing beside the weights
    base = meter.mark("base")
    model, memory = load_model(settle(opened, machine(), base.rss_bytes), machine())
    model.scorer.exact = None  # the trained copy of the head, which a forward alone does not need
    memory.loaded()
    meter.mark("load")
    examples = opened.dataset.train
    size = int(request["batch_size"])
    times_s = []
    for start in range(0, len(examples), size):
        begun_s = now_s()
        batch = examples[start : start + size]
        for piece in pieces(batch, size, model.most_tokens):
            model.losses(piece, sides=2)
        times_s.append(now_s() - begun_s)
    meter.mark("train")
    memory.measure_context()
    figures: dict[str, Any] = meter.summary() | memory.figures()
    kept = ("base_rss_bytes", "load_peak_rss_bytes", "train_peak_rss_bytes", "cuda_peak_bytes")
    return {k: figures[k] for k in kept if k in figures} | {"step_s": statistics.median(times_s)}


def chart(result: dict[str, Any], file: Path) -> None:
    """Draw a PNG: the peak over the batch size and over the tokens in a row, a line for each method, and the cap."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    points = [p for p in result["rows"] if "error" not in p]
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    for panel, across, fixed in zip(
        panels, ("batch_size", "tokens"), ("tokens", "batch_size"), strict=True
    ):
        least = min((p[fixed] for p in points), default=0)
        for method in METHODS:
            peaks = sorted(
                (p[across], train_peak_bytes(p) / 1e9)
                for p in points
                if p["method"] == method and p[fixed] == least
            )
            if peaks:
                panel.plot(*zip(*peaks, strict=True), marker="o", label=METHODS[method].title)
        if result["cap_bytes"]:
            panel.axhline(
                result["cap_bytes"] / 1e9, color="black", ls="--", lw=1, label="--max-mem"
            )
        panel.set_xlabel(f"{across.replace('_', ' ')} ({least} {fixed.replace('_', ' ')})")
        panel.set_yscale("log")
        panel.grid(alpha=0.3, which="both")
    where = "peak GPU memory" if any("cuda_peak_bytes" in p for p in points) else "peak RSS"
    panels[0].set_ylabel(f"{where} of the training steps, GB")
    panels[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle(f"{result['model']}: peak memory")
    figure.tight_layout()
    figure.savefig(file, dpi=130, format="png")
    plt.close(figure)


if __name__ == "__main__":
    allocator_policy()
    print(json.dumps(inference(json.loads(sys.argv[1]))))

"""Files that edgezo writes or ships beside journals and weights: cases from a seed, and what may become of each.

metrics     lines of a run: what is read is the first of the lines that were written, or nothing (``believed``)
finetuner   networks of a ZO Fine-tuner: what was written, or nothing
summary     the weights that it names are those that it was written with, or it is refused
marker      .edgezo: no damage to it makes a directory one of another kind
run-config  config.toml of a run; cards; studies: tables with odd values, which are settings or refused
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import tomli_w
from fuzz.cases import damaged as changed
from fuzz.cases import odd, rarely
from fuzz.damage import Beside, damaged, put
from fuzz.lane import Believed

from edgezo.bench.study import read_study
from edgezo.machine.ownership import claim, kind_of
from edgezo.network.cards import HubSource, read_card
from edgezo.plan.request import from_toml, read_settings
from edgezo.run.directory import RunFiles
from edgezo.run.finetuner import Finetuner, load_finetuner
from edgezo.run.metrics_log import RunLog, check_lines

RUNS = ("ab" * 32, "cd" * 32)
MODELS = Path(__file__).resolve().parents[2] / "models"


# ---------------------------------------------------------------------------------------------
# metrics.jsonl


def sound_metrics(path: Path, seed: int = 0, of_run: str = RUNS[0]) -> bytes:
    """Lines of every kind."""
    rng = random.Random(seed)
    path.unlink(missing_ok=True)
    log = RunLog(path, of_run=of_run)
    log.write({"step": 0, "eval": "before", "metric": "accuracy", "value": rng.random(), "n": 24})
    for step in range(6):
        if step % 3 == 0:
            pace = {"sigma": rng.random(), "factor": 1.5, "began": 1.0, "losses": [0.25, None]}
            log.write({"step": step, "pace": {**pace, "took_s": rng.random(), "why": ""}})
        moved = {"disk_read_bytes": 4096 * step, "disk_written_bytes": 0}
        log.write({"step": step + 1, "loss": rng.random(), "step_s": rng.random(), **moved})
    log.close()
    return path.read_bytes()


@cache
def _metrics(folder: Path) -> tuple[bytes, Beside, list[dict[str, Any]]]:
    path = folder / "metrics.jsonl"
    others = [sound_metrics(path, n, RUNS[1]) for n in (0, 1)]
    later = sound_metrics(path, 1)
    whole = sound_metrics(path)
    log = RunLog(path, keep_through=99, of_run=RUNS[0])
    lines = log.lines()
    log.close()
    return whole, Beside(others, [later]), lines


def metrics(seed: int, folder: Path) -> bool:
    whole, beside, lines = _metrics(folder)
    case, path = next(damaged(whole, beside, seed, 1)), folder / "damaged.jsonl"
    put(path, case.data)
    check_lines(path, RUNS[0])
    log = RunLog(path, keep_through=99, of_run=RUNS[0])
    read = log.lines()
    log.close()
    if read != lines[: len(read)]:
        raise Believed(case.kind)
    return True


# ---------------------------------------------------------------------------------------------
# Finetuners


@cache
def _finetuner(folder: Path) -> tuple[bytes, Beside]:
    path = folder / "sound.safetensors"
    files = []
    for blocks, seed in ((["a", "b.c"], 0), (["a", "b.c"], 1), (["x"], 0)):
        tuner = Finetuner.plain(blocks, seed)
        tuner.save(path, {"model": f"m{seed}"})
        files.append(path.read_bytes())
    # Another sound finetuner is as good: only parts of it are damage.
    return files[0], Beside([files[0][:-4]], files[1:])


def finetuner(seed: int, folder: Path) -> bool:
    whole, beside = _finetuner(folder)
    case, path = next(damaged(whole, beside, seed, 1)), folder / "f.safetensors"
    put(path, case.data)
    load_finetuner(path)
    raise Believed(case.kind)


# ---------------------------------------------------------------------------------------------
# summary.json and .edgezo

SUMMARY = {
    **{"model": "m", "steps": 12, "batch_size": 4, "loss_first": 0.75, "loss_last": 0.5},
    **{"eval_after": {"metric": "accuracy", "value": 0.8, "n": 24}, "trained_sha256": "ab" * 32},
}


def summary(seed: int, folder: Path) -> bool:
    """A summary that names as many steps as there are also names the weights after them, or is refused."""
    from types import SimpleNamespace

    from edgezo.run.summary import check_same_end, saved_summary

    whole = (json.dumps(SUMMARY) + "\n").encode()
    beside = Beside([json.dumps({**SUMMARY, "trained_sha256": "cd" * 32}).encode()])
    case, run = next(damaged(whole, beside, seed, 1)), RunFiles(folder)
    put(run.summary, case.data)
    read = saved_summary(run)
    if read.get("steps") != SUMMARY["steps"]:
        return False  # the run is ended once more
    cfg = SimpleNamespace(rule="sgd", mask="none", parts=SimpleNamespace(readout=False))
    model = SimpleNamespace(needs_snapshots=False)
    check_same_end(run, cfg, model, "ab" * 32)  # type: ignore[arg-type]
    if read.get("trained_sha256") != SUMMARY["trained_sha256"]:
        raise Believed(case.kind)
    return True


def marker(seed: int, folder: Path) -> bool:
    """A damaged marker names the same kind, or none; and a directory with it is not taken for another's."""
    place = folder / "marked"
    file = place / ".edgezo"
    if not place.exists():
        claim(place, "run")
        (folder / "marker").write_bytes(file.read_bytes())
    whole = (folder / "marker").read_bytes()
    rng = random.Random(seed)
    data = (
        changed(rng, whole)
        if seed % 4
        else json.dumps({"kind": odd(rng), "format": 1}).encode("utf-8", "surrogatepass")
    )
    put(file, data)
    if kind_of(place) == "replay":
        raise Believed("a damaged marker names another kind")
    claim(place, "run")
    return True


# ---------------------------------------------------------------------------------------------
# Tables: config.toml of a run, model cards, studies


def _spoilt(rng: random.Random, table: dict[str, Any]) -> dict[str, Any]:
    """A table with a value, anywhere in it, that nobody expects; or with a key less or more."""
    place = table
    while rng.random() < 0.5:
        inner = [v for v in place.values() if isinstance(v, dict)]
        inner += [
            v for x in place.values() if isinstance(x, list) for v in x if isinstance(v, dict)
        ]
        if not inner:
            break
        place = rng.choice(inner)
    key = rng.choice([*place, "x", "steps", "step", "train"])
    if rng.random() < 0.15:
        place.pop(key, None)
        return table
    values = (odd(rng), rng.choice((0, -1, 1, 0.5, 2**40, 1e300, -1e-300, "", "full", "1e9")))
    value = rng.choice((*values, [values[1]] * rng.choice((1, 3, 100))))
    place[key] = value
    return table


def _toml_of(rng: random.Random, table: dict[str, Any]) -> bytes:
    """TOML, at times damaged. A value that TOML does not have is written as JSON is, and refused."""
    try:
        data = tomli_w.dumps(table).encode("utf-8", "surrogatepass")
    except (TypeError, ValueError, RecursionError):
        data = "\n".join(f"{json.dumps(k)} = {json.dumps(v)}" for k, v in table.items()).encode(
            "utf-8", "surrogatepass"
        )
    return changed(rng, data) if rng.random() < 0.3 else data


@cache
def _run_configs() -> list[dict[str, Any]]:
    import tomllib

    runs = Path(__file__).resolve().parents[1] / "old_runs" / "finished"
    return [tomllib.loads(f.read_text("utf-8")) for f in sorted(runs.glob("*/config.toml"))]


def run_config(seed: int, folder: Path) -> bool:
    rng, run = random.Random(seed), RunFiles(folder)
    table = json.loads(json.dumps(rng.choice(_run_configs())))
    run.config.write_bytes(_toml_of(rng, _spoilt(rng, table)))
    cfg = run.read_config()
    if from_toml(cfg.to_toml()) != cfg:
        raise Believed("it is not read as it is written")
    return True


@cache
def _cards() -> list[dict[str, Any]]:
    import tomllib

    return [tomllib.loads(file.read_text("utf-8")) for file in sorted(MODELS.glob("*.toml"))]


def card(seed: int, folder: Path) -> bool:
    """A card that is read is one that a plan can be made of."""
    rng, file = random.Random(seed), folder / "card.toml"
    table = json.loads(json.dumps(rng.choice(_cards()), default=str))
    file.write_bytes(_toml_of(rng, _spoilt(rng, table)))
    read = read_card(file)
    names = [read.name, *read.aliases, *(s.repo for s in read.sources if isinstance(s, HubSource))]
    return read.parameters >= 0 and all(name.lower() is not None for name in names)


def _study() -> dict[str, Any]:
    return {
        "model": "smollm2-135m",
        "tasks": {"mine": {"data": "rows.jsonl"}, "sst2": {"task": "sst2"}},
        "seeds": [0, 1],
        "forwards": 6400,
        "reach": [0.8],
        "common": {"eval-every": 10},
        "methods": {
            "grzo": {"step": [0.05, 0.1], "sigma": [0.001, 0.002]},
            "lora": {"baseline": "lora", "lr": [3e-4, 1e-3]},
        },
        "tune": {"held-out": 0.1, "seeds": [3], "tasks": ["mine"]},
    }


def study(seed: int, folder: Path) -> bool:
    rng, file = random.Random(seed), folder / "study.toml"
    table = _study()
    if rng.random() < 0.05:  # a grid whose points are a product
        n = rarely(rng, 100, 2, 3)
        names = ("sigma", "step", "rank", "clip", "lora-lr", "head-lr")
        table["methods"]["grzo"] = {name: [1] * n for name in names}
    file.write_bytes(_toml_of(rng, _spoilt(rng, table)))
    return bool(read_study(read_settings(file)).methods)


OWN: dict[str, tuple[Callable[[int, Path], bool], int]] = {
    "metrics": (metrics, 100),
    "finetuner": (finetuner, 100),
    "summary": (summary, 100),
    "marker": (marker, 20),
    "run-config": (run_config, 20),
    "card": (card, 20),
    "study": (study, 20),
}

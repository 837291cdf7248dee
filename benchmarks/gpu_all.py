"""``gpu.py all``: every figure that edgezo gives for a GPU, measured on the one at hand in at most 8 minutes.

Each section prints its lines and saves them at once in DIR/gpu.json and DIR/gpu.md, with the card. A section that fails
says why, and the next one follows; one for which no time remains says so. ``--rehearse`` goes through all of it on a
CPU with tiny shapes: its figures mean nothing.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import random_models
import torch

from edgezo.machine import gpu_kernels
from edgezo.machine.hardware import machine
from edgezo.weights.layouts import moved, place
from edgezo.weights.saved import saved_sha256, saved_tensors
from edgezo.weights.store import WeightStore
from edgezo.zo import noise
from edgezo.zo.directions import DIRECTION_KINDS
from edgezo.zo.noise import Key, exact_grid
from edgezo.zo.recipe import Recipe

ALL_S = 8 * 60  # what the command may take
GOALS = {
    "signs": "step <= 1.25 x the forward",
    "rademacher": "step <= 1.6 x the forward",
    "peak": "planned within 5 % of the measured peak, which is under 12 GB",
    "host": "step <= 1.3 x that of resident blocks",
    "noise": ">= 200 G sign bits a second",
    "bits": "equal to a CPU's",
}
Runner = Callable[..., dict[str, Any]]


@dataclass
class Sizes:
    """What is measured: published shapes on a GPU, tiny ones in a rehearsal."""

    device: str
    shapes: dict[str, int | None]  # NAME -> blocks; None: as published
    tokens: tuple[int, ...]
    steps: int
    noise_side: int
    deep: tuple[str, int | None]  # the model of which the peak is planned
    deep_cap_bytes: int
    host_layers: int
    batch_size: int = 16


# Eight blocks of the 8B shape have its activations and its matrices, and fit beside each other in a session.
REAL = Sizes(
    "cuda",
    {"smollm2-1.7b": None, "llama-3-8b": 8},
    (128, 512),
    6,
    16384,
    ("llama-3-8b", None),
    12 * 10**9,
    44,
)
TINY = Sizes("cpu", {"rehearsal": 2}, (16,), 2, 128, ("rehearsal", 2), 8 * 10**9, 2, 4)


@dataclass
class Report:
    """The lines so far, on disk after each section."""

    out: Path
    about: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, section: str, **figures: Any) -> None:
        row = {"section": section, **figures, "goal": GOALS.get(figures.get("kind", section), "")}
        self.rows.append(row)
        shown = ", ".join(
            f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
            for k, v in row.items()
            if v != ""
        )
        print(shown, flush=True)
        self.save()

    def save(self) -> None:
        (self.out / "gpu.json").write_text(json.dumps(self.about | {"rows": self.rows}, indent=1))
        lines = [f"# {self.about['card']}", "", *(f"- {k}: {v}" for k, v in self.about.items()), ""]
        for section in dict.fromkeys(row["section"] for row in self.rows):
            rows = [r for r in self.rows if r["section"] == section]
            names = list(dict.fromkeys(name for row in rows for name in row if name != "section"))
            lines += [
                f"## {section}",
                "",
                "| " + " | ".join(names) + " |",
                "|---" * len(names) + "|",
            ]
            for row in rows:
                cells = (row.get(name, "") for name in names)
                shown = (f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells)
                lines.append("| " + " | ".join(shown) + " |")
            lines.append("")
        (self.out / "gpu.md").write_text("\n".join(lines))


def about(rehearsal: bool) -> dict[str, Any]:
    """The card and what is installed."""
    here = machine()
    query = ["nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, timeout=10).stdout.strip()
    except OSError:
        driver = ""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    return {
        "card": here.gpu.name if here.gpu is not None else f"no GPU ({platform.processor()})",
        "driver, power": driver,
        "torch": torch.__version__,
        "triton": gpu_kernels._kernels() is not None and not rehearsal,
        "cores": here.cores,
        "commit": commit.stdout.strip(),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "rehearsal": rehearsal,
    }


def measure_all(args: Any, run: Runner) -> int:
    """Every section; 1 where one of them failed."""
    begun_s = time.monotonic()
    sizes = TINY if args.rehearse else REAL
    if not args.rehearse and not torch.cuda.is_available():
        print("there is no GPU that PyTorch could use; --rehearse tries the command without one")
        return 1
    if args.rehearse:
        random_models.add_rehearsal(args.tokenizer)
    report = Report(args.out, about(args.rehearse))
    print(report.about, flush=True)
    sections: dict[str, tuple[float, Callable[[], Iterator[dict[str, Any]]]]] = {
        "noise": (10, lambda: noise_rates(sizes)),
        "bits": (20, lambda: bits(sizes)),
        "step": (150, lambda: steps(sizes, args, run)),
        "replay": (40, lambda: replays(sizes, args, run)),
        "peak": (120, lambda: peak(sizes, args, run)),
        "host": (60, lambda: host(sizes, args, run)),
        "baselines": (60, lambda: baselines(sizes, args)),
    }
    failed = 0
    for name, (needs_s, section) in sections.items():
        if args.only and name not in args.only:
            continue
        rest_s = ALL_S - (time.monotonic() - begun_s)
        if rest_s < needs_s:
            report.add(name, skipped=f"{rest_s:.0f} s remained, and it needs {needs_s:.0f}")
            continue
        try:
            for figures in section():
                report.add(name, **figures)
                if time.monotonic() - begun_s > ALL_S - 10:
                    report.add(name, skipped="its rest: the time is over")
                    break
        except Exception as problem:
            traceback.print_exc()
            failed += 1
            report.add(name, failed=f"{type(problem).__name__}: {str(problem)[:300]}")
    report.add("all", seconds=time.monotonic() - begun_s)
    return int(failed > 0)


def _seconds(work: Callable[[], object], device: torch.device, turns: int = 5) -> float:
    """Seconds of one call, the fastest of some."""
    times = []
    for _ in range(turns + 1):  # the first one compiles
        if device.type == "cuda":
            torch.cuda.synchronize()
        begun_s = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun_s)
    return min(times[1:])


def noise_rates(sizes: Sizes) -> Iterator[dict[str, Any]]:
    device, side = torch.device(sizes.device), sizes.noise_side
    makers = {"as used": noise._MAKERS, "by torch": {}}
    for maker, table in makers.items():
        before, noise._MAKERS = noise._MAKERS, table
        try:
            for name, draw in (("signs", noise.signs), ("normals", noise.normals)):
                address = (Key(1, 2), 3, noise.DENSE, slice(0, side), side, device)
                took_s = _seconds(lambda draw=draw, address=address: draw(*address), device)
                yield {"what": name, "maker": maker, "g_per_s": side * side / took_s / 1e9}
        finally:
            noise._MAKERS = before


def bits(sizes: Sizes) -> Iterator[dict[str, Any]]:
    """Whether noise and updates have a CPU's bits."""
    device, cpu = torch.device(sizes.device), torch.device("cpu")
    for draw in (noise.signs, noise.normals, noise.uniform):
        same = all(
            torch.equal(
                draw(Key(2**63 + seed, 7), seed, noise.DENSE, rows, width, device).cpu(),
                draw(Key(2**63 + seed, 7), seed, noise.DENSE, rows, width),
            )
            for seed, (rows, width) in enumerate(
                ((slice(0, 3), 1), (slice(70_000, 70_009), 257), (slice(5, 40), 1000))
            )
        )
        yield {"what": draw.__name__, "equal": same}
    kinds = ("signs", "rademacher", "gaussian", "shared", "lowrank", "subspace")
    for directions in kinds[: None if sizes is REAL else 1]:
        for precision, rounding in (("fp32", None), ("bf16", "plane"), ("bf16", "stochastic")):
            digests = set()
            for where in (cpu, device):
                store = WeightStore(5, 8, DIRECTION_KINDS[directions], where)
                weight = torch.randn(700, 333, generator=torch.Generator().manual_seed(0)) * 0.1
                layout = place(weight, precision, table=False, rounding=rounding, trained=True)
                store.train("w", moved(layout, where))
                for step in range(2):
                    raw = torch.randn(16, generator=torch.Generator().manual_seed(step)).numpy()
                    store.apply([Recipe(step, exact_grid(raw * 1e-3), 1e-4)])
                digests.add(saved_sha256(saved_tensors(store)))
            yield {
                "what": f"update {directions} {precision} {rounding or ''}",
                "equal": len(digests) == 1,
            }


def _model(name: str, layers: int | None, args: Any) -> Path:
    return random_models.make_model(name, layers, args.out, alike=True)


def _rows(tokens: int, args: Any) -> Path:
    return (
        args.rows if args.rows is not None else random_models.make_rows(tokens, "label", args.out)
    )


def _request(sizes: Sizes, tokens: int) -> dict[str, Any]:
    return {
        "batch_size": sizes.batch_size,
        "micro_batch": sizes.batch_size,
        "max_length": tokens,
        "steps": sizes.steps,
        "max_mem_bytes": 100 * 10**9 if sizes.device == "cuda" else 8 * 10**9,
        "device": sizes.device,
    }


def steps(sizes: Sizes, args: Any, run: Runner) -> Iterator[dict[str, Any]]:
    """GRZO's step beside a plain forward over its 2B rows."""
    for shape, layers in sizes.shapes.items():
        model = _model(shape, layers, args)
        for tokens in sizes.tokens:
            for train, directions in (
                ("full", "signs"),
                ("full", "rademacher"),
                ("lowrank+head", "signs"),
            ):
                out = args.out / "runs" / f"{model.name}-{tokens}-{directions}-{train}"
                request = _request(sizes, tokens) | {"train": train, "directions": directions}
                made = run(out, model, _rows(tokens, args), **request, precision="bf16")
                yield {
                    "kind": directions,
                    "model": model.name,
                    "tokens": tokens,
                    "train": train,
                    "step_s": made["step_s"],
                    "forward_s": made["forward_s"],
                    "ratio": made["step_s"] / made["forward_s"],
                    **_peaks(made),
                }


def _peaks(made: dict[str, Any]) -> dict[str, Any]:
    """Planned and measured peaks of a run, in MB."""
    peak = made.get("cuda_peak_bytes") or made["peak_rss_bytes"]
    planned = made["planned_peak_bytes"]
    return {"planned_mb": planned / 1e6, "peak_mb": peak / 1e6, "planned_over": planned / peak - 1}


def replays(sizes: Sizes, args: Any, run: Runner) -> Iterator[dict[str, Any]]:
    """Whether a journal that was written there gives the same bits on both devices."""
    shape, _ = next(iter(sizes.shapes.items()))
    model, tokens = _model(shape, 2, args), sizes.tokens[0]
    out = args.out / "runs" / f"replayed-{model.name}"
    request = _request(sizes, tokens) | {"train": "full", "precision": "bf16"}
    made = run(out, model, _rows(tokens, args), **request)
    again = args.out / "runs" / f"again-{model.name}"
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "edgezo", "replay", str(out), "--out", str(again), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | hidden)
    if done.returncode:
        raise RuntimeError(done.stderr[-500:])
    same = json.loads(done.stdout)["trained_sha256"] == made["trained_sha256"]
    yield {"kind": "bits", "what": f"replay on the CPU of a run on {sizes.device}", "equal": same}


def peak(sizes: Sizes, args: Any, run: Runner) -> Iterator[dict[str, Any]]:
    """The 8B shape in int4 under a cap of 12 GB."""
    model, tokens = _model(*sizes.deep, args), sizes.tokens[0]
    request = _request(sizes, tokens) | {"max_mem_bytes": sizes.deep_cap_bytes}
    out = args.out / "runs" / f"peak-{model.name}"
    made = run(out, model, _rows(tokens, args), **request, precision="int4", train="lowrank+head")
    yield {"model": model.name, "cap_mb": sizes.deep_cap_bytes / 1e6, **_peaks(made)}


def host(sizes: Sizes, args: Any, run: Runner) -> Iterator[dict[str, Any]]:
    """Blocks in the RAM beside the same run with all blocks on the GPU; in a rehearsal on the disk."""
    shape, _ = next(iter(sizes.shapes.items()))
    model, tokens = _model(shape, sizes.host_layers, args), sizes.tokens[-1]
    away = "host" if sizes.device == "cuda" else "disk"
    times, digests = {}, {}
    for residency in ("resident", away):
        out = args.out / "runs" / f"{residency}-{model.name}"
        request = _request(sizes, tokens) | {"residency": residency, "precision": "bf16"}
        made = run(out, model, _rows(tokens, args), **request, train="lowrank")
        times[residency], digests[residency] = made["step_s"], made["trained_sha256"]
    yield {
        "model": model.name,
        "resident_s": times["resident"],
        "away_s": times[away],
        "ratio": times[away] / times["resident"],
        "equal": digests[away] == digests["resident"],
    }


def baselines(sizes: Sizes, args: Any) -> Iterator[dict[str, Any]]:
    """MeZO in place, and LoRA with checkpointing, by stock peft and PyTorch, each in its own process."""
    shape, layers = next(iter(sizes.shapes.items()))
    model, tokens = _model(shape, layers, args), sizes.tokens[0]
    texts = random_models.make_texts(tokens, args.out)
    for method in ("mezo-in-place", "lora-checkpoint"):
        spec = {
            "method": method,
            "model": str(model),
            "rows": str(texts),
            "tokens": tokens,
            "steps": sizes.steps,
            "batch_size": sizes.batch_size,
            "device": sizes.device,
        }
        command = [sys.executable, "-m", "edgezo.bench.memory_baselines", json.dumps(spec)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            yield {"method": method, "failed": done.stderr[-200:]}
            continue
        made = json.loads(done.stdout.splitlines()[-1])
        peak_bytes = made.get("cuda_peak_bytes", made["train_peak_rss_bytes"])
        yield {
            "method": method,
            "model": model.name,
            "tokens": tokens,
            "step_s": made["step_s"],
            "peak_mb": peak_bytes / 1e6,
        }

"""``edgezo bench speed``: the time of a step beside a plain forward over the same rows, and that beside the machine.

    forward     the model over all rows of a step (both sides), unperturbed
    perturbed   the forward with the directions of every example
    update      from losses to changed weights
    step        perturbed and update, and what is between them; ratio: step/forward of the same round
    products    the matrix products of that forward alone, in the same dtype; share: products/forward
    bandwidth   stored bytes of the weights, read once in a forward, over what a copy of 256 MB reaches

All models are loaded at once and measured in turns, so that other load on the machine meets each of them alike. Figures
are medians over the rounds after the first. The baselines (speed_baselines.py) are measured in the same rounds: MeZO in
place, and GRZO in its published form, hooks with weight-sized noise (linears only).
"""

from __future__ import annotations

import io
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from edgezo.bench.alignment import point_config
from edgezo.bench.memory import claim_results, write_results
from edgezo.bench.speed_baselines import PUBLISHED_STEPS, Plain
from edgezo.data.batches import Example, batch_indices, pieces
from edgezo.data.trees import Row
from edgezo.errors import UsageError
from edgezo.machine import kernels
from edgezo.machine.hardware import machine
from edgezo.machine.process_memory import Guard, rss_bytes
from edgezo.network.model import Model
from edgezo.network.perturb import PerturbedLinear
from edgezo.plan.config import RunConfig, Settled
from edgezo.run.journal import create_journal
from edgezo.run.journal_record import StepRecord
from edgezo.run.metrics_log import RunLog, step_line
from edgezo.run.progress import LiveProgress
from edgezo.run.record_recipe import journal_is_shaped
from edgezo.run.session import Opened, load_model, open_request, settle
from edgezo.weights.layouts import DENSE_DTYPES, Layout
from edgezo.zo import noise
from edgezo.zo.credit import Estimator
from edgezo.zo.noise import Key
from edgezo.zo.parts import PARTS
from edgezo.zo.presets import preset_of
from edgezo.zo.recipe import Recipe

AS_THEY_ARE = "own"  # a value of --tokens: rows are not stretched
COPIED_BYTES = 256 << 20


@dataclass
class Subject:
    """An estimator with a store, loaded and ready to be measured."""

    name: str
    cfg: Settled
    opened: Opened
    model: Model
    weight_bytes: int  # as stored

    @property
    def label(self) -> str:
        """What tells subjects apart."""
        return f"{self.name} {self.cfg.precision}"

    @property
    def sides(self) -> int:
        """Forwards over an example in a step."""
        return self.cfg.passes

    def forward(self, group: Sequence[Example]) -> dict[str, float]:
        """Seconds of a plain forward over the rows of a step."""
        begun_s = time.perf_counter()
        for batch in pieces(group, len(group), self.model.most_tokens):
            self.model.losses(batch, sides=self.sides)
        return {"forward_s": time.perf_counter() - begun_s}

    def step(self, group: Sequence[Example], step: int) -> dict[str, float]:
        """Seconds of a step and of its parts. The step is that of run/step.py, without journal and memory guard."""
        model, cfg = self.model, self.cfg
        begun_s = time.perf_counter()
        probing = cfg.probing
        learn = 1.0 / (self.sides * len(group)) if model.learned else 0.0
        losses = np.empty((self.sides, len(group)), np.float32)
        for batch in pieces(group, len(group), model.most_tokens):
            probe = model.probe(batch, Key(cfg.seed, step), cfg.sigma) if probing else None
            of_batch, _ = model.losses(batch, probe, sides=self.sides, learn=learn)
            losses[:, batch.slots] = of_batch.numpy()
        probed_s = time.perf_counter()
        if probing:
            estimator = Estimator.of(cfg)
            c = estimator.coefficients(estimator.credit(losses), cfg.step, cfg.sigma)
            touched, guides = model.take_touched(len(group)), model.store.take_guides()
            with model.heap.updating():
                model.store.apply([Recipe(step, c, 0.0, touched, cfg.step, guides=guides)])
        for name, part in model.learned.items():
            part.update(cfg.rates[name])
        end_s = time.perf_counter()
        parts = {"perturbed_s": probed_s - begun_s, "update_s": end_s - probed_s}
        return parts | {"step_s": end_s - begun_s}


def bench_speed(
    request: Mapping[str, Any],
    *,
    estimators: Sequence[str] = ("grzo", "grzo:rademacher", "grzo:gaussian", "mezo"),
    precisions: Sequence[str] = ("bf16", "int8", "int4"),
    batch_sizes: Sequence[int] = (16,),
    tokens: Sequence[int | str] = (AS_THEY_ARE, 256),
    repeats: int = 5,
    baselines: bool = True,
    out: Path,
    terminal: Callable[[Console], LiveProgress],
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measure every estimator (``name`` or ``name:directions``) on every store.

    ``request``: settings that all of them share; ``tokens``: rows stay as they are ("own"), or are repeated up to this
    length; ``terminal`` makes the progress whose cost is part of ``bookkeeping``. Writes speed.json and speed.png to
    ``out``. Raises UsageError with every problem.
    """
    if any(n < 1 for n in (*batch_sizes, repeats)):
        raise UsageError("--batch-sizes and --repeats must be 1 or more")
    chosen = [
        (name, point_config({**_with_train(request, name), "precision": precision}, name))
        for precision in precisions
        for name in estimators
    ]
    if uneven := [name for name, cfg in chosen if cfg.anchored or cfg.mixed]:
        raise UsageError(
            f"bench speed measures steps that are all alike; those of {uneven[0]} are not, "
            "so leave it out of --estimators"
        )
    claim_results(out)
    subjects = [_load(name, cfg) for name, cfg in chosen]
    note(f"{len(subjects)} models loaded")
    if subjects[0].opened.dataset.kind != "label":
        raise UsageError(
            "bench speed needs labelled rows: give --template and --labels, or a --task"
        )
    plain = Plain(subjects[0].opened, subjects[0].model) if baselines else None
    rows: list[dict[str, Any]] = []
    for size, length in product(batch_sizes, tokens):
        measured = _measure(subjects, plain, size, length, repeats, terminal)
        for row in measured:
            note(line(row))
        rows += measured
    result = {"model": request.get("model"), "threads": torch.get_num_threads(), "rows": rows}
    result["kernels"] = kernels.loaded()
    result |= {"copy_bytes_per_s": copy_rate(), **noise_rates(), "fits": fits(rows)}
    write_results(result, out / "speed", chart, note)
    return result


def _with_train(request: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The request with what the estimator trains, unless it says what to train: low-rank factors beside the exact head.

    So every step has the parts that a step of the default has, but for the linear probe. With that a step is shorter by
    the blocks that it does not read, and which these are depends on the rows.
    """
    parts = [part for part in preset_of(name.partition(":")[0]).train if not PARTS[part].readout]
    if parts == ["lowrank"]:
        parts.append("head")
    return {**request, "train": request.get("train") or "+".join(parts)}


def line(row: Mapping[str, Any]) -> str:
    """A row of speed.json as one line of text."""
    ratio = "" if row["ratio"] is None else f", {row['ratio']:.3f} x the forward"
    where = (
        f"{row['estimator']} {row['precision']}, B = {row['batch_size']}, {row['tokens']} tokens"
    )
    return f"{where}: {row['step_s']:.3f} s a step{ratio}"


def _load(name: str, cfg: RunConfig) -> Subject:
    """The subject ``name`` with this configuration, its model in memory."""
    planned = settle(open_request(cfg), machine(), 0)
    model = load_model(planned, machine()).model
    weight_bytes = sum(layout.nbytes() for layout in model.store.layouts.values())
    return Subject(name, planned.cfg, planned.opened, model, weight_bytes)


def stretched(example: Example, length: int | str) -> Example:
    """The example with its row repeated at the front up to ``length`` tokens, so that its scored end stays."""
    if not isinstance(length, int):
        return example
    (row,) = example.rows
    ids = list(row.ids)
    long = (ids * -(-length // len(ids)))[-length:]
    return Example((Row(long, (length - 1,), ()),), example.label)


def _measure(
    subjects: Sequence[Subject],
    plain: Plain | None,
    size: int,
    length: int | str,
    repeats: int,
    terminal: Callable[[Console], LiveProgress],
) -> list[dict[str, Any]]:
    """Rows of speed.json for one batch size and length: one for each subject, and with ``plain`` for each baseline."""
    times, tokens = _rounds(subjects, plain, size, length, repeats)
    copied = copy_rate()
    rows = [_subject_row(subject, times[subject.label], copied) for subject in subjects]
    for subject, row in zip(subjects, rows, strict=True):
        row["bookkeeping_share"] = bookkeeping(subject.cfg, size, row["step_s"], terminal)
    if plain is not None:
        (precision,) = (name for name, dtype in DENSE_DTYPES.items() if dtype is plain.dtype)
        for name in PUBLISHED_STEPS:
            row = {"estimator": name, "precision": precision, "ratio": None}
            rows.append(row | _medians(times[name]))
    sizes = {"batch_size": size, "tokens": length, "tokens_a_side": tokens}
    return [{**row, **sizes, "tokens_per_s": row["rows"] / row["step_s"]} for row in rows]


def _rounds(
    subjects: Sequence[Subject], plain: Plain | None, size: int, length: int | str, repeats: int
) -> tuple[dict[str, list[dict[str, float]]], float]:
    """Seconds of each round by subject and baseline, and the median number of tokens on one side of a step.

    A round measures every one of them once, on the same group of examples. A first round warms up and is left out.
    """
    train = subjects[0].opened.dataset.train
    times = defaultdict[str, list[dict[str, float]]](list)
    tokens = []
    for turn in range(repeats + 1):
        group = [stretched(train[i], length) for i in batch_indices(len(train), size, 0, turn)]
        rows = sum(len(e.rows[0].ids) for e in group)
        for subject in subjects:
            seconds = subject.forward(group) | subject.step(group, turn)
            products_s = bare_products(subject.model, subject.sides * rows)
            others = {"products_s": products_s, "rows": subject.sides * rows}
            times[subject.label].append(seconds | others)
        if plain is not None:
            for name in PUBLISHED_STEPS:
                times[name].append({"step_s": plain.time(name, group), "rows": 2 * rows})
        tokens.append(rows)
    measured = {name: rounds[1:] for name, rounds in times.items()}
    return measured, statistics.median(tokens[1:])


def _subject_row(subject: Subject, rounds: list[dict[str, float]], copied: float) -> dict[str, Any]:
    """Medians of a subject's rounds, and its shares of what the machine can do; ``copied``: bytes a second."""
    ratios = sorted(seconds["step_s"] / seconds["forward_s"] for seconds in rounds)
    row: dict[str, Any] = {"estimator": subject.name, "precision": subject.cfg.precision}
    row |= _medians(rounds) | {"sides": subject.sides}
    row |= {
        "ratio": statistics.median(ratios),
        "ratio_least": ratios[0],
        "ratio_most": ratios[-1],
    }
    row["share_of_products"] = statistics.median(
        seconds["products_s"] / seconds["forward_s"] for seconds in rounds
    )
    weights = sum(rows * cols for rows, cols in (m.shape for m in matrices(subject.model)))
    row["forward_flops_per_s"] = 2 * weights * row["rows"] / row["forward_s"]
    row["share_of_bandwidth"] = subject.weight_bytes / row["forward_s"] / copied
    row["train"] = "+".join(subject.cfg.train)
    return row


def bookkeeping(
    cfg: RunConfig,
    size: int,
    step_s: float,
    terminal: Callable[[Console], LiveProgress],
    steps: int = 50,
) -> float:
    """The share of a step's time ``step_s`` that a run adds for journal, metrics, memory guard and progress.

    Measured over ``steps`` made-up steps of ``size`` examples.
    """
    losses = np.ones((max(2, cfg.passes), size), np.float32)
    losses[0] += np.arange(size, dtype=np.float32)
    credit = Estimator.of(cfg).recorded(losses, cfg.sigma, 0, None) if cfg.probing else losses[0]
    guard = Guard(1 << 60, 0)
    progress = terminal(Console(file=io.StringIO(), force_terminal=True))
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        header = {"content_hash": "sha256:0"}
        file = Path(folder, "journal.bin")
        journal = stack.enter_context(create_journal(file, header, shaped=journal_is_shaped(cfg)))
        log = stack.enter_context(closing(RunLog(Path(folder, "metrics.jsonl"))))
        progress.begin(done=0, steps=steps, cap_bytes=1 << 60)
        stack.callback(progress.close)
        begun_s = time.perf_counter()
        for step in range(steps):
            guard.check_again(0, "a step")
            record = StepRecord(step, cfg.sigma, cfg.step, False, losses, credit)
            journal.append(record)
            resident_bytes = rss_bytes()
            line = step_line(record, True) | {"step_s": step_s, "rss_bytes": resident_bytes}
            log.write(line)
            shown = {"loss": line["loss"], "step_s": step_s, "rss_bytes": resident_bytes}
            progress.step(step + 1, fraction=step / steps, **shown)
        recording_s = (time.perf_counter() - begun_s) / steps
        begun_s = time.perf_counter()
        for _ in range(steps):
            progress.refresh()
        refreshing_share = (time.perf_counter() - begun_s) / steps * progress.refreshes_per_s
    return recording_s / step_s + refreshing_share


def fits(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each estimator and store with four sizes or more: a step's seconds as a straight line in its rows of tokens.

    ``step_s = fixed_s + rows * s_a_row`` by least squares; ``r2`` is the share of the variance that the line explains.
    """
    lines = []
    for estimator, precision in dict.fromkeys((row["estimator"], row["precision"]) for row in rows):
        name = {"estimator": estimator, "precision": precision}
        points = [row for row in rows if name.items() <= row.items()]
        x, y = (np.array([row[key] for row in points], float) for key in ("rows", "step_s"))
        if len(set(x)) < 4:
            continue
        slope, fixed, r2 = straight(x, y)
        lines.append({**name, "fixed_s": fixed, "s_a_row": slope, "r2": r2, "sizes": len(points)})
    return lines


def straight(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """Slope, intercept and R^2 of the straight line through n points by least squares; ``x`` and ``y`` are (n,)."""
    slope, fixed = np.polyfit(x, y, 1)
    return float(slope), float(fixed), 1 - float(np.var(y - slope * x - fixed) / np.var(y))


def _medians(rounds: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """The median over the rounds of each of their figures."""
    return {name: statistics.median(figures[name] for figures in rounds) for name in rounds[0]}


# ---------------------------------------------------------------------------------------------
# The machine


def matrices(model: Model) -> list[Layout]:
    """Every matrix that a forward multiplies all its rows with, in order; tables are not among them."""
    return [m.matrix.layout for m in model.module.modules() if type(m) is PerturbedLinear]


def bare_products(model: Model, rows: int) -> float:
    """Seconds of a forward's matrix products over ``rows`` rows, in the dtype that the model computes in.

    Where the weights are stored in that dtype, the products use them, so that each is read from memory as in a forward.
    Otherwise there is one weight for each shape, which may stay in the cache, so that no forward can be as fast.
    Kernels are compiled before the clock starts.
    """
    dtype, device = model.context.dtype, model.context.device

    def full(*shape: int) -> Tensor:
        return torch.full(shape, 0.01, dtype=dtype, device=device)

    layouts = matrices(model)
    shapes = {layout.shape for layout in layouts}
    one_of_each = {shape: full(*shape) for shape in shapes}
    inputs = {cols: full(rows, cols) for _, cols in shapes}
    outs = {width: full(rows, width) for width, _ in shapes}
    weights = [
        one_of_each[layout.shape] if (direct := layout.direct(dtype)) is None else direct
        for layout in layouts
    ]

    def multiply(w: Tensor) -> None:
        torch.mm(inputs[w.shape[1]], w.T, out=outs[w.shape[0]])

    for w in one_of_each.values():
        multiply(w)
    begun_s = time.perf_counter()
    for w in weights:
        multiply(w)
    return time.perf_counter() - begun_s


def copy_rate() -> float:
    """Bytes a second, read and written together, of a copy that is too large for any cache."""
    source = torch.zeros(COPIED_BYTES, dtype=torch.uint8)
    target = torch.zeros_like(source)
    times_s = []
    for _ in range(4):
        begun_s = time.perf_counter()
        target.copy_(source)
        times_s.append(time.perf_counter() - begun_s)
    return 2 * COPIED_BYTES / min(times_s)


def noise_rates() -> dict[str, float]:
    """Sign bits and normals that the noise generator makes in a second."""
    key, side = Key(0, 0), 2048
    rates = {}
    for name, make in (("sign_bits_per_s", noise.signs), ("normals_per_s", noise.normals)):
        times_s = []
        for turn in range(6):  # the first call makes the tables
            begun_s = time.perf_counter()
            make(key, turn, noise.DENSE, slice(0, side), side)
            times_s.append(time.perf_counter() - begun_s)
        rates[name] = side * side / min(times_s)
    return rates


def chart(result: Mapping[str, Any], file: Path) -> None:
    """Draw a PNG with a bar for each row: the parts of a step as multiples of the plain forward."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in result["rows"] if row["ratio"] is not None]
    figure, panel = plt.subplots(figsize=(9, 1.2 + 0.3 * len(rows)))
    for at, row in enumerate(rows):
        start = 0.0
        for part, colour in (("perturbed_s", "C0"), ("update_s", "C1")):
            width = row[part] / row["forward_s"]
            panel.barh(at, width, left=start, color=colour, label="" if at else part[:-2])
            start += width
    panel.axvline(1.0, color="black", lw=1)
    panel.set_yticks(
        range(len(rows)),
        [f"{r['estimator']} {r['precision']}, B = {r['batch_size']}, {r['tokens']}" for r in rows],
    )
    panel.invert_yaxis()
    panel.set_xlabel("times the plain forward over the same rows (the line)")
    panel.legend(fontsize=8)
    figure.suptitle(f"{result['model']}: time of a step, {result['threads']} threads")
    figure.tight_layout()
    figure.savefig(file, dpi=130, format="png")
    plt.close(figure)

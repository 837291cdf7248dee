"""``edgezo bench speed``: what a step costs beside the plain forward over the same rows, and that beside the machine.

    forward     the model over all rows of a step (both sides), nothing perturbed
    perturbed   the same with every example's direction
    update      from losses to changed weights
    step        both, with what is between them; ratio: step/forward of the same round
    products    the bare matrix products of that forward, in the same dtype: share = products/forward
    bandwidth   stored bytes of the weights, read once a forward, over what a copy of 256 MB reaches

All models are loaded at once and measured in turns, so that what the machine does meanwhile meets each alike. Figures
are medians over the rounds after the first. Baselines run transformers' module as people do: padded batches, logits of
every position; in-place MeZO, and GRZO in the published form of hooks with weight-sized noise (linears only).
"""

from __future__ import annotations

import io
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from edgezo.bench.alignment import plain_module, point_config
from edgezo.bench.memory import write_results
from edgezo.bench.memory_baselines import SIGMA, mezo_in_place
from edgezo.data.batches import Example, Row, batch_indices, pieces
from edgezo.data.dataset import Dataset
from edgezo.errors import UsageError
from edgezo.machine import kernels
from edgezo.machine.hardware import machine
from edgezo.machine.process_memory import Guard, rss_bytes
from edgezo.network.model import Model
from edgezo.network.perturb import PerturbedLinear
from edgezo.plan.request import RunConfig
from edgezo.run.journal import StepRecord, create_journal
from edgezo.run.metrics_log import RunLog, step_line
from edgezo.run.progress import LiveProgress
from edgezo.run.session import journal_is_shaped, load_model, open_request, settle
from edgezo.weights.layouts import DENSE_DTYPES, Layout
from edgezo.zo import noise
from edgezo.zo.credit import Estimator
from edgezo.zo.noise import Key
from edgezo.zo.presets import PRESETS
from edgezo.zo.recipe import Recipe

OWN = "own"  # of --tokens: the rows as they are
COPIED_BYTES = 256 << 20
BASELINES = ("mezo-in-place", "grzo-hooks")


@dataclass
class Subject:
    """A way to make a step, ready to run."""

    name: str
    precision: str
    cfg: RunConfig
    model: Model
    dataset: Dataset
    weight_bytes: int

    @property
    def sides(self) -> int:
        return self.cfg.passes

    def forward(self, group: Sequence[Example]) -> dict[str, float]:
        begun_s = time.perf_counter()
        for batch in pieces(group, len(group), self.model.most_tokens):
            self.model.losses(batch, sides=self.sides)
        return {"forward_s": time.perf_counter() - begun_s}

    def step(self, group: Sequence[Example], step: int) -> dict[str, float]:
        """One step as run/train.py makes it, without journal and guard."""
        model, cfg = self.model, self.cfg
        begun_s = time.perf_counter()
        probing = cfg.probing
        learn = 1.0 / (self.sides * len(group)) if model.learned else 0.0
        losses = np.empty((self.sides, len(group)), np.float32)
        for batch in pieces(group, len(group), model.most_tokens):
            probe = model.probe(batch, Key(cfg.seed, step), cfg.sigma) if probing else None
            found, _ = model.losses(batch, probe, sides=self.sides, learn=learn)
            losses[:, batch.slots] = found.numpy()
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
    tokens: Sequence[int | str] = (OWN, 256),
    repeats: int = 5,
    baselines: bool = True,
    out: Path,
    terminal: Callable[[Console], LiveProgress],
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measure every estimator (``name`` or ``name:directions``) on every store; writes speed.json and speed.png.

    ``tokens``: rows are as they are ("own") or made this long by repeating them. Raises UsageError with every problem.
    """
    if any(n < 1 for n in (*batch_sizes, repeats)):
        raise UsageError("--batch-sizes and --repeats are 1 or more")
    chosen = [
        (name, point_config({**_trained(request, name), "precision": precision}, name))
        for precision in precisions
        for name in estimators
    ]
    if uneven := [name for name, cfg in chosen if cfg.anchored or cfg.mixed]:
        raise UsageError(
            f"bench speed measures steps that are all alike; those of {uneven[0]} are not"
        )
    subjects = [_load(name, cfg) for name, cfg in chosen]
    note(f"{len(subjects)} models loaded")
    dataset = subjects[0].dataset
    if dataset.kind != "label":
        raise UsageError("bench speed takes labelled rows (--template, --labels, or a --task)")
    plain = Plain(subjects[0]) if baselines else None
    rows: list[dict[str, Any]] = []
    for size in batch_sizes:
        for length in tokens:
            measured = _measure(subjects, plain, size, length, repeats, terminal)
            for row in measured:
                note(line(row))
            rows += measured
    result = {"model": request.get("model"), "threads": torch.get_num_threads(), "rows": rows}
    result["kernels"] = kernels.loaded()
    result |= {"copy_bytes_per_s": copy_rate(), **noise_rates(), "fits": fits(rows)}
    write_results(result, out / "speed", chart, note)
    return result


def _trained(request: Mapping[str, Any], name: str) -> dict[str, Any]:
    """With what a run of the estimator trains, its head included, where the request does not say.

    Not a linear probe: with one a step is shorter by the blocks that it does not read, which depends on the data.
    """
    row = PRESETS.get(name.partition(":")[0])
    usual = "+".join(part for part in row.train if part != "probe") if row is not None else None
    return {**request, "train": request.get("train") or usual}


def line(row: Mapping[str, Any]) -> str:
    ratio = "" if row["ratio"] is None else f", {row['ratio']:.3f} x the forward"
    where = (
        f"{row['estimator']} {row['precision']}, B = {row['batch_size']}, {row['tokens']} tokens"
    )
    return f"{where}: {row['step_s']:.3f} s a step{ratio}"


def _load(name: str, cfg: RunConfig) -> Subject:
    opened = open_request(cfg)
    settle(opened, machine(), 0)
    model = load_model(opened, machine())
    held = sum(layout.nbytes() for layout in model.store.layouts.values())
    return Subject(name, str(opened.cfg.precision), opened.cfg, model, opened.dataset, held)


def stretched(example: Example, length: int | str) -> Example:
    """The example with its row repeated up to ``length`` tokens; the end, where it is scored, stays the end."""
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
    """One row for each subject and baseline."""
    train = subjects[0].dataset.train
    took: dict[str, list[dict[str, float]]] = {}
    packed = []
    for turn in range(repeats + 1):  # the first warms up
        group = [stretched(train[i], length) for i in batch_indices(len(train), size, 0, turn)]
        rows = sum(len(e.rows[0].ids) for e in group)
        for subject in subjects:
            found = subject.forward(group) | subject.step(group, turn)
            products = bare_products(subject.model, subject.sides * rows)
            own = took.setdefault(f"{subject.name} {subject.precision}", [])
            own.append(found | {"products_s": products, "rows": subject.sides * rows})
        for name in BASELINES if plain is not None else ():
            assert plain is not None
            own = took.setdefault(name, [])
            own.append({"step_s": plain.time(name, group), "rows": 2 * rows})
        packed.append(rows)
    copied = copy_rate()
    made: list[dict[str, Any]] = []
    for subject in subjects:
        own = took[f"{subject.name} {subject.precision}"][1:]
        row: dict[str, Any] = {"estimator": subject.name, "precision": subject.precision}
        row |= _medians(own) | {"sides": subject.sides}
        ratios = sorted(turn["step_s"] / turn["forward_s"] for turn in own)
        row |= {
            "ratio": statistics.median(ratios),
            "ratio_least": ratios[0],
            "ratio_most": ratios[-1],
        }
        row["share_of_products"] = statistics.median(t["products_s"] / t["forward_s"] for t in own)
        weights = sum(rows * cols for rows, cols in (m.shape for m in matrices(subject.model)))
        row["forward_flops_per_s"] = 2 * weights * row["rows"] / row["forward_s"]
        row["share_of_bandwidth"] = subject.weight_bytes / row["forward_s"] / copied
        row["train"] = "+".join(subject.cfg.train)
        row["bookkeeping_share"] = bookkeeping(subject.cfg, size, row["step_s"], terminal)
        made.append(row)
    for name in BASELINES if plain is not None else ():
        assert plain is not None
        (precision,) = (name for name, dtype in DENSE_DTYPES.items() if dtype is plain.dtype)
        row = {"estimator": name, "precision": precision, "ratio": None}
        row |= _medians(took[name][1:])
        made.append(row)
    size_of = {"batch_size": size, "tokens": length, "tokens_a_side": statistics.median(packed[1:])}
    return [{**row, **size_of, "tokens_per_s": row["rows"] / row["step_s"]} for row in made]


def bookkeeping(
    cfg: RunConfig,
    size: int,
    step_s: float,
    terminal: Callable[[Console], LiveProgress],
    steps: int = 50,
) -> float:
    """What a run spends on journal, metrics, guard and a terminal's progress, as a share of its steps' time."""
    losses = np.ones((max(2, cfg.passes), size), np.float32)
    losses[0] += np.arange(size, dtype=np.float32)
    credit = Estimator.of(cfg).credit(losses) if cfg.probing else losses[0]
    guard = Guard(1 << 60, 0)
    progress = terminal(Console(file=io.StringIO(), force_terminal=True))
    with tempfile.TemporaryDirectory() as folder, ExitStack() as held:
        header = {"content_hash": "sha256:0"}
        file = Path(folder, "journal.bin")
        journal = held.enter_context(create_journal(file, header, shaped=journal_is_shaped(cfg)))
        log = held.enter_context(closing(RunLog(Path(folder, "metrics.jsonl"))))
        progress.begin(done=0, steps=steps, cap_bytes=1 << 60)
        held.callback(progress.close)
        begun_s = time.perf_counter()
        for step in range(steps):
            guard.check_again(0, "a step")
            record = StepRecord(step, cfg.sigma, cfg.step, False, losses, credit)
            journal.append(record)
            held_bytes = rss_bytes()
            line = step_line(record, True) | {"step_s": step_s, "rss_bytes": held_bytes}
            log.write(line)
            shown = {"loss": line["loss"], "step_s": step_s, "rss_bytes": held_bytes}
            progress.step(step + 1, fraction=step / steps, **shown)
        own_s = (time.perf_counter() - begun_s) / steps
        begun_s = time.perf_counter()
        for _ in range(steps):
            progress.refresh()
        refreshing = (time.perf_counter() - begun_s) / steps * progress.refreshes_per_s
    return own_s / step_s + refreshing


def fits(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Least squares of a step's seconds over the rows of tokens that pass, where there are four sizes or more.

    ``step_s = fixed_s + rows * s_a_row``; ``r2`` is the share of the variance that the line explains.
    """
    found = []
    for name in dict.fromkeys((row["estimator"], row["precision"]) for row in rows):
        own = [row for row in rows if (row["estimator"], row["precision"]) == name]
        x, y = (np.array([row[key] for row in own], float) for key in ("rows", "step_s"))
        if len(set(x)) < 4:
            continue
        slope, fixed, r2 = straight(x, y)
        line = {"fixed_s": fixed, "s_a_row": slope, "r2": r2, "sizes": len(own)}
        found.append({"estimator": name[0], "precision": name[1], **line})
    return found


def straight(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """Slope, intercept and R^2 of the line of least squares through (n,) points."""
    slope, fixed = np.polyfit(x, y, 1)
    return float(slope), float(fixed), 1 - float(np.var(y - slope * x - fixed) / np.var(y))


def _medians(turns: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    return {name: statistics.median(turn[name] for turn in turns) for name in turns[0]}


# ---------------------------------------------------------------------------------------------
# The machine


def matrices(model: Model) -> list[Layout]:
    """Every matrix that a forward multiplies all its rows with, in order: the tables are not among them."""
    return [m.matrix.layout for m in model.module.modules() if type(m) is PerturbedLinear]


def bare_products(model: Model, rows: int) -> float:
    """Seconds of the same sequence of matrix products over ``rows`` rows, in the dtype that the model computes in.

    With the model's own weights, each read from memory as a forward reads it, where they are held in that dtype; else
    with one weight for each shape, which may come from the cache: more than a forward can have. Kernels are compiled
    before the clock starts.
    """
    dtype, device = model.context.dtype, model.context.device

    def full(*shape: int) -> Tensor:
        return torch.full(shape, 0.01, dtype=dtype, device=device)

    held = matrices(model)
    shapes = {layout.shape for layout in held}
    some = {shape: full(*shape) for shape in shapes}
    inputs = {cols: full(rows, cols) for _, cols in shapes}
    outs = {width: full(rows, width) for width, _ in shapes}
    weights = [w if (w := part.direct(dtype)) is not None else some[part.shape] for part in held]

    def multiply(w: Tensor) -> None:
        torch.mm(inputs[w.shape[1]], w.T, out=outs[w.shape[0]])

    for w in some.values():
        multiply(w)
    begun_s = time.perf_counter()
    for w in weights:
        multiply(w)
    return time.perf_counter() - begun_s


def copy_rate() -> float:
    """Bytes a second, read and written, of a copy that no cache holds."""
    source = torch.zeros(COPIED_BYTES, dtype=torch.uint8)
    target = torch.zeros_like(source)
    times_s = []
    for _ in range(4):
        begun_s = time.perf_counter()
        target.copy_(source)
        times_s.append(time.perf_counter() - begun_s)
    return 2 * COPIED_BYTES / min(times_s)


def noise_rates() -> dict[str, float]:
    """Sign bits and normals that are made in a second."""
    key, side = Key(0, 0), 2048
    found = {}
    for name, make in (("sign_bits_per_s", noise.signs), ("normals_per_s", noise.normals)):
        times_s = []
        for turn in range(6):  # the first makes the tables
            begun_s = time.perf_counter()
            make(key, turn, noise.DENSE, slice(0, side), side)
            times_s.append(time.perf_counter() - begun_s)
        found[name] = side * side / min(times_s)
    return found


# ---------------------------------------------------------------------------------------------
# Baselines


class Plain:
    """transformers' own module with the weights of a subject, and steps on it as others write them.

    In the dtype that the subject computes in: bf16 where that is fast.
    """

    def __init__(self, subject: Subject):
        opened = open_request(subject.cfg)
        self.module = plain_module(opened, subject.model)
        self.module.set_attn_implementation("sdpa")
        self.dtype = subject.model.context.dtype
        self.module.to(self.dtype)
        self.label_ids = torch.tensor(subject.dataset.label_ids)
        self.pad = opened.tokenizer.pad_token_id or 0
        self.linears = [m for n, m in self.module.named_modules() if _is_inner_linear(n, m)]
        self._mezo = mezo_in_place(
            list(self.module.parameters()), lambda group: self.losses(group).mean()
        )

    def time(self, name: str, group: Sequence[Example]) -> float:
        begun_s = time.perf_counter()
        {"mezo-in-place": self._mezo, "grzo-hooks": self._hooked}[name](group)
        return time.perf_counter() - begun_s

    def losses(self, group: Sequence[Example]) -> Tensor:
        """(B,) of the label words."""
        rows = [torch.tensor(e.rows[0].ids) for e in group]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.pad)
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        logits = self.module(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
        words = logits[torch.arange(len(rows)), lengths - 1][:, self.label_ids].float()
        return F.cross_entropy(words, torch.tensor([e.label for e in group]), reduction="none")

    @torch.no_grad()
    def _hooked(self, group: Sequence[Example]) -> None:
        """GRZO as published (arXiv 2606.02857): y_i += sigma r_i * (U (s_i * x_i)) in a hook of every linear.

        U is as large as the weight and drawn again from its seed for each side and for the update.
        """
        generator = torch.Generator()
        b, seed = len(group), generator.seed()
        signs = {
            m: [torch.randint(0, 2, (b, n)).mul_(2).sub_(1).to(self.dtype) for n in m.weight.shape]
            for m in self.linears
        }

        def base(at: int, linear: nn.Linear) -> Tensor:
            return torch.empty_like(linear.weight).normal_(
                generator=generator.manual_seed(seed + at)
            )

        def hook(at: int, linear: nn.Linear, scale: float) -> Any:
            r, s = signs[linear]

            def change(module: nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor:
                moved = F.linear(args[0] * s[:, None], base(at, linear))
                return out + scale * r[:, None] * moved

            return linear.register_forward_hook(change)

        found = []
        for scale in (SIGMA, -SIGMA):
            hooks = [hook(at, linear, scale) for at, linear in enumerate(self.linears)]
            found.append(self.losses(group))
            for each in hooks:
                each.remove()
        delta = (found[0] - found[1]) / 2
        a = (delta / (delta.std() + 1e-8)).to(self.dtype)
        for at, linear in enumerate(self.linears):
            r, s = signs[linear]
            g = base(at, linear).mul_((a[:, None] * r).T @ s)
            linear.weight.sub_(g, alpha=1e-9 / (2 * SIGMA * b))


def _is_inner_linear(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and not name.endswith(("lm_head", "embed_out"))


def chart(result: Mapping[str, Any], file: Path) -> None:
    """Parts of a step over the plain forward, a bar for each row. PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in result["rows"] if row["ratio"] is not None]
    figure, panel = plt.subplots(figsize=(9, 1.2 + 0.3 * len(rows)))
    for at, row in enumerate(rows):
        left = 0.0
        for part, colour in (("perturbed_s", "C0"), ("update_s", "C1")):
            width = row[part] / row["forward_s"]
            panel.barh(at, width, left=left, color=colour, label="" if at else part[:-2])
            left += width
    panel.axvline(1.0, color="black", lw=1)
    panel.set_yticks(
        range(len(rows)),
        [f"{r['estimator']} {r['precision']}, B = {r['batch_size']}, {r['tokens']}" for r in rows],
    )
    panel.invert_yaxis()
    panel.set_xlabel("times the plain forward over the same rows (the line)")
    panel.legend(fontsize=8)
    figure.suptitle(f"{result['model']}: a step, {result['threads']} threads")
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    plt.close(figure)

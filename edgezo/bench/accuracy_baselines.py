"""First-order baselines of ``bench accuracy``: AdamW, LoRA and prefix tuning, with stock peft and PyTorch.

    model       transformers' module in fp32, logits of every position; a batch is padded to its longest row
    trained     all weights, or what peft adds: LoRA on every linear, or the keys and values of a prefix
    rule        torch.optim.AdamW; the learning rate falls by the schedule of a run of edgezo

The rows, their order, the losses and the evaluation are those of a run of edgezo with the same seed. Each baseline is a
process of its own, ``python -m edgezo.bench.accuracy_baselines '{"baseline": "lora", "lr": 1e-3, ...}'``, and writes
summary.json and metrics.jsonl.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from edgezo.errors import EdgezoError, UsageError
from edgezo.machine.clock import now_s
from edgezo.plan.config import RunConfig
from edgezo.plan.field import is_finite
from edgezo.plan.fields import DEFAULT_BATCH
from edgezo.plan.request import make_config

if TYPE_CHECKING:
    from torch import Tensor

    from edgezo.data.batches import Example
    from edgezo.data.dataset import Dataset
    from edgezo.run.metrics_log import MetricsLog
    from edgezo.run.objective import Judge

EVAL_ROWS = 16  # examples that are evaluated at once


class Baseline(NamedTuple):
    """A way to train that other libraries ship."""

    lr: float  # learning rate, unless the study gives one
    passes: int  # cost of a step in forwards: a backward counts one for the inputs and one for the weights
    settings: Mapping[str, Any]  # further settings and their defaults


FIRST_ORDER_BASELINES = {
    "adamw": Baseline(1e-5, 3, {}),
    "lora": Baseline(1e-3, 2, {"rank": 8, "alpha": 16}),
    "prefix": Baseline(1e-2, 2, {"virtual_tokens": 8}),
}
# Settings of a run of edgezo that mean the same for a baseline. A baseline ignores the others in a study's [common].
SHARED = (
    *("model", "data", "task", "data_root", "template", "labels", "label_field", "max_length"),
    *("eval_limit", "held_out", "seed", "steps", "for_s", "batch_size", "eval_every", "schedule"),
    *("weight_decay", "threads", "objective", "max_new_tokens"),
)


@dataclass(frozen=True)
class Request:
    """What a baseline is asked to do."""

    baseline: str
    lr: float
    settings: Mapping[str, Any]  # of the baseline itself, see ``Baseline.settings``
    cfg: RunConfig  # of the settings in ``SHARED``

    @staticmethod
    def of(given: Mapping[str, Any], of_method: Sequence[str] = ()) -> Request:
        """Check the settings of a run; those named in ``of_method`` have to mean something to the baseline.

        Raises UsageError with every problem.
        """
        name = given["baseline"]
        baseline = FIRST_ORDER_BASELINES.get(name) if isinstance(name, str) else None
        if baseline is None:
            known = ", ".join(FIRST_ORDER_BASELINES)
            raise UsageError(f"there is no baseline {name!r}; there are {known}")
        usable = ("baseline", "lr", *baseline.settings, *SHARED)
        problems = [
            f"{field} means nothing to baseline {name}; it takes {', '.join(usable)}"
            for field in of_method
            if field not in usable
        ]
        lr = given.get("lr", baseline.lr)
        if not isinstance(lr, int | float) or not is_finite(lr) or lr <= 0:
            problems.append(f"lr: {lr!r} is no learning rate; give a number above 0")
        settings = {field: given.get(field, usual) for field, usual in baseline.settings.items()}
        problems += [
            f"{field}: {value!r} is not a whole number of 1 or more"
            for field, value in settings.items()
            if not isinstance(value, int) or value < 1
        ]
        if problems:
            raise UsageError(problems)
        shared = {field: value for field, value in given.items() if field in SHARED}
        return Request(name, float(lr), settings, make_config({}, shared))

    @property
    def batch_size(self) -> int:
        """Examples in a step."""
        return self.cfg.batch_size or DEFAULT_BATCH

    @property
    def mean_passes(self) -> float:
        """Cost of a step, in forwards over its batch."""
        return FIRST_ORDER_BASELINES[self.baseline].passes


_WRITTEN = {"metrics.jsonl", "summary.json"}  # without a marker in versions before there was one


def run(given: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """Train a baseline and evaluate it; returns the content of summary.json, which is written last.

    Raises UsageError for settings, EdgezoError for models, rows and packages that are missing.
    """
    from edgezo.machine.files import atomic_write, to_json
    from edgezo.machine.ownership import claim
    from edgezo.machine.process_memory import Meter, peak_rss_bytes
    from edgezo.run.metrics_log import MetricsLog
    from edgezo.run.session import open_request

    request, meter = Request.of(given), Meter()
    opened = open_request(request.cfg)
    files = opened.files
    meter.mark("base")
    masked = files.kind == "masked"
    trainer = Trainer(request, files.path, masked, opened.dataset, opened.judge)
    meter.mark("load")
    claim(out, "baseline", lambda folder: {p.name for p in folder.iterdir()} <= _WRITTEN)
    log = MetricsLog(out / "metrics.jsonl")
    figures = _train(trainer, request, log)
    log.close()
    summary = {
        "model": request.cfg.model,
        "baseline": request.baseline,
        "lr": request.lr,
        **request.settings,
        "batch_size": request.batch_size,
        **figures,
        "trained_values": sum(p.numel() for p in trainer.trained),
        **meter.summary(),
        "peak_rss_bytes": peak_rss_bytes(),
    }
    atomic_write(out / "summary.json", (to_json(summary) + "\n").encode())
    return summary


def _train(trainer: Trainer, request: Request, log: MetricsLog) -> dict[str, Any]:
    """Train for the steps or the seconds of the request; returns the figures of the training."""
    from edgezo.data.batches import batch_indices
    from edgezo.zo.credit import schedule

    cfg, rows = request.cfg, trainer.dataset.train
    losses: list[float] = []
    times_s: list[float] = []
    evaluations_s = 0.0

    def evaluate(when: str, step: int) -> dict[str, Any]:
        figures = trainer.evaluate()
        log.write({"step": step, "eval": when, **figures})
        return figures

    before = evaluate("before", 0)
    begun_s, step = now_s(), 0
    while (fraction := _fraction(cfg, step, now_s() - begun_s - evaluations_s)) < 1:
        if cfg.eval_every and step and step % cfg.eval_every == 0:
            paused_s = now_s()
            evaluate("during", step)
            evaluations_s += now_s() - paused_s
        step_begun_s = now_s()
        picked = batch_indices(len(rows), request.batch_size, cfg.seed, step)
        rate = request.lr * schedule(cfg.schedule, fraction)
        losses.append(trainer.step([rows[i] for i in picked], rate))
        times_s.append(now_s() - step_begun_s)
        step += 1
        log.write({"step": step, "loss": losses[-1], "step_s": times_s[-1]})
    train_s = now_s() - begun_s - evaluations_s
    return {
        "steps": step,
        "loss_first": losses[0] if losses else None,
        "loss_last": losses[-1] if losses else None,
        "eval_before": before,
        "eval_after": evaluate("after", step),
        "train_s": train_s,
        "step_s": statistics.median(times_s) if times_s else None,
    }


def _fraction(cfg: RunConfig, step: int, spent_s: float) -> float:
    """How much of a run is over, from 0 to 1: of its steps, or of its seconds without evaluations."""
    return step / cfg.steps if cfg.steps else spent_s / (cfg.for_s or 1.0)


class Trainer:
    """A model in transformers' and peft's modules, the parameters that are trained, and AdamW."""

    def __init__(
        self,
        request: Request,
        path: Path,
        masked: bool,
        dataset: Dataset,
        judge: Judge | None = None,
    ):
        if masked and request.baseline == "prefix":
            raise EdgezoError(
                "baseline prefix is for causal models: peft has no prefix for masked ones. Use lora or adamw."
            )
        import torch
        from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

        torch.manual_seed(request.cfg.seed)  # peft starts what it adds from random values
        where = {"gguf_file": path.name} if path.is_file() else {}
        place = path.parent if path.is_file() else path
        auto: Any = AutoModelForMaskedLM if masked else AutoModelForCausalLM
        model: Any = auto.from_pretrained(place, dtype=torch.float32, **where)
        model.config.use_cache = False
        model.generation_config = _greedy(judge)
        self.module = _adapted(request, model)
        self.module.train()
        self.dataset, self.judge = dataset, judge
        self.trained = [p for p in self.module.parameters() if p.requires_grad]
        decay = request.cfg.weight_decay
        self.optimizer = torch.optim.AdamW(self.trained, lr=request.lr, weight_decay=decay)

    def step(self, group: Sequence[Example], rate: float) -> float:
        """Make one step on the mean loss of a group of examples, at learning rate ``rate``; returns that loss."""
        for options in self.optimizer.param_groups:
            options["lr"] = rate
        losses = [loss for loss, _ in self._scored(group)]
        total = sum(losses[1:], losses[0]) / len(losses)
        total.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(total.detach())

    def evaluate(self) -> dict[str, Any]:
        """Figures on the validation rows, as ``figures.evaluate_model`` gives them for a run."""
        import torch

        from edgezo.run.figures import figures_of

        rows, judge = self.dataset.validation, self.judge
        order = sorted(range(len(rows)), key=lambda i: max(len(r.ids) for r in rows[i].whole_rows))
        total_loss, chosen, texts = 0.0, [-1] * len(rows), list[str]()
        self.module.eval()
        with torch.no_grad():
            for start in range(0, len(order), EVAL_ROWS):
                group = order[start : start + EVAL_ROWS]
                scored = self._scored([rows[i] for i in group])
                for i, (loss, prediction) in zip(group, scored, strict=True):
                    total_loss += float(loss)
                    chosen[i] = prediction
            if judge is not None:
                texts = self._written(judge) if judge.writes else judge.words(chosen, rows)
        self.module.train()
        right = sum(option == row.label for option, row in zip(chosen, rows, strict=True))
        return figures_of(self.dataset, total_loss, right, judge, texts)

    def _written(self, judge: Judge) -> list[str]:
        """The answer that the model writes to each prompt, greedily, by transformers' generate()."""
        import torch

        generation = self.dataset.generation
        assert generation is not None
        stops: dict[str, Any] = {}
        if generation.stop:
            stops = {"stop_strings": list(generation.stop), "tokenizer": judge.tokenizer}
        texts = []
        for example in self.dataset.validation:
            prompt = torch.tensor([list(example.prompt)])
            ids = self.module.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=generation.most,
                **stops,
            )
            texts.append(judge.answer(ids[0, prompt.shape[1] :].tolist()))
        return texts

    def _scored(self, group: Sequence[Example]) -> list[tuple[Tensor, int]]:
        """(loss, prediction) of each example of a group, from one forward over its rows, padded to the longest."""
        import torch

        rows = [row for example in group for row in example.whole_rows]
        longest = max(len(row.ids) for row in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        seen = torch.zeros(len(rows), longest, dtype=torch.int64)
        for line, row in enumerate(rows):
            ids[line, : len(row.ids)] = torch.tensor(row.ids)
            seen[line, : len(row.ids)] = 1
        logits = self.module(input_ids=ids, attention_mask=seen).logits
        scored = iter(logits[line, list(row.score_at)].float() for line, row in enumerate(rows))
        return [
            loss_of([next(scored) for _ in example.whole_rows], example, self.dataset)
            for example in group
        ]


def _greedy(judge: Judge | None) -> Any:
    """Settings of generate() that write as a run does, without those that a model ships with, such as penalties."""
    from transformers import GenerationConfig

    if judge is None:
        return GenerationConfig()
    return GenerationConfig(
        do_sample=False,
        use_cache=True,
        eos_token_id=sorted(judge.ends) or None,
        pad_token_id=judge.tokenizer.pad_token_id,
    )


def loss_of(logits: Sequence[Tensor], example: Example, dataset: Dataset) -> tuple[Tensor, int]:
    """(loss, prediction) of an example, as losses.Scorer gives them; the prediction is -1 where there is none.

    ``logits``: for each row of the example (p, V) fp32, of the p positions that are scored.
    """
    import torch
    import torch.nn.functional as F

    if dataset.kind == "label":
        words = logits[0][:, list(dataset.label_ids)]
        return F.cross_entropy(words, torch.tensor([example.label])), int(words.argmax())
    nll = torch.stack(
        [
            F.cross_entropy(of_row, torch.tensor(row.score_ids))
            for of_row, row in zip(logits, example.whole_rows, strict=True)
        ]
    )
    if dataset.kind == "choice":
        return F.cross_entropy(-nll, torch.tensor(example.label)), int(nll.argmin())
    return nll[0], -1


def _adapted(request: Request, model: Any) -> Any:
    """The model with the parts that the baseline trains. Raises EdgezoError without peft."""
    if request.baseline == "adamw":
        return model
    try:
        from peft import LoraConfig, PrefixTuningConfig, get_peft_model
    except ImportError as problem:
        raise EdgezoError(
            f"baseline {request.baseline} needs peft: pip install 'edgezo[bench]'"
        ) from problem
    settings = request.settings
    if request.baseline == "lora":
        config: Any = LoraConfig(
            r=settings["rank"], lora_alpha=settings["alpha"], target_modules="all-linear"
        )
    else:
        config = PrefixTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=settings["virtual_tokens"]
        )
    return get_peft_model(model, config)


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    if arguments.get("threads"):
        os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(arguments["threads"])
    try:
        print(json.dumps(run(arguments, Path(arguments.pop("out")))))
    except EdgezoError as problem:
        print(json.dumps({"error": str(problem)}))
        sys.exit(problem.exit_code)

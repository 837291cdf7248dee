"""First-order baselines of ``bench accuracy``: AdamW on all weights, LoRA and prefix tuning, as people write them.

    model       transformers' in fp32, every position's logits, the whole batch at once, padded to its longest row
    trained     all weights, or what peft adds: LoRA on every linear, or keys and values of a prefix
    rule        torch.optim.AdamW; the rate falls as in a run of edgezo

Rows, their order, losses and evaluation are those of a run with the same seed. Runs as a process of its own,
``python -m edgezo.bench.accuracy_baselines '{"baseline": "lora", "lr": 1e-3, ...}'``, and writes summary.json and
metrics.jsonl.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from edgezo.errors import EdgezoError, UsageError
from edgezo.plan.request import RunConfig, make_config

if TYPE_CHECKING:
    from torch import Tensor

    from edgezo.data.batches import Example
    from edgezo.data.dataset import Dataset
    from edgezo.run.objective import Judge

EVAL_ROWS = 16  # of an evaluation batch


class Baseline(NamedTuple):
    """A way to train that others ship."""

    lr: float  # where the study says none
    passes: int  # a step in forwards: a backward takes one for the inputs and one for the weights
    settings: Mapping[str, Any]  # what else may be said, with its default


BASELINES = {
    "adamw": Baseline(1e-5, 3, {}),
    "lora": Baseline(1e-3, 2, {"rank": 8, "alpha": 16}),
    "prefix": Baseline(1e-2, 2, {"virtual_tokens": 8}),
}
# Fields of a run that mean the same here; those of a study's [common] that are about a run of edgezo's are left out.
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
    settings: Mapping[str, Any]
    cfg: RunConfig  # of the fields in ``SHARED``

    @staticmethod
    def of(said: Mapping[str, Any], own: Sequence[str] = ()) -> Request:
        """Check a request; ``own``: the fields that were said of this method alone. Raises UsageError."""
        name = said["baseline"]
        known = BASELINES.get(name)
        if known is None:
            raise UsageError(f"there is no baseline {name!r}; there are {', '.join(BASELINES)}")
        usable = ("baseline", "lr", *known.settings, *SHARED)
        problems = [
            f"{field} means nothing to baseline {name}; it takes {', '.join(usable)}"
            for field in own
            if field not in usable
        ]
        lr = said.get("lr", known.lr)
        if not isinstance(lr, int | float) or not 0 < lr < float("inf"):
            problems.append(f"lr: {lr!r} is no learning rate")
        settings = {field: said.get(field, default) for field, default in known.settings.items()}
        problems += [
            f"{field}: {value!r} is no number of 1 or more"
            for field, value in settings.items()
            if not isinstance(value, int) or value < 1
        ]
        if problems:
            raise UsageError(problems)
        shared = {field: value for field, value in said.items() if field in SHARED}
        return Request(name, float(lr), settings, make_config({}, shared))

    @property
    def mean_passes(self) -> float:
        """Of a step, in forwards over its batch."""
        return BASELINES[self.baseline].passes


def run(said: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """Train and evaluate; returns, and writes last of all, what summary.json holds. Raises EdgezoError."""
    from edgezo.data.batches import batch_indices
    from edgezo.machine.process_memory import Meter, peak_rss_bytes
    from edgezo.network import cards, loader
    from edgezo.run.metrics_log import MetricsLog
    from edgezo.run.session import Opened, judge_of, read_data
    from edgezo.zo.credit import schedule

    request = Request.of(said)
    cfg, meter = request.cfg, Meter()
    files = loader.open_model(cards.resolve(cfg.model))
    tokenizer = loader.load_tokenizer(files.path)
    dataset = read_data(cfg, files, tokenizer)
    judge = judge_of(Opened(cfg, files, tokenizer, dataset))
    meter.mark("base")
    trainer = Trainer(request, files.path, files.kind == "masked", dataset, judge)
    meter.mark("load")
    out.mkdir(parents=True, exist_ok=True)
    assert cfg.batch_size is not None
    log, times_s, losses, evaluated_s = MetricsLog(out / "metrics.jsonl"), [], [], 0.0

    def evaluate(when: str, step: int) -> dict[str, Any]:
        found = trainer.evaluate()
        log.write({"step": step, "eval": when, **found})
        return found

    before = evaluate("before", 0)
    begun_s, step = time.monotonic(), 0
    while True:
        spent_s = time.monotonic() - begun_s - evaluated_s
        fraction = step / cfg.steps if cfg.steps else spent_s / (cfg.for_s or 1.0)
        if fraction >= 1:
            break
        if cfg.eval_every and step and step % cfg.eval_every == 0:
            paused_s = time.monotonic()
            evaluate("during", step)
            evaluated_s += time.monotonic() - paused_s
        step_s = time.monotonic()
        picked = batch_indices(len(dataset.train), cfg.batch_size, cfg.seed, step)
        rate = request.lr * schedule(cfg.schedule, fraction)
        losses.append(trainer.step([dataset.train[i] for i in picked], rate))
        times_s.append(time.monotonic() - step_s)
        step += 1
        log.write({"step": step, "loss": losses[-1], "step_s": times_s[-1]})
    train_s = time.monotonic() - begun_s - evaluated_s
    after = evaluate("after", step)
    log.close()
    summary = {
        "model": cfg.model,
        "baseline": request.baseline,
        "lr": request.lr,
        **request.settings,
        "steps": step,
        "batch_size": cfg.batch_size,
        "loss_first": losses[0] if losses else None,
        "loss_last": losses[-1] if losses else None,
        "eval_before": before,
        "eval_after": after,
        "train_s": train_s,
        "step_s": statistics.median(times_s) if times_s else None,
        "trained_values": sum(p.numel() for p in trainer.trained),
        **meter.summary(),
        "peak_rss_bytes": peak_rss_bytes(),
    }
    from edgezo.machine.files import atomic_write, to_json

    atomic_write(out / "summary.json", (to_json(summary) + "\n").encode())
    return summary


class Trainer:
    """The model, what is trained of it, and AdamW."""

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
                "baseline prefix is for causal models (peft's prefix has no masked one); use lora or adamw"
            )
        import torch
        from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

        torch.manual_seed(request.cfg.seed)  # peft draws what it adds
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
        """One step on the mean loss of a group, which it returns."""
        for settings in self.optimizer.param_groups:
            settings["lr"] = rate
        losses = [loss for loss, _ in self._scored(group)]
        total = sum(losses[1:], losses[0]) / len(losses)
        total.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(total.detach())

    def evaluate(self) -> dict[str, Any]:
        """As ``session.evaluate_model``."""
        import torch

        from edgezo.run.session import figures_of

        rows, judge = self.dataset.validation, self.judge
        order = sorted(range(len(rows)), key=lambda i: max(len(r.ids) for r in rows[i].rows))
        total_loss, chosen, texts = 0.0, [-1] * len(rows), list[str]()
        self.module.eval()
        with torch.no_grad():
            for start in range(0, len(order), EVAL_ROWS):
                group = order[start : start + EVAL_ROWS]
                for i, (loss, said) in zip(
                    group, self._scored([rows[i] for i in group]), strict=True
                ):
                    total_loss += float(loss)
                    chosen[i] = said
            if judge is not None:
                texts = self._written(judge) if judge.writes else judge.words(chosen, rows)
        self.module.train()
        right = sum(said == row.label for said, row in zip(chosen, rows, strict=True))
        return figures_of(self.dataset, total_loss, right, judge, texts)

    def _written(self, judge: Judge) -> list[str]:
        """What the model writes after each prompt, greedily, by transformers' own generate()."""
        import torch

        how = self.dataset.generation
        assert how is not None
        stops: dict[str, Any] = {}
        if how.stop:
            stops = {"stop_strings": list(how.stop), "tokenizer": judge.tokenizer}
        texts = []
        for example in self.dataset.validation:
            prompt = torch.tensor([list(example.prompt)])
            found = self.module.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=how.most,
                **stops,
            )
            texts.append(judge.answer(found[0, prompt.shape[1] :].tolist()))
        return texts

    def _scored(self, group: Sequence[Example]) -> list[tuple[Tensor, int]]:
        """(loss, prediction) of each example, from one padded forward."""
        import torch

        rows = [row for example in group for row in example.rows]
        longest = max(len(row.ids) for row in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        seen = torch.zeros(len(rows), longest, dtype=torch.int64)
        for line, row in enumerate(rows):
            ids[line, : len(row.ids)] = torch.tensor(row.ids)
            seen[line, : len(row.ids)] = 1
        logits = self.module(input_ids=ids, attention_mask=seen).logits
        scored = iter(logits[line, list(row.score_at)].float() for line, row in enumerate(rows))
        return [
            loss_of([next(scored) for _ in example.rows], example, self.dataset)
            for example in group
        ]


def _greedy(judge: Judge | None) -> Any:
    """How transformers writes as a run does, and nothing that a model ships with, such as penalties."""
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
    """(loss, prediction or -1) of an example as objective.Scorer has it; ``logits``: (p, V) fp32 of each row."""
    import torch
    import torch.nn.functional as F

    if dataset.kind == "label":
        words = logits[0][:, list(dataset.label_ids)]
        return F.cross_entropy(words, torch.tensor([example.label])), int(words.argmax())
    nll = torch.stack(
        [
            F.cross_entropy(own, torch.tensor(row.score_ids))
            for own, row in zip(logits, example.rows, strict=True)
        ]
    )
    if dataset.kind == "choice":
        return F.cross_entropy(-nll, torch.tensor(example.label)), int(nll.argmin())
    return nll[0], -1


def _adapted(request: Request, model: Any) -> Any:
    """The model with what the baseline trains."""
    if request.baseline == "adamw":
        return model
    try:
        from peft import LoraConfig, PrefixTuningConfig, get_peft_model
    except ImportError as problem:
        raise EdgezoError(
            f"baseline {request.baseline} takes peft: pip install 'edgezo[bench]'"
        ) from problem
    own = request.settings
    if request.baseline == "lora":
        config: Any = LoraConfig(
            r=own["rank"], lora_alpha=own["alpha"], target_modules="all-linear"
        )
    else:
        config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=own["virtual_tokens"])
    return get_peft_model(model, config)


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    if asked.get("threads"):
        os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(asked["threads"])
    try:
        print(json.dumps(run(asked, Path(asked.pop("out")))))
    except EdgezoError as problem:
        print(json.dumps({"error": str(problem)}))
        sys.exit(problem.exit_code)

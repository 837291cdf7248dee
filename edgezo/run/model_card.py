"""README.md beside an export: what it was made from, how good it is, how to use it; and Ollama's Modelfile."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgezo.data.tasks import TASKS
from edgezo.machine.files import user_path
from edgezo.machine.foreign import MOST_CONFIG_BYTES, clip
from edgezo.network.loader import ModelFiles
from edgezo.plan.config import RunConfig
from edgezo.run.base_file import hub_of
from edgezo.run.overview import method_after
from edgezo.run.session import base_file
from edgezo.weights.gguf_config import END_MARKS

CARD, MODELFILE = "README.md", "Modelfile"
_SETTINGS = ("estimator", "train", "precision", "batch_size", "step", "sigma", "rank", "seed")
_LICENCE = re.compile(r"^license:\s*([\w.+-]+)\s*$", re.M)
_USE = {
    "hf": "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
    'model = AutoModelForCausalLM.from_pretrained("DIR")',
    "hf-classifier": "from transformers import pipeline\n\n"
    'classify = pipeline("text-classification", "DIR", top_k=None)\n'
    'print(classify("a prompt, as in the training"))',
    "peft": 'from peft import AutoPeftModelForCausalLM\n\nmodel = AutoPeftModelForCausalLM.from_pretrained("DIR")',
    "gguf": "edgezo predict model.gguf --data rows.jsonl\n"
    "llama-cli -m model.gguf\nollama create mine -f Modelfile && ollama run mine",
    "onnx": 'import onnxruntime\n\nsession = onnxruntime.InferenceSession("model.onnx")',
    "gguf-adapter": "llama-cli -m BASE.gguf --lora adapter.gguf",
}


def write_card(
    folder: Path,
    about: Mapping[str, Any],
    cfg: RunConfig,
    summary: Mapping[str, Any],
    files: ModelFiles,
) -> None:
    """Write README.md, and for a GGUF model a Modelfile. ``about`` is edgezo.json, ``summary`` that of the run."""
    base, licence, file = _base(cfg), licence_of(files), base_file(files)
    read = f"{file.described()}, SHA-256 `{file.sha256}`"
    hub = [f"base_model: {base}"] if re.fullmatch(r"[\w.-]+/[\w.-]+", base) else []
    head = ["---", f"license: {licence or 'unknown'}", *hub, "tags: [edgezo]", "---", ""]
    form, trained = about["format"], str(summary.get("trained", "+".join(cfg.train)))
    method = method_after(trained, about["steps"], cfg)
    lines = [
        *head,
        f"# {base}, fine-tuned",
        "",
        f"- **Base:** {base}" + (f", rounded to {file.rounded}" if file.rounded else ""),
        f"- **Weights that were read:** {read}",
        f"- **Data:** {_data(cfg, about)}",
        f"- **Training:** {about['steps']} steps of {method}: {_settings(cfg, about)}",
        f"- **Evaluation:** {_before_after(summary)}",
        f"- **Licence:** {licence or 'unknown: that of the base and of the data; fill it in before you share this'}",
        f"- **Made by:** edgezo, run `{about['run_id'][:16]}`",
        "",
        *(f"Note: {note}.\n" for note in about["notes"]),
        "## How to use it",
        "",
        *_prompt(cfg, about),
        "```python" if form in ("hf", "hf-classifier", "peft", "onnx") else "```sh",
        _USE[form],
        "```",
        "",
    ]
    (folder / CARD).write_text("\n".join(lines), encoding="utf-8")
    if form == "gguf":
        (folder / MODELFILE).write_text(modelfile(cfg, about, files), encoding="utf-8")


def _base(cfg: RunConfig) -> str:
    """The name of the base: a hub id where one is known, never a path of the machine it was trained on."""
    if (hub := hub_of(cfg.model)) is not None:
        return hub
    path = user_path(cfg.model)
    return path.resolve().name if path.exists() else cfg.model


def licence_of(files: ModelFiles) -> str | None:
    """The licence that the base states: in the card beside its weights, or in a GGUF file's metadata."""
    if files.path.is_file():
        from edgezo.weights.gguf_header import read_header

        stated = read_header(files.path).metadata.get("general.license")
        return clip(stated, 60) if isinstance(stated, str) and stated.isprintable() else None
    card = files.path / CARD
    if not card.is_file() or card.stat().st_size > MOST_CONFIG_BYTES:
        return None
    first = card.read_text(encoding="utf-8", errors="replace").split("\n---", 1)[0]
    match = _LICENCE.search(first)
    return match[1] if match else None


def _data(cfg: RunConfig, about: Mapping[str, Any]) -> str:
    source = f"the task {cfg.task}" if cfg.task else Path(cfg.data or "rows").name
    facts = about["dataset"]
    names = ", ".join(facts["label_names"][:20])
    return f"{source}; rows of the kind {facts['kind']}" + (
        f" with the labels {names}" if names else ""
    )


def _settings(cfg: RunConfig, about: Mapping[str, Any]) -> str:
    values = {name: getattr(cfg, name) for name in _SETTINGS} | {"precision": about["precision"]}
    shown = {k: "+".join(v) if isinstance(v, tuple) else v for k, v in values.items()}
    return ", ".join(f"{k} {v}" for k, v in shown.items() if v is not None and k != "estimator")


def _before_after(summary: Mapping[str, Any]) -> str:
    after, before = summary.get("eval_after"), summary.get("eval_before")
    if not isinstance(after, Mapping) or not isinstance(after.get("value"), int | float):
        return "none: the run has not ended"
    first = ""
    if isinstance(before, Mapping) and isinstance(before.get("value"), int | float):
        first = f"{before['value']:.4f} before, "
    return f"{after.get('metric')} {first}{after['value']:.4f} after, on {after.get('n')} rows held out"


def _prompt(cfg: RunConfig, about: Mapping[str, Any]) -> list[str]:
    asked = {k: v for k, v in about["asked_by"].items() if k in ("task", "template", "labels")}
    if (task := TASKS.get(cfg.task or "")) is not None:
        asked = {"template": task.template, "labels": task.labels, **asked}
    if not asked:
        return []
    return [
        "Prompts are those of the training:",
        "",
        "```json",
        json.dumps(asked, ensure_ascii=False),
        "```",
        "",
    ]


def modelfile(cfg: RunConfig, about: Mapping[str, Any], files: ModelFiles) -> str:
    """Ollama's Modelfile of model.gguf. Its chat template is the one in the file, which Ollama reads."""
    lines = ["FROM ./model.gguf"]
    if about["dataset"]["kind"] != "completion" or cfg.template or cfg.task:
        lines += [
            "# The model was trained on plain prompts, not on conversations.",
            'TEMPLATE "{{ .Prompt }}"',
        ]
    lines.append("PARAMETER temperature 0")
    lines += [f'PARAMETER stop "{mark}"' for mark in _ends(files)]
    return "\n".join(lines) + "\n"


def _ends(files: ModelFiles) -> list[str]:
    """The texts of the tokens that end an answer."""
    from edgezo.network.loader import load_tokenizer

    tokenizer = load_tokenizer(files.path)
    ends = {
        *files.end_ids,
        *([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []),
    }
    texts = [str(tokenizer.convert_ids_to_tokens(i)) for i in sorted(ends) if i < len(tokenizer)]
    return [t for t in texts if t in END_MARKS or t == tokenizer.eos_token]

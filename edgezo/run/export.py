"""``edgezo export``: a run's result as files that other programs read.

    hf      config.json, tokenizer and safetensors: the whole model with what was trained in its weights. Also turns
            a GGUF file into such a directory; of a text and vision model it is the text part.
    peft    adapter_config.json and adapter_model.safetensors: what was trained beside the frozen base, as LoRA

        low-rank factors    y += A (V x)            lora_A = V, lora_B = A, alpha = rank
        --estimator lora    y += 8/rank B (A x)     as it is
        head, label words   rows k of H += delta_k  lora_A = delta, lora_B = the words' columns of the identity
        head, completions   H += Q P                lora_A = P, lora_B = Q

int8 and int4 codes are expanded, as the run's forward reads them. What was trained beside frozen weights is fp32 in a
run, and small: bf16 weights with it added would keep two thirds of it or less, so hf writes fp32 then unless asked.
    gguf, gguf-adapter    for llama.cpp and what is built on it (export_gguf.py)
    onnx                  a graph with its weights beside it (export_onnx.py)
    hf-classifier         a model of transformers' that puts out the scores of labels (export_classifier.py)
    journal               one small file, from which anybody with the base makes the model (shipped.py)

A linear probe has a place in neither of hf and peft: it reads blocks in the middle of the model, and blocks above it
were not run. Its file is copied beside them, where edgezo eval and a dozen lines of transformers use it
(docs/export.md). The result says that the model alone does not predict what the run does.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers.pytorch_utils import Conv1D

from edgezo.errors import UsageError
from edgezo.machine.files import atomic_folder, to_json, user_path
from edgezo.machine.ownership import check_new
from edgezo.network.cards import resolve
from edgezo.network.loader import ModelFiles, build_meta, open_model
from edgezo.plan.config import RunConfig
from edgezo.plan.fields import QUANTIZED
from edgezo.run.base_file import BaseFile, hub_of, measured_by, other_weights
from edgezo.run.directory import RunFiles, dataset_facts
from edgezo.run.evaluate import Rebuilt, brought_back
from edgezo.run.export_classifier import ClassifierExporter
from edgezo.run.export_files import beside_weights, write_config, write_weights
from edgezo.run.export_gguf import GgufExporter, check_base
from edgezo.run.exported import asked_by
from edgezo.run.merged import Merged
from edgezo.run.model_card import write_card
from edgezo.run.places import at_base, for_torch, with_base
from edgezo.run.session import base_file
from edgezo.run.shipped import ship
from edgezo.run.summary_file import saved_summary, unfinished
from edgezo.weights.saved import Saved, write_saved
from edgezo.zo.parts import PARTS

_ADAPTERS, _WHOLE = ("peft", "gguf-adapter"), ("hf", "hf-classifier")
_HF_DTYPES = ("fp32", "bf16", "fp16")


def export(
    source: Path, form: str, out: Path, *, dtype: str | None = None, base: str | None = None
) -> dict[str, Any]:
    """Write run ``source``, as it stands now, to the new directory ``out`` (``journal``: file): all of it or nothing.

    ``dtype``: of the weights of ``hf`` and ``gguf``. ``base``: where the base is now.
    Blocks that have no room in memory are read one by one.
    Raises UsageError where ``out`` is there already, or the form has no place for the model or what was trained.
    """
    run = RunFiles(source)
    cfg = with_base(for_torch(at_base(run.read_config(), base)), run.path)
    _check_form(cfg, form, dtype)
    if form == "journal":
        return ship(run, cfg, out)
    check_new(out)
    out = out.resolve()  # where a link to an empty directory leads
    with atomic_folder(out) as folder, brought_back(run, cfg) as rebuilt:
        files = rebuilt.planned.opened.files
        read = base_file(files)
        about = {
            "run": str(source),
            "out": str(out),
            "format": form,
            "steps": rebuilt.steps,
            "trained": list(cfg.train),
            "precision": rebuilt.planned.cfg.precision,
            "base": cfg.model,
            "base_sha256": files.content_hash,
            "base_file": read.to_dict(),
            "run_id": rebuilt.of_run,
            "dataset": dataset_facts(rebuilt.planned.opened.dataset),
            "asked_by": asked_by(cfg),
            "predicts_as_run": rebuilt.model.readout is None,
        }
        if form == "onnx":
            from edgezo.run.export_onnx import OnnxExporter  # it imports onnx

            # With a config of its own: building a module resets how the run's attention is computed.
            apart = replace(files, config=copy.deepcopy(files.config))
            written = OnnxExporter(rebuilt, build_meta(apart)).write(folder, dtype)
            notes = [*beside_weights(files, folder), *written.pop("notes")]
            result = {**about, "predicts_as_run": True, "notes": notes, **written}
        elif form.startswith("gguf"):
            result = _gguf(run, rebuilt, form, folder, dtype, about)
        elif form == "hf-classifier":
            exporter = ClassifierExporter(rebuilt, build_meta(files))
            written = exporter.write(folder, dtype)
            notes = [*beside_weights(files, folder), *written.pop("notes")]
            result = {**about, "predicts_as_run": True, "notes": notes, **written}
        else:
            result = _huggingface(run, rebuilt, form, folder, dtype, about)
        result["notes"] = [
            *unfinished(run, cfg, rebuilt.steps),
            *_of_base(read, cfg.model, form),
            *result["notes"],
        ]
        RunFiles(folder).exported.write_text(to_json(result) + "\n", encoding="utf-8")
        write_card(folder, result, cfg, saved_summary(run), files)
    return result


def _check_form(cfg: RunConfig, form: str, dtype: str | None) -> None:
    """UsageError where the form has no place for the model or for what the run trains."""
    if form in _ADAPTERS and (inside := [part for part in cfg.train if PARTS[part].in_base]):
        raise UsageError(
            f"--format {form} holds what lies beside frozen weights, and this run trained {'+'.join(inside)}.\n"
            f"Use --format {'hf' if form == 'peft' else 'gguf'}, which writes the whole model."
        )
    if form == "journal" and dtype is not None:
        raise UsageError("--format journal holds steps, not weights: leave out --dtype")
    if form in _ADAPTERS and dtype is not None:
        raise UsageError(
            "--dtype is the type of the weights that --format hf or gguf writes; an adapter is fp32"
        )
    if form in _WHOLE and dtype is not None and dtype not in _HF_DTYPES:
        raise UsageError(
            f"--format {form} writes {', '.join(_HF_DTYPES)}; {dtype} is for --format gguf"
        )
    if form == "onnx" or form.startswith("gguf"):
        files = open_model(resolve(cfg.model))
        if form == "onnx":
            from edgezo.run import export_onnx  # it imports onnx

            export_onnx.check_base(files, dtype)
        else:
            check_base(files)


def _of_base(base: BaseFile, model: str, form: str) -> list[str]:
    """What whoever uses the files should know of a base whose weights were rounded before the training."""
    sentence = other_weights(base, model)
    if not sentence:
        return []
    if form not in _ADAPTERS:
        return [f"{sentence}. What is written here began as them, whatever type it has now"]
    return [
        f"{sentence}. {measured_by(model)}, where the adapter was not measured yet; --format hf writes a model with "
        "the file's weights"
    ]


def _huggingface(
    run: RunFiles,
    rebuilt: Rebuilt,
    form: str,
    folder: Path,
    dtype: str | None,
    about: Mapping[str, Any],
) -> dict[str, Any]:
    files = rebuilt.planned.opened.files
    exporter = _Exporter(rebuilt, build_meta(files))
    written = exporter.peft(folder) if form == "peft" else exporter.hf(folder, dtype)
    notes = [*beside_weights(files, folder), *exporter.notes(form)]
    if exporter.probed:
        shutil.copyfile(run.probe, folder / run.probe.name)
    return {**about, "notes": notes, **written}


def _gguf(
    run: RunFiles,
    rebuilt: Rebuilt,
    form: str,
    folder: Path,
    dtype: str | None,
    about: Mapping[str, Any],
) -> dict[str, Any]:
    files = rebuilt.planned.opened.files
    exporter = GgufExporter(rebuilt, build_meta(files))
    if form == "gguf":
        written = exporter.write(folder, dtype, about)
    else:
        _check_products(exporter, files)
        written = exporter.write_adapter(folder, about)
    notes = [*written.pop("notes"), *_gguf_notes(exporter, form)]
    return {**about, "notes": notes, **written}


def _check_products(exporter: GgufExporter, files: ModelFiles) -> None:
    """UsageError where an adapter has nothing to hold, or llama.cpp no matrix to add it to."""
    if exporter.probed:
        raise UsageError(
            "this run predicts by a linear probe, which llama.cpp's adapter has no place for.\n"
            "Use --format gguf, whose file has it in its metadata (edgezo predict reads it), or train with "
            "--train lowrank+head."
        )
    if exporter.rebuilt.model.exact is not None and exporter.tied:
        raise UsageError(
            "this run trained the head of a model whose head is its embedding table, and llama.cpp's adapter would "
            "change both.\nUse --format gguf, which gives the model a head of its own, or train with --train lowrank."
        )


def _gguf_notes(exporter: GgufExporter, form: str) -> list[str]:
    """What whoever uses the file should know."""
    notes = []
    if exporter.probed:
        notes.append(
            "the run predicts by its linear probe, which llama.cpp does not know: it is in the metadata of the file, "
            "where edgezo predict and edgezo eval read it. In other programs the model alone predicts something else; "
            "for a model that needs no probe, train with --train lowrank+head"
        )
    if form == "gguf-adapter" and exporter.rebuilt.planned.cfg.precision in QUANTIZED:
        precision = exporter.rebuilt.planned.cfg.precision
        notes.append(f"trained beside {precision} codes: over other weights losses differ a little")
    return notes


class _Exporter(Merged):
    """Writes ``hf`` and ``peft``."""

    def notes(self, form: str) -> list[str]:
        """What whoever reads the files should know."""
        notes, model = [], self.rebuilt.model
        if self.probed:
            notes.append(
                "the run predicts by its linear probe, which these files have no place for: it lies beside them "
                "(probe.safetensors). edgezo eval uses it there, and docs/export.md says how other programs do. The "
                "model alone predicts something else; for one that needs no second file, train with --probe-reads one "
                "and export --format hf-classifier, or train without probe"
            )
        if form == "peft" and self.rebuilt.planned.cfg.precision in QUANTIZED:
            notes.append(
                f"trained beside {self.rebuilt.planned.cfg.precision} codes: over other weights losses differ a little"
            )
        if form == "peft" and model.exact is not None and self.tied:
            notes.append(
                "the head of this model is its embedding table too: merging the adapter would change both; "
                "use --format hf for one model"
            )
        return notes

    def hf(self, folder: Path, asked: str | None) -> dict[str, Any]:
        """Every parameter, a tile at a time."""
        model, dtype = self.rebuilt.model, self.dense_dtype(asked)
        config = self.rebuilt.planned.opened.files.config
        config.dtype = dtype
        output = f"{self.name_of(self.meta.get_output_embeddings())}.weight"
        names = [name for name, _ in self.meta.named_parameters()]
        if model.exact is not None and self.tied:  # only the head's use of the table has changed
            config.tie_word_embeddings = False
            every = [name for name, _ in self.meta.named_parameters(remove_duplicate=False)]
            names += [name for name in every if name not in names]  # RoBERTa's head ties its bias
        config.architectures = [type(self.meta).__name__]
        write_config(config, folder)
        return write_weights(folder, [self.saved(name, dtype, name == output) for name in names])

    def peft(self, folder: Path) -> dict[str, Any]:
        """LoRA matrices and the configuration that peft reads."""
        model, cfg = self.rebuilt.model, self.rebuilt.planned.cfg
        products = dict(self.products())
        if not products:
            raise UsageError(
                "this run trained a linear probe and nothing else, which is no adapter.\n"
                "edgezo eval reads it from the run."
            )
        if self._part_of_more():
            raise UsageError(
                f"{cfg.model} is a text and vision model, whose modules peft names otherwise than the text part.\n"
                "Use --format hf, which writes the text part as a model."
            )
        tensors, ranks, alphas = {}, {}, {}
        usual = next(iter(products.values()))
        for module, product in products.items():
            tensors[f"base_model.model.{module}.lora_A.weight"] = product.down.contiguous()
            tensors[f"base_model.model.{module}.lora_B.weight"] = product.up.contiguous()
            if (len(product.down), product.alpha) != (len(usual.down), usual.alpha):
                ranks[module], alphas[module] = len(product.down), product.alpha
        saved = [Saved.of(name, tensor) for name, tensor in tensors.items()]
        write_saved(folder / "adapter_model.safetensors", saved, {"format": "pt"})
        turned = any(isinstance(m, Conv1D) for m in self.meta.modules())
        described = {
            "peft_type": "LORA",
            "task_type": None if model.masked else "CAUSAL_LM",
            "base_model_name_or_path": self._base(),
            "r": len(usual.down),
            "lora_alpha": usual.alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": turned,
            "inference_mode": True,
            "target_modules": list(products),
            "rank_pattern": ranks,
            "alpha_pattern": alphas,
        }
        (folder / "adapter_config.json").write_text(json.dumps(described, indent=1) + "\n")
        return {"tensors": len(tensors), "weight_bytes": sum(t.nbytes for t in tensors.values())}

    def _base(self) -> str:
        """A hub id that the card or the user names, else the path of the base here."""
        model = self.rebuilt.planned.cfg.model
        path = user_path(model)
        return str(path.resolve()) if path.exists() else hub_of(model) or model

    def _part_of_more(self) -> bool:
        path = self.rebuilt.planned.opened.files.path / "config.json"
        if not path.is_file():
            return False
        model_type: str = json.loads(path.read_text(encoding="utf-8"))["model_type"]
        return model_type != self.meta.config.model_type

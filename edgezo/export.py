"""``edgezo export``: a run's result as files that other programs read.

    hf      config.json, tokenizer and safetensors: the whole model with what was trained in its weights. Also turns
            a GGUF file into such a directory.
    peft    adapter_config.json and adapter_model.safetensors: what was trained beside the frozen base, as LoRA

        low-rank factors    y += A (V x)            lora_A = V, lora_B = A, alpha = rank
        --estimator lora    y += 8/rank B (A x)     as it is
        head, label words   rows k of H += delta_k  lora_A = delta, lora_B = the words' columns of the identity
        head, completions   H += Q P                lora_A = P, lora_B = Q

A linear probe has a place in neither: it reads blocks in the middle of the model, and blocks above it were not run. Its
file is copied beside them. Weights are those that the run's forward multiplied, int8 and int4 codes expanded.
"""

from __future__ import annotations

import json
import math
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from edgezo.errors import EdgezoError, UsageError
from edgezo.evaluate import Brought, brought_back
from edgezo.files import TEMP_SUFFIX
from edgezo.layouts import DENSE_DTYPES, tiles
from edgezo.loader import build_meta, load_tokenizer
from edgezo.lora import ALPHA
from edgezo.report import to_json
from edgezo.rundir import RunFiles, write_saved
from edgezo.settings import QUANTIZED
from edgezo.weights import Saved

BESIDE = frozenset(
    {"lowrank", "lora", "head", "probe"}
)  # what does not move the base's own weights


def export(source: Path, form: str, out: Path) -> dict[str, Any]:
    """Write run ``source``, as it stands now, to the new directory ``out``: all of it or nothing.

    Raises UsageError where ``out`` is there already, or the form has no place for what was trained.
    """
    run = RunFiles(source)
    cfg = run.read_config()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is there already. Give another --out, or remove it.")
    if form == "peft" and (own := [part for part in cfg.train if part not in BESIDE]):
        raise UsageError(
            f"--format peft holds what lies beside frozen weights, and this run trained {'+'.join(own)}.\n"
            "Use --format hf, which writes the whole model."
        )
    with (
        brought_back(run, residency="resident", device="cpu", max_mem_bytes=None) as found,
        _whole(out) as folder,
    ):
        exporter = _Exporter(found, build_meta(found.opened.files))
        about = exporter.peft(folder) if form == "peft" else exporter.hf(folder)
        load_tokenizer(found.opened.files.path).save_pretrained(folder)
        if exporter.probed:
            shutil.copyfile(run.probe, folder / run.probe.name)
        result = {
            "run": str(source),
            "out": str(out),
            "format": form,
            "steps": found.steps,
            "trained": list(cfg.train),
            "base_sha256": found.opened.files.content_hash,
            "probe": run.probe.name if exporter.probed else None,
            **about,
        }
        (folder / "edgezo.json").write_text(to_json(result) + "\n", encoding="utf-8")
    return result


@contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """A directory to write to, which becomes ``out`` when the block succeeds and is gone when it does not."""
    folder = out.with_name(f".{out.name}.{secrets.token_hex(4)}{TEMP_SUFFIX}")
    try:
        folder.mkdir(parents=True)
        yield folder
        if out.is_dir():
            out.rmdir()
        folder.replace(out)
    except OSError as problem:
        raise EdgezoError(
            f"{out} could not be written ({problem.strerror or problem}). Nothing half-written is kept.\n"
            "Check the directory and the free space, or give another --out."
        ) from problem
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass
class _Exporter:
    """A run in memory, and the module on the meta device that names its parameters as files do."""

    found: Brought
    meta: Any

    @property
    def probed(self) -> bool:
        return self.found.model.readout is not None

    def hf(self, folder: Path) -> dict[str, Any]:
        """Every parameter, a tile at a time."""
        model, cfg = self.found.model, self.found.opened.cfg
        assert cfg.precision is not None
        dtype = torch.bfloat16 if cfg.precision in QUANTIZED else DENSE_DTYPES[cfg.precision]
        config = self.found.opened.files.config
        config.dtype = dtype
        output = f"{self._name_of(self.meta.get_output_embeddings())}.weight"
        names = [name for name, _ in self.meta.named_parameters()]
        if model.exact is not None and output not in names:  # tied: only the head's use has changed
            config.tie_word_embeddings = False
            every = [name for name, _ in self.meta.named_parameters(remove_duplicate=False)]
            names += [name for name in every if name not in names]  # RoBERTa's head ties its bias
        config.architectures = [type(self.meta).__name__]
        config.save_pretrained(folder)
        saved = [self._saved(name, dtype, name == output) for name in names]
        write_saved(folder / "model.safetensors", saved, {"format": "pt"})
        size = sum(math.prod(tensor.shape) for tensor in saved) * dtype.itemsize
        return {"tensors": len(saved), "weight_bytes": size, "dtype": str(dtype).split(".")[1]}

    def peft(self, folder: Path) -> dict[str, Any]:
        """LoRA matrices and the configuration that peft reads."""
        model, cfg = self.found.model, self.found.opened.cfg
        pairs = dict(self._pairs())
        if not pairs:
            raise UsageError(
                "this run trained a linear probe and nothing else, which is no adapter.\n"
                "edgezo eval reads it from the run."
            )
        tensors, ranks, alphas = {}, {}, {}
        for module, (down, up, alpha) in pairs.items():
            tensors[f"base_model.model.{module}.lora_A.weight"] = down.float().contiguous()
            tensors[f"base_model.model.{module}.lora_B.weight"] = up.float().contiguous()
            if len(down) != cfg.rank or alpha != self._alpha:
                ranks[module], alphas[module] = len(down), alpha
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
        turned = any(isinstance(m, Conv1D) for m in self.meta.modules())
        described = {
            "peft_type": "LORA",
            "task_type": None if model.masked else "CAUSAL_LM",
            "base_model_name_or_path": cfg.model,
            "r": cfg.rank,
            "lora_alpha": self._alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": turned,
            "inference_mode": True,
            "target_modules": list(pairs),
            "rank_pattern": ranks,
            "alpha_pattern": alphas,
        }
        (folder / "adapter_config.json").write_text(json.dumps(described, indent=1) + "\n")
        return {"tensors": len(tensors), "weight_bytes": sum(t.nbytes for t in tensors.values())}

    @property
    def _alpha(self) -> float:
        cfg = self.found.opened.cfg
        return ALPHA if "lora" in cfg.train else float(cfg.rank)

    def _pairs(self) -> Iterator[tuple[str, tuple[Tensor, Tensor, float]]]:
        """(module, (lora_A (rank, d_in), lora_B (d_out, rank), alpha)) of all that was trained."""
        store = self.found.model.store
        for name, layout in store.layouts.items():
            if (pair := self._beside(name, layout.shape[1])) is not None:
                yield name.removesuffix(".weight"), (*pair, self._alpha)
        exact = self.found.model.exact
        if exact is not None:
            down, up = self._head()
            yield self._name_of(self.meta.get_output_embeddings()), (down, up, float(len(down)))

    def _beside(self, name: str, cols: int) -> tuple[Tensor, Tensor] | None:
        """(down (rank, cols), up (rows, rank)) fp32 of a matrix's trained product, without LoRA's alpha."""
        store, adapters = self.found.model.store, self.found.model.adapters
        row = store.trainables.get(f"{name}#lowrank")
        if row is not None:
            return store.basis(name, cols), row.values.cpu()
        if adapters is not None and f"{name}#lora_A" in adapters.values:
            held = adapters.trained()
            return held[f"{name}#lora_A"], held[f"{name}#lora_B"]
        return None

    def _head(self) -> tuple[Tensor, Tensor]:
        """(down, up) of the exact head's change."""
        model = self.found.model
        assert model.exact is not None
        delta = model.exact.delta.cpu()
        if model.exact.basis is not None:
            return model.exact.basis.cpu(), delta
        vocab = self.meta.get_output_embeddings().weight.shape[0]
        up = torch.zeros(vocab, len(delta))
        up[model.scorer.label_ids.cpu(), torch.arange(len(delta))] = 1.0
        return delta, up

    def _name_of(self, module: Any) -> str:
        return next(name for name, found in self.meta.named_modules() if found is module)

    def _saved(self, name: str, dtype: torch.dtype, output: bool) -> Saved:
        """A parameter of the module as it was trained, in the shape that files have."""
        store, held = self.found.model.store, self._stored(name)
        shape = tuple(self.meta.get_parameter(name).shape)
        if held not in store.layouts:
            row = store.trainables.get(held)
            values = store.vectors[held] if row is None else row.values
            return Saved.of(name, values.reshape(shape).to(dtype))
        found = Saved(name, shape, dtype, partial(self._tiles, held, dtype, output))
        if isinstance(self.meta.get_submodule(name.rpartition(".")[0]), Conv1D):
            return found._replace(pieces=lambda: [torch.cat(list(found.pieces())).T])
        return found

    def _tiles(self, held: str, dtype: torch.dtype, output: bool) -> Iterator[Tensor]:
        """(n, cols) rows of a matrix, with what was trained beside it."""
        store = self.found.model.store
        layout = store.layouts[held]
        rows, cols = layout.shape
        gain, beside = store.trainables.get(f"{held}#gain"), self._beside(held, cols)
        change = self._head() if output and self.found.model.exact is not None else None
        for part in tiles(rows, cols):
            size = part.stop - part.start
            values = layout.expand(part, torch.empty(size, cols, device=store.device)).cpu()
            if gain is not None:
                values *= 1 + gain.values[part].cpu()
            for pair, alpha in ((beside, self._alpha), (change, None)):
                if pair is not None:
                    down, up = pair
                    values.addmm_(up[part], down, alpha=1.0 if alpha is None else alpha / len(down))
            yield values.to(dtype)

    def _stored(self, name: str) -> str:
        """The store's name of a parameter: a tied head has its embedding's."""
        store = self.found.model.store
        if name in store.layouts or name in store.vectors or name in store.trainables:
            return name
        own = self.meta.get_parameter(name)
        return next(other for other, p in self.meta.named_parameters() if p is own)

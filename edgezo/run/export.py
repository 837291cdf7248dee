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
A linear probe has a place in neither form: it reads blocks in the middle of the model, and blocks above it were not
run. Its file is copied beside them, where edgezo eval and a dozen lines of transformers use it (docs/export.md). The
result says that the model alone does not predict what the run does.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from edgezo.errors import EdgezoError, UsageError
from edgezo.machine.files import atomic_folder, to_json, user_path
from edgezo.machine.limits import tiles
from edgezo.machine.ownership import check_new
from edgezo.network.cards import HubSource, find_card
from edgezo.network.first_order import ALPHA
from edgezo.network.loader import build_meta, source_names
from edgezo.plan.fields import QUANTIZED
from edgezo.run.directory import RunFiles, dataset_facts
from edgezo.run.evaluate import Rebuilt, brought_back
from edgezo.run.export_files import beside_weights, write_config
from edgezo.weights.layouts import DENSE_DTYPES
from edgezo.weights.saved import Saved, write_saved
from edgezo.zo.parts import PARTS


def export(source: Path, form: str, out: Path, *, dtype: str | None = None) -> dict[str, Any]:
    """Write run ``source``, as it stands now, to the new directory ``out``: all of it or nothing.

    ``dtype``: of the weights of ``hf``. Blocks that have no room in memory are read one by one.
    Raises UsageError where ``out`` is there already, or the form has no place for what was trained.
    """
    run = RunFiles(source)
    cfg = run.read_config()
    check_new(out)
    if form == "peft" and (inside := [part for part in cfg.train if PARTS[part].in_base]):
        raise UsageError(
            f"--format peft holds what lies beside frozen weights, and this run trained {'+'.join(inside)}.\n"
            "Use --format hf, which writes the whole model."
        )
    if form == "peft" and dtype is not None:
        raise UsageError(
            "--dtype is the type of the weights that --format hf writes; an adapter is fp32"
        )
    out = out.resolve()  # where a link to an empty directory leads
    with atomic_folder(out) as folder, brought_back(run, cfg) as rebuilt:
        files = rebuilt.planned.opened.files
        exporter = _Exporter(rebuilt, build_meta(files))
        about = exporter.peft(folder) if form == "peft" else exporter.hf(folder, dtype)
        notes = [*beside_weights(files, folder), *exporter.notes(form)]
        if exporter.probed:
            shutil.copyfile(run.probe, folder / run.probe.name)
        result = {
            "run": str(source),
            "out": str(out),
            "format": form,
            "steps": rebuilt.steps,
            "trained": list(cfg.train),
            "precision": rebuilt.planned.cfg.precision,
            "base": cfg.model,
            "base_sha256": files.content_hash,
            "run_id": rebuilt.of_run,
            "dataset": dataset_facts(rebuilt.planned.opened.dataset),
            "predicts_as_run": not exporter.probed,
            "notes": notes,
            **about,
        }
        RunFiles(folder).exported.write_text(to_json(result) + "\n", encoding="utf-8")
    return result


class Product(NamedTuple):
    """What was trained beside a matrix: alpha/rank * up @ down, as LoRA has it."""

    down: Tensor  # (rank, d_in) fp32
    up: Tensor  # (d_out, rank) fp32
    alpha: float

    @property
    def scale(self) -> float:
        return self.alpha / len(self.down)


def _rounded(values: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """``values`` in ``dtype``. Raises EdgezoError for a number that it cannot hold."""
    rounded = values.to(dtype)
    if rounded.numel() and not torch.isfinite(rounded).all():
        most = values.float().abs().max().item()
        raise EdgezoError(
            f"{name} holds {most:g}, and {str(dtype).removeprefix('torch.')} holds numbers up to "
            f"{torch.finfo(dtype).max:g} only.\nGive --dtype bf16 or fp32."
        )
    return rounded


@dataclass
class _Exporter:
    """A run in memory, and the module on the meta device that names its parameters as files do."""

    rebuilt: Rebuilt
    meta: Any

    @property
    def probed(self) -> bool:
        return self.rebuilt.model.readout is not None

    def notes(self, form: str) -> list[str]:
        """What whoever reads the files should know."""
        notes, model = [], self.rebuilt.model
        if self.probed:
            notes.append(
                "the run predicts by its linear probe, which these files have no place for: it lies beside them "
                "(probe.safetensors). edgezo eval uses it there, and docs/export.md says how other programs do. The "
                "model alone predicts something else; for a model that needs no second file, train without probe"
            )
        if form == "peft" and self.rebuilt.planned.cfg.precision in QUANTIZED:
            notes.append(
                f"trained beside {self.rebuilt.planned.cfg.precision} codes: over other weights losses differ a little"
            )
        if form == "peft" and model.exact is not None and self._tied:
            notes.append(
                "the head of this model is its embedding table too: merging the adapter would change both; "
                "use --format hf for one model"
            )
        return notes

    @property
    def _tied(self) -> bool:
        head = self.meta.get_output_embeddings().weight
        return head is self.meta.get_input_embeddings().weight

    def hf(self, folder: Path, asked: str | None) -> dict[str, Any]:
        """Every parameter, a tile at a time."""
        model, cfg = self.rebuilt.model, self.rebuilt.planned.cfg
        stored = "bf16" if cfg.precision in QUANTIZED else cfg.precision
        dtype = DENSE_DTYPES[asked or (stored if cfg.train == ("full",) else "fp32")]
        config = self.rebuilt.planned.opened.files.config
        config.dtype = dtype
        output = f"{self._name_of(self.meta.get_output_embeddings())}.weight"
        names = [name for name, _ in self.meta.named_parameters()]
        if model.exact is not None and self._tied:  # only the head's use of the table has changed
            config.tie_word_embeddings = False
            every = [name for name, _ in self.meta.named_parameters(remove_duplicate=False)]
            names += [name for name in every if name not in names]  # RoBERTa's head ties its bias
        config.architectures = [type(self.meta).__name__]
        write_config(config, folder)
        saved = [self._saved(name, dtype, name == output) for name in names]
        write_saved(folder / "model.safetensors", saved, {"format": "pt"})
        size = sum(math.prod(tensor.shape) for tensor in saved) * dtype.itemsize
        return {"tensors": len(saved), "weight_bytes": size, "dtype": str(dtype).split(".")[1]}

    def peft(self, folder: Path) -> dict[str, Any]:
        """LoRA matrices and the configuration that peft reads."""
        model, cfg = self.rebuilt.model, self.rebuilt.planned.cfg
        products = dict(self._products())
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
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
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
        card, path = find_card(model), user_path(model)
        hubs = [s.repo for s in card.sources if isinstance(s, HubSource)] if card else []
        if path.exists():
            return str(path.resolve())
        return hubs[0] if hubs else model

    def _part_of_more(self) -> bool:
        path = self.rebuilt.planned.opened.files.path / "config.json"
        if not path.is_file():
            return False
        model_type: str = json.loads(path.read_text(encoding="utf-8"))["model_type"]
        return model_type != self.meta.config.model_type

    def _products(self) -> Iterator[tuple[str, Product]]:
        """All that was trained beside matrices, by module."""
        store = self.rebuilt.model.store
        for name, layout in store.layouts.items():
            if (product := self._beside(name, layout.shape[1])) is not None:
                yield name.removesuffix(".weight"), product
        if self.rebuilt.model.exact is not None:
            yield self._name_of(self.meta.get_output_embeddings()), self._head()

    def _beside(self, name: str, cols: int) -> Product | None:
        """Of a matrix, without the exact head's change."""
        store, adapters = self.rebuilt.model.store, self.rebuilt.model.adapters
        factor = store.trainables.get(f"{name}#lowrank")
        if factor is not None:
            return Product(store.basis(name, cols), factor.values.cpu(), float(store.rank))
        if adapters is not None and f"{name}#lora_A" in adapters.values:
            trained = adapters.trained()
            return Product(trained[f"{name}#lora_A"], trained[f"{name}#lora_B"], ALPHA)
        return None

    def _head(self) -> Product:
        """The exact head's change."""
        model = self.rebuilt.model
        assert model.exact is not None
        delta = model.exact.delta.cpu()
        if model.exact.basis is not None:
            return Product(model.exact.basis.cpu(), delta, float(delta.shape[1]))
        vocab = self.meta.get_output_embeddings().weight.shape[0]
        up = torch.zeros(vocab, len(delta))
        up[model.scorer.label_ids.cpu(), torch.arange(len(delta))] = 1.0
        return Product(delta, up, float(len(delta)))

    def _name_of(self, module: Any) -> str:
        return next(name for name, other in self.meta.named_modules() if other is module)

    def _saved(self, name: str, dtype: torch.dtype, output: bool) -> Saved:
        """A parameter of the module as it was trained, in the shape that files have."""
        store, place = self.rebuilt.model.store, self._places[name]
        shape = tuple(self.meta.get_parameter(name).shape)
        if place not in store.layouts:
            if (trainable := store.trainables.get(place)) is not None:
                values = trainable.values
            elif place in store.vectors:
                values = store.vectors[place]
            else:  # above what a linear probe reads, and so not kept
                values = self.rebuilt.planned.opened.files.source.read(self._sources[place])
            return Saved.of(name, _rounded(values.reshape(shape), dtype, name))
        saved = Saved(name, shape, dtype, partial(self._tiles, place, dtype, output))
        if isinstance(self.meta.get_submodule(name.rpartition(".")[0]), Conv1D):
            return saved._replace(pieces=lambda: [torch.cat(list(saved.pieces())).T])
        return saved

    def _tiles(self, place: str, dtype: torch.dtype, output: bool) -> Iterator[Tensor]:
        """(n, cols) rows of a matrix, with what was trained beside it."""
        store = self.rebuilt.model.store
        if store.residency is not None:
            store.residency.bind_owner(place)
        layout = store.layouts[place]
        rows, cols = layout.shape
        gain = store.trainables.get(f"{place}#gain")
        head = self._head() if output and self.rebuilt.model.exact is not None else None
        products = [product for product in (self._beside(place, cols), head) if product is not None]
        for part in tiles(rows, cols):
            size = part.stop - part.start
            values = layout.expand(part, torch.empty(size, cols, device=store.device)).cpu()
            if gain is not None:
                values *= 1 + gain.values[part].cpu()
            for product in products:
                values.addmm_(product.up[part], product.down, alpha=product.scale)
            yield _rounded(values, dtype, place)

    @cached_property
    def _places(self) -> dict[str, str]:
        """The store's name of each parameter, where it has one: a tied head has its embedding's."""
        store = self.rebuilt.model.store
        kept = {*store.layouts, *store.vectors, *store.trainables}
        every = list(self.meta.named_parameters(remove_duplicate=False))
        places = {id(parameter): name for name, parameter in every if name in kept}
        return {name: places.get(id(parameter), name) for name, parameter in every}

    @cached_property
    def _sources(self) -> dict[str, str]:
        return source_names(self.rebuilt.planned.opened.files, self.meta)

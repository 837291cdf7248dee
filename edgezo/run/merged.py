"""The weights of a run with all that it has trained in them, a tile at a time: what every export of a model writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from edgezo.errors import EdgezoError
from edgezo.machine.limits import tiles
from edgezo.network.first_order import ALPHA
from edgezo.network.loader import ModelFiles, source_names
from edgezo.plan.fields import QUANTIZED
from edgezo.run.evaluate import Rebuilt
from edgezo.weights.layouts import DENSE_DTYPES
from edgezo.weights.saved import Saved


class Product(NamedTuple):
    """What was trained beside a matrix: alpha/rank * up @ down, as LoRA has it."""

    down: Tensor  # (rank, d_in) fp32
    up: Tensor  # (d_out, rank) fp32
    alpha: float

    @property
    def scale(self) -> float:
        return self.alpha / len(self.down)


def rounded_to(values: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """``values`` in ``dtype``. Raises EdgezoError for a number that it cannot hold."""
    rounded = values.to(dtype)
    # One pass without temporaries: aminmax gives NaN and Inf where there is one.
    if rounded.numel() and not all(torch.isfinite(end) for end in torch.aminmax(rounded)):
        most = values.float().abs().max().item()
        raise EdgezoError(
            f"{name} holds {most:g}, and {str(dtype).removeprefix('torch.')} holds numbers up to "
            f"{torch.finfo(dtype).max:g} only.\nGive --dtype bf16 or fp32."
        )
    return rounded


@dataclass
class Merged:
    """A run in memory, and the module on the meta device that names its parameters as files do."""

    rebuilt: Rebuilt
    meta: Any

    @property
    def probed(self) -> bool:
        """Whether the run predicts by a linear probe."""
        return self.rebuilt.model.readout is not None

    @property
    def tied(self) -> bool:
        head = self.meta.get_output_embeddings().weight
        return head is self.meta.get_input_embeddings().weight

    @cached_property
    def files(self) -> ModelFiles:
        return self.rebuilt.planned.opened.files

    @cached_property
    def output(self) -> str:
        """The name of the head's weight."""
        return f"{self.name_of(self.meta.get_output_embeddings())}.weight"

    def parameters(self) -> Iterator[str]:
        """The parameters that a file has; a head that has become another one than its table is one of them."""
        names = [name for name, _ in self.meta.named_parameters()]
        yield from names
        if self.output not in names and self.rebuilt.model.exact is not None:
            yield self.output

    def changed(self, name: str) -> bool:
        """Whether training has moved a parameter."""
        model, place = self.rebuilt.model, self.places[name]
        trained = model.store.trainables
        if any(key in trained for key in (place, f"{place}#lowrank", f"{place}#gain")):
            return True
        adapted = model.adapters is not None and f"{place}#lora_A" in model.adapters.values
        return adapted or (name == self.output and model.exact is not None)

    def is_turned(self, name: str) -> bool:
        """Whether a module has its weight as (in, out), which a file has as (out, in)."""
        module = self.meta.get_submodule(name.rpartition(".")[0])
        return isinstance(module, Conv1D) and name.endswith("weight")

    def rows(self, name: str) -> Iterator[Tensor]:
        """Rows (n, cols) or values (n,) of a parameter with what was trained in it, fp32; matrices as (out, in)."""
        place = self.places[name]
        if place in self.rebuilt.model.store.layouts:
            yield from self.tiles_of(place, torch.float32, name == self.output)
            return
        saved = self.saved(name, torch.float32, False)
        for piece in saved.pieces():
            yield piece.T if self.is_turned(name) else piece

    def base_rows(self, name: str) -> Iterator[Tensor]:
        """``rows`` of a parameter as the base has it, fp32: a tile at a time where its file holds it row by row."""
        source, origin = (
            self.files.source,
            self.sources.get(name) or self.sources[self.places[name]],
        )
        shape = source.shape(origin)
        if len(shape) == 2 and source.by_rows(origin) and not self.is_turned(name):
            for part in tiles(*shape):
                yield source.read(origin, torch.float32, part)
            return
        values = source.read(origin, torch.float32)
        yield values.T if self.is_turned(name) else values

    def moved(self, name: str, stored: Callable[[Tensor], Tensor]) -> bool:
        """Whether a parameter differs from the base's, both as ``stored`` makes rows for a file."""
        rest = torch.empty(0)
        base = self.base_rows(name)
        for piece in self.rows(name):
            while len(rest) < len(piece):
                rest = torch.cat([rest, next(base)]) if len(rest) else next(base)
            there, rest = rest[: len(piece)], rest[len(piece) :]
            if not torch.equal(stored(piece), stored(there)):
                return True
        return False

    def products(self) -> Iterator[tuple[str, Product]]:
        """All that was trained beside matrices, by module."""
        store = self.rebuilt.model.store
        for name, layout in store.layouts.items():
            if (product := self.beside(name, layout.shape[1])) is not None:
                yield name.removesuffix(".weight"), product
        if self.rebuilt.model.exact is not None:
            yield self.name_of(self.meta.get_output_embeddings()), self.head()

    def beside(self, name: str, cols: int) -> Product | None:
        """Of a matrix, without the exact head's change."""
        store, adapters = self.rebuilt.model.store, self.rebuilt.model.adapters
        factor = store.trainables.get(f"{name}#lowrank")
        if factor is not None:
            return Product(store.basis(name, cols), factor.values.cpu(), float(store.rank))
        if adapters is not None and f"{name}#lora_A" in adapters.values:
            trained = adapters.trained()
            return Product(trained[f"{name}#lora_A"], trained[f"{name}#lora_B"], ALPHA)
        return None

    def head(self) -> Product:
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

    def word_rows(self) -> Tensor:
        """The rows of the head that the label words have, (K, width) fp32."""
        ids, first = self.rebuilt.model.scorer.label_ids.cpu(), 0
        rows = torch.empty(len(ids), self.meta.get_output_embeddings().weight.shape[1])
        for piece in self.rows(self.output):
            inside = (ids >= first) & (ids < first + len(piece))
            rows[inside] = piece[ids[inside] - first]
            first += len(piece)
        return rows

    def dense_dtype(self, asked: str | None) -> torch.dtype:
        """The type of whole weights: as asked, else fp32 where bf16 would round away what was trained beside them."""
        cfg = self.rebuilt.planned.cfg
        stored = "bf16" if cfg.precision in QUANTIZED else cfg.precision
        return DENSE_DTYPES[asked or (stored if cfg.train == ("full",) else "fp32")]

    def name_of(self, module: Any) -> str:
        return next(name for name, other in self.meta.named_modules() if other is module)

    def saved(self, name: str, dtype: torch.dtype, output: bool) -> Saved:
        """A parameter of the module as it was trained, in the shape that files have."""
        store, place = self.rebuilt.model.store, self.places[name]
        shape = tuple(self.meta.get_parameter(name).shape)
        if place not in store.layouts:
            if (trainable := store.trainables.get(place)) is not None:
                values = trainable.values
            elif place in store.vectors:
                values = store.vectors[place]
            else:  # above what a linear probe reads, and so not kept
                values = self.rebuilt.planned.opened.files.source.read(self.sources[place])
            return Saved.of(name, rounded_to(values.reshape(shape), dtype, name))
        saved = Saved(name, shape, dtype, partial(self.tiles_of, place, dtype, output))
        if isinstance(self.meta.get_submodule(name.rpartition(".")[0]), Conv1D):
            return saved._replace(pieces=lambda: [torch.cat(list(saved.pieces())).T])
        return saved

    def tiles_of(self, place: str, dtype: torch.dtype, output: bool) -> Iterator[Tensor]:
        """(n, cols) rows of a matrix, with what was trained beside it."""
        store = self.rebuilt.model.store
        if store.residency is not None:
            store.residency.bind_owner(place)
        layout = store.layouts[place]
        rows, cols = layout.shape
        gain = store.trainables.get(f"{place}#gain")
        head = self.head() if output and self.rebuilt.model.exact is not None else None
        products = [product for product in (self.beside(place, cols), head) if product is not None]
        for part in tiles(rows, cols):
            size = part.stop - part.start
            values = layout.expand(part, torch.empty(size, cols, device=store.device)).cpu()
            if gain is not None:
                values *= 1 + gain.values[part].cpu()
            for product in products:
                values.addmm_(product.up[part], product.down, alpha=product.scale)
            yield rounded_to(values, dtype, place)

    @cached_property
    def places(self) -> dict[str, str]:
        """The store's name of each parameter, where it has one: a tied head has its embedding's."""
        store = self.rebuilt.model.store
        kept = {*store.layouts, *store.vectors, *store.trainables}
        every = list(self.meta.named_parameters(remove_duplicate=False))
        places = {id(parameter): name for name, parameter in every if name in kept}
        return {name: places.get(id(parameter), name) for name, parameter in every}

    @cached_property
    def sources(self) -> dict[str, str]:
        return source_names(self.rebuilt.planned.opened.files, self.meta)

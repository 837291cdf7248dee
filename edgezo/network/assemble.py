"""A model put together: transformers' module on the meta device, its weights in a store, perturbed operations inside.

``assemble`` walks the module once and gives every parameter a place by its shape and role:

    2-D weight of a linear (or GPT-2's Conv1D, transposed)   Layout, PerturbedLinear
    2-D weight of an embedding                               Layout, PerturbedEmbedding
    the output embedding                                     Layout (the input's where tied), PerturbedHead
    1-D weight or bias                                       kept as it is, or a trained fp32 vector

Weights arrive one at a time, the largest first (when little else is resident), so loading never needs more than
the model plus one tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from edgezo.errors import EdgezoError, UsageError
from edgezo.machine import kernels
from edgezo.network import loader, packing
from edgezo.network.addax import Factors, MixedLinear
from edgezo.network.backward import recompute
from edgezo.network.exact_head import ExactHead
from edgezo.network.fused import fuse_gates, fuse_norm, fuse_rotary, norm_of
from edgezo.network.lora import Adapter, Adapters, LoraLinear
from edgezo.network.losses import Scorer
from edgezo.network.model import Model
from edgezo.network.perturb import (
    Context,
    Matrix,
    PerturbedEmbedding,
    PerturbedHead,
    PerturbedLinear,
    PerturbedNorm,
)
from edgezo.weights.disk import DiskTable
from edgezo.weights.layouts import (
    CPU,
    DENSE_DTYPES,
    Dense,
    Int8,
    Layout,
    Rows,
    moved,
    place,
    vacant,
)
from edgezo.weights.store import WeightStore
from edgezo.weights.trainable import Trainable
from edgezo.zo.directions import DIRECTIONS, orthonormal
from edgezo.zo.masks import mask_of
from edgezo.zo.noise import Key
from edgezo.zo.recipe import TWO_SIDED, Evaluation
from edgezo.zo.rules import RULES

if TYPE_CHECKING:
    from edgezo.network.loader import ModelFiles
    from edgezo.weights.home import Medium
    from edgezo.weights.tensor_source import TensorSource


@dataclass(frozen=True)
class ModelSpec:
    """What decides a model's place in memory and what of it is trained."""

    precision: str
    train: tuple[str, ...]
    directions: str
    seed: int
    rank: int = 8
    rounding: str = "plane"
    kind: str = "label"  # the dataset's kind
    label_ids: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32  # compute dtype
    device: torch.device = CPU
    away: Medium | None = None  # where blocks that do not stay in memory lie
    mask: str = "none"
    rule: str = "sgd"
    keep: float = 0.25
    sigma: float = 2e-3
    refresh: int = 50
    evaluations: tuple[Evaluation, ...] = TWO_SIDED  # of a step
    anchored: bool = False  # a second copy of what is trained
    decay: float = 0.0  # of AdamW, where there is a backward pass
    mixed: bool = False  # low-rank factors go along their gradient as well (addax.py)


def assemble(files: ModelFiles, recipe: ModelSpec) -> Model:
    """Build the module on the meta device and stream the weights into their places.

    Raises UsageError where ``train`` asks for what the precision or the task cannot give, EdgezoError for files
    that do not hold what the architecture needs.
    """
    train = set(recipe.train)
    if "full" in train and recipe.precision == "int4":
        raise UsageError(
            "--train full needs dense weights or int8 codes, but --precision is int4 (frozen codes).\n"
            "Train lowrank, scales, norms or head beside the codes, or use --precision int8 or bf16."
        )
    packing.register()
    module = loader.build_meta(files)
    module.set_attn_implementation(packing.ATTENTION)  # type: ignore[operator]
    builder = _Builder(files, module, recipe)
    with torch.no_grad():
        builder.run()
    return builder.model()


class _Builder:
    """One walk over the module; see the module docstring."""

    def __init__(self, files: ModelFiles, module: nn.Module, recipe: ModelSpec):
        self.files, self.module, self.recipe = files, module, recipe
        self.names = loader.source_names(files, module)
        self.device = recipe.device
        self.fusing = self.device.type == "cpu" and kernels.loaded()
        directions = DIRECTIONS[recipe.directions]._replace(
            rank=recipe.rank, refresh=recipe.refresh
        )
        mask = mask_of(recipe.mask, recipe.keep, recipe.sigma)
        rule = RULES[recipe.rule]
        self.store = WeightStore(
            *(recipe.seed, recipe.rank, directions, self.device, mask, rule), recipe.anchored
        )
        self.context = Context(recipe.dtype, self.device)
        self.train = set(recipe.train)
        self.adapters = Adapters(recipe.decay) if "lora" in self.train else None
        self.factors = Factors() if recipe.mixed else None  # GRZO's step has the decay
        self.bases: dict[str, Callable[[], Rows]] = {}  # where each matrix came from
        self.table_rows = 0  # rows of all embedding tables seen so far, for `touched` numbering
        self.frozen: list[str] = []
        self.label_rows: np.ndarray | None = None
        self.output = module.get_output_embeddings()  # type: ignore[operator]
        self.input = module.get_input_embeddings()  # type: ignore[operator]
        self.tied = self.output.weight is self.input.weight
        self.head: PerturbedHead | None = None
        self.away = _Away(self, recipe.away) if recipe.away is not None else None

    def run(self) -> None:
        owners = [
            (name, sub)
            for name, sub in self.module.named_modules()
            if isinstance(getattr(sub, "weight", None), nn.Parameter)
        ]
        # Largest first, blocks that go elsewhere after that and one by one; the output embedding last, because
        # a tied one is its input embedding.
        away = self.away
        owners.sort(
            key=lambda item: (
                item[1] is self.output,
                away.block_of(item[0]) if away is not None else -1,
                -item[1].weight.numel(),
                item[0],
            )
        )
        for name, sub in owners:
            if away is not None:
                away.enter(away.block_of(name))
            if sub is self.output:
                self._head(name, sub)
            elif sub.weight.dim() == 1:
                self._norm(name, sub)
            elif isinstance(sub, nn.Embedding):
                self._embedding(name, sub)
            else:
                self._linear(name, sub)
        if self.adapters is not None or self.factors is not None:
            self._recomputed()
        if away is not None:
            away.enter(-1)
            away.residency.attach(list(away.layers)[away.first :])
        self.store.prepare()
        if self.fusing:
            fuse_gates(self.module)
            fuse_rotary(self.module)
        for sub in self.module.modules():
            for name, buffer in sub._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    sub._buffers[name] = buffer.to(self.device)
        left = [n for n, p in self.module.named_parameters() if p.is_meta]
        left += [n for n, b in self.module.named_buffers() if b.is_meta]
        if left:
            raise EdgezoError(
                f"{len(left)} tensors of the model have no place in edgezo, the first is {left[0]}.\n"
                "The architecture is not supported; see README for the families that are."
            )

    def _recomputed(self) -> None:
        """Blocks are run again for the backward pass; those that are elsewhere are bound for that."""
        from edgezo.network.loader import decoder_layers

        _, layers = decoder_layers(self.module, self.files.shape.layers)
        away = self.away
        for index, layer in enumerate(layers):
            if away is None or index < away.first:
                recompute(layer)
            else:
                recompute(layer, partial(away.residency.again, index - away.first))

    def model(self) -> Model:
        recipe, config = self.recipe, self.files.config
        hidden = int(self.output.in_features)
        exact = None
        if "head" in self.train:
            exact = (
                ExactHead.for_labels(len(recipe.label_ids), hidden, self.device)
                if recipe.kind == "label"
                else ExactHead.for_vocabulary(
                    self.output.out_features, hidden, recipe.rank, recipe.seed, self.device
                )
            )
        assert self.head is not None
        softcap = getattr(config.get_text_config(), "final_logit_softcapping", None)
        labels = torch.tensor(recipe.label_ids, dtype=torch.int64, device=self.device)
        masked = self.files.kind == "masked"
        return Model(
            module=self.module,
            store=self.store,
            context=self.context,
            scorer=Scorer(recipe.kind, labels, self.head, softcap, exact),
            masked=masked,
            position_offset=self.files.position_offset,
            evaluations=recipe.evaluations,
            label_rows=self.label_rows,
            frozen=self.frozen,
            adapters=self.adapters,
            factors=self.factors,
        )

    # -- one parameter ------------------------------------------------------------------------------------

    def _read(self, name: str) -> Tensor:
        return self.files.source.read(self.names[name])

    def _layout(self, name: str, *, table: bool, transpose: bool = False) -> Layout:
        recipe = self.recipe
        how: dict[str, Any] = {
            "table": table,
            "rounding": recipe.rounding,
            "trained": "full" in self.train,
        }

        def make(rows: slice | None = None) -> Layout:
            # A dense store is read in its own dtype, piece by piece; codes are made from the source's values.
            source, stored, dtype = self.files.source, self.names[name], None
            if recipe.precision in DENSE_DTYPES:
                dtype = DENSE_DTYPES[recipe.precision]
            elif table and rows is None:  # the largest tensor is never whole beside its codes
                plane = how["trained"] and recipe.rounding == "plane"
                return Int8.quantise(_Rows(source, stored), plane=plane)
            weight = source.read(stored, dtype, rows)
            if transpose:
                weight = weight.T.contiguous()
            return place(weight, recipe.precision, **how)

        def base() -> Rows:
            source, stored = self.files.source, self.names[name]
            if table:
                return _Rows(source, stored)
            weight = source.read(stored)
            return weight.T.contiguous() if transpose else weight

        self.bases[name] = base
        layout: Layout | None = None
        if self.away is not None:
            rows, cols = self.files.source.shape(self.names[name])
            shape = (cols, rows) if transpose else (rows, cols)
            empty = vacant(shape, recipe.precision, **how)
            if table:
                layout = self.away.residency.medium.table(empty, make)
            elif self.away.block_of(name) >= 0:
                layout = self.away.hold(name, empty, make)
        if layout is None:
            layout = moved(make(), self.device)
        self.store.layouts[name] = layout
        return layout

    def _vector(self, name: str) -> tuple[Tensor | None, Trainable | None]:
        """A 1-D parameter: (values, None) frozen in the compute dtype, or (None, row) trained in fp32."""
        values = self._read(name)
        if self.train & {"norms", "full"}:
            return None, self.store.train_vector(name, values)
        self.frozen.append(name)
        held = self.store.vectors[name] = values.to(self.device, self.recipe.dtype)
        return held, None

    def _matrix(
        self,
        name: str,
        layout: Layout,
        *,
        touched_offset: int | None = None,
        fixed: Tensor | None = None,
    ) -> Matrix:
        full = None
        if "full" in self.train:
            assert isinstance(layout, Dense | Int8 | DiskTable)
            full = self.store.train(name, layout, touched_offset=touched_offset, fixed_rows=fixed)
            if isinstance(layout, Int8) and self.recipe.rounding == "anchored":
                full.base = self.bases[name]
        else:
            self.frozen.append(name)
        return Matrix(layout, self.context, full)

    # -- one module ---------------------------------------------------------------------------------------

    def _linear(self, name: str, sub: nn.Module) -> None:
        weight = f"{name}.weight"
        layout = self._layout(weight, table=False, transpose=not isinstance(sub, nn.Linear))
        fields: dict[str, object] = {
            "matrix": self._matrix(weight, layout),
            "context": self.context,
            "bias_vector": None,
            "bias_row": None,
            "gain_row": None,
            "lowrank_row": None,
            "basis": None,
        }
        if getattr(sub, "bias", None) is not None:
            fields["bias_vector"], fields["bias_row"] = self._vector(f"{name}.bias")
        rows, cols = layout.shape
        if self.adapters is not None:
            kept = ("matrix", "context", "bias_vector")
            adapter = self.adapters.add(
                weight, (rows, cols), self.recipe.rank, self.recipe.seed, self.device
            )
            _become(sub, LoraLinear, {**{n: fields[n] for n in kept}, "adapter": adapter})
            return
        full = fields["matrix"].full  # type: ignore[attr-defined]
        if "scales" in self.train:
            gain = self.store.train_vector(f"{weight}#gain", torch.zeros(rows))
            gain.least = -1.0  # a scale of quantisation is never negative
            fields["gain_row"] = gain
        if "lowrank" in self.train:
            factor = Dense(torch.zeros(rows, self.recipe.rank, device=self.device))
            fields["lowrank_row"] = self.store.train(f"{weight}#lowrank", factor)
            fields["basis"] = self.store.basis(weight, cols).to(self.device, self.recipe.dtype)
        directions = self.store.directions
        if directions.guided and directions.factored:
            for trained in (full, fields["lowrank_row"]):
                if isinstance(trained, Trainable):
                    trained.guides = {}
        elif directions.guided and full is not None:
            start = directions.basis(Key(self.recipe.seed, 0), full.target)[:, : min(rows, cols)]
            full.basis = orthonormal(start).to(self.device, self.recipe.dtype)
        if self.factors is not None:
            trained = fields["lowrank_row"]
            basis = fields["basis"]
            assert isinstance(trained, Trainable) and isinstance(basis, Tensor)
            leaf = self.factors.train(trained.target.name, trained.values)
            _become(sub, MixedLinear, {**fields, "leaf": Adapter(basis, leaf, 1.0)})
            return
        _become(sub, PerturbedLinear, fields)

    def _embedding(self, name: str, sub: nn.Embedding) -> None:
        weight = f"{name}.weight"
        layout = self._layout(weight, table=True)
        offset: int | None = self.table_rows
        self.table_rows += layout.shape[0]
        if sub is self.input and self.tied:
            if self.recipe.kind == "label":
                assert offset is not None
                self.label_rows = np.array(self.recipe.label_ids, np.int64) + offset
            else:
                offset = None  # the softmax reads, and so probes, every row
        matrix = self._matrix(weight, layout, touched_offset=offset)
        mixed = (
            PerturbedEmbedding
            if type(sub) is nn.Embedding
            else type("Perturbed" + type(sub).__name__, (type(sub), PerturbedEmbedding), {})
        )
        _become(sub, mixed, {"matrix": matrix, "context": self.context})

    def _head(self, name: str, sub: nn.Module) -> None:
        weight = f"{name}.weight"
        if self.tied:
            matrix: Matrix = self.input.matrix
        else:
            layout = self._layout(weight, table=True)
            labels = self.recipe.kind == "label"
            fixed = torch.tensor(self.recipe.label_ids, device=self.device) if labels else None
            matrix = self._matrix(weight, layout, fixed=fixed)
        fields: dict[str, object] = {
            "matrix": matrix,
            "context": self.context,
            "bias_vector": None,
            "bias_row": None,
        }
        if getattr(sub, "bias", None) is not None:
            # RoBERTa's head has the bias at its parent as well: tied the same, under the name that files have;
            # else another one, which nothing reads.
            own = next(n for n, p in self.module.named_parameters() if p is sub.bias)
            fields["bias_vector"], fields["bias_row"] = self._vector(own)
            parent = self.module.get_submodule(name.rpartition(".")[0])
            if "bias" in parent._parameters:
                parent._parameters["bias"] = None
        _become(sub, PerturbedHead, fields)
        self.head = sub  # type: ignore[assignment]

    def _norm(self, name: str, sub: nn.Module) -> None:
        names = [n for n, _ in sub.named_parameters(recurse=False)]
        if not self.train & {"norms", "full"}:
            for own in names:
                values, _ = self._vector(f"{name}.{own}")
                assert values is not None
                sub._parameters[own] = nn.Parameter(values, requires_grad=False)
            if self.fusing:
                fuse_norm(sub)
            return
        rows = {own: self._vector(f"{name}.{own}")[1] for own in names}
        fields = {
            "context": self.context,
            "norm": norm_of(sub),
            "weight_row": rows["weight"],
            "bias_row": rows.get("bias"),
        }
        _become(sub, PerturbedNorm, fields)


@dataclass(frozen=True)
class _Rows:
    """A matrix of a checkpoint, of which rows are read when they are asked for."""

    source: TensorSource
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape(self.name)

    def __getitem__(self, rows: slice) -> Tensor:
        return self.source.read(self.name, None, rows)


class _Away:
    """The builder's part that gives the last blocks a home elsewhere, one block at a time."""

    def __init__(self, builder: _Builder, medium: Medium):
        from edgezo.network.loader import decoder_layers
        from edgezo.weights.residency import Residency

        self.store, self.first = builder.store, medium.resident_blocks
        count = builder.files.shape.layers
        self.prefix, self.layers = decoder_layers(builder.module, count)
        self.residency = self.store.residency = Residency(medium, self.store.catch_up)
        self._index = -1  # the block that is being put together, and its matrices
        self._layouts: dict[str, Layout] = {}
        self._make: dict[str, Callable[[], Layout]] = {}

    def block_of(self, name: str) -> int:
        """Which block a parameter or module is of, if that goes elsewhere; else -1."""
        if not name.startswith(self.prefix + "."):
            return -1
        index = int(name[len(self.prefix) + 1 :].partition(".")[0])
        return index if index >= self.first else -1

    def hold(self, name: str, empty: Layout, make: Callable[[], Layout]) -> Layout:
        self._layouts[name], self._make[name] = empty, make
        return empty

    def enter(self, index: int) -> None:
        """The next module is of block ``index``: whatever was held of another block goes there."""
        if index != self._index and self._layouts:
            rows = [self.store.trainables[n] for n in self._layouts if n in self.store.trainables]
            for row in rows:
                row.away = True
            self.residency.block(self._layouts, self._make, trained=bool(rows))
            self._layouts, self._make = {}, {}
        self._index = index


def _become(sub: nn.Module, kind: type, fields: dict[str, object]) -> None:
    """Turn ``sub`` into ``kind`` in place; its own parameters are gone, the store has them.

    An empty weight stays for code that asks for its dtype.
    """
    context = fields["context"]
    assert isinstance(context, Context)
    for name in list(sub._parameters):
        sub._parameters[name] = None
    sub._parameters["weight"] = nn.Parameter(
        torch.empty(0, dtype=context.dtype, device=context.device), requires_grad=False
    )
    sub.__class__ = kind
    for name, value in fields.items():
        object.__setattr__(sub, name, value)

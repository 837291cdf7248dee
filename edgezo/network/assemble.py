"""A model put together: transformers' module on the meta device, its weights in a store, perturbed operations inside.

``assemble`` walks the module once and gives every parameter a place by its shape and role:

    2-D weight of a linear (or GPT-2's Conv1D, transposed)   Layout, PerturbedLinear
    2-D weight of an embedding                               Layout, PerturbedEmbedding
    the output embedding                                     Layout (the input's where tied), PerturbedHead
    1-D weight or bias                                       kept as it is, or a trained fp32 vector

What a part of ``--train`` (zo/parts.py) makes of them:

    weights     _matrix: the layout itself is a trainable
    vectors     _vector: norm weights and biases are trainables
    gains, factors, adapters   BESIDE_LINEAR: attributes of a perturbed linear
    head        _exact_head

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
from edgezo.network.cut import Cut, Half, Halves, leave_out
from edgezo.network.exact_head import ExactHead
from edgezo.network.first_order import (
    Adapter,
    Adapters,
    LearnedFactors,
    LoraLinear,
    MixedLinear,
    recompute,
)
from edgezo.network.fused import fuse_gates, fuse_norm, fuse_rotary, norm_of
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
from edgezo.network.placement import BlocksElsewhere, StoredMatrix
from edgezo.network.rotary import rotate_by_row
from edgezo.weights.disk import DiskTable
from edgezo.weights.layouts import CPU, Dense, Int8, Layout, moved
from edgezo.weights.store import WeightStore
from edgezo.weights.trainable import Trainable
from edgezo.zo.axes import ROUNDINGS
from edgezo.zo.directions import DIRECTION_KINDS, orthonormal
from edgezo.zo.masks import mask_of
from edgezo.zo.noise import Key
from edgezo.zo.parts import Trained, trained
from edgezo.zo.recipe import TWO_SIDED, Evaluation
from edgezo.zo.rules import UPDATE_RULES

if TYPE_CHECKING:
    from edgezo.network.loader import ModelFiles
    from edgezo.weights.home import Medium


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
    away: Medium | None = None  # where blocks lie that do not stay in memory
    mask: str = "none"
    rule: str = "sgd"
    keep: float = 0.25
    sigma: float = 2e-3
    refresh: int = 50
    evaluations: tuple[Evaluation, ...] = TWO_SIDED  # of a step
    anchored: bool = False  # SVRG: a second copy of what is trained
    decay: float = 0.0  # of AdamW, where there is a backward pass
    decay_to: str = (
        "zero"  # what perturbed weights shrink towards; or "base", whose values are read again
    )
    mixed: bool = False  # addax: low-rank factors are trained along their gradient as well
    first_trained: int = 0  # blocks below this one, and the embeddings with them, are frozen
    half: Half = (
        "whole"  # what is put together: only what is below or above the first trained block
    )

    @property
    def parts(self) -> Trained:
        """What is trained, by what it is."""
        return trained(self.train)


def assemble(files: ModelFiles, spec: ModelSpec) -> Model:
    """Build the module on the meta device and stream the weights into their places.

    Raises UsageError where ``train`` asks for what the precision or the task cannot give, EdgezoError for files
    that do not hold what the architecture needs.
    """
    if spec.parts.weights and spec.precision == "int4":
        raise UsageError(
            "--train full needs dense weights or int8 codes, but --precision is int4 (frozen codes).\n"
            "Train lowrank, scales, norms or head beside the codes, or use --precision int8 or bf16."
        )
    packing.register()
    module = loader.build_meta(files)
    module.set_attn_implementation(packing.ATTENTION)  # type: ignore[operator]
    rotate_by_row(module)
    builder = _Builder(files, module, spec)
    with torch.no_grad():
        builder.run()
    return builder.model()


class _Builder:
    """One walk over the module; see the module docstring."""

    def __init__(self, files: ModelFiles, module: nn.Module, spec: ModelSpec):
        self.files, self.module, self.spec, self.parts = files, module, spec, spec.parts
        self.names = loader.source_names(files, module)
        self.device = spec.device
        self.fusing = self.device.type == "cpu" and kernels.loaded()
        directions = DIRECTION_KINDS[spec.directions]._replace(rank=spec.rank, refresh=spec.refresh)
        mask = mask_of(spec.mask, spec.keep, spec.sigma)
        rule = UPDATE_RULES[spec.rule]
        self.store = WeightStore(
            *(spec.seed, spec.rank, directions, self.device, mask, rule), spec.anchored
        )
        self.store.vote_size = spec.sigma
        self.context = Context(spec.dtype, self.device)
        self.adapters = Adapters(spec.decay) if self.parts.adapters else None
        # No decay here: GRZO's update applies it.
        self.factors = LearnedFactors() if spec.mixed else None
        self.matrices: dict[str, StoredMatrix] = {}  # by parameter name
        # Rows of the embedding tables that were placed so far: ``touched`` numbers the rows of all tables.
        self.table_rows = 0
        self.frozen: list[str] = []
        self.label_rows: np.ndarray | None = None
        self.output = module.get_output_embeddings()  # type: ignore[operator]
        self.input = module.get_input_embeddings()  # type: ignore[operator]
        self.tied = self.output.weight is self.input.weight
        self.head: PerturbedHead | None = None
        self.label_ids = spec.label_ids  # rows of the head that stand for them
        self.blocks_name, self.blocks = loader.decoder_layers(module, files.shape.layers)
        widths = (files.shape.hidden, files.shape.embed_width)
        self.halves = Halves(module, self.blocks_name, spec.first_trained, spec.half, widths)
        self.away: BlocksElsewhere | None = None
        if spec.away is not None:
            self.away = BlocksElsewhere(self.store, spec.away, self.blocks_name)

    def run(self) -> None:
        """Place every weight of the half that is put together."""
        away = self.away
        for name, sub in self._owners():
            below = self.halves.is_below(name, sub)
            if sub is not self.output and self.halves.lacks(name, sub):
                leave_out(sub, self.spec.dtype, self.device)
                continue
            self.parts = trained(()) if below or self.spec.half == "below" else self.spec.parts
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
        self.parts = self.spec.parts
        if self.adapters is not None or self.factors is not None:
            self._recompute_blocks()
        if away is not None:
            away.enter(-1)
            end = self.spec.first_trained if self.spec.half == "below" else len(self.blocks)
            away.residency.attach(list(self.blocks)[away.first : end])
        self.store.prepare()
        if self.fusing:
            fuse_gates(self.module)
            fuse_rotary(self.module)
        self._place_buffers()
        self._check_all_placed()

    def _owners(self) -> list[tuple[str, Any]]:
        """Modules with a weight in the order of placing.

        Largest first, after them one by one the blocks that go elsewhere; the output embedding last, because a tied
        one is its input embedding.
        """
        away = self.away
        owners = [
            (name, sub)
            for name, sub in self.module.named_modules()
            if isinstance(getattr(sub, "weight", None), nn.Parameter)
        ]
        owners.sort(
            key=lambda item: (
                item[1] is self.output,
                away.block_of(item[0]) if away is not None else -1,
                -item[1].weight.numel(),
                item[0],
            )
        )
        return owners

    def _recompute_blocks(self) -> None:
        """Let trained blocks run again for the backward pass, bound to memory if they are elsewhere."""
        away = self.away
        for index, block in enumerate(self.blocks):
            if index < self.spec.first_trained:
                continue
            if away is None or index < away.first:
                recompute(block)
            else:
                recompute(block, partial(away.residency.again, index - away.first))

    def _place_buffers(self) -> None:
        for sub in self.module.modules():
            for name, buffer in sub._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    sub._buffers[name] = buffer.to(self.device)

    def _check_all_placed(self) -> None:
        missing = [n for n, p in self.module.named_parameters() if p.is_meta]
        missing += [n for n, b in self.module.named_buffers() if b.is_meta]
        if missing:
            raise EdgezoError(
                f"edgezo does not know where {len(missing)} tensors of the model belong, the first is "
                f"{missing[0]}.\nIts architecture is not supported; see README for the families that are."
            )

    def model(self) -> Model:
        spec, config = self.spec, self.files.config
        assert self.head is not None
        softcap = getattr(config.get_text_config(), "final_logit_softcapping", None)
        labels = torch.tensor(self.label_ids, dtype=torch.int64, device=self.device)
        exact = self._exact_head() if self.parts.head else None
        return Model(
            module=self.module,
            store=self.store,
            context=self.context,
            scorer=Scorer(spec.kind, labels, self.head, softcap, exact),
            masked=self.files.kind == "masked",
            position_offset=self.files.position_offset,
            blocks_name=self.blocks_name,
            evaluations=spec.evaluations,
            label_rows=self.label_rows,
            frozen=self.frozen,
            adapters=self.adapters,
            factors=self.factors,
            cut=self._cut() if spec.first_trained else None,
        )

    def _cut(self) -> Cut:
        tables = [sub for sub in self.module.modules() if isinstance(sub, nn.Embedding)]
        tables.sort(key=lambda table: table is not self.input)
        return Cut(list(self.blocks), tables, self.spec.first_trained)

    def _exact_head(self) -> ExactHead:
        spec, hidden = self.spec, int(self.output.in_features)
        if spec.kind == "label":
            return ExactHead.for_labels(len(spec.label_ids), hidden, self.device)
        vocab = self.output.out_features
        return ExactHead.for_vocabulary(vocab, hidden, spec.rank, spec.seed, self.device)

    # -- one parameter ------------------------------------------------------------------------------------

    def _layout(self, name: str, *, table: bool, transpose: bool = False) -> Layout:
        """Read a matrix into its layout, here or elsewhere."""
        stored = self.matrices[name] = self._stored(name, table=table, transpose=transpose)
        layout = None if self.away is None else self.away.layout(name, stored)
        if layout is None:
            layout = moved(stored.make(), self.device)
        self.store.layouts[name] = layout
        return layout

    def _stored(self, name: str, *, table: bool, transpose: bool = False) -> StoredMatrix:
        return StoredMatrix(
            self.files.source,
            self.names[name],
            self.spec.precision,
            self.spec.rounding,
            trained=self.parts.weights,
            table=table,
            transpose=transpose,
        )

    def _vector(self, name: str) -> Tensor | Trainable:
        """A 1-D parameter: its values, frozen in the compute dtype, or its trainable in fp32."""
        values = self.files.source.read(self.names[name])
        if self.parts.vectors:
            trainable = self.store.train_vector(name, values)
            if self.spec.decay_to == "base":
                start = trainable.values.clone()
                trainable.open_start = lambda: start
            return trainable
        self.frozen.append(name)
        frozen = self.store.vectors[name] = values.to(self.device, self.spec.dtype)
        return frozen

    def _bias(self, name: str) -> dict[str, object]:
        """The bias attribute of a perturbed module."""
        bias = self._vector(name)
        return {"trained_bias" if isinstance(bias, Trainable) else "frozen_bias": bias}

    def _matrix(
        self,
        name: str,
        layout: Layout,
        *,
        touched_offset: int | None = None,
        fixed: Tensor | None = None,
    ) -> Matrix:
        if not self.parts.weights:
            self.frozen.append(name)
            return Matrix(layout, self.context)
        assert isinstance(layout, Dense | Int8 | DiskTable)
        trainable = self.store.train(name, layout, touched_offset=touched_offset, fixed_rows=fixed)
        if isinstance(layout, Int8) and ROUNDINGS[self.spec.rounding].requantised:
            trainable.open_base = self.matrices[name].rows
        if self.spec.decay_to == "base":
            trainable.open_start = self.matrices[name].start_rows
        return Matrix(layout, self.context, trainable)

    # -- one module ---------------------------------------------------------------------------------------

    def _linear(self, name: str, sub: nn.Module) -> None:
        weight = f"{name}.weight"
        layout = self._layout(weight, table=False, transpose=not isinstance(sub, nn.Linear))
        matrix = self._matrix(weight, layout)
        fields: dict[str, object] = {"matrix": matrix, "context": self.context}
        if getattr(sub, "bias", None) is not None:
            fields |= self._bias(f"{name}.bias")
        for part, build in BESIDE_LINEAR.items():
            if getattr(self.parts, part):
                fields |= build(self, weight, layout.shape)
        self._guide(matrix.trained, self.store.trainables.get(f"{weight}#lowrank"))
        kind: type[nn.Module] = PerturbedLinear
        if self.parts.adapters:
            kind = LoraLinear
        elif self.parts.factors and self.factors is not None:
            kind = MixedLinear
        _become(sub, kind, fields)

    def _gain(self, weight: str, shape: tuple[int, int]) -> dict[str, object]:
        gain = self.store.train_vector(f"{weight}#gain", torch.zeros(shape[0]))
        gain.least = -1.0  # a scale of quantisation is never negative
        return {"trained_gain": gain}

    def _factor(self, weight: str, shape: tuple[int, int]) -> dict[str, object]:
        layout = Dense(torch.zeros(shape[0], self.spec.rank, device=self.device))
        factor = self.store.train(f"{weight}#lowrank", layout)
        basis = self.store.basis(weight, shape[1]).to(self.device, self.spec.dtype)
        fields: dict[str, object] = {"trained_factor": factor, "basis": basis}
        if self.factors is not None:
            leaf = self.factors.train(factor.target.name, factor.values)
            fields["adapter"] = Adapter(basis, leaf, 1.0)
        return fields

    def _adapter(self, weight: str, shape: tuple[int, int]) -> dict[str, object]:
        assert self.adapters is not None
        spec = self.spec
        return {"adapter": self.adapters.add(weight, shape, spec.rank, spec.seed, self.device)}

    def _guide(self, weight: Trainable | None, factor: Trainable | None) -> None:
        """Prepare a linear's trainables for directions that are made from what it reads."""
        directions = self.store.directions
        if directions.guided and directions.factored:
            for trainable in (weight, factor):
                if trainable is not None:
                    trainable.guides = {}
        elif directions.guided and weight is not None:
            rank = min(weight.target.rows, weight.target.cols)
            start = directions.basis(Key(self.spec.seed, 0), weight.target)[:, :rank]
            weight.basis = orthonormal(start).to(self.device, self.spec.dtype)

    def _embedding(self, name: str, sub: nn.Embedding) -> None:
        weight = f"{name}.weight"
        layout = self._layout(weight, table=True)
        offset: int | None = self.table_rows
        self.table_rows += layout.shape[0]
        if sub is self.input and self.tied:
            if self.spec.kind == "label":
                assert offset is not None
                self.label_rows = np.array(self.spec.label_ids, np.int64) + offset
            else:
                offset = None  # the softmax reads, and so perturbs, every row
        matrix = self._matrix(weight, layout, touched_offset=offset)
        kind = (
            PerturbedEmbedding
            if type(sub) is nn.Embedding
            else type("Perturbed" + type(sub).__name__, (type(sub), PerturbedEmbedding), {})
        )
        _become(sub, kind, {"matrix": matrix, "context": self.context})

    def _head(self, name: str, sub: nn.Module) -> None:
        weight = f"{name}.weight"
        if self.spec.half == "above" and self._scores_label_words(sub):
            matrix = Matrix(self._label_rows(), self.context)
            self.label_ids = tuple(range(len(self.label_ids)))
        elif self.tied and self.spec.half == "above":
            matrix = Matrix(self._layout(self._weight_name(self.input), table=True), self.context)
        elif self.tied or self.spec.half == "below":  # where no head runs
            matrix = self.input.matrix
        else:
            layout = self._layout(weight, table=True)
            labels = self.spec.kind == "label"
            fixed = torch.tensor(self.spec.label_ids, device=self.device) if labels else None
            matrix = self._matrix(weight, layout, fixed=fixed)
        fields: dict[str, object] = {"matrix": matrix, "context": self.context}
        if getattr(sub, "bias", None) is not None:
            # RoBERTa's head has the bias at its parent as well: the tied one, under the name that files have, or
            # another one, which nothing reads.
            bias = next(n for n, p in self.module.named_parameters() if p is sub.bias)
            fields |= self._bias(bias)
            parent = self.module.get_submodule(name.rpartition(".")[0])
            if "bias" in parent._parameters:
                parent._parameters["bias"] = None
        _become(sub, PerturbedHead, fields)
        self.head = sub  # type: ignore[assignment]

    def _weight_name(self, module: nn.Module) -> str:
        """The parameter that the weight of a module is."""
        name = next(name for name, sub in self.module.named_modules() if sub is module)
        return f"{name}.weight"

    def _scores_label_words(self, head: nn.Module) -> bool:
        """Whether no row of a frozen head is read but those of the label words."""
        frozen = self.tied or not self.parts.weights
        return self.spec.kind == "label" and frozen and getattr(head, "bias", None) is None

    def _label_rows(self) -> Layout:
        """The rows of the head for the label words, in the order of the labels."""
        name = self._weight_name(self.input if self.tied else self.output)
        stored = self._stored(name, table=True)
        return moved(stored.make_rows(self.spec.label_ids), self.device)

    def _norm(self, name: str, sub: nn.Module) -> None:
        names = [n for n, _ in sub.named_parameters(recurse=False)]
        vectors = {n: self._vector(f"{name}.{n}") for n in names}
        if self.parts.vectors:
            fields = {
                "context": self.context,
                "norm": norm_of(sub),
                "trained_weight": vectors["weight"],
                "trained_bias": vectors.get("bias"),
            }
            _become(sub, PerturbedNorm, fields)
            return
        for n, values in vectors.items():
            assert isinstance(values, Tensor)
            sub._parameters[n] = nn.Parameter(values, requires_grad=False)
        if self.fusing:
            fuse_norm(sub)


# What a trained part adds to a linear, by its flag in zo/parts.py: (builder, weight's name, its shape) -> attributes
# of the perturbed module.
BESIDE_LINEAR: dict[str, Callable[[_Builder, str, tuple[int, int]], dict[str, object]]] = {
    "gains": _Builder._gain,
    "factors": _Builder._factor,
    "adapters": _Builder._adapter,
}


def _become(sub: nn.Module, kind: type, fields: dict[str, object]) -> None:
    """Turn ``sub`` into ``kind`` in place, with these attributes; its parameters are gone, the store has them.

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

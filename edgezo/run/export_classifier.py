"""``--format hf-classifier``: a run that tells labels apart as transformers' sequence classification.

    config.json          ...ForSequenceClassification, the names of the labels, the blocks that are kept
    model.safetensors    the blocks, the final norm, and ``score.weight`` (labels, hidden): logits = score(norm(state of
                         the last token)), without an intercept

It holds exactly

    label words                the rows of the head that they have, with what was trained in them
    a linear probe of one      (--probe-reads one) its weight over a final norm of ones, and no block above the one that
    block                      it reads. RMS norms make its states; layer norms those states times a positive number,
                               since the rows of the weight have the mean 0: the labels are the run's, their
                               probabilities nearly

A mean over several blocks, or an intercept, has no place there, and is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from edgezo.data.encoder import special_ids
from edgezo.errors import UsageError
from edgezo.network.fused import norm_of
from edgezo.network.loader import decoder_layers, load_tokenizer
from edgezo.network.readout import ReadoutWeights
from edgezo.run.export_files import write_config, write_weights
from edgezo.run.merged import Merged, rounded_to
from edgezo.weights.saved import Saved

_SCORE = "score.weight"
_ELSEWHERE = "--format onnx holds the run as it is."
_MEAN = (
    1e-5  # of the rows of a weight that a layer norm may stand before, beside its largest number
)


@dataclass
class ClassifierExporter(Merged):
    """Writes a run as transformers' model for sequence classification."""

    def write(self, folder: Path, asked: str | None) -> dict[str, Any]:
        """Write config.json and model.safetensors. Raises UsageError for a run that they cannot hold."""
        self._check_task()
        dtype = self.dense_dtype(asked)
        saved = [self.saved(name, dtype, False) for name in self._kept()]
        made = {_SCORE: self._score(), **self._identity}
        saved += [Saved.of(name, rounded_to(t, dtype, name)) for name, t in made.items()]
        self._write_config(folder, dtype)
        notes = []
        if self.probe is None and self.rebuilt.model.scorer.softcap is not None:
            notes.append(
                "the model caps its logits softly, and a classifier of transformers does not: labels are the run's, "
                "probabilities are not"
            )
        return {**write_weights(folder, saved), "notes": notes}

    # -- what it can hold ---------------------------------------------------------------------------------

    def _check_task(self) -> None:
        dataset = self.rebuilt.planned.opened.dataset
        if not dataset.label_names:
            raise UsageError(
                "this run does not tell the labels of a data set apart, so that it is no classifier.\nUse --format hf."
            )
        if self.rebuilt.model.masked:
            raise UsageError(
                f"transformers' classifier of the type {self.files.config.model_type} reads another state than the "
                "mask's.\nUse --format hf."
            )
        if special_ids(load_tokenizer(self.files.path))[1]:
            raise UsageError(
                "the tokenizer writes a token behind every text, and the run reads the last one of the prompt.\n"
                + _ELSEWHERE
            )
        if self.probe is not None:
            self._check_probe(self.probe)
        elif dataset.kind != "label":
            raise UsageError(
                "this run scores all tokens of each option, and a classifier of transformers scores one state.\n"
                "Train with --train lowrank+probe --probe-reads one, or give label words of one token."
            )

    def _check_probe(self, probe: ReadoutWeights) -> None:
        if len(probe.blocks) > 1 or probe.bias.any():
            blocks = ", ".join(map(str, probe.blocks))
            raise UsageError(
                f"this run predicts by a linear probe on the blocks {blocks} with an intercept, and a classifier of "
                "transformers scores one state without one.\n"
                f"Train with --probe-reads one, or with --train lowrank+head. {_ELSEWHERE}"
            )
        weight = probe.weight[0]
        centred = bool((weight.mean(1).abs() <= _MEAN * weight.abs().amax()).all())
        norm = self.norm
        if norm is None or not (centred or not norm_of(norm).centred) or self._projected:
            raise UsageError(
                f"a model of the type {self.files.config.model_type} does not score the states that this run's linear "
                f"probe reads.\nTrain with --train lowrank+head. {_ELSEWHERE}"
            )

    # -- parts --------------------------------------------------------------------------------------------

    @property
    def probe(self) -> ReadoutWeights | None:
        readout = self.rebuilt.model.readout
        return None if readout is None else readout.weights

    @property
    def layers(self) -> int:
        """The blocks that are kept."""
        return self.files.shape.layers if self.probe is None else self.probe.blocks[-1] + 1

    @cached_property
    def blocks_name(self) -> str:
        return decoder_layers(self.meta, self.files.shape.layers)[0]

    @property
    def around(self) -> str:
        """The name of what holds the blocks, and the norm after them."""
        return self.blocks_name.rpartition(".")[0]

    @property
    def norm(self) -> nn.Module | None:
        """The final norm."""
        inside = self.meta.get_submodule(self.around).named_children()
        norms = [m for _, m in inside if getattr(getattr(m, "weight", None), "ndim", 0) == 1]
        return norms[0] if norms else None

    @property
    def _projected(self) -> bool:
        """Whether a matrix stands between the final norm and what is scored."""
        return getattr(self.meta.get_submodule(self.around), "project_out", None) is not None

    def _kept(self) -> Iterator[str]:
        """The parameters that are written as the run has them."""
        above = tuple(
            f"{self.blocks_name}.{i}." for i in range(self.layers, self.files.shape.layers)
        )
        head = self.name_of(self.meta.get_output_embeddings())
        table = f"{self.name_of(self.meta.get_input_embeddings())}.weight"
        for name, _ in self.meta.named_parameters():
            of_head = name.startswith(f"{head}.") and name != table
            if not (of_head or name.startswith(above) or name in self._identity):
                yield name

    @cached_property
    def _identity(self) -> dict[str, Tensor]:
        """The parameters of a final norm that multiplies by 1 and adds nothing; none where label words are scored."""
        if self.probe is None or self.norm is None:
            return {}
        name, one = self.name_of(self.norm), 1.0 - norm_of(self.norm).offset
        inside = dict(self.norm.named_parameters(recurse=False))
        fills = {"weight": one, "bias": 0.0}
        return {f"{name}.{n}": torch.full(p.shape, fills[n]) for n, p in inside.items()}

    def _score(self) -> Tensor:
        """What gives the labels' scores of a state, (labels, hidden) fp32."""
        return self.word_rows() if self.probe is None else self.probe.weight[0].cpu()

    def _write_config(self, folder: Path, dtype: torch.dtype) -> None:
        config = copy.deepcopy(self.files.config)
        kind: Any = AutoModelForSequenceClassification._model_mapping[type(config)]
        config.architectures, config.dtype = [kind.__name__], dtype
        config.num_hidden_layers = self.layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[: self.layers]
        if config.pad_token_id is None:  # without one, rows pass one at a time
            config.pad_token_id = load_tokenizer(self.files.path).pad_token_id
        names = self.rebuilt.planned.opened.dataset.label_names
        labels = {str(i): name for i, name in enumerate(names)}
        places = {name: i for i, name in enumerate(names)}
        task = {"problem_type": "single_label_classification"}
        write_config(config, folder, id2label=labels, label2id=places, **task)

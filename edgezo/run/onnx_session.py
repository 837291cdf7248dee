"""What the commands on the ONNX engine share: a request becomes open graphs and rows, then a plan, then a model.

No module that this one imports needs torch or transformers (the contract ``torch-free`` in pyproject.toml).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from edgezo.data.dataset import Dataset
from edgezo.data.sources import TRAINING, ReadFor
from edgezo.errors import UsageError
from edgezo.machine.files import user_path
from edgezo.machine.hardware import Machine, machine
from edgezo.machine.process_memory import ReadingGuard, malloc_trim, peak_rss_bytes
from edgezo.network.onnx_engine import OnnxModel
from edgezo.network.onnx_manifest import Manifest, open_manifest
from edgezo.network.onnx_sessions import Sessions, check_provider
from edgezo.network.plain_losses import PlainHead
from edgezo.network.plain_tokenizer import PlainTokenizer
from edgezo.plan.budget import default_budget
from edgezo.plan.config import RunConfig
from edgezo.plan.onnx_plan import GraphSizes, make_onnx_plan
from edgezo.run.read_rows import ReadingModel, for_kind, read_rows
from edgezo.run.run_parts import PlannedRun
from edgezo.weights.plain_factors import PlainFactors


@dataclass(frozen=True)
class OnnxOpened:
    """A request with its graphs and rows open. No weight has been read."""

    cfg: RunConfig
    manifest: Manifest
    tokenizer: PlainTokenizer
    dataset: Dataset
    peak_before_bytes: int = 0
    read_peak_bytes: int = 0


OnnxPlanned = PlannedRun[OnnxOpened]


def open_onnx(cfg: RunConfig, read_for: ReadFor = TRAINING) -> OnnxOpened:
    """Find the graphs, check every file, read and tokenise the rows.

    Raises UsageError for rows or settings that do not go together, EdgezoError for files that are not those of an
    export, and DoesNotFit where reading takes more than the cap.
    """
    before_bytes = peak_rss_bytes()
    cap_bytes = cfg.max_mem_bytes or default_budget(machine())[0]
    guard = ReadingGuard(cap_bytes)
    manifest = open_graphs(cfg)
    tokenizer = PlainTokenizer.of(manifest)
    about = ReadingModel(
        path=manifest.path, shape=manifest.shape, end_ids=tuple(manifest.values["end_ids"])
    )
    dataset = read_rows(cfg, about, tokenizer, guard, read_for)
    if dataset.generation is not None:
        raise UsageError(
            "the answers to these rows are written, which --engine onnx does not do.\n"
            "Use --engine torch, or rows with label words or completions without --max-new-tokens."
        )
    cfg = replace(for_kind(cfg, dataset), written_at=dataset.written_at)
    malloc_trim()
    peak_bytes = peak_rss_bytes()
    read_bytes = peak_bytes if peak_bytes > before_bytes else 0
    return OnnxOpened(cfg, manifest, tokenizer, dataset, before_bytes, read_bytes)


def open_graphs(cfg: RunConfig) -> Manifest:
    """The graphs that a request names, every file checked. Raises UsageError for another precision, and EdgezoError."""
    # It imports onnxruntime, which is part of the process that a plan starts from.
    check_provider(cfg.provider)
    manifest = open_manifest(user_path(cfg.model))
    if cfg.precision not in (None, manifest.precision):
        raise UsageError(
            f"--precision {cfg.precision}: the graphs in {manifest.path} are {manifest.precision}. Leave it out, or "
            f"write others: edgezo export {manifest.base} --format onnx --trainable --dtype {cfg.precision} --out DIR"
        )
    manifest.check_files()
    return manifest


def sizes_of(manifest: Manifest) -> GraphSizes:
    """What a plan has to know of the graphs."""
    blocks = manifest.blocks
    table = manifest.bytes_of("table.data")
    head = manifest.values["head_data"]
    return GraphSizes(
        name=manifest.path.name,
        precision=manifest.precision,
        shape=manifest.shape,
        block_bytes=tuple(manifest.bytes_of(block.data) for block in blocks),
        factor_rows=tuple(sum(x.rows for x in block.linears) for block in blocks),
        basis_cols=tuple(sum(x.cols for x in block.linears) for block in blocks),
        largest_matrix=max(x.rows * x.cols for block in blocks for x in block.linears),
        table_bytes=table,
        head_bytes=manifest.bytes_of(head),
    )


def settle_onnx(
    opened: OnnxOpened, machine: Machine, base_bytes: int, *, trains: bool = True
) -> OnnxPlanned:
    """Plan the request for this machine; without ``trains`` one that evaluates or answers.

    Raises PlanDoesNotFit with the smallest budget that would work.
    """
    plan = make_onnx_plan(
        sizes_of(opened.manifest),
        opened.cfg,
        opened.dataset.token_stats(),
        machine,
        base_bytes,
        opened.read_peak_bytes,
        trains=trains,
    )
    return OnnxPlanned(opened, plan.settle(opened.cfg), plan)


def load_onnx(planned: OnnxPlanned) -> OnnxModel:
    """The model of a plan. Graphs are loaded when they first run."""
    cfg, dataset = planned.cfg, planned.opened.dataset
    about = (dataset.kind, dataset.label_ids)
    return model_over(planned.opened.manifest, cfg, *about)


def model_over(
    manifest: Manifest, cfg: RunConfig, kind: str, label_ids: Sequence[int]
) -> OnnxModel:
    """What ``cfg`` trains over the graphs of a manifest, as it begins, for rows of a ``kind``."""
    shape = manifest.shape
    first = cfg.first_trained(shape.layers)
    linears = {
        number: block.linears
        for number, block in enumerate(manifest.blocks)
        if number >= first and cfg.parts.factors
    }
    threads = cfg.threads or machine().cores
    model = OnnxModel(
        manifest,
        Sessions(manifest, cfg.provider, threads),
        PlainFactors(linears, cfg.seed, cfg.rank, threads),
        kind,
        tuple(label_ids),
        first_trained=first,
    )
    if cfg.parts.head and kind == "label":
        model.scorer.exact = PlainHead.of_words(len(label_ids), shape.hidden)
    elif cfg.parts.head:
        vocabulary = (shape.vocab, shape.hidden, cfg.rank, cfg.seed)
        model.scorer.exact = PlainHead.of_vocabulary(*vocabulary)
    return model

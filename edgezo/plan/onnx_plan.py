"""The plan of a run on the ONNX engine: every byte with its reason, from the sizes of its graphs. Pure, as planner.py.

Weights are mapped from their files and used as they lie there, so a block takes what its file has; codes of int8 are
expanded a matrix at a time. Coefficients that are "calibrated" are set against measured peaks of whole processes
(benchmarks/log/2026-11-30-what-does-training-on-onnx-runtime-take.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from edgezo.data.token_stats import TokenStats
from edgezo.machine.limits import EVAL_TOKENS, GUARD_MARGIN_BYTES, MB, PASS_TOKENS, WRITING_TOKENS
from edgezo.plan.budget import default_budget, mb
from edgezo.plan.calibration import ACTIVATIONS, RESERVE, Item, needed_bytes
from edgezo.plan.config import Batched, RunConfig
from edgezo.plan.fields import DEFAULT_BATCH
from edgezo.plan.method import method_name
from edgezo.plan.plan import Decision, Plan, PlanDoesNotFit
from edgezo.plan.shapes import Shape
from edgezo.plan.step_time import SHARE_OF_PEAK
from edgezo.zo.parts import PARTS

if TYPE_CHECKING:
    from edgezo.machine.hardware import Machine

RUNTIME_BYTES = 10 * MB  # what the first graph brings beside its weights (calibrated)
GRAPHS, SESSION_BYTES = (
    4,
    1 * MB,
)  # of each graph in memory: its nodes, kernels and plan (calibrated)
# Of a token's activations: hidden states, values of the MLP, queries and keys that are there at once (calibrated).
HIDDEN_COPIES, MLP_COPIES, QUERY_COPIES = 2, 4, 4
PADDED_SCORE_COPIES = 2
CHUNK_BYTES = 2 * (
    32 << 20
)  # of a chunk of full-vocabulary logits, with their shares (plain_losses.py)
LEARNED_HEAD_COPIES = (
    6  # of the exact head: change, gradient, Adam's two moments and the temporaries of its step
)
FIT_COPIES, GRAM_COPIES = 3, 6  # of the states of a linear probe's fit
RUN_BYTES, SLACK_BYTES = 2 * MB, 6 * MB


@dataclass(frozen=True)
class GraphSizes:
    """What a plan has to know of a trainable export."""

    name: str
    precision: str
    shape: Shape
    block_bytes: tuple[int, ...]  # of each block's weights
    factor_rows: tuple[int, ...]  # rows of each block's low-rank factors
    basis_cols: tuple[int, ...]
    largest_matrix: int  # weights of the largest one of a block
    table_bytes: int  # of the embedding
    head_bytes: int  # of the head where it is another matrix, else of the embedding


@dataclass(frozen=True)
class OnnxFootprint:
    """The bytes of a request."""

    sizes: GraphSizes
    cfg: Batched
    tokens: TokenStats
    base_bytes: int
    read_peak_bytes: int = 0
    trains: bool = True
    # Tokens whose keys and values are kept while the model writes.
    kept_tokens: int = 0

    @property
    def first(self) -> int:
        """The first block that is trained."""
        return self.cfg.first_trained(self.sizes.shape.layers)

    @property
    def first_kept(self) -> int:
        """The first block that stays in memory: those below run once where their states are kept."""
        return self.first if self.cfg.keeps_states else 0

    def items(self, micro_batch: int) -> tuple[Item, ...]:
        """Everything that the run takes."""
        return tuple(item for item in self._items(micro_batch) if item.bytes)

    def _items(self, micro_batch: int) -> Iterator[Item]:
        sizes, cfg, first = self.sizes, self.cfg, self.first_kept
        layers = sizes.shape.layers
        yield Item(
            "base process",
            self.base_bytes,
            "Python, numpy, onnxruntime, the tokenizer and the tokens of all rows, measured",
        )
        if self.read_peak_bytes > self.base_bytes:
            yield Item("reading rows", self.read_peak_bytes - self.base_bytes, "measured", "read")
        yield Item("run", RUN_BYTES, "buffers of journal and metrics")
        yield Item(
            "runtime", RUNTIME_BYTES, "what onnxruntime takes with its first graph", "compute"
        )
        yield Item(
            "blocks",
            sum(sizes.block_bytes[first:]),
            f"{layers - first} blocks in {sizes.precision}, mapped from their files",
        )
        yield Item(
            "graphs",
            SESSION_BYTES * GRAPHS,
            "graphs of onnxruntime without their weights; blocks share one",
        )
        if first:
            yield Item(
                "block of the pass",
                max(sizes.block_bytes[:first]),
                "one frozen block at a time, while rows pass it",
                "pass",
            )
            rows = max(1, PASS_TOKENS // self._longest)
            yield from self._activations(PASS_TOKENS, rows * self._longest**2, "pass")
        yield from self._trained()
        sides = cfg.planned_sides
        passing, longest = sides * self.tokens.at_once(micro_batch, None), self._longest
        evaluated = self.tokens.evaluated_at_once(EVAL_TOKENS)
        pairs = sides * micro_batch * longest**2
        if not self.trains:
            passing, pairs = 0, max(1, evaluated // longest) * longest**2
        if self.kept_tokens:  # prompts pass some tokens at a time
            passing, evaluated = 0, WRITING_TOKENS
            pairs = WRITING_TOKENS * (longest + self.tokens.written)
        yield from self._activations(max(passing, evaluated), pairs, "forward")
        yield from self._writing()
        yield from self._scoring()
        yield Item("slack", SLACK_BYTES, "freed memory that stays in the heap")
        yield Item("margin", GUARD_MARGIN_BYTES, "what the guard keeps free", RESERVE)

    @property
    def _longest(self) -> int:
        return max(self.tokens.tokens[0], self.tokens.evaluated, 1)

    def _activations(self, tokens: int, pairs: int, phase: str) -> Iterator[Item]:
        """What a forward over so many tokens takes; of one block, since they run one after the other.

        ``pairs``: a token and one that it may see, of all rows with their padding.
        """
        shape = self.sizes.shape
        heads = shape.heads * shape.head_dim + 2 * shape.kv_heads * shape.head_dim
        each = HIDDEN_COPIES * shape.hidden + max(
            MLP_COPIES * shape.intermediate, QUERY_COPIES * heads
        )
        scores = PADDED_SCORE_COPIES * shape.heads * pairs
        yield Item(
            ACTIVATIONS,
            4 * (tokens * each + scores),
            f"{tokens:,} tokens in fp32, one block at a time",
            phase,
        )
        if self.sizes.precision == "int8":
            yield Item(
                "expanded weights",
                4 * self.sizes.largest_matrix,
                "codes of the largest matrix in fp32, while it is multiplied",
                phase,
            )

    def _trained(self) -> Iterator[Item]:
        sizes, cfg, first = self.sizes, self.cfg, self.first
        if cfg.parts.factors:
            rows, cols = sum(sizes.factor_rows[first:]), sum(sizes.basis_cols[first:])
            yield Item(
                "low-rank factors",
                4 * rows * cfg.rank + cols * cfg.rank,
                f"A of rank {cfg.rank} in fp32, and the signs of V",
            )
            yield Item(
                "directions",
                self.trains
                * max(sizes.factor_rows)
                * (2 * cfg.batch_size + 4 * (cfg.rank + cfg.batch_size)),
                "sign vectors of one block, and what its graph makes of them",
                "forward",
            )
        if cfg.parts.head:
            words = self.tokens.label_words
            width = sizes.shape.hidden if words else cfg.rank
            size = (words or sizes.shape.vocab) * width
            yield Item(
                "exact head", 4 * LEARNED_HEAD_COPIES * size, "change, gradient, moments, fp32"
            )
        if self.trains and (fitted := cfg.readout_rows(self.tokens.examples)):
            hidden = sizes.shape.hidden
            fit = FIT_COPIES * fitted * hidden + GRAM_COPIES * min(fitted, hidden) ** 2
            yield Item(
                "linear probe's fit", 4 * fit, f"states of {fitted:,} rows of a block", "fit"
            )

    def _writing(self) -> Iterator[Item]:
        """What a model keeps while it writes; a block's is there twice while it grows by a token."""
        shape, kept = self.sizes.shape, self.kept_tokens
        block = 8 * kept * shape.kv_heads * shape.head_dim
        count = f"of {kept:,} tokens in fp32, by which the tokens that follow see them"
        yield Item("keys and values", (shape.layers + 2) * block, count, "forward")

    def _scoring(self) -> Iterator[Item]:
        if self.tokens.label_words:
            return
        yield Item("head", self.sizes.head_bytes, "mapped from its file", "compute")
        yield Item("logits", CHUNK_BYTES, "a chunk of them over the whole vocabulary", "forward")
        if self.sizes.precision != "fp32":
            yield Item("expanded head", 8 << 20, "some rows of it in fp32", "forward")


def make_onnx_plan(
    sizes: GraphSizes,
    cfg: RunConfig,
    tokens: TokenStats,
    machine: Machine,
    base_bytes: int,
    read_peak_bytes: int = 0,
    *,
    trains: bool = True,
) -> Plan:
    """The plan of a request; without ``trains`` one that evaluates or answers.

    Raises PlanDoesNotFit with the smallest budget that would work.
    """
    batch = cfg.batch_size or max(DEFAULT_BATCH, cfg.micro_batch or 1)
    states = cfg.states
    if cfg.blocks != "all" and states is None:
        # A linear probe reads prompts alone, which are other rows than those with several label words behind them.
        states = "none" if tokens.long_words and cfg.parts.readout else "bf16"
    settled = Batched.of(cfg, batch_size=batch, states=states)
    footprint = OnnxFootprint(sizes, settled, tokens, base_bytes, read_peak_bytes, trains)
    cap, reason = (
        (cfg.max_mem_bytes, "as given")
        if cfg.max_mem_bytes is not None
        else default_budget(machine)
    )
    if tokens.written:
        # Rows that write at once; one alone where the cap has no room for more.
        room = tokens.evaluated_prompt + tokens.written
        least, most = (replace(footprint, kept_tokens=n) for n in (room, max(room, EVAL_TOKENS)))
        footprint = most if needed_bytes(most.items(batch)) <= cap else least
    choices = [cfg.micro_batch] if cfg.micro_batch is not None else _halves(batch)
    needs = {micro: needed_bytes(footprint.items(micro)) for micro in choices}
    fitting = next((micro for micro in choices if needs[micro] <= cap), None)
    smallest = min(needs.values())
    if fitting is None:
        raise _refusal(footprint, cap, smallest, min(choices))
    return _onnx_plan(footprint, fitting, cap, smallest, reason, machine)


def _halves(batch: int) -> list[int]:
    """Micro-batches to try, the largest first."""
    sizes = [batch]
    while sizes[-1] > 1:
        sizes.append((sizes[-1] + 1) // 2)
    return sizes


def _refusal(footprint: OnnxFootprint, cap: int, smallest: int, micro: int) -> PlanDoesNotFit:
    sizes, ways = footprint.sizes, list[str]()
    if sizes.precision != "int4":
        ways.append("an export with --dtype int4")
    if not footprint.trains:
        ways.append("a smaller --max-length")
    elif footprint.cfg.blocks == "all":
        ways.append("--blocks 10, which keeps the frozen blocks on disk")
    way_out = f" Or give {' or '.join(ways)}." if ways else ""
    items = footprint.items(micro)
    largest = sorted(items, key=lambda item: -item.bytes)[:4]
    named = ", ".join(f"{item.name} {mb(item.bytes)}" for item in largest)
    how = f" (--micro-batch {micro})" if footprint.trains else ""
    return PlanDoesNotFit(
        f"{sizes.name} needs at least {mb(smallest)}{how} on this engine, and --max-mem is "
        f"{mb(cap)}. The largest items: {named}.\nGive --max-mem {mb(smallest)} or more.{way_out}",
        smallest,
        items,
    )


def _onnx_plan(
    footprint: OnnxFootprint, micro: int, cap: int, smallest: int, reason: str, machine: Machine
) -> Plan:
    cfg, sizes, tokens = footprint.cfg, footprint.sizes, footprint.tokens
    trained = [PARTS[name].reason.format(rank=cfg.rank) for name in cfg.train]
    decisions = (
        Decision("engine", "onnx", f"as given: {sizes.name} holds graphs of onnxruntime"),
        Decision(
            "method", method_name(cfg.train, cfg), "this engine trains by forward passes alone"
        ),
        Decision("max_mem_bytes", cap, reason),
        Decision("precision", sizes.precision, "that of the graphs (edgezo export --dtype)"),
        Decision("batch_size", cfg.batch_size, "as given, or the default"),
        Decision("micro_batch", micro, "the most examples of the batch that fit at once"),
    )
    return Plan(
        model=sizes.name,
        device="cpu",
        max_mem_bytes=cap,
        estimator=cfg.estimator,
        short_tokens=None,
        precision=sizes.precision,
        rounding=cfg.rounding,
        compute_dtype="fp32",
        batch_size=cfg.batch_size,
        micro_batch=micro,
        trained=tuple(trained),
        frozen=(f"{sizes.shape.layers} blocks, embedding and head, in {sizes.precision}",),
        items=footprint.items(micro),
        decisions=decisions,
        smallest_bytes=smallest,
        smallest_flags=f"--micro-batch {micro}",
        step_s=_seconds(footprint, cfg.passes * cfg.batch_size, tokens.mean, machine),
        blocks_on_disk=0,
        disk_bytes=0,
        reused_tokens=0,
        most_tokens=None,
        maps=False,
        evaluation_s=_seconds(footprint, tokens.evaluations, tokens.evaluated_mean, machine),
        evaluations=tokens.evaluations,
        pass_row_s=_pass_row_s(footprint, machine),
        blocks=cfg.blocks,
        kept_tokens=footprint.kept_tokens,
        states=cfg.states,
        state_rows=cfg.state_rows,
        first_trained=footprint.first,
    )


def _pass_row_s(footprint: OnnxFootprint, machine: Machine) -> float:
    """Seconds that a row takes through frozen blocks whose output is kept; 0 where all blocks stay."""
    first, tokens = footprint.first_kept, footprint.tokens
    above = footprint.sizes.shape.layers - first
    return _seconds(footprint, 1, tokens.mean, machine) * first / above


def _seconds(footprint: OnnxFootprint, rows: int, length: float, machine: Machine) -> float:
    """Seconds of so many rows: two floating-point operations for each weight of a block and token."""
    shape, first = footprint.sizes.shape, footprint.first_kept
    weights = sum(rows * cols for _, rows, cols in shape.layer_matrices) * (shape.layers - first)
    speed = machine.flops_s * SHARE_OF_PEAK
    if footprint.cfg.threads is not None:
        speed *= min(1.0, footprint.cfg.threads / machine.cores)
    return 2 * weights * rows * length / speed

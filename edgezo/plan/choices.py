"""What the planner may choose for a request, best first, and what it has chosen. Pure, as planner.py."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from edgezo.machine.limits import MB
from edgezo.plan.config import Batched, RunConfig
from edgezo.plan.fields import DEFAULT_BATCH
from edgezo.plan.footprint import Footprint
from edgezo.plan.obstacles import needs_memory

if TYPE_CHECKING:
    from edgezo.machine.hardware import Machine
    from edgezo.plan.blocks import Blocks

PRECISIONS_TRIED = ("bf16", "int8", "int4")  # in this order; fp32 and fp16 only when asked for


class Option(NamedTuple):
    """A way to run a request."""

    precision: str
    micro_batch: int
    on_disk: int  # blocks on disk; in a plan for a GPU, blocks in the RAM


@dataclass(frozen=True)
class Choice:
    """What the planner has chosen for a request."""

    request: RunConfig  # as asked
    machine: Machine
    device: str
    cap_bytes: int
    footprint: Footprint  # counts the request with its batch size, and with --short-tokens decided
    option: Option
    smallest: Option  # of the smallest budget that works
    smallest_bytes: int
    blocks: Blocks

    @property
    def needed_bytes(self) -> int:
        return self.footprint.needed_bytes(*self.option)


def options(cfg: Batched, layers: int) -> Iterator[Option]:
    """The most wanted first: memory before disk, precision before speed."""
    if cfg.residency in (None, "resident"):
        for precision in precisions(cfg):
            for micro_batch in micro_batches(cfg):
                yield Option(precision, micro_batch, 0)
    if cfg.residency != "resident" and not needs_memory(cfg):
        # From disk the smallest precision that is tried, so that less memory never gives a higher one.
        precision = precisions(cfg)[-1]
        for micro_batch in micro_batches(cfg):
            yield Option(precision, micro_batch, layers)


def precisions(cfg: RunConfig) -> tuple[str, ...]:
    """Precisions that are tried, the highest first."""
    if cfg.precision is not None:
        return (cfg.precision,)
    return ("bf16",) if cfg.parts.weights else PRECISIONS_TRIED


def batch_size_of(cfg: RunConfig) -> int:
    return cfg.batch_size or max(DEFAULT_BATCH, cfg.micro_batch or 0)


def micro_batches(cfg: Batched) -> list[int]:
    """Descending: the whole batch, its halves, its thirds, ..., one example."""
    if cfg.micro_batch is not None:
        return [cfg.micro_batch]
    pieces = range(1, cfg.batch_size + 1)
    return sorted({math.ceil(cfg.batch_size / n) for n in pieces}, reverse=True)


def best_within(footprint: Footprint, n_bytes: int) -> Option:
    """The first option that fits into ``n_bytes``, rounded up to whole MB as ``budget.mb`` prints them."""
    cap = math.ceil(n_bytes / MB) * MB
    tried = options(footprint.cfg, footprint.shape.layers)
    return next(option for option in tried if footprint.needed_bytes(*option) <= cap)


def least_bytes(footprint: Footprint) -> int | None:
    """The smallest peak among all options; None where there is no option."""
    tried = options(footprint.cfg, footprint.shape.layers)
    return min((footprint.needed_bytes(*option) for option in tried), default=None)


def least_in_memory(footprint: Footprint, tried: tuple[str, ...]) -> int:
    """The smallest peak in these precisions with all weights in memory."""
    cfg = footprint.cfg
    return min(footprint.needed_bytes(p, m) for p in tried for m in micro_batches(cfg))


def with_blocks_in_memory(footprint: Footprint, option: Option, cap: int) -> Option:
    """The option with as many blocks in memory as there is room for; with --residency disk or host none are."""
    if not option.on_disk or footprint.cfg.residency == footprint.elsewhere:
        return option
    fewer = (option._replace(on_disk=n) for n in range(1, footprint.shape.layers))
    return next((o for o in fewer if footprint.needed_bytes(*o) <= cap), option)


def moved_bytes(footprint: Footprint, option: Option) -> int:
    """Bytes that one pass over the blocks that are not in memory reads."""
    return option.on_disk * footprint.block_bytes(option.precision)

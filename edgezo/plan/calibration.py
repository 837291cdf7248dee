"""What a footprint is counted with: items, and every coefficient in one place.

An ``Item`` is a name, bytes and the reason. Items that are held only in one phase do not add up with those of another:

    peak = sum(always) + max(sum(load), sum(forward), sum(update), sum(fit))

Coefficients that are "calibrated" are set against a measured VmHWM. Standard library only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edgezo.machine.limits import MB

ACTIVATIONS = "activations"  # the item's name
PHASES = ("load", "forward", "update", "fit")

# Python, PyTorch, transformers and a tokenizer, imported and idle (calibrated).
BASE_BYTES = 380 * MB
# What each word of a vocabulary above BASE_VOCAB adds to that (calibrated).
TOKENIZER_BYTES_PER_WORD = 500
BASE_VOCAB = 50_000
# Freed blocks below the mmap threshold stay in the heap (calibrated).
SLACK_BYTES = 4 * MB
# The model's own class and what the first forward touches, and quanto where it quantises: imported after the base
# process was measured (calibrated).
LIBRARY_BYTES = 24 * MB
QUANTO_BYTES = 4 * MB
# Panels that the matrix library packs, for each column of the widest product (calibrated).
PANEL_BYTES = 2800
# What is compiled for a shape of a bf16 product: 0.63 MB measured with AVX-512 BF16.
KERNEL_BYTES = 630_000
# Journal buffers, metrics, step records.
RUN_BYTES = 2 * MB
# An update holds a tile of weights, one of the direction, one of the change and their product; where it rounds, the
# high part, its spacing and the low part.
UPDATE_TILES = 4
ROUNDED_UPDATE_TILES = 5
CODES_UPDATE_TILES = (
    6  # rounding to codes: what is left of each value, and what it is compared with
)
# A tile of the base that is replayed and quantised, and the holes that its temporaries leave (calibrated).
ANCHOR_TILES = 3
# A dense tensor is read piece by piece in its own dtype (readers), so only a piece is staged.
READ_PIECE_BYTES = 4 * MB
# Expanded rows of the head, a chunk of their logits as they come, and in fp32, where the error takes its place.
LOGITS_BYTES = 24 << 20
# The embedded tokens, the block's input, the residual after attention, its norm.
HIDDEN_COPIES = 4
# Gate's activation, up, their product; without a gate the temporaries of a GELU.
MLP_COPIES = {True: 3, False: 4}
# Rotated queries, the same in rows, the result in rows, packed again, and put out.
QUERY_COPIES = 5
# Keys and values, rotated, in rows, and the temporaries of the rotation.
KEY_COPIES = 6
HEAP_LEFT = 0.6
# In pieces of fewer tokens too much of a forward would go into making fp32 of weights.
LEAST_PIECE_TOKENS = 1024
# Padded groups that attend one after the other (packing._GROUP_TOKENS).
ATTENDING_TOKENS = 4096
# Keys and values of an evaluation, unless one row alone has more: of so many tokens, or more where there is room. The
# more rows write at once, the less often the weights are read.
EVAL_KEPT_TOKENS, MOST_KEPT_TOKENS = 1024, 8192
# Change, gradient and Adam's two moments, fp32.
HEAD_COPIES = 4
# A linear probe's fit (calibrated).
FIT_COPIES, GRAM_COPIES = 2, 6
NETWORK = 449  # values of a finetuner's network for one block


@dataclass(frozen=True)
class Item:
    name: str
    bytes: int
    reason: str
    phase: str = "always"  # or one of PHASES

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "bytes": self.bytes, "reason": self.reason, "phase": self.phase}


def phase_bytes(items: Sequence[Item], phase: str) -> int:
    """What is held while ``phase`` lasts, the permanent items included."""
    return sum(item.bytes for item in items if item.phase in ("always", phase))


def peak_bytes(items: Sequence[Item]) -> int:
    return max(phase_bytes(items, phase) for phase in PHASES)

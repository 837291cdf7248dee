"""What a footprint is counted with: items, and every coefficient in one place.

An ``Item`` is a name, bytes and the reason. Items of one phase do not add up with those of another:

    peak = sum(always) + max(sum(read), sum(load), sum(compute) + max(sum(pass), sum(forward), sum(update), sum(fit)))

A reserve is memory that a cap must have above the peak, although a run is not expected to take it.

A "calibrated" coefficient is set against a measured peak: VmHWM on a CPU, the allocator's reserved bytes on a GPU.
Standard library only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from edgezo.machine.limits import MB

# Names of items.
ACTIVATIONS, EXPANDED, CALLING = "activations", "expanded weights", "calling program"
FORWARD_HOLES = "holes between forwards"
PHASES = ("read", "load", "pass", "forward", "update", "fit")
BEFORE_COMPUTING = (
    "read",
    "load",
)  # phases without what the first computation brings, and what then stays
COMPUTE = "compute"
RESERVE = "reserve"

# ---------------------------------------------------------------------------------------------
# The process

# Python, PyTorch, transformers and a tokenizer, imported and idle (calibrated).
BASE_BYTES = 405 * MB
# What each word of a vocabulary above BASE_VOCAB adds to that (calibrated).
TOKENIZER_BYTES_PER_WORD = 500
BASE_VOCAB = 50_000
# Freed blocks below the mmap threshold stay in the heap (calibrated).
SLACK_BYTES = 4 * MB
# The model's modules and what loading touches, and quanto where it quantises. They come after the base process has been
# measured (calibrated).
LIBRARY_BYTES = 3 * MB
QUANTO_BYTES = 5 * MB
# What the first step touches of the libraries beyond what machine/first_use.py does before the process is measured:
# with products in bf16, and in fp32 (calibrated).
FIRST_STEP_BYTES = {"bf16": 6 * MB, "fp32": 7 * MB}
# What the first scores over a vocabulary leave, a word (calibrated: 262,144 took 1.4 MB above the plan).
SCORED_WORD_BYTES = 16
# Of each direction that a whole batch is tried along (calibrated).
CANDIDATE_BYTES = 1_000_000
# What each block's first step leaves (calibrated).
BLOCK_STEP_BYTES = 190_000
# The block that MKL packs for an fp32 product: 384 values for each column of the widest one (matmul.keep_panel).
PANEL_BYTES = 1536
# Code that the matrix library compiles for one shape of a bf16 product: 0.63 MB with AVX-512 BF16, 0.72 with AMX.
KERNEL_BYTES = 720_000
# Numbers of rows that a product meets in few steps. The longest batch is split into 2 or 3; of the others each is met
# sooner or later (LATER_STEPS), and a third of them at once.
FIRST_NUMBERS, SOON = 3, 1 / 3
# Buffers of the journal and of the metrics, and the records of a step.
ROW_ORDER_BYTES = 40  # of a training row: random orders of two epochs, and one that is being made
RUN_BYTES = 2 * MB

# What later steps add: holes in the heap, buffers for batches of other sizes. Three blocks of SmolLM2-135M took 1 to
# 2 MB more after 25 steps than after 2, and 7 MB after 100.
LATER_BYTES = 8 * MB
LATER_STEPS = 25
# How much more a run may take than its first forward did.
UNSEEN_BYTES = 16 * MB

# ---------------------------------------------------------------------------------------------
# Loading, updates and what is trained

# A dense tensor is read piece by piece in its stored dtype, so only a piece is staged.
READ_PIECE_BYTES = 4 * MB
# An update holds a tile of weights, one of the direction, one of the change and their product; where it rounds, the
# high part, its spacing and the low part.
UPDATE_TILES = 4
ROUNDED_UPDATE_TILES = 5
# Rounding to codes: the remainder of each value as well, and what it is compared with.
CODES_UPDATE_TILES = 6
# Of a table on disk, in its stored form: tiles that are read and written (calibrated).
TABLE_ON_DISK_TILES = 2.5
# Share of an update's tiles that is lost in holes of the heap, where codes are made anew, a basis, guides or masks
# are kept between the tiles, or scores over the vocabulary come between two updates. What holes take beyond it
# goes back before it is above the plan (Heap.keep_to_plan).
UPDATE_HOLES = 0.3
# A tile of the base that is replayed and quantised, and the holes that its temporaries leave (calibrated).
REQUANTISE_TILES = 3
# Of the exact head: change, gradient and Adam's two moments, fp32, and what is made to add to them (calibrated).
HEAD_COPIES = 4.5
# Temporaries of an Adam step of the exact head: the gradient's square, and then the scale.
HEAD_TEMPORARIES = 2
# Of LoRA's adapters: value, gradient and AdamW's two moments, fp32.
ADAPTER_COPIES = 4
# Of a linear probe's fit (calibrated).
FIT_COPIES, GRAM_COPIES = 2, 6
# Values of a finetuner's network for one block.
NETWORK = 449

# ---------------------------------------------------------------------------------------------
# A forward

# Of a token: its embedding, the block's input, the residual after attention, its norm.
HIDDEN_COPIES = 4
# Activation of the gate, up, their product; without a gate the temporaries of a GELU.
MLP_COPIES = {True: 3, False: 4}
# Queries rotated, in rows, the result in rows, packed again, and as attention returns it.
QUERY_COPIES = 5
# Keys and values, rotated, in rows, and the temporaries of the rotation.
KEY_COPIES = 6
# Share of what attention takes that stays in the heap beside the temporaries of the MLP (calibrated).
ATTENTION_SHARE = 0.6
# With C kernels: gate and up, and their product in the place of up. Elsewhere (a fused gate and up, a GELU) one more of
# each of two, and what GPT-2's GELU leaves (calibrated).
GATE_COPIES, UNGATED_COPIES = 2, 4.7
# Share of the smaller temporaries, of attention or the MLP, that stays in the heap beside the larger (calibrated).
HEAP_SHARE = 1.0
# Share of all of them that holes take where a batch of texts passes in several forwards (calibrated: 16 rows of 512
# tokens took 16 MB above the rest of the plan in pieces of 2,076 tokens, and 6 MB one by one; 16 of 2,048 took 30 MB).
PIECE_HOLES = 0.6
# In pieces of fewer tokens too much of a forward would go into making fp32 of weights.
LEAST_PIECE_TOKENS = 1024
# Tokens of the padded groups that attend one after the other (network/packing.py).
ATTENDING_TOKENS = 4096
# Tokens whose keys and values an evaluation keeps, unless one row alone has more: the least, and the most where there
# is room. The more rows write at once, the less often the weights are read.
EVAL_KEPT_TOKENS, MOST_KEPT_TOKENS = 1024, 8192

# ---------------------------------------------------------------------------------------------
# A backward pass (network/first_order.py)

# A piece of a micro-batch takes no more than BACKWARD_BYTES, but has LEAST_BACKWARD_TOKENS: fewer are not worth
# reading all weights three times for.
BACKWARD_BYTES = 96 * MB
LEAST_BACKWARD_TOKENS = 256
# Of one block, for each token: hidden states of norms, residuals and their gradients, ...
HIDDEN_KEPT = 9
# ... queries, keys and values in rows, the result of attention, and their gradients, all fp32 (network/packing.py), ...
QUERIES_KEPT, KEYS_KEPT = 4, 4
# ... gate, its activation, up, their product, and three gradients; without a gate those of a GELU.
MLP_KEPT = {True: 7, False: 6}
# Share of what a step takes that is lost in pages of maps that are not full, and in blocks too small for a map
# (calibrated).
UNUSED_SHARE = 0.06

# ---------------------------------------------------------------------------------------------
# A GPU (measured on one, an H100; what depends on the card itself is in machine/gpu_figures.py)

# With blocks in the RAM: the share of the locked RAM that its page tables take on the card.
LOCKED_SHARE = 1 / 500
# The last page of the segment for large blocks and of that for small ones (calibrated).
GPU_SLACK_BYTES = 38 << 20
# Holes between temporaries, as shares of them: the second where nothing else counts (calibrated).
HOLES, LARGE_HOLES = 1 / 8, 0.28
# A chunk of full-vocabulary logits with what is made of it (network/losses.py).
GPU_LOGITS_BYTES = 48 << 20
# What rounding up a block of the allocator takes.
ROUNDING_BYTES = 512


class Caller(NamedTuple):
    """What a process held when its program called edgezo."""

    data_bytes: int  # anonymous memory
    file_bytes: int  # mapped files, such as the code of libraries

    @property
    def bytes(self) -> int:
        return self.data_bytes + self.file_bytes


NO_CALLER = Caller(0, 0)  # the process is edgezo's own


@dataclass(frozen=True)
class Item:
    """Bytes that a run takes, with their name and the reason."""

    name: str
    bytes: int
    reason: str
    phase: str = "always"  # or COMPUTE, RESERVE, or one of PHASES

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "bytes": self.bytes, "reason": self.reason, "phase": self.phase}


def phase_bytes(items: Sequence[Item], phase: str) -> int:
    """What a run takes while ``phase`` lasts, the permanent items included; "always": those of a run that computes."""
    phases = ("always", phase) if phase in BEFORE_COMPUTING else ("always", COMPUTE, phase)
    return sum(item.bytes for item in items if item.phase in phases)


def peak_bytes(items: Sequence[Item]) -> int:
    """The peak that is expected."""
    return max(phase_bytes(items, phase) for phase in PHASES)


def needed_bytes(items: Sequence[Item]) -> int:
    """The smallest cap that these items fit under."""
    return peak_bytes(items) + sum(item.bytes for item in items if item.phase == RESERVE)

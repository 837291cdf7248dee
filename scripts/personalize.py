#!/usr/bin/env python3
"""Fine-tunes a model on your own notes or mail, on this machine, and prints how well it predicts them before and after.

    python scripts/personalize.py notes --out runs/personal

Reads .txt and .md files, .eml messages, .mbox mailboxes and exported chats of the folder. A tenth of the pieces is held
out; the perplexity is of these.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import edgezo
from edgezo.errors import EdgezoError

PIECE = 128  # tokens: longer texts become several rows
# LoRA on the last blocks: rows pass the others once (benchmarks/log/2026-11-30-what-learns-notes-in-minutes.md).
METHOD = {"estimator": "lora", "step": 0.003, "blocks": "auto", "batch_size": 4, "eval_limit": 24}

parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
parser.add_argument("folder", type=Path, help="notes, mail or chats")
parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="a new directory")
parser.add_argument("--model", default="smollm2-135m-instruct")
parser.add_argument("--max-mem", default="700MB", metavar="SIZE")
parser.add_argument("--for", dest="time", default="4m", metavar="TIME", help="of the whole run")
parser.add_argument("--steps", type=int, metavar="N", help="in place of --for")
given = parser.parse_args()
asked = {
    "out": given.out,
    "max_mem": given.max_mem,
    **({"steps": given.steps} if given.steps else {"for_s": given.time}),
    "max_length": PIECE,
    **METHOD,
}
try:
    run = edgezo.finetune(given.model, given.folder, **asked)
except (EdgezoError, OSError) as problem:
    raise SystemExit(f"personalize: {problem}") from None
before, after = (math.exp(run[f"eval_{when}"]["loss"]) for when in ("before", "after"))
print(f"perplexity of {run['eval_after']['n']} held-out pieces: {before:.2f} -> {after:.2f}")
print(f"run {run.directory}; talk to it: edgezo chat {run.directory}")

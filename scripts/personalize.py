#!/usr/bin/env python3
"""Fine-tunes a model on your own notes or mail, on this machine, and prints how well it predicts them before and after.

    python scripts/personalize.py notes --out runs/personal

Reads .txt and .md files, .eml messages and .mbox mailboxes of the folder. A tenth of the pieces is held out;
the perplexity is of these. The pieces then stand in RUN.jsonl, where evaluations of the run read them again.
"""

from __future__ import annotations

import argparse
import json
import mailbox
import math
from collections.abc import Iterator
from email import message_from_bytes, policy
from pathlib import Path

import edgezo
from edgezo.errors import EdgezoError

PIECE = 1200  # characters: about 300 tokens


def texts(folder: Path) -> Iterator[str]:
    """The text of every note and message in the folder."""
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        if file.suffix in (".txt", ".md"):
            yield file.read_text(encoding="utf-8", errors="replace")
        elif file.suffix == ".eml":
            yield body(file.read_bytes())
        elif file.suffix == ".mbox":
            box = mailbox.mbox(file, create=False)
            yield from (body(message.as_bytes()) for message in box)
            box.close()


def body(message: bytes) -> str:
    """What a message says, without what it quotes."""
    part = message_from_bytes(message, policy=policy.default).get_body(("plain",))
    lines = part.get_content().splitlines() if part is not None else []
    return "\n".join(line for line in lines if not line.startswith(">"))


def pieces(text: str) -> Iterator[str]:
    """The text in pieces of whole paragraphs, of about ``PIECE`` characters."""
    piece = ""
    for paragraph in filter(str.strip, text.split("\n\n")):
        if piece and len(piece) + len(paragraph) > PIECE:
            yield piece
            piece = ""
        piece = f"{piece}\n\n{paragraph}".strip()
    if piece:
        yield piece


parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
parser.add_argument("folder", type=Path, help="notes or mail")
parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="a new directory")
parser.add_argument("--model", default="smollm2-135m-instruct")
parser.add_argument("--max-mem", default="900MB", metavar="SIZE")
parser.add_argument("--steps", type=int, default=200, metavar="N")
given = parser.parse_args()
rows = [{"text": piece} for text in texts(given.folder) for piece in pieces(text)]
data = given.out.with_name(given.out.name + ".jsonl")
settings = {"model": given.model, "data": str(data), "out": str(given.out), "steps": given.steps}
try:
    cfg = edgezo.make_config({**settings, "max_mem_bytes": given.max_mem, "max_length": 320})
    data.parent.mkdir(parents=True, exist_ok=True)
    with data.open("x", encoding="utf-8") as file:  # a file that is there is not written over
        file.writelines(json.dumps(row) + "\n" for row in rows)
    summary = edgezo.finetune(cfg)
except (EdgezoError, OSError) as problem:
    raise SystemExit(f"personalize: {problem}") from None
before, after = (math.exp(summary[f"eval_{when}"]["loss"]) for when in ("before", "after"))
print(f"perplexity of {summary['eval_after']['n']} held-out pieces: {before:.2f} -> {after:.2f}")
print(f"run {summary['run']}; talk to it: edgezo chat {summary['run']}")

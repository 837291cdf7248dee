#!/usr/bin/env python3
"""Fine-tunes a model on thumbs up and down, and prints how often it prefers the liked answer, before and after.

    python scripts/preferences.py thumbs.jsonl --out runs/preferences

Each line is {"prompt": "...", "completion": "...", "thumb": "up" or "down"}. Answers to one prompt are paired: it needs
one that was liked and one that was not. A tenth of the pairs is held out of training.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import edgezo
from edgezo.errors import EdgezoError


def count_pairs(file: Path) -> int:
    """Prompts with an answer that was liked and one that was not."""
    thumbs = defaultdict(set)
    for line in filter(str.strip, file.read_text(encoding="utf-8").splitlines()):
        row = json.loads(line)
        thumbs[row["prompt"]].add(row["thumb"])
    return sum(len(seen) > 1 for seen in thumbs.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("thumbs", type=Path, help="a .jsonl file of prompt, completion and thumb")
    parser.add_argument("--out", required=True, metavar="RUN", help="a new directory")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--max-mem", default="900MB", metavar="SIZE")
    parser.add_argument("--steps", type=int, default=60, metavar="N")
    given = parser.parse_args()
    try:
        pairs = count_pairs(given.thumbs)
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise SystemExit(
            f"preferences: {given.thumbs} is not a file of lines with prompt, completion and thumb: {problem}"
        ) from None
    print(
        f"{pairs} prompts of {given.thumbs} have an answer with thumbs up and one with thumbs down"
    )
    asked = {"out": given.out, "max_mem": given.max_mem, "steps": given.steps}
    try:
        run = edgezo.finetune(given.model, given.thumbs, **asked)
    except (EdgezoError, OSError) as problem:
        raise SystemExit(f"preferences: {problem}") from None
    before, after = run["eval_before"], run["eval_after"]
    print(
        f"the liked answer is preferred: {before['value']:.3f} -> {after['value']:.3f} of {after['n']} held-out pairs"
    )
    print(
        f"run {run.directory}; a model of it: edgezo export {run.directory} --out DIR, edgezo chat DIR"
    )


if __name__ == "__main__":
    main()

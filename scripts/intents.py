#!/usr/bin/env python3
"""Teaches a model your commands and what is none of them, and asks it: one intent for each text, or "other".

    python scripts/intents.py commands.csv --out runs/intents --ask "turn the light off" "who wrote Faust?"

The table has the columns text and intent, with rows of the intent "other" among them: sentences that are no command. A
tenth of the rows is held out of training. An answer that the model is not sure of is "other", too.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import edgezo
from edgezo.errors import EdgezoError

OTHER = "other"


def intents_of(table: Path) -> list[str]:
    """The intents that occur in the table, in the order of the alphabet."""
    with table.open(encoding="utf-8", newline="") as file:
        found = {row.get("intent") or "" for row in csv.DictReader(file)}
    if OTHER not in found or len(found) < 2:
        raise SystemExit(
            f"intents: {table} needs a column intent with your intents and {OTHER}. Add rows of the intent {OTHER}: "
            "sentences that people say and that are no command."
        )
    return sorted(found - {""})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("table", type=Path, help="a .csv file with the columns text and intent")
    parser.add_argument("--ask", nargs="*", metavar="TEXT", help="texts to ask for after training")
    parser.add_argument("--out", required=True, metavar="RUN", help="a new directory")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--max-mem", default="900MB", metavar="SIZE")
    parser.add_argument("--steps", type=int, default=60, metavar="N")
    parser.add_argument(
        "--sure", type=float, default=0.5, metavar="SHARE", help="least probability of a command"
    )
    given = parser.parse_args()
    try:
        run = edgezo.finetune(
            given.model,
            given.table,
            out=given.out,
            template="{text}\nIntent:",
            labels={name: name.replace("_", " ") for name in intents_of(given.table)},
            label_field="intent",
            max_mem=given.max_mem,
            steps=given.steps,
        )
        before, after = run["eval_before"], run["eval_after"]
        shown = f"{before['value']:.3f} -> " if before else ""
        print(f"{after['metric']} of {after['n']} held-out rows: {shown}{after['value']:.3f}")
        if given.ask:
            for text, answer in zip(given.ask, run.predict(given.ask), strict=True):
                probability = max(answer["probabilities"].values())
                intent = answer["value"] if probability >= given.sure else OTHER
                print(f"{intent}\t{probability:.2f}\t{text}")
    except (EdgezoError, OSError) as problem:
        raise SystemExit(f"intents: {problem}") from None
    print(f"run {run.directory}; ask it: edgezo predict {run.directory} --data -")


if __name__ == "__main__":
    main()

"""Writes a preference file from the bundled example: a user who likes short answers to requests.

    python benchmarks/preferences.py --out prefs.jsonl
    edgezo finetune --model smollm2-135m-instruct --data prefs.jsonl --max-mem 900MB --steps 30

Each request has two answers, one with thumbs up and one with thumbs down. Finetune holds out a tenth of the pairs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from edgezo.data.tasks import EXAMPLE_FOLDER

ROWS = 240
SHORT = "Done: {intent}."
LONG = (
    "Thank you so much for your message! I would be delighted to help you with your request about {intent}. "
    "Please let me know if there is anything else that I can do for you."
)


def rows(count: int = ROWS) -> list[dict[str, str | bool]]:
    """Two answers to each of ``count`` requests, one liked and one not."""
    answers: list[dict[str, str | bool]] = []
    for line in (EXAMPLE_FOLDER / "train.jsonl").read_text(encoding="utf-8").splitlines()[:count]:
        row = json.loads(line)
        prompt, intent = f"User: {row['text']}\nAssistant:", row["intent"].replace("_", " ")
        for answer, liked in ((SHORT, True), (LONG, False)):
            completion = answer.format(intent=intent)
            answers.append({"prompt": prompt, "completion": completion, "label": liked})
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    out.write_text("".join(json.dumps(row) + "\n" for row in rows()), encoding="utf-8")
    print(f"{out}: {2 * ROWS} answers to {ROWS} requests")


if __name__ == "__main__":
    main()

"""Does the plan hold for data and vocabularies of odd sizes? Each run has a process of its own.

    python benchmarks/odd_sizes.py --out DIR --data-root DIR [--cases NAME,...] [--threads N] [--steps 3]

Many short rows, rows of 100,000 characters, 77 and 151 label words of several tokens, and a vocabulary of 262,144 words
(random weights of Gemma 3's shape, three blocks). Every case runs twice: under the peak that the plan names without a
cap, and under the smallest cap that it names. "Peak" is the largest resident memory of the whole process, as the system
reports it to its parent.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from random_models import TOKENIZER, make_model

VOCABULARY = 262_144
SPARE_MB = 8  # the process that plans may be smaller than the one that trains
# Runs a command and writes the peak of its memory, in bytes, behind what it prints.
PEAK = (
    "import resource, subprocess, sys; done = subprocess.run(sys.argv[1:]); "
    "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024); sys.exit(done.returncode)"
)


def many_rows(folder: Path, data_root: Path) -> list[Any]:
    """400,000 rows of one sentence."""
    lines = (
        f'"film number {i} was quite a long story about nothing",{i % 2}\n' for i in range(400_000)
    )
    (folder / "many.csv").write_text("text,label\n" + "".join(lines))
    return ["--data", folder / "many.csv", "--labels", "0=bad,1=good", "--eval-limit", 20]


def long_rows(folder: Path, data_root: Path) -> list[Any]:
    """100 rows of 100,000 characters."""
    draw = random.Random(0)
    words = [
        line.split()
        for line in (Path(__file__).parent.parent / "README.md").read_text().splitlines()
    ]
    known = sorted({word for line in words for word in line})
    texts = (" ".join(draw.choices(known, k=40_000))[:100_000] for _ in range(100))
    (folder / "long.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return ["--data", folder / "long.jsonl", "--eval-limit", 5]


def labels_77(folder: Path, data_root: Path) -> list[Any]:
    """The intents of banking77, by name."""
    return ["--data", data_root / "banking77", "--label-field", "label_text", "--eval-limit", 40]


def labels_151(folder: Path, data_root: Path) -> list[Any]:
    """The intents of clinc_oos, by name."""
    return ["--data", data_root / "clinc_oos", "--label-field", "intent_text", "--eval-limit", 40]


def large_vocabulary(folder: Path, data_root: Path) -> list[Any]:
    """A vocabulary and a tokenizer of 262,144 words, texts."""
    made = make_model("gemma-3-270m", 3, folder)
    grow_tokenizer(made / "tokenizer.json")
    lines = (data_root / "sst2" / "train.jsonl").read_text().splitlines()[:400]
    rows = ({"text": json.loads(line)["sentence"]} for line in lines)
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--model", made, "--data", folder / "texts.jsonl", "--eval-limit", 40]


def grow_tokenizer(file: Path) -> None:
    """Let a tokenizer have ``VOCABULARY`` words: two known ones joined, with their merges."""
    tokens = json.loads(file.read_text(encoding="utf-8"))
    words, merges = tokens["model"]["vocab"], tokens["model"]["merges"]
    known, draw = list(words), random.Random(0)
    number = max(max(words.values()), *(token["id"] for token in tokens["added_tokens"])) + 1
    while number < VOCABULARY:
        pair = draw.choices(known, k=2)
        if "".join(pair) not in words and len("".join(pair)) <= 12:
            words["".join(pair)] = number
            merges.append(pair)
            number += 1
    file.write_text(json.dumps(tokens), encoding="utf-8")


# What a case trains on, and its options beside.
CASES: dict[str, tuple[Callable[[Path, Path], list[Any]], list[Any]]] = {
    "rows": (many_rows, ["--batch-size", 4]),
    "long": (long_rows, []),
    "long-2048": (long_rows, ["--max-length", 2048]),
    "labels-77-lora": (labels_77, ["--estimator", "lora"]),
    "labels-151": (labels_151, []),
    "labels-151-int8": (labels_151, ["--train", "lowrank+head", "--precision", "int8"]),
    "vocabulary": (large_vocabulary, []),
    "vocabulary-int8": (large_vocabulary, ["--precision", "int8", "--train", "lowrank+head"]),
}


def edgezo(*arguments: Any) -> tuple[dict[str, Any], int]:
    """What a command prints as JSON, and the peak of its process in bytes. SystemExit where it fails."""
    printed, peak_bytes = measured("-m", "edgezo", *arguments, "--json")
    return json.loads(printed), peak_bytes


def measured(*arguments: Any) -> tuple[str, int]:
    """What a Python process prints, and its peak in bytes. SystemExit where it fails."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run([sys.executable, "-c", PEAK, *command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command[1:])}:\n{done.stdout}{done.stderr}")
    printed, _, peak = done.stdout.strip().rpartition("\n")
    return printed, int(peak)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for rows, models and runs")
    parser.add_argument("--data-root", type=Path, required=True, help="folder of data sets")
    parser.add_argument("--cases", default=",".join(CASES), help="names, separated by commas")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    for name in given.cases.split(","):
        rows_of, options = CASES[name]
        rows = rows_of(given.out, given.data_root.resolve())
        model = [] if "--model" in rows else ["--model", TOKENIZER]
        request = [*model, *rows, *options]
        plan, _ = edgezo("plan", *request)
        for cap_bytes in (plan["planned_peak_bytes"], plan["smallest_bytes"]):
            run = given.out / "run"
            shutil.rmtree(run, ignore_errors=True)
            limits = [
                "--max-mem",
                f"{cap_bytes // 1_000_000 + SPARE_MB}MB",
                "--threads",
                given.threads,
            ]
            summary, peak = edgezo(
                "finetune", *request, *limits, "--steps", given.steps, "--out", run
            )
            sizes = (summary["planned_peak_bytes"], peak, summary["max_mem_bytes"])
            print(
                name,
                "planned {:.1f}, peak {:.1f}, cap {:.1f} MB".format(*(s / 1e6 for s in sizes)),
                flush=True,
            )


if __name__ == "__main__":
    main()

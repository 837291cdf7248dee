"""What does an exported ONNX classifier take in a process without torch, and does it answer as its run?

    python benchmarks/onnx_process.py EXPORT --prompts FILE [--labels FILE] [--threads 1]

EXPORT is what ``edgezo export RUN --format onnx`` wrote. ``--prompts`` has a JSON object a line with "prompt", as in
training, and maybe "label", the index of the right one; ``--labels`` has what ``edgezo predict RUN`` answered, a JSON
object a line with "label". Prints one JSON object: rows, accuracy, rows that are labelled as by the run, rows a second,
and the peak memory of the process (VmHWM), with what of it is anonymous.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer


def memory_bytes(name: str) -> int:
    """A figure of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("export", type=Path)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--labels", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    names = json.loads((args.export / "edgezo.json").read_text())["dataset"]["label_names"]
    rows = [json.loads(line) for line in args.prompts.read_text().splitlines()]
    tokenizer = Tokenizer.from_file(str(args.export / "tokenizer.json"))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = args.threads
    options.enable_cpu_mem_arena = False
    session = onnxruntime.InferenceSession(str(args.export / "model.onnx"), options)
    predicted = []
    begun_s = time.perf_counter()
    for row in rows:
        ids = np.array([tokenizer.encode(row["prompt"]).ids])
        fed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        predicted.append(int(session.run(None, fed)[0][0].argmax()))
    figures = {
        "export": args.export.name,
        "rows": len(rows),
        "rows_s": len(rows) / (time.perf_counter() - begun_s),
        "accuracy": float(
            np.mean([p == row["label"] for p, row in zip(predicted, rows, strict=True)])
        ),
        "peak_rss_bytes": memory_bytes("VmHWM"),
        "anonymous_bytes": memory_bytes("RssAnon"),
    }
    if args.labels:
        answers = [json.loads(line)["label"] for line in args.labels.read_text().splitlines()]
        figures["as_the_run"] = sum(names[p] == a for p, a in zip(predicted, answers, strict=True))
    assert "torch" not in sys.modules
    print(json.dumps(figures))


if __name__ == "__main__":
    main()

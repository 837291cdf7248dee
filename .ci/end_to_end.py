"""A real model from its card: fine-tuned for a few steps, killed, resumed, replayed, evaluated."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

EDGEZO = [sys.executable, "-m", "edgezo"]
MODEL = "smollm2-135m-instruct"
STEPS, KILL_AFTER, EVAL_ROWS, CAP_BYTES = 6, 4, 24, 900_000_000
DEADLINE_S = 900


def edgezo(*args: str) -> dict:
    """The JSON object that a command printed; a failure ends the check."""
    print("+ edgezo", *args, flush=True)
    done = subprocess.run([*EDGEZO, *args, "--json"], stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"edgezo {args[0]} exited with {done.returncode}: {done.stdout}")
    return json.loads(done.stdout)


def kill_after(lines: int, run: Path, request: list[str]) -> None:
    """Start a run and kill -9 it once its metrics hold that many lines (steps and evaluations)."""
    print("+ edgezo", *request, "(killed on the way)", flush=True)
    process = subprocess.Popen([*EDGEZO, *request], stdout=subprocess.DEVNULL)
    metrics, deadline_s = run / "metrics.jsonl", time.monotonic() + DEADLINE_S
    while not metrics.exists() or metrics.read_text().count("\n") < lines:
        if process.poll() is not None:
            sys.exit(f"the run ended by itself with {process.returncode}")
        if time.monotonic() > deadline_s:
            process.kill()
            sys.exit(f"no {lines} lines of metrics within {DEADLINE_S} s")
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="edgezo-ci-") as folder:
        run, rebuilt = Path(folder) / "run", Path(folder) / "rebuilt"
        request = ["finetune", "--model", MODEL, "--task", "example", "--max-mem", "900MB"]
        request += ["--steps", str(STEPS), "--eval-limit", str(EVAL_ROWS)]
        request += ["--snapshot-every", "2", "--out", str(run)]
        edgezo("plan", "--model", MODEL, "--max-mem", "900MB")
        kill_after(KILL_AFTER, run, request)
        summary = edgezo("finetune", "--resume", "--out", str(run))

        assert summary == json.loads((run / "summary.json").read_text())
        assert summary["steps"] == STEPS, summary
        assert summary["max_mem_bytes"] == CAP_BYTES, summary
        assert summary["peak_rss_bytes"] <= CAP_BYTES, summary
        assert summary["load_peak_rss_bytes"] <= summary["peak_rss_bytes"], summary
        assert 0 <= summary["eval_after"]["value"] <= 1, summary
        assert summary["eval_after"]["n"] == EVAL_ROWS, summary

        replayed = edgezo("replay", str(run), "--out", str(rebuilt))
        assert replayed["trained_sha256"] == summary["trained_sha256"], (replayed, summary)
        found = edgezo("eval", "--model", str(rebuilt), "--eval-limit", str(EVAL_ROWS))
        assert found["value"] == summary["eval_after"]["value"], (found, summary["eval_after"])
        print("end to end: killed, resumed, replayed and evaluated", flush=True)


if __name__ == "__main__":
    main()

"""How long does a step take beside other programs, for each way in which OpenMP's threads may wait?

    python benchmarks/busy.py [--busy 0 1 2 4] [--waits adapted libgomp none 1000] [--repeats 7] [--cores 0 1]

A process for each wait ("adapted": as edgezo has it; "libgomp": its own; "none": no spinning; a number: GOMP_SPINCOUNT)
holds SmolLM2-135M and makes a step when it is asked. A round asks each of them once, so that they meet the same
machine; the others sleep. Beside them run as many busy programs as ``--busy`` says, on the same ``--cores``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_STEPS = """
import sys, time
from edgezo.bench.alignment import point_config
from edgezo.bench.speed import _load
from edgezo.data.batches import batch_indices
import torch
torch.set_num_threads({threads})
request = {{"model": "smollm2-135m-instruct", "task": "example", "precision": "bf16", "train": "lowrank+head"}}
subject = _load("grzo", point_config(request, "grzo"))
train = subject.opened.dataset.train
group = [train[i] for i in batch_indices(len(train), 16, 0, 0)]
import contextlib
from edgezo.machine.busy_cores import beside_others
stack = contextlib.ExitStack()
if {adapted}:
    stack.enter_context(beside_others())
for turn, what in enumerate(sys.stdin):
    run = (lambda: subject.step(group, turn)) if what == "step\\n" else (lambda: subject.forward(group))
    begun_s = time.perf_counter()
    run()
    print(time.perf_counter() - begun_s, flush=True)
"""

ADAPTED = "adapted"
WAITS = {ADAPTED: {}, "libgomp": {}, "none": {"OMP_WAIT_POLICY": "PASSIVE"}}


class Stepper:
    """A process that makes a step, or a plain forward, when it is asked."""

    def __init__(self, wait: str, threads: int, cores: set[int]):
        env = {
            k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
        }
        env |= WAITS.get(wait, {"GOMP_SPINCOUNT": wait})
        command = [sys.executable, "-c", _STEPS.format(threads=threads, adapted=wait == ADAPTED)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=env, **pipes)
        os.sched_setaffinity(self.process.pid, cores)

    def seconds(self, what: str) -> float:
        """How long the next one takes."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())


@contextmanager
def busy(programs: int, cores: set[int]) -> Iterator[None]:
    """So many programs that never wait."""
    running = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(programs)
    ]
    for program in running:
        os.sched_setaffinity(program.pid, cores)
    try:
        yield
    finally:
        for program in running:
            program.kill()
            program.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--busy", nargs="+", type=int, default=[0, 1, 2, 4])
    parser.add_argument("--waits", nargs="+", default=[ADAPTED, "libgomp", "none", "1000"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cores", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--what", nargs="+", choices=["step", "forward"], default=["step"])
    args = parser.parse_args()
    cores = set(args.cores)
    steppers = {wait: Stepper(wait, args.threads, cores) for wait in args.waits}
    for stepper in steppers.values():
        stepper.seconds("step"), stepper.seconds("step")
    quiet: dict[tuple[str, str], float] = {}
    for programs in args.busy:
        times: dict[tuple[str, str], list[float]] = {}
        with busy(programs, cores):
            for wait in args.waits * 3:  # until what is adapted is
                steppers[wait].seconds("step")
            for _ in range(args.repeats):
                for what in args.what:
                    for wait, stepper in steppers.items():
                        times.setdefault((what, wait), []).append(stepper.seconds(what))
        for (what, wait), seconds in times.items():
            middle_s = statistics.median(seconds)
            quiet.setdefault((what, wait), middle_s)
            row = {"busy": programs, "what": what, "wait": wait, "median_s": round(middle_s, 4)}
            row |= {"least_s": round(min(seconds), 4), "most_s": round(max(seconds), 4)}
            row["of_quiet"] = round(middle_s / quiet[what, wait], 2)
            print(json.dumps(row), flush=True)
    for stepper in steppers.values():
        stepper.process.kill()


if __name__ == "__main__":
    main()

"""What a run on several processes costs and survives: speed, bytes on the wire, and kills.

    python benchmarks/ranks.py speed --out DIR      a step of one process against two, one thread each, by turns
    python benchmarks/ranks.py wire --out DIR       two network namespaces: bytes by the run's count and the interface's
    python benchmarks/ranks.py kills --out DIR      SIGKILL of rank 0 and of rank 1 at random moments, then a resume

speed and wire train SmolLM2-135M-Instruct on the bundled rows; kills trains a tiny random model of the tests. wire
needs root, since it makes two namespaces and a pair of interfaces between them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from kills import make_inputs

CARD = "finetune --model smollm2-135m-instruct --task example --train lowrank --max-mem 900MB --threads 1"
ONE, TWO = "edgezo-one", "edgezo-two"  # names of namespaces
ADDRESSES = {ONE: "10.77.0.1", TWO: "10.77.0.2"}


def port() -> int:
    return random.randrange(20_000, 60_000)


def started(
    arguments: Sequence[str],
    size: int,
    folder: Path,
    *,
    address: str = "127.0.0.1",
    before: Sequence[Sequence[str]] = (),
) -> list[subprocess.Popen[bytes]]:
    """``edgezo ARGUMENTS`` in ``size`` processes; ``before``: what each command begins with."""
    at, processes = str(port()), []
    for rank in range(size):
        launcher = {
            "RANK": str(rank),
            "WORLD_SIZE": str(size),
            "MASTER_ADDR": address,
            "MASTER_PORT": at,
        }
        command = [*(before[rank] if before else ()), sys.executable, "-m", "edgezo", *arguments]
        with (folder / f"printed{rank}").open("wb") as printed:
            environment = os.environ | (launcher if size > 1 else {})
            processes.append(
                subprocess.Popen(command, env=environment, stdout=printed, stderr=subprocess.STDOUT)
            )
    return processes


def finished(processes: Sequence[subprocess.Popen[bytes]], folder: Path) -> None:
    """Wait for them; ends this program where one has failed."""
    for rank, process in enumerate(processes):
        if process.wait():
            sys.exit(
                f"process {rank} ended with {process.returncode}:\n"
                + (folder / f"printed{rank}").read_text()[-900:]
            )


def step_s(run: Path) -> float:
    """The median seconds of a step, the first two left out."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return statistics.median([line["step_s"] for line in lines if "step_s" in line][2:])


def speed(folder: Path, rounds: int, steps: int) -> None:
    """Examples a second of one and of two processes, by turns."""
    ratios = []
    for number in range(rounds):
        took = []
        for size in (1, 2):
            run = folder / f"round{number}-{size}"
            options = f"{CARD} --steps {steps} --micro-batch 8 --eval-limit 16 --out {run}"
            finished(started(options.split(), size, folder), folder)
            took.append(step_s(run))
        ratios.append(took[0] / took[1])
        print(json.dumps({"one_s": took[0], "two_s": took[1], "speedup": ratios[-1]}), flush=True)
    print(
        f"speedup {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}), {rounds} rounds"
    )


def wire(folder: Path, steps: int) -> None:
    """Bytes of a step between two namespaces, as the run counts them and as the interface does."""

    def ip(words: str, check: bool = True) -> None:
        subprocess.run(["ip", *words.split()], check=check)

    def moved() -> int:
        files = (f"/sys/class/net/ez2/statistics/{way}_bytes" for way in ("tx", "rx"))
        inside = ["ip", "netns", "exec", TWO, "cat", *files]
        return sum(map(int, subprocess.run(inside, capture_output=True, check=True).stdout.split()))

    try:
        for name in ADDRESSES:
            ip(f"netns add {name}")
        ip(f"link add ez1 netns {ONE} type veth peer name ez2 netns {TWO}")
        for name, link in ((ONE, "ez1"), (TWO, "ez2")):
            ip(f"-n {name} addr add {ADDRESSES[name]}/24 dev {link}")
            ip(f"-n {name} link set {link} up")
            ip(f"-n {name} link set lo up")
        inside = [
            ["ip", "netns", "exec", name, "env", f"GLOO_SOCKET_IFNAME={link}"]
            for name, link in ((ONE, "ez1"), (TWO, "ez2"))
        ]
        counts, interface = [], []
        for n in (steps, 2 * steps):  # the difference is that of the steps alone
            before, run = moved(), folder / f"wire{n}"
            options = (
                f"{CARD} --steps {n} --micro-batch 8 --eval-limit 4 --schedule constant --out {run}"
            )
            finished(
                started(options.split(), 2, folder, address=ADDRESSES[ONE], before=inside), folder
            )
            interface.append(moved() - before)
            summary = json.loads(Path(f"{run}.rank1", "summary.json").read_text())["processes"]
            counts.append(summary["sent_bytes"] + summary["received_bytes"])
        counted, crossed = ((after - before) / steps for before, after in (counts, interface))
        print(
            f"a step of 16 examples, rank 1, both directions: {counted:.1f} bytes by the run's count "
            f"(64 + 8 B = {64 + 8 * 16}), {crossed:.0f} on the interface"
        )
    finally:
        for name in ADDRESSES:
            ip(f"netns del {name}", check=False)


def kills(folder: Path, number: int, seed: int) -> None:
    """Kill one process of two at a random moment, go on with both, and compare with a run that nothing disturbed."""
    draw, options = (
        random.Random(seed),
        [*make_inputs(folder), "--steps", "40", "--micro-batch", "2"],
    )
    request = ["finetune", *options, "--train", "probe+lowrank", "--precision", "bf16"]
    whole = folder / "whole"
    begun = time.monotonic()
    finished(started([*request, "--out", str(whole)], 2, folder), folder)
    whole_s = time.monotonic() - begun
    names = ("trained_sha256", "steps", "eval_before", "eval_after")

    def end(run: str) -> dict[str, object]:
        summary = json.loads(Path(run, "summary.json").read_text())
        return {name: summary[name] for name in names} | {
            "journal": Path(run, "journal.bin").read_bytes()
        }

    expected, delivered, equal = end(str(whole)), 0, 0
    for at in range(number):
        run = folder / f"killed{at}"
        processes = started([*request, "--out", str(run)], 2, folder)
        time.sleep(draw.uniform(0.3, 1.0) * whole_s)
        victim = processes[at % 2]
        victim.send_signal(signal.SIGKILL)
        delivered += victim.wait() == -signal.SIGKILL
        processes[1 - at % 2].wait()  # it ends by itself, since the other is gone
        finished(started([*request, "--resume", "--out", str(run)], 2, folder), folder)
        same = end(str(run)) == expected == end(f"{run}.rank1")
        equal += same
        print(
            json.dumps({"killed": f"rank {at % 2}", "exit": victim.returncode, "equal": same}),
            flush=True,
        )
    print(
        f"{delivered} of {number} kills delivered, {equal} of {number} runs equal to the undisturbed one at both ranks"
    )
    sys.exit(equal != number)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["speed", "wire", "kills"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    os.environ["EDGEZO_CACHE"] = os.environ.get("EDGEZO_CACHE", "") or str(args.out / "cache")
    if args.what == "speed":
        speed(args.out, args.rounds, args.steps)
    elif args.what == "wire":
        wire(args.out, args.steps)
    else:
        kills(args.out, args.kills, args.seed)


if __name__ == "__main__":
    main()

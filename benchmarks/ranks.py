"""What a run on several processes costs and survives: speed, bytes on the wire, and kills.

    python benchmarks/ranks.py speed --out DIR      a step of one process against two, one thread each, by turns
    python benchmarks/ranks.py wire --out DIR       two network namespaces: bytes by the run's count and the interface's
    python benchmarks/ranks.py equal --out DIR      journals of 1, 2 and 4 processes; --rate and --delay: a slow link
    python benchmarks/ranks.py kills --out DIR      SIGKILL of rank 0 and of rank 1 at random moments, then a resume
    python benchmarks/ranks.py restarts --out DIR   the same kills under torchrun, which starts both again

speed and wire train SmolLM2-135M-Instruct on the bundled rows; the others a tiny random model of the tests. wire and
equal --rate need root, since they make network namespaces with links between them.
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
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent))
import slow_link
from kills import CONTEXT, command_line, make_inputs

from edgezo.errors import EdgezoError
from edgezo.network.cards import resolve
from edgezo.run.journal import open_journal

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


def speed(folder: Path, rounds: int, steps: int, micro_batch: int) -> None:
    """Examples a second of one and of two processes with the same micro-batches, by turns."""
    ratios = []
    for number in range(rounds):
        took = []
        for size in (1, 2):
            run = folder / f"round{number}-{size}"
            options = (
                f"{CARD} --steps {steps} --micro-batch {micro_batch} --eval-limit 16 --out {run}"
            )
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
        resolve("smollm2-135m-instruct")  # from the namespaces nothing can be fetched
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


# Parts and precisions whose journals are compared.
TRAINED = {
    "low-rank factors, fp32": "--train lowrank --precision fp32",
    "low-rank factors, bf16": "--train lowrank --precision bf16",
    "linear probe and low-rank factors, bf16": "--train probe+lowrank --precision bf16",
}


class Trial:
    """Runs of a tiny model in processes that start with everything imported."""

    def __init__(self, folder: Path, steps: int):
        self.folder, self.steps = folder, steps
        self.inputs = [*make_inputs(folder), "--steps", str(steps), "--micro-batch", "1"]

    def started(
        self, request: Sequence[str], size: int, addresses: Mapping[str, str] | None = None
    ) -> list[Any]:
        """One process for each rank; with ``addresses`` each in the network namespace of that name."""
        at, processes = str(port()), []
        for rank in range(size):
            launcher = {
                "RANK": str(rank),
                "WORLD_SIZE": str(size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": at,
            }
            inside = None
            if addresses is not None:
                inside = [*addresses][rank]
                launcher |= {
                    "MASTER_ADDR": next(iter(addresses.values())),
                    "GLOO_SOCKET_IFNAME": slow_link.DEVICE,
                }
            arguments = (
                ["finetune", *request],
                str(self.folder / f"printed{rank}"),
                launcher if size > 1 else {},
                inside,
            )
            process = CONTEXT.Process(target=as_rank, args=arguments)
            process.start()
            processes.append(process)
        return processes

    def finished(self, processes: Sequence[Any]) -> None:
        """Wait for them; ends this program where one has failed."""
        for rank, process in enumerate(processes):
            process.join()
            if process.exitcode:
                printed = (self.folder / f"printed{rank}").read_text()[-900:]
                sys.exit(f"process {rank} ended with {process.exitcode}:\n{printed}")

    def ends(self, run: Path, size: int) -> list[dict[str, Any]]:
        """What has to be the same of a run at each of its ranks; {} of one that has not ended."""
        return [end(Path(f"{run}.rank{rank}" if rank else run)) for rank in range(size)]


def as_rank(
    request: list[str], printed: str, launcher: Mapping[str, str], inside: str | None
) -> None:
    """A command line, with what a launcher says in the environment, and in a network namespace."""
    os.environ.update(launcher)
    if inside is not None:
        slow_link.enter(inside)
    command_line(request, printed)


def end(run: Path) -> dict[str, Any]:
    """What has to be the same of a run that has ended; {} where it has not."""
    file = run / "summary.json"
    if not file.exists():
        return {}
    summary = json.loads(file.read_text())
    names = ("trained_sha256", "steps", "eval_before", "eval_after")
    return {name: summary[name] for name in names} | {"journal": (run / "journal.bin").read_bytes()}


def equal(folder: Path, steps: int, rate: float, delay_s: float) -> None:
    """Journal, weights and evaluations of 2 and 4 processes beside those of one, over loopback or a slow link."""
    trial, wrong = Trial(folder, steps), 0
    for number, (name, options) in enumerate(TRAINED.items()):
        request = [*trial.inputs, *options.split()]
        one = folder / f"{number}-1"
        trial.finished(trial.started([*request, "--out", str(one)], 1))
        for size in (2, 4):
            run = folder / f"{number}-{size}"
            carried_bytes = 0
            if rate:
                with slow_link.namespaces(size, rate, delay_s) as (link, addresses):
                    trial.finished(trial.started([*request, "--out", str(run)], size, addresses))
                    carried_bytes = link.carried_bytes
            else:
                trial.finished(trial.started([*request, "--out", str(run)], size))
            same = trial.ends(run, size) == [end(one)] * size
            wrong += not same
            row = {"trained": name, "processes": size, "equal": same}
            print(json.dumps(row | ({"carried_bytes": carried_bytes} if rate else {})), flush=True)
    sys.exit(wrong)


def kills(folder: Path, number: int, seed: int, steps: int) -> None:
    """Kill one process of two at a random moment, go on with both, and compare with a run that nothing disturbed."""
    draw, trial = random.Random(seed), Trial(folder, steps)
    request = [*trial.inputs, "--train", "probe+lowrank", "--precision", "bf16"]
    whole = folder / "whole"
    trial.finished(trial.started([*request, "--out", str(folder / "first")], 2))  # imports, caches
    begun = time.monotonic()
    trial.finished(trial.started([*request, "--out", str(whole)], 2))
    whole_s = time.monotonic() - begun
    expected, delivered, same_ones = trial.ends(whole, 2), 0, 0
    for at in range(number):
        run = folder / f"killed{at}"
        processes = trial.started([*request, "--out", str(run)], 2)
        time.sleep(draw.uniform(0.05, 1.0) * whole_s)
        victim = processes[at % 2]
        victim.kill()
        victim.join()
        other = processes[1 - at % 2]
        other.join(60)  # it ends by itself, unless the victim was gone before they met
        other.kill()
        other.join()
        delivered += victim.exitcode == -signal.SIGKILL
        after = steps_of(run if at % 2 else Path(f"{run}.rank1"))
        trial.finished(trial.started([*request, "--resume", "--out", str(run)], 2))
        same = trial.ends(run, 2) == expected
        same_ones += same
        row = {"killed": f"rank {at % 2}", "exit": victim.exitcode, "after_step": after}
        print(json.dumps(row | {"equal": same}), flush=True)
    print(
        f"{delivered} of {number} kills delivered, {same_ones} of {number} runs equal at both ranks"
    )
    sys.exit(same_ones != number)


def restarts(folder: Path, number: int, seed: int, steps: int) -> None:
    """As ``kills``, under torchrun, which starts both processes again by itself."""
    draw, trial = random.Random(seed), Trial(folder, steps)
    request = [*trial.inputs, "--train", "lowrank", "--precision", "bf16", "--resume"]
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2 --max-restarts 1 -m edgezo finetune"

    def begun(run: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, *torchrun.split(), *request, "--out", str(run)]
        with run.with_suffix(".printed").open("wb") as printed:
            return subprocess.Popen(command, stdout=printed, stderr=subprocess.STDOUT)

    whole = folder / "whole"
    begun_s = time.monotonic()
    if begun(whole).wait():
        sys.exit(whole.with_suffix(".printed").read_text()[-900:])
    whole_s = time.monotonic() - begun_s
    expected, delivered, same_ones = trial.ends(whole, 2), 0, 0
    for at in range(number):
        run, victim = folder / f"killed{at}", None
        launcher = begun(run)
        moment = time.monotonic() + draw.uniform(0.4, 1.0) * whole_s
        while launcher.poll() is None and (victim is None or time.monotonic() < moment):
            victim = worker(launcher.pid, at % 2)
            time.sleep(0.05)
        after = steps_of(run if at % 2 else Path(f"{run}.rank1"))
        with suppress(psutil.Error):
            if victim is not None:
                victim.kill()
                delivered += 1
        code = launcher.wait()
        same = not code and trial.ends(run, 2) == expected
        same_ones += same
        row = {"killed": f"rank {at % 2}", "after_step": after, "torchrun": code, "equal": same}
        print(json.dumps(row), flush=True)
    print(f"{delivered} of {number} kills delivered, {same_ones} of {number} runs equal")
    sys.exit(same_ones != number)


def worker(launcher: int, rank: int) -> psutil.Process | None:
    """The process of a rank that a torchrun has started."""
    with suppress(psutil.Error):
        for process in psutil.Process(launcher).children():
            with suppress(psutil.Error):
                if process.environ().get("RANK") == str(rank):
                    return process
    return None


def steps_of(run: Path) -> int:
    """Steps in the journal of a run as it is; -1 where it has none."""
    try:
        with open_journal(run / "journal.bin", resume=False) as journal:
            return journal.next_step
    except (EdgezoError, OSError):
        return -1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["speed", "wire", "equal", "kills", "restarts"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="8 of speed and wire, else 24")
    parser.add_argument("--micro-batch", type=int, default=4, help="of speed, of 16 examples")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument(
        "--rate", type=float, default=0.0, help="bits a second of each process; 0: loopback"
    )
    parser.add_argument(
        "--delay", type=float, default=0.1, help="seconds that a packet takes, with --rate"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    os.environ["EDGEZO_CACHE"] = os.environ.get("EDGEZO_CACHE", "") or str(args.out / "cache")
    many = args.steps or 24
    if args.what == "speed":
        speed(args.out, args.rounds, args.steps or 8, args.micro_batch)
    elif args.what == "wire":
        wire(args.out, args.steps or 8)
    elif args.what == "equal":
        equal(args.out, many, args.rate, args.delay)
    elif args.what == "kills":
        kills(args.out, args.kills, args.seed, many)
    else:
        restarts(args.out, args.kills, args.seed, many)


if __name__ == "__main__":
    main()

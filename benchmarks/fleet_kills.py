"""Does a fleet whose processes are killed at random moments end as a run of one process? Kills over Flower.

    python benchmarks/fleet_kills.py --out DIR [--kills 10] [--devices 2] [--seed 0]

It needs flwr (the extra `flower`). One run over real Flower processes on loopback: by turns SIGKILL goes to a device's
process, the server's (ServerApp), a SuperNode, and the SuperLink; --kills to the device's two, and as many to the
server's. Each comes at a random moment after a step, and what is gone is started again. At the end the journals of the
server and of all devices, and the weights that replays give, are compared with those of `edgezo finetune` over all
rows. The model is a tiny random one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
from ranks import steps_of

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("anna", "bert", "cleo", "dora")
PORT = 9290  # of the SuperLink; those of the SuperNodes follow
PATIENCE_S = 900.0
# What is killed by turns: of the device's side, then of the server's.
VICTIMS = ("device", "ServerApp", "SuperNode", "SuperLink")


class Fleet:
    """The processes of a fleet, each started again when it is gone."""

    def __init__(self, folder: Path, devices: int):
        self.folder, self.names = folder, NAMES[:devices]
        self.sockets = Path(tempfile.mkdtemp())  # a socket's path has to be short
        self.programs = Path(sys.executable).parent
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        home = folder / "flower"
        home.mkdir()
        at = f'address = "127.0.0.1:{PORT}"\ninsecure = true\n'
        (home / "config.toml").write_text(f'[superlink]\ndefault = "here"\n[superlink.here]\n{at}')
        path = f"{self.programs}:{os.environ['PATH']}"
        where = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        self.environment = os.environ | {"PATH": path, "PYTHONPATH": where, "FLWR_HOME": str(home)}
        self.environment |= {"FLWR_TELEMETRY_ENABLED": "0", "OMP_NUM_THREADS": "1"}

    def commands(self) -> dict[str, list[str]]:
        """What runs all the time, by name, in the order in which it starts."""
        commands = {}
        for name in self.names:
            script, settings = ROOT / "scripts/fleet/device.py", self.folder / f"{name}.toml"
            place = ["--name", name, "--socket", str(self.sockets / name)]
            commands[f"device {name}"] = [sys.executable, str(script), str(settings), *place]
        options = ["--insecure", "--port", str(PORT), "--disable-runtime-dependency-installation"]
        commands["SuperLink"] = [str(self.programs / "flower-superlink"), *options]
        for number, name in enumerate(self.names):
            options = ["--insecure", "--superlink", f"127.0.0.1:{PORT}"]
            options += ["--port", str(PORT + 1 + number)]
            options += ["--node-config", f'device="{self.sockets / name}"']
            commands[f"SuperNode {name}"] = [str(self.programs / "flower-supernode"), *options]
        directory = f'directory="{self.folder / "server"}"'
        rules = f"{directory} devices={len(self.names)} patience_s={PATIENCE_S}"
        app = ["run", str(ROOT / "scripts/fleet/app"), "here", "--run-config", rules, "--stream"]
        commands["run"] = [str(self.programs / "flwr"), *app]
        return commands

    def keep(self) -> None:
        """Start what is not running."""
        for name, command in self.commands().items():
            process = self.running.get(name)
            if process is not None and process.poll() is None:
                continue
            if name == "run" and self.server_app() is not None:
                continue  # the stream of its output has ended, not the run
            with (self.folder / f"{name}.log").open("ab") as log:
                self.running[name] = subprocess.Popen(
                    command, env=self.environment, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT
                )
            self._started(name)

    def _started(self, name: str) -> None:
        """Wait until a process can be asked, or is gone."""
        while self.running[name].poll() is None:
            if name.startswith("device") and (self.sockets / name.split()[1]).is_socket():
                return
            if name == "SuperLink" and listens(PORT):
                return
            if name.startswith("SuperNode") or name == "run":
                return
            time.sleep(0.2)

    def server_app(self) -> psutil.Process | None:
        """The process of the ServerApp, which the SuperLink starts."""
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                words = process.cmdline()
                if f"127.0.0.1:{PORT}" in words and "flwr-serverapp" in " ".join(words):
                    return process
        return None

    def kill(self, victim: str, name: str) -> bool:
        """SIGKILL; whether there was a process to kill."""
        if victim == "ServerApp":
            process = self.server_app()
            if process is not None:
                process.kill()
                self.running["run"].kill()  # its stream would wait for the SuperLink to notice
            return process is not None
        process = self.running[victim if victim == "SuperLink" else f"{victim} {name}"]
        there = process.poll() is None
        process.kill()
        process.wait()
        if victim == "SuperLink":
            self.running["run"].kill()
        return there

    def stop(self) -> None:
        """End all of them, and what they have started."""
        for process in reversed(self.running.values()):
            with suppress(psutil.Error):
                below = psutil.Process(process.pid).children(recursive=True)
                for each in (*below, process):
                    each.kill()
            process.wait()


def listens(port: int) -> bool:
    import socket

    with socket.socket() as link:
        return link.connect_ex(("127.0.0.1", port)) == 0


def edgezo(*words: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "edgezo", *words], check=True, capture_output=True, cwd=ROOT
    )


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=10, help="of each side")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder, draw, steps = args.out.resolve(), random.Random(args.seed), 2 * args.kills + 4
    made = [str(ROOT / "scripts/fleet/demo_files.py"), str(folder), "--model", "tiny"]
    made += ["--steps", str(steps), "--devices", str(args.devices)]
    subprocess.run([sys.executable, *made], check=True)
    begin = ROOT / "scripts/fleet/begin.py"
    subprocess.run([sys.executable, str(begin), str(folder / "server.toml")], check=True)
    server, fleet = folder / "server", Fleet(folder, args.devices)
    runs = [folder / name for name in fleet.names]
    delivered = dict.fromkeys(VICTIMS, 0)
    last, moment, step_s, begun_s = 0, 0.0, 1.0, time.monotonic()
    try:
        while min(map(steps_of, (server, *runs))) < steps:
            fleet.keep()
            now, at = time.monotonic(), steps_of(server)
            if at > last:
                step_s = (now - begun_s) / (at - last)
                last, begun_s, moment = at, now, now + draw.uniform(0.0, step_s)
            kills = sum(delivered.values())
            if moment and now >= moment and kills < 2 * args.kills and at < steps:
                victim, name = VICTIMS[kills % 4], draw.choice(fleet.names)
                killed = fleet.kill(victim, name)
                delivered[victim] += killed
                row = {"killed": victim, "device": name, "after_step": at, "delivered": killed}
                print(json.dumps(row), flush=True)
                moment = 0.0
            time.sleep(0.2)
    finally:
        fleet.stop()
    edgezo("finetune", "--config", str(folder / "one.toml"), "--threads", "1")
    one, every = folder / "one", (server, *runs)
    journals = [digest(run / "journal.bin") == digest(one / "journal.bin") for run in every]
    weights = []
    for run in (one, *runs):
        edgezo("replay", str(run), "--out", f"{run}-replayed")
        weights.append(digest(Path(f"{run}-replayed", "trained.safetensors")))
    replayed = [weight == weights[0] for weight in weights[1:]]
    print(f"kills delivered: {delivered}; {steps} steps")
    print(f"journals of server and devices equal: {journals}; weights of devices: {replayed}")
    sys.exit(not all(journals + replayed))


if __name__ == "__main__":
    main()

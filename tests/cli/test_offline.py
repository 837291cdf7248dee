"""Everything local runs with the network cut, and asks for nothing: every attempt to reach a host fails the test."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Refuse every address and host name; returns what was asked for."""
    asked: list[str] = []

    def refuse(*args: Any, **more: Any) -> Any:
        asked.append(f"{args} {more}")
        raise OSError("the network is cut")

    def connect(self: socket.socket, address: Any) -> Any:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            refuse(address)
        return real(self, address)

    real = socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket.socket, "connect_ex", connect)
    for name in ("getaddrinfo", "gethostbyname", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    return asked


def test_a_run_from_its_plan_to_its_export_asks_for_nothing(bench, edgezo, no_network, tmp_path):
    run, request = tmp_path / "run", bench.arguments(steps=2, train="lowrank+head")
    for command in (
        ["models"],
        ["estimators"],
        ["plan", "--model", "smollm2-135m-instruct", "--max-mem", "900MB"],
        ["finetune", *request, "--dry-run"],
        ["finetune", *request, "--show-batch"],
        ["finetune", *request, "--out", run],
        ["finetune", "--resume", "--out", run],
        ["eval", "--model", run],
        ["eval", *bench.arguments(steps=None, batch_size=None, micro_batch=None)],
        ["replay", run, "--out", tmp_path / "replayed"],
        ["export", run, "--out", tmp_path / "hf"],
        ["export", run, "--format", "peft", "--out", tmp_path / "peft"],
        ["eval", "--model", tmp_path / "hf", "--data", bench.data / "text.jsonl"],
    ):
        code, _, err = edgezo(*command)
        assert code == 0, (command, err)
    assert no_network == []


@pytest.mark.parametrize("command", ["plan", "finetune"])
def test_rows_are_planned_for_a_card_that_is_not_here(
    command, edgezo, no_network, monkeypatch, tmp_path
):
    monkeypatch.setenv("EDGEZO_CACHE", str(tmp_path / "empty"))
    asked = ["--model", "llama-3.2-1b", "--task", "example", "--max-mem", "8GB", "--device", "cpu"]
    code, out, err = edgezo(command, *asked, *(["--dry-run"] if command == "finetune" else []))
    assert code == 0 and "longest of the data, by their characters" in " ".join(out.split()), err
    assert "is not on this machine, and a plan fetches no weights" in " ".join(err.split())
    assert no_network == [] and not (tmp_path / "empty" / "models").exists()


def test_a_hub_id_that_is_not_cached_is_one_clear_error(edgezo, no_network):
    code, _, err = edgezo("plan", "--model", "nobody/nothing", "--task", "example")
    assert code == 1 and "nobody/nothing" in err and "Traceback" not in err


@pytest.mark.skipif(shutil.which("unshare") is None, reason="there is no unshare here")
def test_the_command_runs_in_a_namespace_without_a_network(bench, tmp_path):
    """As above, for code that would not go through Python's sockets."""
    alone = ["unshare", "--net", "--map-root-user"]
    if subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("this machine allows no network namespace")
    done = subprocess.run(
        [
            *(*alone, sys.executable, "-m", "edgezo", "finetune"),
            *bench.arguments(steps=1, train="head", threads=1, out=tmp_path / "run"),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert Path(tmp_path / "run" / "summary.json").exists()

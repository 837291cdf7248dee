"""Every command that writes is killed, and finds the disk full, at each call that changes a file.

A file is then as it was, or whole. The same command, or --resume where a run has begun, then ends with the same bytes
as if nothing had happened, and nothing else lies there. A disk that is full is one error with the file, the free bytes
and the way out.

``scripts/test tests/run/test_every_write.py --every-point`` tries every call; without it some are drawn.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Bench
from safetensors import safe_open
from write_points import FULL, KILL_WITHIN, KILLS, Ended, Point, Points, answers, compile_points
from writers import WRITERS, Tools

# bench memory, speed and accuracy measure for long, in children; what they write is what bench alignment writes.
# One resume is enough: the options of the others are those of a run.
# What rm leaves where it is killed is in tests/run/test_report.py.
NAMES = [n for n in WRITERS if not n.startswith(("bench", "resume", "rm")) or n == "resume alone"]
# What a clock or the memory decides; of these the keys below are compared.
VARYING = {"plan.json", "summary.json", "profile.json", "metrics.jsonl", "probe.safetensors"}
VARYING |= {"report.html"}
KEPT = ("trained_sha256", "steps", "eval_before", "eval_after", "loss_first", "loss_last")
# A measurement or a page that cannot be written fails no run.
MAY_BE_LOST = {"profile.json", "report.html"}


@pytest.fixture(scope="module")
def points(own_cache, tmp_path_factory) -> Iterator[Points]:
    scratch = tmp_path_factory.mktemp("points")
    library = compile_points(scratch)
    if library is None:
        pytest.skip("no C compiler, or no Linux")
    folder = scratch / "watched"
    folder.mkdir()
    points = Points.start(library, folder, scratch)
    yield points
    points.stop()


@pytest.fixture(scope="module")
def tools(points, bench: Bench, tmp_path_factory) -> Tools:
    folder = tmp_path_factory.mktemp("tools")
    request = bench.arguments(steps=2, train="lowrank+head", out=folder / "run")
    assert points.command(["finetune", *request]).code == 0
    return Tools.around(bench, folder / "run")


@pytest.fixture(scope="module")
def begun(points, tools, tmp_path_factory) -> Path:
    """A run that was killed within its second record."""
    folder = points.folder / "out"
    settings = {"steps": 3, "train": "lowrank+head", "snapshot_every": 1}
    request = ["finetune", *tools.bench.arguments(**settings), "--out", folder]
    assert points.command(request).code == 0
    writes = [n for n, p in enumerate(points.points(), 1) if p[::2] == ("write", "out/journal.bin")]
    shutil.rmtree(folder)
    assert points.command(request, writes[1], KILL_WITHIN).code == -signal.SIGKILL
    kept = tmp_path_factory.mktemp("begun") / "out"
    shutil.move(folder, kept)
    return kept


class Tried:
    """One writer, in a folder that is made anew for every trial."""

    def __init__(self, name: str, points: Points, tools: Tools, begun: Path):
        self.name, self.points, self.tools, self.begun = name, points, tools, begun
        self.writer, self.out = WRITERS[name], points.folder / "out"
        first = self.fresh()
        assert first.code == 0, first.err
        self.calls, self.expected = points.points(), outcome(points.folder)

    def arguments(self) -> list[object]:
        return [*self.writer.command.split(), *self.writer.arguments(self.tools, self.out)]

    def fresh(self, at: int = 0, answer: int = 0) -> Ended:
        shutil.rmtree(self.points.folder)
        self.points.folder.mkdir()
        if self.name == "resume alone" or self.writer.command == "report":
            shutil.copytree(self.begun, self.out)
        return self.points.command(self.arguments(), at, answer)

    def again(self) -> Ended:
        """What a user does next."""
        goes_on = self.writer.command == "finetune" and (self.out / "config.toml").exists()
        return self.points.command(
            ["finetune", "--resume", "--out", self.out] if goes_on else self.arguments()
        )

    def end(self, where: str) -> None:
        ended = self.again()
        if ended.code == 2 and self.writer.file and self.out.exists():
            # A whole file is not replaced. meta-train writes one before its first step, too.
            assert "Remove it" in ended.err, (where, ended)
            self.out.unlink()
            ended = self.again()
        if ended.code == 2 and self.writer.command == "export":  # it was whole already
            return self.check_outcome(where)
        assert ended.code == 0, (where, ended)
        return self.check_outcome(where)

    def check_outcome(self, where: str) -> None:
        found = outcome(self.points.folder)
        lost = {f"out/{name}" for name in MAY_BE_LOST}
        differ = {n for n in found.keys() | self.expected if found.get(n) != self.expected.get(n)}
        assert differ <= lost, (where, differ)


def outcome(folder: Path) -> dict[str, Any]:
    """Every file and folder, with all of it that must be the same each time."""
    found: dict[str, Any] = {}
    for path in folder.rglob("*"):
        if path.name.startswith("journal-cut-"):
            continue
        kept: Any = path.read_bytes() if path.is_file() else None
        if path.name == "summary.json":
            kept = [json.loads(kept).get(key) for key in KEPT]
        elif path.name in VARYING or path.suffix == ".overlay":
            kept = "there"
        found[str(path.relative_to(folder))] = kept
    return found


def check_whole(folder: Path, where: str) -> None:
    """Files that are replaced are whole, whatever is there. Those that are written in place are a resume's to check."""
    for path in folder.rglob("*"):
        if ".edgezo-tmp" in str(path.relative_to(folder)) or not path.is_file():
            continue
        try:
            if path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".toml":
                tomllib.loads(path.read_text())
            elif path.suffix == ".safetensors":
                with safe_open(path, "pt") as file:
                    assert file.keys()
        except Exception as problem:
            pytest.fail(f"{where}: {path.name} is not whole: {problem}")


@pytest.fixture(scope="module")
def tried(request, points, tools, begun) -> Tried:
    return Tried(request.param, points, tools, begun)


def drawn(request: pytest.FixtureRequest, trials: list[Any], count: int, name: str) -> list[Any]:
    if request.config.getoption("every_point"):
        return trials
    return random.Random(name).sample(trials, min(count, len(trials)))


def place(point: Point, at: int) -> str:
    return f"point {at}: {point.call} {point.file}"


each_writer = pytest.mark.parametrize("tried", NAMES, indirect=True, scope="module")


def all_of(trial: Any, trials: list[tuple[Any, ...]]) -> None:
    """Make every trial, and fail with all that was wrong."""
    problems = []
    for values in trials:
        try:
            trial(*values)
        except AssertionError as problem:
            problems.append(str(problem).partition("\nassert")[0])
    assert not problems, f"{len(problems)} of {len(trials)}:\n" + "\n".join(problems)


@each_writer
def test_a_command_that_is_killed_at_any_write_is_given_again_and_ends_the_same(tried, request):
    def kill(at: int, point: Point, answer: int) -> None:
        where = f"{tried.name}, killed {KILLS[answer]} {place(point, at)}"
        assert tried.fresh(at, answer).code == -signal.SIGKILL, where
        check_whole(tried.points.folder, where)
        tried.end(where)

    trials = [(n, p, answer) for n, p in enumerate(tried.calls, 1) for answer in answers(p)]
    all_of(kill, drawn(request, trials, 1, tried.name))


@each_writer
def test_a_disk_that_is_full_from_any_write_on_is_one_error_and_there_is_a_way_on(tried, request):
    def fill(at: int, point: Point) -> None:
        where = f"{tried.name}, full at {place(point, at)}"
        ended = tried.fresh(at, FULL)
        assert "Traceback" not in ended.err, (where, ended.err)
        check_whole(tried.points.folder, where)
        left = [p for p in tried.points.folder.rglob("*") if ".edgezo-tmp" in str(p)]
        assert not left, (where, left)
        if not ended.code:  # nothing needed room after it
            return tried.check_outcome(where)
        assert (ended.code, ended.out) == (1, ""), (where, ended)
        shown = " ".join(ended.err.split())
        for part in (str(tried.points.folder), "bytes are free", "--resume"):
            assert part in shown, (where, part, ended.err)
        return tried.end(where)

    all_of(fill, drawn(request, list(enumerate(tried.calls, 1)), 1, tried.name))


def test_every_kind_of_file_is_struck(points, tools, begun):
    """The table of writers covers all of a run's files: one that no point belongs to would be tried by none."""
    names = {"config.toml", "plan.json", "journal.bin", "metrics.jsonl", "summary.json"}
    tried = Tried("finetune", points, tools, begun)
    assert names <= {os.path.basename(point.file) for point in tried.calls}

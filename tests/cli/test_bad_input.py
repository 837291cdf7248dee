"""Whatever is wrong: one screen that names it, the right exit code, and nothing half-written."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import forks
import pytest
import tiny_models
from conftest import Bench, make_model, write_rows

from edgezo.machine.ownership import MARKER
from edgezo.plan.request import make_config
from edgezo.run.train import finetune

SCREEN_LINES = 25


def assert_one_screen(out: str, err: str) -> None:
    assert out == "" and "Traceback" not in err
    message = err[err.index("edgezo: ") :]  # notes of what went well may stand before it
    assert 0 < message.count("\n") < SCREEN_LINES, err


def flat(text: str) -> str:
    return " ".join(text.split())


def flip(file: Path, at: int, mask: int = 0xFF) -> Path:
    """Change one byte in place."""
    data = bytearray(file.read_bytes())
    data[at] ^= mask
    file.write_bytes(data)
    return file


def cut(file: Path, size: float) -> Path:
    """Keep that share of the bytes."""
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * size)])
    return file


# ---------------------------------------------------------------------------------------------
# Before a run

Case = Callable[[Bench, Path], dict[str, Any]]  # (tools, an empty folder) -> what to change


def data(*rows: dict[str, Any], **more: Any) -> Case:
    return lambda bench, folder: {"data": write_rows(folder / "data.jsonl", rows), **more}


def text(content: str, **more: Any) -> Case:
    def change(bench: Bench, folder: Path) -> dict[str, Any]:
        (folder / "data.jsonl").write_text(content)
        return {"data": folder / "data.jsonl", **more}

    return change


def broken_model(breaking: Callable[[Path], object], file: str = "model.safetensors") -> Case:
    def change(bench: Bench, folder: Path) -> dict[str, Any]:
        model = shutil.copytree(bench.model, folder / "model")
        breaking(model / file)
        return {"model": model}

    return change


def broken_gguf(breaking: Callable[[Path], object]) -> Case:
    def change(bench: Bench, folder: Path) -> dict[str, Any]:
        file = folder / "model.gguf"
        tiny_models.make_gguf(
            tiny_models.random_model(
                "llama", num_hidden_layers=1, attention_bias=False, mlp_bias=False
            ),
            file,
            tokenizer=True,
        )
        breaking(file)
        return {"model": file}

    return change


def changed(**more: Any) -> Case:
    return lambda bench, folder: more


def infinite(file: Path) -> None:
    flip(file, -1, 0x7F ^ (file.read_bytes()[-1] & 0x7F))
    flip(file, -2, 0x80 | (0x7F ^ (file.read_bytes()[-2] & 0x7F)))


ROW = {"text": "a film", "label": 1}
BAD = {
    "no model there": (1, lambda bench, folder: {"model": folder / "none"}, "none"),
    "unknown card": (1, changed(model="smollm3-135m"), "smollm2-135m-instruct"),
    "model file that is none": (
        1,
        lambda b, f: {"model": write_rows(f / "m.gguf", [ROW])},
        "m.gguf",
    ),
    "directory that is no model": (1, lambda bench, folder: {"model": folder}, "config.json"),
    "malformed config": (
        1,
        broken_model(lambda f: f.write_text("{"), "config.json"),
        "config.json",
    ),
    "other architecture": (
        1,
        broken_model(lambda f: f.write_text('{"model_type": "t5"}'), "config.json"),
        "'t5'",
    ),
    "no tokenizer": (1, broken_model(Path.unlink, "tokenizer.json"), "tokenizer"),
    "malformed tokenizer": (1, broken_model(lambda f: cut(f, 0.5), "tokenizer.json"), "tokenizer"),
    "no weights": (1, broken_model(Path.unlink), "safetensors"),
    "weights cut short": (1, broken_model(lambda f: cut(f, 0.7)), "missing|announces"),
    "weights cut in the header": (1, broken_model(lambda f: cut(f, 0.001)), "header|bytes"),
    "a bit of the header's length": (1, broken_model(lambda f: flip(f, 3)), "header"),
    "a bit of the header": (1, broken_model(lambda f: flip(f, 40)), "header|tensor"),
    "a weight that is not finite": (1, broken_model(infinite), "not finite"),
    "gguf cut short": (1, broken_gguf(lambda f: cut(f, 0.7)), "model.gguf"),
    "gguf cut in the header": (1, broken_gguf(lambda f: cut(f, 0.01)), "model.gguf"),
    "a bit of the gguf's counts": (1, broken_gguf(lambda f: flip(f, 9)), "model.gguf"),
    "a bit of the gguf's magic": (1, broken_gguf(lambda f: flip(f, 1)), "model.gguf"),
    "no data there": (2, lambda bench, folder: {"data": folder / "none.jsonl"}, "none.jsonl"),
    "empty data": (2, text(""), "is empty"),
    "blank data": (2, text("\n\n"), "no rows"),
    "malformed JSON": (2, text(json.dumps(ROW) + '\n{"text": "a\n'), r"data\.jsonl:2"),
    "rows that are no objects": (2, text("[1]\n[2]\n"), r"data\.jsonl:1"),
    "a row without the keys": (2, data(ROW, ROW, {"text": "a"}), r"data\.jsonl:3"),
    "a template of other keys": (2, data(ROW, ROW, template="{sentence} It was"), "sentence"),
    "one label": (2, data(ROW, ROW, labels="0=bad"), "two"),
    "a label without a word": (2, data(ROW, ROW, labels="0=bad,1="), "1="),
    "a label outside the set": (2, data(ROW, ROW, {"text": "a", "label": 7}), r"7"),
    "one row": (2, data(ROW), "two"),
    "not text": (
        2,
        lambda b, f: {"data": (f / "d.jsonl", (f / "d.jsonl").write_bytes(b"\xff"))[0]},
        "UTF-8",
    ),
    "unknown task": (2, changed(data=None, template=None, labels=None, task="sst3"), "sst2"),
    "impossible settings": (2, changed(train="full+lowrank", micro_batch=9), "--micro-batch"),
    "a cap below the process": (3, changed(max_mem_bytes="20MB"), r"--max-mem \d+MB"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_request_that_cannot_be_met_leaves_nothing_behind(
    name, bench, edgezo, edgezo_json, tmp_path
):
    expected, case, names = BAD[name]
    folder, run = tmp_path / "given", tmp_path / "run"
    folder.mkdir()
    args = ["finetune", *bench.arguments(**{"out": run, **case(bench, folder)})]
    code, out, err = edgezo(*args)
    assert code == expected, err
    assert_one_screen(out, err)
    assert re.search(names, flat(err)), err
    code, found = edgezo_json(*args)
    assert code == found["exit_code"] == expected and found["error"]
    # A directory that holds its request and no step is no run: the next start is not refused.
    assert not (run / "journal.bin").exists()
    names = {p.name for p in run.iterdir()} if run.exists() else set()
    assert names <= {MARKER, "config.toml", "plan.json"}


def test_a_start_that_failed_does_not_stand_in_the_way_of_the_next(bench, edgezo, tmp_path):
    model, run = shutil.copytree(bench.model, tmp_path / "model"), tmp_path / "run"
    good = (model / "model.safetensors").read_bytes()
    infinite(model / "model.safetensors")
    args = ["finetune", *bench.arguments(model=model, out=run)]
    assert edgezo(*args)[0] == 1
    (model / "model.safetensors").write_bytes(good)
    assert edgezo(*args)[0] == 0


# ---------------------------------------------------------------------------------------------
# Of a run that was begun


@pytest.fixture(scope="module")
def begun(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, model and a run over them, stopped by kill -9 after six of nine steps."""
    folder = tmp_path_factory.mktemp("begun")
    make_model(folder / "model")
    shutil.copy(bench.data / "label.jsonl", folder)
    args = Bench(folder / "model", folder).arguments(
        train="lowrank+head", steps=9, snapshot_every=2, out=folder / "run"
    )
    code, _, err = forks.start(["finetune", *args], folder, forks.Blow("record", 6, 1)).end()
    assert code < 0, err
    return folder


@pytest.fixture
def stopped(begun: Path, tmp_path: Path) -> Iterator[Path]:
    """The run; its model and data may be changed, and are put back."""
    kept = {file: file.read_bytes() for file in begun.rglob("*") if file.is_file()}
    yield shutil.copytree(begun / "run", tmp_path / "run")
    for file, content in kept.items():
        file.write_bytes(content)


def commands(run: Path) -> dict[str, list[object]]:
    return {
        "resume": ["finetune", "--resume", "--out", run],
        "eval": ["eval", "--model", run],
        "replay": ["replay", run, "--out", run.parent / "copy"],
    }


def assert_refused(edgezo, run: Path, expected: int, names: str, only: tuple[str, ...] = ()):
    """Each command gives that exit code and leaves every file of the run as it was.

    The plan of a resume is of another process, and stands before what it planned is loaded.
    """
    before = contents(run)
    for name, args in commands(run).items():
        if only and name not in only:
            continue
        code, out, err = edgezo(*args)
        assert code == expected, (name, err)
        assert_one_screen(out, err)
        assert re.search(names, flat(err)), (name, err)
    assert contents(run) == before
    assert not (run.parent / "copy").exists()


def contents(run: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in run.iterdir() if file.name != "plan.json"}


def test_every_command_works_on_a_run_that_was_killed(stopped, edgezo):
    for args in reversed(commands(stopped).values()):
        assert edgezo(*args)[0] == 0


def test_a_journal_of_another_base_is_refused_with_5(stopped, begun, edgezo):
    flip(begun / "model" / "model.safetensors", -4000, 1)
    assert_refused(edgezo, stopped, 5, "other base weights")


def test_data_that_changed_under_a_run_is_refused(stopped, begun, edgezo):
    file = begun / "label.jsonl"
    file.write_text(file.read_text().replace("cold", "mild"))
    assert_refused(edgezo, stopped, 1, "other rows", only=("resume",))


DAMAGE = {
    "empty": lambda file: file.write_bytes(b""),
    "cut in the header": lambda file: cut(file, 0.2),
    "a bit of the header": lambda file: flip(file, 60),
    "foreign": lambda file: file.write_bytes(b"PK\x03\x04" + bytes(500)),
    "a bit in the middle": lambda file: flip(file, file.stat().st_size - 300),
    "absent": Path.unlink,
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_journal_is_named_by_every_command(name, stopped, edgezo):
    DAMAGE[name](stopped / "journal.bin")
    if name == "absent":  # then the directory holds no step, and resume starts the run again
        assert_refused(edgezo, stopped, 1, r"journal\.bin", only=("eval", "replay"))
        assert edgezo(*commands(stopped)["resume"])[0] == 0
        return
    assert_refused(edgezo, stopped, 1, r"journal\.bin")


def test_a_damaged_snapshot_is_named_by_every_command(stopped, edgezo):
    cut(stopped / "head.safetensors", 0.5)
    assert_refused(edgezo, stopped, 1, r"head\.safetensors")


def test_a_journal_that_lost_records_the_snapshot_stands_on_is_an_error(stopped, edgezo):
    journal = stopped / "journal.bin"
    with journal.open("rb+") as file:
        file.truncate(journal.stat().st_size - 3 * 88)  # records of four examples are 88 bytes
    assert_refused(edgezo, stopped, 1, r"head\.safetensors", only=("resume",))
    (stopped / "head.safetensors").unlink()
    assert edgezo(*commands(stopped)["resume"])[0] == 0


@pytest.mark.parametrize("content", ["", "model = ", 'model = "x"\nunknown = 1\n'])
def test_a_damaged_configuration_is_a_usage_error(content, stopped, edgezo):
    (stopped / "config.toml").write_text(content)
    assert_refused(edgezo, stopped, 2, r"--model|configuration|unknown")


@pytest.mark.parametrize("content", [b"model = \xff", b"x" * 300_000])
def test_a_configuration_that_cannot_be_read_is_named(content, stopped, edgezo):
    config = stopped / "config.toml"
    config.write_bytes(content)
    assert_refused(edgezo, stopped, 1, r"config\.toml")


def test_a_directory_that_is_no_run_is_named(bench, edgezo, tmp_path):
    (tmp_path / "empty").mkdir()
    for args in commands(tmp_path / "empty").values():
        code, out, err = edgezo(*args)
        assert code in (1, 2)
        assert_one_screen(out, err)


# ---------------------------------------------------------------------------------------------
# Disks


def test_a_file_in_place_of_the_run_directory_is_an_error(bench, edgezo, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    for out in (file, file / "run"):
        code, printed, err = edgezo("finetune", *bench.arguments(out=out))
        assert code == 1 and str(file) in err.replace("\n", "")
        assert_one_screen(printed, err)
    run = tmp_path / "run"
    finetune(make_config(bench.settings(out=str(run))))
    for out in (file, file / "copy"):
        code, printed, err = edgezo("replay", run, "--out", out)
        assert code == 1
        assert_one_screen(printed, err)
    assert file.read_text() == "mine"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB. Skipped where this process may not mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if mount is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a file system of a given size cannot be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_read_only_disk_is_an_error(bench, edgezo, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    code, out, err = edgezo("finetune", *bench.arguments(out=small_disk / "run"))
    assert code == 1 and "Read-only" in err
    assert_one_screen(out, err)


def test_a_disk_that_is_full_at_any_moment_costs_no_step(bench, edgezo, small_disk, tmp_path):
    request = {"steps": 16, "snapshot_every": 3}
    whole = finetune(make_config(bench.settings(out=str(tmp_path / "whole"), **request)))
    failures = 0
    for pages in range(8):  # that are free
        run, filler = small_disk / "run", small_disk / "filler"
        filler.write_bytes(bytes(4096 * (64 - 2 - pages)))
        code, out, err = edgezo("finetune", *bench.arguments(out=run, **request))
        if code:
            failures += 1
            assert code == 1 and re.search("full|No space", err), (pages, err)
            assert_one_screen(out, err)
        filler.unlink()
        more = [] if (run / "config.toml").exists() else bench.arguments(**request)
        code, out, err = edgezo("finetune", "--resume", "--out", run, *more, "--json")
        assert code == 0, (pages, err)
        assert json.loads(out)["trained_sha256"] == whole["trained_sha256"]
        steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [s["step"] for s in steps if "eval" not in s] == list(range(1, 17))
        shutil.rmtree(run)
    assert 3 <= failures < 8  # some moments of a run were met, and the last one was let through


@pytest.mark.parametrize("largest_file", [100, 2000, 5000])
def test_a_file_size_limit_costs_no_step(largest_file, bench, edgezo_json, tmp_path):
    run = tmp_path / "run"
    whole = finetune(
        make_config(bench.settings(out=str(tmp_path / "whole"), steps=40, train="scales"))
    )
    args = bench.arguments(out=run, steps=40, train="scales")
    running = forks.start(["finetune", *args], tmp_path / "printed", largest_file=largest_file)
    code, _, _ = running.end()  # what it printed was under the limit too
    assert code == 1
    more = [] if (run / "config.toml").exists() else args
    code, found = edgezo_json("finetune", "--resume", "--out", run, *more)
    assert code == 0 and found["trained_sha256"] == whole["trained_sha256"]

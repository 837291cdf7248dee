"""A user's files are as they were after every command and option, whatever place is named: bytes, modes and times."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import writers
from writers import (
    FLAGS,
    JOURNALS,
    LOOKS,
    NO_FILES,
    READS,
    WRITERS,
    WRITES,
    Tools,
    data_of,
    every_command,
    state,
    users_directory,
)

from edgezo.machine.ownership import MARKER
from edgezo.plan.request import make_config
from edgezo.run.train import finetune

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = ("run", "replay", "bench")
FOLDERS = {name: writer for name, writer in WRITERS.items() if not writer.file}
FILES = {name: writer for name, writer in WRITERS.items() if writer.file}


@pytest.fixture(scope="module")
def tools(bench, tmp_path_factory) -> Tools:
    folder = tmp_path_factory.mktemp("tools")
    request = bench.settings(out=str(folder / "run"), steps=2, train="lowrank+head")
    finetune(make_config(request))
    return Tools.around(bench, folder / "run")


@pytest.fixture(scope="module")
def made(tools, tmp_path_factory) -> dict[str, Path]:
    """A directory of each kind that edgezo makes, and of each form that it exports."""
    from edgezo.cli import main as cli

    folder = tmp_path_factory.mktemp("made")
    assert cli.run(["replay", str(tools.run), "--out", str(folder / "replay")]) == 0
    assert cli.run(["export", str(tools.run), "--out", str(folder / "export")]) == 0
    (folder / "bench").mkdir()
    marker = json.dumps({"kind": "bench", "format": 1}) + "\n"
    (folder / "bench" / MARKER).write_text(marker)
    (folder / "bench" / "memory.json").write_text(json.dumps({"rows": []}))
    return {"run": tools.run, **{name: folder / name for name in ("replay", "export", "bench")}}


def refused(
    edgezo: Any, tools: Tools, name: str, place: object, code: int | None = 2, shown: object = None
) -> str:
    """Give the command; it ends with that exit code and names the place. Returns what it said."""
    writer = WRITERS[name]
    ended, out, err = edgezo(*writer.command.split(), *writer.arguments(tools, place))
    assert ended == code if code is not None else ended in (1, 2), (name, ended, err)
    assert out == "" and "Traceback" not in err, err
    assert str(place if shown is None else shown) in err, err
    return err


# ---------------------------------------------------------------------------------------------
# The tables


def test_every_option_has_its_place_here():
    known = WRITES | READS | FLAGS | NO_FILES
    for name, command in every_command():
        options = {parameter.name for parameter in command.params}
        assert options <= known, (name, options - known)
        of_table = [writer for writer in WRITERS.values() if writer.command == name]
        looks = name == "plan"  # it takes the options of finetune, and writes nothing
        assert bool(of_table) == bool(options & WRITES and not looks), name
        for parameter in command.params:
            if parameter.name in FLAGS | {"form"} and of_table and parameter.name != "as_json":
                assert is_tried(parameter, name), (name, parameter.name)


def is_tried(parameter: click.Parameter, command: str) -> bool:
    """Whether the tables give the option to the command, with each choice that it has."""
    tools = Tools(_NoBench(), Path("run"), Path("study"), Path("published"))  # type: ignore[arg-type]
    lines = [
        {*map(str, writer.arguments(tools, "place"))}
        for writer in WRITERS.values()
        if writer.command == command
    ]
    lines += [{*map(str, look(tools, "place")[1:])} for look in LOOKS.values()]
    wanted = {*parameter.opts, *parameter.secondary_opts}
    choices = parameter.type.choices if isinstance(parameter.type, click.Choice) else ()
    given = any(wanted & line for line in lines)
    return given and all(
        c == parameter.default or any(c in line for line in lines) for c in choices
    )


class _NoBench:
    model = data = Path("model")

    def arguments(self, **changes: Any) -> list[str]:
        return []


# ---------------------------------------------------------------------------------------------
# Directories


@pytest.mark.parametrize("journal", JOURNALS)
@pytest.mark.parametrize("name", FOLDERS)
def test_a_users_directory_is_as_it_was(name, journal, tools, edgezo, tmp_path):
    folder = users_directory(tmp_path / "mine", JOURNALS[journal])
    before = state(tmp_path, tools.run)
    # A journal that is none of edgezo's is an error in the file (1) where a command is told that a run is there.
    refused(edgezo, tools, name, folder, None if journal != "none" else 2)
    assert state(tmp_path, tools.run) == before


@pytest.mark.parametrize("name", FOLDERS)
def test_however_the_directory_is_named(name, tools, edgezo, tmp_path, monkeypatch):
    folder = users_directory(tmp_path / "mine")
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(folder)
    before = state(tmp_path)
    for place in (f"{folder}/", f"{folder}//", ".", "./", "../mine", "empty/..", tmp_path / "link"):
        refused(edgezo, tools, name, place, shown=Path(place))
    assert state(tmp_path) == before


@pytest.mark.parametrize("name", FOLDERS)
def test_one_file_of_a_user_is_enough(name, tools, edgezo, tmp_path):
    for file in (".hidden", "config.toml", "notes/", "journal.bin/", f"{MARKER}/", "overlay/"):
        folder = tmp_path / file.strip("./")
        folder.mkdir()
        if file.endswith("/"):
            (folder / file).mkdir()
        else:
            (folder / file).write_text("mine\n")
        before = state(folder)
        refused(edgezo, tools, name, folder, None)
        assert state(folder) == before


@pytest.mark.parametrize("look", LOOKS)
def test_a_command_that_only_looks_changes_nothing(look, tools, edgezo, tmp_path):
    for folder in (users_directory(tmp_path / "mine"), tools.run, tmp_path / "absent"):
        before = state(folder)
        edgezo(*LOOKS[look](tools, folder))
        assert state(folder) == before


def test_a_run_without_an_out_takes_a_name_that_is_free(tools, edgezo_json, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    users_directory(tmp_path / "runs" / "model-label")
    (tmp_path / "runs" / "model-label-2").write_text("mine")
    before = state(tmp_path / "runs" / "model-label", tmp_path / "runs" / "model-label-2")
    code, summary = edgezo_json("finetune", *tools.bench.arguments(steps=1))
    assert code == 0 and summary["run"] == "runs/model-label-3"
    assert state(tmp_path / "runs" / "model-label", tmp_path / "runs" / "model-label-2") == before


@pytest.mark.parametrize("name", FOLDERS)
def test_places_that_are_no_directory(name, tools, edgezo, tmp_path):
    file, link, pipe = (tmp_path / n for n in ("file", "link", "pipe"))
    file.write_text("mine")
    link.symlink_to(tmp_path / "nowhere")
    os.mkfifo(pipe)
    (tmp_path / "link to a file").symlink_to(file)
    before = state(tmp_path)
    for place in (file, file / "below", link, link / "below", pipe, tmp_path / "link to a file"):
        refused(edgezo, tools, name, place, None)
    for place in (Path("/dev/null"), Path("/proc/1/run"), Path(f"/tmp/{'x' * 300}")):
        refused(edgezo, tools, name, place, None)
    assert state(tmp_path) == before


@pytest.fixture
def read_only_disk(tmp_path: Path) -> Iterator[Path]:
    """An empty file system that cannot be written to. Skipped where this process may not mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    options = ["-t", "tmpfs", "-o", "size=64k,ro", "tmpfs", str(disk)]
    if mount is None or subprocess.run([mount, *options], capture_output=True).returncode:
        pytest.skip("a file system cannot be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("name", WRITERS)
def test_a_place_that_may_not_be_written_to(name, tools, edgezo, read_only_disk):
    before = state(read_only_disk)
    for place in (read_only_disk / "new", read_only_disk / "new" / "deeper"):
        if name == "resume alone" or WRITERS[name].command in ("report", "rm"):
            refused(edgezo, tools, name, place, 2)  # there is no run
        else:
            refused(edgezo, tools, name, place, 1)
    if not WRITERS[name].file:
        refused(edgezo, tools, name, read_only_disk, None)
    assert state(read_only_disk) == before


# ---------------------------------------------------------------------------------------------
# Directories of edgezo's


@pytest.mark.parametrize("kind", ["run", "replay", "bench", "export"])
@pytest.mark.parametrize("name", FOLDERS)
def test_a_directory_of_another_kind_is_as_it_was(name, kind, tools, made, edgezo, tmp_path):
    writer = FOLDERS[name]
    if kind in writer.goes_on:
        pytest.skip("it goes on there")
    folder = shutil.copytree(made[kind], tmp_path / "made", symlinks=True)
    before = state(folder)
    refused(edgezo, tools, name, folder, None)
    assert state(folder) == before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FOLDERS)
def test_a_marker_among_a_users_files_is_not_believed(name, kind, tools, edgezo, tmp_path):
    """It may have come with a copy of other files. What a file holds says whose it is."""
    folder = users_directory(tmp_path / "mine")
    (folder / MARKER).write_text(json.dumps({"kind": kind, "format": 1}) + "\n")
    before = state(tmp_path)
    refused(edgezo, tools, name, folder, None)
    assert state(tmp_path) == before


@pytest.mark.parametrize("name", FOLDERS)
def test_the_run_itself_its_model_and_its_data_are_no_place_to_write_to(
    name, tools, edgezo, tmp_path
):
    bench = tools.bench
    before = state(bench.model, bench.data, tools.run.parent)
    for place in (bench.model, bench.data, tools.run.parent):
        refused(edgezo, tools, name, place, None)
    if "run" not in WRITERS[name].goes_on:
        refused(edgezo, tools, name, tools.run, None)
    assert state(bench.model, bench.data, tools.run.parent) == before


# ---------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_a_user_is_not_replaced(name, tools, edgezo, tmp_path):
    folder = users_directory(tmp_path / "mine")
    before = state(tmp_path)
    for file in ("trained.safetensors", "link.txt", "nowhere", "empty", "pipe"):
        refused(edgezo, tools, name, folder / file, 2)
    refused(edgezo, tools, name, folder / "README" / "below", None)
    for file in ("new.safetensors", "empty/new.safetensors"):
        writer = WRITERS[name]
        assert edgezo(*writer.command.split(), *writer.arguments(tools, folder / file))[0] == 0
        assert (folder / file).is_file()
        (folder / file).unlink()
    after = state(tmp_path)
    changed = {path for path in before | after if before.get(path) != after.get(path)}
    assert changed <= {str(folder), str(folder / "empty")}  # their times


# ---------------------------------------------------------------------------------------------
# Places that a command reads

# Arguments with which a command comes to read what the option names.
READERS: dict[str, Any] = {
    "finetune": lambda t, out: [*t.bench.arguments(steps=1), "--out", out],
    "plan": lambda t, out: t.bench.arguments(steps=None),
    "eval": lambda t, out: t.bench.arguments(steps=None, batch_size=None, micro_batch=None),
    "replay": lambda t, out: ["--out", out],
    "export": lambda t, out: ["--out", out],
    "data": lambda t, out: [],
    "predict": lambda t, out: ["--data", t.bench.data / "label.jsonl"],
    "chat": lambda t, out: ["--max-new-tokens", 1],
    "serve": lambda t, out: ["--port", 0],
    "report": lambda t, out: ["--ask"],
    "compare": lambda t, out: [],
    "runs": lambda t, out: [],
    "apply": lambda t, out: ["--base", t.bench.model, "--out", out],
    "bench memory": lambda t, out: ["--methods", "none", "--out", out],
    "bench alignment": lambda t, out: ["--estimators", "none", *data_of(t), "--out", out],
    "bench speed": lambda t, out: ["--estimators", "none", *data_of(t), "--out", out],
    "bench accuracy": lambda t, out: ["--out", out, "--methods", "none"],
    "convert-finetuner": lambda t, out: [],
    "meta-train": lambda t, out: ["--model", t.bench.model, "--steps", 1, "--out", out / "f"],
}
BESIDE = {  # what an option needs to be read at all
    "data_root": ["--task", "sst2"],
    "finetuner": ["--estimator", "zo-finetuner"],
}
READ = [
    (name, parameter)
    for name, command in every_command()
    for parameter in command.params
    if parameter.name in READS
]


@pytest.mark.parametrize(
    ("name", "parameter"), READ, ids=lambda value: getattr(value, "name", value)
)
def test_what_is_read_is_as_it_was(name, parameter, tools, edgezo, tmp_path):
    folder = users_directory(tmp_path / "mine", b"Dear diary,\n")
    (folder / "train.jsonl").write_text('{"text": "a", "label": 0}\n')
    before = state(tmp_path / "mine", tmp_path / "mine-outside.txt")
    inside = ["", "config.toml", "journal.bin", "link.txt", "nowhere", "empty"]
    if parameter.name not in ("data", "files"):  # rows may come by a pipe: it is waited for
        inside.append("pipe")
    for place in (folder / part for part in inside):
        arguments = [*READERS[name](tools, tmp_path / "out"), *BESIDE.get(parameter.name, [])]
        if isinstance(parameter, click.Argument):
            arguments = [place, *arguments]
            if name == "convert-finetuner":
                arguments.append(tmp_path / "out.safetensors")
        else:
            if name in ("predict", "chat", "apply", "replay", "export", "report"):
                arguments = [tools.shipped if name == "apply" else tools.run, *arguments]
            option = next(o for o in parameter.opts if o.startswith("--"))
            data = parameter.name == "data_root" and "--data" in arguments
            if data:  # it is read for a task
                at = arguments.index("--data")
                del arguments[at : at + 2]
            arguments += [option, place]
        _, _, err = edgezo(*name.split(), *arguments)
        assert "Traceback" not in err, err
    assert state(tmp_path / "mine", tmp_path / "mine-outside.txt") == before


def test_users_files_have_every_name_that_a_command_writes(tools, made):
    """So that a new file of a run, a replay or an export is among the files that no command may replace."""
    names = {path.name for kind in ("run", "replay", "export") for path in made[kind].iterdir()}
    # What an export copies from the model goes to a new directory only.
    copied = {path.name for path in tools.bench.model.iterdir()}
    assert names - copied - {MARKER, "journal.bin"} <= set(writers.USERS_FILES)

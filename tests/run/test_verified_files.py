"""Files that hold what a run has trained are believed whole, finite and of their own run, or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz import overlays, snapshots
from fuzz.snapshots import RUNS, SoundSnapshot, read_snapshot, sound_snapshots, wrongly_read
from links import FOREIGN, contents, folder, hard_link
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from edgezo.errors import EdgezoError
from edgezo.plan.request import make_config
from edgezo.run.metrics_log import RunLog, check_lines
from edgezo.run.train import finetune
from edgezo.weights import verified
from edgezo.weights.saved import DIGEST, DIGEST_AT, NO_DIGEST, Saved, write_saved
from edgezo.weights.verified import open_saved

pytestmark = pytest.mark.usefixtures("one_thread")
OLD_RUNS = Path(__file__).resolve().parent.parent / "old_runs"
KINDS = {sound.name: sound for sound in sound_snapshots()}
of_every_kind = pytest.mark.parametrize("sound", KINDS.values(), ids=KINDS)


# ---------------------------------------------------------------------------------------------
# The format


@of_every_kind
@pytest.mark.parametrize("piece_bytes", [8, 64, 1 << 20])
def test_what_is_written_is_read_in_pieces_of_any_size(tmp_path, monkeypatch, sound, piece_bytes):
    monkeypatch.setattr(verified, "_READ_BYTES", piece_bytes)
    path = tmp_path / sound.name
    whole = sound.write(path)
    metadata, tensors = read_snapshot(path, sound)
    assert metadata == sound.metadata
    for name, tensor in sound.tensors.items():
        assert torch.equal(tensors[name], tensor) and tensors[name].dtype == tensor.dtype
    with safe_open(path, "pt") as file:  # other programs read it too
        assert file.metadata()["run"] == RUNS[0]
    digest = whole[DIGEST_AT : DIGEST_AT + 64]
    zeros = whole.replace(digest, NO_DIGEST.encode())
    assert digest.decode() == hashlib.sha256(zeros).hexdigest()


def test_tensors_of_every_type_and_shape_are_read_and_those_that_are_not_asked_for_left_out(
    tmp_path,
):
    tensors = {
        "none": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "bool": torch.tensor([True, False, True]),
        "odd": torch.arange(5, dtype=torch.uint8),
        "behind odd": torch.randn(3, 2, 2, dtype=torch.float64),
        "half": torch.randn(4).half(),
        "long": torch.tensor([2**62, -1]),
    }
    path = tmp_path / "file"
    write_saved(path, [Saved.of(n, t) for n, t in tensors.items()], {"step": "1"}, run=RUNS[0])
    into = {name: torch.zeros_like(tensor) for name, tensor in tensors.items() if name != "half"}
    turned = torch.zeros(2, 2, 3, dtype=torch.float64).permute(2, 0, 1)
    into["behind odd"] = turned
    with open_saved(path, {"step"}, RUNS[0], "") as file:
        file.read(into)
    assert not turned.is_contiguous()
    assert all(torch.equal(into[name], tensors[name]) for name in into)


@of_every_kind
def test_every_flipped_bit_and_every_length_is_refused(tmp_path, sound):
    path = tmp_path / sound.name
    whole = sound.write(path)
    for bit in range(8 * len(whole)):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        assert not wrongly_read(path, sound, data), f"byte {bit // 8}, bit {bit % 8}"
    for length in range(len(whole)):
        assert not wrongly_read(path, sound, whole[:length]), length


def test_damage_of_every_kind_is_refused(tmp_path):
    figures = {**snapshots.measure(tmp_path, 1500), **overlays.measure(tmp_path, 500)}
    assert set(KINDS) | {"probe.states", "block", "table"} <= figures.keys()
    assert not {name: wrong for name, wrong in figures.items() if wrong[0]}


def test_a_block_of_format_1_is_read_and_written_as_format_2(tmp_path):
    sound = overlays.sound_block(tmp_path / "overlay" / "block-0000.overlay")
    sound.path.write_bytes(overlays.of_format_1(sound.data))
    file, memory = sound.open(), torch.zeros_like(sound.memory)
    assert file.open() == 7
    file.read(memory)
    assert torch.equal(memory, sound.memory)
    file.write(memory, 7)
    file.close()
    assert sound.path.read_bytes() == sound.data


@of_every_kind
def test_a_file_of_another_run_is_named_as_one(tmp_path, sound):
    path = tmp_path / sound.name
    sound.write(path, RUNS[1])
    with pytest.raises(EdgezoError, match="belongs to another run"):
        read_snapshot(path, sound)
    with open_saved(path, set(sound.metadata), None, "") as file:
        file.read({})


@of_every_kind
def test_a_file_of_an_earlier_version_is_read_if_its_numbers_are_finite(tmp_path, sound):
    path = tmp_path / sound.name
    sound.write(path, None)
    metadata, tensors = read_snapshot(path, sound)
    assert metadata == sound.metadata
    path.unlink()
    save_file(sound.tensors, path, sound.metadata)  # which orders tensors by type
    _, again = read_snapshot(path, sound)
    for name in sound.tensors:
        assert torch.equal(tensors[name], sound.tensors[name])
        assert torch.equal(again[name], sound.tensors[name])
    for metadata in (
        {},
        sound.metadata | {"more": "1"},
        sound.metadata | {"run": RUNS[0]},
        sound.metadata | {DIGEST: "0" * 64},
    ):
        save_file(sound.tensors, path, metadata)
        with pytest.raises(EdgezoError, match="cannot be read"):
            read_snapshot(path, sound)


@of_every_kind
@pytest.mark.parametrize("run", [RUNS[0], None])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_are_refused(tmp_path, sound, run, value):
    for name, tensor in sound.tensors.items():
        if not tensor.is_floating_point():
            continue
        spoilt = tensor.clone()
        spoilt.view(-1)[-1] = value
        SoundSnapshot(sound.name, sound.metadata, sound.tensors | {name: spoilt}).write(
            tmp_path / "file", run
        )
        with pytest.raises(EdgezoError, match="not finite"):
            read_snapshot(tmp_path / "file", sound)


def test_a_file_that_does_not_fit_the_model_is_refused_before_anything_is_read(tmp_path):
    sound = KINDS["head.safetensors"]
    sound.write(tmp_path / "file")
    for name, other in (
        ("head.delta", torch.zeros(2, 17)),
        ("head.delta", torch.zeros(2, 16, dtype=torch.float16)),
        ("absent", torch.zeros(1)),
    ):
        into = {"head.adam_first": torch.zeros(2, 16), name: other}
        with open_saved(tmp_path / "file", {"step"}, RUNS[0], "Restore it.") as file:
            with pytest.raises(EdgezoError, match="another model"):
                file.read(into)
        assert not into["head.adam_first"].any()


@pytest.mark.parametrize("make", FOREIGN, ids=lambda make: make.__name__)
def test_what_is_no_file_is_named_at_once(tmp_path, make):
    victim = tmp_path / "home" / "victim"
    victim.parent.mkdir()
    victim.write_bytes(b"mine")
    make(tmp_path / "file", victim)
    with pytest.raises(EdgezoError, match="cannot be read"):
        with open_saved(tmp_path / "file", {"step"}, RUNS[0], "Restore it."):
            pass


# ---------------------------------------------------------------------------------------------
# In a run


def run_of(bench: Any, out: Path, **changes: Any) -> dict[str, Any]:
    return finetune(make_config(bench.settings(out=str(out), **changes)))


@pytest.fixture(scope="module")
def runs(bench, tmp_path_factory):
    """Finished runs, each beside another run of the same kind: head, probe; and what a replay wrote."""
    from edgezo.run.evaluate import replay

    folder = tmp_path_factory.mktemp("runs")
    trains = {"head": "lowrank+head", "probe": "lowrank+probe", "lora": None, "guided": "full"}
    for name, train in trains.items():
        request = {"steps": 4, **({"train": train} if train else {})}
        request |= {"lora": {"estimator": "lora"}, "guided": {"estimator": "ag-grzo"}}.get(name, {})
        run_of(bench, folder / name, **request, seed=0)
        run_of(bench, folder / f"{name} other", **request, seed=1)
    for name in ("head", "probe"):
        replay(folder / name, folder / f"{name} replayed")
        replay(folder / f"{name} other", folder / f"{name} replayed other")
    return folder


def flip_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(data)


def nan(file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[:-4] + b"\xff" * 4)


def of_another_run(file: Path) -> None:
    shutil.copy(file.parent.with_name(f"{file.parent.name} other") / file.name, file)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "a flipped bit": flip_bit,
    "NaN": nan,
    "cut short": lambda file: os.truncate(file, file.stat().st_size - 1),
    "a file of another run": of_another_run,
}
FILES = {  # run -> its file, and commands that read it
    "head": ("head.safetensors", ("eval", "replay", "resume", "export")),
    "probe": ("probe.safetensors", ("eval", "replay", "resume", "export")),
    "lora": ("head.safetensors", ("eval", "replay", "resume")),
    "guided": ("head.safetensors", ("eval", "replay", "resume")),
    "head replayed": ("trained.safetensors", ("eval",)),
    "probe replayed": ("trained.safetensors", ("eval",)),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_no_command_goes_on_with_a_damaged_file(runs, edgezo_json, tmp_path, name, damage):
    file, commands = FILES[name]
    for other in ("", " other"):
        shutil.copytree(runs / f"{name}{other}", tmp_path / f"{name}{other}")
    run = tmp_path / name
    DAMAGE[damage](run / file)
    before = contents(run)
    every: dict[str, list[object]] = {
        "eval": ["eval", "--model", run],
        "replay": ["replay", run, "--out", tmp_path / "copy"],
        "resume": ["finetune", "--resume", "--out", run],
        "export": ["export", run, "--out", tmp_path / "export"],
    }
    for command in commands:
        code, output = edgezo_json(*every[command])
        assert code == 1 and file in output["error"], (command, output)
        assert ("another run" in output["error"]) == (damage == "a file of another run")
        assert contents(run) == before, command
    assert not (tmp_path / "copy").exists() and not (tmp_path / "export").exists()


@pytest.mark.parametrize("damage", ["a flipped bit", "NaN", "a file of another run"])
def test_a_probe_beside_an_exported_model_is_verified(runs, edgezo_json, tmp_path, damage):
    for name in ("probe", "probe other"):
        assert edgezo_json("export", runs / name, "--out", tmp_path / name)[0] == 0
    data = ["--data", runs.parent, *_data_of(runs / "probe")]
    code, output = edgezo_json("eval", "--model", tmp_path / "probe", *data[2:])
    assert code == 0 and output["value"] is not None
    DAMAGE[damage](tmp_path / "probe" / "probe.safetensors")
    code, output = edgezo_json("eval", "--model", tmp_path / "probe", *data[2:])
    assert code == 1 and "probe.safetensors" in output["error"]


def _data_of(run: Path) -> list[str]:
    from edgezo.run.directory import RunFiles

    cfg = RunFiles(run).read_config()
    return [
        *("--data", str(cfg.data), "--template", str(cfg.template), "--labels", str(cfg.labels))
    ]


def test_a_finished_run_that_gives_other_weights_than_it_ended_with_is_an_error(
    runs, edgezo_json, tmp_path
):
    """Its summary was changed: nothing else is left that no checksum covers."""
    run = shutil.copytree(runs / "head", tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"trained_sha256": "0" * 64}))
    before = contents(run)
    commands = (
        ("finetune", "--resume", "--out", run),
        ("replay", run, "--out", tmp_path / "copy"),
    )
    for command in commands:
        code, output = edgezo_json(*command)
        assert code == 1, output
        for name in ("journal.bin", "head.safetensors", "summary.json"):
            assert name in output["error"]
    after = contents(run)
    plan = {"plan.json"}  # with the memory that the process has now
    assert {n: after[n] for n in after.keys() - plan} == {
        n: before[n] for n in before.keys() - plan
    }
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize(("kind", "file"), [("default", "probe"), ("step-auto", "head")])
def test_a_finished_run_of_an_earlier_version_is_compared_with_its_summary(
    edgezo_json, tmp_path, monkeypatch, kind, file
):
    for name in ("base", "rows"):
        shutil.copytree(OLD_RUNS / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    run = Path(shutil.copytree(OLD_RUNS / "finished" / kind, "run"))
    path = run / f"{file}.safetensors"
    tensors = load_file(path)
    name = "probe.weight" if file == "probe" else "head.delta"
    tensors[name].view(-1)[3] += 1e-3
    with safe_open(path, "pt") as old:
        metadata = old.metadata()
    save_file(tensors, path, metadata)
    for command in (("finetune", "--resume", "--out", run), ("replay", run, "--out", "copy")):
        code, output = edgezo_json(*command)
        assert code == 1 and path.name in output["error"], output
        assert "other weights than it ended with" in output["error"]


def test_a_resume_writes_a_digest_to_a_run_of_an_earlier_version(
    edgezo_json, tmp_path, monkeypatch
):
    for name in ("base", "rows"):
        shutil.copytree(OLD_RUNS / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    run = Path(shutil.copytree(OLD_RUNS / "unfinished" / "lora", "run"))
    assert edgezo_json("finetune", "--resume", "--out", run)[0] == 0
    with safe_open(run / "head.safetensors", "pt") as file:
        assert len(file.metadata()[DIGEST]) == 64
    flip_bit(run / "head.safetensors")
    code, output = edgezo_json("eval", "--model", run)
    assert code == 1 and "head.safetensors" in output["error"]


# ---------------------------------------------------------------------------------------------
# metrics.jsonl


def test_a_damaged_line_of_the_metrics_is_named_and_nothing_is_cut(runs, edgezo_json, tmp_path):
    run = shutil.copytree(runs / "head", tmp_path / "run")
    (run / "summary.json").unlink()
    whole = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    bad = (b"{", b"[]\n", b'{"step": "1"}\n', b'{"step": -1}\n', b'{"step": 1, "step": 2}\n')
    bad += (
        b'{"step": 1, "step_s": "x"}\n',
        b"\xff\n",
        b'{"step": 1, "eval": []}\n',
        b"[" * 9999 + b"\n",
    )
    bad += (b'{"step": 0, "pace": {"sigma": 1}}\n', b'{"step": 0, "pace": 3}\n', b"\n", b"null\n")
    for number, line in enumerate(bad[1:]):
        (run / "metrics.jsonl").write_bytes(b"".join([whole[0], line, *whole[1:]]))
        before = contents(run)
        code, output = edgezo_json("finetune", "--resume", "--out", run)
        assert code == 1 and "metrics.jsonl: line 2" in output["error"], number
        assert contents(run) == before
    (run / "metrics.jsonl").write_bytes(b"".join([*whole, b"{"]))
    assert edgezo_json("finetune", "--resume", "--out", run)[0] == 0
    assert (run / "metrics.jsonl").read_bytes().splitlines(keepends=True) == whole


def metrics_of_a_run(path: Path, of_run: str = RUNS[0]) -> list[dict[str, Any]]:
    """Write lines of every kind; returns them."""
    pace = {"sigma": 0.002, "factor": 1.5, "began": 1.0, "losses": [0.25, None], "idle": 0}
    lines = [
        {"step": 0, "eval": "before", "metric": "accuracy", "value": 0.5, "n": 4},
        {"step": 0, "pace": {**pace, "took_s": 0.5, "why": ""}},
        {"step": 1, "loss": 0.75, "skipped": False, "step_s": 0.25, "disk_read_bytes": 4096},
        {"step": 2, "loss": float("nan"), "skipped": True, "step_s": None, "why": "sch\u00f6n"},
    ]
    log = RunLog(path, of_run=of_run)
    for line in lines:
        log.write(line)
    log.close()
    return [*lines[:3], {**lines[3], "loss": None}]


def test_every_flipped_bit_of_the_metrics_is_refused(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = metrics_of_a_run(path)
    whole = path.read_bytes()
    log = RunLog(path, keep_through=5, of_run=RUNS[0])
    assert log.lines() == lines and log.paces[0]["sigma"] == 0.002
    log.close()
    for bit in range(
        8 * (len(whole) - 1)
    ):  # without the end of the last line: it is then an unfinished one
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        with pytest.raises(EdgezoError, match=r"metrics\.jsonl: line \d"):
            check_lines(path, RUNS[0])


def test_lines_that_are_lost_repeated_exchanged_or_of_another_run_are_refused(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics_of_a_run(path)
    a, b, c, d = path.read_bytes().splitlines(keepends=True)
    without = c[: c.index(b', "crc"')] + b"}\n"
    for changed in ([a, c, d], [b], [a, a, b, c, d], [a, c, b, d], [a, b, b], [a, b, without, d]):
        path.write_bytes(b"".join(changed))
        with pytest.raises(EdgezoError, match=r"line .*check"):
            check_lines(path, RUNS[0])
    path.write_bytes(b"".join([a, b, c, d]))
    with pytest.raises(EdgezoError, match=r"line 1 .*checksum does not fit"):
        check_lines(path, RUNS[1])


def test_metrics_without_checksums_are_read_and_go_on_with_them(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "step_s": 0.5}\n{"step": 2, "step_s": 1.5}\n{"step": 3}\n')
    log = RunLog(path, keep_through=2, of_run=RUNS[0])
    log.write({"step": 3, "step_s": 2.5})
    log.close()
    check_lines(path, RUNS[0])
    log = RunLog(path, keep_through=9, of_run=RUNS[0])
    assert log.step_times_s == [0.5, 1.5, 2.5]
    log.close()
    path.write_bytes(path.read_bytes().replace(b"1.5", b"1.0"))
    with pytest.raises(EdgezoError, match=r"line 3 .*a line before it"):
        check_lines(path, RUNS[0])


# ---------------------------------------------------------------------------------------------
# Links in a run


IN_PLACE = ("journal.bin", "metrics.jsonl", "probe.states", "overlay", "overlay/block-0000.overlay")


@pytest.mark.parametrize("make", FOREIGN, ids=lambda make: make.__name__)
@pytest.mark.parametrize("place", IN_PLACE)
def test_a_run_with_a_link_is_refused_and_nothing_changes(runs, edgezo_json, tmp_path, place, make):
    run = shutil.copytree(runs / "head", tmp_path / "run")
    (run / "summary.json").unlink()
    home = tmp_path / "home"
    shutil.copytree(run, home)  # where a link leads, a file may well be one of a run
    (home / "overlay").mkdir()
    for name in ("block-0000.overlay", "block-0001.overlay", "probe.states"):
        (home / "overlay" / name).write_bytes(b"mine")
        (home / name).write_bytes(b"mine")
    target = run / place
    if place.startswith("overlay/"):
        target.parent.mkdir()
    elif target.exists():
        target.unlink()
    if place == "overlay" and make in (folder, hard_link):
        pytest.skip("is a folder")
    make(target, home / target.name if target.name != "overlay" else home / "overlay" / "x")
    before = contents(tmp_path)
    for more in ((), ("--residency", "disk"), ("--residency", "resident")):
        code, output = edgezo_json("finetune", "--resume", "--out", run, *more)
        assert code == 1 and target.name in output["error"], output
        assert contents(tmp_path) == before


@pytest.mark.parametrize("place", IN_PLACE[1:])
def test_a_new_run_in_a_directory_with_a_link_is_refused_too(bench, edgezo_json, tmp_path, place):
    run, victim = tmp_path / "run", tmp_path / "victim"
    (run / place).parent.mkdir(parents=True)
    (run / ".edgezo").write_text('{"kind": "run", "format": 1}')  # as it may be received
    victim.mkdir() if place == "overlay" else victim.write_bytes(b"mine")
    if place == "overlay":
        (victim / "block-0000.overlay").write_bytes(b"mine")
    (run / place).symlink_to(victim)
    before = contents(tmp_path)
    for more in ((), ("--residency", "disk")):
        code, output = edgezo_json("finetune", *bench.arguments(train="full"), "--out", run, *more)
        assert code == 1 and "a link to" in output["error"]
        assert contents(tmp_path) == before


def test_files_that_are_replaced_take_the_place_of_links(runs, edgezo_json, tmp_path):
    """A resume reads them where they lead, and leaves them alone there."""
    run, home = shutil.copytree(runs / "head", tmp_path / "run"), tmp_path / "home"
    home.mkdir()
    replaced = ("config.toml", "plan.json", "summary.json", "head.safetensors")
    for name in replaced:
        (run / name).rename(home / name)
        (run / name).symlink_to(home / name)
    (run / "summary.json").unlink()
    (run / "summary.json").symlink_to(
        home / "plan.json"
    )  # which is no summary, so there is something to do
    before = contents(home)
    code, output = edgezo_json("finetune", "--resume", "--out", run, "--micro-batch", "1")
    assert code == 0, output
    assert contents(home) == before
    assert not any((run / name).is_symlink() for name in replaced)


@pytest.mark.parametrize(
    "name", ["config.toml", "plan.json", "summary.json", "trained.safetensors"]
)
def test_a_folder_in_the_place_of_a_file_is_refused(runs, edgezo_json, tmp_path, name):
    run = shutil.copytree(runs / "head", tmp_path / "run")
    (run / name).unlink(missing_ok=True)
    (run / name).mkdir()
    (run / name / "notes").write_bytes(b"mine")
    before = contents(run)
    code, output = edgezo_json("finetune", "--resume", "--out", run)
    assert code in (1, 2) and name in output["error"], output
    assert contents(run) == before

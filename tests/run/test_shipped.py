"""A fine-tune as one small file: over its base it becomes the run's weights, and anything else is refused."""

from __future__ import annotations

import json
import random
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
from conftest import Bench, make_model
from fuzz.readers import damaged
from test_runs import run_of

from edgezo.errors import EdgezoError
from edgezo.run import shipped
from edgezo.run.directory import RunFiles

pytestmark = pytest.mark.usefixtures("one_thread")
LARGE = {"step": 0.5, "sigma": 0.05}
TRAINED = ("lowrank", "lowrank+head", "lowrank+probe", "full")


@pytest.mark.parametrize("train", TRAINED)
def test_a_file_and_its_base_are_the_run(
    bench: Bench, train: str, edgezo_json: Any, tmp_path: Path
) -> None:
    summary = run_of(bench, tmp_path / "run", train=train, **LARGE)
    file = tmp_path / "mine.edgezo"
    code, made = edgezo_json("export", tmp_path / "run", "--format", "journal", "--out", file)
    assert code == 0 and made["steps"] == 3 and made["size_bytes"] == file.stat().st_size
    assert made["trained_sha256"] == summary["trained_sha256"]
    # The base is elsewhere, and the run is not there.
    shutil.rmtree(tmp_path / "run")
    base = shutil.copytree(bench.model, tmp_path / "elsewhere")
    code, applied = edgezo_json("apply", file, "--base", base, "--out", tmp_path / "out")
    assert code == 0 and applied["trained_sha256"] == summary["trained_sha256"]
    code, found = edgezo_json("eval", "--model", tmp_path / "out")
    assert code == 0
    assert found["value"] == summary["eval_after"]["value"]
    assert found["loss"] == pytest.approx(summary["eval_after"]["loss"], rel=1e-6)


def test_the_file_is_small_and_names_no_place_of_the_machine(
    bench: Bench, edgezo: Any, tmp_path: Path
):
    run_of(bench, tmp_path / "run", train="lowrank", **LARGE)
    file = tmp_path / "mine.edgezo"
    for out in (file, tmp_path / "again"):
        assert edgezo("export", tmp_path / "run", "--format", "journal", "--out", out)[0] == 0
    assert file.read_bytes() == (tmp_path / "again").read_bytes()
    with zipfile.ZipFile(file) as archive:
        assert set(archive.namelist()) == {"edgezo.json", "config.toml", "journal.bin"}
        about = json.loads(archive.read("edgezo.json"))
        assert about["base"] == bench.model.name
        assert str(tmp_path) not in archive.read("config.toml").decode()
    assert file.stat().st_size < (tmp_path / "run/journal.bin").stat().st_size + 4000


def test_another_base_is_refused(bench: Bench, edgezo: Any, tmp_path: Path) -> None:
    run_of(bench, tmp_path / "run", train="lowrank")
    file = tmp_path / "mine.edgezo"
    assert edgezo("export", tmp_path / "run", "--format", "journal", "--out", file)[0] == 0
    other = make_model(tmp_path / "other", seed=7)
    code, _, err = edgezo("apply", file, "--base", other, "--out", tmp_path / "out")
    assert code == 5 and not (tmp_path / "out").exists(), err


def test_a_file_that_was_changed_is_refused(bench: Bench, edgezo: Any, tmp_path: Path) -> None:
    run_of(bench, tmp_path / "run", train="lowrank+head", **LARGE)
    file = tmp_path / "mine.edgezo"
    assert edgezo("export", tmp_path / "run", "--format", "journal", "--out", file)[0] == 0
    with zipfile.ZipFile(file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    about = json.loads(entries["edgezo.json"])
    wrong = json.dumps({**about, "trained_sha256": "0" * 64}).encode()
    for what, changed, why in (
        ("another digest", {"edgezo.json": wrong}, "other weights than it was made from"),
        ("of another kind", {"edgezo.json": b'{"kind": "x"}'}, "edgezo.json"),
        (
            "of a later version",
            {"edgezo.json": json.dumps({**about, "format": 9}).encode()},
            "format 9",
        ),
        ("no journal", {"journal.bin": None}, "journal.bin"),
        ("no head", {"head.safetensors": None}, "head.safetensors"),
        ("another file", {"../../evil": b"x"}, "other files"),
        ("settings of nobody", {"config.toml": b"x = ["}, "config.toml"),
    ):
        broken = tmp_path / f"{what}.edgezo"
        with zipfile.ZipFile(broken, "x") as archive:
            for name, data in {**entries, **changed}.items():
                if data is not None:
                    archive.writestr(name, data)
        code, _, err = edgezo("apply", broken, "--base", bench.model, "--out", tmp_path / "out")
        assert code in (1, 2) and why in err and str(broken) in err, (what, err)
        assert "Traceback" not in err and "edgezo-apply" not in err, err
        assert not (tmp_path / "out").exists(), what
    packed = tmp_path / "packed.edgezo"
    with zipfile.ZipFile(packed, "x", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    cut = tmp_path / "cut.edgezo"
    cut.write_bytes(file.read_bytes()[:-40])
    flipped = bytearray(file.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    bits = tmp_path / "bits.edgezo"
    bits.write_bytes(flipped)
    for broken in (packed, cut, bits, bench.data / "label.jsonl", tmp_path / "none"):
        code, _, err = edgezo("apply", broken, "--base", bench.model, "--out", tmp_path / "out")
        assert code in (1, 2) and str(broken) in err and "Traceback" not in err, err
        assert not (tmp_path / "out").exists()


def test_a_run_that_is_damaged_is_not_shipped(bench: Bench, edgezo: Any, tmp_path: Path) -> None:
    run_of(bench, tmp_path / "run", train="lowrank+head")
    files = RunFiles(tmp_path / "run")
    out = tmp_path / "mine.edgezo"
    assert (
        edgezo("export", files.path, "--format", "journal", "--dtype", "fp32", "--out", out)[0] == 2
    )
    head = files.snapshot.read_bytes()
    for damage in (b"", head[:-1]):
        files.snapshot.write_bytes(damage)
        code, _, err = edgezo("export", files.path, "--format", "journal", "--out", out)
        assert code == 1 and "head.safetensors" in err and not out.exists(), err
    files.snapshot.unlink()
    assert edgezo("export", files.path, "--format", "journal", "--out", out)[0] == 1
    assert not out.exists()


def test_whatever_the_bytes_are_nothing_but_an_error_comes_of_them(
    bench: Bench, edgezo: Any, tmp_path: Path
) -> None:
    run_of(bench, tmp_path / "run", train="lowrank+head")
    whole = tmp_path / "mine.edgezo"
    assert edgezo("export", tmp_path / "run", "--format", "journal", "--out", whole)[0] == 0
    data, broken, refused = whole.read_bytes(), tmp_path / "broken.edgezo", 0
    for seed in range(400):
        broken.write_bytes(damaged(random.Random(seed), data))
        try:
            shipped._about(broken, shipped._entries(broken))
        except EdgezoError as problem:
            assert str(broken) in str(problem)
            refused += 1
    assert refused > 300

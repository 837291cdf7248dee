"""Validate, then repair: a resume that is refused changes nothing, and one that goes on loses nothing that it cuts."""

from __future__ import annotations

import re
import shutil
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import forks
import pytest
from conftest import Bench, write_rows
from forks import Blow
from fuzz.journals import SoundJournal
from safetensors.torch import load_file, save_file

from edgezo.errors import BaseMismatch, EdgezoError, UsageError
from edgezo.plan.request import make_config
from edgezo.run import train
from edgezo.run.clock import Pause
from edgezo.run.directory import RunFiles, reopen
from edgezo.run.journal import Journal, open_journal
from edgezo.run.journal_record import StepRecord
from edgezo.run.train import finetune


class Killed(BaseException):
    """Raised where a process is killed. No code of edgezo catches it."""


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def killed_after(monkeypatch: pytest.MonkeyPatch, step: int, run: Callable[[], object]) -> None:
    """Run until the record of ``step`` is on disk and its update is not made."""
    plain = Journal.append

    def cut(journal: Journal, record: StepRecord) -> None:
        plain(journal, record)
        if record.step == step:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", cut)
        with pytest.raises(Killed):
            run()


SETTINGS = {"train": "lowrank+head", "rank": 2, "steps": 8, "snapshot_every": 2}


@pytest.fixture(scope="module")
def stopped(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps that was killed inside the write of its sixth record; the rest of it lies around too."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    cfg = make_config(bench.settings(out=str(run), **SETTINGS))
    with pytest.MonkeyPatch.context() as patch:
        killed_after(patch, 5, lambda: finetune(cfg))
    journal = run / "journal.bin"
    sound = SoundJournal.of("", journal.read_bytes())
    journal.write_bytes(sound.data[: sound.ends[5] + 50])
    (run / ".journal.bin.0123abcd.edgezo-tmp").write_bytes(b"half")
    (run / "trained.safetensors").write_bytes(b"of a replay")
    assert (run / "head.safetensors").exists()
    return run


def other_base(bench: Bench, run: Path, aside: Path) -> list[str]:
    other = Path(shutil.copytree(bench.model, aside / "model"))
    weights = load_file(other / "model.safetensors")
    save_file(
        {k: v * 1.01 for k, v in weights.items()}, other / "model.safetensors", {"format": "pt"}
    )
    return ["--model", str(other)]


def other_rows(bench: Bench, run: Path, aside: Path) -> list[str]:
    rows = [{"text": f"another film {i}", "label": i % 2} for i in range(40)]
    return ["--data", str(write_rows(aside / "rows.jsonl", rows))]


def in_journal(change: Callable[[SoundJournal], bytes]) -> Callable[..., list[str]]:
    def changed(bench: Bench, run: Path, aside: Path) -> list[str]:
        file = run / "journal.bin"
        file.write_bytes(change(SoundJournal.of("", file.read_bytes())))
        return []

    return changed


def zeroed(data: bytes, start: int, stop: int) -> bytes:
    return data[:start] + bytes(stop - start) + data[stop:]


def forged(sound: SoundJournal) -> bytes:
    fields = sound.fields()
    fields.records[1].sigma = 0.5
    return fields.encode()


def in_file(name: str, change: Callable[[bytes], bytes]) -> Callable[..., list[str]]:
    def changed(bench: Bench, run: Path, aside: Path) -> list[str]:
        (run / name).write_bytes(
            change((run / name).read_bytes() if (run / name).exists() else b"")
        )
        return []

    return changed


REFUSALS: dict[str, tuple[int, str, Callable[..., list[str]]]] = {
    "another base": (5, "other base weights", other_base),
    "other rows": (1, "other rows", other_rows),
    "no rows": (2, "no such file", lambda *_: ["--data", "absent.jsonl"]),
    "no model": (1, "absent", lambda *_: ["--model", "absent/model"]),
    "another setting": (2, "--rank was 2", lambda *_: ["--rank", "4"]),
    "another setting in the file": (
        *(2, "--rank was 2 when the run began, not 4"),
        in_file("config.toml", lambda t: t.replace(b"rank = 2", b"rank = 4")),
    ),
    "a file of no settings": (2, "not valid TOML", in_file("config.toml", lambda t: b"\0")),
    "a small budget": (3, "", lambda *_: ["--max-mem", "20MB"]),
    "a header cut short": (1, "header is damaged", in_journal(lambda s: s.data[:100])),
    "no journal at all": (1, "not a journal", in_journal(lambda s: b"PK\x03\x04" + s.data)),
    "a record damaged": (1, "step 1 .*damaged", in_journal(lambda s: zeroed(s.data, s.ends[1], s.ends[1] + 9))),
    "two records damaged": (1, "step 3 .*damaged", in_journal(lambda s: zeroed(s.data, s.ends[3], s.ends[5]))),
    "more than a record of zeros": (1, "step 5 .*damaged", in_journal(lambda s: s.data + bytes(5000))),
    "a record twice": (1, "missing or twice", in_journal(lambda s: s.data + s.records[4])),
    "a record of no run": (1, "its sigma is 0.5", in_journal(forged)),
    "a snapshot beyond the journal": (1, "its end was lost", in_journal(lambda s: s.data[: s.ends[2]])),
    "a snapshot cut short": (1, "head.safetensors", in_file("head.safetensors", lambda t: t[:-9])),
    "a snapshot that is none": (1, "head.safetensors", in_file("head.safetensors", lambda t: b"x")),
    "records again that are none": (1, "journal-again.bin", in_file("journal-again.bin", lambda t: b"x")),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_a_resume_that_is_refused_leaves_every_byte_of_the_directory(
    bench, edgezo, stopped, tmp_path, case
):
    wanted, message, change = REFUSALS[case]
    run = Path(shutil.copytree(stopped, tmp_path / "run"))
    options = change(bench, run, tmp_path)
    before = contents(run)
    code, _, err = edgezo("finetune", "--resume", "--out", run, *options)
    assert code == wanted, err
    assert re.search(message, err) and "Traceback" not in err
    assert contents(run) == before, case


def test_a_journal_that_another_process_writes_is_left_as_it_is(bench, edgezo, stopped, tmp_path):
    run = Path(shutil.copytree(stopped, tmp_path / "run"))
    before = contents(run)
    with open_journal(run / "journal.bin", resume=True):
        code, _, err = edgezo("finetune", "--resume", "--out", run)
    assert code == 1 and "another process" in err
    assert contents(run) == before


def test_a_linear_probe_that_is_gone_refuses_a_resume_and_nothing_changes(bench, edgezo, tmp_path):
    run = tmp_path / "run"
    said = bench.settings(out=str(run), train="lowrank+probe", rank=2, steps=4)
    with pytest.MonkeyPatch.context() as patch:
        killed_after(patch, 1, lambda: finetune(make_config(said)))
    journal = run / "journal.bin"
    journal.write_bytes(journal.read_bytes() + b"EZ half a record")
    probe = (run / "probe.safetensors").read_bytes()
    (run / "probe.states").write_bytes(b"of rows that have passed")
    for damage in (None, b"x", probe[:-9]):
        (run / "probe.safetensors").unlink(missing_ok=True)
        if damage is not None:
            (run / "probe.safetensors").write_bytes(damage)
        before = contents(run)
        code, _, err = edgezo("finetune", "--resume", "--out", run)
        assert code == 1 and "probe.safetensors" in err, err
        assert contents(run) == before
    (run / "probe.safetensors").write_bytes(probe)
    assert edgezo("finetune", "--resume", "--out", run)[0] == 0
    assert not (run / "probe.states").exists()


def test_base_rows_finetuner_and_settings_are_compared_before_the_end_is_cut(stopped, tmp_path):
    run = RunFiles(Path(shutil.copytree(stopped, tmp_path / "run")))
    before = contents(run.path)
    with open_journal(run.journal, resume=False) as journal:
        began = journal.header
    facts, config = began["dataset"], began["config"]
    for changes, kind, message in (
        ({"content_hash": "x"}, BaseMismatch, "other base weights"),
        ({"data_hash": "x"}, EdgezoError, "other rows"),
        (
            {"dataset": {**facts, "label_ids": [1, 2]}},
            EdgezoError,
            r"another task.*tokens \[1, 2\]",
        ),
        ({"finetuner_hash": "x"}, EdgezoError, "another finetuner"),
        ({"config": {**config, "rank": 3}}, UsageError, "--rank was 2 when the run began, not 3"),
        ({"config": {**config, "train": ["full"]}}, UsageError, "--train was"),
    ):
        with pytest.raises(kind, match=message):
            reopen(run, {**began, **changes})
        assert contents(run.path) == before
    reopen(run, {**began, "config": {**config, "micro_batch": 1, "data": "moved"}}).close()
    assert contents(run.path) == before


def test_a_resume_keeps_what_it_cuts_and_says_where(bench, edgezo, stopped, tmp_path):
    run = Path(shutil.copytree(stopped, tmp_path / "run"))
    data = (run / "journal.bin").read_bytes()
    code, _, err = edgezo("finetune", "--resume", "--out", run)
    assert code == 0, err
    assert (
        "50 bytes of an unfinished record of step 5; cut off, and kept in journal-cut-5.bin" in err
    )
    assert (run / "journal-cut-5.bin").read_bytes() == data[-50:]
    assert (run / "journal.bin").read_bytes().startswith(data[:-50])  # recomputed to the same bits
    assert not (run / "journal-again.bin").exists() and not (run / "trained.safetensors").exists()
    assert not list(run.glob(".journal.bin.*"))


# --- a run of a given time ----------------------------------------------------------------------


class Ticks:
    """A clock of training on which every look at it takes a second."""

    def __init__(self, before_s: float):
        self.now = before_s

    def seconds(self) -> float:
        self.now += 1.0
        return self.now

    def paused(self) -> AbstractContextManager[Pause]:
        return nullcontext(Pause())


def test_step_sizes_of_a_run_of_a_given_time_survive_every_kill(bench, monkeypatch, tmp_path):
    """Four kills while the same steps are computed again: each has the step size that it had first."""
    monkeypatch.setattr(train, "TrainingClock", Ticks)
    run, sizes, kept = RunFiles(tmp_path / "run"), {}, {}
    said = {**SETTINGS, "steps": None, "snapshot_every": 4}
    cfg = make_config(bench.settings(out=str(run.path), for_s=60, **said))

    def first() -> object:
        return finetune(cfg)

    def again() -> object:
        return finetune(cfg, resume=True)

    # The snapshot is of step 4; steps 4 to 6 are computed again, and again; at last some beyond.
    for last, go_on in ((6, first), (4, again), (5, again), (4, again), (7, again)):
        killed_after(monkeypatch, last, go_on)
        with open_journal(run.journal, resume=False) as journal:
            assert journal.next_step == last + 1
            for record in journal.records():
                assert sizes.setdefault(record.step, record.step_size) == record.step_size
                bits = record.losses.tobytes(), record.credit.tobytes()
                assert kept.setdefault(record.step, bits) == bits
        assert (run.path / "journal-again.bin").exists() == (last in (4, 5))
    assert len(set(sizes.values())) == len(sizes) == 8
    summary = again()
    assert summary["steps"] > 8
    with open_journal(run.journal, resume=False) as journal:
        assert {s: journal.record(s).step_size for s in sizes} == sizes


def test_without_the_kept_records_the_step_sizes_would_be_others(bench, monkeypatch, tmp_path):
    "The test above sees something: the clock of a resume gives other sizes."
    monkeypatch.setattr(train, "TrainingClock", Ticks)
    run = RunFiles(tmp_path / "run")
    said = {**SETTINGS, "steps": None, "snapshot_every": 4}
    cfg = make_config(bench.settings(out=str(run.path), for_s=60, **said))
    killed_after(monkeypatch, 6, lambda: finetune(cfg))
    with open_journal(run.journal, resume=False) as journal:
        sizes = [journal.record(s).step_size for s in (5, 6)]
    killed_after(monkeypatch, 4, lambda: finetune(cfg, resume=True))
    (run.path / "journal-again.bin").unlink()
    killed_after(monkeypatch, 6, lambda: finetune(cfg, resume=True))
    with open_journal(run.journal, resume=False) as journal:
        assert [journal.record(s).step_size for s in (5, 6)] != sizes


# --- kill -9 in every write of a repair ---------------------------------------------------------

BLOWS = (
    Blow("record", 6, 0.5),  # of step 5; the snapshot is of step 4
    Blow("journal-cut-5.bin", 1, 0),
    Blow("journal-cut-5.bin", 1, 1),
    Blow("cut", 1, 0),
    Blow("cut", 1, 1),
    Blow("journal-again.bin", 1, 0),
    Blow("journal-again.bin", 1, 1),
    Blow("cut", 1, 1),
    Blow("record", 1, 1),  # step 4 is computed again
)


def test_a_run_killed_in_every_write_of_its_repair_ends_with_the_same_bits(bench, tmp_path):
    def request(out: str) -> list[str]:
        said = bench.arguments(out=tmp_path / out, **SETTINGS)
        return ["finetune", *said]

    code, _, err = forks.start(request("whole"), tmp_path / "printed").end()
    assert code == 0, err
    run, again = tmp_path / "run", ["finetune", "--resume", "--out", str(tmp_path / "run")]
    for number, blow in enumerate(BLOWS):
        args = again if number else request("run")
        code, _, err = forks.start(args, tmp_path / "printed", blow).end()
        assert code == -signal.SIGKILL, (blow, err)
    code, _, err = forks.start(again, tmp_path / "printed").end()
    assert code == 0, err
    whole = tmp_path / "whole"
    for name in ("journal.bin", "head.safetensors"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    names = {file.name for file in run.iterdir()}
    assert names == {"journal-cut-5.bin", *(file.name for file in whole.iterdir())}

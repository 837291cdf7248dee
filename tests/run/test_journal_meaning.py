"""Meaning after integrity: what a journal with right checksums may say, and what is refused, whoever made it."""

from __future__ import annotations

import random
import shutil
import tracemalloc
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzz import forged_journals
from fuzz import journals as fuzz
from fuzz.journals import SCALED, SHAPED, SKIPPED, TOUCHED, JournalFields, RecordFields
from hypothesis import given, settings
from hypothesis import strategies as st

from edgezo.errors import BaseMismatch, EdgezoError
from edgezo.plan.request import from_toml
from edgezo.run.journal import create_journal, open_journal
from edgezo.run.journal_header import check_base
from edgezo.run.journal_record import StepRecord, decode_record, encode_record

SOUND = {sound.name: sound for sound in fuzz.sound_journals()}


def opened(folder: Path, data: bytes, *, resume: bool = False) -> list[StepRecord]:
    """The records of a journal. Its file is as before, whatever it is."""
    path = folder / "journal.bin"
    path.write_bytes(data)
    try:
        with open_journal(path, resume=resume) as journal:
            assert "config" not in journal.header or journal.settings.model
            return list(journal.records())
    finally:
        assert path.read_bytes() == data


# --- what runs have written --------------------------------------------------------------------


@pytest.mark.parametrize("name", SOUND)
def test_a_journal_that_a_run_has_written_is_read_and_its_fields_make_its_bytes(tmp_path, name):
    sound = SOUND[name]
    assert len(opened(tmp_path, sound.data)) == len(sound.records)
    assert sound.fields().encode() == sound.data


def test_the_header_has_the_settings_that_stand_in_the_configuration():
    for file in sorted(fuzz.OLD_RUNS.glob("*/*/journal.bin")):
        with open_journal(file, resume=False) as journal:
            began = journal.settings
            now = from_toml((file.parent / "config.toml").read_text())
        free = {"out": None, "device": None, "max_mem_bytes": None, "finetuner": None}
        assert began.to_dict() | free == now.to_dict() | free, file


# --- records -----------------------------------------------------------------------------------


def changed(name: str, change: Callable[[RecordFields], object], at: int = 1) -> bytes:
    """A sound journal in which one record says something else."""
    fields = SOUND[name].fields()
    change(fields.records[at])
    return fields.encode()


def values(**changes: Any) -> Callable[[RecordFields], object]:
    return lambda record: [setattr(record, name, value) for name, value in changes.items()]


def number(place: int, value: float) -> Callable[[RecordFields], object]:
    return lambda record: record.floats.__setitem__(place, value)


FORGED_RECORDS = {
    "sigma is not finite": ("mezo", values(sigma=float("nan")), "its sigma is nan"),
    "sigma is 0": ("mezo", values(sigma=0.0), "its sigma is 0"),
    "sigma is not the run's": ("mezo", values(sigma=0.003), "its sigma is 0.003"),
    "automatic sigma": ("step-auto", values(sigma=0.02), "its sigma is 0.02"),
    "step size is not finite": ("mezo", values(step_size=float("inf")), "its step size is inf"),
    "step size above --step": ("mezo", values(step_size=0.5), "its step size is 0.5"),
    "credit is NaN": ("mezo", number(9, float("nan")), "a credit is not finite"),
    "credit is infinite": ("mezo", number(8, float("-inf")), "a credit is not finite"),
    "not marked as skipped": ("mezo", lambda r: r.floats.__setitem__(slice(8, 12), [0.0] * 4), "not marked"),
    "marked as skipped": ("mezo", values(flags=SKIPPED), "marked as skipped"),
    "a flag of no version": ("mezo", values(flags=16), "its flags are 0x10"),
    "another batch": ("mezo", lambda r: values(examples=2, floats=r.floats[:6])(r), "of 2 examples"),
    "no example": ("mezo", values(examples=0, floats=[]), "of 0 examples"),
    "huge batch": ("mezo", values(examples=2**31), "of 2147483648 examples"),
    "more losses": ("mezo-svrg", values(flags=SHAPED, shape=(6, 4, 0), floats=[1.0] * 28), "bytes"),
    "other sides, same size": ("mezo-svrg", values(shape=(3, 9, 0)), "3 evaluations of 4"),
    "a shape in format 1": ("touched", values(flags=SHAPED | TOUCHED, shape=(2, 3, 3)), "shape"),
    "huge shape": ("mezo-svrg", values(shape=(2**32 - 1, 2**32 - 1, 0)), "are announced where"),
    "more at the end": ("touched", lambda r: values(more=b"\1\1\1")(r), "numbers follow"),
    "half a number": ("touched", values(more=b"\x80"), "has no end"),
    "a long number": ("touched", values(more=b"\x80\x00"), "longer than it has to be"),
    "tokens of too few": ("touched", lambda r: r.varints.__setitem__(slice(None), [1, 5]), "1 of 3"),
    "a list cut short": ("touched", lambda r: r.varints.__setitem__(0, 10_000), "cut short"),
    "a huge list": ("touched", lambda r: r.varints.__setitem__(0, 2**34), "cut short"),
    "a token twice": ("touched", values(varints=[2, 5, 0, 1, 1, 1, 1]), "not sorted, unique"),
    "a token beyond 32 bits": ("touched", values(varints=[1, 2**33, 1, 1, 1, 1]), "below 2"),
    "tokens where none are": ("mezo", values(flags=TOUCHED, varints=[1, 5] * 4), "bytes"),
    "tokens flagged, none there": ("touched", values(varints=[]), "end after 0 of 3"),
    "scales without a finetuner": ("touched", values(flags=TOUCHED | SCALED, scales=[1.0] * 2), "formats 3 and 6"),
    "no scales": ("zo-finetuner", lambda r: values(flags=TOUCHED, scales=None)(r), "has no scales|bytes"),
    "a scale is NaN": ("zo-finetuner", lambda r: r.scales.__setitem__(3, float("nan")), "a scale is not"),
    "a scale is huge": ("zo-finetuner", lambda r: r.scales.__setitem__(0, 1e30), "a scale is not"),
    "a scale is negative": ("zo-finetuner", lambda r: r.scales.__setitem__(1, -1.0), "a scale is not"),
    "huge count of scales": ("zo-finetuner", values(scale_count=2**32 - 1), "are announced where"),
    "another step": ("mezo", values(step=3), "step 3 follows step 0"),
    "a step of the future": ("mezo", values(step=2**32 - 1), "step 4294967295 follows"),
    "a longer length": ("mezo", values(length=89), "it has 89 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("case", FORGED_RECORDS)
def test_a_record_with_right_checksums_that_no_run_writes_is_refused_and_never_cut(tmp_path, case):
    name, change, message = FORGED_RECORDS[case]
    for at in (1, -1):
        if case == "another step" and at < 0:
            continue  # step 3 follows step 6 there
        data = changed(name, change, at)
        for resume in (False, True):
            with pytest.raises(EdgezoError, match=message if at == 1 else None) as caught:
                opened(tmp_path, data, resume=resume)
            assert "head -c" in str(caught.value)


def test_losses_may_be_any_number(tmp_path):
    for value in (float("nan"), float("inf"), -1e30):
        assert len(opened(tmp_path, changed("mezo", number(2, value)))) == 8


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60), st.integers(0, 15), st.integers(0, 3), st.integers(0, 2**32 - 1))
def test_bytes_that_are_read_as_a_record_are_those_that_the_writer_makes_of_it(body, flags, b, crc):
    "Whatever stands between two right checksums is read exactly, or not at all."
    floats = [1.0] * (3 * b)
    data = RecordFields(1, flags, b, 0.1, 0.2, floats, more=body).encode(crc)
    try:
        record = decode_record(data, crc)
    except ValueError:
        return
    assert record is not None
    assert encode_record(record, crc) == data


def test_a_record_that_no_resume_would_read_is_not_written(tmp_path):
    "Numbers that have grown too large end a run while it can still be read."
    fields = SOUND["mezo"].fields()
    sound = opened(tmp_path, SOUND["mezo"].data)[0]
    with create_journal(tmp_path / "new.bin", fields.header) as journal:
        whole = (tmp_path / "new.bin").read_bytes()
        for change in (
            {"credit": np.full(4, np.inf, "f4")},
            {"step_size": float("nan")},
            {"sigma": 0.5},
            {"losses": np.ones((2, 3), "f4"), "credit": np.ones(3, "f4")},
        ):
            with pytest.raises(EdgezoError, match="step 0 cannot be recorded"):
                journal.append(replace(sound, **change))
        assert (tmp_path / "new.bin").read_bytes() == whole
        journal.append(sound)


# --- the header --------------------------------------------------------------------------------


def with_header(change: Callable[[dict[str, Any]], object], name: str = "mezo") -> bytes:
    fields = SOUND[name].fields()
    change(fields.header)
    return fields.encode()


FORGED_HEADERS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "an unknown key": (lambda h: h.update(x=1), "has 'x', which this edgezo does not know"),
    "no data_hash": (lambda h: h.pop("data_hash"), "it has no data_hash"),
    "no dataset": (lambda h: h.pop("dataset"), "it has no dataset"),
    "a hash that is a list": (lambda h: h.update(content_hash=[1]), "content_hash is list"),
    "an empty hash": (lambda h: h.update(data_hash=""), "data_hash is ''"),
    "a finetuner that is a number": (lambda h: h.update(finetuner_hash=1), "finetuner_hash is 1"),
    "a dataset that is text": (lambda h: h.update(dataset="x"), "dataset is 'x', where an object"),
    "a kind of no data": (lambda h: h["dataset"].update(kind="x"), "kind is 'x'"),
    "a kind that is a list": (lambda h: h["dataset"].update(kind=[]), "kind is list"),
    "names that are numbers": (lambda h: h["dataset"].update(label_names=[1, 2]), "label_names"),
    "ids that are texts": (lambda h: h["dataset"].update(label_ids=["a", "b"]), "label_ids are not"),
    "ids that are bools": (lambda h: h["dataset"].update(label_ids=[True, 2]), "label_ids are not"),
    "a negative id": (lambda h: h["dataset"].update(label_ids=[-1, 2]), "label_ids are not"),
    "a huge id": (lambda h: h["dataset"].update(label_ids=[2**40, 2]), "label_ids are not"),
    "an id twice": (lambda h: h["dataset"].update(label_ids=[5, 5]), "2 label_ids with 2 names"),
    "an id without a name": (lambda h: h["dataset"].update(label_ids=[5, 6, 7]), "3 label_ids with 2"),
    "labels of a text": (lambda h: h["dataset"].update(kind="text"), "in a dataset of text"),
    "more in the dataset": (lambda h: h["dataset"].update(x=1), "dataset has 'x'"),
    "settings that are null": (lambda h: h.update(config=None), "config is None, where an object"),
    "an unknown setting": (lambda h: h["config"].update(x=1), "config has 'x'"),
    "a setting of another type": (lambda h: h["config"].update(rank="x"), "--rank: needs a number"),
    "a setting out of bounds": (lambda h: h["config"].update(sigma=2.0), "--sigma: must be at most 1"),
    "a setting beyond floats": (lambda h: h["config"].update(step=10**400), "needs a finite number"),
    "a bound beyond floats": (lambda h: h["config"].update(rank=10**400), "cannot be read|--rank"),
    "parts of no model": (lambda h: h["config"].update(train=["x"]), "'x' is not one of"),
    "parts that are a list of lists": (lambda h: h["config"].update(train=[[]]), "--train"),
    "a choice that is a list": (lambda h: h["config"].update(credit=[1]), "--credit"),
    "settings against each other": (lambda h: h["config"].update(credit="group"), "config: --dir"),
    "a long text": (lambda h: h["config"].update(credit="9" * 5000), r"--credit: '9{80,}\.\.\."),
}  # fmt: skip


@pytest.mark.parametrize("case", FORGED_HEADERS)
def test_a_header_that_no_run_writes_is_refused(tmp_path, case):
    change, message = FORGED_HEADERS[case]
    for resume in (False, True):
        with pytest.raises(EdgezoError, match=message):
            opened(tmp_path, with_header(change), resume=resume)
    header = deepcopy(SOUND["mezo"].fields().header)
    change(header)
    with pytest.raises((EdgezoError, ValueError)):
        create_journal(tmp_path / "new.bin", header)
    assert not (tmp_path / "new.bin").exists()


TEXTS = {
    "a key twice": lambda text: text.replace(b'"rank":8', b'"rank":8,"rank":8'),
    "spaces": lambda text: text.replace(b":", b": ", 1),
    "keys in another order": lambda text: text.replace(b'"rank":8', b'"zzz":8'),
    "not a number": lambda text: text.replace(b'"seed":0', b'"seed":NaN'),
    "beyond floats": lambda text: text.replace(b'"seed":0', b'"seed":1e999'),
    "digits without end": lambda text: text.replace(b'"seed":0', b'"seed":' + b"9" * 5000),
    "half a surrogate": lambda text: text.replace(b'"model":"base"', b'"model":"\\ud800"'),
    "no UTF-8": lambda text: text.replace(b'"model":"base"', b'"model":"\xff"'),
    "UTF-16": lambda text: text.decode().encode("utf-16"),
    "deep": lambda text: b"[" * 100_000,
    "deep objects": lambda text: b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "a list": lambda text: b"[]",
    "nothing": lambda text: b"",
}


@pytest.mark.parametrize("case", TEXTS)
def test_a_header_in_another_spelling_than_the_writer_s_is_refused(tmp_path, case):
    fields = SOUND["mezo"].fields()
    fields.text = TEXTS[case](fuzz.canonical(fields.header))
    assert fields.text != fuzz.canonical(fields.header)
    for resume in (False, True):
        with pytest.raises(EdgezoError, match=r"header is (damaged|whole, but)"):
            opened(tmp_path, fields.encode(), resume=resume)


def test_a_header_that_names_words_beyond_the_base_or_has_no_settings_is_refused():
    header = SOUND["default"].fields().header
    check_base(header, header["content_hash"], vocab=300)
    with pytest.raises(
        EdgezoError, match="names the token 268 as a label word, but the base has 268"
    ):
        check_base(header, header["content_hash"], vocab=268)
    with pytest.raises(BaseMismatch):
        check_base(header, "other", vocab=268)
    with pytest.raises(EdgezoError, match="no settings"):
        check_base({"content_hash": "x"}, "x")


def test_a_run_begins_with_step_0(tmp_path):
    fields = SOUND["mezo"].fields()
    fields.first_step = 3
    fields.records = [replace(record, step=record.step + 3) for record in fields.records]
    with pytest.raises(EdgezoError, match="begins with step 3"):
        opened(tmp_path, fields.encode())
    with pytest.raises(EdgezoError, match="begins with step 3"):
        create_journal(tmp_path / "new.bin", fields.header, first_step=3)


# --- whatever is forged ------------------------------------------------------------------------


@settings(max_examples=400, deadline=None)
@given(st.integers(0, 2**64))
def test_a_forged_journal_is_refused_or_a_journal(tmp_path_factory, seed):
    folder = tmp_path_factory.getbasetemp()
    _, data = next(forged_journals.forged(seed))
    for resume in (False, True):
        try:
            records = opened(folder, data, resume=resume)
        except EdgezoError:
            continue
        for step, record in enumerate(records):
            assert record.step == step and np.isfinite(record.credit).all()
            assert np.isfinite([record.sigma, record.step_size]).all()
            for ids in record.touched:
                assert (np.diff(ids) > 0).all() and (ids >= 0).all() and (ids < 2**32).all()


def test_no_file_is_read_into_much_more_memory_than_it_has_bytes(tmp_path):
    """A header is read into 33 times its bytes at most, and is short; everything else into 18 times."""
    size, seen = 2 * 10**5, 0
    for name, data in forged_journals.bombs(size):
        (tmp_path / "journal.bin").write_bytes(data)
        tracemalloc.start()
        try:
            open_journal(tmp_path / "journal.bin", resume=bool(seen % 2)).close()
        except EdgezoError:
            pass
        finally:
            peak_bytes = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak_bytes < (40 if "header" in name else 20) * size + 4 * 10**6, name
        seen += 1
    assert seen > 20


# --- commands ----------------------------------------------------------------------------------


@pytest.fixture
def beside_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Path:
    """A current directory where paths of the old runs begin."""
    for name in ("base", "rows"):
        shutil.copytree(fuzz.OLD_RUNS / name, tmp_path / name)
    shutil.copy(fuzz.OLD_RUNS / "finetuner.safetensors", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def copied(kind: str, data: bytes | None = None, state: str = "finished") -> Path:
    """A run of ``tests/old_runs`` in the current directory, with another journal."""
    shutil.rmtree("run", ignore_errors=True)
    run = Path(shutil.copytree(fuzz.OLD_RUNS / state / kind, "run"))
    if data is not None:
        (run / "journal.bin").write_bytes(data)
    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def assert_run_or_error(edgezo: Any, run: Path, what: object) -> list[int]:
    """Give every command that reads a journal: each ends in a result or in one clear error."""
    codes = []
    for command in (
        ("replay", run, "--out", "out"),
        ("export", run, "--out", "out"),
        ("eval", "--model", run),
        ("finetune", "--resume", "--out", run),
    ):
        shutil.rmtree("out", ignore_errors=True)
        before = contents(run)
        code, _, err = edgezo(*command)
        assert code in (0, 1, 2, 5) and "Traceback" not in err, (what, command, err)
        if code:
            assert contents(run) == before, (what, command, err)
            assert err.startswith("edgezo: ") or "\nedgezo: " in err or "Error" in err, err
        codes.append(code)
    return codes


NO_JOURNALS = (b"", b"\0" * 5000, b"PK\x03\x04", fuzz.MAGIC, fuzz.MAGIC + b"\xff" * 40, b"{}" * 999)


def test_commands_over_files_that_are_no_journals_end_in_one_clear_error(edgezo, beside_the_runs):
    for data in NO_JOURNALS:
        assert assert_run_or_error(edgezo, copied("mezo", data), data[:20]) == [1] * 4


def test_commands_over_forged_and_damaged_journals_end_in_a_run_or_in_one_clear_error(
    edgezo, beside_the_runs
):
    chance, codes = random.Random(22), []
    kinds = [name for name in SOUND if (fuzz.OLD_RUNS / "finished" / name).exists()]
    for number in range(16):
        kind = chance.choice(kinds)
        make = (
            forged_journals.forge
            if number % 4
            else lambda sound, chance: fuzz.truncated(sound.data, chance)
        )
        run = copied(kind, make(SOUND[kind], chance), chance.choice(("finished", "unfinished")))
        codes += assert_run_or_error(edgezo, run, (kind, number))
    assert {0, 1} <= set(codes)


MISFITS: dict[str, tuple[str, Callable[[JournalFields], object], str]] = {
    "a row of no table": (
        "zo-finetuner",
        lambda f: values(varints=[1, 300, 1, 1, 1, 1, 1, 1])(f.records[2]),
        "names the row 300",
    ),
    "no touched rows": (
        "zo-finetuner",
        lambda f: values(flags=SCALED, varints=None)(f.records[2]),
        "tokens of 0 examples, where 4 belong",
    ),
    "scales of fewer tensors": (
        "zo-finetuner",
        lambda f: [values(scales=r.scales[:-1])(r) for r in f.records],
        "33 scales, and 34 tensors",
    ),
    "settings of another run": (
        "mezo",
        lambda f: f.header["config"].update(seed=1),
        "was written with --seed 1, but the config.toml beside it has 0",
    ),
    "a word beyond the base": (
        "mezo",
        lambda f: f.header["dataset"].update(label_ids=[5, 300]),
        "names the token 300 as a label word",
    ),
    "no settings": ("mezo", lambda f: f.header.pop("config"), "no settings"),
    "another base": ("mezo", lambda f: f.header.update(content_hash="x"), "other base weights"),
    "an end that was lost": ("addax", lambda f: f.records.__delitem__(slice(5, None)), "its end was lost"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISFITS)
def test_a_journal_that_does_not_fit_the_model_beside_it_is_refused(edgezo, beside_the_runs, case):
    kind, change, message = MISFITS[case]
    fields = SOUND[kind].fields()
    change(fields)
    run = copied(kind, fields.encode())
    code, _, err = edgezo("replay", run, "--out", "out")
    assert code == (5 if case == "another base" else 1) and message in err, err
    assert not Path("out").exists()
    assert_run_or_error(edgezo, run, case)


# --- damage ------------------------------------------------------------------------------------


def test_of_damaged_journals_nothing_is_read_that_was_not_written(tmp_path):
    """2,000 of the 100,000 that docs/journal.md tells of."""
    path, kept = tmp_path / "journal.bin", 0
    for case in islice(fuzz.damaged(22), 2_000):
        path.write_bytes(case.data)
        for resume in (False, True):
            try:
                with open_journal(path, resume=resume) as journal:
                    assert not fuzz.wrongly_accepted(case, journal), (case.name, case.sound.name)
                    kept += 1
            except EdgezoError:
                pass
        assert path.read_bytes() == case.data
    assert kept > 100

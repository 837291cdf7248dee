"""Journals whose checksums are right and whose meaning is not, and files that ask for more memory than they have."""

from __future__ import annotations

import random
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from typing import Any

from fuzz.journals import (
    SCALED,
    SHAPED,
    SKIPPED,
    TOUCHED,
    JournalFields,
    RecordFields,
    SoundJournal,
    canonical,
    made_here,
    sound_journals,
)

# ---------------------------------------------------------------------------------------------
# Forgery


ODD_FLOATS = (
    *(0.0, -0.0, -1.0, 1e-320, 1e-30, 1e30, 1e300, -1e300),
    *(float("inf"), float("-inf"), float("nan")),
)
ODD_COUNTS = (0, 1, 2, 3, 7, 255, 1024, 65_536, 2**24, 2**31 - 1, 2**31, 2**32 - 1)
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 3, 2**31, 2**63, 10**400, 0.5, -0.5, 1e308, 1e-320),
    *("", "x", "\x00", "full", "candidates", "svrg", "1e9", "9" * 5000, "\ud800", "../../x"),
    *([], [1], ["full"], ["lowrank", "probe"], [[]], [True], [0.5], [-1], [2**40], [10**400]),
    *({}, {"a": 1}, [{}] * 3, ["x"] * 1000),
)


def _odd_float(record: RecordFields, chance: random.Random) -> None:
    name = chance.choice(("sigma", "step_size"))
    setattr(record, name, chance.choice(ODD_FLOATS))


def _odd_number(record: RecordFields, chance: random.Random) -> None:
    numbers = chance.choice((record.floats, record.scales or record.floats))
    odd = [x for x in ODD_FLOATS if x != x or abs(x) < 3e38 or abs(x) == float("inf")]
    if numbers:
        numbers[chance.randrange(len(numbers))] = chance.choice(odd)


def _odd_flags(record: RecordFields, chance: random.Random) -> None:
    record.flags ^= chance.choice((SKIPPED, TOUCHED, SHAPED, SCALED, 16, 0x8000))


def _odd_shape(record: RecordFields, chance: random.Random) -> None:
    shape = list(record.shape or (2, record.examples, 0))
    shape[chance.randrange(3)] = chance.choice(ODD_COUNTS)
    record.shape = (shape[0], shape[1], shape[2])
    if chance.random() < 0.8:
        record.flags |= SHAPED


def _odd_counts(record: RecordFields, chance: random.Random) -> None:
    what = chance.randrange(4)
    if what == 0:
        record.examples = chance.choice(ODD_COUNTS)
    elif what == 1:
        record.step = chance.choice(ODD_COUNTS)
    elif what == 2:
        record.length = chance.choice((*ODD_COUNTS, 52, 56))
    else:
        record.scale_count = chance.choice(ODD_COUNTS)
        record.scales = record.scales or [1.0] * chance.randrange(4)
        record.flags |= SCALED


def _odd_tokens(record: RecordFields, chance: random.Random) -> None:
    # Another oddity may have made the examples billions: no file holds their lists.
    numbers = record.varints = list(record.varints or [1, 5] * min(record.examples, 1000))
    record.flags |= TOUCHED
    for _ in range(chance.randrange(1, 4)):
        at = chance.randrange(len(numbers) + 1)
        what = chance.randrange(4)
        if what == 0 and numbers:
            numbers[at % len(numbers)] = chance.choice((*ODD_COUNTS, 2**35, 2**63, 2**80))
        elif what == 1 and numbers:
            del numbers[at % len(numbers)]
        elif what == 2:
            numbers.insert(at, chance.choice((0, 1, 300, 2**32)))
        else:
            record.more = chance.choice((b"\x80", b"\x80\x00", b"\xff" * 9, b"\0", b"\x01\x01"))


def _more_or_less(record: RecordFields, chance: random.Random) -> None:
    if chance.random() < 0.5 and record.floats:
        del record.floats[chance.randrange(len(record.floats)) :]
    else:
        record.floats += [chance.gauss(0, 1)] * chance.choice((1, 2, 3, 100))
    if chance.random() < 0.5:
        record.more = chance.randbytes(chance.choice((1, 4, 40)))


FORGED_RECORD = (
    *(_odd_float, _odd_number, _odd_flags, _odd_shape, _odd_counts, _odd_tokens, _more_or_less),
)


def _odd_header(fields: JournalFields, chance: random.Random) -> None:
    """Another value, a key more or less, anywhere in the header."""
    places: list[dict[str, Any]] = [fields.header]
    places += [v for v in fields.header.values() if isinstance(v, dict)]
    place = chance.choice(places)
    keys = sorted(place)
    what = chance.randrange(4)
    if what == 0 or not keys:
        place[chance.choice(("x", "max_mem", "out", "device", "finetuner_hash"))] = chance.choice(
            ODD_VALUES
        )
    elif what == 1:
        del place[chance.choice(keys)]
    else:
        place[chance.choice(keys)] = chance.choice(ODD_VALUES)


def _odd_text(fields: JournalFields, chance: random.Random) -> None:
    """Header bytes that are not the JSON that a journal has."""
    text = canonical(fields.header)
    fields.text = chance.choice(
        (
            text.replace(b'"rank":8', b'"rank":8,"rank":4'),
            text.replace(b'"seed":0', b'"seed":NaN'),
            text.replace(b'"seed":0', b'"seed":' + b"9" * chance.choice((300, 5000))),
            text.replace(b":", b": ", 1),
            b"[" * 100_000,
            b'{"a":' * 100_000,
            b"{}",
            b"null",
            b'"text"',
            b"",
            text.decode(errors="replace").encode("utf-16"),
            text[:-1] + b"\xff}",
            b"[" + b"{}," * 200_000 + b"{}]",
        )
    )


def _odd_prefix(fields: JournalFields, chance: random.Random) -> None:
    if chance.random() < 0.5:
        fields.version = chance.choice((*range(8), 2**32 - 1))
    else:
        fields.first_step = chance.choice((1, 7, 2**32 - 1))


def _odd_order(fields: JournalFields, chance: random.Random) -> None:
    records = fields.records
    what = chance.randrange(4)
    if what == 0 and records:
        del records[chance.randrange(len(records))]
    elif what == 1 and records:
        records.insert(chance.randrange(len(records)), deepcopy(chance.choice(records)))
    elif what == 2:
        chance.shuffle(records)
    else:
        other = chance.choice(sound_journals()).fields().records
        fields.records = [replace(r, step=i) for i, r in enumerate(other)]


FORGED_JOURNAL = (_odd_header, _odd_header, _odd_text, _odd_prefix, _odd_order)


def forge(sound: SoundJournal, chance: random.Random) -> bytes:
    """A journal that says something else than ``sound``, with right checksums."""
    fields = sound.fields()
    for _ in range(chance.choice((1, 1, 1, 2))):
        if chance.random() < 0.7 and fields.records:
            record = chance.choice(fields.records)
            chance.choice(FORGED_RECORD)(record, chance)
        else:
            chance.choice(FORGED_JOURNAL)(fields, chance)
    return fields.encode()


def forged(seed: int) -> Iterator[tuple[SoundJournal, bytes]]:
    """Forged journals without end, each with the sound one that it began as: the same ones for the same seed."""
    chance = random.Random(seed)
    while True:
        sound = chance.choice(sound_journals())
        yield sound, forge(sound, chance)


# ---------------------------------------------------------------------------------------------
# Files that ask for far more memory than they have bytes


def bombs(n_bytes: int) -> Iterator[tuple[str, bytes]]:
    """Journals of at most about ``n_bytes`` that announce, or are read into, as much as a file can."""
    sound = made_here("bomb", 1)

    def with_record(name: str, **changes: Any) -> tuple[str, bytes]:
        fields = sound.fields()
        fields.records = [replace(fields.records[0], **changes)]
        return name, fields.encode()

    most = 2**32 - 1
    yield with_record("examples", examples=2**31)
    yield with_record("shape", flags=SHAPED, shape=(most, most, most))
    yield with_record("shape of nothing", flags=SHAPED, shape=(most, 0, 0), examples=0, floats=[])
    yield with_record("scales", flags=SCALED, scales=[1.0], scale_count=most)
    yield with_record("length", length=most)
    yield with_record("one list", varints=[n_bytes - 100, *[1] * (n_bytes - 100)])
    yield with_record("huge numbers", more=b"\xff" * n_bytes)
    lists = n_bytes // 6
    yield with_record(
        "lists of nothing",
        flags=SHAPED | TOUCHED,
        shape=(0, lists, lists),
        floats=[0.0] * lists,
        varints=[0] * lists,
    )
    yield with_record("marks", more=b"EZ\0\0" * (n_bytes // 4), length=most)
    fields = sound.fields()
    ids = list(range(min(n_bytes, 2**22) // 15))
    fields.header["dataset"] |= {"label_ids": ids, "label_names": [""] * len(ids)}
    yield "labels", fields.encode()
    for unit in (b"{}", b"[]", b"[[]]", b'""', b"1", b'{"a":{}}'):
        fields = sound.fields()
        fields.text = b'{"config":[' + b",".join([unit] * (n_bytes // (len(unit) + 1))) + b"]}"
        yield f"header of {unit.decode()}", fields.encode()
        fields.text = fields.text[: 2**22]
        fields.text = fields.text[: fields.text.rindex(b",")] + b"]}"
        yield f"shorter header of {unit.decode()}", fields.encode()

"""A file of states: what is read is what was written, or it is not there."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from edgezo.errors import EdgezoError
from edgezo.weights.kept_states import STATE_FORMS, StatesFile, digest_of
from edgezo.weights.plain_states import KEPT_HEAD_BYTES

HIDDEN = 24
ROWS = [tuple(range(k, k + 3 + k % 5)) for k in range(20)]  # tokens of each row


def known(row: tuple[int, ...]) -> bytes:
    return digest_of(np.array(row))


def states_of(row: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(sum(row))
    return torch.randn(len(row), HIDDEN, generator=generator) * 3


def opened(path: Path, form: str = "fp32", identity: str = "base") -> StatesFile:
    file = StatesFile(path, HIDDEN, STATE_FORMS[form], identity)
    file.open()
    return file


@pytest.fixture
def written(tmp_path: Path) -> Path:
    file = opened(tmp_path / "states" / "some.states")
    for first in range(0, len(ROWS), 4):
        rows = ROWS[first : first + 4]
        file.append([known(row) for row in rows], [states_of(row) for row in rows])
    file.finish()
    file.close()
    return file.path


def found(file: StatesFile, row: tuple[int, ...]) -> Tensor | None:
    out = torch.empty(len(row), HIDDEN)
    return out if file.read(known(row), out) else None


@pytest.mark.parametrize("form", STATE_FORMS)
def test_what_is_read_is_what_was_written(form: str, tmp_path: Path) -> None:
    file = opened(tmp_path / "states" / "some.states", form)
    file.append([known(row) for row in ROWS], [states_of(row) for row in ROWS])
    file.finish()
    # int8: half a step of the largest value; bf16: 8 bits.
    near = {"fp32": 0.0, "bf16": 2**-8, "int8": 0.5 / 127}[form]
    for row in ROWS:
        states, expected = found(file, row), states_of(row)
        assert states is not None
        largest = expected.abs().amax(1, keepdim=True)
        assert bool(((states - expected).abs() <= near * largest * 1.001).all())
    assert found(file, (1, 2, 999)) is None
    file.close()


def test_it_is_found_by_a_later_process(written: Path) -> None:
    file = opened(written)
    assert len(file) == len(ROWS) and not file.damaged
    assert all(file.holds(known(row)) for row in ROWS)
    file.close()


def test_a_flipped_bit_anywhere_is_noticed(written: Path) -> None:
    whole = written.read_bytes()
    for place in np.linspace(0, len(whole) - 1, 97).astype(int):
        damaged = bytearray(whole)
        damaged[place] ^= 0x10
        written.write_bytes(damaged)
        file = opened(written)
        lost = [row for row in ROWS if not file.holds(known(row))]
        assert lost, f"byte {place}"
        assert file.damaged or place < KEPT_HEAD_BYTES
        for row in ROWS:
            states = found(file, row)
            assert states is None or torch.equal(states, states_of(row))
        file.append([known(row) for row in lost], [states_of(row) for row in lost])
        file.finish()
        assert all(torch.equal(found(file, row), states_of(row)) for row in ROWS)  # type: ignore[arg-type]
        file.close()


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.77, 0.999])
def test_a_file_that_was_cut_keeps_its_whole_rows(written: Path, share: float) -> None:
    os.truncate(written, int(written.stat().st_size * share))
    file = opened(written)
    for row in ROWS:
        states = found(file, row)
        assert states is None or torch.equal(states, states_of(row))
    assert len(file) == sum(file.holds(known(row)) for row in ROWS) < len(ROWS)
    file.close()


def test_a_change_while_the_file_is_open_ends_the_read(written: Path) -> None:
    file = opened(written)
    with open(written, "r+b") as other:
        other.seek(-5, os.SEEK_END)
        other.write(b"?")
    with pytest.raises(EdgezoError, match=r"have changed since the run began.*\n.*--resume"):
        found(file, ROWS[-1])
    file.close()


@pytest.mark.parametrize("other", [{"identity": "another base"}, {"form": "bf16"}])
def test_states_of_another_base_or_form_are_not_used(written: Path, other: dict[str, str]) -> None:
    file = opened(written, **other)
    assert not len(file)
    file.close()


def test_a_tree_is_another_row_than_its_tokens_in_a_line(tmp_path: Path) -> None:
    row = np.array(ROWS[3])
    line, fork = [-1, *range(len(row) - 1)], [-1, *[0] * (len(row) - 1)]
    assert len({digest_of(row), digest_of(row, line), digest_of(row, fork)}) == 3


def test_two_processes_do_not_write_one_file(written: Path) -> None:
    file = opened(written)
    with pytest.raises(EdgezoError, match="another run is computing the states"):
        opened(written)
    file.finish()
    second = opened(written)  # while the first one reads
    second.close()
    file.close()


def test_a_link_is_refused(tmp_path: Path, written: Path) -> None:
    link = tmp_path / "states" / "link.states"
    link.symlink_to(written)
    before = written.read_bytes()
    with pytest.raises(EdgezoError, match="link"):
        opened(link)
    assert written.read_bytes() == before


@pytest.fixture
def small_disk() -> Iterator[None]:
    """No file may be larger than 4,000 bytes."""
    before, handler = (
        resource.getrlimit(resource.RLIMIT_FSIZE),
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
    )
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_named_and_leaves_nothing(small_disk: None, tmp_path: Path) -> None:
    file = opened(tmp_path / "states" / "some.states")
    with pytest.raises(EdgezoError, match=r"[0-9,]+ bytes of states could not be written"):
        for row in ROWS:
            file.append([known(row)], [states_of(row)])
    file.close()
    assert not file.path.exists()

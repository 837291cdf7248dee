"""A fleet: a server without a model and rows, and devices that come, go, differ and lie. Within this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Bench, write_rows

from edgezo.errors import EdgezoError, UsageError
from edgezo.plan.request import make_config
from edgezo.run.device import Device
from edgezo.run.fleet import BOOK, Fleet, Rules
from edgezo.run.fleet_begin import begin_fleet
from edgezo.run.fleet_messages import NOTHING, DeviceReport, Order, Tally, read_order
from edgezo.run.fleet_settings import free_settings, identity
from edgezo.run.journal import open_journal
from edgezo.run.recipes import recipe_of
from edgezo.run.train import finetune

NAMES = ("anna", "bert", "cleo", "dora")
STEPS = 3


class Wires:
    """A transport within this process: what is at the other end answers at once, or not."""

    def __init__(self, ends: Mapping[int, Callable[[bytes], bytes | None]]):
        self.ends = dict(ends)
        self.passed_s = 0.0  # of a clock that nothing else moves
        self.before: Callable[[], None] = lambda: None

    def nodes(self) -> Sequence[int]:
        return [*self.ends]

    def exchange(self, messages: Mapping[int, bytes], wait_s: float) -> Mapping[int, bytes]:
        answers = {node: self.ends[node](data) for node, data in messages.items()}
        if None in answers.values():
            self.passed_s += wait_s
        self.before()
        return {node: data for node, data in answers.items() if data is not None}

    def rest(self) -> None:
        self.passed_s += 1.0
        assert self.passed_s < 1000, "nobody comes"
        self.before()


class Row:
    """A device without a model: the losses of a row are those of its number and of the step."""

    def __init__(self, name: str, alike: Mapping[str, Any], rows: int = 10):
        self.name, self.alike, self.rows = name, alike, rows
        self.records: list[bytes] = []
        self.asked: list[Order] = []

    def losses(self, order: Order) -> np.ndarray:
        number = np.array(order.rows, np.float32) + 1000 * NAMES.index(self.name) + order.step
        return np.stack([number, np.sqrt(number)]).astype(np.float32)

    def __call__(self, data: bytes) -> bytes | None:
        order = read_order(data)
        self.asked.append(order)
        self.records += order.records
        tally = Tally()
        for record in self.records:
            tally.add(record)
        losses = self.losses(order) if order.slots else NOTHING
        text = {"name": self.name, "rows": self.rows, **self.alike} if order.header else {}
        where = (order.run, len(self.records), tally.after(len(self.records)))
        return self.sent(DeviceReport(*where, 0, losses, text))

    def sent(self, report: DeviceReport) -> bytes | None:
        return report.encoded()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, bench: Bench) -> Path:
    """The rows of all devices together, and each device's slice of them."""
    folder = tmp_path_factory.mktemp("rows")
    rows = [json.loads(line) for line in (bench.data / "label.jsonl").read_text().splitlines()]
    for name, part in {
        "all": rows,
        **{n: rows[10 * i : 10 * i + 10] for i, n in enumerate(NAMES)},
    }.items():
        (folder / name).mkdir()
        write_rows(folder / name / "train.jsonl", part)
        write_rows(folder / name / "validation.jsonl", rows[:4])
    return folder


def request(bench: Bench, data: Path, out: Path, **changes: Any) -> dict[str, Any]:
    fixed = {
        "train": "lowrank",
        "micro_batch": 1,
        "steps": STEPS,
        "snapshot_every": 2,
        "batch_size": 6,
    }
    place = {"data": str(data / "all"), "out": str(out)}
    return bench.settings("label", **{**fixed, **place, **changes})


@pytest.fixture
def begun(bench: Bench, data: Path, tmp_path: Path) -> Path:
    return begin_fleet(make_config(request(bench, data, tmp_path / "fleet")))


def serve(folder: Path, wires: Wires, notes: list[str] | None = None, **rules: Any) -> Fleet:
    """Make all steps of the fleet in ``folder``."""
    note = (notes if notes is not None else []).append
    with open_journal(folder / "journal.bin", resume=True) as journal:
        journal.repair()
        fleet = Fleet(
            journal, folder / BOOK, Rules(**{"devices": 4, **rules}), note, lambda: wires.passed_s
        )
        fleet.run(wires)
    return fleet


def journal_of(folder: Path) -> bytes:
    return (folder / "journal.bin").read_bytes()


def alike_in(folder: Path) -> dict[str, Any]:
    """What all devices of a fleet have alike."""
    with open_journal(folder / "journal.bin", resume=False) as journal:
        return identity(journal.header, free_settings(journal.settings))


def losses_of(folder: Path) -> list[np.ndarray]:
    with open_journal(folder / "journal.bin", resume=False) as journal:
        return [record.losses for record in journal.records()]


# ------------------------------------------------------------------------- real devices


def device(bench: Bench, data: Path, name: str, out: Path, **changes: Any) -> Device:
    kept = ("model", "micro_batch", "max_mem_bytes")
    fixed = {
        key: value for key, value in bench.settings("label", micro_batch=1).items() if key in kept
    }
    return Device(
        {**fixed, "data": str(data / name), "out": str(out / name), **changes}, name, [].append
    )


@pytest.mark.parametrize("method", [{}, {"precision": "bf16"}, {"estimator": "fzoo"}])
def test_devices_with_slices_of_the_rows_write_the_journal_of_one_process(
    method: dict[str, Any], bench: Bench, data: Path, tmp_path: Path, one_thread: None
) -> None:
    one = make_config(request(bench, data, tmp_path / "one", **method))
    summary = finetune(one)
    fleet = begin_fleet(replace(one, out=str(tmp_path / "fleet")))
    devices = [device(bench, data, name, tmp_path) for name in NAMES]
    # They come in another order than their names'.
    notes: list[str] = []
    serve(fleet, Wires({9 - i: d.answer for i, d in enumerate(devices)}), notes)
    assert journal_of(fleet) == journal_of(tmp_path / "one"), notes
    for each in devices:
        assert each._state is not None
        assert each.trained_sha256() == summary["trained_sha256"]
        each.close()
        assert journal_of(tmp_path / each.name) == journal_of(fleet)


def test_a_device_that_is_killed_goes_on_and_one_that_lost_its_directory_replays(
    bench: Bench, data: Path, tmp_path: Path, one_thread: None
) -> None:
    one = make_config(request(bench, data, tmp_path / "one"))
    finetune(one)
    fleet = begin_fleet(replace(one, out=str(tmp_path / "fleet")))
    devices = {name: device(bench, data, name, tmp_path) for name in NAMES}
    wires = Wires({i: d.answer for i, d in enumerate(devices.values())})

    def kill() -> None:
        with open_journal(fleet / "journal.bin", resume=False) as journal:
            steps = journal.next_step
        if steps == 1 and 1 in wires.ends:  # bert and cleo go, and come back at new connections
            for node, name, place in ((1, "bert", tmp_path), (2, "cleo", tmp_path / "anew")):
                devices[name].close()
                devices[name] = device(bench, data, name, place)
                del wires.ends[node]
        elif 1 not in wires.ends and wires.passed_s > 3 and 7 not in wires.ends:
            wires.ends |= {7: devices["bert"].answer, 8: devices["cleo"].answer}

    wires.before = kill
    serve(fleet, wires)
    assert 8 in wires.ends and journal_of(fleet) == journal_of(tmp_path / "one")
    for each in devices.values():
        each.close()
        assert journal_of(each.files.path) == journal_of(fleet)


def test_what_a_device_has_otherwise_is_named(
    bench: Bench, data: Path, tmp_path: Path, begun: Path, one_thread: None
) -> None:
    from conftest import make_model

    with open_journal(begun / "journal.bin", resume=False) as journal:
        hello = Order(journal.run, 0, 0, journal.head_bytes()).encoded()
    other = make_model(tmp_path / "other", intermediate_size=40)
    for changes, why in (
        ({"step": 0.5}, "differs from the fleet in step"),
        ({"model": str(other)}, "other base weights"),
        ({"labels": "0=cold,1=warm"}, "differs from the fleet in dataset, labels"),
    ):
        wrong = device(bench, data, "anna", tmp_path, **changes)
        report = json.loads(wrong.answer(hello)[36:])
        assert why in report["problem"]
        assert not (tmp_path / "anna" / "journal.bin").exists()


def test_a_device_answers_any_bytes_and_keeps_its_journal(
    bench: Bench, data: Path, tmp_path: Path, begun: Path, one_thread: None
) -> None:
    with open_journal(begun / "journal.bin", resume=False) as journal:
        run, header = journal.run, journal.head_bytes()
    anna = device(bench, data, "anna", tmp_path)
    hello = Order(run, 0, 0, header)
    for order, why in (
        (b"", "no order"),
        (Order(run, 0, 0).encoded(), "no header"),
        (hello.encoded(), None),
        (Order(run + 1, 0, 0).encoded(), "another run"),
        (Order(run, 0, 0, b"", [b"EZ" + bytes(80)]).encoded(), "damaged, or of another run"),
        (Order(run, 1, 1, b"", [b"EZ" + bytes(80)]).encoded(), "records from step 1"),
        (Order(run, 1, 0, b"", [], [0], [0]).encoded(), "losses of step 1"),
        (Order(run, 0, 0, b"", [], [0, 0], [1, 2]).encoded(), "twice"),
        (Order(run, 0, 0, b"", [], [6], [1]).encoded(), "beyond the group"),
        (Order(run, 0, 0, b"", [], [1], [10]).encoded(), "row 10"),
    ):
        report = anna.answer(order)
        assert (why or "content_hash").encode() in report
    anna.close()
    assert journal_of(tmp_path / "anna") == header


def test_a_device_may_have_the_base_in_another_precision(
    bench: Bench, data: Path, tmp_path: Path, begun: Path, one_thread: None
) -> None:
    devices = [
        device(bench, data, name, tmp_path, precision=precision)
        for name, precision in zip(NAMES, ("fp32", "bf16", "int8", "fp32"), strict=True)
    ]
    serve(begun, Wires({i: d.answer for i, d in enumerate(devices)}))
    assert len({d.trained_sha256() for d in devices}) == 1
    for each in devices:
        each.close()


# ------------------------------------------------------------------------- devices without a model


class Silent(Row):
    def sent(self, report: DeviceReport) -> None:
        return None if report.losses.size else report.encoded()


class Garbage(Row):
    def sent(self, report: DeviceReport) -> bytes:
        return b"\x00\xff" * 40 if report.losses.size else report.encoded()


class Another(Row):
    """Sends other losses than it was asked for: what ``change`` makes of them."""

    change: Callable[[np.ndarray], np.ndarray]

    def losses(self, order: Order) -> np.ndarray:
        return type(self).change(super().losses(order)).astype(np.float32)


def another(how: Callable[[np.ndarray], np.ndarray]) -> type[Another]:
    return type("Changed", (Another,), {"change": staticmethod(how)})


LIARS = {
    "garbage": (Garbage, "no report"),
    "NaN": (another(lambda losses: losses * np.nan), "not finite"),
    "infinite": (another(lambda losses: losses + np.inf), "not finite"),
    "too few": (another(lambda losses: losses[:, 1:]), "asked for"),
    "too many": (another(lambda losses: np.hstack([losses, losses])), "asked for"),
    "one side": (another(lambda losses: losses[:1]), "asked for"),
    "below 0": (another(lambda losses: -losses), "below 0"),
    "silent": (Silent, "does not answer"),
}


@pytest.mark.parametrize("kind", LIARS)
def test_what_a_liar_sends_is_refused_by_its_name_and_computed_by_others(
    kind: str, begun: Path
) -> None:
    alike, (liar, why) = alike_in(begun), LIARS[kind]
    devices: list[Row] = [Row(name, alike) for name in NAMES]
    devices[2] = liar("cleo", alike)
    notes: list[str] = []
    serve(begun, Wires(dict(enumerate(devices))), notes)
    assert any("cleo" in note and why in note for note in notes), notes
    for losses in losses_of(begun):
        assert np.isfinite(losses).all()
        assert not ((losses[0] >= 2000) & (losses[0] < 3000)).any()  # none of cleo's


def test_where_nobody_has_losses_the_examples_move_nothing(begun: Path) -> None:
    alike, (liar, _) = alike_in(begun), LIARS["NaN"]
    notes: list[str] = []
    # One of two: what it cannot give is nobody's, as long as the other is asked no more.
    devices = [Row("anna", alike), liar("bert", alike)]
    devices[0].losses = lambda order: np.full((2, len(order.rows)), np.nan)  # type: ignore[method-assign]
    wires = Wires(dict(enumerate(devices)))
    serve(begun, wires, notes, devices=2, most_refusals=100)
    assert np.isnan(losses_of(begun)).all()
    assert sum("nobody has losses" in note for note in notes) == STEPS


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"version": "0.0.1"}, "version"),
        ({"content_hash": "f" * 64}, "content_hash"),
        ({"config": {}}, "sigma"),
        ({"config": None}, "config"),
        ({"dataset": {}}, "dataset"),
        ({"rows": 0}, "no number of rows"),
        ({"rows": True}, "no number of rows"),
        ({"rows": 1_000_001}, "no number of rows"),
        ({"name": ""}, "no name"),
        ({"name": ["cleo"]}, "no name"),
        ({"problem": "its disk is full"}, "its disk is full"),
    ],
)
def test_who_differs_is_refused_before_it_is_asked(
    change: dict[str, Any], why: str, begun: Path
) -> None:
    alike = alike_in(begun)

    class Other(Row):
        def sent(self, report: DeviceReport) -> bytes:
            return report._replace(text={**report.text, **change}).encoded()

    others, notes = [Row(name, alike) for name in NAMES if name != "cleo"], list[str]()
    cleo = Other("cleo", alike)
    serve(begun, Wires(dict(enumerate([*others, cleo]))), notes, devices=3)
    assert any(why in note for note in notes), notes
    assert not any(order.slots for order in cleo.asked)


def test_a_device_with_another_journal_is_refused(begun: Path) -> None:
    alike, notes = alike_in(begun), list[str]()
    odd = Row("dora", alike)
    odd.records = [b"one that nobody wrote"]
    devices = [*(Row(name, alike) for name in NAMES[:3]), odd]
    serve(begun, Wires(dict(enumerate(devices))), notes, devices=3)
    assert any("it has 1 steps, and this journal 0" in note for note in notes)


def test_a_server_that_is_started_again_goes_on_with_the_same_groups(
    begun: Path, tmp_path: Path, bench: Bench, data: Path
) -> None:
    alike, other = (
        alike_in(begun),
        begin_fleet(make_config(request(bench, data, tmp_path / "2"))),
    )
    serve(begun, Wires({i: Row(name, alike) for i, name in enumerate(NAMES)}))
    devices = [Row(name, alike) for name in NAMES]
    wires = Wires(dict(enumerate(devices)))

    class Killed(Exception):
        pass

    def kill() -> None:
        if len(devices[0].records) == 1:
            raise Killed

    wires.before = kill
    with pytest.raises(Killed):
        serve(other, wires)
    wires = Wires({5 + i: d for i, d in enumerate(reversed(devices))})
    serve(other, wires)
    assert journal_of(other) == journal_of(begun)


def test_a_device_that_dies_with_an_order_has_patience_to_come_back(
    begun: Path, tmp_path: Path, bench: Bench, data: Path
) -> None:
    alike = alike_in(begun)
    serve(begun, Wires({i: Row(name, alike) for i, name in enumerate(NAMES)}))
    other = begin_fleet(make_config(request(bench, data, tmp_path / "2")))
    devices = [Row(name, alike) for name in NAMES]
    wires = Wires(dict(enumerate(devices)))

    def dies(data: bytes) -> bytes | None:
        if not read_order(data).slots:
            return devices[1](data)
        wires.ends[1] = lambda data: None  # its connection is still listed, and nothing answers
        return None

    def come_back() -> None:
        if wires.passed_s > 70:  # patience is over once, by the order that nobody answered
            wires.ends.pop(1, None)
            wires.ends[9] = devices[1]

    wires.ends[1], wires.before = dies, come_back
    serve(other, wires)
    assert 9 in wires.ends and journal_of(other) == journal_of(begun)


def test_a_device_that_left_for_good_is_waited_for_in_few_steps(
    tmp_path: Path, bench: Bench, data: Path
) -> None:
    begun = begin_fleet(make_config(request(bench, data, tmp_path / "long", steps=12)))
    alike = alike_in(begun)
    devices = [Row(name, alike) for name in NAMES]
    wires = Wires(dict(enumerate(devices)))

    def leave() -> None:
        if len(devices[0].records) == 1:
            wires.ends.pop(3, None)

    wires.before = leave
    serve(begun, wires)
    assert all(np.isfinite(losses).all() for losses in losses_of(begun))
    assert 60 <= wires.passed_s < 4 * 60


def test_a_newcomer_gets_the_records_it_lacks_and_rows_of_its_own(begun: Path) -> None:
    alike = alike_in(begun)
    devices = [Row(name, alike) for name in NAMES]
    wires = Wires(dict(enumerate(devices[:3])))

    def come() -> None:
        if len(devices[0].records) == 1:
            wires.ends[9] = devices[3]

    wires.before = come
    fleet = serve(begun, wires, devices=3)
    assert fleet.rows == 40 and len(devices[3].records) == STEPS
    assert json.loads((begun / BOOK).read_text())["dora"] == [30, 10]


def test_devices_whose_weights_differ_from_most_are_asked_no_more(begun: Path) -> None:
    alike, notes = alike_in(begun), list[str]()

    class Stateful(Row):
        def sent(self, report: DeviceReport) -> bytes:
            state = (3 if self.name == "bert" else 4) if report.steps == 1 else 0
            return report._replace(state=state).encoded()

    devices = [Stateful(name, alike) for name in NAMES]
    serve(begun, Wires(dict(enumerate(devices))), notes)
    assert any("bert" in note and "weights differ" in note for note in notes)
    assert sum("weights differ" in note for note in notes) == 1


def test_differences_far_from_the_median_are_left_out(begun: Path) -> None:
    alike = alike_in(begun)
    devices: list[Row] = [Row(name, alike) for name in NAMES]
    devices[1] = another(lambda losses: losses * np.array([[1e6], [1]]))("bert", alike)
    serve(begun, Wires(dict(enumerate(devices))), most_times_median=30.0)
    losses = np.hstack(losses_of(begun))
    assert np.isnan(losses).any() and np.nanmax(losses) < 1e5
    with open_journal(begun / "journal.bin", resume=False) as journal:
        for record in journal.records():
            left_out = np.isnan(record.losses).any(axis=0)
            assert not record.credit[left_out].any()
            assert np.isfinite(recipe_of(journal.settings, record).coefficients).all()


@pytest.mark.parametrize(
    ("changes", "way"),
    [
        ({"train": "head"}, "--train lowrank"),
        ({"train": "probe+lowrank"}, "--train lowrank"),
        ({"estimator": "lora"}, "--train lowrank"),
        ({"estimator": "mezo-svrg"}, "--estimator grzo"),
        ({"steps": None, "for_s": 60.0}, "--steps N"),
    ],
)
def test_what_needs_more_than_losses_is_refused_with_the_way_out(
    changes: dict[str, Any], way: str, bench: Bench, data: Path, tmp_path: Path
) -> None:
    fixed = {"train": None, "micro_batch": None, **changes}
    wanted = {
        k: v for k, v in request(bench, data, tmp_path / "f", **fixed).items() if v is not None
    }
    with pytest.raises(UsageError, match=way):
        begin_fleet(make_config(wanted))
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize(
    "text", ["", "[]", '{"anna": 3}', '{"anna": [5, 10]}', '{"anna": [0, "a"]}']
)
def test_a_book_of_devices_that_was_changed_is_refused(text: str, begun: Path) -> None:
    (begun / BOOK).write_text(text)
    with pytest.raises(EdgezoError, match="Restore it from a copy"):
        serve(begun, Wires({}))

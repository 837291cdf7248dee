"""Pages about runs, comparisons and lists of them, and the removal of a run."""

from __future__ import annotations

import fcntl
import html
import json
import os
import shutil
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forks
import pytest
from conftest import GOOD, Bench, Command, write_rows

from edgezo.errors import EdgezoError
from edgezo.machine.ownership import MARKER
from edgezo.plan.request import make_config
from edgezo.run.charts import HEIGHT, WIDTH, Level, Series, chart, smoothed, thinned, ticks
from edgezo.run.comparison import comparison
from edgezo.run.directory import RunFiles
from edgezo.run.overview import FINISHED, Overview, method_after, runs_below
from edgezo.run.remarks import Answers, remarks
from edgezo.run.removal import removable, remove
from edgezo.run.report import is_report_file, write_report
from edgezo.run.train import finetune
from edgezo.zo.presets import DEFAULT, DEFAULT_TRAIN

pytestmark = pytest.mark.usefixtures("one_thread")
SCRIPT = "<script>alert('x')</script>"
ODD = '\u202egnirts \U0001f40d \u0000 & "quoted" </bdi> {{ 7*7 }}'
HELD_OUT = 4  # rows of 40


class Page(HTMLParser):
    """The elements of a page, their attributes, and its text."""

    def __init__(self, file: Path):
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text, self.open = "", [""]
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.open.append(tag)

    def handle_data(self, data: str) -> None:
        if self.open[-1] != "style":
            self.text += data


@pytest.fixture(scope="module")
def made(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose rows, labels and place are hostile text."""
    folder = tmp_path_factory.mktemp("made")
    rows = [
        {"text": f"{i} {SCRIPT} {ODD} {GOOD[i % 4]}", "label": i % 2} for i in range(10 * HELD_OUT)
    ]
    data = write_rows(folder / "<s>&'rows'.jsonl", rows)
    labels = f"0={SCRIPT},1=gut {ODD}"
    out = folder / "a <i>'&\u00e9"
    settings = bench.settings(steps=2, train="lowrank", data=str(data), labels=labels, out=str(out))
    finetune(make_config(settings))
    return out


def test_foreign_text_stays_text_and_the_page_stands_alone(made: Path) -> None:
    text = (made / "report.html").read_text(encoding="utf-8")
    page = Page(made / "report.html")
    assert SCRIPT not in text and html.escape(SCRIPT).replace("&#x27;", "&#39;") in text
    assert SCRIPT in page.text and "{{ 7*7 }}" in page.text and "\x00" not in text
    assert str(made) in page.text
    assert not page.tags & {
        "script",
        "link",
        "img",
        "iframe",
        "object",
        "embed",
        "form",
        "i",
        "s",
        "a",
    }
    assert not {name for name in page.attributes if name.startswith("on")}
    assert not page.attributes & {"src", "href", "action", "srcset", "xlink:href"}
    assert "default-src 'none'" in text and "url(" not in text and "@import" not in text


def test_the_page_shows_what_a_reader_asks_first(made: Path) -> None:
    text = Page(made / "report.html").text
    summary = json.loads((made / "summary.json").read_text())
    value = f"{summary['eval_after']['value']:.3f}"
    for part in ("GRZO", value, "Training loss", "Memory, MB", "held-out rows, before and after"):
        assert part in text, part
    for part in ("precision", "recall", "F1", "edgezo eval --model", "--format journal"):
        assert part in text, part
    assert "linear probe" not in text.partition("What next")[0]


def test_a_page_is_made_again_with_the_same_bytes_and_a_changed_one_is_kept(
    made: Path, edgezo: Command, tmp_path: Path
) -> None:
    run = shutil.copytree(made, tmp_path / made.name)
    assert edgezo("report", run)[0] == 0
    first = (run / "report.html").read_bytes()
    assert not write_report(Overview.of(run)) and is_report_file(run / "report.html")
    (run / "report.html").unlink()
    assert write_report(Overview.of(run)) and (run / "report.html").read_bytes() == first
    (run / "report.html").write_bytes(first + b"my notes\n")
    code, _, err = edgezo("report", run)
    assert code == 2 and "report.html" in err
    assert (run / "report.html").read_bytes() == first + b"my notes\n"


@pytest.mark.parametrize("kind", ["label", "choice", "completion", "text", "messages"])
def test_every_kind_of_rows_has_its_answers_before_and_after(
    kind: str, bench: Bench, edgezo: Command, edgezo_json: Any, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    settings = bench.arguments(kind, steps=2, out=str(run))
    code, out, _ = edgezo("finetune", *settings)
    assert code == 0 and f"report {run}/report.html" in out
    kept = json.loads((run / "predictions.json").read_text())
    assert len(kept["shown"]) == HELD_OUT and all(row["text"] for row in kept["shown"])
    for when in ("before", "after"):
        assert len(kept[when]["losses"]) == HELD_OUT
        assert len(kept[when]["answers"]) == (HELD_OUT if kind in ("label", "choice") else 0)
    figures = json.loads((run / "summary.json").read_text())["eval_after"]
    if kind in ("label", "choice"):
        pairs = zip(kept["labels"], kept["after"]["chosen"], strict=True)
        assert sum(a == b for a, b in pairs) / figures["n"] == figures["value"]
    assert all(bool(row["right"]) == (kind != "text") for row in kept["shown"])
    page = shown_of(run)
    assert ("linear probe" in page) == (kind in ("label", "choice"))
    # A resume of a run that is over leaves the page, and makes it again where it is lost.
    (run / "report.html").unlink()
    assert edgezo_json("finetune", "--resume", "--out", run)[0] == 0
    assert shown_of(run) == page


def test_an_unfinished_run_has_a_page_and_its_evaluation_says_so(
    made: Path, edgezo: Command, tmp_path: Path
) -> None:
    run = shutil.copytree(made, tmp_path / "run")
    (run / "summary.json").unlink()
    assert edgezo("report", run)[0] == 0
    text = Page(run / "report.html").text
    assert "Not finished: 2 of 2 steps" in text and "edgezo finetune --resume --out" in text
    code, _, err = edgezo("eval", "--model", run)
    assert code == 0 and "is unfinished: step 2 of 2. It is used as it stands" in err


def shown_of(run: Path) -> str:
    """The text of a page but for the plan, which a resume makes anew."""
    return Page(run / "report.html").text.partition("What the plan decided")[0]


DAMAGE = {
    "predictions.json": lambda text: text.replace('"chosen": [', '"chosen": [7, '),
    "summary.json": lambda text: text.replace('"train_s": ', '"train_s": "soon", "x": '),
    "plan.json": lambda text: "[]",
    "metrics.jsonl": lambda text: text.replace("loss", "lass", 1),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_file_that_says_nonsense_is_one_error(name: str, made: Path, tmp_path: Path) -> None:
    run = shutil.copytree(made, tmp_path / "run")
    (run / name).write_text(DAMAGE[name]((run / name).read_text()))
    with pytest.raises(EdgezoError, match=r"restore|Restore|fetch|no JSON"):
        write_report(Overview.of(run))


# ---------------------------------------------------------------------------------------------
# Why a metric does not move


def evaluation(value: float, loss: float, n: int = 4) -> dict[str, Any]:
    return {"metric": "accuracy", "value": value, "loss": loss, "n": n, "standard_error": 0.2}


def run_of(summary: dict[str, Any], steps: int = 2) -> Any:
    return SimpleNamespace(state=FINISHED, summary=summary, steps=steps)


HALF = {"eval_before": evaluation(0.5, 0.7), "eval_after": evaluation(0.5, 0.6)}
PROBE = {"used": True, "accuracy": 0.9, "rows": 32}
REMARKS: dict[str, tuple[dict[str, Any], int, list[int], list[int], list[int], str]] = {
    "no order changed": (HALF, 2, [0, 1, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0], "for no row did"),
    "other wrong ones": (HALF, 2, [0, 1, 0, 2], [0, 0, 0, 0], [0, 0, 0, 1], "which is wrong as"),
    "as many": (HALF, 2, [0, 1, 0, 1], [0, 0, 0, 0], [0, 1, 1, 0], "as many became wrong"),
    "one class": (HALF, 2, [1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1], "has the label 'b'"),
    "one answer": (HALF, 2, [0, 1, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0], "predicted as 'a'"),
    "no better": (HALF, 2, [0, 1, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0], "most frequent label"),
    "nothing trained": ({**HALF}, 0, [0, 1, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0], "nothing was"),
    "probe alone": ({**HALF, "probe": PROBE}, 0, [0, 1], [0, 0], [0, 0], "only the linear probe"),
    "chance": (
        {"eval_before": evaluation(0.25, 0.7), "eval_after": evaluation(0.5, 0.6)},
        *(2, [0, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0], "may be chance"),
    ),
}


@pytest.mark.parametrize("case", REMARKS)
def test_a_metric_that_does_not_move_says_why(case: str) -> None:
    summary, steps, right, before, after, expected = REMARKS[case]
    answers = Answers(["a", "b", "c"], right, before, after)
    lines = [{"step": n + 1, "skipped": False} for n in range(steps)]
    assert expected in " ".join(remarks(run_of(summary, steps), lines, answers))


def test_steps_that_were_all_skipped_are_named() -> None:
    lines = [{"step": 1, "skipped": True}, {"step": 2, "skipped": True}]
    assert "All 2 steps were skipped" in " ".join(remarks(run_of(HALF), lines, None))


def test_a_linear_probe_is_not_booked_under_the_estimators_name() -> None:
    cfg: Any = SimpleNamespace(estimator="grzo")
    assert method_after("lowrank+probe", 3, cfg) == "linear probe + GRZO"
    assert method_after("lowrank+probe", 0, cfg) == "linear probe"
    assert method_after("lowrank+head", 3, cfg) == "exact head + GRZO"
    assert method_after("lora", 3, cfg) == "LoRA"
    assert method_after("lowrank+head", 0, cfg) == "nothing trained"
    assert method_after("lowrank", 3, cfg) == "GRZO"
    default: Any = SimpleNamespace(estimator=DEFAULT, train=DEFAULT_TRAIN)
    assert method_after("lowrank+probe", 3, default) == "default (linear probe + GRZO)"
    assert method_after("lowrank+head", 3, default) == "default (exact head + GRZO)"
    assert method_after("lowrank+probe", 0, default) == "default (linear probe)"
    default.train = ("lowrank", "head")  # rows without labels
    assert method_after("lowrank+head", 3, default) == "default (exact head + GRZO)"
    default.train = ("lowrank",)
    assert method_after("lowrank", 3, default) == "GRZO"


@pytest.mark.parametrize(
    ("asked", "estimator", "trained", "method"),
    [
        ({}, "default", {"lowrank+probe", "lowrank+head"}, "default ("),
        ({"kind": "completion"}, "default", {"lowrank+head"}, "default (exact head + GRZO)"),
        ({"estimator": "grzo"}, "grzo", {"lowrank"}, "GRZO"),
        ({"estimator": "mezo", "kind": "completion"}, "mezo", {"lowrank"}, "MEZO"),
        (
            {"estimator": "mezo", "train": "lowrank+head"},
            "mezo",
            {"lowrank+head"},
            "exact head + MEZO",
        ),
    ],
)
def test_every_page_about_a_run_books_what_was_learned_under_the_part_that_learned_it(
    asked: dict[str, Any],
    estimator: str,
    trained: set[str],
    method: str,
    bench: Bench,
    tmp_path: Path,
) -> None:
    out = tmp_path / "run"
    summary = finetune(make_config(bench.settings(**{"steps": 2, "out": str(out), **asked})))
    assert summary["estimator"] == estimator and summary["trained"] in trained
    run = Overview.of(out)
    assert run.method.startswith(method) and (method[-1] == "(" or run.method == method)
    assert comparison([run])["runs"][0]["method"] == run.method
    capital = run.method[0].upper() + run.method[1:]
    assert f"{capital}: " in Page(out / "report.html").text
    plan = json.loads((out / "plan.json").read_text(encoding="utf-8"))
    (planned,) = (d["value"] for d in plan["decisions"] if d["name"] == "method")
    assert (
        planned.startswith("default (") == (estimator == "default") == method.startswith("default")
    )
    assert (out / "probe.safetensors").exists() <= (estimator == "default")


# ---------------------------------------------------------------------------------------------
# Charts


def test_a_chart_keeps_its_values_inside_and_its_ticks_round() -> None:
    points = [(float(n), n % 7 / 10) for n in range(5000)]
    points[2500] = (2500.0, 9.0)
    drawn = chart("t", "x", [Series("a", "main", points)], [Level("cap", "cap", 3.0, "3")])
    assert drawn is not None
    places = [tuple(map(float, p.split(","))) for p in drawn.series[0].path.split()]
    assert len(places) < 500 and min(y for _, y in places) < 20
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in places)
    assert [tick.text for tick in drawn.y_ticks] == ["0", "2", "4", "6", "8"]
    assert chart("t", "x", [Series("a", "main", [(1.0, float("nan"))])]) is None
    assert ticks(0, 0.3) == [0, 0.1, 0.2, 0.3] or len(ticks(0, 0.3)) == 7
    assert thinned(points, 100)[0] == points[0] and (2500.0, 9.0) in thinned(points, 100)
    assert smoothed([(0, 2.0), (1, 4.0), (2, 6.0)])[1:] == [(1, 3.0), (2, 5.0)]


# ---------------------------------------------------------------------------------------------
# Several runs


def test_runs_are_listed_compared_and_removed(
    made: Path, bench: Bench, edgezo: Command, edgezo_json: Any, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    first = shutil.copytree(made, runs / "first")
    half = shutil.copytree(made, runs / "below" / "half")
    (half / "summary.json").unlink()
    hurt = shutil.copytree(made, runs / "hurt")
    (hurt / "journal.bin").write_bytes(b"no journal")
    (runs / "mine").mkdir()
    (runs / "link").symlink_to(first)

    code, listed = edgezo_json("runs", runs)
    states = {Path(run["run"]).name: run["state"] for run in listed["runs"]}
    assert code == 0
    assert states == {"half": "unfinished", "first": "finished", "hurt": "damaged"}
    out = edgezo("runs", runs)[1]
    assert f"edgezo finetune --resume --out {half}" in out and "hurt" in out

    code, compared = edgezo_json("compare", first, half)
    summary = json.loads((first / "summary.json").read_text())
    assert compared["runs"][0]["after"] == summary["eval_after"]["value"]
    assert compared["runs"][1]["after"] is None and compared["runs"][1]["steps"] == 2
    assert compared["differ"] == {}
    other = shutil.copytree(made, runs / "other")
    config = (other / "config.toml").read_text()
    (other / "config.toml").write_text(config.replace("seed = 0", "seed = 7"))
    assert edgezo_json("compare", first, other)[1]["differ"] == {"seed": [0, 7]}
    assert "seed" in edgezo("compare", first, other)[1]

    assert edgezo("rm", first)[0] == 2 and first.exists()  # no terminal to ask on
    assert edgezo_json("rm", first, "--yes")[0] == 0 and not first.exists()
    assert not edgezo_json("runs", runs / "mine")[1]["runs"]


def lock(run: Path) -> None:
    """Keep the journal open as a run that goes on does, until this process ends."""
    fcntl.flock(os.open(run / "journal.bin", os.O_RDONLY), fcntl.LOCK_EX)


def link(run: Path) -> None:
    os.rename(run, run.with_name("elsewhere"))
    run.symlink_to(run.with_name("elsewhere"))


NOT_REMOVED = {
    "a file of the user": (lambda run: (run / "notes.txt").write_text("mine"), "notes.txt"),
    "a folder of the user": (lambda run: (run / "model").mkdir(), "model"),
    "another file under a name of edgezo's": (
        lambda run: (run / "report.html").write_text("mine"),
        "report.html",
    ),
    "a file among the blocks on disk": (
        lambda run: ((run / "overlay").mkdir(), (run / "overlay" / "mine").write_text("")),
        "overlay",
    ),
    "no marker": (lambda run: (run / MARKER).unlink(), MARKER),
    "a run that goes on": (lock, "Ctrl-C"),
    "a link": (link, "is a link"),
    "the current directory": (os.chdir, "current directory"),
}


@pytest.mark.parametrize("case", NOT_REMOVED)
def test_only_a_run_that_is_all_of_edgezos_is_removed(
    case: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = shutil.copytree(made, tmp_path / "run")
    change, said = NOT_REMOVED[case]
    change(run)
    before = sorted(path.name for path in run.rglob("*"))
    with pytest.raises(EdgezoError, match=said):
        removable(run)
    assert sorted(path.name for path in run.rglob("*")) == before


def test_a_removal_that_was_interrupted_is_given_again(made: Path, tmp_path: Path) -> None:
    run = shutil.copytree(made, tmp_path / "run")
    kept = removable(run)
    for name in kept.names[::2]:
        if name != MARKER:
            (run / name).unlink()
    (run / "overlay").mkdir()
    (run / "overlay" / "block-0000.overlay").write_bytes(b"")
    remove(removable(run))
    assert not run.exists()
    assert not list(runs_below(tmp_path))


# ---------------------------------------------------------------------------------------------
# Asked again


@pytest.mark.parametrize("kind", ["label", "completion", "text"])
def test_base_and_run_are_asked_again(
    kind: str, bench: Bench, edgezo_json: Any, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    on_disk = {"residency": "disk", "train": "full"}
    changes: dict[str, Any] = on_disk if kind == "completion" else {}
    settings = bench.arguments(kind, steps=2, out=str(run), **changes)
    assert edgezo_json("finetune", *settings)[0] == 0
    code, said = edgezo_json("report", run, "--ask")
    assert code == 0, said
    asked = json.loads((run / "asked.json").read_text())
    page = Page(run / "report.html").text
    if kind == "label":
        assert asked["untouched"] is None and "Not measured" in page
        return
    before, after = asked["untouched"]["before"], asked["untouched"]["after"]
    assert before["n"] == after["n"] == 8 and before["loss"] != after["loss"]
    assert f"went from {before['loss']:.4f} to {after['loss']:.4f}" in page
    assert len(asked.get("rows", [])) == (0 if kind == "text" else HELD_OUT)
    # What is asked of the run is what an evaluation of it on the same texts says.
    rows = write_rows(tmp_path / "own.jsonl", texts_of(kind))
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("train", "validation"):
        shutil.copy(rows, folder / f"{name}.jsonl")
    _, figures = edgezo_json("eval", "--model", run, "--data", folder)
    assert figures["loss"] == pytest.approx(after["loss"], rel=1e-6)


def texts_of(kind: str) -> list[dict[str, str]]:
    from edgezo.run.asked import TEXTS

    texts = TEXTS.read_text().strip().split("\n\n")
    if kind == "text":
        return [{"text": text} for text in texts]
    halves = [text.split(". ", 1) for text in texts]
    return [{"prompt": f"{first}.", "completion": f" {rest}"} for first, rest in halves]


def test_an_unfinished_run_is_used_as_far_as_it_is(
    bench: Bench, edgezo: Command, edgezo_json: Any, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    args = bench.arguments(train="lowrank+head", steps=9, snapshot_every=4, out=run)
    forks.start(["finetune", *args], tmp_path / "out", forks.Blow("record", 7, 1)).end()
    code, out, err = edgezo("eval", "--model", run)
    assert code == 0 and f"{run} is unfinished: step 4 of 9." in err.replace("\n", " ")
    assert "(unfinished: step 4 of 9)" in out
    rows = ("--data", bench.data / "label.jsonl")
    for command in (
        ("eval", "--model", run),
        ("predict", run, *rows),
        ("replay", run, "--out", tmp_path / "copy"),
    ):
        code, found = edgezo_json(*command)
        assert (code, found["unfinished"]) == (0, "step 4 of 9"), command
    # Before the first snapshot there is no head, and before the first step no journal.
    RunFiles(run).snapshot.unlink()
    code, _, err = edgezo("predict", run, *rows)
    assert code == 1 and "every 4 steps" in err and f"--resume --out {run}" in err
    RunFiles(run).journal.unlink()
    for command in (("eval", "--model", run), ("predict", run, *rows)):
        code, _, err = edgezo(*command)
        assert code == 1 and "before its first step" in err and f"--resume --out {run}" in err

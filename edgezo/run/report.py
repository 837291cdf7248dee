"""report.html: one page about a run, made from the files of its directory alone.

The page stands alone: no script, no font and no address is in it, and its content policy forbids a browser to fetch
any. Rows, labels and paths are foreign text, and the template escapes every value (jinja2's autoescape). The page is a
function of the run's files, so that making it again gives the same bytes.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from edgezo.data.classes import ClassFigures, by_class, confusion, largest_class
from edgezo.errors import EdgezoError, UsageError
from edgezo.machine.files import atomic_write, remove_abandoned
from edgezo.machine.foreign import reading
from edgezo.machine.hardware import format_bytes
from edgezo.machine.open_files import open_to_read
from edgezo.run.charts import Chart, Level, Series, chart, smoothed
from edgezo.run.directory import RunFiles
from edgezo.run.kept_answers import kept_answers, shortened
from edgezo.run.overview import FINISHED, REBUILT, Overview, read_table
from edgezo.run.progress import verdict_on_cap
from edgezo.run.remarks import Answers, of_base, remarks

if TYPE_CHECKING:
    from jinja2 import Template

TEMPLATE = Path(__file__).with_name("report.html.jinja")
MOST_REPORT_BYTES = 16 << 20
MOST_MATRIX = 24  # classes of a matrix that a page has room for
MOST_ABOVE = 3.0  # times what was measured: a cap above that would leave no height for the curve
MOST_CONFUSED = 15  # pairs that are listed where there is no room
_FIRST_LINES = "<!doctype html>\n<!-- edgezo report; SHA-256 of what follows this line: {} -->\n"
_DAMAGED_FILE = "One of the files in it is damaged, or of another version: restore it from a copy."
_FIRST_LINES_FORM = re.compile(re.escape(_FIRST_LINES).replace(r"\{\}", "([0-9a-f]{64})"))


def write_report(run: Overview) -> bool:
    """Write the page of a run; False where it is there already with these bytes.

    Raises EdgezoError where a file of the run is damaged or the disk refuses the page, and UsageError where report.html
    is a file that edgezo did not write, or that was changed since.
    """
    page, files = report_page(run), run.files
    remove_abandoned(files.report)
    if os.path.lexists(files.report):
        if not is_report_file(files.report):
            raise UsageError(
                f"{files.report} is no page that edgezo wrote, or it was changed since. Nothing was changed. "
                "Give the file another name, then give the command again: edgezo report "
                f"{shlex.quote(str(files.path))}"
            )
        if _bytes_of(files.report) == page:
            return False
    atomic_write(files.report, page, lock=True)
    return True


def is_report_file(path: Path) -> bool:
    """Whether a file is a page of edgezo's as it was written. Raises OSError or ValueError where it cannot be read."""
    text = _bytes_of(path).decode("utf-8")
    head = _FIRST_LINES_FORM.match(text)
    return head is not None and head[1] == _digest(text[head.end() :].encode())


def _bytes_of(path: Path) -> bytes:
    """A page that is there, as far as one of edgezo's can be long."""
    with os.fdopen(open_to_read(path), "rb") as file:
        return file.read(MOST_REPORT_BYTES)


def _digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def report_page(run: Overview) -> bytes:
    """The page of a run. Raises EdgezoError where a file holds what edgezo does not write."""
    with reading(run.files.path, _DAMAGED_FILE):
        body = _page_template().render(_content(run)).encode("utf-8", "backslashreplace")
    return _FIRST_LINES.format(_digest(body)).encode() + body


@functools.cache
def _page_template() -> Template:
    """The page's template. To compile it takes longer than to fill it, and a program may train many runs."""
    # Imported here: it takes memory that no plan of a run counts.
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, finalize=_visible
    )
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))


def _content(run: Overview) -> dict[str, Any]:
    """The values that the template shows, by name."""
    lines = run.lines() if run.of_run else []
    kept = kept_answers(run.files, run.of_run)
    answers, asked = Answers.of(kept), read_table(run.files.asked)
    asked = asked if asked.get("run") == run.of_run else {}
    return {
        "title": _title(run),
        "sentence": _sentence(run, lines),
        "run": run,
        "finished": run.state == FINISHED,
        "rebuilt": run.state == REBUILT,
        "tiles": list(_tiles(run, answers)),
        "remarks": [*remarks(run, lines, answers), *of_base(run)],
        "charts": [c for c in (*_curves(run, lines), _memory_chart(run, lines)) if c is not None],
        "evaluations": list(_evaluations(run, lines)),
        "memory": list(_memory(run)),
        "classes": _classes(answers),
        "forgetting": _forgetting(asked),
        "written": asked.get("rows", []),
        "shown": list(_shown(kept)),
        "kept": kept,
        "settings": [(name, _value(value)) for name, value in run.settings().items()],
        "decisions": run.plan().get("decisions", []),
        "commands": list(_commands(run, str(kept.get("kind", "")))),
    }


def glance(run: Overview) -> tuple[str, list[tuple[str, str, str]]]:
    """(a sentence about the result, the figures that a reader looks for first: name, value, what to compare it with).

    Raises EdgezoError where a file of the run is damaged.
    """
    with reading(run.files.path, _DAMAGED_FILE):
        answers = Answers.of(kept_answers(run.files, run.of_run))
        return _sentence(run, run.lines() if run.of_run else []), list(_tiles(run, answers))


def leave_report(files: RunFiles, note: Callable[[str], None]) -> None:
    """Write the page about a run that has ended. A page that cannot be written fails no run."""
    try:
        write_report(Overview.of(files.path))
    except EdgezoError as problem:
        note(f"no report of this run: {problem}")


# ---------------------------------------------------------------------------------------------
# In words


def _title(run: Overview) -> str:
    cfg = run.cfg
    assert cfg is not None
    data = cfg.task or Path(cfg.data or "data").name
    return f"{Path(cfg.model).name} on {data}"


def _sentence(run: Overview, lines: Sequence[Mapping[str, Any]]) -> str:
    """The result of a run."""
    cfg, summary = run.cfg, run.summary
    assert cfg is not None
    of = f" of {cfg.steps}" if cfg.steps else ""
    if run.state == REBUILT:
        return f"Rebuilt by a replay from a journal of {run.steps} steps: {run.method}."
    if run.state != FINISHED:
        last = next((line for line in reversed(lines) if line.get("loss") is not None), None)
        loss = f" The last loss is {last['loss']:.4f}." if last else ""
        return f"Not finished: {run.steps}{of} steps of {run.method} are done.{loss}"
    before, after = summary.get("eval_before"), summary["eval_after"]
    error = after.get("standard_error")
    reached = f"{after['value']:.3f}" + (f" ± {error:.3f}" if error else "")
    metric = str(after["metric"]).replace("_", " ")
    start = f"{metric} from {before['value']:.3f} to" if before else f"{metric} of"
    steps = f"{run.steps:,} steps and " if run.steps else ""
    after_parent = ""
    if cfg.parent is not None:
        after_parent = f" It goes on from {cfg.parent_steps:,} steps of the run {cfg.parent[:12]}."
    return (
        f"{run.method[0].upper()}{run.method[1:]}: {start} {reached} on {after['n']:,} held-out rows, in {steps}"
        f"{_seconds(summary['train_s'])} of training.{after_parent}"
    )


def _tiles(run: Overview, answers: Answers | None) -> Iterator[tuple[str, str, str]]:
    """(name, value, what to compare it with) of the figures that a reader looks for first."""
    summary = run.summary
    if not summary:
        return
    before, after = summary.get("eval_before"), summary["eval_after"]
    error = after.get("standard_error")
    compared = [f"before {before['value']:.3f}"] if before else []
    if answers is not None and after["metric"] == "accuracy":
        largest, share = largest_class(answers.right)
        compared.append(f"{share:.3f} by always answering {shortened(answers.names[largest])!r}")
    value = f"{after['value']:.3f}" + (f" ± {error:.3f}" if error else "")
    yield str(after["metric"]).replace("_", " "), value, ", ".join(compared)
    if summary.get("loss_last") is not None:
        first, last = summary["loss_first"], summary["loss_last"]
        yield "training loss", f"{last:.4f}", f"first step {first:.4f}"
    peak, _, unit = _peak(summary)
    cap = summary["max_mem_bytes"]
    kept = verdict_on_cap(summary, peak)
    yield f"peak {unit}", format_bytes(peak), f"cap {format_bytes(cap)}, {kept}"
    if summary.get("step_s") is not None:
        forward = summary.get("forward_s")
        ratio = f"{summary['step_s'] / forward:.2f} x a plain forward" if forward else ""
        yield "a step", _seconds(summary["step_s"]), ratio


def _peak(summary: Mapping[str, Any]) -> tuple[int, int | None, str]:
    """(measured peak, peak of plain forward passes, whose memory) where the cap is."""
    on_gpu = summary.get("cuda_peak_bytes") is not None
    unit = "cuda" if on_gpu else "rss"
    name = "GPU memory" if on_gpu else "memory"
    return (
        summary[f"{'cuda_' if on_gpu else ''}peak{'' if on_gpu else '_rss'}_bytes"],
        summary.get(f"inference_peak_{unit}_bytes"),
        name,
    )


def _memory(run: Overview) -> Iterator[tuple[str, str, str]]:
    """(name, bytes, what it is) of the peaks that a run is judged by."""
    summary = run.summary
    if not summary:
        return
    peak, inference, _ = _peak(summary)
    yield "cap", format_bytes(summary["max_mem_bytes"]), "what --max-mem allows"
    yield "planned", format_bytes(summary["planned_peak_bytes"]), "the peak that was expected"
    used = f"{100 * peak / summary['max_mem_bytes']:.0f} % of the cap"
    yield "measured", format_bytes(peak), f"the peak from start to end, {used}"
    if inference:
        ratio = f"the run takes {peak / inference:.2f} x that"
        yield (
            "inference",
            format_bytes(inference),
            f"plain forward passes over as many rows; {ratio}",
        )
    for name, key, what in (
        ("loading", "load_peak_rss_bytes", "the peak until all weights were in memory"),
        ("at start", "base_rss_bytes", "the process with the rows, before a weight was read"),
    ):
        if summary.get(key) is not None:
            yield name, format_bytes(summary[key]), what


def _seconds(value: float) -> str:
    if value < 100:
        return f"{value:.3g} s"
    return f"{value / 60:.1f} min" if value < 5400 else f"{value / 3600:.1f} h"


def _value(value: Any) -> str:
    return " + ".join(map(str, value)) if isinstance(value, list) else str(value)


def _commands(run: Overview, kind: str) -> Iterator[tuple[str, str]]:
    """(what for, the command) of what to do next."""
    place = shlex.quote(str(run.files.path))
    if run.state not in (FINISHED, REBUILT):
        yield "go on with the run", run.resume_command
    yield "evaluate it again, or on other rows with --data", f"edgezo eval --model {place}"
    yield "predict rows", f"edgezo predict {place} --data rows.jsonl"
    if kind in ("completion", "text"):
        yield "talk to it", f"edgezo chat {place}"
        purpose = "what it has forgotten, and ten written answers, for this page"
        yield purpose, f"edgezo report {place} --ask"
    yield "a model for transformers", f"edgezo export {place} --format hf --out model"
    yield "a small file to ship", f"edgezo export {place} --format journal --out mine.edgezo"


# ---------------------------------------------------------------------------------------------
# Curves


def _curves(run: Overview, lines: Sequence[Mapping[str, Any]]) -> Iterator[Chart | None]:
    losses = [(line["step"], line["loss"]) for line in lines if line.get("step_size") is not None]
    losses = [(step, loss) for step, loss in losses if loss is not None]
    yield chart(
        "Training loss",
        "step",
        [
            Series("each batch", "faint", losses),
            Series("mean of the last steps", "main", smoothed(losses)),
        ],
    )
    points = [(line["step"], line) for line in lines if line.get("eval") in _EVALUATED]
    if not points:
        return
    metric = str(points[-1][1]["metric"])
    points = [(step, line) for step, line in points if line["metric"] == metric]
    values = [(float(step), float(line["value"])) for step, line in points]
    errors = [float(line.get("standard_error") or 0.0) for _, line in points]
    share = (0.0, 1.0) if metric not in ("loss", "objective") else None
    series = [Series("held-out rows", "main", values)] if len(values) > 1 else []
    dots = Series("± standard error", "main", values, dots=True, errors=errors)
    name = metric.replace("_", " ").capitalize()
    yield chart(f"{name} on held-out rows", "step", [*series, dots], bounds=share)


_EVALUATED = ("before", "during", "after")


def _evaluations(run: Overview, lines: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """The evaluations of the run as rows of a table."""
    for line in lines:
        if line.get("eval") in _EVALUATED:
            error = line.get("standard_error")
            yield {
                "when": str(line["eval"]),
                "step": line["step"],
                "metric": str(line["metric"]).replace("_", " "),
                "value": f"{line['value']:.4f}" + (f" ± {error:.4f}" if error else ""),
                "loss": "" if line.get("loss") is None else f"{line['loss']:.4f}",
                "n": line["n"],
            }


def _memory_chart(run: Overview, lines: Sequence[Mapping[str, Any]]) -> Chart | None:
    """Resident memory over the steps, or with --profile over the seconds of the process, and what it is compared to."""
    samples = read_table(run.files.profile).get("samples") or {}
    if samples:
        points = [
            (t, rss / 1e6) for t, rss in zip(samples["t_s"], samples["rss_bytes"], strict=True)
        ]
        x_name = "seconds since the start of the process"
    else:
        points = [
            (line["step"], line["rss_bytes"] / 1e6) for line in lines if line.get("rss_bytes")
        ]
        x_name = "step"
    assert run.cfg is not None
    if run.cfg.device == "cuda":
        return chart("Memory of the process, MB", x_name, [Series("measured", "main", points)])
    figures = {**run.plan(), **run.summary}
    measured = max((y for _, y in points), default=0.0)
    levels = [
        Level(name, look, figures[key] / 1e6, format_bytes(figures[key]))
        for name, look, key in (
            ("cap", "cap", "max_mem_bytes"),
            ("planned peak", "plan", "planned_peak_bytes"),
            ("inference", "plain", "inference_peak_rss_bytes"),
        )
        if figures.get(key) and figures[key] / 1e6 < MOST_ABOVE * measured
    ]
    return chart("Memory, MB", x_name, [Series("measured", "area", points)], levels)


# ---------------------------------------------------------------------------------------------
# Classes and rows


class ClassTable(NamedTuple):
    """Predicted classes: their figures, and the matrix or, of too many classes, the pairs that are confused most."""

    names: Sequence[str]
    figures: Sequence[ClassFigures]
    matrix: Sequence[
        Sequence[tuple[int, float]]
    ]  # (rows, share of the line); () of too many classes
    confused: Sequence[tuple[str, str, int]]  # (right, predicted, rows)
    macro_f1: float
    accuracy: float
    largest: str
    baseline: float
    when: str  # which of the two evaluations it is of


def _classes(answers: Answers | None) -> ClassTable | None:
    if answers is None:
        return None
    names = [shortened(name) for name in answers.names]
    counts = confusion(answers.right, answers.last, len(names))
    figures = by_class(counts)
    largest, share = largest_class(answers.right)
    matrix = [[(n, n / max(1, sum(line))) for n in line] for line in counts]
    pairs = [
        (names[r], names[p], n)
        for r, line in enumerate(counts)
        for p, n in enumerate(line)
        if n and r != p
    ]
    there = [f.f1 for f in figures if f.rows or f.predicted]
    return ClassTable(
        names,
        figures,
        matrix if len(names) <= MOST_MATRIX else (),
        sorted(pairs, key=lambda pair: -pair[2])[:MOST_CONFUSED],
        sum(there) / max(1, len(there)),
        sum(line[i] for i, line in enumerate(counts)) / len(answers.right),
        names[largest],
        share,
        "after" if answers.after else "before",
    )


def _forgetting(asked: Mapping[str, Any]) -> str:
    """What became of the loss of other text; "" where nobody has asked."""
    if not asked:
        return ""
    if asked["untouched"] is None:
        return "Not measured: what was trained is for label words, and what is left of the model writes no other text."
    before, after = (asked["untouched"][when] for when in ("before", "after"))
    error = after.get("standard_error") or 0.0
    return (
        f"The loss of {after['n']} texts that have nothing to do with the rows went from {before['loss']:.4f} to "
        f"{after['loss']:.4f} ({after['loss'] - before['loss']:+.4f} a token; standard error of the mean over the "
        f"texts {error:.2f}). A loss that rises is language that the model has forgotten."
    )


def _shown(kept: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The rows that are shown, with what was answered before and after."""
    for place, row in enumerate(kept.get("shown", ())):
        shown = {
            "number": row["row"] + 1,
            "text": shortened(str(row["text"])),
            "right": shortened(str(row["right"])),
        }
        for when in ("before", "after"):
            given = kept.get(when, {})
            answers, losses = given.get("answers", ()), given.get("losses", ())
            shown[when] = shortened(str(answers[place])) if answers else None
            shown[f"{when}_loss"] = f"{losses[place]:.3f}" if losses else None
            shown[f"{when}_right"] = shown[when] == shown["right"] if shown["right"] else None
        yield shown


def _visible(value: Any) -> Any:
    """A value of the template: a text without control characters, which no page can hold."""
    if not isinstance(value, str):
        return value
    return "".join(c if c >= " " or c in "\n\t" else repr(c)[1:-1] for c in value)

"""The Python API: ``edgezo.finetune(model, data, ...)`` trains, and returns a ``Run`` to evaluate, ask and export.

Importing this module imports neither PyTorch nor transformers. A call does so, once it has measured what the calling
program holds.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from edgezo.errors import UsageError
from edgezo.machine.clock import now_s
from edgezo.machine.files import user_path
from edgezo.machine.hardware import format_bytes
from edgezo.plan.config import RunConfig
from edgezo.run.called import called, with_threads
from edgezo.run.given import (
    GIVEN_MODEL,
    GIVEN_ROWS,
    Rows,
    is_loaded_model,
    keep_model,
    keep_rows,
    model_bytes,
    remove_given,
    rows_beside,
    splits_of,
)
from edgezo.run.progress import RunProgress, Several, Silent
from edgezo.run.requests import Asked, evaluation_request, finetune_request, settings_of_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.trainer_callback import TrainerCallback

Place = str | os.PathLike[str]
Callbacks = Sequence["TrainerCallback | type[TrainerCallback]"]


def _ignore(text: str) -> None:
    """Where notes go that nobody asked for."""


# ---------------------------------------------------------------------------------------------
# A run


class Run(Mapping[str, Any]):
    """A run of edgezo's: what ``finetune`` returns, or ``Run.open(directory)``.

    It is also a mapping, of what summary.json holds: ``run["eval_after"]["value"]``. Everything is in the directory:
    evaluating, predicting and exporting read the run anew, take memory only as long as they last, and keep the run's
    cap unless they are given ``max_mem``. Like that of ``finetune``, the cap is on the whole process.
    """

    def __init__(self, directory: Place):
        self.directory = Path(directory)

    @classmethod
    def open(cls, directory: Place) -> Self:
        """The run in a directory, finished or not. Raises EdgezoError where there is none."""
        from edgezo.run.directory import RunFiles

        run = cls(user_path(os.fspath(directory)))
        RunFiles(run.directory).read_config()
        return run

    @property
    def summary(self) -> Mapping[str, Any]:
        """What summary.json holds, as docs/journal.md describes it; empty until the run has ended."""
        from edgezo.run.directory import RunFiles
        from edgezo.run.summary_file import saved_summary

        return saved_summary(RunFiles(self.directory))

    def __getitem__(self, key: str) -> Any:
        return self.summary[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.summary)

    def __len__(self) -> int:
        return len(self.summary)

    def __fspath__(self) -> str:
        return str(self.directory)

    # -- use ----------------------------------------------------------------------------------------------

    def evaluate(
        self,
        data: Place | Rows | None = None,
        *,
        max_mem: str | int | None = None,
        note: Callable[[str], None] = _ignore,
        **settings: Any,
    ) -> dict[str, Any]:
        """Evaluate on all validation rows of the run, or on other data; returns ``metric``, ``value``, ``n``, ``loss``.

        A path is read as ``edgezo eval --data`` reads it. Of a list, a ``datasets.Dataset`` or an iterator of dicts all
        rows are evaluated on, with the run's template and label words unless ``settings`` have others. ``settings``
        are those of ``edgezo eval``. ``note`` gets a sentence for everything that a user should know of the data.
        Raises UsageError for rows of another task, DoesNotFit where the cap is too small, and EdgezoError.
        """
        given = {"model": str(self.directory), "max_mem_bytes": max_mem, **settings}
        with called(), _as_path(data) as path:
            if path is not None and not isinstance(data, str | os.PathLike):
                given = {**settings_of_rows(self.directory), **given}
            target, cfg = evaluation_request(_layer({**given, "data": path}), None)
            with with_threads(cfg.threads):
                from edgezo.run.evaluate import evaluate

                return evaluate(target, cfg, note)

    def predict(
        self,
        rows: Iterable[Mapping[str, Any] | str],
        *,
        max_mem: str | int | None = None,
        note: Callable[[str], None] = _ignore,
        **settings: Any,
    ) -> list[dict[str, Any]]:
        """A prediction for each row, a mapping of its fields or a text; see ``Predictor.predict``.

        The model is read for this call. For many calls keep it: ``with edgezo.load(run) as model``.
        Raises UsageError for a row that asks for nothing that the run answers, DoesNotFit and EdgezoError.
        """
        from edgezo.run.predict import load

        with load(self, note=note, max_mem_bytes=max_mem, **settings) as model:
            return model.predict(rows)

    def generate(
        self,
        prompt: str | Sequence[Mapping[str, str]],
        *,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        max_mem: str | int | None = None,
    ) -> str:
        """The text that follows a prompt, or the answer to a conversation; see ``Predictor.generate``.

        Raises UsageError where the run tells labels apart and writes nothing, DoesNotFit and EdgezoError.
        """
        from edgezo.run.predict import load

        with load(self, max_mem_bytes=max_mem, max_new_tokens=max_new_tokens) as model:
            return model.generate(prompt, temperature=temperature, top_p=top_p, seed=seed)

    def export(self, form: str = "hf", *, out: Place, dtype: str | None = None) -> dict[str, Any]:
        """Write the result to ``out``, a new directory: ``hf``, ``peft``, ``gguf``, ``gguf-adapter`` or ``onnx``.

        With ``journal``, ``out`` is a new file, from which anybody with the base makes the model. ``dtype`` is the type
        of the weights, as of ``edgezo export --dtype``. Returns what was written, with ``notes`` for whoever uses it.
        Raises UsageError where ``out`` is there or the form has no place for what was trained, EdgezoError.
        """
        with called():
            from edgezo.run.export import export

            return export(self.directory, form, user_path(os.fspath(out)), dtype=dtype)

    def resume(
        self,
        *,
        callbacks: Callbacks = (),
        progress: bool | RunProgress | None = True,
        **settings: Any,
    ) -> Self:
        """Go on with a run that was interrupted, to the bits that it would have had; returns it when it is complete.

        ``settings`` are those that may change: ``max_mem``, ``micro_batch``, ``threads``, and where files are now.
        Raises UsageError for any other, and what ``finetune`` raises.
        """
        began_s = now_s()
        with called():
            shown = _shown(progress, callbacks)
            given = _layer({"out": str(self.directory), **settings})
            asked = finetune_request(given, None, True, shown.note)
            return type(self)(_trained(asked, shown, began_s))

    # -- show ---------------------------------------------------------------------------------------------

    @property
    def report(self) -> Path:
        """The page about the run, report.html; it is written if it is not there. Raises EdgezoError."""
        from edgezo.run.overview import Overview
        from edgezo.run.report import write_report

        run = Overview.of(self.directory)
        if not run.files.report.exists():
            write_report(run)
        return run.files.report

    def __repr__(self) -> str:
        after = self.summary.get("eval_after")
        reached = f", {after['metric']} {after['value']:.4f} of {after['n']} rows" if after else ""
        return f"<edgezo.Run {str(self.directory)!r}{reached}>"

    def _repr_html_(self) -> str:
        """The result in a notebook."""
        from edgezo.run.overview import Overview
        from edgezo.run.report import glance

        sentence, figures = glance(Overview.of(self.directory))
        lines = "".join(
            f"<tr>{''.join(f'<td>{escape(part)}</td>' for part in parts)}</tr>" for parts in figures
        )
        link = f'<a href="{escape(str(self.directory / "report.html"))}">report.html</a>'
        place = f"{escape(str(self.directory))}: {link}"
        return f"<p>{escape(sentence)}</p><table>{lines}</table><p>{place}</p>"


# ---------------------------------------------------------------------------------------------
# Training


def finetune(
    model: Place | PreTrainedModel | RunConfig,
    data: Place | Rows | Mapping[str, Rows] | None = None,
    *,
    validation: Rows | None = None,
    tokenizer: Any = None,
    out: Place | None = None,
    max_mem: str | int | None = None,
    labels: str | Mapping[Any, str] | None = None,
    template: str | None = None,
    steps: int | None = None,
    callbacks: Callbacks = (),
    progress: bool | RunProgress | None = True,
    resume: bool = False,
    **settings: Any,
) -> Run:
    """Fine-tune a model on rows, by forward passes alone, under a cap on memory.

    ``model``: a card (``edgezo models`` lists them), a directory, a GGUF file or a hub id; or a loaded model of
    transformers with its ``tokenizer``. A loaded one is written to the run's directory, and its memory is the calling
    program's: a path takes less. Or a ``RunConfig``, which says all, and then nothing but ``callbacks``, ``progress``
    and ``resume`` may be given.

    ``data``: a path or hub id, or rows: a list of dicts, a ``datasets.Dataset`` or ``DatasetDict``, or an iterator of
    dicts. Rows are written to the run's directory one by one, so that the run can be resumed and evaluated. Without
    ``validation`` rows, a tenth is held out to evaluate on. ``task`` names a built-in task instead of data.

    ``out``: the directory of the run, new or empty; None: runs/MODEL-DATA.

    ``max_mem``: "900MB", "2GB" or bytes. It bounds the resident memory of the whole process until the call returns,
    and so what the calling program holds as well. The plan measures that and lists it as an item of its own. A cap
    that is too small is refused before anything is trained, with the smallest that works. None: 80 % of the memory
    that is free, and what the program holds.

    ``labels``: label words, "0=bad,1=good" or {0: "bad", 1: "good"}. ``template``: the prompt of a row,
    "{text} It was". ``steps``: 400, unless ``for_s`` bounds the whole call, in seconds. ``settings``: every other
    setting of the command line, with _ for - (docs/options.md).

    ``callbacks``: TrainerCallbacks of transformers; edgezo.run.callbacks says which events they get.
    ``progress``: True shows it in a terminal or a notebook; or an object of yours (``edgezo.run.progress``); or False.

    Returns the finished ``Run``. Raises UsageError with every problem of the request, DoesNotFit (nothing was trained),
    BudgetExceeded and Interrupted (the state is saved: ``Run.open(out).resume()`` goes on), EdgezoError.
    """
    began_s = now_s()
    request = {
        **{"max_mem_bytes": max_mem, "labels": _label_text(labels), "template": template},
        **{"steps": steps, "out": None if out is None else os.fspath(out), **settings},
    }
    if isinstance(model, RunConfig):
        if any(one is not None for one in (data, validation, tokenizer, *request.values())):
            raise UsageError("a RunConfig says all that a run does: give settings to make_config")
        with called():
            return Run(_trained(Asked(model, resume), _shown(progress, callbacks), began_s))
    if resume:
        raise UsageError("a run goes on by edgezo.Run.open(DIRECTORY).resume()")
    with called():
        shown = _shown(progress, callbacks)
        with _kept(model, tokenizer, data, validation, request, shown.note) as asked:
            return Run(_trained(asked, shown, began_s))


def _trained(asked: Asked, shown: RunProgress, began_s: float) -> str:
    """Train, or go on; returns the directory of the run."""
    cfg, resume, parent = asked
    with with_threads(cfg.threads):
        from edgezo.run.train import finetune as train

        try:
            summary = train(cfg, resume=resume, progress=shown, began_s=began_s, parent=parent)
        finally:
            shown.close()
    return str(summary["run"])


def _shown(progress: bool | RunProgress | None, callbacks: Callbacks) -> RunProgress:
    """Where a run reports to."""
    shown: RunProgress = Silent()
    if progress is True:
        from edgezo.run.display import Display

        shown = Display()
    elif progress is not None and progress is not False:
        shown = progress
    if not callbacks:
        return shown
    from edgezo.run.callbacks import TrainerCallbacks

    return Several([shown, TrainerCallbacks(callbacks)])


def _label_text(labels: str | Mapping[Any, str] | None) -> str | None:
    """Label words as the command line has them. Raises UsageError for what it has no form for."""
    if not isinstance(labels, Mapping):
        return labels
    for part in (*labels, *labels.values()):
        if set("=,") & set(str(part)):
            raise UsageError(
                f"labels: {str(part)!r} has a comma or an equals sign, which no label may have"
            )
    return ",".join(f"{value}={word}" for value, word in labels.items())


COMMON = (
    "model",
    "data",
    "task",
    "out",
    "device",
    "objective",
    "steps",
    "for_s",
    "more_steps",
    "base",
)


def _layer(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as the commands have them: those are there that every command asks for."""
    return {**dict.fromkeys(COMMON), **given}


# ---------------------------------------------------------------------------------------------
# What is given as objects


@contextmanager
def _kept(
    model: Any,
    tokenizer: Any,
    data: Any,
    validation: Rows | None,
    request: Mapping[str, Any],
    note: Callable[[str], None],
) -> Iterator[Asked]:
    """The request of a run, with a model and rows that are objects in the directory of the run.

    They are removed again if the run does not begin.
    """
    from edgezo.run.claims import prepare
    from edgezo.run.directory import RunFiles, free_directory

    loaded = is_loaded_model(model)
    as_rows = data is not None and not isinstance(data, str | os.PathLike)
    _check_beside(loaded, tokenizer, as_rows, validation)
    named = (
        (Path(getattr(model, "name_or_path", "") or "model").name) if loaded else os.fspath(model)
    )
    given = {**request, "model": named, "data": "rows" if as_rows else data and os.fspath(data)}
    if loaded or as_rows:
        about = given["data"] or given.get("task") or "data"
        given["out"] = out = given["out"] or str(free_directory(named, about))
        given |= {"model": str(Path(out, GIVEN_MODEL))} if loaded else {}
        given |= {"data": str(Path(out, GIVEN_ROWS))} if as_rows else {}
    asked = finetune_request(_layer(given), None, False, note)
    if not (loaded or as_rows):
        yield asked
        return
    files = RunFiles(Path(str(asked.cfg.out)))
    is_new = not files.path.exists()
    prepare(files)
    try:
        if loaded:
            size = format_bytes(model_bytes(model))
            note(f"the loaded model takes {size} of this process; its path would take none")
            keep_model(files.path / GIVEN_MODEL, model, tokenizer)
        if as_rows:
            keep_rows(files.path / GIVEN_ROWS, splits_of(data, validation))
        with called():  # what was mapped of the model is now in memory, and the program's
            yield asked
    except BaseException:
        if not files.config.exists():
            _withdraw(files.path, is_new)
        raise


def _check_beside(loaded: bool, tokenizer: Any, as_rows: bool, validation: Rows | None) -> None:
    """Raise UsageError for what has no use beside the model or the data that is given."""
    if tokenizer is not None and not loaded:
        raise UsageError("a tokenizer goes with a loaded model: a path or a card has its own")
    if validation is not None and not as_rows:
        raise UsageError(
            "validation rows go with rows: put a train and a validation file into one folder, and give that as data"
        )


def _withdraw(folder: Path, is_new: bool) -> None:
    """Remove what was written for a run that did not begin."""
    from edgezo.machine.open_files import unlink_inside
    from edgezo.machine.ownership import MARKER

    for name in (GIVEN_MODEL, GIVEN_ROWS):
        remove_given(folder / name)
    if is_new and set(os.listdir(folder)) == {MARKER}:
        unlink_inside(folder, MARKER)
        folder.rmdir()


@contextmanager
def _as_path(data: Any) -> Iterator[str | None]:
    """Where rows are that are evaluated on, until the end of the block."""
    if data is None or isinstance(data, str | os.PathLike):
        yield None if data is None else os.fspath(data)
        return
    with rows_beside(data) as folder:
        yield str(folder)

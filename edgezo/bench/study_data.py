"""The rows of a study's tasks: where they lie, and completions made of labelled rows.

A table of a task may say ``data = "{data-root}/clinc_oos"`` and ``completion = "{intent_text}"``. Its rows are then
written once as {"prompt": the template, "completion": the completion}, with the fields of the row filled in.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from edgezo.bench.study import DATA_ROOT, Settings, Study
from edgezo.errors import UsageError
from edgezo.machine.files import atomic_path

SPLITS = ("train", "validation")


def placed(study: Study, data_root: str | None, folder: Path) -> Study:
    """The study with the data of every task where it is; completions are written to ``folder``.

    Raises UsageError where a task needs ``data_root``, or its rows lack a field.
    """
    tasks = {name: _placed(name, task, data_root, folder) for name, task in study.tasks.items()}
    untouched = {
        name: _placed(name, task, data_root, folder) for name, task in study.untouched.items()
    }
    return replace(study, tasks=tasks, untouched=untouched)


def _placed(name: str, task: Settings, data_root: str | None, folder: Path) -> Settings:
    task = {**task}
    if DATA_ROOT in str(task.get("data", "")):
        if data_root is None:
            raise UsageError(f"the rows of {name} are in {task['data']}: give --data-root DIR")
        task["data"] = task["data"].replace(DATA_ROOT, data_root)
    completion = task.pop("completion", None)
    if completion is None:
        return task
    rows = folder / name
    for split in SPLITS:
        source, copy = Path(task["data"], f"{split}.jsonl"), rows / f"{split}.jsonl"
        if not copy.exists():
            rows.mkdir(parents=True, exist_ok=True)
            with atomic_path(copy) as temporary:
                lines = _completions(name, source, task.get("template", "{text}"), completion)
                temporary.write_text("".join(lines), encoding="utf-8")
    return {k: v for k, v in task.items() if k != "template"} | {"data": str(rows)}


def _completions(name: str, source: Path, template: str, completion: str) -> Iterator[str]:
    """The lines of a file of completions."""
    try:
        with source.open(encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                pair = {"prompt": template.format(**row), "completion": completion.format(**row)}
                yield json.dumps(pair, ensure_ascii=False) + "\n"
    except (OSError, ValueError, KeyError, TypeError, IndexError) as problem:
        raise UsageError(
            f"{source} gives no completions for {name}: {type(problem).__name__}: {problem}. Its template and its "
            "completion name fields of its rows in braces."
        ) from problem

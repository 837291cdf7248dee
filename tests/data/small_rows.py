"""Small files of rows, and what is read from them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import write_rows
from tokenizers_fixture import byte_tokenizer

from edgezo.data.batches import Example
from edgezo.data.dataset import DataRequest, Dataset, load_dataset
from edgezo.errors import UsageError

GOOD_BAD = [{"text": f"film number {i}", "label": i % 2} for i in range(20)]
SST2_STYLE = {"template": "{text} All in all it was", "labels": "0=bad,1=good"}


def write(path: Path, rows: list[Any]) -> str:
    return str(write_rows(path, rows))


def load(rows: list[Any], folder: Path, tokenizer: Any = None, **asked: Any) -> Dataset:
    masked = asked.pop("masked", False)
    data = write(folder / "rows.jsonl", rows)
    return load_dataset(
        DataRequest(data=data, **asked), tokenizer or byte_tokenizer(), masked=masked
    )


def problems(run: Callable[[], Any]) -> str:
    with pytest.raises(UsageError) as caught:
        run()
    assert caught.value.exit_code == 2
    assert len(str(caught.value).splitlines()) < 30  # one screen
    return str(caught.value)


def everything(data: Dataset) -> tuple[Example, ...]:
    return [*data.train, *data.validation]

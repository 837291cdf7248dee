"""Rows of a Parquet file as lines of JSON on standard output: a process of its own, started by row_files.py.

So the 60 MB of pyarrow are no part of a run's memory, and a file that unpacks to more than there is room for, or that
stops the library, ends this process only.
"""

from __future__ import annotations

import json
import sys
from typing import Any, NoReturn

from edgezo.machine.children import address_space_bytes, limit_memory
from edgezo.machine.foreign import first_twice

BATCH_ROWS = 256


def main() -> None:
    """Print the rows of the file that the first argument names. The second is the memory that may be taken, in bytes.

    Of Arrow's memory pools only ``system`` reserves no more than it uses (``ARROW_DEFAULT_MEMORY_POOL``).
    """
    path, room_bytes = sys.argv[1], int(sys.argv[2])
    try:
        import pyarrow  # type: ignore[import-untyped]
        import pyarrow.parquet  # type: ignore[import-untyped]
    except ImportError:
        _stop("reading Parquet needs pyarrow: pip install pyarrow")
    limit_memory(address_space_bytes() + room_bytes)
    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if (twice := first_twice(names)) is not None:
            _stop(f"it has several columns named {twice!r}")
        for batch in file.iter_batches(BATCH_ROWS, use_threads=False):
            for row in batch.to_pylist():
                print(json.dumps({k: _without_nulls(v) for k, v in row.items()}, default=_text))
    except MemoryError:
        _stop(f"it needs more than {room_bytes // 1_000_000}MB to unpack")
    except BrokenPipeError:
        _stop("its rows are not wanted any more")
    except Exception as error:  # a damaged file: pyarrow raises exceptions of many types
        _stop((str(error).splitlines() or [type(error).__name__])[0])


def _without_nulls(value: Any) -> Any:
    """A value whose objects have no keys without a value: a column's objects all have every key of any of them."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _stop(why: str) -> NoReturn:
    """End with a sentence for the user on standard error."""
    sys.stderr.write(why + "\n")
    sys.exit(1)

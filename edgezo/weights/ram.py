"""Blocks in host RAM, beside a GPU that has no room for them. (disk.py does this for a disk.)

A buffer is page-locked, so that the GPU copies it by itself while it computes. Copies run on two CUDA streams, one in
each direction, in the order of their slots:

    to the GPU     after what has been computed so far (the last layer that used the slot), and after every copy back
    back           after what has been computed so far (the update in the slot)

The computation waits for a copy when it uses that slot; the process waits for none. A buffer ends with its process,
and a resume makes it again from base and journal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from edgezo.weights.home import Home, Make, Pending, Traffic, parts_of
from edgezo.weights.layouts import Layout


class HostBuffer:
    """The bytes of one block in host RAM, a ``Home``."""

    def __init__(self, name: str, layouts: Mapping[str, Layout], pinned: bool):
        self.name, self._pinned = name, pinned
        self.parts, self.data_bytes = parts_of(layouts)
        self._data = torch.empty(0, dtype=torch.uint8)

    def open(self) -> int | None:
        return None  # a buffer does not outlive its process

    def reserve(self) -> None:
        self._data = torch.empty(self.data_bytes, dtype=torch.uint8)
        if self._pinned:
            # Not pin_memory: its allocator rounds a size up to the next power of two.
            runtime: Any = torch.cuda.cudart()
            code = runtime.cudaHostRegister(self._data.data_ptr(), self.data_bytes, 0)
            torch.cuda.check_error(code)

    def read(self, data: Tensor) -> None:
        data[: self.data_bytes].copy_(self._data, non_blocking=True)

    def write(self, data: Tensor, applied: int) -> None:
        self._data.copy_(data[: self.data_bytes], non_blocking=True)

    def close(self) -> None:
        if self._pinned and len(self._data):
            runtime: Any = torch.cuda.cudart()
            torch.cuda.check_error(runtime.cudaHostUnregister(self._data.data_ptr()))
        self._data = torch.empty(0, dtype=torch.uint8)


@dataclass
class HostMedium:
    """The buffers of the blocks behind the first ``resident_blocks``, and the slots on ``device`` that they visit."""

    device: torch.device
    resident_blocks: int = 0
    kind: str = "host"
    traffic: Traffic = field(default_factory=Traffic)

    def __post_init__(self) -> None:
        self._copies: Copies = _Streams() if self.device.type == "cuda" else _Thread()

    def home(
        self, name: str, layouts: Mapping[str, Layout], make: Mapping[str, Make]
    ) -> HostBuffer:
        return HostBuffer(name, layouts, self.device.type == "cuda")

    def table(self, vacant: Layout, make: Callable[[slice], Layout]) -> None:
        """None: tables stay on the device."""

    def slot(self, nbytes: int) -> Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8, device=self.device)

    def read(self, home: Home, slot: Tensor) -> Pending:
        return self._copies.read(home, slot)

    def write(self, home: Home, slot: Tensor, applied: int) -> Pending:
        return self._copies.write(home, slot, applied)

    def close(self) -> None:
        self._copies.close()


class Copies(Protocol):
    """Copies between buffers and slots beside the computation, in the order of their slots."""

    def read(self, home: Home, slot: Tensor) -> Pending: ...

    def write(self, home: Home, slot: Tensor, applied: int) -> Pending: ...

    def close(self) -> None: ...


class _Thread:
    """Copies for a CPU: a thread does one after the other."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="host")

    def read(self, home: Home, slot: Tensor) -> Pending:
        return self._thread.submit(home.read, slot)

    def write(self, home: Home, slot: Tensor, applied: int) -> Pending:
        return self._thread.submit(home.write, slot, applied)

    def close(self) -> None:
        self._thread.shutdown(wait=True)


class _Streams:
    """Copies for a GPU, on two streams."""

    def __init__(self) -> None:
        self._to_gpu, self._to_host = torch.cuda.Stream(), torch.cuda.Stream()

    def read(self, home: Home, slot: Tensor) -> Pending:
        self._to_gpu.wait_stream(torch.cuda.current_stream())
        self._to_gpu.wait_stream(self._to_host)
        with torch.cuda.stream(self._to_gpu):
            home.read(slot)
        return _Copy(self._to_gpu.record_event())

    def write(self, home: Home, slot: Tensor, applied: int) -> Pending:
        self._to_host.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._to_host):
            home.write(slot, applied)
        return _Copy(self._to_host.record_event())

    def close(self) -> None:
        torch.cuda.synchronize()


@dataclass
class _Copy:
    """A copy that a GPU has been asked for. ``result`` lets the computation wait for it, not the process."""

    event: torch.cuda.Event

    def done(self) -> bool:
        return bool(self.event.query())

    def result(self) -> None:
        torch.cuda.current_stream().wait_event(self.event)

"""A GPU that is none: its tensors say ``cuda``, lie in the RAM, and every copy, wait and byte of them is counted.

Inside ``FakeGpu(limit_bytes)`` tensors of device cuda are ``There``: wrappers of CPU tensors. Operations on them run on
the CPU. What would make the process wait for a GPU is noted (``waits``), and so is what is copied to it (``uploads``).
An allocation beyond what the process may reserve raises torch.OutOfMemoryError, as PyTorch's allocator does. Operations
that mix There with a CPU tensor of more than one number are an error, as they are on a GPU.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

CUDA = torch.device("cuda", 0)
aten = torch.ops.aten
# Operations whose result the process has to wait for: a number, or a shape that depends on values.
WAITING = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_consecutive.default,
    aten.bincount.default,
    aten.equal.default,
    aten.repeat_interleave.Tensor,
}


def mapped(kind: type, change: Callable[[Any], Any], x: Any) -> Any:
    """``x`` with ``change`` made to all of a kind in it: in tuples, lists and dictionaries."""
    if isinstance(x, kind):
        return change(x)
    if isinstance(x, tuple | list):
        values = [mapped(kind, change, y) for y in x]
        return type(x)(*values) if hasattr(x, "_fields") else type(x)(values)
    return {k: mapped(kind, change, v) for k, v in x.items()} if isinstance(x, dict) else x


def all_of(kind: type, x: Any) -> list[Any]:
    """All of a kind in ``x``."""
    seen: list[Any] = []
    mapped(kind, seen.append, x)
    return seen


class There(Tensor):
    """A tensor on the fake GPU."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> There:
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined, no-any-return]
            cls, here.shape, here.stride(), here.storage_offset(), dtype=here.dtype, device=CUDA
        )

    def __init__(self, here: Tensor):
        self.here = here

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} of a tensor on the fake GPU, outside of it")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"There({tuple(self.shape)}, {self.dtype})"


class _Functions(TorchFunctionMode):
    """What PyTorch takes apart by device before operations are dispatched."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and isinstance(args[0], There):
            with torch._C.DisableTorchFunction():
                here = [a.here if isinstance(a, There) else a for a in args]
                more = {k: v.here if isinstance(v, There) else v for k, v in kwargs.items()}
                return FakeGpu.current.wrap(func(*here, **more))
        if func is Tensor.pin_memory:
            return args[0]
        if (
            func in (Tensor.__getitem__, Tensor.__setitem__)
            and isinstance(args[0], There)
            and not torch.is_grad_enabled()
        ):
            return FakeGpu.current.index(func, *args)
        # Which GPU "cuda" is, PyTorch would ask of a library that is not there.
        args, kwargs = mapped(torch.device, _numbered, (args, kwargs))
        if func is Tensor.to:
            args = tuple(CUDA if isinstance(a, str) and a == "cuda" else a for a in args)
        if isinstance(kwargs.get("device"), str) and kwargs["device"] == "cuda":
            kwargs = kwargs | {"device": CUDA}
        if func is torch.tensor and kwargs.get("device") == CUDA:
            return func(*args, **kwargs | {"device": "cpu"}).to(CUDA)
        try:
            return func(*args, **kwargs)
        except RuntimeError as problem:
            # Some functions switch to the tensor's GPU before they are dispatched, which a PyTorch for CPUs cannot.
            if "not linked with support for cuda" not in str(problem):
                raise
        with torch._C.DisableTorchFunction():
            return FakeGpu.current.run(func, args, kwargs)


def _here(x: Any) -> Any:
    """``x`` with the CPU tensors that lie behind those there."""
    return mapped(There, lambda t: t.here, x)


def _numbered(device: torch.device) -> torch.device:
    return CUDA if device.type == "cuda" else device


class FakeGpu(TorchDispatchMode):
    """One GPU of ``limit_bytes``, of which other processes hold ``others_bytes`` and the driver ``context_bytes``."""

    current: FakeGpu

    def __init__(self, limit_bytes: int = 1 << 40, others_bytes: int = 0, context_bytes: int = 0):
        super().__init__()
        self.limit_bytes, self.others_bytes = limit_bytes, others_bytes
        self.context_bytes = context_bytes
        self.may_reserve_bytes = limit_bytes
        self.at_most_bytes = (
            limit_bytes  # what a test lets this process reserve, whatever it asks for
        )
        self.live: dict[int, list[int]] = {}  # storage -> [wrappers, bytes]
        self.live_bytes = self.peak_bytes = self.reserved_bytes = self.peak_reserved_bytes = 0
        self.waits: list[str] = []
        self.uploads: list[int] = []  # bytes of each copy to the GPU

    # -- tensors ------------------------------------------------------------------------------------------

    def wrap(self, here: Tensor) -> There:
        storage = here.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        if key and key not in self.live:
            self.live[key] = [0, size]
            self.live_bytes += size
        made = There(here)
        if key:
            self.live[key][0] += 1
            weakref.finalize(made, self._release, key)
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        if self.live_bytes > self.reserved_bytes:
            free_bytes = self.limit_bytes - self.others_bytes - self.context_bytes
            if self.live_bytes > min(self.may_reserve_bytes, self.at_most_bytes, free_bytes):
                raise torch.OutOfMemoryError(
                    f"CUDA out of memory. Tried to allocate {size / 2**20:.2f} MiB. GPU 0"
                )
            self.reserved_bytes = self.live_bytes
            self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)
        return made

    def _release(self, key: int) -> None:
        entry = self.live[key]
        entry[0] -= 1
        if not entry[0]:
            self.live_bytes -= entry[1]
            del self.live[key]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = all_of(Tensor, (args, kwargs))
        there = [a for a in tensors if isinstance(a, There)]
        device = kwargs.get("device")
        to_gpu = device is not None and torch.device(device).type == "cuda"
        if not there and not to_gpu:
            return func(*args, **kwargs)
        if there and func in WAITING:
            self.waits.append(str(func))
        if func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
            if any(i is not None and i.dtype is torch.bool for i in args[1]):
                self.waits.append(f"{func} of a mask")
        leaves = device is not None and not to_gpu
        if leaves and there:
            self.waits.append(f"copy of {[tuple(t.shape) for t in there]} from the GPU")
        if to_gpu and func is aten._to_copy.default and not there:
            self.uploads.append(args[0].nbytes)
        self._check_devices(func, tensors, there)
        if to_gpu:
            kwargs["device"] = torch.device("cpu")
        kwargs.pop("pin_memory", None)
        if leaves:
            return func(*_here(args), **kwargs)
        return self.run(func, args, kwargs)

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """``func`` on what lies here of its arguments; its results are there."""
        before = {id(t.here): t for t in all_of(There, (args, kwargs))}
        copied = func in (aten.copy_.default, Tensor.copy_)
        if copied and isinstance(args[0], There) and not isinstance(args[1], There):
            self.uploads.append(args[1].nbytes)
        made = func(*_here(args), **_here(kwargs))
        if copied and not isinstance(args[0], There):
            self.waits.append("copy into a CPU tensor")
            return args[0]
        if func is aten._to_copy.default and not before and made is args[0]:
            made = made.clone()

        def back(t: Tensor) -> Tensor:
            return before[id(t)] if id(t) in before else self.wrap(t)

        return mapped(Tensor, back, made)

    def index(self, func: Any, there: There, index: Any, *value: Any) -> Any:
        """``there[index]``, or ``there[index] = value``."""
        if any(i.dtype is torch.bool for i in all_of(Tensor, index)):
            self.waits.append("index of a mask")
        if any(isinstance(v, Tensor) and v.dim() and not isinstance(v, There) for v in value):
            raise RuntimeError("a tensor on the CPU is written there")
        with torch._C.DisableTorchFunction():
            made = func(there.here, *_here((index, *value)))
        return self.wrap(made) if isinstance(made, Tensor) else made

    @staticmethod
    def _check_devices(func: Any, tensors: list[Tensor], there: list[There]) -> None:
        for a in tensors if there and func is not aten.copy_.default else ():
            if not isinstance(a, There) and a.dim():
                raise RuntimeError(
                    f"{func}: a tensor {tuple(a.shape)} on the CPU among those there"
                )

    # -- what torch.cuda says -----------------------------------------------------------------------------

    def free_bytes(self) -> int:
        return self.limit_bytes - self.others_bytes - self.context_bytes - self.reserved_bytes

    def _fraction(self, fraction: float) -> None:
        self.may_reserve_bytes = int(fraction * self.limit_bytes)

    def _empty_cache(self) -> None:
        self.reserved_bytes = self.live_bytes

    def _reset_peaks(self) -> None:
        self.peak_bytes, self.peak_reserved_bytes = self.live_bytes, self.reserved_bytes

    @contextlib.contextmanager
    def installed(self) -> Iterator[FakeGpu]:
        """Inside, torch.cuda has this GPU and nothing else."""
        answers: dict[str, Any] = {
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "_lazy_init": lambda: None,
            "mem_get_info": lambda *_: (self.free_bytes(), self.limit_bytes),
            "memory_reserved": lambda *_: self.reserved_bytes,
            "memory_allocated": lambda *_: self.live_bytes,
            "max_memory_reserved": lambda *_: self.peak_reserved_bytes,
            "max_memory_allocated": lambda *_: self.peak_bytes,
            "reset_peak_memory_stats": lambda *_: self._reset_peaks(),
            "set_per_process_memory_fraction": lambda fraction, *_: self._fraction(fraction),
            "empty_cache": self._empty_cache,
            "synchronize": lambda *_: self.waits.append("synchronize"),
            "Stream": _Stream,
            "current_stream": lambda *_: _Stream(),
            "stream": lambda stream: contextlib.nullcontext(),
            "Event": _Event,
        }
        FakeGpu.current = self
        with contextlib.ExitStack() as stack:
            for name, answer in answers.items():
                stack.enter_context(mock.patch.object(torch.cuda, name, answer))
            stack.enter_context(_Functions())
            stack.enter_context(self)
            yield self


class _Event:
    def query(self) -> bool:
        return True

    def synchronize(self) -> None: ...


class _Stream:
    def wait_stream(self, other: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self) -> _Event:
        return _Event()

    def synchronize(self) -> None: ...

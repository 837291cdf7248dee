"""Reads small networks from a file of pickled modules, as ``torch.save`` writes it, without unpickling anything.

Such a file is a zip of a pickle and of raw storages. A pickle is a program. Here its opcodes are read as data by a
small machine that knows only those which ``torch.save`` writes. No name in the file is ever looked up, imported or
called: what a name may stand for is in the tables below, and everything else is refused.
"""

from __future__ import annotations

import math
import os
import pickletools
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edgezo.errors import EdgezoError
from edgezo.machine.foreign import FAULTS, clip, reason
from edgezo.machine.open_files import open_to_read

LARGEST_BYTES = 64 * 10**6  # no file of small networks is larger,
MOST_PARTS = 10_000  # has more parts,
MOST_PROGRAM_BYTES = 4 * 10**6  # or a longer program,
MOST_OPCODES = 200_000  # of which each may make an object
_PART = b"PK\x01\x02"  # what each part of a zip has in its table of contents
MODULES = {
    f"torch.nn.modules.{name}"
    for name in ("container Sequential", "linear Linear", "activation Tanh")
}
STORAGES = {
    "torch FloatStorage": "<f4",
    "torch DoubleStorage": "<f8",
    "torch HalfStorage": "<f2",
}
CONTAINERS: dict[str, Callable[[], Any]] = {
    "collections OrderedDict": dict,
    "__builtin__ set": set,
    "builtins set": set,
}
TENSORS = {"torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"}


class _Refused(Exception):
    """The file holds something that a file of small networks has no use for."""


_WRONG: tuple[type[Exception], ...] = (
    *(_Refused, zipfile.BadZipFile, zipfile.LargeZipFile),
    *FAULTS,
)


class _Name(NamedTuple):
    name: str


class _Storage(NamedTuple):
    dtype: str
    key: str
    numel: int


class _Array(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(eq=False)
class _Module:
    kind: str  # Sequential, Linear or Tanh
    state: dict[str, Any] = field(default_factory=dict)


Layers = list[
    dict[str, np.ndarray]
]  # the layers of a network in order: weight and bias, {} for a Tanh


def read_networks(path: Path) -> dict[str, Layers]:
    """Networks of Linear and Tanh layers by name; arrays are fp32.

    Raises EdgezoError for any other file. Nothing in the file is ever run.
    """
    try:
        with os.fdopen(open_to_read(path), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > LARGEST_BYTES:
                raise _Refused(f"it has {size:,} bytes, small networks at most 64 MB")
            if file.read().count(_PART) > MOST_PARTS:
                raise _Refused(f"it has more than {MOST_PARTS:,} parts")
            with zipfile.ZipFile(file) as archive:
                return _networks(archive, size)
    except _WRONG as problem:
        raise EdgezoError(
            f"{path} is not a file of small networks that edgezo reads: {reason(problem)}.\n"
            "Nothing of it was run. A published finetuner is a dictionary of Linear, Tanh, Linear, "
            "as torch.save writes it."
        ) from problem


class _Storages:
    """The raw storages of an archive, each read once. Together, tensors have at most a value for each of its bytes."""

    def __init__(self, archive: zipfile.ZipFile, root: str, size: int):
        self._archive, self._root, self._room = archive, root, size
        self._values: dict[_Storage, np.ndarray] = {}

    def array(self, of: Any) -> np.ndarray:
        """A tensor in fp32."""
        if not isinstance(of, _Array):
            raise _Refused("a layer's weight is no tensor")
        numbers = (of.offset, of.storage.numel, *of.shape, *of.stride)
        if len(of.shape) > 2 or min(numbers) < 0 or max(numbers) > LARGEST_BYTES:
            raise _Refused("a tensor has no shape that a layer may have")
        contiguous = tuple(math.prod(of.shape[i + 1 :]) for i in range(len(of.shape)))
        if of.stride != contiguous:
            raise _Refused(f"a tensor has shape {of.shape} and strides {of.stride}")
        count = math.prod(of.shape)
        self._room -= count
        if self._room < 0:
            raise _Refused("its tensors have more values than the file has bytes")
        values = self._read(of.storage)
        if of.offset + count > len(values):
            raise _Refused(f"a tensor ends beyond its storage of {len(values)} values")
        with np.errstate(over="ignore"):
            array = values[of.offset : of.offset + count].astype(np.float32).reshape(of.shape)
        if not np.isfinite(array).all():
            raise _Refused("a tensor holds values that are not finite in fp32")
        return array

    def _read(self, storage: _Storage) -> np.ndarray:
        if storage not in self._values:
            raw = self._archive.read(f"{self._root}data/{storage.key}")
            values = np.frombuffer(raw, storage.dtype)
            if len(values) != storage.numel:
                raise _Refused(
                    f"storage {clip(storage.key, 40)} has {len(values)} values, not the {storage.numel} it should have"
                )
            self._values[storage] = values
        return self._values[storage]


def _networks(archive: zipfile.ZipFile, size: int) -> dict[str, Layers]:
    parts = archive.infolist()
    names = [part.filename for part in parts]
    if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
        raise _Refused("its parts are compressed, which torch.save never does")
    if sum(part.file_size for part in parts) > size or len(set(names)) != len(names):
        raise _Refused("its parts overlap, or two have one name")
    pickles = [n for n in names if n.endswith("/data.pkl") and n.count("/") == 1]
    if len(pickles) != 1:
        raise _Refused(f"it holds {len(pickles)} pickles at its top, not one")
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
        raise _Refused("its numbers are not little-endian")
    if archive.getinfo(pickles[0]).file_size > MOST_PROGRAM_BYTES:
        raise _Refused(f"its pickle has more than {MOST_PROGRAM_BYTES:,} bytes")
    content = _Machine(archive.read(pickles[0])).run()
    if not isinstance(content, dict) or not content:
        raise _Refused("it is no dictionary of networks")
    array = _Storages(archive, root, size).array
    networks: dict[str, Layers] = {}
    for name, module in content.items():
        if not isinstance(name, str) or not isinstance(module, _Module):
            raise _Refused("its dictionary holds more than named networks")
        networks[name] = [
            {parameter: array(of) for parameter, of in layer.state.get("_parameters", {}).items()}
            for layer in _in_sequence(name, module)
        ]
    return networks


def _in_sequence(name: str, module: _Module) -> list[_Module]:
    layers = module.state.get("_modules")
    if module.kind != "Sequential" or not isinstance(layers, dict):
        raise _Refused(f"{clip(name, 40)} is a {module.kind}, not a sequence of layers")
    if list(layers) != [str(i) for i in range(len(layers))]:
        raise _Refused(f"the layers of {clip(name, 40)} are not numbered from 0")
    for layer in layers.values():
        wanted = {"Linear": {"weight", "bias"}, "Tanh": set()}.get(getattr(layer, "kind", ""))
        if wanted is None or set(layer.state.get("_parameters", {})) != wanted:
            raise _Refused(
                f"{clip(name, 40)} has a layer that is neither Linear with a bias nor Tanh"
            )
    return list(layers.values())


class _Machine:
    """The opcodes of a protocol-2 pickle, as far as ``torch.save`` needs them for modules."""

    def __init__(self, program: bytes):
        self.program = program
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.marks: list[int] = []

    def run(self) -> Any:
        for number, (opcode, argument, _) in enumerate(pickletools.genops(self.program)):
            if number >= MOST_OPCODES:
                raise _Refused(f"its pickle has more than {MOST_OPCODES:,} opcodes")
            if opcode.name == "STOP":
                (result,) = self.stack
                return result
            step = getattr(self, f"_{opcode.name.lower()}", None)
            if step is not None:
                step(argument)
            elif opcode.name in _PUSHED:
                self.stack.append(argument)
            elif opcode.name in _EMPTY:
                self.stack.append(_EMPTY[opcode.name]())
            elif opcode.name != "PROTO":
                raise _Refused(f"the opcode {opcode.name} has no place in it")
        raise _Refused("its pickle has no end")

    def _since_mark(self) -> list[Any]:
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def _global(self, name: str) -> None:
        allowed = name in MODULES or name in STORAGES or name in CONTAINERS or name in TENSORS
        if not allowed:
            raise _Refused(f"it names {clip(name, 80).replace(' ', '.')}, which may do anything")
        self.stack.append(_Name(name))

    def _mark(self, _: Any) -> None:
        self.marks.append(len(self.stack))

    def _binput(self, place: int) -> None:
        self.memo[place] = self.stack[-1]

    _long_binput = _binput

    def _binget(self, place: int) -> None:
        self.stack.append(self.memo[place])

    _long_binget = _binget

    def _tuple(self, _: Any) -> None:
        self.stack.append(tuple(self._since_mark()))

    def _tuple_of(self, count: int) -> None:
        values = tuple(self.stack[-count:])
        if len(values) < count:
            raise _Refused("its pickle takes values that are not there")
        del self.stack[-count:]
        self.stack.append(values)

    def _tuple1(self, _: Any) -> None:
        self._tuple_of(1)

    def _tuple2(self, _: Any) -> None:
        self._tuple_of(2)

    def _tuple3(self, _: Any) -> None:
        self._tuple_of(3)

    def _setitem(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._fill([key, value])

    def _setitems(self, _: Any) -> None:
        self._fill(self._since_mark())

    def _fill(self, pairs: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise _Refused("it sets an item of what is no dictionary")
        # A key made of tuples that share their parts would take for ever to hash.
        if not all(type(key) is str for key in pairs[::2]):
            raise _Refused("a dictionary has a key that is no text")
        target.update(zip(pairs[::2], pairs[1::2], strict=True))

    def _newobj(self, _: Any) -> None:
        arguments, of = self.stack.pop(), self.stack.pop()
        if not isinstance(of, _Name) or of.name not in MODULES or arguments != ():
            raise _Refused("it makes an object that is no layer")
        self.stack.append(_Module(of.name.split()[-1]))

    def _build(self, _: Any) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if not isinstance(target, _Module) or not isinstance(state, dict):
            raise _Refused("it sets the state of what is no layer")
        target.state = state

    def _binpersid(self, _: Any) -> None:
        match self.stack.pop():
            case ("storage", _Name(name), str(key), str(), int(numel)) if name in STORAGES:
                self.stack.append(_Storage(STORAGES[name], key, numel))
            case _:
                raise _Refused("it refers to what is no storage of fp32, fp64 or fp16")

    def _reduce(self, _: Any) -> None:
        arguments, of = self.stack.pop(), self.stack.pop()
        name = of.name if isinstance(of, _Name) else None
        match name, arguments:
            case "torch._utils _rebuild_parameter", (_Array() as tensor, bool(), dict()):
                self.stack.append(tensor)
            case (
                "torch._utils _rebuild_tensor_v2",
                (_Storage() as storage, int(offset), tuple(shape), tuple(stride), bool(), dict()),
            ):
                if not all(type(n) is int for n in (*shape, *stride)):
                    raise _Refused("a tensor's shape is no tuple of whole numbers")
                self.stack.append(_Array(storage, offset, shape, stride))
            case _ if name in CONTAINERS and arguments in ((), ([],)):
                self.stack.append(CONTAINERS[name]())
            case _:
                raise _Refused("it calls something that makes no tensor")


_PUSHED = ("BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1")
_EMPTY: dict[str, Callable[[], Any]] = {
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
}

"""How one weight matrix lies in memory: dense (fp32, bf16, fp16) or quantised codes (int8, int4).

A layout owns raw tensors and offers three things: rows expanded to a compute dtype, rows as fp32 on the grid of what
is stored, and writing fp32 rows back. optimum-quanto decides scales and codes (``AbsmaxOptimizer``, ``MaxOptimizer``,
its packing); its tensor subclasses are not kept, because in-place arithmetic on them is a silent no-op and their
sizes are those of the dense tensor.

Shapes: a matrix is (rows, cols) = (out_features, in_features). Rows are the unit of tiling.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from edgezo.machine import kernels
from edgezo.machine.limits import EXPAND_BYTES, MOST_CODE, QUANTISE_BYTES, int4_group, tiles
from edgezo.zo import noise
from edgezo.zo.axes import ROUNDINGS
from edgezo.zo.noise import Key

DENSE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# A row that has outgrown its scale is given a scale this much wider than it needs, so that it can grow a little more.
WIDER = 1 + 1 / 64

# Bits of a significand after the leading one, and the smallest positive number of a dtype.
_MANTISSA = {torch.bfloat16: 7, torch.float16: 10}
_SMALLEST_STEP = {torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}


class Rows(Protocol):
    """A matrix whose rows can be read: a tensor, or a matrix in a file."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, rows: slice, /) -> Tensor: ...


class Layout(Protocol):
    """One matrix as it is stored."""

    shape: tuple[int, int]

    def expand(self, rows: slice | Tensor, out: Tensor) -> Tensor:
        """Values of ``rows`` as the forward reads them, written to ``out`` (n, cols) of any float dtype."""
        ...

    def direct(self, dtype: torch.dtype) -> Tensor | None:
        """The stored tensor itself where it is (rows, cols) of ``dtype``, so that a forward can read it; else None."""
        ...

    def nbytes(self) -> int:
        """Bytes of the raw tensors in memory."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """The raw tensors by suffix of the matrix's name, for hashing and saving."""
        ...

    def adopt(self, tensors: dict[str, Tensor]) -> None:
        """Take these as the raw tensors (views of a slot, for instance), named as ``tensors`` names them."""
        ...


class TrainedLayout(Layout, Protocol):
    """A matrix that updates may change, some rows at a time."""

    def raw(self, rows: slice) -> dict[str, Tensor]:
        """These rows of ``tensors``."""
        ...

    def read(self, rows: slice | Tensor) -> Tensor:
        """The exact stored values of ``rows``, (n, cols) fp32, freshly owned."""
        ...

    def snap(self, values: Tensor, key: Key, tensor: int, rows: slice | Tensor) -> Tensor:
        """Round (n, cols) fp32 ``values`` to the grid of what is stored. They may be overwritten.

        ``key`` and ``tensor`` address the noise of a stochastic rounding (noise.py).
        """
        ...

    def write(self, rows: slice | Tensor, values: Tensor) -> None:
        """Store (n, cols) fp32 values that ``snap`` gave."""
        ...

    def as_read(self, rows: slice | Tensor, values: Tensor) -> Tensor:
        """(n, cols) fp32 ``values`` that ``snap`` gave for these rows, rounded as a forward reads them."""
        ...

    def grid_step(self, rows: slice | Tensor) -> Tensor | None:
        """(n, 1) fp32: the distance between two codes of each row; None where values are not codes."""
        ...


class Dense:
    """fp32, bf16 or fp16 values, optionally with a low-order plane of 8 more bits (design: storage and updates).

    With the plane a weight is ``high + low * ulp(high)/256``: the matrix product reads ``high`` (the weight rounded
    to nearest in its dtype), updates see a grid 256 times finer. Without it, updates round stochastically.
    """

    def __init__(self, values: Tensor, *, rounding: str | None = None):
        self.values = values
        self.shape = (values.shape[0], values.shape[1])
        self.rounding = None if values.dtype == torch.float32 else rounding
        self.low = None
        if self.rounding == "plane":
            self.low = torch.zeros(values.shape, dtype=torch.int8, device=values.device)

    def expand(self, rows: slice | Tensor, out: Tensor) -> Tensor:
        return out.copy_(self.values[rows])

    def direct(self, dtype: torch.dtype) -> Tensor | None:
        return self.values if self.values.dtype == dtype else None

    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        return {"": self.values} | ({".low": self.low} if self.low is not None else {})

    def adopt(self, tensors: dict[str, Tensor]) -> None:
        self.values, self.low = tensors[""], tensors.get(".low")

    def raw(self, rows: slice) -> dict[str, Tensor]:
        return {suffix: tensor[rows] for suffix, tensor in self.tensors().items()}

    def read(self, rows: slice | Tensor) -> Tensor:
        """The exact stored values of ``rows``, (n, cols) fp32, freshly owned."""
        stored = self.values[rows]
        if self.low is not None:
            values = torch.empty(stored.shape, dtype=torch.float32, device=stored.device)
            if kernels.read_plane(stored, self.low[rows], values):
                return values
        high = stored.to(torch.float32, copy=True)
        if self.low is not None:
            high.addcmul_(self.low[rows].float(), self._ulp(high), value=1 / 256)
        return high

    def snap(self, values: Tensor, key: Key, tensor: int, rows: slice | Tensor) -> Tensor:
        """Round (n, cols) fp32 ``values``: to the nearest on a plane's grid, else stochastically, without bias.

        They may be overwritten.
        """
        if self.values.dtype == torch.float32:
            return values
        if self.low is not None:
            if self.values.dtype is torch.bfloat16 and kernels.snap_plane(values):
                return values
            high = values.to(self.values.dtype).float()
            ulp = self._ulp(high)
            return high.addcmul_(self._low_codes(values, high, ulp), ulp, value=1 / 256)
        ulp = self._ulp(values)
        dither = noise.uniform(key, tensor, noise.ROUNDING, rows, self.shape[1], values.device)
        # Compared, not added: values / ulp + dither would round, and lift values that lie on the grid.
        steps = values / ulp
        below = torch.floor(steps)
        return below.add_(dither < steps.sub_(below)).mul_(ulp)

    def write(self, rows: slice | Tensor, values: Tensor) -> None:
        if self.low is not None and isinstance(rows, slice):  # numbers of rows would select a copy
            if kernels.write_plane(values, self.values[rows], self.low[rows]):
                return
        high = values.to(self.values.dtype)
        self.values[rows] = high
        if self.low is not None:
            wide = high.float()
            self.low[rows] = self._low_codes(values, wide, self._ulp(wide)).to(torch.int8)

    def as_read(self, rows: slice | Tensor, values: Tensor) -> Tensor:
        return values.to(self.values.dtype).float()

    def grid_step(self, rows: slice | Tensor) -> Tensor | None:
        return None

    def _ulp(self, values: Tensor) -> Tensor:
        """Distance of neighbouring numbers of the stored dtype at fp32 ``values``: 2**(exponent - mantissa bits)."""
        dtype = self.values.dtype
        binade = (values.view(torch.int32) & 0x7F800000).view(torch.float32)
        return binade.mul_(2.0 ** -_MANTISSA[dtype]).clamp_(min=_SMALLEST_STEP[dtype])

    @staticmethod
    def _low_codes(values: Tensor, high: Tensor, ulp: Tensor) -> Tensor:
        # At most 127 of 256ths: half an ulp would lie between two high parts and be read back from the other one.
        return values.sub(high).mul_(256).div_(ulp).round_().clamp_(-127, 127)


class Int8:
    """quanto qint8: codes (rows, cols) int8 and one fp32 scale a row, symmetric.

    Trained codes move on their grid: ``snap`` rounds stochastically to multiples of the row's scale. With a low-order
    plane of 8 more bits the weights lie on a grid 256 times finer, and the codes are the nearest to them: the forward
    sees rounded weights, and what rounding takes away is kept. Scales stay as they are until ``fill`` makes the codes
    anew; with a plane a row that outgrows its scale is given a wider one.
    """

    def __init__(self, codes: Tensor, scale: Tensor, low: Tensor | None = None):
        self.codes, self.scale = codes, scale  # (rows, cols) int8, (rows, 1) fp32
        self.low = low  # (rows, cols) int8
        self.shape = (codes.shape[0], codes.shape[1])

    @staticmethod
    def quantise(weight: Rows, *, plane: bool = False) -> Int8:
        """Codes, scales and, with ``plane``, the low-order plane of a matrix, made a tile at a time."""
        rows, cols = weight.shape
        low = torch.empty(rows, cols, dtype=torch.int8) if plane else None
        made = Int8(torch.empty(rows, cols, dtype=torch.int8), torch.empty(rows, 1), low)
        made.fill(weight)
        return made

    def fill(self, weight: Rows) -> None:
        """Make codes and scales anew, in place, from ``weight`` (rows, cols) on the same device."""
        from optimum.quanto import AbsmaxOptimizer, qint8

        optimizer = AbsmaxOptimizer()
        for tile in tiles(*self.shape, QUANTISE_BYTES):
            part = weight[tile].to(torch.float32, copy=True)
            scale = optimizer(part, qint8, 0).clamp_(min=torch.finfo(torch.float32).tiny)
            self.scale[tile] = scale
            self._store(tile, part.div_(scale))

    def _store(self, rows: slice | Tensor, steps: Tensor) -> None:
        """Store ``steps``, (n, cols) weights in units of their row's scale, which are overwritten."""
        if self.low is not None:
            self.low[rows] = _below(steps, steps.round().clamp_(-128, 127)).to(torch.int8)
        self.codes[rows] = steps.round_().clamp_(-128, 127).to(torch.int8)

    def expand(self, rows: slice | Tensor, out: Tensor) -> Tensor:
        if kernels.expand_int8(self.codes[rows], self.scale[rows], out):
            return out
        # Not torch.mul(codes, scale, out=out): that converts the codes into a temporary of their own first.
        codes, scale = self.codes[rows], self.scale[rows]
        for piece in tiles(len(out), self.shape[1], EXPAND_BYTES):
            out[piece].copy_(codes[piece]).mul_(scale[piece])
        return out

    def direct(self, dtype: torch.dtype) -> Tensor | None:
        return None

    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        raw = {"._data": self.codes, "._scale": self.scale}
        return raw | ({".low": self.low} if self.low is not None else {})

    def adopt(self, tensors: dict[str, Tensor]) -> None:
        self.codes, self.scale = tensors["._data"], tensors["._scale"]
        self.low = tensors.get(".low")

    def raw(self, rows: slice) -> dict[str, Tensor]:
        return {suffix: tensor[rows] for suffix, tensor in self.tensors().items()}

    def read(self, rows: slice | Tensor) -> Tensor:
        """The exact stored values of ``rows``, (n, cols) fp32, freshly owned."""
        steps = self.codes[rows].float()
        if self.low is not None:
            steps.add_(self.low[rows], alpha=1 / 256)
        return steps.mul_(self.scale[rows])

    def snap(self, values: Tensor, key: Key, tensor: int, rows: slice | Tensor) -> Tensor:
        """Round (n, cols) fp32 ``values``: to the nearest on a plane's grid, else stochastically to whole codes.

        Stochastic rounding has no bias, but for values past the ends of the range, which it stops at.
        """
        if self.low is not None:
            most = values.abs().amax(1, keepdim=True).div_(MOST_CODE)
            scale = self.scale[rows]
            self.scale[rows] = torch.where(
                most > scale * (1 + 0.49 / MOST_CODE), most * WIDER, scale
            )
        scale = self.scale[rows]
        steps = values / scale
        codes = steps.round().clamp_(-MOST_CODE, MOST_CODE)
        if self.low is not None:
            return codes.add_(_below(steps, codes), alpha=1 / 256).mul_(scale)
        # The remainder is measured from the grid as ``read`` gives it: it is 0 of a value that lies on the grid.
        remainder = values.sub(codes * scale).div_(scale)
        dither = noise.uniform(key, tensor, noise.ROUNDING, rows, self.shape[1], values.device)
        up = remainder.abs() > dither
        codes.add_(remainder.sign_().mul_(up)).clamp_(-MOST_CODE, MOST_CODE)
        return codes.mul_(scale)

    def write(self, rows: slice | Tensor, values: Tensor) -> None:
        self._store(rows, values / self.scale[rows])

    def as_read(self, rows: slice | Tensor, values: Tensor) -> Tensor:
        if self.low is None:
            return values
        return (values / self.scale[rows]).round_().mul_(self.scale[rows])

    def grid_step(self, rows: slice | Tensor) -> Tensor | None:
        return self.scale[rows]


def _below(steps: Tensor, codes: Tensor) -> Tensor:
    """The low-order plane: ``steps`` less their ``codes``, in 256ths, at most 127 of them.

    Half a step, 128 of them, would be read back from the neighbouring code.
    """
    return steps.sub(codes).mul_(256).round_().clamp_(-127, 127)


class Int4:
    """quanto qint4: value = scale*code - shift per group along a row, two codes a byte.

    As in quanto's ``PackedTensor``, byte k of the flat packed tensor holds element k of the flat matrix in its low
    nibble and element k + n/2 in its high nibble; so the low nibbles are the upper half of the rows.
    """

    def __init__(self, packed: Tensor, scale: Tensor, shift: Tensor):
        # (rows/2, cols) uint8, (rows, groups, 1) fp32, (rows, groups, 1) fp32
        self.packed, self.scale, self.shift = packed, scale, shift
        self.shape = (2 * packed.shape[0], packed.shape[1])

    @staticmethod
    def quantise(weight: Tensor) -> Int4:
        """Codes, scales and shifts of a matrix with an even number of rows, made a tile at a time."""
        from optimum.quanto import MaxOptimizer, qint4

        rows, cols = weight.shape
        size = int4_group(cols)
        groups, half = cols // size, rows // 2
        packed = torch.zeros(half, cols, dtype=torch.uint8)
        scale, shift = torch.empty(rows, groups, 1), torch.empty(rows, groups, 1)
        optimizer = MaxOptimizer()
        for start, nibble in ((0, 0), (half, 4)):
            for tile in tiles(half, cols, QUANTISE_BYTES):
                place = slice(start + tile.start, start + tile.stop)
                part = weight[place].to(torch.float32, copy=True).reshape(-1, size)
                # Not optimizer(...): its check of groups takes a lone group's columns for groups.
                s, z = optimizer.optimize(part, qint4, 0)
                s = s.clamp_(min=torch.finfo(torch.float32).tiny)  # a constant group has no range
                codes = part.add_(z).div_(s).round_().clamp_(0, 15).to(torch.uint8)
                packed[tile] |= codes.reshape(-1, cols) << nibble
                scale[place], shift[place] = s.view(-1, groups, 1), z.view(-1, groups, 1)
        return Int4(packed, scale, shift)

    def expand(self, rows: slice | Tensor, out: Tensor) -> Tensor:
        half = self.packed.shape[0]
        if isinstance(rows, Tensor):
            codes = self.packed[rows % half]
            codes = torch.where((rows < half)[:, None], codes & 15, codes >> 4)
            return self._dequantise(codes, rows, out)
        for start, stop, shift in ((0, half, 0), (half, 2 * half, 4)):
            a, b = max(rows.start, start), min(rows.stop, stop)
            if a < b:
                packed = self.packed[a - start : b - start]
                part = out[a - rows.start : b - rows.start]
                if kernels.expand_int4(packed, shift, self.scale[a:b], self.shift[a:b], part):
                    continue
                codes = packed >> 4 if shift else packed & 15
                self._dequantise(codes, slice(a, b), part)
        return out

    def _dequantise(self, codes: Tensor, rows: slice | Tensor, out: Tensor) -> Tensor:
        grouped = out.view(out.shape[0], self.scale.shape[1], -1)
        codes, scale, shift = codes.view_as(grouped), self.scale[rows], self.shift[rows]
        for piece in tiles(len(out), self.shape[1], EXPAND_BYTES):
            grouped[piece].copy_(codes[piece]).mul_(scale[piece]).sub_(shift[piece])
        return out

    def direct(self, dtype: torch.dtype) -> Tensor | None:
        return None

    def nbytes(self) -> int:
        return self.packed.nbytes + self.scale.nbytes + self.shift.nbytes

    def tensors(self) -> dict[str, Tensor]:
        return {"._data._data": self.packed, "._scale": self.scale, "._shift": self.shift}

    def adopt(self, tensors: dict[str, Tensor]) -> None:
        self.packed = tensors["._data._data"]
        self.scale, self.shift = tensors["._scale"], tensors["._shift"]


def place(
    weight: Tensor, precision: str, *, table: bool, rounding: str | None, trained: bool
) -> Layout:
    """Store one (rows, cols) matrix in ``precision``.

    ``table``: whether it is an embedding table. ``rounding`` (of updates) only matters where it is ``trained``.
    """
    match _stored_as(precision, weight.shape[0], table):
        case "int8":
            return Int8.quantise(weight, plane=trained and ROUNDINGS[rounding or ""].plane)
        case "int4":
            return Int4.quantise(weight)
        case dense:
            values = weight.to(DENSE_DTYPES[dense]).contiguous()
            return Dense(values, rounding=rounding if trained else None)


def moved(layout: Layout, device: torch.device) -> Layout:
    """Move the raw tensors of ``layout`` to ``device``; returns ``layout``."""
    layout.adopt({name: tensor.to(device) for name, tensor in layout.tensors().items()})
    return layout


def vacant(
    shape: tuple[int, int], precision: str, *, table: bool, rounding: str | None, trained: bool
) -> Layout:
    """The layout that ``place`` gives a matrix of this shape, without memory: all its tensors are on ``meta``."""
    rows, cols = shape

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    match _stored_as(precision, rows, table):
        case "int8":
            low = (
                empty(rows, cols, dtype=torch.int8)
                if trained and ROUNDINGS[rounding or ""].plane
                else None
            )
            return Int8(empty(rows, cols, dtype=torch.int8), empty(rows, 1), low)
        case "int4":
            groups = cols // int4_group(cols)
            packed = empty(rows // 2, cols, dtype=torch.uint8)
            return Int4(packed, empty(rows, groups, 1), empty(rows, groups, 1))
        case dense:
            values = empty(rows, cols, dtype=DENSE_DTYPES[dense])
            return Dense(values, rounding=rounding if trained else None)


def _stored_as(precision: str, rows: int, table: bool) -> str:
    """The precision that a matrix is really stored in: ``precision``, or int8 where int4 does not do.

    Embedding tables of int4 models are int8, since rows are gathered one by one and the head's logits are the most
    sensitive product. So are matrices with an odd number of rows, which quanto's packing cannot halve.
    """
    return "int8" if precision == "int4" and (table or rows % 2) else precision

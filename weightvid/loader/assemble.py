"""Decoded frames to tensors: cut the ribbon, dequantize, hash."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from weightvid import tile
from weightvid.container.exact import LEVEL_DTYPES, ExactItem, PlainLevels
from weightvid.container.records import (
    Escapes,
    Sidecar,
    TensorEnd,
    TensorStart,
)
from weightvid.dtypes import PACKABLE, from_float32, stored_dtype
from weightvid.errors import FormatError
from weightvid.quantize import Params, TrellisParams, dequantize
from weightvid.spec import TensorSpec
from weightvid.tile import ZERO_SAMPLE, FrameGeometry, Samples

Array = npt.NDArray[np.generic]
Levels = npt.NDArray[np.integer]

#: weights dequantized at a time; what stays in the second-level cache.
_BLOCK: int = 1 << 18


@dataclass(frozen=True, slots=True)
class Quantized:
    """A quantized tensor as it came out of the file.

    Attributes
    ----------
    spec : TensorSpec
    levels : ndarray of int8 (or int16, int32 for plain tensors), shape (R, C)
        Matrix of levels; where ``escapes`` lists one, a placeholder.
    escapes : Escapes
    params : Params
    sha256 : bytes
    sqnr_db : float or None
    """

    spec: TensorSpec
    levels: Levels
    escapes: Escapes
    params: Params
    sha256: bytes
    sqnr_db: float | None

    def true_levels(self) -> Levels:
        """Levels with the outliers in place, shape (R, C); int32 if there are any."""
        if not len(self.escapes.index):
            return self.levels
        wide = self.levels.astype(np.int32)
        wide.reshape(-1)[self.escapes.index] = self.escapes.level
        return wide

    def _blocks(self) -> Iterator[tuple[int, int, Levels]]:
        rows, columns = self.levels.shape
        step = max(1, _BLOCK // max(1, columns))
        whole = isinstance(self.params, TrellisParams) and self.params.axis == 0
        if whole:
            step = rows
        index, level = self.escapes.index, self.escapes.level
        for begin in range(0, rows, step):
            end = min(rows, begin + step)
            block = self.levels[begin:end]
            first, last = np.searchsorted(index, (begin * columns, end * columns))
            if first < last:
                block = block.astype(np.int32)
                block.reshape(-1)[index[first:last] - begin * columns] = level[first:last]
            yield begin, end, block

    def stored(self, check: bool = False) -> Array:
        """Dequantized elements in the tensor's own dtype and shape.

        Parameters
        ----------
        check : bool
            Compare with the tensor's SHA-256 as well.
        """
        dtype = stored_dtype(self.spec.dtype)
        out = np.empty(self.levels.shape, dtype)
        digest = hashlib.sha256()
        for begin, end, levels in self._blocks():
            out[begin:end] = from_float32(dequantize(levels, self.params), self.spec.dtype)
            if check:
                digest.update(out[begin:end].data)
        if check and digest.digest() != self.sha256:
            raise FormatError(
                f"tensor {self.spec.name!r} does not match its SHA-256",
                code="tensor-digest",
                tensor=self.spec.name,
            )
        return out.reshape(self.spec.shape)


@dataclass(slots=True)
class _Pending:
    """A tensor of which some frames have arrived."""

    start: TensorStart
    spec: TensorSpec
    column: int
    count: int
    pieces: list[Samples] = field(default_factory=list)
    have: int = 0


class Assembler:
    """Collects the pieces of tensors from frames.

    Parameters
    ----------
    tensors : sequence of TensorSpec
        All tensors of the archive; ids are places in it.
    geometry : FrameGeometry
    columns : mapping of int to int, or None
        First ribbon column of each wanted tensor, by id; others are ignored. None: every tensor
        is wanted, frames come from the first on, and the places follow from the order of starts.
    """

    def __init__(
        self,
        tensors: Sequence[TensorSpec],
        geometry: FrameGeometry,
        columns: Mapping[int, int] | None = None,
    ) -> None:
        self._tensors = tensors
        self._geometry = geometry
        self._columns = columns
        self._cursor = 0
        self._seen: set[int] = set()
        self._pending: dict[int, _Pending] = {}

    def add(self, sidecar: Sidecar, luma: Samples) -> Iterator[tuple[int, Quantized]]:
        """Take one frame; give every tensor that is complete with it, with its id."""
        for start in sidecar.starts:
            self._start(start, sidecar.frame)
        first = sidecar.frame * self._geometry.columns
        for entry in self._pending.values():
            begin = max(entry.column, first)
            end = min(entry.column + entry.count, first + self._geometry.columns)
            if end > begin:
                piece = np.empty((tile.BAND, end - begin), np.uint8)
                tile.copy_from_frame(luma, begin - first, piece, 0, end - begin)
                entry.pieces.append(piece)
                entry.have += end - begin
        for finish in sidecar.ends:
            if self._columns is None or finish.tensor in self._columns:
                yield finish.tensor, self._finish(finish)

    def _start(self, start: TensorStart, frame: int) -> None:
        spec = self._tensors[start.tensor]
        if spec.dtype not in PACKABLE or not spec.size or start.tensor in self._seen:
            raise FormatError(
                f"tensor {spec.name!r} cannot start here", code="order", tensor=spec.name
            )
        count = tile.ribbon_columns(*tile.matrix_shape(spec.shape))
        if self._columns is None:
            column = self._cursor
            self._cursor += count
        elif start.tensor in self._columns:
            column = self._columns[start.tensor]
        else:
            return
        if column // self._geometry.columns != frame:
            raise FormatError(
                f"tensor {spec.name!r} does not start in frame {frame}",
                code="order",
                tensor=spec.name,
            )
        self._seen.add(start.tensor)
        self._pending[start.tensor] = _Pending(start, spec, column, count)

    def _finish(self, finish: TensorEnd) -> Quantized:
        entry = self._pending.pop(finish.tensor, None)
        if entry is None or entry.have != entry.count:
            name = self._tensors[finish.tensor].name
            raise FormatError(f"tensor {name!r} ends too early", code="order", tensor=name)
        ribbon = entry.pieces[0] if len(entry.pieces) == 1 else np.hstack(entry.pieces)
        entry.pieces.clear()
        samples = tile.from_ribbon(ribbon, *tile.matrix_shape(entry.spec.shape))
        levels = np.bitwise_xor(samples, np.uint8(ZERO_SAMPLE), out=samples).view(np.int8)
        start = entry.start
        return Quantized(
            entry.spec, levels, start.escapes, start.params, finish.sha256, finish.sqnr_db
        )


class ExactAssembler:
    """Collects tensors from boxes of exact tensors, part by part."""

    def __init__(self, tensors: Sequence[TensorSpec]) -> None:
        self._tensors = tensors
        self._parts: dict[int, list[ExactItem]] = {}

    def add(self, item: ExactItem) -> tuple[int, Array | Quantized] | None:
        """Take one part; give the tensor if it is complete with it, with its id."""
        parts = self._parts.setdefault(item.tensor, [])
        have = parts[-1].first + parts[-1].count if parts else 0
        spec = self._tensors[item.tensor]
        if item.first != have or (parts and (item.plain is None) != (parts[0].plain is None)):
            raise FormatError(
                f"parts of tensor {spec.name!r} are out of order", code="order", tensor=spec.name
            )
        parts.append(item)
        if item.first + item.count < spec.size:
            return None
        del self._parts[item.tensor]
        data = parts[0].data if len(parts) == 1 else np.concatenate([p.data for p in parts])
        if item.plain is not None:
            return item.tensor, self._plain(spec, data, item.plain)
        return item.tensor, data.view(stored_dtype(spec.dtype)).reshape(spec.shape)

    @staticmethod
    def _plain(spec: TensorSpec, data: Samples, plain: PlainLevels) -> Quantized:
        if spec.dtype not in PACKABLE:
            raise FormatError(
                f"tensor {spec.name!r} of dtype {spec.dtype} cannot have levels",
                code="schema",
                tensor=spec.name,
            )
        stored: Levels = data.view(LEVEL_DTYPES[plain.dtype])
        levels = stored.reshape(tile.matrix_shape(spec.shape))
        none = Escapes(np.empty(0, np.int64), np.empty(0, np.int32))
        return Quantized(spec, levels, none, plain.params, plain.sha256, plain.sqnr_db)

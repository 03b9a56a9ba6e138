"""Decoded frames to tensors: cut the ribbon, dequantize, hash."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from weightvid import tile
from weightvid.beside import ALONE, Side
from weightvid.codec.form import Form
from weightvid.container.digits import DigitReader, Inflated
from weightvid.container.exact import LEVEL_DTYPES, ExactItem, PlainLevels
from weightvid.container.records import (
    NO_ESCAPES,
    Escapes,
    Sidecar,
    TensorEnd,
    TensorStart,
)
from weightvid.dtypes import PACKABLE, stored_dtype
from weightvid.errors import FormatError
from weightvid.loader.stream import (
    STREAMED_ELEMENTS,
    Dequantizer,
    Spill,
    StreamedExact,
    StreamedTensor,
    check_plain,
)
from weightvid.quantize import Params, TrellisParams
from weightvid.scratch import Scratch
from weightvid.spec import TensorSpec
from weightvid.tile import PLAIN, Fold, FrameGeometry, Samples
from weightvid.tile.fold import FOLDED_BITS, plain_levels
from weightvid.tile.layout import Segment, cut

Array = npt.NDArray[np.generic]
Levels = npt.NDArray[np.integer]

#: weights dequantized at a time; what stays in the second-level cache.
_BLOCK: int = 1 << 18
#: and at least, where a part is hashed while the next one is dequantized.
_LEAST_BLOCK: int = 1 << 15


@dataclass(frozen=True, slots=True)
class Quantized:
    """A quantized tensor as it came out of the file.

    Attributes
    ----------
    spec : TensorSpec
    levels : ndarray of int8, int16 or int32, shape (R, C)
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
        return self.escapes.placed_in(self.levels)

    def parts(self, check: bool = False) -> Iterator[Array]:
        """Stored elements of consecutive rows, shape (r, C).

        Parameters
        ----------
        check : bool
            Compare with the tensor's SHA-256 at the end.

        Raises
        ------
        FormatError
            ``tensor-digest``.
        """
        dequantizer = Dequantizer(self.spec, self.params, self.sha256 if check else None)
        for _, levels in self._blocks(_BLOCK):
            yield dequantizer.rows(levels)
        dequantizer.finish()

    def stored(self, check: bool = False, side: Side = ALONE) -> Array:
        """Dequantized elements in the tensor's own dtype and shape.

        Parameters
        ----------
        check : bool
            Compare with the tensor's SHA-256 as well.
        side : Side
            Hashes what has been dequantized, meanwhile.
        """
        out = np.empty(self.levels.shape, stored_dtype(self.spec.dtype))
        sha256 = self.sha256 if check else None
        dequantizer = Dequantizer(self.spec, self.params, sha256, side)
        share = _BLOCK if side.alone else min(_BLOCK, max(_LEAST_BLOCK, out.size // 4))
        for begin, levels in self._blocks(share):
            dequantizer.rows(levels, out[begin : begin + len(levels)])
        dequantizer.finish()
        return out.reshape(self.spec.shape)

    def _blocks(self, size: int) -> Iterator[tuple[int, Levels]]:
        """True levels of consecutive rows, about so many at a time, and their first row."""
        rows, columns = self.levels.shape
        step = max(1, size // max(1, columns))
        if isinstance(self.params, TrellisParams) and self.params.axis == 0:
            step = max(64, step)
        for begin in range(0, rows, step):
            block = self.levels[begin : begin + step]
            yield begin, self.escapes.placed_in(block, begin * columns)


@dataclass(slots=True)
class _Pending:
    """A tensor of which some frames have arrived."""

    start: TensorStart
    spec: TensorSpec
    column: int
    count: int
    segments: list[Segment]
    room: Scratch | None = None
    pieces: list[Levels] = field(default_factory=list)
    have: int = 0
    at: int = 0

    @property
    def end(self) -> int:
        return self.column + self.count

    def put(self, pieces: Iterator[Levels]) -> None:
        """Take the next levels of the sequence."""
        if self.room is None:
            self.pieces += pieces
            return
        for piece in pieces:
            data = piece.view(np.int8)
            self.room.write(self.at, data[: self.room.size - self.at])
            self.at += data.size


class Assembler:
    """Collects the pieces of tensors from frames.

    Parameters
    ----------
    tensors : sequence of TensorSpec
        All tensors of the archive; ids are places in it.
    form : Form
        Of the frames.
    columns : mapping of int to int, or None
        First ribbon column of every tensor on the ribbon, by id. None: frames come from the first
        on, and the places follow from the order of starts.
    wanted : set of int, or None
        Ids of the tensors to give; None: all.
    spill : Spill or None
        Large tensors may be held outside memory, and are given as StreamedTensor.
    """

    def __init__(
        self,
        tensors: Sequence[TensorSpec],
        form: Form,
        columns: Mapping[int, int] | None = None,
        wanted: frozenset[int] | None = None,
        spill: Spill | None = None,
    ) -> None:
        self._tensors = tensors
        self._bits = form.bits
        self._geometry = FrameGeometry(form.width, form.height)
        self._columns = columns
        self._wanted = wanted
        self._spill = spill
        self._dtype: np.dtype[Any] = np.dtype(np.int8 if form.bits == FOLDED_BITS else np.int16)
        self._cursor = 0
        self._seen: set[int] = set()
        self._pending: dict[int, _Pending] = {}

    @property
    def takes_all(self) -> bool:
        """Whether every tensor is wanted."""
        return self._wanted is None

    def add(
        self, sidecar: Sidecar, luma: Samples, inflated: Inflated | None = None
    ) -> Iterator[tuple[int, Quantized | StreamedTensor]]:
        """Take one frame; give every tensor that is complete with it, with its id.

        Parameters
        ----------
        sidecar : Sidecar
        luma : ndarray, shape (height, width)
        inflated : mapping, optional
            Digits of the frame that have been inflated already, or will be.
        """
        first = sidecar.frame * self._geometry.columns
        last = first + self._geometry.columns
        digits = DigitReader(sidecar.digits, luma.size, inflated)
        if not self._pending:
            digits.skip(sidecar.carried)
        for start in sidecar.starts:
            self._start(start, sidecar.frame)
        left = len(self._pending) if self._wanted is None else self._count_wanted()
        for number, entry in self._pending.items():
            if not left:
                break
            begin, end = max(entry.column, first), min(entry.end, last)
            if end <= begin:
                raise FormatError(
                    f"tensor {entry.spec.name!r} should have ended before frame {sidecar.frame}",
                    code="order",
                    tensor=entry.spec.name,
                )
            samples = tile.sequence_from_frame(luma, begin - first, end - begin)
            place = (begin - entry.column) * tile.BAND
            parts = cut(entry.segments, place, place + samples.size)
            if self._wanted is None or number in self._wanted:
                entry.put(self._levels(samples[a:b], fold, digits) for a, b, fold in parts)
                entry.have += end - begin
                left -= 1
            else:
                for a, b, fold in parts:
                    digits.pass_over(samples[a:b], fold)
            if entry.column < first:
                digits.check_carried(sidecar.carried)
        for finish in sidecar.ends:
            if self._wanted is None or finish.tensor in self._wanted:
                yield finish.tensor, self._finish(finish)
            else:
                self._pending.pop(finish.tensor, None)

    def _levels(self, samples: Samples, fold: Fold, digits: DigitReader) -> Levels:
        if self._bits > FOLDED_BITS:
            return plain_levels(samples, self._bits)
        return digits.unfold(samples, fold)

    def _count_wanted(self) -> int:
        return sum(1 for number in self._pending if number in (self._wanted or ()))

    def _start(self, start: TensorStart, frame: int) -> None:
        spec = self._tensors[start.tensor]
        if spec.dtype not in PACKABLE or not spec.size or start.tensor in self._seen:
            raise FormatError(
                f"tensor {spec.name!r} cannot start here", code="order", tensor=spec.name
            )
        shape = tile.matrix_shape(spec.shape)
        count = tile.ribbon_columns(*shape)
        column = self._cursor if self._columns is None else self._columns.get(start.tensor, -1)
        self._cursor += count
        if column // self._geometry.columns != frame:
            raise FormatError(
                f"tensor {spec.name!r} does not start in frame {frame}",
                code="order",
                tensor=spec.name,
            )
        if self._bits > FOLDED_BITS and any(fold != PLAIN for fold in start.layout.folds):
            raise FormatError(
                f"tensor {spec.name!r} is folded into samples of {self._bits} bits",
                code="schema",
                tensor=spec.name,
            )
        self._seen.add(start.tensor)
        segments = start.layout.segments(*shape)
        room = None
        wanted = self._wanted is None or start.tensor in self._wanted
        if self._spill is not None and wanted and spec.size > STREAMED_ELEMENTS:
            room = self._spill.room(spec.size * self._dtype.itemsize)
        self._pending[start.tensor] = _Pending(start, spec, column, count, segments, room)

    def _finish(self, finish: TensorEnd) -> Quantized | StreamedTensor:
        entry = self._pending.pop(finish.tensor, None)
        if entry is None or entry.have != entry.count:
            name = self._tensors[finish.tensor].name
            raise FormatError(f"tensor {name!r} ends too early", code="order", tensor=name)
        start = entry.start
        if entry.room is not None:
            return StreamedTensor(
                entry.spec, entry.room, start.layout, start.escapes, start.params, finish.sha256,
                self._dtype,
            )  # fmt: skip
        sequence = entry.pieces[0] if len(entry.pieces) == 1 else np.concatenate(entry.pieces)
        entry.pieces.clear()
        shape = tile.matrix_shape(entry.spec.shape)
        levels = tile.from_sequence(sequence, shape, start.layout.order)
        return Quantized(
            entry.spec, levels, start.escapes, start.params, finish.sha256, finish.sqnr_db
        )


class ExactAssembler:
    """Collects tensors from boxes of exact tensors, part by part.

    Parameters
    ----------
    tensors : sequence of TensorSpec
    spill : Spill or None
        Large tensors may be held outside memory, and are given as StreamedExact.
    """

    def __init__(self, tensors: Sequence[TensorSpec], spill: Spill | None = None) -> None:
        self._tensors = tensors
        self._spill = spill
        self._parts: dict[int, list[ExactItem]] = {}
        self._rooms: dict[int, Scratch] = {}

    def add(self, item: ExactItem) -> tuple[int, Array | Quantized | StreamedExact] | None:
        """Take one part; give the tensor if it is complete with it, with its id."""
        parts = self._parts.setdefault(item.tensor, [])
        have = parts[-1].first + parts[-1].count if parts else 0
        spec = self._tensors[item.tensor]
        if item.first != have or (parts and (item.plain is None) != (parts[0].plain is None)):
            raise FormatError(
                f"parts of tensor {spec.name!r} are out of order", code="order", tensor=spec.name
            )
        if self._spill is not None and spec.size > STREAMED_ELEMENTS:
            item = self._put(item, spec, self._spill, parts[0] if parts else item)
        parts.append(item)
        if item.first + item.count < spec.size:
            return None
        del self._parts[item.tensor]
        if item.plain is not None:
            check_plain(spec)
        room = self._rooms.pop(item.tensor, None)
        if room is not None:
            return item.tensor, StreamedExact(spec, room, parts[0].plain)
        data = parts[0].data if len(parts) == 1 else np.concatenate([p.data for p in parts])
        if item.plain is not None:
            return item.tensor, self._plain(spec, data, item.plain)
        return item.tensor, data.view(stored_dtype(spec.dtype)).reshape(spec.shape)

    def _put(self, item: ExactItem, spec: TensorSpec, spill: Spill, first: ExactItem) -> ExactItem:
        """Write a part's bytes to the tensor's room; what is left of it is its place."""
        plain, width = first.plain, stored_dtype(spec.dtype).itemsize
        if plain is not None:
            width = LEVEL_DTYPES[plain.dtype].itemsize
        if item.plain is not None and plain is not None and item.plain.dtype != plain.dtype:
            raise FormatError(
                f"parts of tensor {spec.name!r} have levels of two types",
                code="schema",
                tensor=spec.name,
            )
        if item.tensor not in self._rooms:
            self._rooms[item.tensor] = spill.room(spec.size * width)
        self._rooms[item.tensor].write(item.first * width, item.data)
        return replace(item, data=np.empty(0, np.uint8))

    @staticmethod
    def _plain(spec: TensorSpec, data: Samples, plain: PlainLevels) -> Quantized:
        stored: Levels = data.view(LEVEL_DTYPES[plain.dtype])
        levels = stored.reshape(tile.matrix_shape(spec.shape))
        return Quantized(spec, levels, NO_ESCAPES, plain.params, plain.sha256, plain.sqnr_db)

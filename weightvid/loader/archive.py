"""The archive as its users see it: names, one tensor, all in file order."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt

from weightvid import tile
from weightvid.container import reader
from weightvid.container.exact import parse_exact
from weightvid.container.reader import Fragment, Head, Source
from weightvid.container.records import Header, Index, Sidecar, StoredFile
from weightvid.container.sidecar import parse_sidecar
from weightvid.dtypes import to_float32
from weightvid.errors import FormatError, TensorNotFoundError, TruncatedError
from weightvid.loader.assemble import Array, Assembler, ExactAssembler, Quantized
from weightvid.loader.pipeline import Found, Pipeline
from weightvid.loader.stream import Spill, Streamed
from weightvid.quantize import Params
from weightvid.spec import TensorSpec


@dataclass(frozen=True, slots=True)
class Levels:
    """A quantized tensor for integer kernels.

    Attributes
    ----------
    levels : ndarray of int8, int16 or int32, of the tensor's shape
    params : Params
        The quantizer; for a uniform one without shifts, ``weight = level * params.step``.
    """

    levels: npt.NDArray[np.integer]
    params: Params


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What the archive says of one tensor without decoding it.

    Attributes
    ----------
    name : str
    dtype : str
        Element type as safetensors spells it.
    shape : tuple of int
    coding : str
        ``video``, ``plain`` (levels in an exact box) or ``exact``.
    alias_of : str or None
        The tensor whose storage this name shares.
    params : Params or None
        The quantizer; None for exact tensors.
    frames : range
        Frames on which the tensor lies.
    escapes : int
        Levels listed exactly beside the frames.
    sqnr_db : float or None
    sha256 : str
        First 16 bytes, in hex, of the SHA-256 of the dequantized elements; empty for exact
        tensors.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    coding: str
    alias_of: str | None = None
    params: Params | None = None
    frames: range = range(0)
    escapes: int = 0
    sqnr_db: float | None = None
    sha256: str = ""


def open_archive(
    source: str | os.PathLike[str] | BinaryIO, *, threads: int = 0, check_tensors: bool = False
) -> Archive:
    """Open an archive for reading.

    Parameters
    ----------
    source : path, address or binary file object
        An address is a str such as ``https://...``, ``s3://...`` or ``hf://...``; what reads it is
        imported then. A file object that cannot seek (a pipe, a download) can only be iterated
        over, once.
    threads : int
        Frames decoded at the same time; 0: one per core.
    check_tensors : bool
        Check the SHA-256 of every dequantized tensor too, and, when all of the file is read, the
        index. The SHA-256 of every frame with its sidecar, and of every box, is always checked.

    Raises
    ------
    FormatError
        The file is no archive, is damaged, or needs a newer reader; ``error.code`` says which.
    OSError
        The file cannot be opened; a :class:`~weightvid.errors.RemoteError` for an address.
    """
    if isinstance(source, (str, os.PathLike)):
        stream = _open(source)
        try:
            return Archive(stream, threads, check_tensors, owned=True)
        except BaseException:
            stream.close()
            raise
    return Archive(source, threads, check_tensors, owned=False)


def _open(source: str | os.PathLike[str]) -> BinaryIO:
    if isinstance(source, str) and "://" in source:
        from weightvid.remote import is_url, open_remote

        if is_url(source):
            return open_remote(source)
    return Path(source).open("rb")


class Archive:
    """An open archive; made by :func:`open_archive`. Not for use by two threads at once.

    Attributes
    ----------
    names : tuple of str
        All tensor names, aliases included, in the order of the source.
    complete : bool or None
        Whether the file has its index; None when that cannot be known yet (a pipe).
    """

    def __init__(self, stream: BinaryIO, threads: int, check_tensors: bool, owned: bool) -> None:
        self._stream = stream
        self._owned = owned
        self._threads = threads
        self._check = check_tensors
        self._source = Source(stream)
        self._random = self._source.seekable()
        self._used = False
        file_bytes = self._source.size() if self._random else 0
        if self._random:
            reader.prefetch_head(self._source, file_bytes)
        self._head: Head = reader.read_head(self._source)
        self._pipeline = Pipeline(self._head, threads, strict=check_tensors)
        self._index: Index | None = None
        self._columns: dict[int, int] = {}
        self.complete: bool | None = None
        if self._random:
            self._index = reader.read_tail_index(self._source, self._head, file_bytes)
            self.complete = self._index is not None
            if self._index is None:
                self._index = self._rebuild()
            self._columns = self._place(self._index)
        header = self._head.header
        self._ids = {spec.name: i for i, spec in enumerate(header.tensors)}
        self.names: tuple[str, ...] = (*self._ids, *header.aliases)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file, if it was opened here."""
        self._pipeline.close()
        if self._owned:
            self._stream.close()

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self._ids or name in self.header.aliases

    @property
    def header(self) -> Header:
        """The model header."""
        return self._head.header

    @property
    def files(self) -> tuple[StoredFile, ...]:
        """The model's side files (configuration, tokenizer, ...), as the header lists them."""
        return self.header.files

    def read_file(self, path: str) -> bytes:
        """One side file; reads its box alone. Needs a seekable file.

        Raises
        ------
        TensorNotFoundError
            The archive has no such file.
        FormatError
            ``not-seekable``; ``digest``, ``stream``, ``truncated``: damage.
        """
        self._need_index()
        offset = self._head.size
        for entry in self.files:
            if entry.path == path:
                self._source.seek(offset)
                return reader.read_file(self._source, entry)
            offset += entry.box_bytes
        raise TensorNotFoundError(f"the archive has no side file {path!r}")

    def read_files(self) -> Iterator[tuple[StoredFile, bytes]]:
        """All side files, in order; from a source that cannot seek, only before the tensors."""
        if self._random:
            self._source.seek(self._head.size)
        elif self._used:
            self._rewind()
        for entry in self.files:
            yield entry, reader.read_file(self._source, entry)

    @property
    def head_bytes(self) -> int:
        """Of what comes before side files and frames."""
        return self._head.size

    @property
    def track(self) -> Any:
        """The video track: frame size and configuration record."""
        return self._head.track

    @property
    def index(self) -> Index:
        """Where everything lies; rebuilt from what is there if the file is cut short."""
        return self._need_index()

    @property
    def sqnr_db(self) -> float | None:
        """Over all quantized tensors, where the archive says it (lossy ones do); else None."""
        return None if self._index is None else self._index.sqnr_db

    @property
    def bytes_read(self) -> int:
        """Bytes asked of the file so far."""
        return self._source.bytes_read

    @property
    def reads(self) -> int:
        """Range reads asked of the file so far."""
        return self._source.reads

    def _rebuild(self) -> Index:
        frames, exact, ribbon = [], [], []
        self._source.seek(self._head.size)
        try:
            for event in reader.read_events(self._source, self._head):
                if isinstance(event, Index):
                    self.complete = True  # only the MP4's own mfra is missing
                    return event
                if isinstance(event, Fragment):
                    frames.append(event.entry)
                    ribbon += [start.tensor for start in event.sidecar.starts]
                else:
                    exact.append(event.entry(self.header.tensors))
        except FormatError:
            pass
        return Index(tuple(ribbon), tuple(frames), tuple(exact))

    def _place(self, index: Index) -> dict[int, int]:
        specs = [self.header.tensors[i] for i in index.ribbon]
        edges = tile.starts(tile.matrix_shape(spec.shape) for spec in specs)
        capacity = len(index.frames) * self.header.geometry.columns
        if self.complete and edges[-1] > capacity:
            raise FormatError("the index lists more tensors than frames hold", code="index")
        return dict(zip(index.ribbon, edges, strict=False))

    def _need_index(self) -> Index:
        if self._index is None:
            raise FormatError(
                "this source cannot seek: iterate over the archive instead", code="not-seekable"
            )
        return self._index

    def _id(self, name: str) -> int:
        number = self._ids.get(self.header.aliases.get(name, name))
        if number is None:
            raise TensorNotFoundError(f"the archive has no tensor {name!r}")
        return number

    def spec(self, name: str) -> TensorSpec:
        """Name, dtype and shape of a tensor; an alias answers with its target."""
        return self.header.tensors[self._id(name)]

    def frames_of(self, name: str) -> range:
        """Numbers of the frames on which a tensor lies; empty for exact and plain ones."""
        number = self._id(name)
        column = self._columns.get(number)
        if column is None:
            return range(0)
        count = tile.ribbon_columns(*tile.matrix_shape(self.header.tensors[number].shape))
        each = self.header.geometry.columns
        return range(column // each, (column + count - 1) // each + 1)

    def tiles_of(self, name: str) -> list[tile.Tile]:
        """Rectangles on which a tensor lies, in samples; empty for exact and plain ones."""
        number = self._id(name)
        column = self._columns.get(number)
        if column is None:
            return []
        shape = tile.matrix_shape(self.header.tensors[number].shape)
        return tile.tiles(column, tile.ribbon_columns(*shape), self.header.geometry)

    def info(self, name: str) -> TensorInfo:
        """Shape, dtype, quantizer and place of a tensor; reads at most two sidecars."""
        number = self._id(name)
        index = self._need_index()
        spec = self.header.tensors[number]
        alias = self.header.aliases.get(name)
        frames = self.frames_of(name)
        if not frames:
            return self._info_boxed(name, number, alias)
        if frames[-1] >= len(index.frames):
            raise self._missing([number])
        first, last = self._sidecar(frames[0]), self._sidecar(frames[-1])
        start = next((s for s in first.starts if s.tensor == number), None)
        end = next((e for e in last.ends if e.tensor == number), None)
        if start is None or end is None:
            raise FormatError(f"the index misplaces tensor {name!r}", code="index", tensor=name)
        return TensorInfo(
            name=name, dtype=spec.dtype, shape=spec.shape, coding="video", alias_of=alias,
            params=start.params, frames=frames, escapes=len(start.escapes.index),
            sqnr_db=end.sqnr_db, sha256=end.sha256.hex(),
        )  # fmt: skip

    def _info_boxed(self, name: str, number: int, alias: str | None) -> TensorInfo:
        spec = self.header.tensors[number]
        for entry in self._need_index().exact:
            if number in entry.tensors:
                box = reader.read_exact(self._source, entry).box
                items = parse_exact(box.payload, self.header.tensors)
                plain = next(i for i in items if i.tensor == number).plain
                if plain is None:
                    return TensorInfo(name, spec.dtype, spec.shape, "exact", alias)
                return TensorInfo(
                    name, spec.dtype, spec.shape, "plain", alias, plain.params, range(0), 0,
                    plain.sqnr_db, plain.sha256.hex(),
                )  # fmt: skip
        raise self._missing([number])

    def _sidecar(self, number: int) -> Sidecar:
        entry = self._need_index().frames[number]
        self._source.seek(entry.offset)
        self._source.prefetch(entry.sidecar_bytes)
        box = reader.read_box(self._source)
        if box is None or box.size != entry.sidecar_bytes:
            raise FormatError("the index points to no sidecar", code="index", offset=entry.offset)
        return parse_sidecar(box.payload, self.header.tensors)

    def __getitem__(self, name: str) -> Array:
        """Dequantized tensor: BF16 comes as float32, float8 and complex32 as raw bits."""
        number = self._id(name)
        return self._natural(number, self._load(number).stored(self._check))

    def stored(self, name: str) -> Array:
        """Dequantized tensor in its own dtype; raw bits where numpy lacks the dtype."""
        return self._load(self._id(name)).stored(self._check)

    def levels(self, name: str) -> Levels:
        """Integer levels of a quantized tensor, without dequantizing.

        Raises
        ------
        TensorNotFoundError
            The tensor is stored exactly and has no levels.
        """
        found = self._load(self._id(name)).value
        if not isinstance(found, Quantized):
            raise TensorNotFoundError(f"tensor {name!r} is stored exactly and has no levels")
        return Levels(found.true_levels().reshape(found.spec.shape), found.params)

    def _natural(self, number: int, stored: Array) -> Array:
        if self.header.tensors[number].dtype == "BF16":
            return to_float32(stored, "BF16")
        return stored

    def _load(self, number: int) -> Found:
        if self._index is None and self._source.can_rewind():
            return self._load_streaming(number)
        index = self._need_index()
        name = self.header.tensors[number].name
        frames = self.frames_of(name)
        if not frames:
            return self._load_boxed(number)
        if frames[-1] >= len(index.frames):
            raise self._missing([number])
        assembler = Assembler(
            self.header.tensors, self.header.form, self._columns, frozenset({number})
        )
        events = self._fragments(frames)
        for found in self._pipeline.run(events, assembler):
            return found
        raise FormatError(f"tensor {name!r} never ends", code="index", tensor=name)

    def _load_streaming(self, number: int) -> Found:
        """From a server without ranges: read until the tensor has come, and no further."""
        for tensor, found in self._iterate():
            if tensor == number:
                return found
        raise self._missing([number])

    def _fragments(self, frames: range) -> Iterator[Fragment]:
        entries = [self._need_index().frames[number] for number in frames]
        if entries and entries[-1].end - entries[0].offset > reader.WINDOW_BYTES:
            self._source.seek(entries[0].offset)
            self._source.read_on(entries[-1].end)
        for number, entry in zip(frames, entries, strict=True):
            # One range read for all frames that lie together, in bounded windows.
            window_end = entry.end
            for later in entries[number - frames[0] + 1 :]:
                if later.offset != window_end or later.end - entry.offset > reader.WINDOW_BYTES:
                    break
                window_end = later.end
            self._source.seek(entry.offset)
            if not self._source.buffered(entry.end - entry.offset):
                self._source.prefetch(window_end - entry.offset)
            fragment = reader.read_fragment(self._source, entry, self._head)
            if fragment.sidecar.frame != number:
                raise FormatError(
                    f"the index points to frame {fragment.sidecar.frame} for frame {number}",
                    code="index",
                    offset=entry.offset,
                )
            yield fragment

    def _load_boxed(self, number: int) -> Found:
        assembler = ExactAssembler(self.header.tensors)
        for entry in self._need_index().exact:
            if number not in entry.tensors:
                continue
            box = reader.read_exact(self._source, entry).box
            for item in parse_exact(box.payload, self.header.tensors):
                if item.tensor == number and (done := assembler.add(item)):
                    return Found(*done)
        raise self._missing([number])

    def __iter__(self) -> Iterator[tuple[str, Array]]:
        """All tensors, in file order, as their frames arrive: pairs of name and array.

        Each alias follows its target, with the same array. A truncated file gives every tensor
        whose frames are whole, and then raises :class:`~weightvid.errors.TruncatedError`.
        """
        for number, found in self._iterate():
            array = self._natural(number, found.stored(self._check))
            yield from ((name, array) for name in self._names_of(number))

    def iter_stored(self) -> Iterator[tuple[TensorSpec, Array]]:
        """Distinct tensors in file order, in their own dtypes (see :meth:`stored`)."""
        for number, found in self._iterate():
            yield self.header.tensors[number], found.stored(self._check)

    def iter_quantized(self) -> Iterator[tuple[TensorSpec, Array | Quantized]]:
        """Distinct tensors in file order, before dequantization."""
        for number, found in self._iterate():
            if not isinstance(found.value, Streamed):  # never without a spill
                yield self.header.tensors[number], found.value

    def iter_parts(
        self, names: Iterable[str] | None = None, spill: Spill | None = None
    ) -> Iterator[tuple[TensorSpec, Iterator[Array]]]:
        """Distinct tensors in their own dtypes, each in parts, so that none need be in memory.

        Parameters
        ----------
        names : iterable of str, optional
            Only these, as in :meth:`iter_selected`; None: all, in file order.
        spill : Spill, optional
            Where the levels of tensors lie whose frames have not all arrived; None: in the
            system's folder for temporary files. Small ones stay in memory.

        Yields
        ------
        TensorSpec, iterator of ndarray
            Consecutive elements in row-major order, in parts of any shapes; valid until the next
            tensor is asked for. The hash of a tensor is checked after its last part.
        """
        room = spill or Spill()
        found = self._iterate(room) if names is None else self._selected(names, room)
        for number, tensor in found:
            yield self.header.tensors[number], tensor.parts(self._check)

    def iter_selected(self, names: Iterable[str]) -> Iterator[tuple[TensorSpec, Array]]:
        """Some distinct tensors in their own dtypes, from their own frames; needs a seekable file.

        Those on frames come first, in ribbon order. Tensors of a truncated file that are not
        whole are named in a TruncatedError at the end.
        """
        for number, found in self._selected(names):
            yield self.header.tensors[number], found.stored(self._check)

    def _selected(
        self, names: Iterable[str], spill: Spill | None = None
    ) -> Iterator[tuple[int, Found]]:
        index = self._need_index()
        wanted = {self._id(name) for name in names}
        spans = {n: self.frames_of(self.header.tensors[n].name) for n in index.ribbon}
        spans = {n: s for n, s in spans.items() if n in wanted and s[-1] < len(index.frames)}
        for run in _runs(sorted({frame for span in spans.values() for frame in span})):
            assembler = Assembler(
                self.header.tensors, self.header.form, self._columns, frozenset(spans), spill
            )
            for found in self._pipeline.run(self._fragments(run), assembler):
                wanted.discard(found.tensor)
                yield found.tensor, found
        parts = ExactAssembler(self.header.tensors, spill)
        for entry in index.exact:
            if not wanted.isdisjoint(entry.tensors):
                box = reader.read_exact(self._source, entry).box
                for item in parse_exact(box.payload, self.header.tensors):
                    if item.tensor in wanted and (done := parts.add(item)):
                        wanted.discard(done[0])
                        yield done[0], Found(*done)
        if wanted:
            raise self._missing(sorted(wanted))

    def frames(self, numbers: range) -> Iterator[tuple[Sidecar, tile.Samples]]:
        """Decode consecutive frames: each with its sidecar and its luma, shape (height, width).

        Samples are uint8, or uint16 where the track has more than 8 bits.

        The array is a view that is valid until the next frame is asked for.
        """
        count = len(self._need_index().frames)
        if numbers and not 0 <= numbers[0] <= numbers[-1] < count:
            raise TensorNotFoundError(f"the archive has frames 0 to {count - 1}")
        yield from self._pipeline.frames(self._fragments(numbers))

    def _names_of(self, number: int) -> list[str]:
        name = self.header.tensors[number].name
        return [name, *(a for a, target in self.header.aliases.items() if target == name)]

    def _iterate(self, spill: Spill | None = None) -> Iterator[tuple[int, Found]]:
        if self._random:
            self._source.seek(self._head.size)
            self._source.read_on()
        elif self._used:
            self._rewind()
        self._used = True
        left = dict.fromkeys(range(len(self.header.tensors)))
        assembler = Assembler(self.header.tensors, self.header.form, spill=spill)
        events = reader.read_events(self._source, self._head)
        try:
            for found in self._pipeline.run(events, assembler, spill):
                if found.tensor not in left:
                    name = self.header.tensors[found.tensor].name
                    raise FormatError(f"tensor {name!r} comes twice", code="order", tensor=name)
                del left[found.tensor]
                yield found.tensor, found
        except TruncatedError:
            raise self._missing(list(left)) from None
        if left:
            raise self._missing(list(left))

    def _rewind(self) -> None:
        if not self._source.can_rewind():
            raise FormatError("this source has been read and cannot seek", code="not-seekable")
        self._source.rewind()
        reader.read_head(self._source)

    def _missing(self, numbers: Iterable[int]) -> TruncatedError:
        names = tuple(self.header.tensors[n].name for n in numbers)
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        what = f"missing: {shown}" if names else "every tensor is there, but the index is not"
        return TruncatedError(
            f"the archive is incomplete; {what}", offset=self._source.position, missing=names
        )


def _runs(numbers: list[int]) -> Iterator[range]:
    """Ascending numbers as ranges without gaps."""
    begin = 0
    for end in range(1, len(numbers) + 1):
        if end == len(numbers) or numbers[end] != numbers[end - 1] + 1:
            yield range(numbers[begin], numbers[end - 1] + 1)
            begin = end

"""The archive as its users see it: names, one tensor, all in file order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

from weightvid import tile
from weightvid.closing import Closing
from weightvid.container import reader
from weightvid.container.reader import Head
from weightvid.container.records import Header, Index, Sidecar, StoredFile
from weightvid.container.source import Source
from weightvid.dtypes import to_float32
from weightvid.errors import FormatError, TensorNotFoundError, TruncatedError
from weightvid.loader.assemble import Array, Assembler, ExactAssembler, Quantized
from weightvid.loader.lookup import Lookup, rebuild, runs
from weightvid.loader.pipeline import Found, Pipeline
from weightvid.loader.records import Levels, TensorInfo
from weightvid.loader.stream import Spill, Streamed
from weightvid.spec import TensorSpec


class Archive(Closing):
    """An open archive; made by :func:`weightvid.loader.open_archive`.

    Not for use by two threads at once.

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
        self._lookup: Lookup | None = None
        self.complete: bool | None = None
        if self._random:
            index = reader.read_tail_index(self._source, self._head, file_bytes)
            self.complete = index is not None
            if index is None:
                index, self.complete = rebuild(self._source, self._head)
            self._lookup = Lookup(self._source, self._head, index, self.complete)
        header = self._head.header
        self._ids = {spec.name: i for i, spec in enumerate(header.tensors)}
        self.names: tuple[str, ...] = (*self._ids, *header.aliases)

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
        self._need_lookup()
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
        return self._need_lookup().index

    @property
    def sqnr_db(self) -> float | None:
        """Over all quantized tensors, where the archive says it (lossy ones do); else None."""
        return None if self._lookup is None else self._lookup.index.sqnr_db

    @property
    def bytes_read(self) -> int:
        """Bytes asked of the file so far."""
        return self._source.bytes_read

    @property
    def reads(self) -> int:
        """Range reads asked of the file so far."""
        return self._source.reads

    def _need_lookup(self) -> Lookup:
        if self._lookup is None:
            raise FormatError(
                "this source cannot seek: iterate over the archive instead", code="not-seekable"
            )
        return self._lookup

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
        return range(0) if self._lookup is None else self._lookup.frames_of(number)

    def tiles_of(self, name: str) -> list[tile.Tile]:
        """Rectangles on which a tensor lies, in samples; empty for exact and plain ones."""
        number = self._id(name)
        return [] if self._lookup is None else self._lookup.tiles_of(number)

    def info(self, name: str) -> TensorInfo:
        """Shape, dtype, quantizer and place of a tensor; reads at most two sidecars."""
        number = self._id(name)
        lookup = self._need_lookup()
        spec = self.header.tensors[number]
        alias = self.header.aliases.get(name)
        frames = lookup.frames_of(number)
        if not frames:
            return self._info_boxed(name, number, alias)
        if frames[-1] >= len(lookup.index.frames):
            raise self._missing([number])
        first, last = lookup.sidecar(frames[0]), lookup.sidecar(frames[-1])
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
        for item in self._need_lookup().items({number}):
            plain = item.plain
            if plain is None:
                return TensorInfo(name, spec.dtype, spec.shape, "exact", alias)
            return TensorInfo(
                name, spec.dtype, spec.shape, "plain", alias, plain.params, range(0), 0,
                plain.sqnr_db, plain.sha256.hex(),
            )  # fmt: skip
        raise self._missing([number])

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
        if self._lookup is None and self._source.can_rewind():
            return self._load_streaming(number)
        lookup = self._need_lookup()
        name = self.header.tensors[number].name
        frames = lookup.frames_of(number)
        if not frames:
            return self._load_boxed(number)
        if frames[-1] >= len(lookup.index.frames):
            raise self._missing([number])
        assembler = Assembler(
            self.header.tensors, self.header.form, lookup.columns, frozenset({number})
        )
        events = lookup.fragments(frames)
        for found in self._pipeline.run(events, assembler):
            return found
        raise FormatError(f"tensor {name!r} never ends", code="index", tensor=name)

    def _load_streaming(self, number: int) -> Found:
        """From a server without ranges: read until the tensor has come, and no further."""
        for tensor, found in self._iterate():
            if tensor == number:
                return found
        raise self._missing([number])

    def _load_boxed(self, number: int) -> Found:
        assembler = ExactAssembler(self.header.tensors)
        for item in self._need_lookup().items({number}):
            if done := assembler.add(item):
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
        lookup = self._need_lookup()
        index = lookup.index
        wanted = {self._id(name) for name in names}
        spans = {n: lookup.frames_of(n) for n in index.ribbon}
        spans = {n: s for n, s in spans.items() if n in wanted and s[-1] < len(index.frames)}
        for run in runs(sorted({frame for span in spans.values() for frame in span})):
            assembler = Assembler(
                self.header.tensors, self.header.form, lookup.columns, frozenset(spans), spill
            )
            for found in self._pipeline.run(lookup.fragments(run), assembler):
                wanted.discard(found.tensor)
                yield found.tensor, found
        parts = ExactAssembler(self.header.tensors, spill)
        for item in lookup.items(wanted):
            if done := parts.add(item):
                wanted.discard(done[0])
                yield done[0], Found(*done)
        if wanted:
            raise self._missing(sorted(wanted))

    def frames(self, numbers: range) -> Iterator[tuple[Sidecar, tile.Samples]]:
        """Decode consecutive frames: each with its sidecar and its luma, shape (height, width).

        Samples are uint8, or uint16 where the track has more than 8 bits.

        The array is a view that is valid until the next frame is asked for.
        """
        lookup = self._need_lookup()
        count = len(lookup.index.frames)
        if numbers and not 0 <= numbers[0] <= numbers[-1] < count:
            raise TensorNotFoundError(f"the archive has frames 0 to {count - 1}")
        yield from self._pipeline.frames(lookup.fragments(numbers))

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

"""What the index of an archive points to: places of tensors, and what is read from there."""

from __future__ import annotations

from collections.abc import Container, Iterator

from weightvid import tile
from weightvid.container import reader
from weightvid.container.exact import ExactItem, parse_exact
from weightvid.container.reader import Fragment, Head
from weightvid.container.records import Index, Sidecar
from weightvid.container.sidecar import parse_sidecar
from weightvid.container.source import Source
from weightvid.errors import FormatError


class Lookup:
    """An index, and the file that it is of.

    Parameters
    ----------
    source : Source
        Can seek.
    head : Head
    index : Index
    complete : bool
        Whether the index is the file's own.

    Attributes
    ----------
    index : Index
    columns : dict of int to int
        First ribbon column of every tensor on the ribbon, by id.

    Raises
    ------
    FormatError
        ``index``: the frames cannot hold the tensors.
    """

    def __init__(self, source: Source, head: Head, index: Index, complete: bool) -> None:
        self._source = source
        self._head = head
        self.index = index
        self.columns = self._place(complete)

    def _place(self, complete: bool) -> dict[int, int]:
        specs = [self._head.header.tensors[i] for i in self.index.ribbon]
        edges = tile.starts(tile.matrix_shape(spec.shape) for spec in specs)
        capacity = len(self.index.frames) * self._head.header.geometry.columns
        if complete and edges[-1] > capacity:
            raise FormatError("the index lists more tensors than frames hold", code="index")
        return dict(zip(self.index.ribbon, edges, strict=False))

    def frames_of(self, number: int) -> range:
        """Numbers of the frames on which a tensor lies; empty for exact and plain ones."""
        column = self.columns.get(number)
        if column is None:
            return range(0)
        count = tile.ribbon_columns(*tile.matrix_shape(self._head.header.tensors[number].shape))
        each = self._head.header.geometry.columns
        return range(column // each, (column + count - 1) // each + 1)

    def tiles_of(self, number: int) -> list[tile.Tile]:
        """Rectangles on which a tensor lies, in samples; empty for exact and plain ones."""
        column = self.columns.get(number)
        if column is None:
            return []
        header = self._head.header
        shape = tile.matrix_shape(header.tensors[number].shape)
        return tile.tiles(column, tile.ribbon_columns(*shape), header.geometry)

    def sidecar(self, number: int) -> Sidecar:
        """Sidecar of a frame; reads nothing else."""
        entry = self.index.frames[number]
        self._source.seek(entry.offset)
        self._source.prefetch(entry.sidecar_bytes)
        box = reader.read_box(self._source)
        if box is None or box.size != entry.sidecar_bytes:
            raise FormatError("the index points to no sidecar", code="index", offset=entry.offset)
        return parse_sidecar(box.payload, self._head.header.tensors)

    def fragments(self, frames: range) -> Iterator[Fragment]:
        """Consecutive frames, in few reads."""
        entries = [self.index.frames[number] for number in frames]
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

    def items(self, numbers: Container[int]) -> Iterator[ExactItem]:
        """Parts of tensors that lie in boxes, in file order; other boxes are not read."""
        tensors = self._head.header.tensors
        for entry in self.index.exact:
            if any(number in numbers for number in entry.tensors):
                box = reader.read_exact(self._source, entry).box
                yield from (i for i in parse_exact(box.payload, tensors) if i.tensor in numbers)


def rebuild(source: Source, head: Head) -> tuple[Index, bool]:
    """Index of a file that does not end in one, from what is there; and whether it is whole."""
    frames, exact, ribbon = [], [], []
    source.seek(head.size)
    try:
        for event in reader.read_events(source, head):
            if isinstance(event, Index):
                return event, True  # only the MP4's own mfra is missing
            if isinstance(event, Fragment):
                frames.append(event.entry)
                ribbon += [start.tensor for start in event.sidecar.starts]
            else:
                exact.append(event.entry(head.header.tensors))
    except FormatError:
        pass
    return Index(tuple(ribbon), tuple(frames), tuple(exact)), False


def runs(numbers: list[int]) -> Iterator[range]:
    """Ascending numbers as ranges without gaps."""
    begin = 0
    for end in range(1, len(numbers) + 1):
        if end == len(numbers) or numbers[end] != numbers[end - 1] + 1:
            yield range(numbers[begin], numbers[end - 1] + 1)
            begin = end

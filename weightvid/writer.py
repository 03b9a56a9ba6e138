"""The archive as a stream of boxes, in constant memory."""

from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO, Final

import numpy as np

from weightvid import container, loader
from weightvid.container import box, close_body, record, record_list, uint
from weightvid.exact import ahead, exact_records, float_records, likeness
from weightvid.loader import Array, Header, Sidecar, Track
from weightvid.spec import SideFile

#: elements of exact tensors that one box holds, in bytes.
EXACT_BOX_BYTES: Final = 8 << 20
#: so many tensors of so many bytes are enough for a box: who reads one of them reads all.
_ENOUGH_TENSORS, _ENOUGH_BYTES = 16, 1 << 16


class ArchiveWriter:
    """Writes an archive front to back, in constant memory.

    The ``files`` of the header that is given are not looked at. ``frames`` are the bytes of each
    frame so far; ``packet_bytes``, ``largest_packet`` and ``first_packet`` are of those, too.
    ``heads`` are the first bytes of the SHA-256 of each tensor: whoever adds to a base says what
    exact tensors become, and those that stay as they are.
    """

    def __init__(
        self, file: BinaryIO, track: Track, header: Header, files: Sequence[SideFile] = ()
    ) -> None:
        self._file, self.track, self._header = file, track, header
        self._at = 0
        self.frames: list[int] = []
        self._moofs: list[int] = []
        self._firsts: dict[int, int] = {}
        self._spans: list[tuple[int, range]] = []
        self._stages: list[tuple[int, int]] = []
        self.heads: dict[int, bytes] = {}
        self._boxes: list[tuple[int, tuple[int, ...]]] = []
        self.packet_bytes = self.largest_packet = self.first_packet = 0
        made = [box(loader.FILE_UUID, close_body(entry.data)) for entry in files]
        sizes = [(entry, len(data)) for entry, data in zip(files, made, strict=True)]
        head = box(loader.HEADER_UUID, close_body(*container.header_records(header, sizes)))
        self._write(container.ftyp(), container.moov(track), head, *made)

    def _write(self, *parts: bytes) -> int:
        size = sum(map(len, parts))
        for part in parts:
            self._file.write(part)
        self._at += size
        return size

    def add_frame(self, sidecar: Sidecar, packet: bytes) -> None:
        """Write one frame and what is said before it."""
        side = box(loader.FRAME_UUID, close_body(*container.sidecar_records(sidecar)))
        self._moofs.append(self._at + len(side))
        head = container.moof(sidecar.frame, len(packet))
        self.frames.append(self._write(side, head, box(b"mdat", packet)))
        for part in sidecar.parts:
            self._firsts.setdefault(part.tensor, sidecar.frame)
        for end in sidecar.ends:
            first = self._firsts.pop(end.tensor)
            self._spans.append((end.tensor, range(first, sidecar.frame + 1)))
            self.heads[end.tensor] = end.sha256
        if not sidecar.frame:
            self.first_packet = len(packet)
        self.packet_bytes += len(packet)
        self.largest_packet = max(self.largest_packet, len(packet))

    def add_exact(self, tensors: Iterable[tuple[int, Array]], lossless: bool = False) -> None:
        """Write exact tensors, numbers and stored elements, into as many boxes as they need.

        ``lossless`` saves time: floats are not tried as plain bytes, too.
        """

        def make(items: Sequence[tuple[int, int, Array]]) -> bytes:
            specs, bodies = self._header.tensors, list[bytes]()
            floats = specs[items[0][0]].dtype in loader.MANTISSAS
            if floats:
                bodies.append(container.stored_body(*float_records(items, specs)))
            if not (floats and lossless):
                bodies.append(close_body(*exact_records(items, specs)))
            return box(loader.EXACT_UUID, min(bodies, key=len))

        for items, made in ahead(make, self._batches(tensors)):
            numbers = tuple(dict.fromkeys(number for number, _, _ in items))
            self._boxes.append((self._write(made.result()), numbers))

    def _batches(
        self, tensors: Iterable[tuple[int, Array]]
    ) -> Iterator[list[tuple[int, int, Array]]]:
        """Items of a box each, which are alike."""
        items: list[tuple[int, int, Array]] = []
        room, kind = EXACT_BOX_BYTES, ("", False)
        for number, array in tensors:
            flat, first = np.ascontiguousarray(array).reshape(-1), 0
            self.heads[number] = loader.tensor_sha256(flat)[: loader.TENSOR_SHA_BYTES]
            now = likeness(self._header.tensors[number])[:2]
            enough = EXACT_BOX_BYTES - room >= _ENOUGH_BYTES and len(items) >= _ENOUGH_TENSORS
            if items and (now != kind or enough):
                yield items
                items, room = [], EXACT_BOX_BYTES
            kind = now
            while first < flat.size or not flat.size:
                count = max(1, min(flat.size - first, room // max(1, flat.itemsize)))
                piece = flat[first : first + count]
                items.append((number, first, piece))
                room -= piece.nbytes
                first += count
                if room < 16:
                    yield items
                    items, room = [], EXACT_BOX_BYTES
                if not flat.size:
                    break
        if items:
            yield items

    def end_layer(self) -> None:
        """What follows belongs to the next layer."""
        frames, boxes = (sum(counts) for counts in zip((0, 0), *self._stages, strict=True))
        self._stages.append((len(self.frames) - frames, len(self._boxes) - boxes))

    def finish(self) -> int:
        """Write the index; returns the size of the file."""
        spans, before = [], 0
        for number, frames in sorted(self._spans, key=lambda entry: entry[1].start):
            spans.append(uint(number) + uint(frames.start - before) + uint(len(frames)))
            before = frames.start
        boxes = [
            uint(size) + uint(len(numbers)) + b"".join(map(uint, numbers))
            for size, numbers in self._boxes
        ]
        stages = []
        if self._header.layers is not None and self._header.layers.total > 1:
            self.end_layer()
            stages = [uint(frames) + uint(count) for frames, count in self._stages]
        roots = []
        if len(self.heads) == len(self._header.tensors):
            roots = [record(loader.ROOT, container.root_of(self._header.tensors, self.heads))]
        body = close_body(
            record_list(loader.FRAMES, list(map(uint, self.frames))),
            record_list(loader.SPANS, spans),
            record_list(loader.BOXES, boxes),
            record_list(loader.STAGES, stages),
            *roots,
        )
        self._write(container.tail_box(loader.INDEX_UUID, body), container.mfra(self._moofs))
        return self._at

    def replace_record(self, record: bytes) -> None:
        """Put another configuration record of the same size into ``moov`` of a seekable file."""
        place = (container.ftyp() + container.moov(self.track)).index(self.track.record)
        self._file.seek(place)
        self._file.write(record)
        self._file.seek(self._at)

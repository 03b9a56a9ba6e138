"""Writing an archive as a stream: no byte is ever revisited."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO

from weightvid.codec.tracks import TRACKS
from weightvid.container import boxes, mp4
from weightvid.container.manifest import header_payload, index_payload
from weightvid.container.records import ExactEntry, FrameEntry, Header, Index
from weightvid.errors import FormatError


@dataclass(frozen=True, slots=True)
class CodedFrame:
    """A frame, ready to be written.

    Attributes
    ----------
    number : int
    sidecar : bytes
        Payload of its sidecar box.
    packet : bytes
    starts : tuple of int
        Ids of the tensors that start in it.
    digit_bytes : int
        Of the digits in the sidecar.
    """

    number: int
    sidecar: bytes
    packet: bytes
    starts: tuple[int, ...]
    digit_bytes: int


class ArchiveWriter:
    """Writes ftyp, moov and the header at once, then frames and exact boxes, then the index.

    Parameters
    ----------
    stream : binary file object
        Written in order; need not seek.
    header : Header
    record : bytes
        The track's configuration record.
    files : sequence of bytes
        Boxes of the side files that the header lists.

    Attributes
    ----------
    digit_bytes : int
        Of the digits beside the frames written so far.
    """

    def __init__(
        self, stream: BinaryIO, header: Header, record: bytes, files: Sequence[bytes] = ()
    ) -> None:
        self._stream = stream
        self._at = 0
        self._ribbon: list[int] = []
        self._frames: list[FrameEntry] = []
        self._exact: list[ExactEntry] = []
        self.digit_bytes = 0
        form = header.form
        track = mp4.Track.of(TRACKS[header.codec], form.width, form.height, record)
        self._write(mp4.ftyp())
        self._write(mp4.moov(track))
        self._write(boxes.uuid_box(boxes.HEADER_UUID, header_payload(header)))
        if [len(box) for box in files] != [entry.box_bytes for entry in header.files]:
            raise FormatError("the header lists other side files than are written", code="order")
        for box in files:
            self._write(box)

    #: bytes of moof and of mdat's header, beside the packet of each frame.
    fragment_overhead = mp4.MOOF_BYTES + boxes.BOX_HEADER_BYTES

    @property
    def position(self) -> int:
        """Bytes written so far."""
        return self._at

    def _write(self, data: bytes) -> int:
        self._stream.write(data)
        self._at += len(data)
        return len(data)

    def write_frame(self, frame: CodedFrame) -> None:
        """Add a frame."""
        number = len(self._frames)
        if frame.number != number:
            raise FormatError(f"frame {frame.number} written as number {number}", code="order")
        offset = self._at
        sidecar_bytes = self._write(boxes.uuid_box(boxes.SIDECAR_UUID, frame.sidecar))
        fragment = self._write(mp4.moof(number, len(frame.packet)))
        fragment += self._write(boxes.box(b"mdat", frame.packet))
        self._frames.append(FrameEntry(offset, sidecar_bytes, fragment))
        self.digit_bytes += frame.digit_bytes
        self._ribbon += frame.starts

    def write_exact(self, payload: bytes, tensors: Sequence[int]) -> None:
        """Add a box of exact tensors: its payload, and the ids of those with a part in it."""
        offset = self._at
        size = self._write(boxes.uuid_box(boxes.EXACT_UUID, payload))
        self._exact.append(ExactEntry(offset, size, tuple(tensors)))

    def finish(self, sqnr_db: float | None = None) -> Index:
        """Write the index and the MP4's own random-access box; returns the index.

        Parameters
        ----------
        sqnr_db : float or None
            Over all quantized tensors, if the index is to say it.
        """
        index = Index(tuple(self._ribbon), tuple(self._frames), tuple(self._exact), sqnr_db)
        self._write(boxes.uuid_box(boxes.INDEX_UUID, index_payload(index)))
        self._write(mp4.mfra([entry.offset + entry.sidecar_bytes for entry in index.frames]))
        self._stream.flush()
        return index

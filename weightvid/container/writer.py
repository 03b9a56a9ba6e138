"""Writing an archive as a stream: no byte is ever revisited."""

from __future__ import annotations

from collections.abc import Sequence
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from weightvid.container import boxes, mp4
from weightvid.container.exact import ExactItem, exact_payload
from weightvid.container.manifest import header_payload, index_payload
from weightvid.container.records import ExactEntry, FrameEntry, Header, Index, Sidecar
from weightvid.container.sidecar import sidecar_payload
from weightvid.errors import FormatError


class ArchiveWriter:
    """Writes ftyp, moov and the header at once, then frames and exact boxes, then the index.

    Parameters
    ----------
    stream : binary file object
        Written in order; need not seek.
    header : Header
    hvcc : bytes
        The track's decoder configuration record.
    files : sequence of bytes
        Boxes of the side files that the header lists.

    Attributes
    ----------
    digit_bytes : int
        Of the digits beside the frames written so far.
    """

    def __init__(
        self, stream: BinaryIO, header: Header, hvcc: bytes, files: Sequence[bytes] = ()
    ) -> None:
        self._stream = stream
        self._tensors = header.tensors
        self._at = 0
        self._ribbon: list[int] = []
        self._frames: list[FrameEntry] = []
        self._exact: list[ExactEntry] = []
        self.digit_bytes = 0
        track = mp4.Track(header.geometry.width, header.geometry.height, hvcc)
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

    def write_frame(self, sidecar: Sidecar, luma: npt.NDArray[np.uint8], packet: bytes) -> None:
        """Add a frame: its sidecar, and the packet that decodes to ``luma``."""
        number = len(self._frames)
        if sidecar.frame != number:
            raise FormatError(f"frame {sidecar.frame} written as number {number}", code="order")
        offset = self._at
        payload = sidecar_payload(sidecar, luma)
        sidecar_bytes = self._write(boxes.uuid_box(boxes.SIDECAR_UUID, payload))
        fragment = self._write(mp4.moof(number, len(packet)))
        fragment += self._write(boxes.box(b"mdat", packet))
        self._frames.append(FrameEntry(offset, sidecar_bytes, fragment))
        self.digit_bytes += sum(map(len, sidecar.digits.values()))
        self._ribbon += [start.tensor for start in sidecar.starts]

    def write_exact(self, items: Sequence[ExactItem]) -> None:
        """Add a box of exact tensors."""
        offset = self._at
        size = self._write(boxes.uuid_box(boxes.EXACT_UUID, exact_payload(items, self._tensors)))
        self._exact.append(ExactEntry(offset, size, tuple(item.tensor for item in items)))

    def finish(self) -> Index:
        """Write the index and the MP4's own random-access box; returns the index."""
        index = Index(tuple(self._ribbon), tuple(self._frames), tuple(self._exact))
        self._write(boxes.uuid_box(boxes.INDEX_UUID, index_payload(index)))
        self._write(mp4.mfra([entry.offset + entry.sidecar_bytes for entry in index.frames]))
        self._stream.flush()
        return index

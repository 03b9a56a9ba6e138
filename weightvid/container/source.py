"""The file that an archive is read from."""

from __future__ import annotations

from typing import BinaryIO, Final

_CHUNK: Final = 1 << 20


class Source:
    """A binary file object that counts what is read and never returns less than asked for.

    Attributes
    ----------
    position : int
        Offset of the next byte that :meth:`read` gives.
    bytes_read, reads : int
        What was really asked of the file so far.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        # Files elsewhere take one request for each read, and know how long they are.
        self._chunk = int(getattr(stream, "chunk_bytes", _CHUNK))
        self._at = 0
        self._buffer = b""
        self._buffer_at = 0
        self.position = 0
        self.bytes_read = 0
        self.reads = 0

    def seekable(self) -> bool:
        """Whether random access is possible."""
        seekable = getattr(self._stream, "seekable", None)
        return bool(seekable and seekable())

    def size(self) -> int:
        """File size in bytes; the file must be seekable."""
        self._at = self._stream.seek(0, 2)
        return self._at

    def seek(self, offset: int) -> None:
        """Go to an absolute offset."""
        self.position = offset

    def read_on(self, end: int | None = None) -> None:
        """Tell a file elsewhere that all from here (to ``end``) will be read, in order."""
        hint = getattr(self._stream, "read_on", None)
        if hint is not None:
            end = self._buffer_at + len(self._buffer)
            self._at = self._stream.seek(end if self.buffered(1) else self.position)
            hint(end)

    def can_rewind(self) -> bool:
        """Whether a file that cannot seek can be asked for once more."""
        return hasattr(self._stream, "rewind")

    def rewind(self) -> None:
        """Go back to the beginning of such a file."""
        self._stream.rewind()  # type: ignore[attr-defined]
        self._at = self.position = self._buffer_at = 0
        self._buffer = b""

    def buffered(self, size: int) -> bool:
        """Whether the next ``size`` bytes are here already."""
        end = self._buffer_at + len(self._buffer)
        return self._buffer_at <= self.position and self.position + size <= end

    def prefetch(self, size: int) -> None:
        """Ask the file for the next ``size`` bytes at once, unless they are here already."""
        if not self.buffered(size):
            at = self.position
            data = self._fetch(size)
            self._buffer, self._buffer_at, self.position = data, at, at

    def read(self, size: int) -> bytes:
        """Exactly ``size`` bytes, allocated as they arrive; fewer only at the end of the file."""
        begin = self.position - self._buffer_at
        if 0 <= begin < len(self._buffer):
            found = self._buffer[begin : begin + size]
            self.position += len(found)
            if len(found) == size:
                return found
            return found + self._fetch(size - len(found))
        return self._fetch(size)

    def _fetch(self, size: int) -> bytes:
        if self._at != self.position:
            self._stream.seek(self.position)
            self._at = self.position
        parts, left = [], size
        while left:
            data = self._stream.read(min(left, self._chunk))
            if not data:
                break
            parts.append(data)
            left -= len(data)
        found = parts[0] if len(parts) == 1 else b"".join(parts)
        self._at += len(found)
        self.position = self._at
        self.bytes_read += len(found)
        self.reads += 1
        return found

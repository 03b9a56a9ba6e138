"""Weights elsewhere that are read as they are needed, and kept here for the next time.

A safetensors file says at its beginning where each tensor lies, so nothing need be brought that is
not read: each worker of a cluster gets its own tensors. What has been read stays in a sparse file
on this machine, because packing reads every tensor at least twice; without room for the whole file
it is asked for again.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from weightvid.errors import CheckpointError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_PIECE_BYTES: Final = 8 << 20
_HEADER_LIMIT_BYTES: Final = 100_000_000


class MirrorFile(io.RawIOBase):
    """A file elsewhere, and what has been read of it.

    Parameters
    ----------
    remote : binary file object
        Can seek.
    local : Path
        Made here, of the same size.
    keep : bool
        Write there what is read.

    Attributes
    ----------
    local : Path
    """

    def __init__(self, remote: BinaryIO, local: Path, *, keep: bool) -> None:
        super().__init__()
        self.local = local
        self._remote = remote
        self._keep = keep
        self._size = remote.seek(0, io.SEEK_END)
        self._at = 0
        self._have: list[tuple[int, int]] = []
        self._file = local.open("wb+")
        try:
            self._file.truncate(self._size)
            self._bring_header()
        except BaseException:
            self.close()
            raise

    def _bring_header(self) -> None:
        """The beginning of the local file is what the safetensors library will look at."""
        self._fetch(0, min(8, self._size))
        self._file.seek(0)
        length = int.from_bytes(self._file.read(8), "little")
        if length <= min(_HEADER_LIMIT_BYTES, self._size):
            self._fetch(8, min(8 + length, self._size))
        self._file.flush()

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """Offset of the next byte."""
        return self._at

    def seek(self, offset: int, whence: int = 0, /) -> int:
        """Go to an offset."""
        self._at = max(0, (0, self._at, self._size)[whence] + offset)
        return self._at

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Fill a buffer as far as the file goes; asks for what is not here yet."""
        view = memoryview(buffer).cast("B")
        end = min(self._size, self._at + len(view))
        here = self._covered(self._at, end)
        if not here and self._keep:
            for begin, stop in self._gaps(self._at, end):
                self._fetch(begin, stop)
            here = True
        if here:
            self._file.seek(self._at)
            done = _fill(self._file, view[: max(0, end - self._at)])
        else:
            self._remote.seek(self._at)
            _read_on(self._remote, end)
            done = _fill(self._remote, view[: max(0, end - self._at)])
        self._at += done
        return done

    def _covered(self, begin: int, end: int) -> bool:
        return not self._gaps(begin, end)

    def _gaps(self, begin: int, end: int) -> list[tuple[int, int]]:
        gaps = []
        for start, stop in self._have:
            if stop <= begin:
                continue
            if start >= end:
                break
            if begin < start:
                gaps.append((begin, start))
            begin = stop
        return [*gaps, (begin, end)] if begin < end else gaps

    def _fetch(self, begin: int, end: int) -> None:
        if begin >= end:
            return
        self._remote.seek(begin)
        _read_on(self._remote, end)
        at = begin
        while at < end and (data := self._remote.read(min(end - at, _PIECE_BYTES))):
            try:
                self._file.seek(at)
                self._file.write(data)
            except OSError as error:
                raise CheckpointError(
                    f"cannot keep weights in {self.local.parent.parent}: "
                    f"{error.strerror or error}; set TMPDIR to a folder on a larger disk"
                ) from None
            at += len(data)
        self._add(begin, at)

    def _add(self, begin: int, end: int) -> None:
        merged: list[tuple[int, int]] = []
        for start, stop in sorted([*self._have, (begin, end)]):
            if merged and start <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
            else:
                merged.append((start, stop))
        self._have = merged

    def stop(self) -> None:
        """End what another thread reads, with an error there."""
        stop = getattr(self._remote, "stop", None)
        if stop is not None:
            stop()

    def close(self) -> None:
        """Let go of both files."""
        if not self.closed:
            self._remote.close()
            self._file.close()
        super().close()


class Handle(io.RawIOBase):
    """One reader's view of a mirror, which outlives it: shards are closed and opened again."""

    def __init__(self, mirror: MirrorFile) -> None:
        super().__init__()
        self._mirror = mirror
        self._at = 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seek(self, offset: int, whence: int = 0, /) -> int:
        """Go to an offset."""
        if whence == io.SEEK_CUR:
            offset, whence = offset + self._at, io.SEEK_SET
        self._at = self._mirror.seek(offset, whence)
        return self._at

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Fill a buffer as far as the file goes."""
        self._mirror.seek(self._at)
        done = self._mirror.readinto(buffer)
        self._at += done
        return done


def _read_on(file: Any, end: int) -> None:
    """One request, whatever the size of the pieces."""
    hint = getattr(file, "read_on", None)
    if hint is not None:
        hint(end)


def _fill(file: Any, view: memoryview) -> int:
    done = 0
    while done < len(view):
        got = file.readinto(view[done : done + _PIECE_BYTES])
        if not got:
            break
        done += got
    return done

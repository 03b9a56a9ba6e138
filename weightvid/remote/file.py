"""A file elsewhere as a binary file object: by ranges where it can seek, else as a stream."""

from __future__ import annotations

import io
import threading
from collections.abc import Generator
from contextlib import closing
from typing import TYPE_CHECKING, BinaryIO, Final, cast

from weightvid.errors import RemoteError
from weightvid.remote import retry
from weightvid.remote.retry import TransferError
from weightvid.remote.store import Store, open_store

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

#: the first request: it tells the size and whether ranges work, and brings an archive's header.
FIRST_BYTES: Final = 32 << 10
#: read at once where it is read over.
_SKIP_BYTES: Final = 1 << 20
#: answers that are read on at the same time; the first ones are kept longest.
_RUNS: Final = 4
#: how far into the first bytes a web page may hide its first tag.
_BLANKS: Final = b" \t\r\n\xef\xbb\xbf"
_PAGES: Final = (b"<!doctype", b"<html", b"<head", b"<!--")


def open_remote(url: str) -> BinaryIO:
    """Open a file elsewhere for reading; asks for its first bytes.

    Parameters
    ----------
    url : str

    Returns
    -------
    RemoteFile
        Where ranges can be asked for.
    RemoteStream
        Elsewhere: it cannot seek, but it can begin again.

    Raises
    ------
    RemoteError
        Nothing there, no access, no connection, a web page instead of a file, ...
    """
    transfer = Transfer(open_store(url))
    pieces = transfer.pieces(0, None, FIRST_BYTES)
    head = bytearray()
    try:
        for data in pieces:
            head += data
            if len(head) >= FIRST_BYTES:
                break
        _refuse_page(bytes(head), transfer.store.shown)
        if transfer.ranged and transfer.total_bytes is not None:
            pieces.close()
            return cast(BinaryIO, RemoteFile(transfer, bytes(head)))
        return cast(BinaryIO, RemoteStream(transfer, bytes(head), pieces))
    except BaseException:
        pieces.close()
        raise


def _refuse_page(head: bytes, shown: str) -> None:
    if head[:64].lstrip(_BLANKS).lower().startswith(_PAGES):
        raise RemoteError(
            f"{shown} is a web page, not a model: copy the address of the download itself"
        )


class Transfer:
    """Reads a store, tries again where a transfer breaks, and goes on where it broke.

    Attributes
    ----------
    store : Store
    total_bytes : int or None
        Size of the file; known after the first answer, if at all.
    ranged : bool
        Whether ranges can be asked for; known after the first answer.
    requests, bytes_received : int
        What it took so far.
    stopped : threading.Event
        Set by whoever wants nothing more of it, from any thread.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.total_bytes: int | None = None
        self.ranged = False
        self.requests = 0
        self.bytes_received = 0
        self.stopped = threading.Event()
        self._tag: str | None = None

    def pieces(
        self, begin: int, end: int | None = None, first_bytes: int | None = None
    ) -> Generator[bytes]:
        """Bytes from ``begin`` to ``end`` (or to the end of the file), as they come.

        Parameters
        ----------
        begin, end : int
        first_bytes : int or None
            Ask for no more than this as long as it is unknown whether ranges work; then, where
            they do, end there.

        Raises
        ------
        RemoteError
            It cannot be read, however often it is tried; or it changed meanwhile.
        """
        at = begin
        failures = 0
        while end is None or at < end:
            asked_end = end if first_bytes is None else at + first_bytes
            try:
                for data in self._once(at, asked_end, end):
                    at += len(data)
                    failures = 0
                    yield data
                if self._ended(at, asked_end if self.ranged else end):
                    return
                raise TransferError("the transfer ended early")
            except TransferError as error:
                failures += 1
                if failures >= retry.POLICY.attempts:
                    raise RemoteError(
                        f"cannot read {self.store.shown}: {error}; gave up after {failures} tries "
                        f"at byte {at}"
                    ) from None
                retry.pause(retry.POLICY.wait_s(failures, error.wait_s), self.stopped)

    def _ended(self, at: int, end: int | None) -> bool:
        total = self.total_bytes
        if total is None:
            return True
        return at >= (total if end is None else min(end, total))

    def _once(self, at: int, asked_end: int | None, end: int | None) -> Generator[bytes]:
        if self.stopped.is_set():
            raise RemoteError(f"{self.store.shown} is wanted no longer")
        self.requests += 1
        answer = self.store.request(at, asked_end)
        with closing(answer.chunks):
            self._check(answer.total_bytes, answer.tag)
            self.ranged = answer.ranged
            # A server without ranges begins at the beginning every time.
            skip = at - answer.first
            stop = asked_end if answer.ranged else end
            limit = None if stop is None else stop - at
            for chunk in answer.chunks:
                if self.stopped.is_set():
                    raise RemoteError(f"{self.store.shown} is wanted no longer")
                self.bytes_received += len(chunk)
                data, skip = chunk[skip:], max(0, skip - len(chunk))
                if limit is not None:
                    data = data[:limit]
                    limit -= len(data)
                if data:
                    yield data
                if limit == 0:
                    return

    def _check(self, total_bytes: int | None, tag: str) -> None:
        """Refuse to join pieces of two files."""
        changed = (
            self._tag is not None
            and self.total_bytes is not None
            and (
                (total_bytes is not None and total_bytes != self.total_bytes)
                or (tag and self._tag and tag != self._tag)
            )
        )
        if changed:
            raise RemoteError(f"{self.store.shown} was changed while it was read; try again")
        self._tag = self._tag or tag
        if total_bytes is not None:
            self.total_bytes = total_bytes


class _Remote(io.RawIOBase):
    """What both kinds of files share."""

    def __init__(self, transfer: Transfer) -> None:
        super().__init__()
        self.transfer = transfer
        self.name = transfer.store.shown

    def stop(self) -> None:
        """End what another thread reads, with an error there."""
        self.transfer.stopped.set()

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Fill a buffer as far as the file goes."""
        view = memoryview(buffer).cast("B")
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        """Everything that is left."""
        return b"".join(iter(lambda: self.read(1 << 20), b""))

    def read(self, size: int = -1, /) -> bytes:
        """At most ``size`` bytes."""
        raise NotImplementedError

    def write(self, data: ReadableBuffer, /) -> int:
        """Refused."""
        raise io.UnsupportedOperation("not writable")


class _Run:
    """One answer that is read as it arrives, by reads that follow each other.

    Attributes
    ----------
    at, end : int
        Offset of the next byte that comes, and of what follows the last.
    skipping : bool
        Whether gaps are read over.
    """

    def __init__(self, at: int, end: int, skipping: bool) -> None:
        self.at = at
        self.skipping = skipping
        self.end = end
        self._left = b""
        self._pieces: Generator[bytes] | None = None

    @property
    def open(self) -> bool:
        """Whether anything has been asked for."""
        return self._pieces is not None

    def take(self, size: int, head: bytes, transfer: Transfer) -> bytes:
        """Next bytes, fewer at the end of the run."""
        if self._pieces is None:
            self._left = head[self.at : self.end]
            self._pieces = transfer.pieces(self.at + len(self._left), self.end)
        parts, have = [self._left], len(self._left)
        while have < size and (data := next(self._pieces, b"")):
            parts.append(data)
            have += len(data)
        whole = parts[0] if len(parts) == 1 else b"".join(parts)
        self._left = whole[size:]
        self.at += min(size, len(whole))
        return whole[:size]

    def close(self) -> None:
        """Let go of the connection."""
        if self._pieces is not None:
            self._pieces.close()


class RemoteFile(_Remote):
    """A file that is read by ranges.

    Each read is one request, but for what the first one brought, and for reading on: after
    :meth:`read_on`, what follows comes in one answer that is read as it arrives.

    Attributes
    ----------
    chunk_bytes : int
        How much may be asked for at once; the file's own end is never passed.
    """

    chunk_bytes: Final = 1 << 30

    def __init__(self, transfer: Transfer, head: bytes) -> None:
        super().__init__(transfer)
        self._size = transfer.total_bytes or 0
        self._head = head
        self._at = 0
        self._runs: list[_Run] = []

    def seekable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """Offset of the next byte."""
        return self._at

    def seek(self, offset: int, whence: int = 0, /) -> int:
        """Go to an offset; asks for nothing."""
        base = (0, self._at, self._size)[whence]
        self._at = max(0, base + offset)
        return self._at

    def read_on(self, end: int | None = None, *, skipping: bool = False) -> None:
        """Expect everything from here on to be read, in order.

        What other parts are read in between, by further calls too, does not end this.

        Parameters
        ----------
        end : int or None
            Up to there; None: to the end of the file.
        skipping : bool
            With gaps, which are read over.
        """
        self._runs = [run for run in self._runs if run.at < run.end]
        while len(self._runs) >= _RUNS:
            self._runs.pop().close()
        stop = self._size if end is None else min(end, self._size)
        self._runs.append(_Run(self._at, stop, skipping))

    def read(self, size: int = -1, /) -> bytes:
        """Exactly ``size`` bytes, fewer only at the end of the file."""
        end = self._size if size < 0 else min(self._size, self._at + size)
        if end <= self._at:
            return b""
        run = self._run()
        if end <= len(self._head) and not (run and run.open):
            found = self._head[self._at : end]
            if run:
                run.at = end
        else:
            found = run.take(end - self._at, self._head, self.transfer) if run else b""
            at = self._at + len(found)
            if at < end:
                found += self._head[at:end]
                at = self._at + len(found)
                found += b"".join(self.transfer.pieces(at, end))
        self._at += len(found)
        return found

    def _run(self) -> _Run | None:
        """The run that goes on here."""
        for run in self._runs:
            if run.skipping and run.at < self._at:
                if not run.open and self._at <= len(self._head):
                    run.at = self._at
                while (gap := self._at - run.at) > 0 and run.take(
                    min(gap, _SKIP_BYTES), self._head, self.transfer
                ):
                    pass
            if run.at == self._at:
                return run
        return None

    def close(self) -> None:
        """Let go of the connections."""
        for run in self._runs:
            run.close()
        self._runs = []
        super().close()


class RemoteStream(_Remote):
    """A file of a server without ranges: read once from front to back, or again from the front."""

    def __init__(self, transfer: Transfer, head: bytes, pieces: Generator[bytes]) -> None:
        super().__init__(transfer)
        self._pieces = pieces
        self._left = head

    def seekable(self) -> bool:
        """No."""
        return False

    def rewind(self) -> None:
        """Begin again: the file is asked for once more."""
        self._pieces.close()
        self._pieces, self._left = self.transfer.pieces(0), b""

    def read(self, size: int = -1, /) -> bytes:
        """At least one and at most ``size`` bytes, none at the end."""
        if size < 0:
            return self.readall()
        if not self._left:
            self._left = next(self._pieces, b"")
        found, self._left = self._left[:size], self._left[size:]
        return found

    def close(self) -> None:
        """Let go of the connection."""
        self._pieces.close()
        super().close()

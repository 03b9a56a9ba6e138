"""Archives from web servers: resumed where a download broke off, checked frame by frame.

What has arrived lies beside the destination, in ``.model.mp4.part``, and what is known of it in
``.model.mp4.part.json``; both are gone when the whole archive gets its name. Each box is checked as
soon as it is whole, and each frame decoded: what a server, a proxy or a disk changed is fetched
again.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import ssl
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, sleep
from typing import Any, BinaryIO, Final, cast

from weightvid import loader
from weightvid.archives import Location, open_chain
from weightvid.atomic import atomic_output, is_source, output_error, real_destination
from weightvid.errors import CodecError, FormatError, OutputError, RemoteError, SignatureError
from weightvid.progress import Progress, Report, quiet
from weightvid.remote import PATIENCE_S, Answer, WrongAnswerError, explain, is_web, shown
from weightvid.sign import open_signed, read_key

#: what an archive has besides its tensors, at most, as far as a download is concerned.
_MOST_BESIDES: Final = 1 << 28
#: what must follow a box, and what follows no other.
_NEXT: Final = {
    b"": b"ftyp", b"ftyp": b"moov", b"moov": loader.HEADER_UUID,
    loader.FRAME_UUID: b"moof", b"moof": b"mdat",
}  # fmt: skip
#: statuses of servers that may answer otherwise a little later.
_PASSING: Final = frozenset({408, 425, 429, 500, 502, 503, 504})


class WrongArchiveError(RemoteError, FormatError):
    """What servers have is no archive, a damaged one, or an update to another base."""

    def __init__(self, why: str, code: str = "") -> None:
        OSError.__init__(self, why)  # more arguments would be an errno
        self.code, self.offset, self.tensor = code, None, ""

    def __str__(self) -> str:
        return str(self.args[0])  # which says the code already


class WrongHashError(RemoteError, SignatureError):
    """What arrived is another file than the one whose hash was given."""


@dataclass(frozen=True, slots=True)
class FetchOptions:
    """Settings of one download.

    Attributes
    ----------
    force : bool
        Replace an existing file.
    restart : bool
        Forget what an earlier attempt left.
    sha256 : str
        What the whole file must have, in hexadecimal; empty: whatever its own hashes say.
    key : str
        Path of a public key by which the archive must be signed; empty: none.
    layers : int
        Stop after so many layers; 0: fetch the whole file.
    base : tuple of path
        What an update must be to: an archive, or a chain of them, the oldest first; empty: it is
        not looked at.
    patience : float
        Seconds that a server may take to answer, and for the next 4 kB; one that does not answer
        at all is given up within a minute.
    attempts : int
        How often in a row a server may fail without sending one whole frame.
    """

    force: bool = False
    restart: bool = False
    sha256: str = ""
    key: str = ""
    layers: int = 0
    base: tuple[Location, ...] = ()
    patience: float = PATIENCE_S
    attempts: int = 4

    def check(self) -> None:
        """Refuse what cannot be asked for, by a RemoteError."""
        if self.sha256 and not re.fullmatch("[0-9A-Fa-f]{64}", self.sha256):
            raise RemoteError(f"{self.sha256!r} is no SHA-256: it has 64 hexadecimal digits")
        if self.layers and (self.sha256 or self.key):
            raise RemoteError("a hash or signature is of the whole file: leave out layers, or both")


@dataclass(frozen=True, slots=True)
class FetchReport:
    """What a download did.

    Of ``file_bytes``, ``fetched_bytes`` came in this run, and ``resumed_at`` were there before it.
    So many ``frames`` are there, and ``layers``, of the archive's ``layers_of``. ``interruptions``
    is how often a connection broke off or had to be given up; ``sources`` are the addresses that
    gave something, without their passwords and queries.
    """

    file_bytes: int
    fetched_bytes: int
    resumed_at: int
    frames: int
    interruptions: int
    layers: int
    layers_of: int
    sources: tuple[str, ...]
    seconds: float


def fetch_archive(
    urls: str | Sequence[str],
    destination: str | os.PathLike[str],
    options: FetchOptions | None = None,
    progress: Report = quiet,
) -> FetchReport:
    """Download an archive; go on where an earlier attempt ended.

    Parameters
    ----------
    urls : str or sequence of str
        ``https://`` or ``http://`` addresses of the same file: where one fails, the next goes on.
    destination : path
        Appears whole, or with all the layers asked for, or not at all. What is fetched of more
        layers later goes on from a copy.
    options : FetchOptions
    progress : callable
        Receives the stage ``fetch``, in bytes.

    Raises
    ------
    RemoteError
        No server could give the whole file: each of them is slow, without ranges, or has another
        file than before; what arrived is kept. Or the options contradict each other.
    WrongArchiveError, WrongHashError
        RemoteErrors, too: the last server that was asked has no archive, a damaged one, no update
        to ``base`` (code ``base``), or another file than ``sha256`` says.
    FormatError
        The base is no archive.
    SignatureError
        The archive is not signed by ``key``; KeyFileError: there is no such key in the file.
    OutputError
        The destination exists (without ``force``), is the base, or cannot be written.
    """
    chosen = options or FetchOptions()
    sources = [urls] if isinstance(urls, str) else list(urls)
    for url in sources:
        if not is_web(url):
            raise RemoteError(f"cannot fetch {shown(url)}: only http:// and https:// addresses can")
    chosen.check()
    if chosen.key:
        read_key(chosen.key, "public")
    target = Path(destination)
    if is_source(target, *chosen.base):
        raise OutputError(f"{target} is the base itself; write to another file")
    real_destination(os.fspath(target), chosen.force)
    part = target.with_name(f".{target.name}.part")
    try:
        with part.open("r+b" if part.exists() else "x+b") as file:
            _lock(file, part)
            download = _Download(part, file, chosen, progress)
            try:
                report = download.run(sources)
            except BaseException:
                if not part.stat().st_size:  # nothing to go on with
                    part.unlink()
                    download.state.path.unlink(missing_ok=True)
                raise
            if report.layers < report.layers_of:  # the rest may follow
                file.seek(0)
                with atomic_output(target, force=chosen.force) as output:
                    shutil.copyfileobj(file, output)
                return report
        part.replace(target)
        download.state.path.unlink(missing_ok=True)
    except OSError as error:
        if isinstance(error, (RemoteError, OutputError)):
            raise
        raise output_error(target, error) from None
    return report


def _lock(file: BinaryIO, part: Path) -> None:
    """Refuse to write what another process is writing, where the system can tell."""
    with suppress(ImportError):
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OutputError(f"another process is writing {part}; wait for it to end") from None


class _State:
    """What is remembered between runs: bytes that were checked, size, versions by address."""

    def __init__(self, part: Path) -> None:
        self.path = part.with_name(part.name + ".json")
        self.checked, self.size, self.versions = 0, 0, dict[str, str]()
        with suppress(OSError, ValueError, TypeError, KeyError):
            known = json.loads(self.path.read_text("utf-8"))
            versions = {str(url): str(version) for url, version in known["versions"].items()}
            self.checked, self.size = int(known["checked"]), int(known["size"])
            self.versions = versions

    def save(self) -> None:
        known = {"checked": self.checked, "size": self.size, "versions": self.versions}
        new = self.path.with_name(self.path.name + ".new")
        new.write_text(json.dumps(known), "utf-8")
        new.replace(self.path)


class _Arrived:
    """The part of an archive that is there, checked box by box."""

    def __init__(self, file: BinaryIO, trusted: int, layers: int, base: bytes) -> None:
        self._file, self._trusted, self._layers, self._base = file, trusted, layers, base
        #: layers wanted that are not there, by tensor; None: the whole file is wanted.
        self._left: Counter[int] | None = None
        #: end of the last whole frame, or box that is no part of one: all before it was checked.
        self.good = 0
        #: whether the last box is there, or all the layers that are wanted.
        self.complete = False
        #: offset and bytes of each frame.
        self.places: list[tuple[int, int]] = []
        self._at = 0
        self._track: loader.Track | None = None
        self.header: loader.Header | None = None
        self._sidecar: loader.Sidecar | None = None
        self._before = self._last = b""

    @property
    def most(self) -> int:
        """Bytes that an archive of these tensors can have, whatever its server says."""
        tensors = self.header.tensors if self.header else ()
        return 2 * sum(spec.stored_bytes for spec in tensors) + _MOST_BESIDES

    def check(self, length: int) -> None:
        """Look at the boxes that are whole in so many bytes.

        A FormatError or CodecError says that at ``good`` starts something damaged.
        """
        while not self.complete and length >= self._at + 8:
            self._file.seek(self._at)
            head = self._file.read(8)
            size, kind = int.from_bytes(head[:4], "big"), head[4:]
            if not self._at and kind != b"ftyp":
                raise FormatError("this is not a weightvid archive", "ftyp", 0)
            if not 8 <= size <= 2 * loader.MAX_BOX_BYTES:
                raise FormatError(f"a box claims {size} bytes", "box-size", self._at)
            if length < self._at + size:
                return
            payload = self._file.read(size - 8)
            if kind == b"uuid":
                kind, payload = payload[:16], payload[16:]
            try:
                self._box(kind, payload)
            except BaseException:
                self._at, self._sidecar, self._before = self.good, None, self._last
                raise
            self._at, self._before = self._at + size, kind
            if self._sidecar is None:
                self.good, self._last = self._at, kind

    def _box(self, kind: bytes, payload: bytes) -> None:
        what, header = f"the box at byte {self._at}", cast(loader.Header, self.header)
        follows = _NEXT.get(self._before, kind)
        if kind != follows or (kind in _NEXT.values() and self._before not in _NEXT):
            raise FormatError(f"{what} is {kind!r}", "order", self._at)
        if kind == b"ftyp" and loader.BRAND not in payload:
            raise FormatError("this is not a weightvid archive", "ftyp", 0)
        if kind == b"moov":
            self._track = loader.parse_moov(payload)
        elif kind == loader.HEADER_UUID:
            self.header = loader.parse_header(loader.open_body(payload, what), self._at)
            self._want(self.header)
        elif kind == loader.FRAME_UUID:
            self._sidecar = loader.parse_sidecar(loader.open_body(payload, what), header)
            if self._sidecar.frame != len(self.places):
                raise FormatError(f"{what} is of frame {self._sidecar.frame}", "order", self._at)
        elif kind == b"mdat":
            self._frame(payload)
        elif kind == loader.EXACT_UUID:
            items = loader.parse_exact(payload, header)
            self._note(n for n, at, a in items if at + a.size == header.tensors[n].size)
        elif kind[:10] == b"weightvid-":
            loader.open_body(payload if kind == loader.FILE_UUID else payload[:-4], what)
        elif kind == b"mfra":
            self.complete = True

    def _want(self, header: loader.Header) -> None:
        """See of what an update is, and how many layers make enough."""
        known = header.layers
        if self._base and (known is None or known.base != self._base):
            of = known.base.hex() if known and known.base else ""
            what = f"an update to the archive of root {of}" if of else "no update"
            why = f"it is {what}, and the base has the root {self._base.hex()}"
            raise WrongAnswerError(why, code="base")
        if known is not None and 0 < self._layers < known.total:
            lowest = (1 << self._layers) - 1
            masks = enumerate(known.masks)
            self._left = Counter({n: (mask >> 1 & lowest).bit_count() for n, mask in masks})

    def _note(self, tensors: Iterable[int]) -> None:
        """A layer of these tensors is there."""
        if self._left is not None:
            self._left.subtract(tensors)
            self.complete = max(self._left.values(), default=0) <= 0

    def _frame(self, packet: bytes) -> None:
        """Decode the frame whose packet this is, unless that was done in an earlier run."""
        track, sidecar = cast(loader.Track, self._track), cast(loader.Sidecar, self._sidecar)
        if self._at >= self._trusted:
            decoder = loader.Decoder(track)
            decoded = [*decoder.decode(0, packet), *decoder.decode(0, None)]
            digests = [hashlib.sha256(luma.tobytes()).digest() for _, luma in decoded]
            if digests != [sidecar.sha256]:
                why = f"frame {len(self.places)} decodes to other samples than were packed"
                raise FormatError(why, "frame-digest", self.good)
        self._sidecar = None
        self.places.append((self.good, self._at + 8 + len(packet) - self.good))
        self._note(end.tensor for end in sidecar.ends)


class _Download:
    """One run: sources are asked in turn until the file is whole."""

    def __init__(self, part: Path, file: BinaryIO, options: FetchOptions, progress: Report) -> None:
        self._part, self._file, self._options, self._progress = part, file, options, progress
        if options.restart:
            file.truncate(0)
            _State(part).path.unlink(missing_ok=True)
        self.state = _State(part)
        self._length = file.seek(0, os.SEEK_END)
        root = b""
        if options.base:
            with open_chain(options.base) as [*_, base]:
                root = base.root
        trusted = min(self.state.checked, self._length)
        self._arrived = _Arrived(file, trusted, options.layers, root)
        self._fetched, self._resumed_at, self._used = 0, self._length, list[str]()

    def run(self, urls: Sequence[str]) -> FetchReport:
        """Fetch what is missing, and check the whole."""
        began, left, failures, interruptions = perf_counter(), list(urls), 0, 0
        try:
            self._look()
        except WrongAnswerError as error:
            why = f"cannot go on with {self._part.name}: {error}; --restart begins again"
            raise WrongArchiveError(why, error.code) from None
        except (FormatError, CodecError):
            pass  # what is damaged is fetched again
        while not self._arrived.complete:
            before, url = self._arrived.good, left[0]
            try:
                self._receive(url)
            except (OSError, FormatError, CodecError) as error:
                full = getattr(error, "errno", None) == errno.ENOSPC
                if full or isinstance(error.__context__, ImportError):
                    raise
                interruptions += 1
                left = left[1:] if self._is_final(error) else [*left[1:], url]
                failures = 0 if self._arrived.good > before else failures + 1
                if not left or failures >= self._options.attempts * len(left):
                    why = str(explain(url, error, "fetch"))
                    why += f" (nor from {len(urls) - 1} others)" if len(urls) > 1 else ""
                    kept = f"; {self._part.name} keeps what arrived" if self._arrived.good else ""
                    if code := _code(error):
                        raise WrongArchiveError(why + kept, code) from None
                    raise RemoteError(why + kept) from None
                if failures:
                    sleep(min(self._options.patience, 0.05 * 2**failures))
        known = cast(loader.Header, self._arrived.header).layers
        total = known.total if known else 1
        layers = min(self._options.layers or total, total)
        self._finish(whole=layers == total)
        return FetchReport(
            self._length, self._fetched, self._resumed_at, len(self._arrived.places), interruptions,
            layers, total, tuple(self._used), perf_counter() - began,
        )  # fmt: skip

    def _receive(self, url: str) -> None:
        """Ask one source for what is missing."""
        start = max(0, self._length - 1024)  # which shows whether it is the same file
        with Answer(url, start, patience=self._options.patience) as answer:
            self._agree(url, start, answer)
            self._file.seek(start)
            same, place = self._file.read(self._length - start), shown(url)
            self._used += [place] if place not in self._used else []
            for received in answer:
                known, same = same[: len(received)], same[len(received) :]
                if received[: len(known)] != known:
                    raise WrongAnswerError("it is another file than the one that arrived before")
                piece = received[len(known) :]
                self._file.seek(self._length)
                self._file.write(piece)
                self._length, self._fetched = self._length + len(piece), self._fetched + len(piece)
                self._look()
                total = max(answer.size, self._length)
                self._progress(Progress("fetch", self._length, total, unit="bytes"))
                if self._arrived.complete:
                    return
                if not answer.size and self._length > self._arrived.most:
                    most = self._arrived.most
                    raise WrongAnswerError(f"it sends more than the {most} bytes that it can have")
        if answer.size:
            why = f"its {answer.size} bytes end before the archive does"
            raise WrongAnswerError(why, code="truncated")
        raise ConnectionError(f"its answer breaks off at byte {self._length}")

    def _look(self) -> None:
        """Check what is whole; take away what is damaged."""
        before = self._arrived.good
        try:
            self._arrived.check(self._length)
        except (FormatError, CodecError):
            self._length = self._file.truncate(self._arrived.good)
            raise
        finally:
            if self._arrived.good > before:
                self._file.flush()
                self.state.checked = self._arrived.good
                self.state.save()

    def _agree(self, url: str, start: int, answer: Answer) -> None:
        """See that a server means the file of before."""
        if answer.start != start:
            why = "it has no ranges, so that the download cannot go on where it broke off"
            raise WrongAnswerError(f"{why}; --restart begins again")
        place, state = shown(url), self.state
        version, size = state.versions.get(place, answer.version), state.size or answer.size
        for was, now in (version, answer.version), (size, answer.size or size):
            if was != now:
                why = f"the file has changed since the download began ({was}, now {now})"
                raise WrongAnswerError(f"{why}; --restart begins again")
        state.versions[place], state.size = version, size
        state.save()

    def _is_final(self, error: Exception) -> bool:
        """Whether the same server would do it again."""
        if isinstance(error, WrongAnswerError):
            return error.status not in _PASSING
        foreign = isinstance(error, FormatError) and not self._arrived.good
        return foreign or isinstance(error, (RemoteError, ssl.SSLCertVerificationError))

    def _finish(self, whole: bool) -> None:
        """Check the whole file, if it is there; what is not right is thrown away."""
        self._length = self._file.truncate(self._arrived.good)
        self._file.flush()
        os.fsync(self._file.fileno())
        why, code, unsigned = "", "", False
        if self._options.sha256:
            self._file.seek(0)
            found = hashlib.file_digest(cast(Any, self._file), "sha256").hexdigest()
            if found != self._options.sha256.lower():
                why = f"the file has the SHA-256 {found}, not {self._options.sha256}"
        try:
            index = loader.open_archive(self._file).index
            if whole and (index is None or list(index.frames) != self._arrived.places):
                raise FormatError("the index contradicts the file", "index")
            if self._options.key:
                with open_signed(self._file, self._options.key) as signed:
                    while signed.read(1 << 20):
                        pass
        except (FormatError, SignatureError) as error:
            unsigned = isinstance(error, SignatureError)
            if not why:
                why, code = str(error), _code(error)
        if why:
            self._file.truncate(0)
            self.state.path.unlink(missing_ok=True)
            where = ", ".join(self._used) or os.fspath(self._part)
            said = f"cannot fetch {where}: {why}; what arrived was thrown away"
            if unsigned:
                raise SignatureError(said)
            raise WrongArchiveError(said, code) if code else WrongHashError(said)


def _code(error: Exception) -> str:
    """Of the defect, if it is what a server has that is wrong; empty: asking again may help."""
    if isinstance(error, CodecError):
        return "decode"
    return error.code if isinstance(error, (FormatError, WrongAnswerError)) else ""

"""Files at addresses, through fsspec: web servers, object stores, the Hugging Face hub.

Every wait has an end here. A web server may be anybody's: each number has a limit, too.
"""

from __future__ import annotations

import asyncio
import errno
import io
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from importlib import import_module
from inspect import iscoroutinefunction
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, BinaryIO, Final, cast
from urllib.parse import parse_qsl, unquote, urlsplit

from weightvid.errors import OutputError, RemoteError, WeightvidError
from weightvid.version import __version__

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_BLOCK_BYTES: Final = 1 << 22
#: seconds that a web server may take to answer, and for the next ``_LEAST_BYTES``.
PATIENCE_S: Final = 14.0
_LEAST_BYTES: Final = 1 << 12
#: of a file whose size a web server does not say: bytes, and seconds until it ends.
_UNSAID_BYTES, _UNSAID_S = 1 << 30, 60.0
#: what a call of another driver may take: seconds, and a second more for so many bytes.
_CALL_S, _BYTES_PER_S = 60.0, 1 << 16
#: numbers in the heads of answers have this many digits at most.
_RANGE: Final = re.compile(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18})", re.ASCII)
#: our extras that bring a driver, by scheme, and what to do where access is refused.
_EXTRAS: Final = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "hf": "hf"}
_LOGIN: Final = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or FSSPEC_S3_ANON=true if it is public",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS, or FSSPEC_GS_TOKEN=anon if it is public",
    "hf": "log in with `hf auth login` or set HF_TOKEN, and ask for access on the model's page",
    "": "check the credentials",
}
#: what names of error classes, of whatever library, have in common.
_NO_ACCESS: Final = re.compile("Credential|Authentication|Permission|Gated|Token|Profile|Refresh")
_ABSENT: Final = re.compile("(File|Repository|Entry)NotFound|NotADirectory|NoSuchBucket")
#: what to say instead of what a web client says.
_SAID: Final = {
    "TooManyRedirects": "it redirects in a circle",
    "ServerDisconnectedError": "the connection was closed without an answer",
    "ClientPayloadError": "its answer breaks off",
}
#: what may be secret in a text with addresses: user and password, and the query.
_SECRETS: Final = re.compile(r"(?<=://)[^/\s@]*@|\?\S*")
_MESSAGE_LETTERS: Final = 300


def scheme(url: str) -> str:
    """Scheme of an address, in lower case."""
    return url.partition("://")[0].lower()


def is_web(url: str) -> bool:
    """Whether a web server is asked."""
    return scheme(url) in ("http", "https")


def shown(url: str) -> str:
    """An address as messages may show it: without password and query, which may hold secrets."""
    return url if scheme(url) == "hf" else _SECRETS.sub("", url).partition("#")[0]


def without_secrets(text: str, url: str) -> str:
    """One line of at most 300 letters about an address, without anything of it that may be secret.

    What a server says may hold the address that it was asked for, or parts of it, in any form.

    Examples
    --------
    >>> without_secrets("no /m?sig=a1b2)c for 'me%40a'", "https://me%40a:x@b.org/m?sig=a1b2)c")
    "no /m for '...'"
    """
    known = set[str]()
    with suppress(ValueError):  # of a host that is none
        parts = urlsplit(url)
        known = {parts.query, parts.fragment, *(value for _, value in parse_qsl(parts.query))}
        known |= set(parts.netloc.rpartition("@")[0].split(":"))
    said = _SECRETS.sub("", " ".join(text.split()))
    for secret in sorted(known | set(map(unquote, known)), key=len, reverse=True):
        if len(secret) >= 4:  # a shorter part is none
            said = said.replace(secret, "...")
    return said[:_MESSAGE_LETTERS]


def file_name(url: str) -> str:
    """Last part of an address's path; for a model of the hub, its name.

    Examples
    --------
    >>> file_name("s3://bucket/m.mp4"), file_name("hf://org/model@main"), file_name("https://a.b")
    ('m.mp4', 'model', '')
    """
    path = shown(url).partition("://")[2].rstrip("/")
    name = path.rpartition("/")[2] if "/" in path else ""
    return name.partition("@")[0] if scheme(url) == "hf" else unquote(name)


class WrongAnswerError(WeightvidError, OSError):
    """A web server refuses (then it has a ``status``), contradicts itself, or sends too much.

    Where it has not what was asked for, and would not have it later, ``code`` is the defect's.
    """

    def __init__(self, why: str, status: int = 0, code: str = "") -> None:
        super().__init__(why)
        self.status, self.code = status, code


class Answer(AbstractContextManager["Answer"]):
    """What a web server gives of a file, in pieces; OSErrors of it become ours by `explain`.

    The bytes from ``start`` to ``stop`` come: of a server without ranges all. The end, and the
    ``size`` of the file, are 0 if it does not say them. ``version`` is what changes with the file;
    it may be empty.
    """

    def __init__(self, url: str, start: int = 0, stop: int = 0, patience: float = 0) -> None:
        files, path = find_driver(url)
        settings = dict(files.kwargs)
        headers = {
            "User-Agent": f"weightvid/{__version__}", **settings.pop("headers", {}),
            "Accept-Encoding": "identity", "Range": f"bytes={start}-{stop - 1 if stop else ''}",
        }  # fmt: skip

        async def ask() -> Any:
            session = await files.set_session()
            # What waits in a buffer would be lost with the connection.
            settings["read_bufsize"] = 1
            return await session.get(files.encode_url(path), headers=headers, **settings)

        #: seconds for the head, and for each 4 kB that follow.
        self._loop, self._patience = files.loop, patience or PATIENCE_S
        self._answer = self._wait(ask(), self._patience)
        try:
            self._read_head(start, stop)
        except BaseException:
            self.__exit__()
            raise

    def _read_head(self, start: int, stop: int) -> None:
        status, headers = self._answer.status, self._answer.headers
        encoding, said = headers.get("Content-Encoding", "identity"), headers.get("Content-Range")
        if status not in (200, 206):
            short = f"the file has no byte {start}" if status == 416 else ""
            raise WrongAnswerError(short or f"it answers {status} {self._answer.reason}", status)
        if encoding != "identity":
            raise WrongAnswerError(f"it sends {encoding} instead of the file")
        if status == 200:
            self.start, self.size = 0, self._answer.content_length or 0
            self.stop = self.size
        else:
            match = _RANGE.fullmatch(said or "")
            if match is None or int(match[1]) != start:
                raise WrongAnswerError(f"it answers {said} to {start}-{stop or ''}")
            self.start, self.size = start, int(match[2])
            self.stop = min(stop or self.size, self.size)
        self.version = headers.get("ETag") or headers.get("Last-Modified") or ""

    def __iter__(self) -> Iterator[bytes]:
        waited, fresh, at, piece = 0.0, 0, self.start, b"?"
        while piece:
            before = monotonic()
            piece = self._wait(self._answer.content.readany(), self._patience - waited)
            waited, fresh, at = waited + monotonic() - before, fresh + len(piece), at + len(piece)
            if self.stop and at > self.stop:
                why = f"it sends more than the {self.stop - self.start} bytes that it announces"
                raise WrongAnswerError(why)
            yield piece
            if fresh >= _LEAST_BYTES:
                waited, fresh = 0.0, 0
        if at < self.stop:
            raise ConnectionError(f"its answer breaks off at byte {at} of {self.stop}")

    def save(self, file: BinaryIO, tell: Callable[[int], object] = lambda _: None) -> None:
        """Write the whole file to the temporary folder; tell how many bytes there are."""
        began = monotonic()
        if self.size > shutil.disk_usage(tempfile.gettempdir()).free:
            raise OSError(errno.ENOSPC, f"it announces {self.size} bytes")
        for piece in self:
            tell(file.tell() + file.write(piece))
            if not self.size and (file.tell() > _UNSAID_BYTES or monotonic() - began > _UNSAID_S):
                raise WrongAnswerError(f"it sends more than {_UNSAID_BYTES} bytes, or for ever")

    def _wait(self, step: Coroutine[Any, Any, Any], seconds: float) -> Any:
        why = f"less than {_LEAST_BYTES} bytes in {self._patience:g} seconds"
        try:
            return _result(asyncio.run_coroutine_threadsafe(step, self._loop), seconds, why)
        except OSError:
            raise
        except Exception as error:
            name = type(error).__name__
            raise ConnectionError(_SAID.get(name, f"{name}: {error}")) from None

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._answer.close)


def _result(task: Future[Any], seconds: float, why: str) -> Any:
    """What a task of another thread comes to, or TimeoutError."""
    try:
        if not wait([task], seconds).done:
            raise TimeoutError(why)
        return task.result()
    finally:
        task.cancel()


def reach(
    url: str, call: Callable[..., Any], *args: Any, size: int = 0, verb: str = "read", **more: Any
) -> Any:
    """Call a driver, which may take a minute, and a second for each 64 kB of ``size``.

    What fails is a RemoteError.
    """
    task = Future[Any]()
    task.set_running_or_notify_cancel()

    def run() -> None:
        try:
            task.set_result(call(*args, **more))
        except BaseException as error:
            task.set_exception(error)

    seconds = _CALL_S + size / _BYTES_PER_S
    if iscoroutinefunction(getattr(call, "__wrapped__", None)):
        more["timeout"] = seconds + 1  # fsspec ends it then, where it would go on for minutes
    # Of no pool: nobody waits for it in the end.
    threading.Thread(target=run, daemon=True).start()
    with explained(url, verb):
        return _result(task, seconds, f"no end in {seconds:.3g} seconds")


def open_remote(url: str) -> BinaryIO:
    """Open a file at an address; it can seek, in a temporary copy where a server has no ranges.

    A RemoteError says that nothing is there, or of no access or connection; reading may raise it.
    """
    if not is_web(url):
        files, path = find_driver(url)
        file = reach(url, files.open, path, block_size=_BLOCK_BYTES)

        def read(start: int, stop: int) -> Any:
            file.seek(start)
            return file.read(stop - start)

        size = reach(url, file.seek, 0, os.SEEK_END)
        raw = _RemoteFile(size, lambda at, to: reach(url, read, at, to, size=to - at), file.close)
        return cast(BinaryIO, io.BufferedReader(raw, _BLOCK_BYTES))
    with explained(url), Answer(url, 0, 1) as answer, ExitStack() as stack:
        if answer.stop == 1:
            raw = _RemoteFile(answer.size, partial(_read_web, url, answer.size))
            return cast(BinaryIO, io.BufferedReader(raw, _BLOCK_BYTES))
        copy = stack.enter_context(tempfile.TemporaryFile(prefix="weightvid-"))
        answer.save(copy)
        copy.seek(0)
        stack.pop_all()
        return copy


def _read_web(url: str, size: int, start: int, stop: int) -> bytes:
    with explained(url), Answer(url, start, stop) as answer:
        if (answer.start, answer.size) != (start, size):
            raise WrongAnswerError("the file changes while it is read")
        return b"".join(answer)


class Pieces(io.RawIOBase):
    """A file of so many bytes of which any part can be asked for.

    ``piece`` gives bytes from a place on: some of so many, if that is not 0.
    """

    def __init__(self, size: int, piece: Callable[[int, int], bytes]) -> None:
        super().__init__()
        self._size, self._at, self._piece = size, 0, piece

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = 0, /) -> int:
        """Go to a place, beyond the end, too."""
        self._at = max(0, offset + (0, self._at, self._size)[whence])
        return self._at

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Fill a buffer as far as one part goes."""
        view = memoryview(buffer).cast("B")
        data = self._piece(self._at, min(len(view), max(0, self._size - self._at)))
        view[: len(data)] = data
        self._at += len(data)
        return len(data)


class _RemoteFile(Pieces):
    """A file whose parts are read from a server or store."""

    def __init__(
        self, size: int, read: Callable[[int, int], bytes], close: Callable[[], object] = str
    ) -> None:
        super().__init__(size, lambda at, most: read(at, at + most) if most else b"")
        self._close = close

    def readall(self) -> bytes:
        return self.read(self._size) or b""  # at once, where the base class reads bit by bit

    def close(self) -> None:
        self._close()
        super().close()


def check_upload(url: str, *, force: bool) -> None:
    """See that a file may be written to an address, before the work that makes it.

    An OutputError says that the place takes no files, or (without ``force``) has that one already;
    a RemoteError that it is out of reach.
    """
    where = shown(url)
    if is_web(url) or scheme(url) == "hf":
        raise OutputError(f"cannot write {where}: {scheme(url)}:// addresses are read only")
    if not file_name(url) or url.endswith("/"):
        raise OutputError(f"cannot write {where}: name a file in it")
    files, path = find_driver(url)
    if reach(url, files.exists, path, verb="write") and not force:
        raise OutputError(f"{where} exists already; use --force (force=True) to replace it")


def upload(path: str | os.PathLike[str], url: str) -> None:
    """Put a file where an address says (or RemoteError); a store shows it when it is complete."""
    files, target = find_driver(url)
    size = Path(path).stat().st_size
    reach(url, files.put_file, os.fspath(path), target, size=size, verb="write")


def find_driver(url: str) -> tuple[Any, str]:
    """File system of fsspec for an address, and the path in it."""
    options: dict[str, Any] = {}
    with explained(url):
        fsspec: Any = import_module("fsspec")
        if is_web(url):
            # aiohttp's own limit is five minutes for a whole file.
            patience = import_module("aiohttp").ClientTimeout(total=None)
            settings = fsspec.config.conf.get(scheme(url), {}).get("client_kwargs", {})
            options["client_kwargs"] = {"trust_env": True, "timeout": patience, **settings}
            # What is quoted already stays as it is: signatures are of the very characters.
            options["encoded"] = url.isascii() and " " not in url
        files, path = fsspec.url_to_fs(url, **options)
        return files, str(path)


@contextmanager
def explained(url: str, verb: str = "read") -> Iterator[None]:
    """Make the errors of any driver ours."""
    try:
        yield
    except Exception as error:
        raise explain(url, error, verb) from None


def explain(url: str, error: BaseException, verb: str = "read") -> RemoteError:
    """An error of any driver as one of ours, without the secrets of an address."""
    # Some drivers say of any trouble that there is no such file.
    while isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, RemoteError):
        return error
    where, extra = shown(url), _EXTRAS.get(scheme(url), "")
    names = " ".join(cls.__name__ for cls in type(error).__mro__)
    status = getattr(error, "status", getattr(getattr(error, "response", 0), "status_code", 0))
    said = without_secrets(str(error) or type(error).__name__, url)
    if isinstance(error, ImportError):
        made = f"a package is missing for {scheme(url)}:// addresses ({said}): "
        return RemoteError(f"{made}pip install 'weightvid[{extra or 'remote'}]'")
    if getattr(error, "errno", None) == errno.ENOSPC:
        made = f"cannot read {where}: there is no room in {tempfile.gettempdir()}"
        return RemoteError(f"{made}; set TMPDIR to a folder on a larger disk")
    absent = "RepositoryNotFound" in names and "Gated" not in names
    if not absent and (_NO_ACCESS.search(names) or status in (401, 403, 407)):
        return RemoteError(f"cannot {verb} {where}: access is refused ({said}); {_LOGIN[extra]}")
    if "RevisionNotFound" in names:
        return RemoteError(f"the model of {where} has no such revision")
    if absent or _ABSENT.search(names) or status in (404, 410):
        private = f", or it is private: {_LOGIN[extra]}" if extra == "hf" else ""
        return RemoteError(f"there is no {where}{private}; check the address")
    if not isinstance(error, (WeightvidError, TimeoutError, ConnectionError)):
        said = f"{type(error).__name__}: {said}"
    return RemoteError(f"cannot {verb} {where}: {said}")

"""Files at addresses, through fsspec: web servers, object stores, the Hugging Face hub.

Archives are read and written where they are. Checkpoints are downloaded first: those of the hub to
huggingface_hub's cache, where they stay; others to a temporary folder (of ``TMPDIR``).

Of a web server, which may be anybody's, each wait has an end here, and each number a limit.
"""

from __future__ import annotations

import asyncio
import errno
import io
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import wait
from contextlib import ExitStack, contextmanager, suppress
from importlib import import_module
from pathlib import Path, PurePosixPath
from time import monotonic
from typing import TYPE_CHECKING, Any, BinaryIO, Final, cast
from urllib.parse import parse_qsl, unquote, urlsplit

from weightvid.atomic import ScratchFolder
from weightvid.checkpoint import open_checkpoint
from weightvid.checkpoint.base import CheckpointReader, shorten
from weightvid.checkpoint.folder import WEIGHTS, advice, find_weights, is_index
from weightvid.errors import CheckpointError, OutputError, RemoteError
from weightvid.progress import Progress, Report
from weightvid.spec import SIDE_FILE_BYTES, is_safe_path

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

WEB: Final = ("http", "https")
_BLOCK_BYTES: Final = 1 << 22
#: seconds that a web server may take to answer, and for the next ``LEAST_BYTES``.
_PATIENCE_S: Final = 25.0
LEAST_BYTES: Final = 1 << 12
#: of a file whose size a web server does not say: bytes, and seconds until it ends.
_UNSAID_BYTES, _UNSAID_S = 1 << 30, 60.0
#: sizes in the heads of answers have this many digits at most.
CONTENT_RANGE: Final = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", re.ASCII)
_LENGTH: Final = re.compile(r"\d{1,18}", re.ASCII)
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
#: what may be secret in a text with addresses: user and password, and the query.
_SECRETS: Final = re.compile(r"(?<=://)[^/\s@]*@|\?\S*")
#: a shorter part of an address is no secret.
_SECRET_LETTERS: Final = 4
_MESSAGE_LETTERS: Final = 300
_HUB: Final = re.compile(
    r"(?P<repo>[\w.-]+(?:/[\w.-]+)?)"
    r"(?:@(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+))?"
    r"(?:/(?P<path>.*))?"
)
#: sub-folders of sentence-transformers, which may hold small weights of their own.
_MODULE: Final = re.compile(r"\d+_[^/]+/[^/]+$")
_UNREACHABLE: Final = re.compile("ConnectionError|ConnectError|TransportError|Timeout|Offline")
#: what brings a file, named relative to some root, to a path; and says how many bytes came.
_Fetch = Callable[[str, Callable[..., None]], Path]


def scheme(url: str) -> str:
    """Scheme of an address, in lower case."""
    return url.partition("://")[0].lower()


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
        if len(secret) >= _SECRET_LETTERS:
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


def open_remote(url: str) -> BinaryIO:
    """Open a file at an address; it can seek, in a temporary copy where a server has no ranges.

    Raises
    ------
    RemoteError
        Nothing there, no access, no connection; reading may raise it, too.
    """
    files, path = find_driver(url)
    with explained(url):
        web = scheme(url) in WEB
        file = _open_web(files, path) if web else files.open(path, block_size=_BLOCK_BYTES)
    return cast(BinaryIO, io.BufferedReader(_RemoteFile(file, url), _BLOCK_BYTES))


class _RemoteFile(io.RawIOBase):
    """A file of some driver, whose errors become ours."""

    def __init__(self, file: Any, url: str) -> None:
        super().__init__()
        self._file = file
        self._url = url

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return int(self._file.seek(offset, whence))

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        with explained(self._url):
            data = self._file.read(len(view))
        view[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


class _NoRangesError(Exception):
    """A web server gives whole files alone."""


def _open_web(files: Any, url: str) -> Any:
    """A file of a web server, in a temporary copy where there are no ranges."""
    try:
        return _Ranges(files, url, _receive(files, url, lambda _: None, range(1)))
    except _NoRangesError:
        with ExitStack() as stack:
            file = stack.enter_context(tempfile.TemporaryFile(prefix="weightvid-"))
            _receive(files, url, file.write)
            file.seek(0)
            stack.pop_all()
        return file


class _Ranges:
    """What `_RemoteFile` needs of a file of a web server that has ranges."""

    def __init__(self, files: Any, url: str, size: int) -> None:
        self._files, self._url, self._size, self._at = files, url, size, 0

    def seek(self, offset: int, whence: int) -> int:
        self._at = max(0, offset + (0, self._at, self._size)[whence])
        return self._at

    def read(self, count: int) -> bytes:
        span, found = range(self._at, min(self._at + count, self._size)), io.BytesIO()
        size = _receive(self._files, self._url, found.write, span) if span else self._size
        if size != self._size or found.tell() != len(span):
            raise RemoteError(f"{shown(self._url)} changes while it is read, or ends early")
        self._at += len(span)
        return found.getvalue()

    def close(self) -> None:
        pass


def _receive(
    files: Any, url: str, sink: Callable[[bytes], object], span: range | None = None
) -> int:
    """Give bytes of a web server's file to a sink; the size of the file, 0 if nobody says it.

    Raises
    ------
    RemoteError
        The server is slow, silent, endless, or contradicts itself.
    _NoRangesError
        It does not give the part that ``span`` asks for.
    """
    got, stopped = 0, False
    settings = dict(files.kwargs)
    headers = {**settings.pop("headers", {}), "Accept-Encoding": "identity"}
    if span is not None:
        headers["Range"] = f"bytes={span.start}-{span.stop - 1}"

    async def receive() -> int:
        nonlocal got
        session, began = await files.set_session(), monotonic()
        async with session.get(files.encode_url(url), headers=headers, **settings) as answer:
            answer.raise_for_status()
            size, most = _announced(answer.status, answer.headers, span)
            async for piece in answer.content.iter_any():
                got += len(piece)
                if got > most or (not size and monotonic() - began > _UNSAID_S):
                    why = f"it sends more than {most} bytes, or for ever"
                    raise RemoteError(f"cannot read {shown(url)}: {why}")
                if stopped:
                    break
                sink(piece)
        return size

    task = asyncio.run_coroutine_threadsafe(receive(), files.loop)
    try:
        while not task.done():
            before = got
            wait([task], _PATIENCE_S)
            if not task.done() and got - before < LEAST_BYTES:
                why = f"only {got - before} bytes in {_PATIENCE_S:g} seconds"
                raise RemoteError(f"cannot read {shown(url)}: {why}")
        return task.result()
    finally:
        stopped = True
        task.cancel()


def _announced(status: int, headers: Mapping[str, str], span: range | None) -> tuple[int, int]:
    """Size of a file as the head of an answer says it (0: it doesn't), and most bytes to follow."""
    if headers.get("Content-Encoding", "identity") != "identity":
        raise ConnectionError("it sends something compressed instead of the file")
    if span is not None:
        match = CONTENT_RANGE.fullmatch(headers.get("Content-Range", ""))
        if status != 206 or match is None or int(match[1]) != span.start:
            raise _NoRangesError
        return int(match[3]), len(span)
    if status != 200:
        raise ConnectionError(f"it answers {status} where the whole file is asked for")
    size = content_length(headers)
    if size > shutil.disk_usage(tempfile.gettempdir()).free:
        raise OSError(errno.ENOSPC, f"it announces {size} bytes")
    return size, size or _UNSAID_BYTES


def content_length(headers: Mapping[str, str]) -> int:
    """How long the body of an answer will be; 0 if the server does not say, or says nonsense."""
    said = _LENGTH.fullmatch(headers.get("Content-Length") or "")
    return int(said[0]) if said else 0


def check_upload(url: str, *, force: bool) -> None:
    """See that a file may be written to an address, before the work that makes it.

    Raises
    ------
    OutputError, RemoteError
        The place takes no files, or (without ``force``) has that one already; it is out of reach.
    """
    where = shown(url)
    if scheme(url) in (*WEB, "hf"):
        raise OutputError(f"cannot write {where}: {scheme(url)}:// addresses are read only")
    if not file_name(url) or url.endswith("/"):
        raise OutputError(f"cannot write {where}: name a file in it")
    files, path = find_driver(url)
    with explained(url, "write"):
        exists = files.exists(path)
    if exists and not force:
        raise OutputError(f"{where} exists already; use --force (force=True) to replace it")


def upload(path: str | os.PathLike[str], url: str) -> None:
    """Put a file where an address says (or RemoteError); a store shows it when it is complete."""
    files, target = find_driver(url)
    with explained(url, "write"):
        files.put_file(os.fspath(path), target)


def open_downloaded(url: str, progress: Report) -> CheckpointReader:
    """Download a file, a folder of an object store or a model of the hub, and open it.

    Raises
    ------
    RemoteError, CheckpointError
        It cannot be reached or read, or is no checkpoint.
    """
    folder = ScratchFolder()
    path = Path(folder.name)
    try:
        path = _bring(url, path, progress)
        reader = open_checkpoint(path)
    except BaseException as error:
        folder.cleanup()
        if isinstance(error, CheckpointError):
            # The temporary name means nothing to anybody.
            raise CheckpointError(str(error).replace(os.fspath(path), shown(url))) from None
        raise explain(url, error) if isinstance(error, Exception) else error from None
    reader.temporary = folder
    return reader


def _bring(url: str, folder: Path, progress: Report) -> Path:
    """Download what an address means; where it lies now."""
    sizes, path, fetch = _hub(url) if scheme(url) == "hf" else _store(url, folder)
    if fetch is None:
        return Path(path)
    names = _wanted(url, path, sizes)
    done, total = 0, sum(sizes[name] for name in names)

    def tell(_: int | None, value: int, **__: object) -> None:
        progress(Progress("download", done + value, max(total, done + value), unit="bytes"))

    for name in names:
        tell(None, 0)
        local = fetch(name, tell)
        done += local.stat().st_size
        if name == path and name.endswith(".onnx"):
            from weightvid.checkpoint.onnx_file import files_beside

            beside = (str(PurePosixPath(name).parent / other) for other in files_beside(local))
            names += [other for other in beside if other in sizes]
    # All lie below one folder.
    return local.parents[name.count("/")] / path


def _hub(url: str) -> tuple[Mapping[str, int], str, _Fetch | None]:
    """Files of a model with their sizes, the path that is meant; without a way: all is cached."""
    match = _HUB.fullmatch(url.partition("://")[2].rstrip("/"))
    if match is None:
        raise RemoteError(f"{url} names no model: write hf://org/model[@revision][/file]")
    repo, revision, path = match["repo"], match["revision"], match["path"] or ""
    hub: Any = import_module("huggingface_hub")
    try:
        info = hub.HfApi().model_info(repo, revision=revision, files_metadata=True)
    except Exception as error:
        if _UNREACHABLE.search(" ".join(cls.__name__ for cls in type(error).__mro__)):
            with suppress(Exception):
                root = hub.snapshot_download(repo, revision=revision, local_files_only=True)
                return {}, str(Path(root, path)), None
        raise

    def fetch(name: str, _: Callable[..., None]) -> Path:
        # By the name of the revision, so that the cache learns what it stands for.
        return Path(hub.hf_hub_download(repo, name, revision=revision))

    return {entry.rfilename: entry.size or 0 for entry in info.siblings or ()}, path, fetch


def _store(url: str, folder: Path) -> tuple[Mapping[str, int], str, _Fetch]:
    """The same of a folder in an object store, or of a file; of a web server, of one file."""
    files, place = find_driver(url)
    callback = import_module("fsspec.callbacks").Callback
    name, root = "", place.rstrip("/")
    if scheme(url) in WEB or not files.isdir(place):
        name, root = file_name(url), place.rpartition("/")[0]
        if not name or url.endswith("/") or not is_safe_path(name):
            raise RemoteError(f"{shown(url)} names no file, and its folder cannot be listed")
    sizes = {name: 0} if name else {}
    if not name or (name.endswith(".onnx") and scheme(url) not in WEB):
        listed = files.ls(root) if name else files.find(root, detail=True).values()
        for about in listed:
            sizes[about["name"].removeprefix(f"{root}/")] = int(about.get("size") or 0)

    def fetch(wanted: str, tell: Callable[..., None]) -> Path:
        local = folder / wanted
        local.parent.mkdir(parents=True, exist_ok=True)
        if scheme(url) in WEB:
            with local.open("wb") as file:
                _receive(files, place, lambda piece: tell(None, file.tell() + file.write(piece)))
            return local
        source = place if wanted == name else f"{root}/{wanted}"
        files.get_file(source, os.fspath(local), callback=callback(hooks={"progress": tell}))
        return local

    return sizes, name, fetch


def _wanted(url: str, path: str, sizes: Mapping[str, int]) -> list[str]:
    """Files of a listing that a path in it means: one, those of a folder, or of all."""
    if path in sizes:
        return [path]
    prefix = f"{path}/" if path else ""
    inside = {n.removeprefix(prefix): s for n, s in sizes.items() if n.startswith(prefix)}
    if not inside:
        raise RemoteError(f"there is no {url}; the model has {shorten(sizes)}")
    if "Manifest.json" in inside and any(name.startswith("Data/") for name in inside):
        return [prefix + name for name in inside if is_safe_path(name)]
    weights = find_weights([name for name in inside if "/" not in name])
    if not weights:
        raise CheckpointError(advice(shown(url).rstrip("/"), inside))
    if is_index(weights[0]):
        start, end = weights[0].split(".index.")[0].rsplit(".", 1)
        weights += [n for n in inside if n.startswith(start) and n.endswith(end) and "/" not in n]
    small = [
        name
        for name, size in inside.items()
        if size <= SIDE_FILE_BYTES
        and (PurePosixPath(name).suffix.lower() not in WEIGHTS or _MODULE.match(name))
        and is_safe_path(name)
        and not any(part.startswith(".") for part in name.split("/"))
    ]
    return [prefix + name for name in sorted({*weights, *small})]


def find_driver(url: str) -> tuple[Any, str]:
    """File system of fsspec for an address, and the path in it."""
    options: dict[str, Any] = {}
    with explained(url):
        fsspec: Any = import_module("fsspec")
        if scheme(url) in WEB:
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
    # fsspec says of any trouble of a web server that there is no such file.
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
    return RemoteError(f"cannot {verb} {where}: {type(error).__name__}: {said}")

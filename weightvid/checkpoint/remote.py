"""Files at addresses, through fsspec: web servers, object stores, the Hugging Face hub.

fsspec and what it needs are imported when an address is used, never before.
"""

from __future__ import annotations

import errno
import io
import os
import re
import tempfile
from importlib import import_module
from typing import TYPE_CHECKING, Any, BinaryIO, Final, TypeGuard, cast
from urllib.parse import unquote

from weightvid.errors import OutputError, RemoteError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

WEB: Final = ("http", "https")
#: two letters at least: one is a drive of Windows.
_URL: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://.")
_BLOCK_BYTES: Final = 1 << 22
#: seconds that a server may take to answer, and to send the next byte.
_CONNECT_S, _SILENCE_S = 30.0, 60.0
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
_SECRETS: Final = re.compile(r"(?<=://)[^/\s@]*@|\?[^\s'\")]*")


def is_url(source: object) -> TypeGuard[str]:
    """Whether a source is an address rather than a path.

    Examples
    --------
    >>> is_url("https://example.org/m.mp4"), is_url("C://m.mp4"), is_url("models/m.mp4")
    (True, False, False)
    """
    return isinstance(source, str) and _URL.match(source) is not None


def scheme(url: str) -> str:
    """Scheme of an address, in lower case."""
    return url.partition("://")[0].lower()


def shown(url: str) -> str:
    """An address as messages may show it: without password and query, which may hold secrets."""
    return url if scheme(url) == "hf" else _SECRETS.sub("", url).partition("#")[0]


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
    try:
        file = files.open(path, "rb", block_size=_BLOCK_BYTES)
        try:
            # Not every server that tells a size has ranges.
            file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
            file.read(1)
            file.seek(0)
        except (ValueError, TypeError, io.UnsupportedOperation):
            file.close()
            file = tempfile.TemporaryFile(prefix="weightvid-")  # noqa: SIM115 - it is returned
            files.get_file(path, file)
            file.seek(0)
    except Exception as error:
        raise explain(url, error) from None
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
        try:
            data = self._file.read(len(view))
        except Exception as error:
            raise explain(self._url, error) from None
        view[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


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
    try:
        exists = files.exists(path)
    except Exception as error:
        raise explain(url, error, "write") from None
    if exists and not force:
        raise OutputError(f"{where} exists already; use --force (force=True) to replace it")


def upload(path: str | os.PathLike[str], url: str) -> None:
    """Put a file where an address says (or RemoteError); a store shows it when it is complete."""
    files, target = find_driver(url)
    try:
        files.put_file(os.fspath(path), target)
    except Exception as error:
        raise explain(url, error, "write") from None


def find_driver(url: str) -> tuple[Any, str]:
    """File system of fsspec for an address, and the path in it."""
    options: dict[str, Any] = {}
    try:
        fsspec: Any = import_module("fsspec")
        if scheme(url) in WEB:
            # aiohttp's own limit is five minutes for a whole file.
            patience = import_module("aiohttp").ClientTimeout(
                total=None, sock_connect=_CONNECT_S, sock_read=_SILENCE_S
            )
            settings = fsspec.config.conf.get(scheme(url), {}).get("client_kwargs", {})
            options["client_kwargs"] = {"trust_env": True, "timeout": patience, **settings}
            # What is quoted already stays as it is: signatures are of the very characters.
            options["encoded"] = url.isascii() and " " not in url
        files, path = fsspec.url_to_fs(url, **options)
    except Exception as error:
        raise explain(url, error) from None
    return files, str(path)


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
    said = _SECRETS.sub("", " ".join(str(error).split()) or type(error).__name__)[:300]
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

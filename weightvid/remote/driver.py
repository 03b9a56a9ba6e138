"""Files in object stores and elsewhere, through fsspec's drivers: ``s3://``, ``gs://``, ..."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, Final

from weightvid.errors import RemoteError
from weightvid.remote.address import scheme, shown
from weightvid.remote.retry import TransferError
from weightvid.remote.store import Answer, Store, need

#: asked for at once; what is lost when a connection is cut.
_PIECE_BYTES: Final = 8 << 20
#: our extras that bring a driver.
_EXTRAS: Final = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}
#: names of classes of errors, of whatever library, that no second try mends.
_CREDENTIALS: Final = frozenset(
    {
        *("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "SSOTokenLoadError"),
        *("UnauthorizedSSOTokenError", "TokenRetrievalError", "CredentialRetrievalError"),
        *("DefaultCredentialsError", "RefreshError", "ClientAuthenticationError"),
        "AuthenticationException",
    }
)
_LOGIN: Final = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE; for a public bucket set "
    "FSSPEC_S3_ANON=true",
    "gs": "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS; for "
    "a public bucket set FSSPEC_GS_TOKEN=anon",
}


def open_store(url: str) -> Store:
    """A file that one of fsspec's drivers reaches.

    Raises
    ------
    RemoteError
        No such driver, or the package behind it is missing.
    """
    return DriverStore(url, *find_driver(url))


def find_driver(url: str) -> tuple[Any, str]:
    """File system and path in it.

    Raises
    ------
    RemoteError
        No such driver, or the package behind it is missing.
    """
    core: Any = need("fsspec.core", "remote", url)
    try:
        files, path = core.url_to_fs(url)
    except ImportError as error:
        extra = _EXTRAS.get(scheme(url))
        get = f"pip install 'weightvid[{extra}]'" if extra else " ".join(str(error).split())
        raise RemoteError(f"a package is missing for {scheme(url)}:// addresses: {get}") from None
    except ValueError as error:
        raise RemoteError(f"cannot read {shown(url)}: {error}") from None
    except Exception as error:
        raise explain(url, error) from None
    return files, str(path)


def explain(url: str, error: Exception) -> Exception:
    """A driver's error as one of ours."""
    where = shown(url)
    names = {cls.__name__ for cls in type(error).__mro__}
    said = " ".join(str(error).split()) or type(error).__name__
    login = _LOGIN.get(_EXTRAS.get(scheme(url), ""), "check the credentials")
    if names & _CREDENTIALS:
        return RemoteError(f"cannot read {where}: {said}; {login}")
    if isinstance(error, PermissionError):
        return RemoteError(f"cannot read {where}: access is refused ({said}); {login}")
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return RemoteError(f"there is no {where}; check the address")
    if isinstance(error, IsADirectoryError):
        return RemoteError(f"{where} is a folder; name a file in it")
    if isinstance(error, OSError) or names & {"ClientError", "BotoCoreError", "HTTPClientError"}:
        return TransferError(said)
    return RemoteError(f"cannot read {where}: {type(error).__name__}: {said}")


class DriverStore(Store):
    """A file of one of fsspec's file systems."""

    def __init__(self, url: str, files: Any, path: str) -> None:
        super().__init__(url)
        self._files = files
        self._path = path
        self._info: dict[str, Any] | None = None

    def request(self, begin: int, end: int | None) -> Answer:
        """Ask for a range; the first time, for the size too."""
        try:
            if self._info is None:
                self._info = self._files.info(self._path)
        except Exception as error:
            raise explain(self.url, error) from None
        if self._info.get("type") == "directory":
            raise RemoteError(f"{self.shown} is a folder; name a file in it")
        size = self._info.get("size")
        if size is None:
            return Answer(0, None, False, "", self._stream())
        stop = int(size) if end is None else min(end, int(size))
        return Answer(begin, int(size), True, "", self._pieces(begin, stop))

    def _pieces(self, begin: int, end: int) -> Generator[bytes]:
        for at in range(begin, end, _PIECE_BYTES):
            stop = min(end, at + _PIECE_BYTES)
            try:
                data = self._files.cat_file(self._path, start=at, end=stop)
            except Exception as error:
                raise explain(self.url, error) from None
            if len(data) > stop - at:
                raise RemoteError(f"the store of {self.shown} answers with other bytes than asked")
            yield bytes(data)
            if len(data) < stop - at:
                raise TransferError("the answer is cut short")

    def _stream(self) -> Generator[bytes]:
        try:
            with self._files.open(self._path, "rb", block_size=0) as file:
                while data := file.read(1 << 20):
                    yield data
        except RemoteError:
            raise
        except Exception as error:
            raise explain(self.url, error) from None


def list_folder(url: str) -> list[tuple[str, int]]:
    """Relative paths and sizes of the files below an address; empty if it is a file.

    Raises
    ------
    RemoteError
        Nothing there, no access, no connection.
    """
    files, path = find_driver(url)
    try:
        if files.info(path).get("type") != "directory":
            return []
        found = files.find(path, detail=True)
    except Exception as error:
        explained = explain(url, error)
        if isinstance(explained, TransferError):
            explained = RemoteError(f"cannot read {shown(url)}: {explained}")
        raise explained from None
    prefix = path.rstrip("/") + "/"
    return [
        (name.removeprefix(prefix), int(info.get("size") or 0))
        for name, info in sorted(found.items())
        if name.startswith(prefix)
    ]

"""Bringing a finished file to an address."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from weightvid.errors import OutputError
from weightvid.remote.address import file_name, scheme, shown

_NO_UPLOADS = ("http", "https", "hf")


def check_target(url: str, *, force: bool) -> None:
    """See that a file may be written to an address, before the work that makes it.

    Raises
    ------
    OutputError
        The place takes no files, or one is there already.
    RemoteError
        It cannot be reached.
    """
    if scheme(url) in _NO_UPLOADS:
        raise OutputError(
            f"cannot write to {shown(url)}: {scheme(url)}:// addresses are read only; write a file "
            "here and upload it"
        )
    if not file_name(url) or url.endswith("/"):
        raise OutputError(f"cannot write to {shown(url)}: name a file in it")
    if not force and _exists(url):
        raise OutputError(f"{shown(url)} exists already; use --force (force=True) to replace it")


def _exists(url: str) -> bool:
    from weightvid.remote.driver import find_driver

    files, path = find_driver(url)
    return bool(_told(url, lambda: files.exists(path)))


def upload(path: Path, url: str) -> None:
    """Put a file where an address says; an object store shows it when all of it has arrived.

    Raises
    ------
    OutputError
        No access, no such bucket, no connection.
    """
    from weightvid.remote.driver import find_driver

    files, target = find_driver(url)
    _told(url, lambda: files.put_file(str(path), target))


def _told(url: str, function: Any) -> Any:
    from weightvid.remote.driver import explain

    try:
        return function()
    except Exception as error:
        said = str(explain(url, error))
        if isinstance(error, FileNotFoundError):
            said = "there is no such bucket or folder"
        said = said.removeprefix(f"cannot read {shown(url)}: ")
        raise OutputError(f"cannot write to {shown(url)}: {said}") from None

"""What a place where files lie must offer, and the choice of one for an address."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType
from typing import Final, cast

from weightvid.errors import RemoteError
from weightvid.remote.address import scheme, shown

#: scheme -> module with ``open_store(url)``; whatever is not here goes to fsspec's own drivers.
_STORES: Final = {"http": "web", "https": "web", "hf": "hub"}
_OTHERS: Final = "driver"


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer to one request.

    Attributes
    ----------
    first : int
        Offset in the file of the first byte that comes; 0 if ranges are not known there.
    total_bytes : int or None
        Of the whole file, if known.
    ranged : bool
        Whether ranges can be asked for.
    tag : str
        Changes when the file does; empty if there is no such thing.
    chunks : generator of bytes
        Raises :class:`~weightvid.remote.retry.TransferError` where it breaks. Closing it
        ends the transfer.
    """

    first: int
    total_bytes: int | None
    ranged: bool
    tag: str
    chunks: Generator[bytes] = field(repr=False)


class Store(ABC):
    """One file that lies elsewhere.

    Parameters
    ----------
    url : str
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.shown = shown(url)

    @abstractmethod
    def request(self, begin: int, end: int | None) -> Answer:
        """Ask once for the bytes from ``begin`` to ``end`` (or to the end of the file).

        Raises
        ------
        TransferError
            It may go better next time.
        RemoteError
            It will not.
        """


def open_store(url: str) -> Store:
    """The file at an address; nothing has been asked of its place yet.

    Raises
    ------
    RemoteError
        The scheme is unknown, or a package that it needs is missing.
    """
    module = import_module(f"weightvid.remote.{_STORES.get(scheme(url), _OTHERS)}")
    return cast(Store, module.open_store(url))


def need(package: str, extra: str, url: str) -> ModuleType:
    """Import a package, or say how to get it.

    Raises
    ------
    RemoteError
        It is not installed.
    """
    try:
        return import_module(package)
    except ImportError as error:
        raise RemoteError(
            f"{package.partition('.')[0]} is needed for {scheme(url)}:// addresses ({error}): "
            f"pip install 'weightvid[{extra}]'"
        ) from None

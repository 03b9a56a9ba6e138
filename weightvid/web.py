"""One answer of a web server, with an end to every wait: for headers, and for the next bytes."""

from __future__ import annotations

import socket
import threading
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from contextlib import suppress
from http.client import HTTPConnection, HTTPSConnection
from queue import Empty, Full, Queue
from time import monotonic
from typing import Any, Final
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from weightvid.checkpoint.remote import LEAST_BYTES
from weightvid.version import __version__

_PIECE, _PIECES = 1 << 15, 4
#: what is left as it is in an address.
_QUOTED: Final = "%/:=&?~#+!$,;'@()*[]"


class Answer:
    """An answer of a server, read in a thread of its own, so that every wait has an end."""

    def __init__(self, url: str, start: int, patience: float) -> None:
        self._url, self._start, self._patience = url, start, patience
        self._pieces: Queue[Any] = Queue(_PIECES)
        self._left, self._sockets, self._answers = threading.Event(), list[Any](), list[Any]()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        headers = {
            "Range": f"bytes={self._start}-", "Accept-Encoding": "identity",
            "User-Agent": f"weightvid/{__version__}",
        }  # fmt: skip
        try:
            parts = urlsplit(self._url)
            user, _, host = parts.netloc.rpartition("@")
            address = quote(urlunsplit(parts._replace(netloc=host)), _QUOTED)
            request = urllib.request.Request(address, headers=headers)
            if user:  # for this server alone, not for one that it redirects to
                secret = b64encode(unquote(user).encode()).decode()
                request.add_unredirected_header("Authorization", f"Basic {secret}")
            # Whoever waits for the queue gives up first, and says so.
            with self._opener().open(request, timeout=2 * self._patience) as response:
                self._put((response.status, response.headers))
                while piece := response.read1(_PIECE):
                    self._put(piece)
            self._put(b"")
        except _LeftError:
            pass
        except Exception as error:
            with suppress(_LeftError):
                self._put(error)
        finally:
            for each in self._answers:
                each.close()

    def _opener(self) -> urllib.request.OpenerDirector:
        """What opens addresses of the web, and never follows one to a file or an FTP server."""
        sockets, answers = self._sockets, self._answers

        def watched(kind: Any) -> Any:
            class Connection(kind):  # type: ignore[misc]
                def connect(self) -> None:
                    super().connect()
                    sockets.append(self.sock)

                def getresponse(self) -> Any:
                    answers.append(super().getresponse())
                    return answers[-1]

            return Connection

        class Handler(urllib.request.HTTPHandler):
            def http_open(self, req: urllib.request.Request) -> Any:
                return self.do_open(watched(HTTPConnection), req)

        class SecureHandler(urllib.request.HTTPSHandler):
            def https_open(self, req: urllib.request.Request) -> Any:
                return self.do_open(watched(HTTPSConnection), req)

        opener = urllib.request.OpenerDirector()
        for handler in (
            urllib.request.ProxyHandler, urllib.request.UnknownHandler, Handler, SecureHandler,
            urllib.request.HTTPDefaultErrorHandler, urllib.request.HTTPRedirectHandler,
            urllib.request.HTTPErrorProcessor,
        ):  # fmt: skip
            opener.add_handler(handler())
        return opener

    def _put(self, item: Any) -> None:
        while not self._left.is_set():
            with suppress(Full):
                self._pieces.put(item, timeout=0.1)
                return
        raise _LeftError

    def _next(self, patience: float | None = None) -> Any:
        try:
            item = self._pieces.get(timeout=self._patience if patience is None else patience)
        except Empty:
            raise TimeoutError(f"nothing for {self._patience:g} seconds") from None
        if isinstance(item, Exception):
            raise item
        return item

    def __iter__(self) -> Iterator[bytes]:
        waited, got = 0.0, 0
        while True:
            before = monotonic()
            piece = self._next(max(0.0, self._patience - waited))
            waited, got = waited + monotonic() - before, got + len(piece)
            if not piece:
                return
            yield piece
            if got >= LEAST_BYTES:
                waited, got = 0.0, 0

    def __enter__(self) -> Answer:
        try:
            self.status, self.headers = self._next()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the server, and wake the thread if it waits or is kept busy."""
        self._left.set()
        for each in self._sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


class _LeftError(Exception):
    """Nobody waits for the answer any more."""

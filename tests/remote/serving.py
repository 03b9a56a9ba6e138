"""A real HTTP server on loopback that behaves as badly as it is told to."""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Served:
    """One file, and how it is served.

    Attributes
    ----------
    data : bytes
    ranges : bool
    cuts : list of int
        The next answers end after so many bytes of their body, one entry each.
    statuses : list of int
        The next answers have these, and no body.
    headers : dict
        Sent along; those that the server makes itself are replaced.
    pauses : list of float
        Seconds before the body of the next answers.
    piece_bytes, piece_pause_s : int, float
        A slow line.
    shift : int
        Ranges begin so many bytes off.
    """

    data: bytes
    ranges: bool = True
    cuts: list[int] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    pauses: list[float] = field(default_factory=list)
    piece_bytes: int = 1 << 16
    piece_pause_s: float = 0.0
    shift: int = 0


@dataclass(frozen=True)
class Asked:
    """A request as it came, and what was sent."""

    method: str
    path: str
    range: str | None
    headers: dict[str, str]
    sent: list[int]


class Site:
    """Files by path, and what was asked for (``targets``: the paths as they came)."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.files: dict[str, Served] = {}
        self.asked: list[Asked] = []
        self.targets: list[str] = []

    def put(self, name: str, data: bytes, **more: Any) -> str:
        """Serve bytes; gives their address."""
        copies = {k: list(v) if isinstance(v, list) else v for k, v in more.items()}
        self.files[name] = Served(data, **copies)
        return f"{self.url}/{name}"

    @property
    def sent_bytes(self) -> int:
        """Of all bodies, as far as they left the server."""
        return sum(asked.sent[0] for asked in self.asked)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def do_HEAD(self) -> None:
        self._serve(body=False)

    def do_GET(self) -> None:
        self._serve(body=True)

    def log_message(self, *_: object) -> None:
        pass

    def _serve(self, body: bool) -> None:
        site: Site = self.server.site
        path = unquote(urlsplit(self.path).path).lstrip("/")
        site.targets.append(self.path)
        sent = [0]
        wanted = self.headers.get("Range")
        site.asked.append(Asked(self.command, path, wanted, dict(self.headers), sent))
        served = site.files.get(path)
        status = 404 if served is None else served.statuses.pop(0) if served.statuses else 0
        if served is None or status:
            self.send_response(status)
            for name, value in (served.headers if served else {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        size = len(served.data)
        begin, end, status = 0, size, 200
        headers = {"Content-Type": "application/octet-stream"}
        if served.ranges and wanted:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            begin, end = int(first), min(size, int(last) + 1) if last else size
            status = 206
            headers["Content-Range"] = f"bytes {begin + served.shift}-{end - 1}/{size}"
            if begin >= size:
                status, begin, end = 416, 0, 0
                headers["Content-Range"] = f"bytes */{size}"
        headers["Content-Length"] = str(end - begin)
        self.send_response(status)
        for name, value in {**headers, **served.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self._body(served, served.data[begin:end], sent)

    def _body(self, served: Served, data: bytes, sent: list[int]) -> None:
        self.wfile.flush()
        if served.pauses:
            time.sleep(served.pauses.pop(0))
        limit = served.cuts.pop(0) if served.cuts else None
        try:
            for at in range(0, len(data), served.piece_bytes):
                piece = data[at : at + served.piece_bytes]
                if limit is not None:
                    piece = piece[: limit - at] if at < limit else b""
                self.wfile.write(piece)
                sent[0] += len(piece)
                if limit is not None and sent[0] >= limit:
                    break
                time.sleep(served.piece_pause_s)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        if limit is not None or len(data) != int(served.headers.get("Content-Length", len(data))):
            self.close_connection = True


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    # A client that goes away is no error.
    handle_error = staticmethod(lambda *_: None)  # type: ignore[assignment]


@contextmanager
def serve(certificate: Path | None = None) -> Iterator[Site]:
    """A site until the block ends; with a certificate (and key in one file), over TLS."""
    server: Any = _Server(("127.0.0.1", 0), _Handler)
    scheme = "http"
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        scheme = "https"
    server.site = Site(f"{scheme}://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server.site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

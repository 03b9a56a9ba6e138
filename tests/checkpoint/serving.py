"""A web server of this machine."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Served:
    """One file of a site; ``status`` is the answer to all requests, unless it is 0."""

    data: bytes
    ranges: bool = True
    status: int = 0
    cut: int | None = None
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Site:
    """Files by their path, and what was asked for."""

    url: str
    files: dict[str, Served] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def put(self, name: str, data: bytes, **more: Any) -> str:
        """Serve bytes; gives their address."""
        self.files[name] = Served(data, **more)
        return f"{self.url}/{name}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def do_HEAD(self) -> None:
        self._serve(body=False)

    def do_GET(self) -> None:
        self._serve(body=True)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._serve(body=True)

    def log_message(self, *_: object) -> None:
        pass

    def _serve(self, body: bool) -> None:
        site: Site = self.server.site
        site.asked.append(self.path)
        served = site.files.get(
            unquote(urlsplit(self.path).path).lstrip("/"), Served(b"", True, 404)
        )
        status, data = served.status or 200, served.data
        wanted = self.headers.get("Range")
        headers = dict(served.headers)
        if served.ranges and wanted and not served.status:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            end = min(len(data), int(last or len(data)) + 1)
            headers["Content-Range"] = f"bytes {first}-{end - 1}/{len(data)}"
            status, data = 206, data[int(first) : end]
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            with suppress(ConnectionError):
                self.wfile.write(data[: served.cut])
        self.close_connection = served.cut is not None


@contextmanager
def serve() -> Iterator[Site]:
    """A site until the block ends."""
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # a client that goes away is no error
    server.site = Site(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server.site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

"""One tensor out of an archive over HTTP: requests and bytes, against frames and index.

    python tools/bench_remote.py model.mp4 [--tensor NAME] [--no-ranges]

Serves the file on loopback and counts what leaves the server.
"""

from __future__ import annotations

import argparse
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from weightvid.loader import Archive, open_archive

_CHUNK = 1 << 16


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        path: Path = self.server.path
        size = path.stat().st_size
        begin, end = 0, size
        wanted = self.headers.get("Range") if self.server.ranges else None
        self.server.requests.append(wanted)
        if wanted:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            begin, end = int(first), min(size, int(last) + 1) if last else size
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{size}")
        self.send_header("Content-Length", str(end - begin))
        self.end_headers()
        with path.open("rb") as file:
            file.seek(begin)
            left = end - begin
            while left and (data := file.read(min(_CHUNK, left))):
                try:
                    self.wfile.write(data)
                except OSError:
                    self.close_connection = True
                    return
                self.server.sent += len(data)
                left -= len(data)


@contextmanager
def _serve(path: Path, ranges: bool) -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.path, server.ranges, server.requests, server.sent = path, ranges, [], 0
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _own_bytes(archive: Archive, name: str, file_bytes: int) -> tuple[int, int]:
    """Bytes of a tensor's frames, and of all that follows the last frame."""
    entries = archive.index.frames
    frames = sum(entries[n].end - entries[n].offset for n in archive.frames_of(name))
    ends = [entry.end for entry in entries]
    ends += [entry.offset + entry.box_bytes for entry in archive.index.exact]
    return frames, file_bytes - max(ends)


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("archive", type=Path)
    parser.add_argument("--tensor")
    parser.add_argument("--no-ranges", action="store_true")
    options = parser.parse_args()
    path: Path = options.archive
    with open_archive(path) as here:
        on_frames = [name for name in here.names if here.frames_of(name)]
        name = options.tensor or on_frames[len(on_frames) // 2]
        frames, index = _own_bytes(here, name, path.stat().st_size)
        expected = here.stored(name)
    with _serve(path, not options.no_ranges) as server:
        began = perf_counter()
        with open_archive(f"http://127.0.0.1:{server.server_address[1]}/{path.name}") as there:
            found = there.stored(name)
            received = there.bytes_read
        seconds = perf_counter() - began
        sent, requests = server.sent, len(server.requests)
    print(
        json.dumps(
            {
                "archive_bytes": path.stat().st_size,
                "tensor": name,
                "weights": expected.size,
                "requests": requests,
                "sent_bytes": sent,
                "read_bytes": received,
                "frame_bytes": frames,
                "index_bytes": index,
                "beyond_bytes": sent - frames - index,
                "equal": bool(np.array_equal(found, expected)),
                "seconds": round(seconds, 3),
            }
        )
    )


if __name__ == "__main__":
    main()

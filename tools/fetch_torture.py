"""Kills and cuts downloads at random, and looks at what is there in the end.

    python tools/fetch_torture.py model.mp4 --kills 100 --cuts 100 --seed 1

A server of this machine sends an archive and breaks connections off; meanwhile `weightvid fetch`
is killed and started again. Each download must end with the right file. Bytes that the server sent
and nobody kept are counted: between a start and its end, of two frames at most.
"""

from __future__ import annotations

import argparse
import hashlib
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random
from typing import Any

from weightvid.loader import open_archive

_PIECE = 1 << 13


@dataclass
class Site:
    """A server's file, how often it breaks off, what it did."""

    data: bytes
    random: Random
    cuts: int = 0
    sent: int = 0
    cut: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def length_of_answer(self, wanted: int) -> int:
        """How much of an answer is sent before the connection breaks."""
        with self.lock:
            if self.cut < self.cuts and self.random.random() < 0.8:
                self.cut += 1
                return self.random.randrange(wanted + 1)
        return wanted


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        site: Site = self.server.site
        # What waits in the system's buffers is lost with a client.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _PIECE)
        first = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        size = len(site.data)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{size - 1}/{size}")
        self.send_header("Content-Length", str(size - first))
        self.send_header("ETag", f'"{hashlib.sha256(site.data).hexdigest()[:16]}"')
        self.end_headers()
        end = first + site.length_of_answer(size - first)
        with suppress(OSError):
            for at in range(first, end, _PIECE):
                self.wfile.write(site.data[at : min(at + _PIECE, end)])
                site.sent += min(_PIECE, end - at)
                # All of it takes a second or more, in which to be killed.
                time.sleep(_PIECE / min(4e6, len(site.data)))
        self.close_connection = True


@contextmanager
def serve(site: Site) -> Iterator[str]:
    """Address of the file until the block ends."""
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads, server.site = True, site
    server.handle_error = lambda *_: None
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/model.mp4"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@dataclass
class Outcome:
    """Downloads that ended, kills, cuts, and the most frames sent in vain in one run."""

    downloads: int = 0
    kills: int = 0
    cuts: int = 0
    worst: float = 0.0


def torture(data: bytes, folder: Path, kills: int, cuts: int, seed: int) -> Outcome:
    """Download again and again until there were so many kills and cuts.

    Raises
    ------
    AssertionError
        A file is wrong, or too much was sent twice.
    """
    random, outcome = Random(seed), Outcome()
    index = open_archive(data).index
    frame = max(size for _, size in (index.frames if index else ()))
    command = [sys.executable, "-m", "weightvid", "fetch", "--patience", "20", "-o"]
    while outcome.kills < kills or outcome.cuts < cuts:
        target = folder / f"{outcome.downloads}.mp4"
        site = Site(data, random, random.randrange(1, 8) if outcome.cuts < cuts else 0)
        wasted, done = 0, False
        with serve(site) as url:
            while not done:
                before = kept(target)
                sent = site.sent
                child = subprocess.Popen(
                    [*command, target, url], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
                )
                killed = outcome.kills < kills and random.random() < 0.8
                while killed and site.sent == sent and child.poll() is None:
                    time.sleep(0.01)  # it takes a while to begin
                with suppress(subprocess.TimeoutExpired):
                    child.wait(random.random() * 1.5 if killed else None)
                    killed = False
                child.kill()
                said = child.communicate()[1]
                outcome.kills += killed
                time.sleep(0.05)
                wasted = max(wasted, site.sent - sent - (kept(target) - before))
                done = target.exists()
                if not done and not killed:
                    raise AssertionError(said.decode())
        if target.read_bytes() != data:
            raise AssertionError(f"{target} is not what the server has")
        if list(folder.glob(".*")):
            raise AssertionError(f"left behind: {list(folder.glob('.*'))}")
        target.unlink()
        outcome.downloads, outcome.cuts = outcome.downloads + 1, outcome.cuts + site.cut
        outcome.worst = max(outcome.worst, wasted / frame)
        if outcome.worst > 2:
            raise AssertionError(f"{outcome.worst:.2f} frames were fetched twice")
    return outcome


def kept(target: Path) -> int:
    """Bytes of a download that are there."""
    part = target.with_name(f".{target.name}.part")
    found = [path.stat().st_size for path in (target, part) if path.exists()]
    return max(found, default=0)


def main() -> None:
    parser = argparse.ArgumentParser(description="kill and cut downloads")
    parser.add_argument("archive", type=Path)
    for name, default in (("kills", 100), ("cuts", 100), ("seed", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = torture(
            options.archive.read_bytes(), Path(folder), options.kills, options.cuts, options.seed
        )
    print(
        f"{found.downloads} downloads, all right, with {found.kills} kills and {found.cuts} cuts; "
        f"at most {found.worst:.2f} frames fetched twice; {time.monotonic() - began:.0f} s"
    )


if __name__ == "__main__":
    main()

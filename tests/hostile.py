"""A web server that sends what nobody expects, by raw sockets, and the ways in which it does."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Final

Talk = Callable[[socket.socket, bytes, int], object]


@contextmanager
def server(talk: Talk) -> Iterator[str]:
    """A server that sends what a function sends, given the request and its number."""
    listener = socket.create_server(("127.0.0.1", 0))

    def answer(connection: socket.socket, number: int) -> None:
        with connection, suppress(OSError):
            request = b""
            while b"\r\n\r\n" not in request:
                piece = connection.recv(4096)
                if not piece:
                    return
                request += piece
            talk(connection, request, number)

    def accept() -> None:
        number = 0
        with suppress(OSError):
            while True:
                thread = threading.Thread(target=answer, args=(listener.accept()[0], number))
                thread.daemon = True
                thread.start()
                number += 1

    thread = threading.Thread(target=accept)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/model.mp4"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def send_forever(connection: socket.socket, data: bytes, pause: float = 0.0) -> None:
    """The same again and again, until nobody listens any more."""
    while True:
        connection.sendall(data)
        time.sleep(pause)


def drip(connection: socket.socket, data: bytes) -> None:
    """A byte at a time."""
    for at in range(len(data)):
        connection.sendall(data[at : at + 1])
        time.sleep(0.02)


def say(data: bytes, then: bytes = b"", pause: float = 0.01) -> Talk:
    """Something once, and then something else for ever, or nothing at all."""

    def talk(connection: socket.socket, _: bytes, __: int) -> None:
        connection.sendall(data)
        if then:
            send_forever(connection, then, pause)
        time.sleep(3)

    return talk


def of_request(make: Callable[[bytes], bytes]) -> Talk:
    """An answer that depends on the request."""
    return lambda connection, request, _: connection.sendall(make(request))


def _range(request: bytes) -> tuple[int, int]:
    match = re.search(rb"bytes=(\d+)-(\d*)", request)
    return (int(match[1]), int(match[2] or 1 << 20)) if match else (0, 1 << 20)


def _one_byte(request: bytes) -> bytes:
    first, _ = _range(request)
    said = b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes %d-%d/1000000\r\n"
    return said % (first, first) + b"Content-Length: 1\r\nConnection: close\r\n\r\n\0"


def _path(request: bytes) -> bytes:
    return request.split()[1]


_OK: Final = b"HTTP/1.1 200 OK\r\n"
_PART: Final = b"HTTP/1.1 206 Partial Content\r\n"
_CHUNKED: Final = _OK + b"Transfer-Encoding: chunked\r\n\r\n"
_DIGITS: Final = b"9" * 5000
HOSTILE: Final[dict[str, Talk]] = {
    "silence": say(b""),
    "silence behind the head": say(_OK + b"Content-Length: 99999\r\n\r\n"),
    "no HTTP": say(b"SSH-2.0-OpenSSH_9\r\n"),
    "head by the byte": say(_OK + b"A: ", b"x", 0.02),
    "endless head": say(_OK, b"A: b\r\n", 0.0),
    "endless line": say(_OK + b"A: ", b"x" * 4096, 0.0),
    "flood of 100": say(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.0),
    "flood of 103": say(b"", b"HTTP/1.1 103 Early Hints\r\n\r\n", 0.0),
    "body by the byte": say(_OK + b"Content-Length: 99999\r\n\r\n", b"x", 0.02),
    "no chunk": say(_CHUNKED + b"ZZZ\r\n"),
    "chunk of minus one": say(_CHUNKED + b"-1\r\nabc\r\n"),
    "chunk without end": say(_CHUNKED + b"5\r\nabc"),
    "long chunk size": say(_CHUNKED + _DIGITS + b"\r\nabc"),
    "endless chunk size": say(_CHUNKED, b"0", 0.0),
    "endless chunk extension": say(_CHUNKED + b"5;", b"a" * 4096, 0.0),
    "endless trailer": say(_CHUNKED + b"0\r\n", b"A: b\r\n", 0.0),
    "endless chunks": say(_CHUNKED, b"4000\r\n" + bytes(0x4000) + b"\r\n", 0.0),
    "endless body": say(_OK + b"\r\n", bytes(1 << 16), 0.0),
    "more than there is room for": say(_OK + b"Content-Length: 99999999999999999\r\n\r\n", b"x", 0),
    "long length": say(_OK + b"Content-Length: " + _DIGITS + b"\r\n\r\nabc"),
    "negative length": say(_OK + b"Content-Length: -5\r\n\r\nabc"),
    "two lengths": say(_OK + b"Content-Length: 5\r\nContent-Length: 9\r\n\r\nabc"),
    "long range": say(_PART + b"Content-Range: bytes 0-0/" + _DIGITS + b"\r\n\r\nabc"),
    "range of letters": say(_PART + b"Content-Range: bytes a-b/c\r\nContent-Length: 3\r\n\r\nabc"),
    "one byte of each range": of_request(_one_byte),
    "zipped": say(_OK + b"Content-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc"),
    "echo as a status": of_request(lambda r: b"HTTP/1.1 500 " + _path(r) + b"\r\n\r\n"),
    "echo as no status": of_request(lambda r: b"HTTP/1.1 " + _path(r) + b"\r\n\r\n"),
    "echo as a header": of_request(lambda r: _OK + _path(r) + b"\r\n\r\n"),
    "echo as a length": of_request(lambda r: _OK + b"Content-Length: " + _path(r) + b"\r\n\r\n"),
    "echo as a chunk": of_request(lambda r: _CHUNKED + _path(r) + b"\r\n"),
    "echo as an encoding": of_request(
        lambda r: _OK + b"Content-Encoding: " + _path(r) + b"\r\nContent-Length: 1\r\n\r\nx"
    ),
    "echo of the query": of_request(
        lambda r: b"HTTP/1.1 500 " + _path(r).partition(b"?")[2] + b"\r\n\r\n"
    ),
    "circle": of_request(
        lambda r: b"HTTP/1.1 302 Found\r\nLocation: " + _path(r) + b"\r\nContent-Length: 0\r\n\r\n"
    ),
    "redirect to nothing": of_request(
        lambda r: b"HTTP/1.1 302 Found\r\nLocation: http://[" + _path(r) + b"\r\n\r\n"
    ),
    "redirect to a file": say(
        b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\nContent-Length: 0\r\n\r\n"
    ),
}

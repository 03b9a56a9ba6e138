"""A worker process of this machine: tasks come in through a pipe, results go out through another.

A message is a pickle and the buffers of its arrays, which are neither copied into it nor out of it.
"""

from __future__ import annotations

import gc
import os
import pickle
import struct
import sys
import traceback
from typing import Any, BinaryIO, Final

#: what a child says when it has imported all that tasks need.
READY: Final = "ready"
#: modules of the tasks.
_MODULES: Final = (
    "weightvid.packing.exact",
    "weightvid.packing.frames",
    "weightvid.packing.quantizer",
    "weightvid.packing.sums",
)
_COUNT: Final = struct.Struct("<I")
_SIZE: Final = struct.Struct("<Q")


def send(stream: BinaryIO, message: Any) -> None:
    """Write a message.

    Raises
    ------
    OSError
        Nobody reads any more.
    """
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(message, 5, buffer_callback=buffers.append)
    parts: list[bytes | memoryview] = [head, *(buffer.raw() for buffer in buffers)]
    stream.write(_COUNT.pack(len(parts)))
    for part in parts:
        stream.write(_SIZE.pack(len(part)))
        stream.write(part)
    stream.flush()


def receive(stream: BinaryIO) -> Any:
    """Read a message.

    Raises
    ------
    EOFError
        The other side has gone.
    """
    (count,) = _COUNT.unpack(_exactly(stream, _COUNT.size))
    head, *buffers = [
        _exactly(stream, _SIZE.unpack(_exactly(stream, _SIZE.size))[0]) for _ in range(count)
    ]
    return pickle.loads(head, buffers=buffers)


def _exactly(stream: BinaryIO, size: int) -> bytearray:
    found = bytearray(size)
    left = memoryview(found)
    while left:
        got = stream.readinto(left)  # type: ignore[attr-defined]
        if not got:
            raise EOFError("a worker's pipe ended")
        left = left[got:]
    return found


def serve() -> None:
    """Do tasks until the pipe ends: a pair ``(True, result)`` or ``(False, exception)`` for each.

    What a task prints goes to stderr.
    """
    tasks = sys.stdin.buffer
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        gc.disable()  # it would take a twentieth of the imports, and find nothing
        for name in _MODULES:
            __import__(name)
        gc.enable()
        send(results, READY)
        while True:
            _answer(results, receive(tasks))
    except (EOFError, OSError):
        pass  # whoever gave the tasks has gone
    # Nothing is left to be saved; threads of libraries need not be waited for.
    sys.stderr.flush()
    os._exit(0)


def _answer(results: BinaryIO, message: Any) -> None:
    task, arguments, options = message
    try:
        answer = True, task(*arguments, **options)
    except Exception as error:
        answer = False, _portable(error)
    send(results, answer)


def _portable(error: Exception) -> Exception:
    """The exception, if it survives a pipe; with where it came from, as the stack stays here."""
    error.add_note("in a worker process:\n" + traceback.format_exc())
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError("".join(traceback.format_exception(error)))
    return error

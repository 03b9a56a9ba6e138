"""Keeping encoders from taking the machine over.

SVT-AV1, when root runs it, makes all its threads and the one that opens it real-time ones
(SCHED_FIFO, 99). Whatever that thread starts later would be real-time too, and nothing else on the
machine would get a turn.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

_TASKS: Final = Path("/proc/self/task")


@contextmanager
def usual_priority() -> Iterator[None]:
    """Give this thread, and those that were started within, the scheduling that it had before.

    Where the system is not Linux, nothing is done: SVT-AV1 asks for real-time threads there alone.
    """
    if not hasattr(os, "sched_setscheduler") or not _TASKS.is_dir():
        yield
        return
    known = _threads()
    policy, priority = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        for thread in (0, *(_threads() - known)):
            # A thread may have ended meanwhile.
            with suppress(OSError):
                if os.sched_getscheduler(thread) != policy:
                    os.sched_setscheduler(thread, policy, priority)


def _threads() -> frozenset[int]:
    return frozenset(int(path.name) for path in _TASKS.iterdir())

"""Work beside the main thread that needs no Python lock: hashing, inflating, writing."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final, TypeVar

_T = TypeVar("_T")


class Side:
    """Does tasks one after the other, in a thread of its own or at once.

    Parameters
    ----------
    threads : int
        How many threads may be used; 0: one per core. One: there is no further thread.
    """

    def __init__(self, threads: int) -> None:
        self.alone = (threads or os.cpu_count() or 1) == 1
        self._executor: ThreadPoolExecutor | None = None

    def do(self, task: Callable[..., _T], *arguments: Any) -> Future[_T]:
        """Hand out a task; those before it are done first."""
        if not self.alone:
            if self._executor is None:
                self._executor = ThreadPoolExecutor(1, "weightvid-beside")
            return self._executor.submit(task, *arguments)
        done: Future[_T] = Future()
        try:
            done.set_result(task(*arguments))
        except Exception as error:
            done.set_exception(error)
        return done

    def close(self) -> None:
        """End the thread; a further task starts another."""
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)
            self._executor = None


#: everything at once.
ALONE: Final = Side(1)

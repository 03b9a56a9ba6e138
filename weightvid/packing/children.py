"""Worker processes of this machine as an executor.

The scheduling is that of a ThreadPoolExecutor: each of its threads has a process of its own, to
which it hands its tasks, and sleeps meanwhile. The first thread may do its tasks itself, so that
one process fewer has to be started. Processes are started as a program, not as a copy of this one,
and import the modules of the tasks alone: the script that packs is not run again in them, so it
needs no ``if __name__ == "__main__"``. Their linear algebra has one thread, for they are several.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, Final

from weightvid.errors import ClusterError
from weightvid.packing.child import READY, receive, send

#: the modules are looked for where this process has them.
_PROGRAM: Final = (
    "import sys; sys.path[:] = sys.argv[1:]; from weightvid.packing.child import serve; serve()"
)
#: a child whose pipe has ended has so long to end, too.
_PATIENCE_S: Final = 5.0
#: environment of a process beside others that work: libraries are not to take all cores for it.
ONE_THREAD: Final = dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"
)


class _Child:
    """A process, and both ends of the talk with it; for one thread."""

    def __init__(self) -> None:
        with _without_interrupts():
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-c", _PROGRAM, *sys.path],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env={**ONE_THREAD, **os.environ},
                )
            except OSError as error:
                raise ClusterError(
                    f"a worker process cannot be started: {error.strerror or error}; "
                    "--jobs 1 needs none"
                ) from None
        self._ready = False

    def wait(self) -> None:
        """Wait until it can work, or has ended."""
        try:
            self._ready = receive(self._process.stdout) == READY  # type: ignore[arg-type]
        except (EOFError, OSError):
            self._ready = False

    def call(
        self, task: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> Any:
        """Let it do a task.

        Raises
        ------
        ClusterError
            It has ended.
        """
        process = self._process
        if not self._ready:
            raise self._lost("did not start")
        try:
            send(process.stdin, (task, arguments, options))  # type: ignore[arg-type]
            done, found = receive(process.stdout)  # type: ignore[arg-type]
        except (EOFError, OSError):
            raise self._lost("ended in the middle of its work") from None
        if not done:
            raise found
        return found

    def _lost(self, what: str) -> ClusterError:
        return ClusterError(
            f"a worker process {what} ({self._ending()}); "
            "if memory is short, fewer --jobs need less"
        )

    def _ending(self) -> str:
        try:
            status = self._process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            return "its pipe is closed"
        if status >= 0:
            return f"exit status {status}"
        try:
            return signal.Signals(-status).name
        except ValueError:
            return f"signal {-status}"

    def dismiss(self) -> None:
        """Let it end; it has nothing to do."""
        if self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.close()

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()

    def bury(self) -> None:
        """Wait until it has ended."""
        try:
            self._process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


class ProcessExecutor(ThreadPoolExecutor):
    """Runs tasks in this process and ``count - 1`` others, or in ``count`` others.

    Parameters
    ----------
    count : int
        Tasks at the same time.
    here : bool
        This process does tasks too.

    Raises
    ------
    ClusterError
        A process cannot be started.
    """

    def __init__(self, count: int, here: bool = True) -> None:
        super().__init__(count, "weightvid-pack", initializer=self._adopt)
        self._here = threading.local()
        self._lock = threading.Lock()
        self._children: list[_Child] = []
        self._free: list[_Child | None] = [None] if here else []
        try:
            for _ in range(count - len(self._free)):
                self._children.append(_Child())
        except BaseException:
            self.kill()
            raise
        self._free += self._children

    def _adopt(self) -> None:
        """Give the thread that begins its process; tasks wait for others while this one starts."""
        with self._lock:
            child = self._here.child = self._free.pop(0)
        if child is not None:
            child.wait()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Hand out a task: a function of a module, with arguments that can be pickled."""
        return super().submit(self._run, fn, args, kwargs)

    def _run(self, task: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        child: _Child | None = self._here.child
        return task(*args, **options) if child is None else child.call(task, args, options)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the processes when their tasks are done."""
        super().shutdown(wait=True, cancel_futures=cancel_futures)
        for child in self._children:
            child.dismiss()
        for child in self._children:
            child.bury()
        self._children.clear()

    def kill(self) -> None:
        """End the processes at once, whatever they are doing."""
        for child in self._children:
            child.kill()
        self.shutdown(cancel_futures=True)


def can_start() -> bool:
    """Whether this program can start worker processes: a frozen one would start itself."""
    return bool(sys.executable) and not getattr(sys, "frozen", False)


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Processes started meanwhile never see Ctrl-C: they are ended by the one that has them."""
    if os.name == "nt":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

"""Who does the work: an executor, and what is known of those behind it."""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any, Generic, TypeVar

from weightvid.checkpoint import CheckpointReader
from weightvid.errors import ClusterError, WeightvidError
from weightvid.packing.children import ProcessExecutor
from weightvid.packing.source import HandedSource, ReaderSource, SharedSource, Source
from weightvid.progress import WorkerShare

_T = TypeVar("_T")


class Place(Enum):
    """Where workers are."""

    THREADS = "threads of this process"
    CHILDREN = "this process and others that it has started here"
    CLUSTER = "processes anywhere"


class Work(Generic[_T]):
    """A task that has been handed out."""

    def __init__(self, future: Future[tuple[str, _T]], workers: Workers, weights: int) -> None:
        self._future = future
        self._workers = workers
        self._weights = weights

    def result(self) -> _T:
        """Wait for what the task returns.

        Raises
        ------
        ClusterError
            The engine gave up on the task.
        """
        try:
            who, found = self._future.result()
        except CancelledError:
            raise ClusterError("the cluster cancelled the work; is its scheduler gone?") from None
        except Exception as error:
            raise self._workers.explain(error) from error.__cause__
        if self._weights:
            self._workers.count_weights(who, self._weights)
            self._weights = 0
        return found


class Workers:
    """Runs tasks: pure functions of arguments that can be pickled.

    Parameters
    ----------
    executor : Executor
    count : int
        Tasks that it runs at the same time.
    place : Place
        Where its workers are.
    explain : callable or None
        Turns an exception of the engine's own into one for the user.

    Attributes
    ----------
    folder : path or None
        Where temporary files of this process go; None: the system's folder for them.
    """

    def __init__(
        self,
        executor: Executor,
        count: int,
        place: Place = Place.THREADS,
        explain: Callable[[Exception], Exception] | None = None,
    ) -> None:
        self._executor = executor
        self.count = count
        self.place = place
        self.folder: str | os.PathLike[str] | None = None
        self._explain = explain
        self._weights: dict[str, int] = {}
        self._source: tuple[CheckpointReader, Source] | None = None

    def submit(self, task: Callable[..., _T], *arguments: Any, weights: int = 0) -> Work[_T]:
        """Hand out a task.

        Parameters
        ----------
        task : callable
            A function of a module.
        *arguments
        weights : int
            Counted for the worker that did it.
        """
        try:
            future = self._executor.submit(_signed, task, *arguments)
        except WeightvidError:
            raise
        except RuntimeError as error:
            raise self.explain(error) from None
        return Work(future, self, weights)

    def explain(self, error: Exception) -> Exception:
        """What to raise for a task's exception."""
        return error if self._explain is None else self._explain(error)

    def count_weights(self, who: str, weights: int) -> None:
        """Note what a worker has done."""
        self._weights[who] = self._weights.get(who, 0) + weights

    @property
    def shared(self) -> bool:
        """Whether workers are other processes, which read the checkpoint themselves."""
        return self.place is not Place.THREADS

    @property
    def ahead(self) -> int:
        """Tasks that are worth having under way besides one for each worker.

        Workers need not wait while a tensor is finished; and while a worker of a cluster runs one,
        the next one's arguments and the last one's result travel.
        """
        return self.count + 1 if self.place is Place.CLUSTER else self.count

    @property
    def shares(self) -> tuple[WorkerShare, ...]:
        """What each worker of a cluster has done; nothing for those of this machine."""
        if self.place is not Place.CLUSTER:
            return ()
        return tuple(WorkerShare(name, done) for name, done in sorted(self._weights.items()))

    def source(self, reader: CheckpointReader) -> Source:
        """How the workers read a checkpoint.

        Raises
        ------
        ClusterError
            It lies in the memory of this process.
        """
        if self._source is None or self._source[0] is not reader:
            self._source = reader, self._new_source(reader)
        return self._source[1]

    def _new_source(self, reader: CheckpointReader) -> Source:
        if not self.shared:
            return ReaderSource(reader)
        if reader.location is None:
            raise ClusterError(
                "this checkpoint lies in the memory of one process, and the workers of a cluster "
                "cannot read it: save it to a file on shared storage, or pack without a cluster"
            )
        if self.place is Place.CHILDREN:
            return HandedSource(reader, reader.location)
        return SharedSource(reader.location)

    def stop(self) -> None:
        """Forget what has not begun; end what other processes do, and wait for threads."""
        if self._source is not None:
            self._source[0].stop()
        if isinstance(self._executor, ProcessExecutor):
            self._executor.kill()
        elif isinstance(self._executor, ThreadPoolExecutor):
            self._executor.shutdown(wait=True, cancel_futures=True)


def _signed(task: Callable[..., _T], *arguments: Any) -> tuple[str, _T]:
    """A task's result, with the name of who did it."""
    return f"{socket.gethostname()}:{os.getpid()}", task(*arguments)


@contextmanager
def local_workers(jobs: int = 0) -> Iterator[Workers]:
    """Threads of this process.

    Parameters
    ----------
    jobs : int
        0: one per core.
    """
    count = jobs or os.cpu_count() or 1
    with ThreadPoolExecutor(count, "weightvid-pack") as executor:
        yield from _until_done(Workers(executor, count))


@contextmanager
def process_workers(jobs: int = 0, here: bool = True) -> Iterator[Workers]:
    """Processes that this one starts on this machine, and perhaps a thread of its own.

    Parameters
    ----------
    jobs : int
        Of them all; 0: one per core.
    here : bool
        One of the workers is a thread of this process.

    Raises
    ------
    ClusterError
        A process cannot be started.
    """
    count = jobs or os.cpu_count() or 1
    with ProcessExecutor(count, here) as executor:
        yield from _until_done(Workers(executor, count, Place.CHILDREN))


def _until_done(workers: Workers) -> Iterator[Workers]:
    try:
        yield workers
    except BaseException:
        workers.stop()
        raise


@dataclass(slots=True)
class _Waiting:
    """A task, and what is to be done with its result."""

    work: Work[Any]
    take: Callable[[Any], None]


class Outbox:
    """Results written in the order in which their tasks were handed out.

    Parameters
    ----------
    workers : Workers
    """

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._most = 2 * workers.count + 1
        self._waiting: deque[_Waiting] = deque()

    def put(self, take: Callable[[_T], None], task: Callable[..., _T], *arguments: Any) -> None:
        """Hand out a task whose result ``take`` gets in its turn."""
        self._waiting.append(_Waiting(self._workers.submit(task, *arguments), take))
        while len(self._waiting) > self._most:
            self._take_first()

    def flush(self) -> None:
        """Wait for everything."""
        while self._waiting:
            self._take_first()

    def _take_first(self) -> None:
        first = self._waiting.popleft()
        first.take(first.work.result())

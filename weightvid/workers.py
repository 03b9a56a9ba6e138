"""Work done side by side, with results in order: threads, processes, Dask's and Ray's workers.

All of them are `concurrent.futures.Executor`. What is computed does not depend on who computes it.
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from threading import get_ident
from typing import Any, TypeVar, cast

from weightvid.checkpoint import CheckpointReader, open_checkpoint
from weightvid.errors import ClusterError
from weightvid.loader import Array

_T = TypeVar("_T")
_R = TypeVar("_R")


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Consecutive elements of a tensor, for a worker of this process or of another one.

    Attributes
    ----------
    array : ndarray or None
        The elements; None: they are read from ``location``.
    location : tuple or None
        Path of the checkpoint, and its size and time of change, by which another file is told.
    reader : CheckpointReader or None
        What a thread of this process reads from.
    """

    name: str
    first: int
    count: int
    array: Array | None
    location: tuple[str, int, int] | None = None
    reader: CheckpointReader | None = None

    def read(self) -> Array:
        """Stored elements, shape (count,)."""
        if self.array is not None:
            return self.array
        reader = self.reader or _reader(cast(Any, self.location), get_ident())
        return reader.read_range(self.name, self.first, self.count)


@lru_cache(maxsize=16)
def _reader(location: tuple[str, int, int], _: int) -> CheckpointReader:
    """Checkpoint of a worker's thread; closed when nobody refers to it any more."""
    return open_checkpoint(location[0])


class Workers:
    """An executor, and how many tasks it takes at a time.

    Parameters
    ----------
    executor : Executor or None
        None: everything is done at once, in this thread.
    count : int
        Workers.
    remote : bool
        They are not threads of this process.
    """

    def __init__(self, executor: Executor | None, count: int, *, remote: bool = False) -> None:
        self._executor, self.count, self.remote = executor, count, remote

    def map(self, task: Callable[[_T], _R], items: Iterable[_T]) -> Iterator[_R]:
        """Results of a task for each item, in order; two for each worker are begun ahead.

        Raises
        ------
        ClusterError
            A worker died.
        """
        if self._executor is None:
            yield from map(task, items)
            return
        waiting: deque[Future[_R]] = deque()
        try:
            for item in items:
                waiting.append(self._executor.submit(task, item))
                if len(waiting) > 2 * self.count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except futures.BrokenExecutor as error:
            raise ClusterError(
                f"a worker process died ({error or 'no message'}); it may have run out of memory: "
                "use fewer --jobs"
            ) from None
        finally:
            for future in waiting:
                future.cancel()

    def piece(self, reader: CheckpointReader, name: str, first: int, count: int) -> Piece:
        """Elements of a tensor for a task: read by the worker where that is cheap, or else here."""
        location = reader.location
        if reader.shareable and not self.remote:
            return Piece(name, first, count, None, reader=reader)
        if reader.shareable and location is not None:
            status = os.stat(location)  # noqa: PTH116 - a path as it was given
            return Piece(name, first, count, None, (location, status.st_size, status.st_mtime_ns))
        return Piece(name, first, count, reader.read_range(name, first, count))


@contextmanager
def open_workers(workers: str | Executor | None = None, jobs: int = 0) -> Iterator[Workers]:
    """Workers that were asked for; those started here end with the block.

    Parameters
    ----------
    workers : str, Executor or None
        ``threads`` (also None), ``processes``, ``dask`` or ``tcp://host:port`` (a Dask scheduler),
        ``ray`` or ``ray://host:port``, or any ``concurrent.futures.Executor``.
    jobs : int
        How many; 0: one per core.

    Raises
    ------
    ClusterError
        Unknown workers, or they cannot be reached.
    """
    check_workers(workers)
    count = jobs or os.cpu_count() or 1
    if isinstance(workers, Executor):
        yield Workers(workers, count, remote=not isinstance(workers, futures.ThreadPoolExecutor))
    elif workers in (None, "threads") and count == 1:
        yield Workers(None, 1)
    elif workers in (None, "threads", "processes"):
        pool: Executor = (
            futures.ProcessPoolExecutor(count, get_context("spawn"), _quiet_child)
            if workers == "processes"
            else futures.ThreadPoolExecutor(count, "weightvid")
        )
        try:
            yield Workers(pool, count, remote=workers == "processes")
        finally:
            pool.shutdown(cancel_futures=True)
    elif workers == "dask" or str(workers).startswith(("tcp://", "tls://")):
        with _dask(str(workers), count) as client:
            yield Workers(client.get_executor(), max(1, len(client.ncores())), remote=True)
    else:
        with _ray(str(workers), count) as executor:
            yield Workers(executor, count, remote=True)


def check_workers(workers: str | Executor | None) -> None:
    """Refuse workers that there are none of, by a ClusterError."""
    known = r"threads|processes|dask|ray|(tcp|tls|ray)://.+"
    if isinstance(workers, str) and not re.fullmatch(known, workers):
        raise ClusterError(
            f"unknown workers {workers!r}; choose threads, processes, dask, tcp://HOST:PORT, ray "
            "or ray://HOST:PORT"
        )


def _quiet_child() -> None:
    """Children leave Ctrl-C to their parent, and keep linear algebra to one thread."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")


@contextmanager
def _dask(address: str, count: int) -> Iterator[Any]:
    try:
        from distributed import Client, LocalCluster
    except ModuleNotFoundError:
        raise ClusterError("Dask is missing: pip install 'weightvid[dask]'") from None
    try:
        cluster = None
        if address == "dask":
            cluster = LocalCluster(
                n_workers=count, threads_per_worker=1, dashboard_address=None, silence_logs=50
            )
        client = Client(cluster or address, timeout=20)
    except (OSError, ValueError) as error:
        raise ClusterError(f"cannot reach the Dask scheduler at {address}: {error}") from None
    try:
        yield client
    finally:
        client.close()
        if cluster is not None:
            cluster.close()


class _RayExecutor(Executor):
    def __init__(self, ray: Any) -> None:
        self._run = ray.remote(lambda task, args, kwargs: task(*args, **kwargs))

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        made: Future[Any] = self._run.remote(fn, args, kwargs).future()
        return made


@contextmanager
def _ray(address: str, count: int) -> Iterator[Executor]:
    try:
        import ray
    except ModuleNotFoundError:
        raise ClusterError("Ray is missing: pip install 'weightvid[ray]'") from None
    local = address == "ray"
    options = {"num_cpus": count, "include_dashboard": False} if local else {"address": address}
    try:
        ray.init(logging_level="ERROR", log_to_driver=False, **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ClusterError(f"cannot reach Ray at {address}: {error}") from None
    try:
        yield _RayExecutor(ray)
    finally:
        ray.shutdown()

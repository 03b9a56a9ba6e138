"""Who packs: threads, processes of this machine, or a cluster's.

Of clusters, the executors that Dask and Ray offer themselves, opened by name or address; or any.
Scheduling, moving data and doing again what a dead worker had in hand is theirs. Either library is
imported only when it is asked for.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Final

from weightvid.checkpoint import CheckpointReader
from weightvid.dtypes import PACKABLE
from weightvid.errors import ClusterError
from weightvid.packing.children import can_start
from weightvid.packing.workers import Place, Workers, local_workers, process_workers

#: workers of this machine, without a library.
LOCAL: Final = ("threads", "processes")
#: from so many weights on, processes win back the time that they take to start.
PROCESS_WEIGHTS: Final = 10_000_000
#: how often a task is done again when its worker dies.
_RETRIES: Final = 3
_CONNECT_S: Final = 20


def open_workers(
    cluster: str | Executor | None, jobs: int = 0, algebra: bool = False
) -> AbstractContextManager[Workers]:
    """Workers of this machine or of a cluster.

    Parameters
    ----------
    cluster : str, Executor or None
        ``threads`` of this process, or ``processes`` on this machine. ``dask`` or ``ray``: worker
        processes of theirs on this machine. ``scheme://host:port`` of a Dask
        scheduler; ``ray:auto`` or ``ray://host:port``: a running Ray cluster. Any executor, which
        stays open; unless it is a ThreadPoolExecutor, its workers are other processes. None:
        threads.
    jobs : int
        Of threads, or of processes started here; 0: one per core. Of an executor, how many tasks
        it runs at a time; 0: what it says itself, or else the number of cores.
    algebra : bool
        Tasks are linear algebra, which would take all cores for each of them in this process, as
        numpy has begun here. Processes then leave nothing to it.

    Raises
    ------
    ClusterError
        No such kind of cluster, its library is missing, or it does not answer.
    """
    if cluster is None:
        return local_workers(jobs)
    if isinstance(cluster, Executor):
        count = jobs or getattr(cluster, "_max_workers", 0) or os.cpu_count() or 1
        threads = isinstance(cluster, ThreadPoolExecutor)
        return nullcontext(Workers(cluster, count, Place.THREADS if threads else Place.CLUSTER))
    check_cluster(cluster)
    if cluster == "threads":
        return local_workers(jobs)
    if cluster == "processes":
        return process_workers(jobs, here=not algebra)
    return (_ray if cluster == "ray" or cluster.startswith("ray:") else _dask)(cluster, jobs)


def local_engine(reader: CheckpointReader, jobs: int = 0) -> str:
    """The faster of threads and processes: one of :data:`LOCAL`.

    Small operations of numpy contend for Python's lock, so that two threads do the work of one and
    a half. Processes read the checkpoint for themselves.

    Parameters
    ----------
    reader : CheckpointReader
    jobs : int
        As in :func:`open_workers`.
    """
    alone = (jobs or os.cpu_count() or 1) == 1
    if alone or reader.location is None or not (reader.shareable and can_start()):
        return "threads"
    weights = sum(spec.size for spec in reader.contents.tensors if spec.dtype in PACKABLE)
    return "processes" if weights >= PROCESS_WEIGHTS else "threads"


def check_cluster(cluster: str) -> None:
    """Refuse what is neither the name of an engine nor an address.

    Raises
    ------
    ClusterError
    """
    if cluster not in (*LOCAL, "dask", "ray", "ray:auto") and "://" not in cluster:
        raise ClusterError(
            f"no cluster {cluster!r}: it is threads, processes, dask, ray, ray:auto, or an address "
            "such as tcp://10.0.0.1:8786 (Dask) or ray://10.0.0.1:10001"
        )


@contextmanager
def _dask(cluster: str, jobs: int) -> Iterator[Workers]:
    try:
        from distributed import Client
    except ImportError as error:
        raise _missing("dask", error) from None
    try:
        if cluster == "dask":
            count = jobs or os.cpu_count() or 1
            client = Client(
                n_workers=count,
                threads_per_worker=1,
                processes=True,
                dashboard_address="127.0.0.1:0",
            )
        else:
            client = Client(cluster, timeout=_CONNECT_S)
    except (OSError, TimeoutError, ValueError, RuntimeError) as error:
        raise ClusterError(
            f"the Dask cluster {cluster} does not answer: {error}; is its scheduler running?"
        ) from None
    with client:
        threads = sum(client.nthreads().values())
        if not threads:
            raise ClusterError(f"the Dask cluster {cluster} has no workers")
        executor = client.get_executor(pure=False, retries=_RETRIES)
        workers = Workers(executor, threads, Place.CLUSTER, _explain_dask)
        try:
            yield workers
        except BaseException:
            executor.shutdown(wait=False)
            raise


def _explain_dask(error: Exception) -> Exception:
    from distributed import KilledWorker
    from distributed.comm.core import CommClosedError

    if isinstance(error, KilledWorker):
        return ClusterError(
            "the same piece of work ended several of the cluster's workers; do they have enough "
            f"memory? ({error})"
        )
    if isinstance(error, (CommClosedError, TimeoutError, OSError)):
        return ClusterError(f"the Dask cluster was lost: {error}")
    return error


class _RayExecutor(Executor):
    """Ray's tasks as futures, which Ray itself makes."""

    def __init__(self, ray: Any) -> None:
        self._run = ray.remote(max_retries=_RETRIES)(_call)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Hand out a task."""
        future: Future[Any] = self._run.remote(fn, args, kwargs).future()
        return future


def _call(task: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return task(*args, **kwargs)


@contextmanager
def _ray(cluster: str, jobs: int) -> Iterator[Workers]:
    try:
        import ray
    except ImportError as error:
        raise _missing("ray", error) from None
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if cluster == "ray":
            ray.init(num_cpus=jobs or os.cpu_count() or 1, include_dashboard=False, **quiet)
        else:
            ray.init("auto" if cluster == "ray:auto" else cluster, **quiet)
    except (OSError, ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(f"the Ray cluster {cluster} does not answer: {error}") from None
    try:
        count = int(ray.cluster_resources().get("CPU", 0))
        if not count:
            raise ClusterError(f"the Ray cluster {cluster} has no processors")
        yield Workers(_RayExecutor(ray), count, Place.CLUSTER, _explain_ray)
    finally:
        ray.shutdown()


def _explain_ray(error: Exception) -> Exception:
    from ray.exceptions import RayError, RayTaskError

    if isinstance(error, RayTaskError):
        cause = error.cause
        return cause if isinstance(cause, Exception) else error
    if isinstance(error, RayError):
        return ClusterError(f"the Ray cluster gave up on a piece of work: {error}")
    return error


def _missing(extra: str, error: ImportError) -> ClusterError:
    return ClusterError(
        f"--cluster {extra} needs a library that is not there ({error}): "
        f"pip install 'weightvid[{extra}]'"
    )

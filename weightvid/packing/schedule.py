"""Handing out the quantizing of a whole model, and taking the results in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from weightvid import tile
from weightvid.packing.large import LargeTensor
from weightvid.packing.quantizer import (
    BATCH_WEIGHTS,
    Coded,
    Request,
    Wish,
    block_rows,
    calibrated_rows,
    code_batch,
    code_calibrated,
    code_fixed,
    code_rows,
    fit,
    fit_calibrated,
)
from weightvid.packing.workers import Work, Workers


@dataclass(frozen=True, slots=True)
class Kept:
    """A tensor that is not quantized; passed on in its turn."""

    number: int


@dataclass(slots=True)
class _Job:
    """A task, how many weights it is about, and what its result brings forth."""

    weights: int
    start: Callable[[], Work[Any] | None]
    take: Callable[[Any], Iterable[Coded | Kept]]
    work: Work[Any] | None = None

    def finish(self) -> Iterable[Coded | Kept]:
        """Wait for the result."""
        work, self.work = self.work, None
        return self.take(None if work is None else work.result())


def code_tensors(
    requests: Iterable[Request | Kept],
    workers: Workers,
    counted: Callable[[int], None] | None = None,
) -> Iterator[Coded | Kept]:
    """Quantize tensors, in order; at most a few tasks more than there are workers are under way.

    Parameters
    ----------
    requests : iterable of Request or Kept
    workers : Workers
    counted : callable or None
        Told the number of weights of each task that is done.

    Yields
    ------
    Coded or Kept
        In the order of the requests. The levels of one are to be closed before the next is taken.

    Raises
    ------
    QuantizationError
        A tensor cannot be quantized; it is named.
    CheckpointError, ClusterError
    """
    running: deque[_Job] = deque()
    most = workers.count + workers.ahead
    under_way = 0

    def finish_first() -> Iterable[Coded | Kept]:
        nonlocal under_way
        job = running.popleft()
        under_way -= job.weights
        found = job.finish()
        if counted is not None and job.weights:
            counted(job.weights)
        return found

    for job in _jobs(requests, workers):
        while len(running) >= most and under_way + job.weights > most * BATCH_WEIGHTS:
            yield from finish_first()
        job.work = job.start()
        under_way += job.weights
        running.append(job)
    while running:
        yield from finish_first()


@dataclass(slots=True)
class _Batch:
    """Tensors that are quantized together, and those after them that are only passed on."""

    requests: list[Request] = field(default_factory=list)
    weights: int = 0
    kept: list[Kept] = field(default_factory=list)
    fitting: Work[Wish] | None = None

    @property
    def large(self) -> bool:
        """Whether it is one tensor that is to be cut into blocks of rows."""
        return self.weights > BATCH_WEIGHTS and self.requests[0].fixed is None

    def takes(self, request: Request) -> bool:
        """Whether a tensor may join."""
        if not self.requests:
            return True
        alone = request.alone or self.requests[0].alone
        return not alone and self.weights + request.spec.size <= BATCH_WEIGHTS

    def add(self, request: Request) -> None:
        """Take a tensor."""
        self.requests.append(request)
        self.weights += request.spec.size


def _jobs(requests: Iterable[Request | Kept], workers: Workers) -> Iterator[_Job]:
    for batch in _fitted(_batches(requests), workers):
        if batch.fitting is not None:
            yield from _large_jobs(batch.requests[0], batch.fitting.result(), workers)
        elif batch.large:
            yield from _calibrated_jobs(batch.requests[0], workers)
        elif batch.requests:
            yield _batch_job(batch, workers)
        for kept in batch.kept:
            yield _Job(0, lambda: None, lambda _, kept=kept: [kept])  # type: ignore[misc]


def _batches(requests: Iterable[Request | Kept]) -> Iterator[_Batch]:
    """Small tensors in company; what is kept comes after the batch that it interrupts."""
    batch = _Batch()
    for request in requests:
        if isinstance(request, Kept):
            batch.kept.append(request)
            continue
        if not batch.takes(request):
            yield batch
            batch = _Batch()
        batch.add(request)
    yield batch


def _fitted(batches: Iterator[_Batch], workers: Workers) -> Iterator[_Batch]:
    """The same; fits of large tensors begin one batch ahead, so that nobody waits for them."""
    before: _Batch | None = None
    for batch in batches:
        if batch.large and batch.requests[0].moments is None:
            batch.fitting = workers.submit(fit, batch.requests[0])
        if before is not None:
            yield before
        before = batch
    if before is not None:
        yield before


def _batch_job(batch: _Batch, workers: Workers) -> _Job:
    first, weights = batch.requests[0], batch.weights

    def start() -> Work[list[Coded]]:
        if first.fixed is not None:
            return workers.submit(code_fixed, first, weights=weights)
        if first.moments is not None:
            return workers.submit(code_calibrated, first, weights=weights)
        return workers.submit(code_batch, batch.requests, weights=weights)

    return _Job(weights, start, lambda found: found)


def _large_jobs(request: Request, wish: Wish, workers: Workers) -> Iterator[_Job]:
    step = block_rows(tile.matrix_shape(request.spec.shape), wish.params)
    yield from _block_jobs(request, step, workers, (code_rows, wish))


def _calibrated_jobs(request: Request, workers: Workers) -> Iterator[_Job]:
    quantizer = workers.submit(fit_calibrated, request).result()
    rows, columns = tile.matrix_shape(request.spec.shape)
    step = max(1, BATCH_WEIGHTS // columns) if quantizer.divisible else rows
    yield from _block_jobs(request, step, workers, (calibrated_rows, quantizer))


def _block_jobs(
    request: Request,
    step: int,
    workers: Workers,
    task: tuple[Callable[..., Any], Any],
) -> Iterator[_Job]:
    rows, columns = tile.matrix_shape(request.spec.shape)
    collector: list[LargeTensor] = []
    function, fitted = task
    for begin in range(0, rows, step):
        span = begin, min(rows, begin + step)
        weights = (span[1] - begin) * columns

        def start(span: tuple[int, int] = span, weights: int = weights) -> Work[Any]:
            return workers.submit(function, request, fitted, span, weights=weights)

        def take(found: Any, last: bool = span[1] == rows) -> list[Coded]:
            if not collector:
                collector.append(LargeTensor(request, workers.folder))
            collector[0].take(found)
            return [collector.pop().finish()] if last else []

        yield _Job(weights, start, take)

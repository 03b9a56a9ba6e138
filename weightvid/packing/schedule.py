"""Handing out the quantizing of a whole model, and taking the results in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from weightvid import tile
from weightvid.packing.large import LargeTensor
from weightvid.packing.quantizer import (
    BATCH_WEIGHTS,
    Coded,
    Request,
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


def _jobs(requests: Iterable[Request | Kept], workers: Workers) -> Iterator[_Job]:
    for batch in _batches(requests):
        if isinstance(batch, Kept):
            kept = batch
            yield _Job(0, lambda: None, lambda _, kept=kept: [kept])  # type: ignore[misc]
            continue
        weights = sum(request.spec.size for request in batch)
        if len(batch) > 1 or weights <= BATCH_WEIGHTS or batch[0].fixed is not None:
            yield _batch_job(batch, weights, workers)
        elif batch[0].moments is None:
            yield from _large_jobs(batch[0], workers)
        else:
            yield from _calibrated_jobs(batch[0], workers)


def _batches(requests: Iterable[Request | Kept]) -> Iterator[list[Request] | Kept]:
    """Small tensors in company; what is kept comes after the batch that it interrupts."""
    batch: list[Request] = []
    kept: list[Kept] = []
    weights = 0
    for request in requests:
        if isinstance(request, Kept):
            kept.append(request)
            continue
        alone = request.alone or (bool(batch) and batch[0].alone)
        if batch and (alone or weights + request.spec.size > BATCH_WEIGHTS):
            yield batch
            yield from kept
            batch, kept, weights = [], [], 0
        batch.append(request)
        weights += request.spec.size
    if batch:
        yield batch
    yield from kept


def _batch_job(batch: list[Request], weights: int, workers: Workers) -> _Job:
    def start() -> Work[list[Coded]]:
        if batch[0].fixed is not None:
            return workers.submit(code_fixed, batch[0], weights=weights)
        if batch[0].moments is not None:
            return workers.submit(code_calibrated, batch[0], weights=weights)
        return workers.submit(code_batch, batch, weights=weights)

    return _Job(weights, start, lambda found: found)


def _large_jobs(request: Request, workers: Workers) -> Iterator[_Job]:
    # Here the tasks before this tensor are still under way.
    wish = workers.submit(fit, request).result()
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
            keep = not workers.shared
            return workers.submit(function, request, fitted, span, keep, weights=weights)

        def take(found: Any, last: bool = span[1] == rows) -> list[Coded]:
            if not collector:
                collector.append(LargeTensor(request, workers.folder))
            collector[0].take(found)
            return [collector.pop().finish()] if last else []

        yield _Job(weights, start, take)

"""Statistics of all tensors of a checkpoint, each read once, by many workers."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from weightvid.packing.source import TensorRead
from weightvid.packing.workers import Work, Workers
from weightvid.progress import Progress, Report
from weightvid.quantize.stats import BLOCK, Sums, block_sums

#: weights that one task looks at, about; a whole number of blocks.
_TASK_WEIGHTS: Final = 4 * BLOCK


@dataclass(frozen=True, slots=True)
class Range:
    """Some consecutive elements of a tensor."""

    number: int
    read: TensorRead
    first: int
    count: int


def sum_ranges(ranges: list[Range]) -> list[list[Sums]]:
    """Sums of ranges, each block by block: a pure function, for any worker."""
    found = []
    for part in ranges:
        sums: list[Sums] = []
        for first in range(part.first, part.first + part.count, BLOCK):
            count = min(BLOCK, part.first + part.count - first)
            sums += block_sums(part.read.elements(first, count), part.read.spec.dtype)
        found.append(sums)
    return found


def sums_of_tensors(
    tensors: Mapping[int, TensorRead], workers: Workers, progress: Report
) -> Iterator[tuple[int, list[Sums]]]:
    """Sums of all blocks of each tensor.

    Parameters
    ----------
    tensors : mapping of int to TensorRead
        By id.
    workers : Workers
    progress : callable
        Told about the stage ``survey``.

    Yields
    ------
    int, list of Sums
        In the order of the tensors.
    """
    total = sum(read.spec.size for read in tensors.values())
    total_bytes = sum(read.spec.stored_bytes for read in tensors.values())
    progress(Progress("survey", 0, total, 0, total_bytes))
    running: deque[tuple[list[Range], Work[list[list[Sums]]]]] = deque()
    open_sums: list[Sums] = []
    done = done_bytes = 0

    def finish_first() -> Iterator[tuple[int, list[Sums]]]:
        nonlocal done, done_bytes, open_sums
        ranges, work = running.popleft()
        for part, sums in zip(ranges, work.result(), strict=True):
            spec = part.read.spec
            open_sums = open_sums + sums
            done += part.count
            done_bytes += part.count * (spec.stored_bytes // spec.size)
            if part.first + part.count == spec.size:
                yield part.number, open_sums
                open_sums = []
        progress(Progress("survey", done, total, done_bytes, total_bytes, workers.shares))

    for ranges in _tasks(tensors):
        while len(running) >= workers.count + workers.ahead:
            yield from finish_first()
        running.append((ranges, workers.submit(sum_ranges, ranges)))
    while running:
        yield from finish_first()


def _tasks(tensors: Mapping[int, TensorRead]) -> Iterator[list[Range]]:
    """Ranges of about equal work: small tensors in company, large ones in parts."""
    open_ranges: list[Range] = []
    weights = 0
    for number, read in tensors.items():
        for first in range(0, read.spec.size, _TASK_WEIGHTS):
            count = min(_TASK_WEIGHTS, read.spec.size - first)
            if open_ranges and weights + count > _TASK_WEIGHTS:
                yield open_ranges
                open_ranges, weights = [], 0
            open_ranges.append(Range(number, read, first, count))
            weights += count
    if open_ranges:
        yield open_ranges

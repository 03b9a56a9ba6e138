"""Trellis-coded quantization: the encoder.

Minimises over each run ``sum (w - value)^2 + lam * (4 * step)^2 * bits(k)`` over all sequences of
levels k that the state machine allows. ``bits`` is a static price of the level alone, see
`weightvid.quantize.rate`; `weightvid.quantize.trellis_viterbi` does the search.

Runs of several matrices are searched side by side, so that small tensors also make long vectors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from weightvid.errors import QuantizationError
from weightvid.quantize.params import MAX_LEVEL
from weightvid.quantize.rate import RateModel, check_range, sign_coded_bits
from weightvid.quantize.trellis import DEFAULT_STATES, Machine, dequantize_index, machine
from weightvid.quantize.trellis_viterbi import CostTables, FloatMatrix, search_numpy

LAM = 0.11
"""Default price of a bit in squares of ``4 * step``; see tools/results/trellis.md."""

_LANES = 2048
_MIN_LANES = 256
_DECISION_BYTES = 1 << 26
_SAMPLE = 1 << 14


@dataclass(frozen=True, slots=True)
class TrellisConfig:
    """How the encoder searches.

    Attributes
    ----------
    states : int
        4, 8, 16, 32 or 64; the time grows in proportion from 16 on.
    lam : float
        Price of a bit in squares of ``4 * step``, >= 0; 0 minimises the squared error alone. As
        ``4 * step`` is the step of the plain quantizer, it compares with `rdoq.LAM`.
    axis : int
        1, each row is a run; 0, each column is one.
    iterations : int
        Rounds of fitting the rate model to the trellis's own levels (on a sample of runs) when no
        model is given.
    """

    states: int = DEFAULT_STATES
    lam: float = LAM
    axis: int = 1
    iterations: int = 1

    def __post_init__(self) -> None:
        machine(self.states)
        if not (np.isfinite(self.lam) and self.lam >= 0.0):
            raise QuantizationError(f"lam must be finite and at least 0, not {self.lam!r}")
        if self.axis not in (0, 1):
            raise QuantizationError(f"axis must be 0 or 1, not {self.axis}")


@dataclass(frozen=True, slots=True)
class TrellisJob:
    """One matrix to quantize.

    Attributes
    ----------
    weights : ndarray of float32, shape (R, C)
        Finite.
    step : float
        As in `weightvid.quantize.trellis`: about a quarter of the plain quantizer's step. Above 0,
        rounded to float32.
    zero : bool, optional
        Numbering of the points; chosen by trial on a sample when absent.
    rate_model : RateModel, optional
        Price of levels; fitted to these weights when absent.
    """

    weights: FloatMatrix
    step: float
    zero: bool | None = None
    rate_model: RateModel | None = None


@dataclass(frozen=True, slots=True)
class TrellisLevels:
    """Levels of one matrix, int32 of its shape, ``|level|`` at most 2**22, and their numbering."""

    levels: npt.NDArray[np.int32]
    zero: bool


@dataclass(slots=True)
class _Task:
    """Runs (in units of two steps) under one numbering, and what is known of the levels' price."""

    runs: FloatMatrix
    zero: bool
    model: RateModel


def quantize(
    weights: FloatMatrix,
    step: float,
    config: TrellisConfig | None = None,
    rate_model: RateModel | None = None,
    zero: bool = False,
) -> npt.NDArray[np.int32]:
    """Levels of one matrix under a given numbering; parameters as in `TrellisJob`.

    Returns
    -------
    ndarray of int32, shape (R, C)
        ``|level|`` at most 2**22.

    Raises
    ------
    QuantizationError
        For weights that are not a finite matrix, or a step that is not positive or is too small.
    """
    return quantize_many([TrellisJob(weights, step, zero, rate_model)], config)[0].levels


def quantize_many(
    jobs: Sequence[TrellisJob], config: TrellisConfig | None = None, backend: str = "auto"
) -> list[TrellisLevels]:
    """Quantize matrices together; the result for each is the same as alone.

    Parameters
    ----------
    jobs : sequence of TrellisJob
        Small matrices gain most from company: runs of all of them fill the vectors.
    config : TrellisConfig, optional
    backend : {"auto", "numpy", "torch"}
        Same levels either way. "auto" takes whichever was measured faster on a CPU: numpy.

    Raises
    ------
    QuantizationError
        As for `quantize`; also for an unknown backend.
    """
    config = config or TrellisConfig()
    search = _backend(backend)
    tasks = _prepare(jobs, config, search)
    found = _search_all(tasks, config, search)
    return [
        TrellisLevels(np.ascontiguousarray(k.T) if config.axis == 0 else k, task.zero)
        for k, task in zip(found, tasks, strict=True)
    ]


def _prepare(jobs: Sequence[TrellisJob], config: TrellisConfig, search: _Search) -> list[_Task]:
    """Choose numberings and fit rate models, on samples of the runs."""
    runs = [_normalise(job, config.axis) for job in jobs]
    rivals: list[list[_Task]] = []
    for job, scaled in zip(jobs, runs, strict=True):
        sample = _sample_runs(scaled)
        zeros = (False, True) if job.zero is None else (job.zero,)
        models = [job.rate_model or _first_model(sample, zero) for zero in zeros]
        rivals.append([_Task(sample, z, m) for z, m in zip(zeros, models, strict=True)])
    fits = [job.rate_model is None for job in jobs]
    for turn in range(max(1, config.iterations)):
        fitting = turn < config.iterations
        busy = [i for i, few in enumerate(rivals) if len(few) > 1 or (fits[i] and fitting)]
        tasks = [task for i in busy for task in rivals[i]]
        levels = iter(_search_all(tasks, config, search))
        for i in busy:
            tried = [(task, next(levels)) for task in rivals[i]]
            best, found = min(tried, key=lambda trial: _trial_cost(trial[0], trial[1], config))
            if fits[i] and fitting:
                best.model = RateModel.from_levels(found)
            rivals[i] = [best]
    return [
        _Task(scaled, best.zero, best.model) for scaled, (best,) in zip(runs, rivals, strict=True)
    ]


def _first_model(runs: FloatMatrix, zero: bool) -> RateModel:
    """Model of levels rounded without regard to the trellis."""
    shift = -0.25 if zero else 0.25
    return RateModel.from_levels(np.rint(runs * 0.5 + shift).astype(np.int32))


def _trial_cost(task: _Task, levels: npt.NDArray[np.int32], config: TrellisConfig) -> float:
    """Squared error plus priced bits, per weight."""
    if not levels.size:
        return 0.0
    index = dequantize_index(levels, config.states, 1, task.zero)
    error = task.runs - index.astype(np.float32) * np.float32(0.5)
    return float(np.square(error).mean(dtype=np.float64)) + 4.0 * LAM * sign_coded_bits(levels)


def _normalise(job: TrellisJob, axis: int) -> FloatMatrix:
    """Weights in units of two steps, runs as rows."""
    weights = np.asarray(job.weights, np.float32)
    if weights.ndim != 2:
        raise QuantizationError(f"weights must be a matrix, not {weights.ndim}-dimensional")
    step = np.float32(job.step)
    check_range(weights, float(step), 4.0 * (MAX_LEVEL - 2))
    scaled = weights / (step + step)
    return scaled.T if axis == 0 else scaled


def _sample_runs(runs: FloatMatrix) -> FloatMatrix:
    """About 16,384 weights of evenly spaced runs (starts of runs, when they are very long)."""
    if runs.size <= _SAMPLE:
        return runs
    length = min(runs.shape[1], _SAMPLE // 16)
    count = max(1, _SAMPLE // length)
    stride = max(1, runs.shape[0] // count)
    return runs[::stride, :length]


@dataclass(frozen=True, slots=True)
class _Lanes:
    """Runs searched side by side: consecutive lanes of jobs, by job."""

    length: int
    parts: tuple[tuple[int, int, int], ...]
    """(job, first run, one past the last run)."""


def _plan(shapes: Iterable[tuple[int, int]], lanes: int) -> list[_Lanes]:
    """Group runs of like length into blocks of at most ``lanes``; padding below a third."""
    blocks: list[_Lanes] = []
    parts: list[tuple[int, int, int]] = []
    length = used = 0
    order = sorted(
        ((runs, size, job) for job, (runs, size) in enumerate(shapes) if runs and size),
        key=lambda item: -item[1],
    )
    for runs, size, job in order:
        start = 0
        while start < runs:
            if parts and (used == lanes or (3 * size < 2 * length and used >= 64)):
                blocks.append(_Lanes(length, tuple(parts)))
                parts, used = [], 0
            if not parts:
                length = size
            stop = min(runs, start + lanes - used)
            parts.append((job, start, stop))
            used += stop - start
            start = stop
    if parts:
        blocks.append(_Lanes(length, tuple(parts)))
    return blocks


class _Search(Protocol):
    def __call__(
        self, lanes: Sequence[FloatMatrix], tables: Sequence[CostTables], trellis: Machine
    ) -> list[npt.NDArray[np.int32]]: ...


def _backend(name: str) -> _Search:
    if name in ("auto", "numpy"):
        return search_numpy
    if name == "torch":
        from weightvid.quantize.trellis_torch import search_torch

        return search_torch
    raise QuantizationError(f"no trellis backend {name!r}; choose auto, numpy or torch")


def _search_all(
    tasks: Sequence[_Task], config: TrellisConfig, search: _Search
) -> list[npt.NDArray[np.int32]]:
    trellis = machine(config.states)
    found = [np.zeros(task.runs.shape, np.int32) for task in tasks]
    tables: dict[int, CostTables] = {}
    for number, task in enumerate(tasks):
        if task.runs.size:
            peak = float(max(task.runs.max(), -task.runs.min()))
            tables[number] = CostTables.build(task.model, config.lam, peak, task.zero)
    longest = max((task.runs.shape[1] for task in tasks), default=1)
    lanes = min(_LANES, max(_MIN_LANES, _DECISION_BYTES // (config.states * max(longest, 1))))
    for block in _plan((task.runs.shape for task in tasks), lanes):
        parts = [tasks[job].runs[start:stop] for job, start, stop in block.parts]
        prices = [tables[job] for job, _, _ in block.parts]
        levels = search(parts, prices, trellis)
        for (job, start, stop), part in zip(block.parts, levels, strict=True):
            found[job][start:stop] = part
    return found

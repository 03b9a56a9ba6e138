"""Search of the step factor for a target: few whole encodings, led by an estimate."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from math import exp, isfinite, log, log10
from typing import Final

from weightvid.errors import TargetError
from weightvid.planning.survey import Survey
from weightvid.planning.target import SIZE_TOLERANCE, SQNR_TOLERANCE_DB, Target

#: step factors that are looked at: beyond them every tensor stands at a limit.
_SMALLEST, _LARGEST = 1e-4, 1e4
_MOST_TRIALS: Final = 12
#: sizes are aimed at this little below their bound, in parts of the tolerance.
_AIM: Final = 0.4
#: bits of a weight that is kept exactly, to begin with.
_EXACT_BITS: Final = 18.0


@dataclass(frozen=True, slots=True)
class Trial:
    """A whole encoding.

    Attributes
    ----------
    factor : float
        k.
    file_bytes : int
    sqnr_db : float or None
        None: no noise.
    """

    factor: float
    file_bytes: int
    sqnr_db: float | None


def search(surveyed: Survey, target: Target, encode: Callable[[float], Trial]) -> tuple[Trial, int]:
    """Find a step factor whose archive meets a target of size, rate or SQNR.

    Parameters
    ----------
    surveyed : Survey
        With curves.
    target : Target
    encode : callable
        Makes the archive of a step factor.

    Returns
    -------
    Trial
        The last encoding, which meets the target.
    int
        Number of encodings.

    Raises
    ------
    TargetError
        The target is out of reach; the nearest that was found is named.
    """
    goal = _goal(surveyed, target)
    low, high = factor_range(surveyed)
    tried: list[tuple[Trial, float]] = []
    while len(tried) < _MOST_TRIALS:
        factor = goal.next_factor(low, high, tried)
        made = encode(factor)
        value = goal.value(made)
        tried.append((made, value))
        if goal.met(value):
            return made, len(tried)
        if goal.too_coarse(value):
            high = factor
        else:
            low = factor
        # At a limit of the steps, or nothing left between a trial too coarse and one too fine.
        if high / low < 1 + 1e-4:
            break
    best = min(tried, key=lambda pair: abs(pair[1] - goal.aim))
    value = best[1] / (surveyed.weights / 8) if target.kind == "bpw" else best[1]
    raise TargetError(
        f"{target.show(target.value)} cannot be reached with "
        f"{'measured steps' if surveyed.measured else f'the rule {surveyed.options.rule!r}'}; "
        f"the nearest is {target.show(value)}"
    )


def _goal(surveyed: Survey, target: Target) -> _Goal:
    if target.kind == "sqnr":
        return _Sqnr(surveyed, target.value)
    per_bit = surveyed.weights / 8 if target.kind == "bpw" else 1.0
    return _Size(surveyed, target.value * per_bit)


def factor_range(surveyed: Survey) -> tuple[float, float]:
    """Step factors beyond which no step changes."""
    if not surveyed.stats:
        return 1.0, 1.0
    low, high = _LARGEST, _SMALLEST
    for number in surveyed.stats:
        finest, coarsest = surveyed.limits(number)
        low = min(low, finest / surveyed.units[number])
        high = max(high, coarsest / surveyed.units[number])
    return max(low, _SMALLEST), min(high, _LARGEST)


class _Goal(ABC):
    """A target in numbers, with an estimate that earlier trials correct."""

    aim: float

    def __init__(self, surveyed: Survey) -> None:
        self._surveyed = surveyed

    @abstractmethod
    def value(self, made: Trial) -> float:
        """What the target is about."""

    @abstractmethod
    def met(self, value: float) -> bool:
        """Whether a value is good."""

    @abstractmethod
    def too_coarse(self, value: float) -> bool:
        """Whether the steps must become finer."""

    @abstractmethod
    def estimate(self, factor: float) -> float:
        """Value to be expected."""

    @abstractmethod
    def corrected(self, factor: float, tried: list[tuple[Trial, float]]) -> float:
        """Value to be expected, knowing earlier trials."""

    def next_factor(self, low: float, high: float, tried: list[tuple[Trial, float]]) -> float:
        """Step factor to try next, within the limits."""
        left, right = log(low), log(high)
        ends = [f for f in (low, high) if not any(abs(t.factor / f - 1) < 1e-9 for t, _ in tried)]
        for end in ends:
            value = self.corrected(end, tried)
            beyond = self.too_coarse(value) if end == low else not self.too_coarse(value)
            if beyond and not self.met(value):
                return end
        for _ in range(50):
            middle = (left + right) / 2
            if self.corrected(exp(middle), tried) == self.aim:
                break
            if self.too_coarse_of_aim(self.corrected(exp(middle), tried)):
                right = middle
            else:
                left = middle
        found = exp((left + right) / 2)
        # Near an end that has been tried, the estimate is of no use any more.
        margin = (high / low) ** 0.02
        known = {t.factor for t, _ in tried}
        if (low in known and found < low * margin) or (high in known and found > high / margin):
            return found if len(tried) < 3 else (low * high) ** 0.5
        return found

    @abstractmethod
    def too_coarse_of_aim(self, value: float) -> bool:
        """Whether a value lies on the coarse side of the aim."""


class _Size(_Goal):
    """Bytes of the file, at most so many."""

    def __init__(self, surveyed: Survey, bound: float) -> None:
        super().__init__(surveyed)
        self._bound = bound
        self.aim = bound * (1 - _AIM * SIZE_TOLERANCE)
        coded = sum(stats.spec.size for stats in surveyed.stats.values())
        self._exact = (surveyed.weights - coded) * _EXACT_BITS / 8 + 600

    def value(self, made: Trial) -> float:
        return float(made.file_bytes)

    def met(self, value: float) -> bool:
        return self._bound * (1 - SIZE_TOLERANCE) <= value <= self._bound

    def too_coarse(self, value: float) -> bool:
        return value < self._bound * (1 - SIZE_TOLERANCE)

    def too_coarse_of_aim(self, value: float) -> bool:
        return value < self.aim

    def estimate(self, factor: float) -> float:
        steps = self._surveyed.steps(factor)
        return sum(self._surveyed.curves[n].bits(s) for n, s in steps.items()) / 8

    def corrected(self, factor: float, tried: list[tuple[Trial, float]]) -> float:
        offset, ratio = self._exact, 1.0
        if tried:
            made, value = tried[-1]
            offset = min(offset, 0.9 * value)
            ratio = (value - offset) / max(1.0, self.estimate(made.factor))
        if len(tried) > 1:
            (a, x), (b, y) = tried[-2:]
            run = self.estimate(b.factor) - self.estimate(a.factor)
            slope = (y - x) / run if run else 0.0
            if 0.5 < slope < 2:
                ratio, offset = slope, y - slope * self.estimate(b.factor)
        return offset + ratio * self.estimate(factor)


class _Sqnr(_Goal):
    """Decibels, nearly so many."""

    def __init__(self, surveyed: Survey, wanted: float) -> None:
        super().__init__(surveyed)
        self.aim = wanted

    def value(self, made: Trial) -> float:
        return float("inf") if made.sqnr_db is None else made.sqnr_db

    def met(self, value: float) -> bool:
        return abs(value - self.aim) <= SQNR_TOLERANCE_DB

    def too_coarse(self, value: float) -> bool:
        return value < self.aim

    def too_coarse_of_aim(self, value: float) -> bool:
        return value < self.aim

    def estimate(self, factor: float) -> float:
        steps = self._surveyed.steps(factor)
        noise = sum(self._surveyed.curves[n].noise(s) for n, s in steps.items())
        power = sum(curve.power for curve in self._surveyed.curves.values())
        return 10 * log10(power / noise) if noise > 0 and power > 0 else float("inf")

    def corrected(self, factor: float, tried: list[tuple[Trial, float]]) -> float:
        error = 0.0
        if tried:
            made, value = tried[-1]
            error = value - self.estimate(made.factor)
        return self.estimate(factor) + (error if isfinite(error) else 0.0)

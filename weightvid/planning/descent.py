"""Search of the steps one tensor at a time, judged on the whole model.

Rounding errors are a draw: at nearly the same step, the harm of one tensor differs by half from
draw to draw, and errors of several tensors add up or cancel. So a few steps around that of equal
slope are tried for each tensor, and the one that serves the whole model best is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import exp, log
from typing import Final

import numpy as np

from weightvid.planning.evaluate import Evaluator
from weightvid.planning.sensitivity import Group
from weightvid.planning.survey import Survey
from weightvid.planning.verdict import Verdict

#: in larger groups luck evens out, and a try takes long.
_LARGE: Final = 1 << 22
#: tries for each group in one sweep.
TRIES: Final = 3
#: steps stay within this many logarithms of those of equal slope.
_REACH: Final = 0.25
#: and these move by at most so many logarithms at a time towards a bound.
_SHIFT: Final = 0.4
#: best of a few draws, in standard deviations of one.
_LUCK: Final = 0.8
_MOST_LUCK: Final = 0.4
#: harm goes with 4**-bits: what a bit for every weight is worth, in the logarithm of the harm.
_PER_BIT: Final = 2 * log(2)
#: what lies inside the bound counts this much, and what lies beyond it: near 1, so that no bit is
#: bought or sold much above its price.
_INSIDE, _BEYOND = 0.8, 1.3
#: what lies beyond counts this much where a bound was missed.
STRICT: Final = 3.0
#: a sweep that gains less ends the search.
_LEAST_GAIN: Final = 0.02


@dataclass(frozen=True, slots=True)
class Bound:
    """What must be held.

    Attributes
    ----------
    kind : str
        ``drive`` of the verdict, or ``bits`` of all quantized tensors by the curves.
    value : float
    inside, beyond : float
        What harm or bits count that lie inside the bound, and beyond it.
    """

    kind: str
    value: float
    inside: float = _INSIDE
    beyond: float = _BEYOND


@dataclass(slots=True)
class Point:
    """Steps, and what they come to."""

    steps: dict[int, float]
    verdict: Verdict
    bits: float


class Descent:
    """Search around the steps of equal slope.

    Parameters
    ----------
    surveyed : Survey
        With measured units.
    evaluator : Evaluator
    groups : sequence of tuple of int
    """

    def __init__(self, surveyed: Survey, evaluator: Evaluator, groups: Sequence[Group]) -> None:
        self._surveyed = surveyed
        self._evaluator = evaluator
        self._groups = [g for g in groups if sum(surveyed.specs[n].size for n in g) <= _LARGE]
        self._weights = sum(stats.spec.size for stats in surveyed.stats.values())
        self._draw = np.random.default_rng(0)

    def point(self, steps: Mapping[int, float]) -> Point:
        """What steps come to."""
        return Point(dict(steps), self._evaluator.verdict(steps), self.bits(steps))

    def bits(self, steps: Mapping[int, float]) -> float:
        """Bits of the levels, as the curves have it."""
        return sum(self._surveyed.curves[n].bits(step) for n, step in steps.items())

    def luck(self, scatter: Mapping[Group, float]) -> float:
        """Logarithm of the harm that a first sweep should save, by the scatter of the probes."""
        sizes = {g: sum(self._surveyed.specs[n].size for n in g) for g in self._groups}
        found = sum(sizes[g] * scatter.get(g, 0.0) for g in self._groups)
        return min(_MOST_LUCK, _LUCK * found / max(1, self._weights))

    def cost(self, point: Point, bound: Bound) -> float:
        """What is to become small: harm and bits, in logarithms of the harm."""
        harm = log(max(point.verdict.drive, 1e-12))
        bits = _PER_BIT * point.bits / max(1, self._weights)
        if bound.kind == "drive":
            excess = harm - log(max(bound.value, 1e-12))
            return bits + (bound.beyond if excess > 0 else bound.inside) * excess
        excess = bits - _PER_BIT * bound.value / max(1, self._weights)
        return harm + (bound.beyond if excess > 0 else bound.inside) * excess

    def run(self, point: Point, bound: Callable[[Point], Bound], calls: int) -> Point:
        """Improve a point until little is gained, or so many calls are spent.

        Parameters
        ----------
        point : Point
        bound : callable
            Gives the bound for a sweep that begins at a point.
        calls : int
        """
        last = self._evaluator.asked + max(0, min(calls, self._evaluator.left))
        while self._evaluator.asked < last and self._groups:
            before = self.cost(point, bound(point))
            for place in self._draw.permutation(len(self._groups)):
                point = self._improved(point, self._groups[place], bound(point), last)
            if before - self.cost(point, bound(point)) < _LEAST_GAIN:
                break
        return point

    def first(self, point: Point, calls: int) -> Point:
        """One sweep without a bound, bits and harm at one price; parameters as in :meth:`run`."""
        last = self._evaluator.asked + max(0, min(calls, self._evaluator.left))
        neutral = Bound("drive", point.verdict.drive, 1.0, 1.0)
        factor = self.factor(point.steps)
        for place in self._draw.permutation(len(self._groups)):
            point = self._improved(point, self._groups[place], neutral, last, factor)
        return point

    def _improved(
        self, point: Point, group: Group, bound: Bound, last: int, factor: float | None = None
    ) -> Point:
        """Best of a point and a few that differ in one group, whose steps lie near a factor."""
        factor = factor or self._aimed(point, bound)
        for _ in range(min(TRIES, last - self._evaluator.asked)):
            steps = self._changed(point, group, factor)
            if steps == point.steps:
                continue  # at a limit
            tried = self.point(steps)
            if self.cost(tried, bound) < self.cost(point, bound):
                point = tried
        return point

    def factor(self, steps: Mapping[int, float]) -> float:
        """Step factor of steps: their geometric mean in units, weight by weight."""
        total = sum(
            self._surveyed.specs[n].size * log(step / self._surveyed.units[n])
            for n, step in steps.items()
        )
        return exp(total / max(1, self._weights))

    def _aimed(self, point: Point, bound: Bound) -> float:
        """Step factor at which a point would be on its bound; harm goes with the square."""
        factor = self.factor(point.steps)
        if bound.kind != "drive":
            return factor
        excess = log(max(point.verdict.drive, 1e-12) / max(bound.value, 1e-12))
        return factor * exp(-min(_SHIFT, max(-_SHIFT, excess / 2)))

    def _changed(self, point: Point, group: Group, factor: float) -> dict[int, float]:
        """Other steps of a group, near those of equal slope."""
        change = exp(float(self._draw.uniform(-_REACH, _REACH)))
        steps = dict(point.steps)
        for n in group:
            steps[n] = self._surveyed.limited(n, change * factor * self._surveyed.units[n])
        return steps

"""Plans made by evaluation: sensitivities first, then the steps that meet a target."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import exp, log, sqrt
from typing import Any, BinaryIO, Final

from weightvid.errors import TargetError
from weightvid.planning.descent import STRICT, TRIES, Bound, Descent, Point
from weightvid.planning.evaluate import Evaluator, check_target
from weightvid.planning.search import Trial, factor_range, search
from weightvid.planning.sensitivity import PROBES, Group, groups_of, measured_units
from weightvid.planning.survey import Survey, slopes
from weightvid.planning.target import SIZE_TOLERANCE, Target
from weightvid.planning.verdict import Verdict

#: groups that are measured apart if no budget is given.
_MOST_GROUPS: Final = 128
#: k of the probes, the same for all targets, so that they are made once. A number must move to
#: say anything.
_PROBING: Final = 0.35
_PROBING_NUMBERS: Final = 0.7
#: evaluations of whole models on the way to a factor.
_WHOLE: Final = 8
#: sweeps of the descent that a default budget has room for.
_SWEEPS: Final = 3
#: a bound on a loss is aimed at this little below it.
_AIM: Final = 0.98
#: where a bound does not hold, steps shrink at least by this factor.
_FINER: Final = 0.95
#: a sweep that ends so far below its aim, in the logarithm, is made again from coarser steps, but
#: not from ones coarser than by this.
_SLACK: Final = 0.15
_FARTHEST: Final = 1.5
#: encodings at most, until a bound holds on the decoded archive.
_MOST_ENCODINGS: Final = 12
#: sizes at which the descent is aimed, in parts of the bound.
_AIM_SIZE: Final = 1 - 0.4 * SIZE_TOLERANCE

Encode = Callable[[Mapping[int, float], float, Mapping[str, Any]], Trial]


@dataclass(frozen=True, slots=True)
class Measured:
    """What an evaluation led to.

    Attributes
    ----------
    made : Trial
        The last encoding.
    encodings : int
    verdict : Verdict
        Of the decoded archive.
    metric_before : float or None
        Of the original.
    """

    made: Trial
    encodings: int
    verdict: Verdict
    metric_before: float | None


class Planner:
    """Finds the steps of one archive.

    Parameters
    ----------
    surveyed : Survey
    evaluator : Evaluator
    encode : callable
        Writes the archive of steps, a step factor and entries for its header.
    stream : binary file object
        Holds the last archive.
    """

    def __init__(
        self, surveyed: Survey, evaluator: Evaluator, encode: Encode, stream: BinaryIO
    ) -> None:
        self._free = surveyed
        self._evaluator = evaluator
        self._write = encode
        self._stream = stream
        self._encodings = 0
        options = surveyed.options
        self._target = options.target
        budget = options.evaluation.budget if options.evaluation is not None else None
        most = _MOST_GROUPS if budget is None else max(1, (budget - _WHOLE) // 2)
        self._groups: list[Group] = groups_of(surveyed, most)
        each = len(PROBES) + TRIES * _SWEEPS
        evaluator.budget = budget or each * len(self._groups) + _WHOLE

    def run(self) -> Measured:
        """Measure, search, encode, and judge the decoded archive.

        Raises
        ------
        EvaluationError
            The function failed, or cannot judge the target.
        TargetError
            The target is out of reach.
        """
        original = self._evaluator.original()
        target = self._target
        if target is not None:
            check_target(original, target.kind, self._evaluator.name)
        self._vectors = original.outputs.vectors is not None
        factor = _PROBING if self._vectors else _PROBING_NUMBERS
        units: Mapping[int, float] = self._free.units
        scatter: dict[Group, float] = {}
        if self._free.stats:
            units, scatter = measured_units(self._free, self._evaluator, factor, self._groups)
        self._surveyed = replace(self._free, units=units, measured=True)
        self._descent = Descent(self._surveyed, self._evaluator, self._groups)
        self._luck = exp(self._descent.luck(scatter)) if self._vectors else 1.0
        if target is None or target.measured:
            made = self._bounded_loss(target)
        else:
            made = self._bounded_size(target)
        self._evaluator.finish()
        verdict = self._evaluator.archive(self._stream)
        return Measured(made, self._encodings, verdict, original.outputs.metric)

    def _encode(self, steps: Mapping[int, float], factor: float) -> Trial:
        self._encodings += 1
        measured = "each tensor" if len(self._groups) == len(steps) else "groups of tensors"
        about = {
            "evaluation": f"{measured} measured",
            "slopes": slopes(steps, self._surveyed.units, factor),
        }
        return self._write(steps, factor, about)

    def _encode_factor(self, factor: float) -> Trial:
        return self._encode(self._surveyed.steps(factor), factor)

    # A size, a rate, or an SQNR: the file decides.

    def _bounded_size(self, target: Target) -> Trial:
        made, _ = search(self._surveyed, target, self._encode_factor)
        if target.kind == "sqnr" or not self._vectors or not self._surveyed.stats:
            return made
        bytes_ = target.value * (self._surveyed.weights / 8 if target.kind == "bpw" else 1.0)
        start = self._descent.point(self._surveyed.steps(made.factor))
        overhead = made.file_bytes - start.bits / 8
        point = start
        for _ in range(2):
            bound = Bound("bits", 8 * (_AIM_SIZE * bytes_ - overhead))
            left = self._evaluator.left
            point = self._descent.run(point, partial(_fixed, bound), left)
            tried = self._encode(point.steps, self._descent.factor(point.steps))
            if bytes_ * (1 - SIZE_TOLERANCE) <= tried.file_bytes <= bytes_:
                return tried
            overhead = tried.file_bytes - point.bits / 8
        return self._encode_factor(made.factor)

    # A loss: the evaluation decides.

    def _bounded_loss(self, target: Target | None) -> Trial:
        first = self._free.options.first_factor
        if not self._surveyed.stats:
            return self._encode_factor(first)
        if target is None:
            if not self._vectors:
                return self._encode_factor(first)
            # As faithful as the recipe's own steps.
            loss = self._loss(self._descent.point(self._free.steps(first)))
            return self._descended(self._solve(self._luck * loss), loss, None)
        if target.kind == "kl":
            solved = self._solve(_AIM * self._luck * target.value)
            lowest = factor_range(self._surveyed)[0]
            if solved[0] <= lowest * 1.0001 and not self._holds(solved[1].verdict, target):
                raise self._unreachable(target, solved[1].verdict)
            return self._descended(solved, target.value, target)
        factor, point = self._largest(target)
        return self._descended((factor, point), point.verdict.loss, target)

    def _at(self, factor: float) -> Point:
        return self._descent.point(self._surveyed.steps(factor))

    def _solve(self, loss: float) -> tuple[float, Point]:
        """Step factor whose loss is nearly this: it goes with the square of the steps."""
        low, high = factor_range(self._surveyed)
        factor = min(high, max(low, self._free.options.first_factor))
        best: tuple[float, Point] | None = None
        for _ in range(_WHOLE):
            point = self._at(factor)
            off = log(self._loss(point) / max(loss, 1e-12))
            if best is None or abs(off) < abs(log(self._loss(best[1]) / max(loss, 1e-12))):
                best = (factor, point)
            moved = min(high, max(low, factor * exp(-min(2.0, max(-2.0, off)) / 2)))
            if abs(off) < 0.1 or abs(log(moved / factor)) < 0.01:
                break
            factor = moved
        return best if best is not None else (factor, self._at(factor))

    def _loss_bound(self, loss: float, strict: bool, point: Point) -> Bound:
        """The loss and what drives the search go together, nearly."""
        bound = Bound("drive", loss * point.verdict.drive / self._loss(point))
        return replace(bound, beyond=STRICT) if strict else bound

    def _loss(self, point: Point) -> float:
        """What is bounded: without a target, the smoother form, which chance moves less."""
        verdict = point.verdict
        return max(verdict.drive if self._target is None else verdict.loss, 1e-12)

    def _largest(self, target: Target) -> tuple[float, Point]:
        """Largest step factor that was seen to keep the metric."""
        low, high = factor_range(self._surveyed)
        factor = min(high, max(low, self._free.options.first_factor))
        kept: tuple[float, Point] | None = None
        lowest = self._at(low)
        if not self._holds(lowest.verdict, target):
            raise self._unreachable(target, lowest.verdict)
        kept = (low, lowest)
        for _ in range(_WHOLE - 1):
            point = self._at(factor)
            if self._holds(point.verdict, target):
                low, kept = factor, (factor, point)
                factor = min(2 * factor, sqrt(factor * high))
            else:
                high = factor
                factor = max(factor / 2, sqrt(low * factor))
            if high / low < 1.05:
                break
        return kept

    def _holds(self, verdict: Verdict, target: Target) -> bool:
        return self._value(verdict, target) <= target.value

    def _value(self, verdict: Verdict, target: Target) -> float:
        if target.kind == "kl":
            return verdict.loss
        metric = verdict.metric
        return self._evaluator.original().drop(metric) if metric is not None else verdict.loss

    def _unreachable(self, target: Target, verdict: Verdict) -> TargetError:
        nearest = target.show(max(0.0, self._value(verdict, target)))
        return TargetError(
            f"{target.show(target.value)} at most cannot be reached; the nearest is {nearest}"
        )

    def _lucky(self, start: Point, aim: float, reserve: int) -> Point:
        """A sweep; if it saves more harm than was hoped for, another one from coarser steps."""
        point = self._descent.first(start, self._evaluator.left - reserve)
        slack = log(aim / self._loss(point))
        if slack < _SLACK or self._evaluator.left - reserve < TRIES * len(self._groups):
            return point
        # Harm goes with the square of the steps: where a sweep with this luck ends at the aim.
        coarser = exp(min(_FARTHEST, slack) / 2)
        steps = {n: self._surveyed.limited(n, coarser * s) for n, s in start.steps.items()}
        again = self._descent.first(self._descent.point(steps), self._evaluator.left - reserve)
        if log(self._loss(again) / aim) < _SLACK:
            return again  # the bound is what is asked for, and this is the smaller file
        bound = self._loss_bound(aim, False, point)
        return min(point, again, key=lambda found: self._descent.cost(found, bound))

    def _descended(self, found: tuple[float, Point], loss: float, target: Target | None) -> Trial:
        """Improve the steps, encode, and judge the archive, until the bound holds."""
        point = found[1]
        aim = _AIM * loss
        if self._vectors:
            reserve = len(self._groups)
            point = self._lucky(point, aim, reserve)
            bound = partial(self._loss_bound, aim, False)
            point = self._descent.run(point, bound, self._evaluator.left - reserve)
        while True:
            if self._vectors and target is not None and self._loss(point) > aim:
                bound = partial(self._loss_bound, aim, True)
                point = self._descent.run(point, bound, TRIES * len(self._groups))
            factor = self._descent.factor(point.steps)
            made = self._encode(point.steps, factor)
            if target is None:
                return made
            verdict = self._evaluator.archive(self._stream)
            if self._holds(verdict, target):
                return made
            shrink = _FINER
            if target.kind == "kl":
                shrink = min(_FINER, sqrt(aim / max(verdict.loss, 1e-12)))
            aim = min(aim, shrink * shrink * self._loss(point))
            finer = {n: self._surveyed.limited(n, shrink * s) for n, s in point.steps.items()}
            if finer == point.steps or self._encodings >= _MOST_ENCODINGS:
                raise self._unreachable(target, verdict)
            point = self._descent.point(finer)


def _fixed(bound: Bound, _: Point) -> Bound:
    return bound

"""Measured sensitivities: the harm of an error of each tensor, from a few evaluations.

A tensor's harm is taken to grow with its squared error. Steps at one slope of harm against bits
then go with the inverse root of the harm per squared error, whatever the size of the tensor.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import exp, log, pi, sqrt
from typing import Final

from weightvid.planning.evaluate import Evaluator
from weightvid.planning.survey import Survey

#: steps of the probes, relative to the data-free ones; one draw of rounding errors is harmed by
#: luck, a second one halves that.
PROBES: Final = (1.0, 1.1)
#: how far measurements are believed, in the logarithm, against the data-free rule: those of
#: outputs, and those of a number, which moves in steps and by chance.
_TRUST: Final = {True: 0.95, False: 0.6}
#: no group is told apart from the typical one by more than this factor.
_WIDEST: Final = 40.0
_DIGITS: Final = re.compile(r"\d+")

Group = tuple[int, ...]


def groups_of(surveyed: Survey, most: int) -> list[Group]:
    """Tensors that are measured together, at most so many groups where that can be.

    Each alone if possible; else those whose names differ in numbers alone; and then the groups of
    the fewest bits are joined.
    """
    single: list[Group] = [(number,) for number in surveyed.stats]
    if len(single) <= most:
        return single
    alike: dict[tuple[str, int], list[int]] = {}
    for number in surveyed.stats:
        spec = surveyed.specs[number]
        alike.setdefault((_DIGITS.sub("#", spec.name), len(spec.shape)), []).append(number)
    groups = [tuple(members) for members in alike.values()]
    while len(groups) > max(1, most):
        groups.sort(key=lambda group: sum(surveyed.specs[n].size for n in group))
        groups = [groups[0] + groups[1], *groups[2:]]
    return sorted(groups)


def measured_units(
    surveyed: Survey, evaluator: Evaluator, factor: float, groups: Sequence[Group]
) -> tuple[dict[int, float], dict[Group, float]]:
    """Units from a probe or two of each group.

    Parameters
    ----------
    surveyed : Survey
        With curves, and the units of the data-free rule.
    evaluator : Evaluator
    factor : float
        k of the probes.
    groups : sequence of tuple of int
        Tensors that are probed together: they keep their proportions.

    Returns
    -------
    mapping of int to float
        Units, scaled so that the steps at ``factor`` do as much harm as the data-free ones, as
        far as the probes tell.
    mapping of tuple to float
        Standard deviation of the logarithm of a group's harm from draw to draw; empty where each
        was probed once.
    """
    base = surveyed.steps(factor)
    believed = evaluator.original().outputs.vectors is not None
    probes = PROBES if evaluator.left >= 3 * len(groups) else PROBES[:1]
    harms, scatter = [], {}
    for group in groups:
        found = []
        for probe in probes:
            steps = {n: surveyed.limited(n, probe * base[n]) for n in group}
            expected = sum(
                surveyed.curves[n].noise(s) / surveyed.units[n] ** 2 for n, s in steps.items()
            )
            found.append(max(0.0, evaluator.verdict(steps).drive) / expected)
        harms.append(sum(found) / len(found))
        if len(found) > 1 and min(found) > 0:
            # Two draws differ by the root of pi / 4 standard deviations, twice, in the mean.
            scatter[group] = abs(log(found[1] / found[0])) * sqrt(pi) / 2
    relative = _tempered(harms, _TRUST[believed])
    units = {
        n: surveyed.units[n] / sqrt(harm)
        for group, harm in zip(groups, relative, strict=True)
        for n in group
    }
    return _equally_harmful(surveyed, units, factor), scatter


def _tempered(harms: Sequence[float], trust: float) -> list[float]:
    """Harms relative to the typical one, drawn towards it and held near it."""
    known = sorted(harm for harm in harms if harm > 0)
    if not known:
        return [1.0] * len(harms)
    typical = known[len(known) // 2]
    limit = log(_WIDEST)
    return [
        exp(trust * min(limit, max(-limit, log(harm / typical)))) if harm > 0 else
        exp(-trust * min(limit, max(0.0, log(typical / known[0]))))
        for harm in harms
    ]  # fmt: skip


def _equally_harmful(
    surveyed: Survey, units: Mapping[int, float], factor: float
) -> dict[int, float]:
    """Units scaled so that, at a step factor, they do as much harm as the survey's own."""

    def harm(steps: Mapping[int, float]) -> float:
        return sum(surveyed.curves[n].noise(s) / units[n] ** 2 for n, s in steps.items())

    wanted = harm(surveyed.steps(factor))
    low, high = -8.0, 8.0
    for _ in range(40):
        middle = (low + high) / 2
        steps = {n: surveyed.limited(n, factor * exp(middle) * u) for n, u in units.items()}
        if harm(steps) < wanted:
            low = middle
        else:
            high = middle
    return {n: exp((low + high) / 2) * u for n, u in units.items()}

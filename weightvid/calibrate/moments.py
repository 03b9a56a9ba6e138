"""From statistics to what packing takes: moments, steps by frequency, biases, units."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Final

import numpy as np

from weightvid.calibrate.stats import TensorMoments
from weightvid.levels.code import CodedPart, code_part, part_rows
from weightvid.levels.feedback import factorize
from weightvid.levels.steps import Moments, TensorPlan, measured_units, steps_from_costs
from weightvid.levels.transform import forward_moment, view_of
from weightvid.levels.trellis import entropy_bits
from weightvid.loader import Array, TensorSpec, from_float32, to_float32
from weightvid.spec import PACKABLE

if TYPE_CHECKING:
    from weightvid.pack import Survey

#: outputs that a trial is made with.
_SAMPLE_ROWS: Final = 64
#: what a bit for every weight is worth.
DB_PER_BIT: Final = 20 * float(np.log10(2))


def with_statistics(
    survey: Survey, tensors: Mapping[str, TensorMoments], sensitivity: Mapping[str, float]
) -> Survey:
    """A survey whose tensors are quantized with statistics where they are useful.

    Parameters
    ----------
    survey : Survey
    tensors : mapping of str to TensorMoments
        By name in the state dict; an alias counts for what it stands for.
    sensitivity : mapping of str to float
        As in `weightvid.calibrate.CalibrationStats`.
    """
    aliases = survey.reader.contents.aliases
    known = {aliases.get(name, name): found for name, found in tensors.items()}
    losses = {aliases.get(name, name): loss for name, loss in sensitivity.items()}
    numbers = {spec.name: number for number, spec in enumerate(survey.specs)}
    names = {number: survey.specs[number].name for number in survey.stats}
    takers = {number: _taker(survey, known.get(name), numbers) for number, name in names.items()}
    uses = Counter(takers.values())
    moments: dict[int, Moments] = {}
    for number, name in names.items():
        taker = takers[number] if uses[takers[number]] == 1 else None
        if name in known:
            made = packing_moments(known[name], survey.specs[number], taker)
            moments |= {} if made is None else {number: made}
    units = measured_units(list(survey.units.values()), list(survey.stats.values()), losses)
    return replace(survey, moments=moments, units=dict(zip(survey.stats, units, strict=True)))


def _taker(survey: Survey, known: TensorMoments | None, numbers: Mapping[str, int]) -> int | None:
    """Number of the exact tensor that may take the shifts of a layer's mean outputs."""
    if known is None or known.bias is None:
        return None
    number = numbers.get(survey.reader.contents.aliases.get(known.bias, known.bias))
    if number is None or number in survey.stats or survey.specs[number].dtype not in PACKABLE:
        return None
    kept = any(fnmatchcase(survey.specs[number].name, p) for p in survey.options.keep)
    return None if kept else number


def packing_moments(known: TensorMoments, spec: TensorSpec, bias: int | None) -> Moments | None:
    """Statistics of a tensor as packing takes them; None where they are of no use.

    Where a bias makes up for shifts of the mean outputs, errors are fed back by the covariance of
    the inputs, as their mean no longer counts.
    """
    view, (groups, columns) = view_of(spec.shape), known.mean.shape
    if known.axis == 0:
        fits = view.rows == groups * columns
        bias = bias if groups == 1 else None
    else:
        fits = view.columns == columns and not view.rows % groups
    if not (fits and known.useful):
        return None
    moment, mean = known.moment, known.mean
    if bias is not None:
        moment = moment - mean[:, :, None] * mean[:, None, :]
    made = Moments(moment, known.damping, known.axis, mean, bias, known.bias_sign)
    if not view.kernel or known.axis == 0:
        return made
    parts = forward_moment(moment, view.kernel)
    costs = np.stack([factorize(part, known.damping, by_energy=False).cost for part in parts])
    return replace(made, frequency_steps=steps_from_costs(costs, view.kernel))


class Coded:
    """A whole tensor that is quantized in memory.

    Attributes
    ----------
    parts : list of CodedPart
    stored : ndarray
        Elements that a loader will give, in the tensor's own type and shape.
    values : ndarray of float32
        The same as numbers.
    """

    def __init__(
        self, plan: TensorPlan, number: int, elements: Array, moments: Moments | None
    ) -> None:
        rows = elements.reshape(plan.view.rows, plan.view.columns)
        self.parts: list[CodedPart] = [
            code_part(rows[first : first + count], plan, number, first, moments)
            for first, count in part_rows(plan)
        ]
        self._plan = plan
        self.stored: Array = np.concatenate([part.stored for part in self.parts]).reshape(
            plan.spec.shape
        )
        self.values = values_of(self.stored, plan.spec)

    @property
    def bits(self) -> float:
        """Entropy of the levels, per weight."""
        return entropy_bits(np.concatenate([part.samples for part in self.parts]))

    def corrected_bias(self, survey: Survey, moments: Moments | None) -> tuple[str, Array] | None:
        """Name and elements of the bias that makes up for a shift of the mean outputs."""
        shifts = [part.shift for part in self.parts if part.shift is not None]
        if moments is None or moments.bias is None or not np.isfinite(shifts).all():
            return None
        spec = survey.specs[moments.bias]
        values = values_of(survey.reader.read(spec.name), spec)
        return spec.name, from_float32(values + moments.bias_sign * sum(shifts), spec.dtype)


def values_of(stored: Array, spec: TensorSpec) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """Stored elements as float32, in their shape."""
    return to_float32(stored.reshape(-1), spec.dtype).reshape(stored.shape)


def sample_rows(rows: int, groups: int, axis: int) -> slice:
    """Rows of a tensor that a trial is made with: some outputs of a layer of one group."""
    return slice(None, None, max(1, rows // _SAMPLE_ROWS) if groups == axis == 1 else 1)

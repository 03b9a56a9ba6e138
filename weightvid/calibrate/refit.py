"""Weights fitted anew to the original outputs, from the inputs that quantized layers make.

A layer was to put out ``W x``, but is given x' in place of x. The weights V that come nearest,
``E |W x - V x'|^2`` least, are ``W C (H')^-1`` with ``C = E[x x'^T]`` and ``H' = E[x' x'^T]``; with
damping they stay near W in directions that x' hardly visits. Where a bias takes the means, C and
H' are covariances. V is what is quantized then, with error feedback through H'. What is best is
tried on samples held back.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import log10
from typing import Final

import numpy as np

from weightvid.calibrate.moments import (
    DB_PER_BIT,
    Coded,
    sample_rows,
    values_of,
)
from weightvid.calibrate.sums import InputMeans
from weightvid.levels.steps import Moments, TensorPlan
from weightvid.loader import Array, Floats, from_float32

#: dampings of the fit, as parts of the mean diagonal; None: the weights stay as they are.
FITS: Final = (None, 1.0, 0.1, 0.01)


@dataclass(frozen=True, slots=True)
class Way:
    """How a tensor is quantized.

    ``sequential``: for the inputs that the quantized layers make, the weights fitted anew with a
    damping ``fit``, unless that is None; ``plain``: for those of the original model; ``none``:
    without statistics.
    """

    kind: str
    fit: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """A tensor, and all that the ways to quantize it need.

    Its stored elements in its shape; plans with statistics, and without; moments of the original
    model; means over the inputs to fit to, and over those to check on.
    """

    array: Array
    plan: TensorPlan
    rival: TensorPlan
    moments: Moments
    fitted: InputMeans
    held: InputMeans

    def code(self, way: Way, number: int = 0) -> Coded:
        """Quantize it in some way."""
        if way.kind == "none":
            return Coded(self.rival, number, self.array, None)
        moments, elements, centred = self.moments, self.array, self.moments.bias is not None
        if way.kind == "sequential":
            known = self.fitted.centred() if centred else self.fitted
            moments = replace(moments, moment=known.moment, mean=known.mean)
            if way.fit is not None:
                elements = from_float32(refit(self.values, known, way.fit), self.plan.spec.dtype)
        return Coded(self.plan, number, elements, replace(moments, bias=None))

    @property
    def values(self) -> Floats:
        """The weights as a matrix, inputs along the columns."""
        return values_of(self.array, self.plan.spec).reshape(len(self.array), -1)

    def shift(self, restored: Floats) -> Floats:
        """What the bias must gain for the mean outputs to be the original's, shape (outputs,)."""
        fitted = self.fitted
        made = restored.reshape(len(restored), -1)
        shares = (np.split(matrix, len(fitted.mean)) for matrix in (self.values, made))
        parts = zip(*shares, fitted.original_mean, fitted.mean, strict=True)
        found = [w @ before - v @ after for w, v, before, after in parts]
        return np.concatenate(found).astype(np.float32)

    def sampled(self) -> Layer:
        """Some outputs of a layer of one group, for trials."""
        rows = sample_rows(len(self.array), len(self.fitted.moment), 1)
        plan, rival = (
            replace(
                plan,
                spec=plan.spec._replace(shape=self.array[rows].shape),
                view=replace(plan.view, rows=len(self.array[rows])),
                row_scales=plan.row_scales[rows],
                row_steps=None if plan.row_steps is None else plan.row_steps[rows],
            )
            for plan in (self.plan, self.rival)
        )
        return Layer(self.array[rows], plan, rival, self.moments, self.fitted, self.held)

    def cost_db(self, way: Way) -> float:
        """Error of the outputs on held-back inputs in decibels, a bit a weight counted as six."""
        coded, fitted, held = self.code(way), self.fitted, self.held
        pair = (self.values, coded.values.reshape(len(self.array), -1))
        shares = (np.split(matrix.astype(np.float64), len(fitted.moment)) for matrix in pair)
        lost = 0.0
        for group, (w, v) in enumerate(zip(*shares, strict=True)):
            lost += float(np.vdot(w @ held.original[group], w) + np.vdot(v @ held.moment[group], v))
            lost -= 2 * float(np.vdot(w @ held.cross[group], v))
            if self.moments.bias is not None:
                gained = w @ fitted.original_mean[group] - v @ fitted.mean[group]
                missing = w @ held.original_mean[group] - v @ held.mean[group]
                lost += float(np.vdot(gained, gained - 2 * missing))
        return 10 * log10(max(lost, 1e-300)) + DB_PER_BIT * coded.bits


def choose(layer: Layer) -> Way:
    """The way with the least error of the outputs on samples held back; rates count as well."""
    some = layer.sampled()
    ways = [Way("plain"), Way("none"), *(Way("sequential", fit) for fit in FITS)]
    return min(ways, key=some.cost_db)


def refit(weights: Floats, means: InputMeans, damping: float) -> Floats:
    """Weights, shape (R, C), that put out the same for the new inputs, as nearly as can be.

    ``damping`` is a part of the mean diagonal of H', above 0.
    """
    found = []
    shares = np.split(weights.astype(np.float64), len(means.moment))
    for part, moment, cross in zip(shares, means.moment, means.cross, strict=True):
        white = np.eye(len(moment))
        damped = moment + max(damping * float(np.diagonal(moment).mean()), 1e-30) * white
        found.append(part + part @ np.linalg.solve(damped, (cross - moment).T).T)
    return np.concatenate(found).astype(np.float32)

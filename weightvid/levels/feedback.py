"""Error feedback: levels chosen for what a layer puts out, not for its weights.

A layer computes ``W x``. With the second moment of its inputs, ``H = E[x x']``, an error matrix E
of the weights costs ``trace(E H E')`` at the output. Factored as ``H = L' L`` with L lower
triangular, that is ``sum_j c_j (e_j + sum_{i<j} N_ji e_i)^2`` for every row, where ``c_j = L_jj^2``
and N is L with unit diagonal. So the columns are quantized in order, each to the target ``w_j +
sum_{i<j} N_ji e_i``: the error of the earlier columns is pushed into those to come, and c_j is what
an error in column j still costs when all later columns make up for it as well as they can. No
inverse is needed. The bits of the levels are weighed in too (`FeedbackConfig.lam`): of each level
what it costs among levels of about its expected magnitude, see `weightvid.levels.prices`.

An error in one output matters together with those in others, too. With the second moment of what
pulls at the outputs, G (see `weightvid.calibrate.watch`), E costs ``trace(G E H E')``, and G is
factored in the same way: some rows are quantized at once, each to the target ``w_r + sum_{s<r} M_rs
e_s`` of all columns, so that later outputs make up for the errors of earlier ones.

The decoder knows nothing of this. Weights and moments are given in steps, transformed if need be.

Sources: Frantar and Alistarh, "Optimal Brain Compression", 2022; Frantar et al., "GPTQ", 2022; the
factorization without inverses is that of Babai's nearest plane, see Chen et al., "The geometry of
LLM quantization", 2025; feedback on both sides: Tseng et al., "Model-preserving adaptive rounding",
2025.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from weightvid.errors import QuantizationError
from weightvid.levels import trellis
from weightvid.levels.feedback_trellis import search
from weightvid.levels.prices import Classes
from weightvid.levels.rounding import check_range
from weightvid.levels.steps import MOST_GAIN
from weightvid.levels.trellis import MEAN_POINT, TABLE_MAX, CostTables, Places
from weightvid.loader import MAX_LEVEL, Floats

Method = Literal["uniform", "trellis"]
Integers = npt.NDArray[np.int32]
Moment = npt.NDArray[np.floating[Any]]

DAMPING: Final = 0.01
#: of G: how outputs go together differs from input to input, and is not to be trusted in full.
OUTPUT_DAMPING: Final = 0.3
LAM: Final = 0.05
#: columns whose targets are brought up to date by one product of matrices.
_BLOCK: Final = 64
#: rows quantized side by side, and what their number is rounded up to.
_LANES: Final = 512
_ALIGN: Final = 64
#: of the rows that are left one in so many, at least one, is quantized at once.
_SHARE: Final = 16
#: weights, and groups of rows, that prices are fitted to.
_SAMPLE: Final = 1 << 15
_SAMPLE_GROUPS: Final = 64


@dataclass(frozen=True, slots=True)
class FeedbackConfig:
    """How the feedback is run.

    Attributes
    ----------
    damping : float
        Part of the mean diagonal that is added to the diagonal of H; > 0. Keeps directions that
        the calibration inputs hardly visit from being treated as free.
    lam : float
        Price of a bit, in squared steps at the mean c_j; >= 0.
    dead : float
        Weights of a smaller magnitude, in steps, become zero, which the others make up for. Not
        with the trellis.
    across : float
        As ``damping``, of the second moment of what the rows do together; > 0.
    """

    damping: float = DAMPING
    lam: float = LAM
    dead: float = 0.0
    across: float = OUTPUT_DAMPING

    def __post_init__(self) -> None:
        if not 0.0 < self.damping < np.inf:
            raise QuantizationError(f"damping must be finite and above 0, not {self.damping!r}")
        trellis.check_lam(self.lam)


@dataclass(frozen=True, slots=True, eq=False)
class Factor:
    """A factored second moment.

    Attributes
    ----------
    order : ndarray of intp, shape (C,)
        Columns in the order in which they are quantized.
    feedback, cost : ndarray of float32, shape (C, C), and float64, shape (C,)
        In that order: N, unit lower triangular, and c_j over its mean.
    mean : float
        Of c_j.
    """

    order: npt.NDArray[np.intp]
    feedback: Floats
    cost: npt.NDArray[np.float64]
    mean: float = 0.0


class Fitted(NamedTuple):
    """A quantizer fitted to a matrix, so that its rows can be taken apart.

    Classes of places; prices, ``lam * bits``, of the levels -127 .. 127 in each; tables of the
    trellis, or None; factors of each group of rows; ``dead`` as in `FeedbackConfig`.
    """

    classes: Classes
    price: Floats
    table: CostTables | None
    factors: tuple[Factor, ...]
    dead: float


def feedback(
    scaled: Floats,
    moment: Moment,
    config: FeedbackConfig | None = None,
    method: Method = "uniform",
    outputs: Moment | None = None,
) -> Integers:
    """Levels of a matrix, with error feedback.

    Weights that are not finite or beyond 2**21 steps, or a moment that doesn't fit, are a
    QuantizationError.

    Parameters
    ----------
    scaled : ndarray of float32, shape (R, C)
        Weights in steps.
    moment : ndarray of float, shape (C, C) or (groups, C, C)
        Second moment of the inputs, in steps; of grouped layers equal shares of the rows belong to
        each group.
    config : FeedbackConfig, optional
    method : {"uniform", "trellis"}
    outputs : ndarray of float, shape (R, R), optional
        Second moment of what pulls at the rows, in steps; of layers that are not grouped.

    Returns
    -------
    ndarray of int32, shape (R, C)
        ``|level|`` at most 2**22.
    """
    fitted = fit(scaled, moment, config, method)
    if outputs is not None:
        across = factorize(outputs, (config or FeedbackConfig()).across, by_energy=True)
        return _both_ways(scaled, fitted, across)
    parts = np.split(scaled, len(fitted.factors))
    return np.concatenate([quantize_rows(part, fitted, g) for g, part in enumerate(parts)])


def fit(
    scaled: Floats, moment: Moment, config: FeedbackConfig | None = None, method: Method = "uniform"
) -> Fitted:
    """Factor the moment, and fit the prices of levels to some rows of each group.

    Parameters and errors are those of `feedback`; a sample of the rows will do, the same number of
    each group.
    """
    chosen = config or FeedbackConfig()
    # Feedback moves the targets a little beyond the weights.
    peak = 1.5 * check_range(scaled, MAX_LEVEL // 2)
    parts = split_groups(scaled, moment)
    factors = tuple(factorize(h, chosen.damping, method == "uniform") for _, h in parts)
    groups = trellis.spread(len(parts), _SAMPLE_GROUPS)
    count = -(-_SAMPLE // max(1, len(groups) * scaled.shape[1]))
    sample = [(g, parts[g][0][trellis.spread(len(parts[g][0]), count)]) for g in groups]
    sampled = np.concatenate([rows for _, rows in sample])
    classes = Classes.of(sampled)
    places = classes.of_places(sampled)

    def fitted(samples: Iterable[npt.NDArray[Any]]) -> Fitted:
        bits = classes.bits(np.concatenate(list(samples)).astype(np.int32), places)
        table = CostTables.build(bits, chosen.lam, peak) if method == "trellis" else None
        return Fitted(classes, (chosen.lam * bits).astype(np.float32), table, factors, chosen.dead)

    shift = MEAN_POINT if method == "trellis" else 0.0
    first = fitted(np.rint(rows - np.float32(shift)) for _, rows in sample)
    if not chosen.lam:
        return first
    return fitted(quantize_rows(rows, first, g) for g, rows in sample)


def quantize_rows(scaled: Floats, fitted: Fitted, group: int = 0) -> Integers:
    """Levels of some rows of a fitted matrix, all of one group.

    Those of a row don't depend on the others. For that the products of matrices must be summed in
    one order whatever their width, and BLAS does so for multiples of 64: zeros fill them up.
    """
    factor = fitted.factors[group]
    levels = np.empty(scaled.shape, np.int32)
    for first in range(0, len(scaled), _LANES):
        rows = scaled[first : first + _LANES]
        weight = np.zeros((-(-len(rows) // _ALIGN) * _ALIGN, scaled.shape[1]), np.float32)
        weight[: len(rows)] = rows
        levels[first : first + len(rows)] = _quantized(weight, fitted, factor)[0][: len(rows)]
    return levels


def _both_ways(scaled: Floats, fitted: Fitted, outputs: Factor) -> Integers:
    """Levels of rows that make up for the errors of others."""
    levels, error = np.empty(scaled.shape, np.int32), np.empty_like(scaled)
    stop = 0
    while stop < len(scaled):
        # What is left makes up for the errors of a turn, so turns become smaller.
        first, stop = stop, stop - (stop - len(scaled)) // _SHARE
        now = slice(first, stop)
        rows, cost = outputs.order[now], outputs.cost[now].astype(np.float32)
        target = scaled[rows] + outputs.feedback[now, :first] @ error[:first]
        levels[rows], value = _quantized(target, fitted, fitted.factors[0], cost)
        error[now] = scaled[rows] - value
    return levels


def _quantized(
    rows: Floats, fitted: Fitted, factor: Factor, cost: Floats | None = None
) -> tuple[Integers, Floats]:
    """Levels of rows, whose errors cost so much, and what they stand for."""
    weight = np.ascontiguousarray(rows.T[factor.order])
    classes = np.ascontiguousarray(fitted.classes.of_places(rows).T[factor.order])
    costs = factor.cost.astype(np.float32)[:, None]
    costs = costs if cost is None else costs * cost
    if fitted.table is not None:
        found = search(weight, classes, factor.feedback, costs, fitted.table)
    else:
        found = _feed_back(weight, classes, factor.feedback, costs, fitted.price, fitted.dead)
    levels, values = np.empty(rows.shape, np.int32), np.empty_like(rows)
    levels[:, factor.order], values[:, factor.order] = found[0].T, found[1].T
    return levels, values


def factorize(moment: Moment, damping: float, by_energy: bool) -> Factor:
    """Factor a second moment: positive semidefinite, of any scale; all zeros counts as white.

    ``by_energy``: columns come in descending order of input energy, which the trellis cannot use.
    A moment that is not finite, or clearly not positive semidefinite, is a QuantizationError.
    """
    size = len(moment)
    energy = np.diagonal(moment).astype(np.float64)
    mean = float(energy.mean()) if size else 0.0
    if not (np.isfinite(mean) and np.isfinite(moment).all()):
        raise QuantizationError("the second moment of the inputs holds NaN or infinity")
    if mean <= 0.0:
        return Factor(np.arange(size), np.eye(size, dtype=np.float32), np.ones(size))
    order = np.argsort(-energy, kind="stable") if by_energy else np.arange(size)
    if np.count_nonzero(moment) == np.count_nonzero(energy > 0):  # nothing to feed back
        cost = energy[order] / mean + damping
        return Factor(order, np.eye(size, dtype=np.float32), cost / cost.mean(), mean * cost.mean())
    reverse = order[::-1]
    flipped = moment[np.ix_(reverse, reverse)].astype(np.float64) / mean
    for growth in (1.0, 10.0, 100.0):
        try:
            lower = np.linalg.cholesky(flipped + damping * growth * np.eye(size))
        except np.linalg.LinAlgError:
            continue
        upper = lower[::-1, ::-1]
        diagonal = np.diagonal(upper)
        unit_lower = np.ascontiguousarray((upper / diagonal).T, dtype=np.float32)
        left = float(np.mean(diagonal**2))
        return Factor(order, unit_lower, diagonal**2 / left, mean * left)
    raise QuantizationError("the second moment of the inputs is not positive semidefinite")


def lost_gain(weights: Moment, values: Moment, moment: Moment) -> float:
    """By what factor values are to be larger to put out as much as the weights, as far as alike.

    Levels save bits by being small. Errors like noise add up in squares from layer to layer, but
    what all outputs lack in common would add up as it is. Parameters are as above; the factor is
    1 / 1.1 to 1.1, and 1 where nothing is put out.
    """
    groups = len(moment) if moment.ndim == 3 else 1
    parts = zip(split_groups(weights, moment), np.split(values, groups), strict=True)
    put_out = np.zeros(2)
    for (own, h), found in parts:
        seen = own @ h
        put_out += np.vdot(seen, own), np.vdot(seen, found)
    given, kept = put_out.tolist()
    return min(max(given / kept, 1 / MOST_GAIN), MOST_GAIN) if kept > 0 else 1.0


def output_error(error: Moment, moment: Moment) -> float:
    """``trace(E H E')``: summed squared output error per input, of error and moment as above."""
    parts = split_groups(error, moment)
    return sum(float(np.vdot(rows @ h.astype(rows.dtype), rows)) for rows, h in parts)


def split_groups(matrix: Moment, moment: Moment) -> list[tuple[Moment, Moment]]:
    """Rows of each group and its own moment; `QuantizationError` if the shapes don't match."""
    moments = moment[None] if moment.ndim == 2 else moment
    fits = matrix.ndim == 2 and moments.shape == (len(moments), *matrix.shape[1:] * 2)
    if not fits or not len(moments) or len(matrix) % len(moments):
        raise QuantizationError(
            f"weights of shape {matrix.shape} and second moments of shape {moment.shape} "
            "don't belong together"
        )
    return list(zip(np.split(matrix, len(moments)), moments, strict=True))


def _feed_back(
    weight: Floats, classes: Places, feedback: Floats, cost: Floats, price: Floats, dead: float
) -> tuple[Integers, Floats]:
    """Plain levels, as `search` gives them, of weights whose rows are the columns in order."""
    error = np.empty_like(weight)
    zero = classes * price.shape[1] + TABLE_MAX
    chosen = np.empty(weight.shape, np.int32)
    for start in range(0, len(weight), _BLOCK):
        stop = min(len(weight), start + _BLOCK)
        block = weight[start:stop] + feedback[start:stop, :start] @ error[:start]
        for column in range(start, stop):
            target = block[column - start]
            target += feedback[column, start:column] @ error[start:column]
            level = _cheapest(target, zero[column], cost[column], price)
            level[np.abs(weight[column]) < dead] = 0
            chosen[column] = level
            error[column] = weight[column] - level
    return chosen, weight - error


def _cheapest(target: Floats, zero: Places, harm: Floats, price: Floats) -> Floats:
    """Of the nearest level, the next one towards zero and zero: the one that costs least.

    ``zero`` is the place of level 0 in the prices of its class.
    """
    best = nearest = np.rint(target)
    if not price.any():
        return nearest
    least = _cost(target, nearest, zero, harm, price)
    for other in (nearest - np.sign(nearest), np.zeros_like(nearest)):
        there = _cost(target, other, zero, harm, price)
        best = np.where(there < least, other, best)
        least = np.minimum(there, least)
    return best


def _cost(target: Floats, level: Floats, zero: Places, harm: Floats, price: Floats) -> Floats:
    cost = target - level
    cost *= cost
    cost *= harm
    cost += price.take(np.clip(level, -TABLE_MAX, TABLE_MAX).astype(np.intp) + zero)
    return cost

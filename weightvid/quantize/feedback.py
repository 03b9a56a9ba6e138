"""Error feedback: levels chosen for what a layer puts out, not for its weights.

A layer computes ``W x``. With the second moment of its inputs, ``H = E[x x']``, an error matrix E
of the weights costs ``trace(E H E')`` at the output. Factored as ``H = L' L`` with L lower
triangular, that is ``sum_j c_j (e_j + sum_{i<j} N_ji e_i)^2`` for every row, where ``c_j = L_jj^2``
and N is L with unit diagonal. So the columns are quantized in order, each to the target ``w_j +
sum_{i<j} N_ji e_i``: the error of the earlier columns is pushed into those to come, and c_j is what
an error in column j still costs when all later columns make up for it as well as they can. No
inverse is needed.

Columns are taken in blocks, so that nearly all of the work is matrix products. Each column is
quantized with the bits of its levels in view (`FeedbackConfig.lam`). The quantizer, and so the
decoder, is the ordinary one; nothing here is known to a reader of the archive.

Sources: Frantar and Alistarh, "Optimal Brain Compression", 2022; Frantar et al., "GPTQ", 2022; the
factorization without inverses is that of Babai's nearest plane, see Chen et al., "The geometry of
LLM quantization", 2025.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from weightvid.errors import QuantizationError
from weightvid.quantize.params import MAX_LEVEL
from weightvid.quantize.rate import TABLE_MAX, RateModel, check_range

DAMPING: Final = 0.01
LAM: Final = 0.05
_SAMPLE: Final = 1 << 16

FloatMatrix = npt.NDArray[np.float32]
Moment = npt.NDArray[np.floating]


@dataclass(frozen=True, slots=True)
class FeedbackConfig:
    """How the feedback is run.

    Attributes
    ----------
    damping : float
        Part of the mean diagonal that is added to the diagonal of H; > 0. Keeps directions that
        the calibration inputs hardly visit from being treated as free.
    lam : float
        Price of a bit, in squared steps of the plain quantizer at the mean c_j; >= 0.
    block : int
        Columns per block; > 0. The levels don't depend on it but for rounding.
    by_energy : bool
        Take the columns in descending order of input energy instead of their own order. The
        trellis runs along the rows and always takes them in their own order.
    """

    damping: float = DAMPING
    lam: float = LAM
    block: int = 64
    by_energy: bool = True

    def __post_init__(self) -> None:
        if not 0.0 < self.damping < np.inf:
            raise QuantizationError(f"damping must be finite and above 0, not {self.damping!r}")
        if not 0.0 <= self.lam < np.inf:
            raise QuantizationError(f"lam must be finite and at least 0, not {self.lam!r}")
        if self.block < 1:
            raise QuantizationError(f"blocks must have at least one column, not {self.block}")


@dataclass(frozen=True, slots=True)
class Factor:
    """A factored second moment.

    Attributes
    ----------
    order : ndarray of intp, shape (C,)
        Columns in the order in which they are quantized.
    feedback : ndarray of float32, shape (C, C)
        N: unit lower triangular, in that order.
    cost : ndarray of float64, shape (C,)
        c_j over its mean, in that order.
    """

    order: npt.NDArray[np.intp]
    feedback: FloatMatrix
    cost: npt.NDArray[np.float64]


def factorize(moment: Moment, damping: float = DAMPING, by_energy: bool = False) -> Factor:
    """Factor the second moment of a layer's inputs.

    Parameters
    ----------
    moment : ndarray of float, shape (C, C)
        Symmetric and positive semidefinite; its scale doesn't matter. All zeros counts as white.
    damping : float
    by_energy : bool
        As in `FeedbackConfig`.

    Raises
    ------
    QuantizationError
        Not a finite square matrix, or clearly not positive semidefinite.
    """
    if moment.ndim != 2 or moment.shape[0] != moment.shape[1]:
        raise QuantizationError(f"a second moment must be square, not {moment.shape}")
    size = len(moment)
    energy = np.diagonal(moment).astype(np.float64)
    mean = float(energy.mean()) if size else 0.0
    if not (np.isfinite(mean) and np.isfinite(moment).all()):
        raise QuantizationError("the second moment of the inputs holds NaN or infinity")
    if mean <= 0.0:
        return Factor(np.arange(size), np.eye(size, dtype=np.float32), np.ones(size))
    order = np.argsort(-energy, kind="stable") if by_energy else np.arange(size)
    reverse = order[::-1]
    flipped = moment[np.ix_(reverse, reverse)].astype(np.float64)
    flipped /= mean
    for growth in (1.0, 10.0, 100.0):
        damped = flipped.copy()
        damped[np.diag_indices(size)] += damping * growth
        try:
            lower = np.linalg.cholesky(damped)
            break
        except np.linalg.LinAlgError:
            continue
    else:
        raise QuantizationError("the second moment of the inputs is not positive semidefinite")
    upper = lower[::-1, ::-1]
    diagonal = np.diagonal(upper)
    feedback = np.ascontiguousarray((upper / diagonal).T, dtype=np.float32)
    cost = diagonal**2
    return Factor(order, feedback, cost / cost.mean())


def output_error(error: Moment, moment: Moment) -> float:
    """``trace(E H E')``: summed squared output error per input of a layer.

    Parameters
    ----------
    error : ndarray of float, shape (R, C)
    moment : ndarray of float, shape (C, C) or (groups, C, C)
        Of grouped layers, equal shares of the rows belong to each group.
    """
    total = 0.0
    for rows, h in split_groups(error, moment):
        total += float(np.vdot(rows @ h.astype(rows.dtype), rows))
    return total


def split_groups(matrix: Moment, moment: Moment) -> list[tuple[Moment, Moment]]:
    """Rows of each group and the group's own moment.

    Raises
    ------
    QuantizationError
        Shapes that don't belong together.
    """
    moments = moment[None] if moment.ndim == 2 else moment
    if (
        matrix.ndim != 2
        or moments.ndim != 3
        or not len(moments)
        or len(matrix) % len(moments)
        or moments.shape[1:] != (matrix.shape[1],) * 2
    ):
        raise QuantizationError(
            f"weights of shape {matrix.shape} and second moments of shape {moment.shape} "
            "don't belong together"
        )
    share = len(matrix) // len(moments)
    return [(matrix[g * share : (g + 1) * share], h) for g, h in enumerate(moments)]


def quantize(
    weights: FloatMatrix,
    step: float,
    moment: Moment,
    config: FeedbackConfig | None = None,
) -> npt.NDArray[np.int32]:
    """Levels of a plain uniform quantizer, with error feedback.

    Parameters
    ----------
    weights : ndarray of float32, shape (R, C)
        Finite.
    step : float
        Above 0; rounded to float32.
    moment : ndarray of float, shape (C, C) or (groups, C, C)
        Second moment of the inputs.
    config : FeedbackConfig, optional

    Returns
    -------
    ndarray of int32, shape (R, C)
        ``|level|`` at most 2**22.

    Raises
    ------
    QuantizationError
        Weights that are not finite, a bad step, or a moment that doesn't fit.
    """
    chosen = config or FeedbackConfig()
    rounded = np.float32(step)
    check_range(weights, float(rounded), float(MAX_LEVEL) / 2)
    levels = np.zeros(weights.shape, np.int32)
    if not weights.size:
        return levels
    parts = split_groups(np.asarray(weights, np.float32) / rounded, moment)
    share = len(weights) // len(parts)
    model = RateModel.from_levels(np.rint(weights[:_SAMPLE] / rounded).astype(np.int32))
    for turn in range(2 if chosen.lam else 1):
        for group, (scaled, h) in enumerate(parts):
            factor = factorize(h, chosen.damping, chosen.by_energy)
            rows = scaled if turn or not chosen.lam else scaled[:: _stride(weights.size)]
            part = _feed_back(rows.astype(np.float32, copy=False), factor, model, chosen)
            levels[group * share : group * share + len(part)] = part
            if not turn and chosen.lam and len(parts) == 1:
                model = RateModel.from_levels(part)
        if not turn and chosen.lam and len(parts) > 1:
            model = RateModel.from_levels(levels)
    return levels


def _stride(size: int) -> int:
    return max(1, size // _SAMPLE)


def _feed_back(
    scaled: FloatMatrix, factor: Factor, model: RateModel, config: FeedbackConfig
) -> npt.NDArray[np.int32]:
    """Levels of weights in steps; the columns' errors are rows here, so that they lie together."""
    targets = np.ascontiguousarray(scaled.T[factor.order])
    columns, rows = targets.shape
    error = np.empty((columns, rows), np.float32)
    chosen = np.empty((columns, rows), np.float32)
    bits = model.bits.astype(np.float32)
    for start in range(0, columns, config.block):
        stop = min(columns, start + config.block)
        block = targets[start:stop]
        if start:
            block = block + factor.feedback[start:stop, :start] @ error[:start]
        for column in range(start, stop):
            target = block[column - start]
            if column > start:
                target = target + factor.feedback[column, start:column] @ error[start:column]
            level = _cheapest(target, bits, config.lam / float(factor.cost[column]))
            chosen[column] = level
            error[column] = targets[column] - level
    levels = np.empty((rows, columns), np.int32)
    levels[:, factor.order] = chosen.T
    return levels


def _cheapest(target: FloatMatrix, bits: FloatMatrix, lam: float) -> FloatMatrix:
    """Of the nearest level, the next one towards zero and zero: the one that costs least."""
    nearest = np.rint(target)
    if lam == 0.0:
        return nearest
    price = np.float32(lam) * bits
    best = nearest
    cost = _cost(target, nearest, price)
    for other in (nearest - np.sign(nearest), np.zeros_like(nearest)):
        there = _cost(target, other, price)
        better = there < cost
        best = np.where(better, other, best)
        cost = np.minimum(there, cost)
    return best


def _cost(target: FloatMatrix, level: FloatMatrix, price: FloatMatrix) -> FloatMatrix:
    cost = target - level
    cost *= cost
    cost += np.take(price, level.astype(np.intp) + TABLE_MAX, mode="clip")
    return cost

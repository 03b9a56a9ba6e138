"""How one tensor is quantized: method, step, transform, steps by frequency and by row.

A `TensorPlan` is decided here, once, from the tensor's step (`weightvid.levels.recipes`). Outputs
bear errors at high kernel frequencies better, as neighbouring inputs are alike, so steps grow with
the frequency. Rows whose scales differ by orders get steps of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import frexp, isfinite, ldexp, log2, prod
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from weightvid.levels.stats import OUTLIER_SCALES, TensorStats, has_row_steps
from weightvid.levels.transform import View
from weightvid.loader import MAX_PART, TRELLIS, UNIFORM, Floats, TensorSpec, quarter_octaves
from weightvid.spec import LARGEST

Steps = npt.NDArray[np.int8]
#: no tensor gets a step coarser or finer than this many sigmas.
COARSEST_SIGMAS: Final = 3.0
FINEST_SIGMAS: Final = 0.02
#: with one step for all tensors, one of small weights may vanish.
VANISHING_SIGMAS: Final = 4.0
#: growth of the step from one frequency of a 3-tap axis to the next.
FREQUENCY_GROWTH: Final = 1.7
#: smaller tensors are kept exactly: a place on a frame and in a sidecar would cost more.
MIN_WEIGHTS: Final = 256
_EXPONENTS: Final = (-109, 110)  # a step may still change by MOST_GAIN
#: by which the step of a part may be larger than the plan's, see `feedback.lost_gain`.
MOST_GAIN: Final = 1.1
#: by which steps of rows differ from the middle at most; bits that they must save for each weight.
_MOST_OCTAVES: Final = 2.0
_LEAST_BITS: Final = 0.05
#: largest level of int8.
INT8: Final = 127
#: columns of matrices with the inputs along their rows that a trellis takes: moments are squares.
_WIDEST: Final = 4096
#: tables of tokens in models that write text, and in others; rows of a vocabulary; and the rank
#: correlation of scale and place that tells a vocabulary in the order of frequency: 0.14 in a small
#: language model, 0.38 in MiniLM, and a shuffled one has 0.02 at 2,048 rows.
TOKENS: Final = frozenset({"embed_tokens", "wte", "tok_embeddings", "token_embd"})
_TABLES: Final = TOKENS | {"word_embeddings"}
_VOCABULARY: Final = 1000
_LEAST_ORDER: Final = 0.1


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """What the inputs of a layer say of the weights that meet them.

    Attributes
    ----------
    moment : ndarray of float, shape (G, C, C)
        Second moments of the inputs, in the columns of the untransformed matrix; equal shares of
        the rows belong to each group. With ``axis`` 0 the inputs lie along the rows, G times C.
    damping : float
        Part of the mean diagonal that is added to it.
    axis : int
        1, or 0: transposed convolutions, ``x @ W``.
    mean : ndarray of float, shape (G, C), or None
        Of the inputs.
    bias : int or None
        Number of the exact tensor that makes up for the shift of the mean outputs.
    bias_sign : int
        1: it is added to the outputs; -1: subtracted, as the running mean of a BatchNorm is.
    frequency_steps : ndarray of int8, shape (K,), or None
        Quarter octaves by which the step of each frequency is larger.
    row_steps : ndarray of int8, shape (rows,), or None
        The same for rows.
    outputs : ndarray of float, shape (rows, rows), or None
        Second moment of what pulls at the outputs; None: each row is quantized for itself.
    """

    moment: npt.NDArray[np.floating]
    damping: float
    axis: int = 1
    mean: npt.NDArray[np.floating] | None = None
    bias: int | None = None
    bias_sign: int = 1
    frequency_steps: Steps | None = None
    row_steps: Steps | None = None
    outputs: npt.NDArray[np.floating] | None = None

    def add_shift(self, shifts: dict[int, Floats], shift: Floats) -> None:
        """Add what weights take from the mean outputs to what their bias makes up for."""
        if self.bias is not None and np.isfinite(shift).all():
            before = shifts.get(self.bias, np.float32(0))
            shifts[self.bias] = before + self.bias_sign * shift


@dataclass(frozen=True, slots=True, eq=False)
class TensorPlan:
    """How one tensor is quantized.

    Attributes
    ----------
    spec : TensorSpec
    view : View
    method : int
        `weightvid.loader.UNIFORM` or ``TRELLIS``.
    step : float
        A float32.
    transformed : bool
        Kernels are coded as the coefficients of their DCT.
    balanced : bool
        Rounded so that the errors of each row cancel in the mean.
    frequency_steps : ndarray of int8, shape (K,), or None
        Quarter octaves by which the step of a frequency is larger.
    row_steps : ndarray of int8, shape (rows,), or None
        The same for rows.
    row_scales : ndarray of float32, shape (rows,)
        By which outliers are told.
    threshold : float
        Weights of a smaller magnitude are pruned.
    sign : int
        As `TensorStats`' own: levels have no other.
    price : float
        Of a bit, in squared steps, for levels that are mostly zeros, see
        `weightvid.levels.descent`; 0: the usual rounding.
    """

    spec: TensorSpec
    view: View
    method: int
    step: float
    transformed: bool
    row_scales: npt.NDArray[np.float32]
    balanced: bool = False
    frequency_steps: Steps | None = None
    row_steps: Steps | None = None
    threshold: float = 0.0
    sign: int = 0
    price: float = 0.0

    @property
    def kernel(self) -> tuple[int, ...]:
        """Sizes of the transformed axes; empty without a transform."""
        return self.view.kernel if self.transformed else ()

    def column_steps(self) -> npt.NDArray[np.float32]:
        """Step of each column (or of all), without the rows' factors."""
        step = np.float32(self.step)
        if self.frequency_steps is None:
            return np.full(1, step, np.float32)
        every = step * quarter_octaves(self.frequency_steps)
        return np.repeat(every, self.view.columns // prod(self.kernel))

    def row_factors(self, rows: slice) -> Floats:
        """By what the steps of some rows are larger."""
        if self.row_steps is None:
            return np.ones(self.view.rows, np.float32)[rows]
        return quarter_octaves(self.row_steps[rows])

    def with_step(self, step: float) -> TensorPlan:
        """The same plan with another step."""
        return replace(self, step=round_step(step))

    def priced(self, price: float) -> TensorPlan:
        """The same plan, rounded to levels that are mostly zeros."""
        return replace(self, method=UNIFORM, price=price)


def round_step(step: float) -> float:
    """Step with 8 significant bits, rounded to nearest, so that it is a float32 in any case."""
    mantissa, exponent = frexp(step)
    return ldexp(round(mantissa * 256) / 256, exponent)


#: zeros alone are smaller.
_LEAST: Final = float(np.finfo(np.float32).tiny)


def is_codable(spec: TensorSpec, stats: TensorStats) -> bool:
    """Whether a tensor is worth quantizing, and its rows fit parts."""
    fits = spec.size >= MIN_WEIGHTS and stats.view.columns <= MAX_PART
    return stats.finite and stats.sigma > 0 and fits


def finest_sigmas(stats: TensorStats) -> float:
    """Finest step of a tensor, in its scale: with a finer one many levels would not fit 8 bits."""
    return max(FINEST_SIGMAS, stats.peak / INT8)


def plan_tensor(
    stats: TensorStats, step: float, fidelity: str = "outputs", moments: Moments | None = None
) -> TensorPlan | None:
    """Plan of a tensor at a step; None if it must be kept exactly.

    Parameters
    ----------
    stats : TensorStats
    step : float
        Before limits; of the geometric mean of all frequencies and, with row steps, rows.
    fidelity : str
        ``outputs``: kernels transformed, rounded, with steps by frequency; matrices by the trellis.
        ``weights``: trellis everywhere, one step for all. ``integers``: rounded, untransformed.
    moments : Moments, optional
        What calibration knows: steps by frequency follow from it, and the trellis pays.
    """
    spec, view = stats.spec, stats.view
    scale = stats.scale if fidelity == "outputs" else stats.sigma
    if stats.sign or (stats.sparse and fidelity == "outputs"):
        # A transform would fill the zeros of a pruned tensor, and a trellis does not keep them;
        # both would give the other sign to a tensor that has one, such as variances.
        fidelity = "integers"
    coarsest = VANISHING_SIGMAS if fidelity == "weights" else COARSEST_SIGMAS
    finest = FINEST_SIGMAS if fidelity == "weights" else finest_sigmas(stats)
    step = round_step(min(max(step, finest * scale), coarsest * scale))
    if not (isfinite(step) and _EXPONENTS[0] < frexp(step)[1] < _EXPONENTS[1]):
        return None
    largest = min(stats.absmax, OUTLIER_SCALES * float(stats.row_scales.max()))
    if MOST_GAIN * (largest + 16 * step) >= LARGEST[spec.dtype]:
        return None  # a dequantized weight might round to infinity
    row_steps = frequency_steps = None
    # A transform would spread an outlier over its kernel.
    transformed = bool(view.kernel) and fidelity != "integers" and not stats.outliers
    if has_row_steps(stats) and fidelity == "outputs":
        row_steps = _row_steps(stats)
    elif moments is not None and moments.row_steps is not None and fidelity == "outputs":
        row_steps = moments.row_steps
    elif fidelity == "outputs" and _in_order_of_frequency(stats):
        row_steps = steps_from_counts(np.zeros(view.rows), _usual_shares(view.rows))
    if transformed and fidelity == "outputs":
        frequency_steps = steps_by_frequency(view.kernel)
    if transformed and moments is not None and moments.frequency_steps is not None:
        frequency_steps = moments.frequency_steps
    usual = fidelity == "outputs" and moments is None
    convolution = usual and (transformed or is_pointwise(spec))
    wide = moments is not None and moments.axis == 0 and view.columns > _WIDEST
    method = UNIFORM if fidelity == "integers" or convolution or wide else TRELLIS
    finest_row = 0 if row_steps is None else int(row_steps.min())
    unit = 2 ** (finest_row / 4) * step / 8  # of numbers listed for outliers, a gain included
    if stats.outliers and stats.absmax >= LARGEST["F32"] * min(unit, 0.999):
        return None  # a number or its weight might be infinite
    return TensorPlan(
        spec, view, method, step, transformed, stats.row_scales, convolution,
        frequency_steps, row_steps, threshold=_LEAST if stats.sparse else 0.0, sign=stats.sign,
    )  # fmt: skip


def is_pointwise(spec: TensorSpec) -> bool:
    """Whether a tensor is a convolution with kernels of one position.

    Examples
    --------
    >>> is_pointwise(TensorSpec("pw", "F32", (64, 32, 1, 1)))
    True
    """
    return len(spec.shape) >= 3 and all(size == 1 for size in spec.shape[2:])


def steps_by_frequency(kernel: Sequence[int]) -> Steps:
    """Quarter octaves of `FREQUENCY_GROWTH` ** f over their mean; f counts 0..2 along each axis.

    Examples
    --------
    >>> steps_by_frequency((3,)).tolist()
    [-3, 0, 3]
    """
    places = np.indices(tuple(kernel)).reshape(len(kernel), -1)
    spans = np.array([max(size - 1, 1) for size in kernel])[:, None]
    octaves = log2(FREQUENCY_GROWTH) * (2 * places / spans).sum(axis=0)
    return np.asarray(np.rint(4 * (octaves - octaves.mean())), np.int8)


def steps_from_costs(costs: npt.NDArray[np.float64], kernel: Sequence[int]) -> Steps:
    """Quarter octaves by frequency at which all columns cost the same slope of bits.

    Parameters
    ----------
    costs : ndarray of float64, shape (G, K * C)
        What a squared error costs in each column, frequency by frequency, > 0.
    kernel : sequence of int
        Product K.

    Examples
    --------
    >>> steps_from_costs(np.array([[16.0, 16.0, 1.0, 1.0]]), (2,)).tolist()
    [-4, 4]
    """
    octaves = np.log2(costs).reshape(len(costs), prod(kernel), -1).mean(axis=(0, 2)) / -2
    return np.asarray(np.clip(np.rint(4 * (octaves - octaves.mean())), -40, 40), np.int8)


def steps_from_counts(counts: npt.NDArray[Any], held: npt.NDArray[Any]) -> Steps | None:
    """Quarter octaves by row of a table, by how often the rows are used; None if they don't help.

    Harm goes with the share of a row and the square of its step, so steps would go with the root of
    one over the share; bits of coarse steps fall less than that asks for, and the cube root does
    better. Half a use for every row on average is spread as in vocabularies in the order of
    frequency. The harm stays what it is, and bits are saved. ``held`` are uses that nothing is
    fitted to, to see whether so many are.

    Parameters
    ----------
    counts, held : ndarray, shape (rows,)

    Examples
    --------
    >>> uses = np.array([900, 900, 30, 30])
    >>> steps_from_counts(uses, uses).tolist(), steps_from_counts(uses, uses[::-1])
    ([-1, -1, 6, 6], None)
    """
    rows = len(counts)
    shares = counts + rows / 2 * _usual_shares(rows)
    shares /= shares.sum()
    octaves = np.clip(np.log2(shares * rows) / -3, -_MOST_OCTAVES, _MOST_OCTAVES)
    octaves -= np.log2(shares @ 4**octaves) / 2
    if not held.sum() or octaves.mean() - np.log2(held @ 4**octaves / held.sum()) / 2 < _LEAST_BITS:
        return None
    return np.rint(4 * octaves).astype(np.int8)


def _usual_shares(rows: int) -> npt.NDArray[np.float64]:
    """How often tokens occur in text, in the order of frequency: about as one over the place."""
    shares = 1 / (np.arange(rows) + rows / 100)
    return np.asarray(shares / shares.sum())


def _in_order_of_frequency(stats: TensorStats) -> bool:
    """Whether a tensor is a vocabulary whose order shows in the scales of its rows."""
    rows = stats.view.rows
    if rows < _VOCABULARY or _TABLES.isdisjoint(stats.spec.name.split(".")):
        return False
    places = np.argsort(np.argsort(stats.row_scales))
    return bool(abs(np.corrcoef(places, np.arange(rows))[0, 1]) > _LEAST_ORDER)


def _row_steps(stats: TensorStats) -> Steps:
    scales, typical = stats.row_scales.astype(np.float64), stats.typical_scale
    octaves = np.log2(np.where(scales > 0, scales, typical) / typical)
    return np.asarray(np.clip(np.rint(4 * octaves), -127, 127), np.int8)


#: step of the samples that a lossy codec quantizes, in units of the rule: 127 of them are 7 sigmas
#: of an average tensor.
_SAMPLE_FACTOR: Final = 0.055
#: samples of every tensor reach so far; what lies beyond is listed.
_SAMPLE_SIGMAS: Final = 6.0


def sample_step(unit: float, stats: TensorStats) -> float:
    """Step of the samples that a lossy codec gets to quantize.

    It follows the rule's unit, so that one QP does to each tensor what one step factor would; but
    few weights may lie beyond the range of samples.
    """
    reach = min(stats.absmax, _SAMPLE_SIGMAS * stats.sigma)
    return max(_SAMPLE_FACTOR * unit, reach / 127)

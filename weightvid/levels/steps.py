"""How each tensor is quantized: method, step, transform, steps by frequency and by row.

A `TensorPlan` is decided here, once. The rule between tensors is data-free: ``step = k * sigma *
sqrt(n / mean n)``, n the number of weights of the tensor. With entropy coding the rate of a tensor
is about ``n * log2(sigma / step)`` bits, and its harm to the output grows about as
``(step / sigma)**2`` whatever its size, so all tensors stand at one slope of harm against bits when
the steps go with sigma * sqrt(n). The head of a language model does as much harm as all its layers
together, each of which adds only a share to what the head reads; so its step is finer.

k follows from a recipe, which says how much more harm than int8 with a scale per output channel the
steps may do. What int8 does is known without data: its steps are the rows' peaks over 127.

Within a tensor, outputs bear errors at high kernel frequencies better, as neighbouring inputs are
alike, so steps grow with the frequency. Rows whose scales differ by orders get steps of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp, frexp, inf, isfinite, ldexp, log, log2, prod, sqrt
from types import MappingProxyType
from typing import Final

import numpy as np
import numpy.typing as npt

from weightvid.errors import QuantizationError
from weightvid.levels.transform import View, view_of
from weightvid.loader import MAX_PART, TRELLIS, UNIFORM, Array, Floats, TensorSpec, quarter_octaves
from weightvid.spec import LARGEST, to_float32

#: a weight further than so many scales of its row from zero is an outlier, kept exactly.
OUTLIER_SCALES = 48.0
#: rows in which one weight has this share of the energy, or is so many times the root mean
#: square, are looked at weight by weight.
_SUSPECT_SHARE, _SUSPECT_RATIO = 0.2, 6.0
_NORMAL_MEDIAN = 0.6745
#: weights within so many scales by the median count for the scale of a row.
_TRIM = 10.0
#: peak of a row of some hundred weights, in scales; and the largest that counts: int8 is no measure
#: for rows that an outlier has ruined.
NORMAL_PEAK, LARGEST_PEAK = 3.2, 8.0


@dataclass(frozen=True, slots=True, eq=False)
class TensorStats:
    """Statistics of one tensor, taken as float32.

    Attributes
    ----------
    spec : TensorSpec
    view : View
    row_scales : ndarray of float32, shape (rows,)
        Robust root mean square of each row: outliers are left out.
    sigma : float
        Root mean square of the row scales; 0 for a tensor of one value.
    absmax : float
    finite : bool
        Whether there is no NaN and no infinity.
    outliers : int
        Weights beyond `OUTLIER_SCALES`.
    mean_magnitude : float
        Of the weights that are not zero.
    zero_share : float
        Part of the weights that is zero: 0..1.
    sign : int
        1: none is below zero; -1: none is above; 0: there are both.
    peak : float
        Root mean square of the rows' largest magnitudes, in scales of their rows.
    """

    spec: TensorSpec
    view: View
    row_scales: Floats
    sigma: float
    absmax: float
    finite: bool
    outliers: int = 0
    mean_magnitude: float = 0.0
    zero_share: float = 0.0
    sign: int = 0
    peak: float = NORMAL_PEAK

    @property
    def sparse(self) -> bool:
        """Whether the tensor was pruned: its zeros stay zeros."""
        return self.zero_share >= SPARSE_SHARE

    @property
    def effective_size(self) -> float:
        """Weights that cost bits and bear errors: all, or those that pruning has left."""
        return self.spec.size * (1 - self.zero_share) if self.sparse else float(self.spec.size)

    @property
    def typical_scale(self) -> float:
        """Geometric mean of the row scales that are not zero."""
        scales = self.row_scales[self.row_scales > 0].astype(np.float64)
        return float(np.exp(np.log(scales).mean())) if scales.size else 0.0


def tensor_stats(spec: TensorSpec, blocks: Iterable[Array]) -> TensorStats:
    """Statistics of a tensor that comes in blocks of whole rows of its matrix.

    Parameters
    ----------
    spec : TensorSpec
        Of a float type.
    blocks : iterable of ndarray
        Consecutive stored elements (BF16 as uint16 bits).
    """
    view = view_of(spec.shape)
    scales, low, high, outliers, finite = [], inf, -inf, 0, True
    total, filled, peaks = 0.0, 0, 0.0
    for block in blocks:
        with np.errstate(over="ignore", invalid="ignore"):
            rows = to_float32(block.reshape(-1), spec.dtype).reshape(-1, view.columns)
        highest, lowest = rows.max(axis=1), rows.min(axis=1)
        largest = np.maximum(highest, -lowest)
        if not np.isfinite(largest).all():
            finite = False
            break
        found = row_scales(rows, largest)
        scales.append(found)
        low, high = min(low, float(lowest.min())), max(high, float(highest.max()))
        total += float(np.abs(rows).sum(dtype=np.float64))
        filled += int(np.count_nonzero(rows))
        with np.errstate(over="ignore"):
            ratios = largest[found > 0] / found[found > 0]
        peaks += float(np.square(np.minimum(ratios, LARGEST_PEAK), dtype=np.float64).sum())
        for row in np.flatnonzero(largest > _limits(found)):
            outliers += int(
                np.count_nonzero(outlier_mask(rows[row : row + 1], found[row : row + 1]))
            )
    if not finite:
        return TensorStats(spec, view, np.zeros(0, np.float32), 0.0, 0.0, finite=False)
    every = np.concatenate(scales) if scales else np.zeros(0, np.float32)
    sigma = sqrt(float(np.square(every.astype(np.float64)).mean())) if low < high else 0.0
    return TensorStats(
        spec, view, every, sigma, max(high, -low, 0.0), True, outliers,
        total / max(filled, 1), 1 - filled / max(spec.size, 1), int(low >= 0) - int(high <= 0),
        sqrt(peaks / max(int(np.count_nonzero(every)), 1)),
    )  # fmt: skip


def row_scales(rows: Floats, largest: Floats) -> Floats:
    """Robust root mean square of each row.

    Where one weight outweighs its row, only weights within ten scales, as the median of the
    magnitudes gives it, are counted.

    Parameters
    ----------
    rows : ndarray of float32, shape (R, C)
    largest : ndarray of float32, shape (R,)
        Largest magnitude of each row.
    """
    safe = np.where(largest > 0, largest, 1)[:, None]
    # Relative to the largest weight, squares neither overflow nor vanish.
    squares = np.einsum("ij,ij->i", rows / safe, rows / safe, dtype=np.float64)
    means = np.sqrt(squares / rows.shape[1])
    suspect = (squares * _SUSPECT_SHARE < 1) | (means * _SUSPECT_RATIO < 1)
    suspect &= (largest > 0) & (rows.shape[1] > 8)
    scales: Floats = (means * safe[:, 0] * (largest > 0)).astype(np.float32)
    for row in np.flatnonzero(suspect):
        magnitudes = np.abs(rows[row].astype(np.float64))
        median = float(np.median(magnitudes[magnitudes > 0]))
        kept = magnitudes[magnitudes <= _TRIM * median / _NORMAL_MEDIAN]
        scales[row] = np.sqrt(np.square(kept).mean())
    return scales


def outlier_mask(rows: Floats, scales: Floats) -> npt.NDArray[np.bool_]:
    """Which weights are outliers of their rows."""
    return np.abs(rows) > _limits(scales)[:, None]


def _limits(scales: Floats) -> Floats:
    """What is an outlier beyond; infinity where float32 ends."""
    with np.errstate(over="ignore"):
        return np.float32(OUTLIER_SCALES) * scales


Steps = npt.NDArray[np.int8]

#: no tensor gets a step coarser or finer than this many sigmas.
COARSEST_SIGMAS: Final = 1.5
FINEST_SIGMAS: Final = 0.02
#: where the step factor of a recipe is looked for, and how often the range is halved.
_FACTORS: Final = (0.01, 10.0)
_HALVINGS: Final = 40
#: with one step for all tensors, one of small weights may vanish.
VANISHING_SIGMAS: Final = 4.0
#: added to a tensor's size over the mean: no step goes to nothing with the size.
SMALLEST_SHARE: Final = 0.05
#: measured losses move a step by at most this factor.
LARGEST_CORRECTION: Final = 8.0
#: growth of the step from one frequency of a 3-tap axis to the next.
FREQUENCY_GROWTH: Final = 1.7
#: a tensor with so many zeros was pruned: they stay zeros.
SPARSE_SHARE: Final = 0.5
#: rows get steps of their own where their scales spread so far, in octaves between the root mean
#: square and the geometric mean.
ROW_SPREAD: Final = 1.5
#: smaller tensors are kept exactly: a place on a frame and in a sidecar would cost more.
MIN_WEIGHTS: Final = 256
_QUERY_KEY: Final = frozenset({"query", "key", "q_proj", "k_proj", "q", "k", "to_q", "to_k"})
_EXPONENTS: Final = (-110, 110)
#: tables of tokens in models that write text, and their heads; without one the table is the head.
_TOKENS: Final = frozenset({"embed_tokens", "wte", "tok_embeddings", "token_embd"})
_HEADS: Final = frozenset({"lm_head", "embed_out", "output"})
#: largest level of int8.
_INT8: Final = 127
#: harm of our errors beside equally large steps of int8: those of the trellis are smaller, and
#: those at high kernel frequencies are borne better.
_MATRIX_HARM: Final = 0.8
_KERNEL_HARM: Final = 0.5

FIDELITIES: Final = ("outputs", "weights", "integers")


@dataclass(frozen=True, slots=True)
class Recipe:
    """A named quality.

    Attributes
    ----------
    name : str
    noise : float
        Error of the outputs, in that of int8 per channel, as the rule forecasts it.
    language_noise : float
        The same of language models: their perplexity hardly minds errors that change single words.
    mantissa_bits : int
        That 1-D floats keep, of 23.
    """

    name: str
    noise: float
    language_noise: float
    mantissa_bits: int


RECIPES: Final[Mapping[str, Recipe]] = MappingProxyType(
    {
        recipe.name: recipe
        for recipe in (
            Recipe("fine", 1.0, 1.5, 23),
            Recipe("balanced", 1.4, 4.0, 10),
            Recipe("small", 5.0, 8.0, 8),
        )
    }
)


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
    """

    moment: npt.NDArray[np.floating]
    damping: float
    axis: int = 1
    mean: npt.NDArray[np.floating] | None = None
    bias: int | None = None
    bias_sign: int = 1
    frequency_steps: Steps | None = None


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

    def with_step(self, step: float) -> TensorPlan:
        """The same plan with another step."""
        return replace(self, step=round_step(step))


def recipe(name: str) -> Recipe:
    """Recipe of a name.

    Raises
    ------
    QuantizationError
        Unknown name.
    """
    found = RECIPES.get(name)
    if found is None:
        raise QuantizationError(f"unknown recipe {name!r}; choose one of: {', '.join(RECIPES)}")
    return found


def round_step(step: float, mantissa_bits: int = 8) -> float:
    """Step with 8 significant bits, rounded to nearest, so that it is a float32 in any case."""
    mantissa, exponent = frexp(step)
    scale = 1 << mantissa_bits
    return ldexp(round(mantissa * scale) / scale, exponent)


def is_codable(spec: TensorSpec, stats: TensorStats) -> bool:
    """Whether a tensor is worth quantizing, and its rows fit parts."""
    fits = spec.size >= MIN_WEIGHTS and stats.view.columns <= MAX_PART
    return stats.finite and stats.sigma > 0 and fits


def units(stats: Sequence[TensorStats], fidelity: str = "outputs") -> list[float]:
    """Step of each tensor at k = 1, before any limit.

    Parameters
    ----------
    stats : sequence of TensorStats
        Tensors that will be quantized, each with sigma > 0.
    fidelity : str
        ``outputs``, ``integers``: ``f * sigma * sqrt(n / mean n + 0.05)``; f is 2 for the queries
        and keys of attention, whose errors only move the weights of a softmax, ``1 / sqrt(T)`` for
        the head of a language model of T other tensors, and 1 for others.
        ``weights``: the root of the mean square of all weights, for every tensor.

    Raises
    ------
    QuantizationError
        Unknown fidelity.
    """
    if fidelity not in FIDELITIES:
        raise QuantizationError(f"unknown fidelity {fidelity!r}; choose: {', '.join(FIDELITIES)}")
    if not stats:
        return []
    total = sum(s.spec.size for s in stats)
    if fidelity == "weights":
        return [sqrt(sum(s.spec.size * s.sigma**2 for s in stats) / total)] * len(stats)
    mean = sum(s.effective_size for s in stats) / len(stats)
    return [
        _scale(s) * kind * sqrt(s.effective_size / mean + SMALLEST_SHARE)
        for s, kind in zip(stats, _kind_factors(stats), strict=True)
    ]


def recipe_factor(
    name: str, stats: Sequence[TensorStats], units: Sequence[float], fidelity: str = "outputs"
) -> float:
    """Step factor of a recipe: the forecast of the errors is so many times that of int8.

    Parameters
    ----------
    name : str
        Of the recipe.
    stats : sequence of TensorStats
    units : sequence of float
        Of the same tensors.
    fidelity : str

    Raises
    ------
    QuantizationError
        Unknown recipe.
    """
    wanted = recipe(name)
    noise = wanted.language_noise if speaks(stats) else wanted.noise
    low, high = _FACTORS
    for _ in range(_HALVINGS):
        middle = sqrt(low * high)
        if forecast(middle, stats, units, fidelity) > noise:
            high = middle
        else:
            low = middle
    return low


def forecast(
    factor: float, stats: Sequence[TensorStats], units: Sequence[float], fidelity: str = "outputs"
) -> float:
    """Error of the outputs at a step factor, in that of int8 per channel; 0 without tensors.

    Every tensor does harm as the square of its steps over its scale; steps at the finest that is
    allowed do not follow the factor.
    """
    ours = int8 = 0.0
    for s, unit, kind in zip(stats, units, _kind_factors(stats), strict=True):
        kernel = bool(s.view.kernel) or is_pointwise(s.spec)
        harm = 1.0 if fidelity != "outputs" else _KERNEL_HARM if kernel else _MATRIX_HARM
        ours += harm * (max(factor * unit, finest_step(s)) / _scale(s) / kind) ** 2
        int8 += (s.peak / _INT8 / kind) ** 2
    return sqrt(ours / int8) if int8 else 0.0


def speaks(stats: Sequence[TensorStats]) -> bool:
    """Whether the tensors are those of a language model."""
    return language_head([s.spec for s in stats]) is not None


def _scale(stats: TensorStats) -> float:
    if stats.sparse:
        return stats.sigma / sqrt(1 - stats.zero_share)
    return stats.typical_scale if has_row_steps(stats) else stats.sigma


def _kind_factors(stats: Sequence[TensorStats]) -> list[float]:
    """What the step of each tensor is multiplied by for what the tensor does in the network."""
    head = language_head([s.spec for s in stats])
    return [
        1 / sqrt(max(len(stats) - 1, 1))
        if s.spec.name == head
        else 2.0 if _parts(s.spec) & _QUERY_KEY else 1.0
        for s in stats
    ]  # fmt: skip


def _parts(spec: TensorSpec) -> frozenset[str]:
    return frozenset(spec.name.split("."))


def language_head(specs: Sequence[TensorSpec]) -> str | None:
    """Name of the tensor that makes scores of tokens; None where no model writes text.

    Examples
    --------
    >>> table = TensorSpec("model.embed_tokens.weight", "F32", (100, 8))
    >>> head = TensorSpec("lm_head.weight", "F32", (100, 8))
    >>> language_head([table]), language_head([table, head]), language_head([head])
    ('model.embed_tokens.weight', 'lm_head.weight', None)
    """
    tables = [spec for spec in specs if _parts(spec) & _TOKENS and len(spec.shape) == 2]
    heads = [
        spec
        for spec in specs
        if _parts(spec) & _HEADS and any(spec.shape == table.shape for table in tables)
    ]
    return next((spec.name for spec in [*heads, *tables]), None)


def measured_units(
    units: Sequence[float], stats: Sequence[TensorStats], sensitivity: Mapping[str, float]
) -> list[float]:
    """Units of a rule, balanced by measured losses so that all tensors end at one slope.

    A loss grows as ``sensitivity * step**2``, and the bits as ``n * log2(sigma / step)``, so the
    slope of loss against bits is the same everywhere if the steps go with ``sqrt(n /
    sensitivity)``. Between them the scale is chosen so that the bits stay about what they are.

    Parameters
    ----------
    units : sequence of float
        By the rule.
    stats : sequence of TensorStats
        Of the same tensors.
    sensitivity : mapping of str to float
        By name; tensors without one keep their unit.
    """
    ratios = [
        log(sqrt(s.spec.size / sensitivity[s.spec.name]) / unit)
        if s.spec.name in sensitivity
        else None
        for unit, s in zip(units, stats, strict=True)
    ]
    pairs = [(r, s.spec.size) for r, s in zip(ratios, stats, strict=True) if r is not None]
    if not pairs:
        return list(units)
    middle = sum(r * size for r, size in pairs) / sum(size for _, size in pairs)
    reach = log(LARGEST_CORRECTION)
    return [
        unit if r is None else unit * exp(min(max(r - middle, -reach), reach))
        for unit, r in zip(units, ratios, strict=True)
    ]


def finest_step(stats: TensorStats) -> float:
    """Finest step of a tensor: with a finer one many levels would not fit 8 bits."""
    return max(FINEST_SIGMAS, stats.peak / _INT8) * _scale(stats)


def has_row_steps(stats: TensorStats) -> bool:
    """Whether the scales of rows differ so much that they need steps of their own."""
    typical = stats.typical_scale
    return len(stats.row_scales) > 1 and typical > 0 and log2(stats.sigma / typical) > ROW_SPREAD


def plan_tensor(
    stats: TensorStats,
    step: float,
    fidelity: str = "outputs",
    growth: float = FREQUENCY_GROWTH,
    moments: Moments | None = None,
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
    growth : float
        Of the steps by frequency.
    moments : Moments, optional
        What calibration knows: steps by frequency follow from it, and the trellis pays.
    """
    spec, view = stats.spec, stats.view
    scale = _scale(stats) if fidelity == "outputs" else stats.sigma
    if stats.sign or (stats.sparse and fidelity == "outputs" and moments is None):
        # A transform would fill the zeros of a pruned tensor, and a trellis does not keep them;
        # both would give the other sign to a tensor that has one, such as variances.
        fidelity = "integers"
    coarsest = VANISHING_SIGMAS if fidelity == "weights" else COARSEST_SIGMAS
    finest = FINEST_SIGMAS if fidelity == "weights" else max(FINEST_SIGMAS, stats.peak / _INT8)
    step = round_step(min(max(step, finest * scale), coarsest * scale))
    if not (isfinite(step) and _EXPONENTS[0] < frexp(step)[1] < _EXPONENTS[1]):
        return None
    if (
        min(stats.absmax, OUTLIER_SCALES * float(stats.row_scales.max())) + 16 * step
        >= (LARGEST[spec.dtype])
    ):
        return None  # a dequantized weight might round to infinity
    row_steps = frequency_steps = None
    # A transform would spread an outlier over its kernel.
    transformed = bool(view.kernel) and fidelity != "integers" and not stats.outliers
    if has_row_steps(stats) and fidelity == "outputs":
        row_steps = _row_steps(stats)
    if transformed and fidelity == "outputs" and growth != 1.0:
        frequency_steps = steps_by_frequency(view.kernel, growth)
    convolution = fidelity == "outputs" and (transformed or is_pointwise(spec))
    if moments is not None:
        if transformed and moments.frequency_steps is not None:
            frequency_steps = moments.frequency_steps
        convolution = False
    uniform = fidelity == "integers" or convolution or (moments is not None and moments.axis == 0)
    method = UNIFORM if uniform else TRELLIS
    return TensorPlan(
        spec, view, method, step, transformed, stats.row_scales, convolution,
        frequency_steps, row_steps, sign=stats.sign,
    )  # fmt: skip


def is_pointwise(spec: TensorSpec) -> bool:
    """Whether a tensor is a convolution with kernels of one position.

    Examples
    --------
    >>> is_pointwise(TensorSpec("pw", "F32", (64, 32, 1, 1)))
    True
    """
    return len(spec.shape) >= 3 and all(size == 1 for size in spec.shape[2:])


def steps_by_frequency(kernel: Sequence[int], growth: float) -> Steps:
    """Quarter octaves of ``growth ** f`` over their mean; f counts 0..2 along each axis.

    Examples
    --------
    >>> steps_by_frequency((3,), 2.0).tolist()
    [-4, 0, 4]
    """
    places = np.indices(tuple(kernel)).reshape(len(kernel), -1)
    spans = np.array([max(size - 1, 1) for size in kernel])[:, None]
    octaves = log2(growth) * (2 * places / spans).sum(axis=0)
    made: Steps = np.rint(4 * (octaves - octaves.mean())).astype(np.int8)
    return made


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
    made: Steps = np.clip(np.rint(4 * (octaves - octaves.mean())), -40, 40).astype(np.int8)
    return made


def _row_steps(stats: TensorStats) -> Steps:
    scales, typical = stats.row_scales.astype(np.float64), stats.typical_scale
    octaves = np.log2(np.where(scales > 0, scales, typical) / typical)
    made: Steps = np.clip(np.rint(4 * octaves), -127, 127).astype(np.int8)
    return made


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

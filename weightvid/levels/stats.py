"""What the choice of steps needs to know of a tensor: robust scales of rows, peaks, zeros.

And what is no weight, and is kept bit for bit: scales of packed integers, constant tables. Names
decide, as files say nothing of what a tensor is for; a table of sines also tells by its rows.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf, log2, sqrt
from typing import Final

import numpy as np
import numpy.typing as npt

from weightvid.levels.transform import View, view_of
from weightvid.loader import PACKABLE, Array, Floats, TensorSpec, to_float32

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
#: a tensor with so many zeros was pruned: they stay zeros.
SPARSE_SHARE: Final = 0.5
#: rows get steps of their own where their scales spread so far, in octaves between the root mean
#: square and the geometric mean.
ROW_SPREAD: Final = 1.5
#: of a tensor that says how to read the packed integers or 8-bit floats beside it.
_SCALE: Final = re.compile(
    r"(scales?|zeros?|zero_points?|absmax|quant_map|codebook)(_inv)?$", re.IGNORECASE
)
#: buffers that programs compute and store: filters of spectrograms, tables of positions.
_TABLE: Final = re.compile(
    r"(^|[._])(mel_?(filters?|basis|fb|bank)|filter_?bank|fb|pe|inv_freq|(cos|sin)(_cached)?|"
    r"freqs_(cis|cos|sin)|sinusoid\w*|(i?stft|dft|fft)\w*|hann\w*|window)$",
    re.IGNORECASE,
)
_MOMENT: Final = re.compile(
    r"(^|\.)(exp_avg|exp_avg_sq|exp_inf|max_exp_avg_sq|momentum_buffer|square_avg|grad_avg|"
    r"acc_delta|ax)(\.|$)"
)


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

    @property
    def scale(self) -> float:
        """What the tensor's step is measured by: of typical rows, where rows have steps too."""
        if self.sparse:
            return self.sigma / sqrt(1 - self.zero_share)
        return self.typical_scale if has_row_steps(self) else self.sigma


def tensor_stats(spec: TensorSpec, blocks: Iterable[Array]) -> TensorStats:
    """Statistics of a float tensor that comes in blocks of whole rows of its matrix.

    The blocks are consecutive stored elements (BF16 as uint16 bits).
    """
    view = view_of(spec.shape)
    scales, low, high, outliers = [], inf, -inf, 0
    total, filled, peaks = 0.0, 0, 0.0
    for block in blocks:
        with np.errstate(over="ignore", invalid="ignore"):
            rows = to_float32(block.reshape(-1), spec.dtype).reshape(-1, view.columns)
        highest, lowest = rows.max(axis=1), rows.min(axis=1)
        largest = np.maximum(highest, -lowest)
        if not np.isfinite(largest).all():
            return TensorStats(spec, view, np.zeros(0, np.float32), 0.0, 0.0, finite=False)
        found = row_scales(rows, largest)
        scales.append(found)
        low, high = min(low, float(lowest.min())), max(high, float(highest.max()))
        total += float(np.abs(rows).sum(dtype=np.float64))
        filled += int(np.count_nonzero(rows))
        with np.errstate(over="ignore"):
            ratios = largest[found > 0] / found[found > 0]
        peaks += float(np.square(np.minimum(ratios, LARGEST_PEAK), dtype=np.float64).sum())
        some = largest > _limits(found)
        outliers += int(np.count_nonzero(outlier_mask(rows[some], found[some])))
    every = np.concatenate(scales) if scales else np.zeros(0, np.float32)
    sigma = sqrt(float(np.square(every.astype(np.float64)).mean())) if low < high else 0.0
    return TensorStats(
        spec, view, every, sigma, max(high, -low, 0.0), True, outliers,
        total / max(filled, 1), 1 - filled / max(spec.size, 1), int(low >= 0) - int(high <= 0),
        sqrt(peaks / max(int(np.count_nonzero(every)), 1)),
    )  # fmt: skip


def row_scales(rows: Floats, largest: Floats) -> Floats:
    """Robust root mean square of rows, (R, C), whose ``largest`` magnitudes, (R,), are known.

    Where one weight outweighs its row, only weights within ten scales, as the median of the
    magnitudes gives it, are counted.
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


def has_row_steps(stats: TensorStats) -> bool:
    """Whether the scales of rows differ so much that they need steps of their own."""
    typical = stats.typical_scale
    return len(stats.row_scales) > 1 and typical > 0 and log2(stats.sigma / typical) > ROW_SPREAD


def no_weights(specs: Sequence[TensorSpec]) -> tuple[set[str], set[str], set[str]]:
    """Names of what is no weight: scales of packed integers, tables, an optimizer's state.

    Examples
    --------
    >>> kinds = {"l.qweight": "I32", "l.scales": "F16", "m.scales": "F16", "a.pos.pe": "F32"}
    >>> no_weights([TensorSpec(name, kind, (64, 64)) for name, kind in kinds.items()])
    ({'l.scales'}, {'a.pos.pe'}, set())
    """
    floats = {s.name: s.name.rpartition(".") for s in specs if s.dtype in PACKABLE}
    packed = {s.name for s in specs if s.dtype not in PACKABLE and s.size > 1}
    modules = packed | {name.rpartition(".")[0] for name in packed}
    scales = {n for n, (m, _, own) in floats.items() if m in modules and _SCALE.search(own or n)}
    states = {s.name for s in specs if s.name.startswith("optimizer") or _MOMENT.search(s.name)}
    return scales, {name for name in floats if _TABLE.search(name)}, states


def is_sinusoid(stats: TensorStats) -> bool:
    """Whether each row is made of pairs of a sine and a cosine: its mean square is a half."""
    close = np.allclose(stats.row_scales, np.float32(sqrt(0.5)), rtol=1e-4)
    return close and stats.row_scales.size > 0 and 0.9 < stats.absmax < 1.0001

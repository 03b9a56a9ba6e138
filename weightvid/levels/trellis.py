"""Trellis-coded quantization: the encoder.

`weightvid.loader.trellis_index` defines the code: a level k stands for ``n = 4 k`` in the first
quantizer and ``4 k + 2`` in the second, and the weight is n / 4 steps of a plain quantizer of the
same rate. A machine of 32 states, driven by the parities of the levels, says which quantizer is
next. The encoder minimises over each row ``sum (w - n / 4)^2 + lam * bits(k)`` over all sequences
of levels; bits is a static price of the level alone, see `Bits`.

A level comes from one of four subsets: first quantizer even, first odd, second even, second odd.
What the best member of each costs depends on the weight alone, so it is one look-up per subset; the
Viterbi algorithm then chooses among four numbers per weight. Rows are searched side by side as
lanes of one vector.

Each bit of a state is the parity of a level and of every fifth one before it: simple to undo, and
as good as Ungerboeck's code of 32 states (1.18 dB at high rates for 1.19; his of 8 states 1.07).

Sources: G. Ungerboeck, "Channel coding with multilevel/phase signals", 1982; Fischer and Wang,
"Entropy-constrained trellis-coded quantization", 1992; ITU-T H.266, 8.7.3.

The entropy coder behind a video track sees levels as plain samples and does not know the trellis
state, so the model is the marginal one: a static code, one price for each level. It is symmetric
because HEVC codes signs in bypass mode: one bit, however skewed they are. To believe in cheaper
signs would give away up to 3 % of the stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from weightvid.errors import QuantizationError
from weightvid.levels.rounding import check_range
from weightvid.loader import MAX_LEVEL, Array, Floats

#: levels beyond -127..127, which are escapes of an 8-bit sample, cost as much as the last ones.
TABLE_MAX: Final = 127
_PRIOR_WEIGHT: Final = 16.0

Levels = npt.NDArray[np.integer[Any]]
#: what the levels -127 .. 127 cost, shape (255,).
Bits = npt.NDArray[np.float64]


def laplacian_bits(mean_magnitude: float) -> Bits:
    """Bits of levels whose magnitudes are geometric, of a mean (in levels, >= 0), with random sign.

    Examples
    --------
    >>> laplacian_bits(1.0)[TABLE_MAX - 1 : TABLE_MAX + 3].round(3).tolist()
    [3.0, 1.0, 3.0, 4.0]
    """
    mean = max(float(mean_magnitude), 1e-6)
    ratio = mean / (1.0 + mean)
    magnitudes = np.abs(np.arange(-TABLE_MAX, TABLE_MAX + 1))
    bits: Bits = -np.log2(1.0 - ratio) - np.log2(ratio) * magnitudes + (magnitudes > 0)
    return bits


def histogram_bits(levels: Levels, mean: float | None = None) -> Bits:
    """Bits by the histogram of some levels (or none) and their negatives.

    The prior has magnitudes of the given mean, or else of the levels' own.
    """
    flat = levels.astype(np.int32, copy=False).ravel()
    if mean is None:
        mean = float(np.abs(flat).mean()) if flat.size else 0.0
    prior = laplacian_bits(mean)
    clipped = np.clip(flat, -TABLE_MAX, TABLE_MAX) + TABLE_MAX
    counts = np.bincount(clipped, minlength=2 * TABLE_MAX + 1)
    folded = 0.5 * (counts + counts[::-1])
    share = (folded + _PRIOR_WEIGHT * np.exp2(-prior)) / (flat.size + _PRIOR_WEIGHT)
    return -np.log2(np.maximum(share, 1e-300))


def entropy_bits(levels: Levels) -> float:
    """Zero-order entropy of levels in bits per level.

    Examples
    --------
    >>> entropy_bits(np.array([0, 1, 0, 1]))
    1.0
    """
    counts = np.bincount(levels.ravel().astype(np.int64) - int(levels.min()))
    share = counts[counts > 0] / levels.size
    return max(0.0, -float((share * np.log2(share)).sum()))


def sign_coded_bits(levels: Levels) -> float:
    """Entropy of the magnitudes plus one bit for each sign, in bits per level.

    What a coder with bypass signs, such as HEVC, can reach at best.

    Examples
    --------
    >>> sign_coded_bits(np.array([0, 1, 0, 1]))
    1.5
    """
    return entropy_bits(np.abs(levels)) + float(np.count_nonzero(levels)) / levels.size


#: price of a bit in squared steps.
LAM: Final = 0.11
STATES: Final = 32
_HALF: Final = STATES // 2
#: where the two points of a level, 0 and 1/2 above it, lie in the mean.
MEAN_POINT: Final = 0.25

#: look-up cells per step: the search sees weights rounded to a 64th.
CELLS: Final = 64
_SUBSETS: Final = 4
#: the tables end here; weights further out are moved inside by an even number of steps.
_REACH: Final = 120
#: weights of the sample that a rate model is fitted to, and columns of one of its pieces.
_SAMPLE: Final = 1 << 14
_PIECE: Final = 1 << 10
#: lanes of one search, and bytes of its decisions.
_LANES: Final = 1024
_DECISION_BYTES: Final = 1 << 25
#: the least metric is subtracted after so many columns, so that metrics stay small.
_RENORM: Final = 64
#: weights whose costs are looked up at once; they stay in the cache.
_CHUNK_WEIGHTS: Final = 1 << 14

Integers = npt.NDArray[np.int32]
Places = npt.NDArray[np.intp]


def next_state(state: int, parity: int) -> int:
    """State of the trellis after a level of this parity (1: odd).

    >>> [next_state(state, 1) for state in (0, 1, 16, 31)]
    [1, 3, 0, 30]
    """
    return ((state << 1) | (parity ^ (state >> 4))) & 31


def second_quantizer(state: int) -> int:
    """1 in the states whose next level belongs to the second quantizer."""
    return (state & 7).bit_count() & 1


def trellis(scaled: Floats, lam: float = LAM, bits: Bits | None = None) -> Integers:
    """Trellis levels of a matrix.

    No matrix, weights that are not finite or out of range, or a negative ``lam`` are a
    QuantizationError.

    Parameters
    ----------
    scaled : ndarray of float32, shape (R, C)
        Weights in steps of the plain quantizer of the same rate. Each row is a run of its own.
    lam : float
        Price of a bit in squared steps, >= 0; 0 minimises the squared error alone.
    bits : ndarray of float64, shape (255,), optional
        Fitted to a sample when absent. With given ones the levels of a row depend on nothing but
        that row.

    Returns
    -------
    ndarray of int32, shape (R, C)
        ``|level|`` at most 2**22.
    """
    check_lam(lam)
    if scaled.ndim != 2:
        raise QuantizationError(f"weights must be a matrix, not {scaled.ndim}-dimensional")
    check_range(scaled, MAX_LEVEL - 2)
    return _search(scaled, fit_bits(sample_of(scaled), lam) if bits is None else bits, lam)


def sample_of(matrix: Floats) -> Floats:
    """About 16,384 weights of a matrix, in pieces of rows of at most 1,024 columns."""
    rows, columns = matrix.shape
    if matrix.size <= _SAMPLE:
        return matrix
    length = min(columns, _PIECE)
    pieces = spread(rows * (columns - length + 1), _SAMPLE // length)
    row, first = np.divmod(pieces, columns - length + 1)
    return np.stack([matrix[i, j : j + length] for i, j in zip(row, first, strict=True)])


def spread(size: int, count: int) -> Places:
    """At most ``count`` places below ``size``, ascending, in step with no pattern.

    Examples
    --------
    >>> spread(60, 5), spread(3, 5)
    (array([ 7, 14, 34, 41, 49]), array([0, 1, 2]))
    """
    if size <= count:
        return np.arange(size)
    # One in each of equal intervals, moved by the golden ratio from one to the next.
    within = np.arange(1, count + 1) * ((5**0.5 - 1) / 2) % 1.0
    return ((np.arange(count) + within) * (size / count)).astype(np.intp)


def check_lam(lam: float) -> None:
    """Refuse a price of bits that is none."""
    if not 0.0 <= lam < np.inf:
        raise QuantizationError(f"lam must be finite and at least 0, not {lam!r}")


def fit_bits(sample: Floats, lam: float = LAM) -> Bits:
    """Bits of the levels that the trellis chooses for a sample, such as `sample_of` makes."""
    nearest = np.rint(sample - np.float32(MEAN_POINT)).astype(np.int32)
    return histogram_bits(_search(sample, histogram_bits(nearest), lam))


@dataclass(frozen=True, slots=True, eq=False)
class CostTables:
    """Best member of each subset for weights at multiples of 1/64 step.

    Attributes
    ----------
    level : ndarray of int16, shape (4, classes x cells)
        k; subsets in the order first quantizer even, odd, second even, odd.
    price, cost : ndarray of float32, shape (4, classes x cells)
        ``lam * bits`` of that level; that and the squared error.
    middle : int
        Cell of weight 0, counted in each class.
    used : ndarray of int32, or None
        The only cells that there are, in ascending order; None: all.
    """

    level: npt.NDArray[np.int16]
    price: Floats
    cost: Floats
    middle: int
    used: Integers | None = None

    @classmethod
    def build(
        cls, bits: Bits, lam: float, peak: float, weights: Floats | None = None
    ) -> CostTables:
        """Tables for magnitudes up to ``peak``; longer ones start and end with more cells.

        Bits are those of one class, or one row for each. Of a few ``weights``, only their own cells
        are made.
        """
        reach = int(min(peak + 1.0, _REACH))
        middle, used = reach * CELLS, None
        if weights is not None and weights.size < middle:
            used = np.unique(_cells(weights, middle)[0])
        weight = (np.arange(2 * middle + 1) if used is None else used) / CELLS - reach
        subset = np.arange(_SUBSETS)[:, None]
        parity, offset = subset & 1, 0.5 * (subset >> 1)
        # Candidates: the members nearest to the weight, and those nearest to level 0.
        nearest = 2 * np.rint((weight - offset - parity) / 2) + parity
        steps = np.array([-4, -2, 0, 2, 4])[:, None, None]
        candidates = np.concatenate([nearest + steps, [0 * nearest - parity]])
        most = reach + 6
        errors = (weight - candidates - offset) ** 2
        levels, paid, costs = list[Array](), list[Floats](), list[Floats]()
        for prices in lam * np.atleast_2d(bits)[:, TABLE_MAX - most : TABLE_MAX + most + 1]:
            best = np.argmin(errors + prices[candidates.astype(np.intp) + most], axis=0)
            level = np.choose(best, candidates)
            price = prices[level.astype(np.intp) + most].astype(np.float32)
            levels.append(level.astype(np.int16))
            paid.append(price)
            costs.append(np.choose(best, errors).astype(np.float32) + price)
        return cls(np.hstack(levels), np.hstack(paid), np.hstack(costs), middle, used)

    @property
    def cells_of_class(self) -> int:
        """Cells of each class."""
        return 2 * self.middle + 1 if self.used is None else len(self.used)

    def cells(self, weights: Floats) -> tuple[Integers, Floats | None]:
        """Cell of each weight, and the even number of steps that it was moved by, if any was."""
        cells, moved = _cells(weights, self.middle)
        if self.used is not None:
            cells = np.searchsorted(self.used, cells).astype(np.int32)
        return cells, moved


def _cells(weights: Floats, middle: int) -> tuple[Integers, Floats | None]:
    """`CostTables.cells` where all cells are made."""
    reach, moved = np.float32(middle // CELLS), None
    if weights.size and max(weights.max(), -weights.min()) > reach:
        beyond = np.maximum(np.abs(weights) - reach, 0) * np.float32(0.5)
        moved = np.copysign(2 * np.ceil(beyond), weights)
        weights = weights - moved
    position = weights * np.float32(CELLS)
    position += np.float32(middle + 0.5)
    return position.astype(np.int32), moved


def _search(matrix: Floats, bits: Bits, lam: float) -> Integers:
    """Cheapest levels of a matrix at given prices."""
    found = np.zeros(matrix.shape, np.int32)
    if not matrix.size:
        return found
    table = CostTables.build(bits, lam, check_range(matrix, MAX_LEVEL - 2), matrix)
    lanes = min(_LANES, max(_LANES // 16, _DECISION_BYTES // (STATES * matrix.shape[1])))
    for first in range(0, len(matrix), lanes):
        cells, moved = table.cells(matrix[first : first + lanes])
        cells = np.ascontiguousarray(cells.T)
        place = _subsets(cells, table.cost) * np.intp(table.level.shape[1])
        place += cells
        found[first : first + lanes] = table.level.ravel().take(place, mode="clip").T
        if moved is not None:
            found[first : first + lanes] += moved.astype(np.int32)
    return found


def _subsets(cells: Integers, cost: Floats) -> npt.NDArray[np.uint8]:
    """Subset of every weight on the cheapest paths, shape (C, lanes): the Viterbi algorithm."""
    length, count = cells.shape
    branch = np.empty((2, _HALF, 2, count), np.float32)
    by_bits = branch.reshape(*(2,) * 6, count)
    metrics = np.empty((2, STATES, count), np.float32)
    metrics[0] = np.inf
    metrics[0, 0] = 0.0
    # Two metrics take turns. States come as 2 j + w, and go as 16 d + j.
    going = metrics.reshape(*(2,) * 6, 1, count)
    taken = np.empty((length, _HALF, 2, count), np.bool_)
    turn = 0
    columns = _RENORM
    while columns > 4 and columns * count > _CHUNK_WEIGHTS:
        columns //= 2  # Still divides the period, so that company changes no rounding.
    for start in range(0, length, columns):
        some = _branch_costs(cells[start : start + columns].astype(np.intp), cost)
        for column, branch_cost in enumerate(some, start):
            np.add(branch_cost, going[turn], out=by_bits)
            turn ^= 1
            np.minimum(branch[0], branch[1], out=metrics[turn].reshape(branch.shape[1:]))
            np.less(branch[1], branch[0], out=taken[column])
        if (start + columns) % _RENORM == 0:
            metrics[turn] -= metrics[turn].min(axis=0)
    return _trace_back(taken.reshape(length, STATES, count), np.argmin(metrics[turn], axis=0))


def _branch_costs(cells: Places, cost: Floats) -> Floats:
    """Costs of the branches: by column, d, the four bits of j, w, and lane; not to be written.

    A branch goes from state ``16 d + j`` to state ``2 j + w``. Its quantizer is that of the sum of
    the three low bits of j, and the parity of its level is that of ``d + w``. So with a row for
    each pair of these sums the costs are a strided view, and none need be copied.
    """
    rows = np.empty((4, 3, *cells.shape), np.float32)
    for subset in range(_SUBSETS):
        cost[subset].take(cells, None, rows[subset >> 1, subset & 1], "clip")
    rows[:2, 2] = rows[:2, 0]
    rows[2:] = rows[:2]
    quantizer, parity, column, lane = rows.strides
    strides = (column, parity, 0, quantizer, quantizer, quantizer, parity, lane)
    shape = (len(cells), 2, 2, 2, 2, 2, 2, cells.shape[1])
    return np.lib.stride_tricks.as_strided(rows, shape, strides, writeable=False)


@cache
def branches_into() -> tuple[Places, Places]:
    """Where the two branches into each state come from, and their subsets; shapes (32, 2)."""
    previous = np.zeros((STATES, 2), np.intp)
    subset = np.zeros((STATES, 2), np.intp)
    for state in range(STATES):
        for parity in range(2):
            entry = next_state(state, parity), state // _HALF
            previous[entry] = state
            subset[entry] = 2 * second_quantizer(state) + parity
    return previous, subset


def _trace_back(taken: npt.NDArray[np.bool_], state: Places) -> npt.NDArray[np.uint8]:
    """Subset of every weight along the best paths that end in ``state``, shape (C, lanes)."""
    length, _, count = taken.shape
    previous, subset = (table.ravel() for table in branches_into())
    lane = np.arange(count)
    branch = np.empty((length, count), np.uint8)
    for column in range(length - 1, -1, -1):
        # Branch d into a state has the number 2 * state + d.
        entry = 2 * state + taken[column].take(state * count + lane)
        branch[column] = entry
        state = previous.take(entry)
    return subset.astype(np.uint8).take(branch)

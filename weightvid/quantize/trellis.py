"""Trellis-coded (dependent scalar) quantization: the state machines and the dequantizer.

Specification
-------------
A tensor is a matrix of levels ``k``. A *run* is one row (``axis=1``) or one column (``axis=0``),
taken in increasing index. Each run is decoded alone and starts in state 0.

Two scalar quantizers share one step. Their points are numbered in one of two ways, by ``zero``::

    zero = false    Q0:  n = 4 k - 1       (..., -5, -1, 3, 7, ...)
                    Q1:  n = 1 - 4 k       (..., 5, 1, -3, -7, ...)
    zero = true     Q0:  n = 4 k           (..., -4, 0, 4, 8, ...)
                    Q1:  n = 4 k + 2       (..., -2, 2, 6, 10, ...)

    value = float32(n) * float32(step)        one rounding, to nearest even

``4 * step`` is the distance between neighbouring points of one quantizer, and corresponds to the
step of a plain uniform quantizer of that rate.

The state ``s`` is an integer of ``m = log2(states)`` bits. For each level of the run, in order::

    use Q1 if parity(s & OUTPUT) is 1, else Q0                  -> n
    w = (k & 1) xor parity(s & FEEDBACK)
    s = ((s << 1) | w) & (states - 1)

where parity(x) is the XOR of the bits of x, and ``k & 1`` is the lowest bit of the level in two's
complement (1 for odd levels of either sign).

======  ========  ==========  ==================  =============
states  FEEDBACK  OUTPUT      h0(D)               h1(D)
======  ========  ==========  ==================  =============
4       0b10      0b01        1 + D^2             D
8       0b101     0b010       1 + D + D^3         D^2
16      0b1100    0b0001      1 + D^3 + D^4       D
32      0b11000   0b00101     1 + D^4 + D^5       D + D^3
64      0b110101  0b011101    see below           see below
======  ========  ==========  ==================  =============

Written out, next state for an even and an odd level:

* 4 states: Q1 in states 1, 3. ``0: 0 1 | 1: 2 3 | 2: 1 0 | 3: 3 2``
* 8 states: Q1 in states 2, 3, 6, 7.
  ``0: 0 1 | 1: 3 2 | 2: 4 5 | 3: 7 6 | 4: 1 0 | 5: 2 3 | 6: 5 4 | 7: 6 7``

With p the sequence of level parities and q that of quantizer choices, ``h0(D) q = h1(D) p`` over
GF(2); for 64 states ``h0 = 1 + D + D^3 + D^5 + D^6`` and ``h1 = D + D^3 + D^4 + D^5``. Four states
are VVC's machine, eight are Ungerboeck's code for amplitude modulation; the others were the best
in a search over polynomials of their degree, 0.01 dB ahead of his.

VVC and MPEG NNC number the points of Q1 by ``2 k - sgn(k)`` (in units of two steps) and give both
quantizers a zero. That spoils the distances of the subsets around zero and, where the entropy coder
does not know the state, mixes two unlike distributions of k: it costs about 1 % of the bits at 3
and 3 % at 2 bits per weight. The first numbering above makes the two quantizers mirror images, so
both have the same distribution; the second keeps a zero, which pays above about 2 bits per weight
for tensors with many weights far below the step (whole rows of them, or sparse tensors).

Both equations are linear over GF(2), so no loop over levels is needed: the state after eight levels
is ``M s xor U[byte of parities]``. M is invertible with a small period, so in the rotating frame
``t_j = M^-j s_j`` the recurrence is a plain cumulative XOR.

Sources: G. Ungerboeck, "Channel coding with multilevel/phase signals", 1982, table I; Fischer and
Wang, "Entropy-constrained trellis-coded quantization", 1992; ITU-T H.266, 8.7.3.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from weightvid.errors import QuantizationError
from weightvid.quantize.params import TRELLIS_STATES, TrellisParams

DEFAULT_STATES = 8

# states -> (h0, h1), bit i is the coefficient of D^i.
_POLYNOMIALS = {
    4: (0o5, 0o2),
    8: (0o13, 0o4),
    16: (0o31, 0o2),
    32: (0o61, 0o12),
    64: (0o153, 0o72),
}

_BLOCK = 1 << 18

LevelArray = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True, slots=True)
class Machine:
    """One state machine.

    Attributes
    ----------
    states : int
        Number of states, a power of two.
    feedback, output : int
        Masks over the bits of the state, as in the specification above.
    """

    states: int
    feedback: int
    output: int

    def quantizer(self, state: int) -> int:
        """0 for Q0, 1 for Q1."""
        return (state & self.output).bit_count() & 1

    def next_state(self, state: int, parity: int) -> int:
        """State after a level of this parity.

        >>> [machine(8).next_state(state, 1) for state in range(8)]
        [1, 2, 5, 6, 0, 3, 4, 7]
        """
        shifted_in = parity ^ ((state & self.feedback).bit_count() & 1)
        return ((state << 1) | shifted_in) & (self.states - 1)


@cache
def machine(states: int) -> Machine:
    """Return the machine of 4, 8, 16, 32 or 64 states.

    Raises
    ------
    QuantizationError
        For any other number.
    """
    if states not in _POLYNOMIALS:
        raise QuantizationError(f"no trellis of {states} states; choose one of {TRELLIS_STATES}")
    feedback, output = _POLYNOMIALS[states]
    return Machine(states=states, feedback=feedback >> 1, output=output >> 1)


@dataclass(frozen=True, slots=True)
class _ByteTables:
    """The machine, eight levels at a time; first level in the lowest bit.

    ``period`` is the smallest P with M^P = 1. ``drive[j % P, byte]`` is what byte j adds in the
    rotating frame, ``choice[j % P, t]`` the eight quantizer bits that the state causes, and
    ``impulse[byte]`` those that the byte's own parities cause. ``state[j % P, t]`` is the state
    itself and ``rewind[r]`` steps a state back over r even levels.
    """

    period: int
    drive: npt.NDArray[np.uint8]
    choice: npt.NDArray[np.uint8]
    impulse: npt.NDArray[np.uint8]
    state: npt.NDArray[np.uint8]
    rewind: npt.NDArray[np.uint8]


def _walk_byte(trellis: Machine, state: int, byte: int) -> tuple[int, int]:
    choice = 0
    for bit in range(8):
        choice |= trellis.quantizer(state) << bit
        state = trellis.next_state(state, (byte >> bit) & 1)
    return state, choice


@cache
def _byte_tables(states: int) -> _ByteTables:
    trellis = machine(states)
    from_state = [_walk_byte(trellis, state, 0) for state in range(states)]
    from_byte = [_walk_byte(trellis, 0, byte) for byte in range(256)]
    forward = np.array([state for state, _ in from_state], np.uint8)
    choice = np.array([bits for _, bits in from_state], np.uint8)
    powers = [np.arange(states, dtype=np.uint8), forward]
    while not np.array_equal(powers[-1], powers[0]):
        powers.append(forward[powers[-1]])
    period = len(powers) - 1
    inverse = [powers[-1 - j] for j in range(period)]
    landed = np.array([state for state, _ in from_byte], np.uint8)
    single = np.array([trellis.next_state(state, 0) for state in range(states)])
    back = np.argsort(single).astype(np.uint8)
    rewind = [powers[0]]
    for _ in range(7):
        rewind.append(back[rewind[-1]])
    return _ByteTables(
        period=period,
        drive=np.stack([inverse[(j + 1) % period][landed] for j in range(period)]),
        choice=np.stack([choice[powers[j]] for j in range(period)]),
        impulse=np.array([bits for _, bits in from_byte], np.uint8),
        state=np.stack(powers[:period]),
        rewind=np.stack(rewind),
    )


def dequantize_index_reference(
    levels: LevelArray, states: int, axis: int = 1, zero: bool = False
) -> npt.NDArray[np.int32]:
    """Level by level, straight from the specification; slow, for tests and for readers."""
    trellis = machine(states)
    runs = levels if axis == 1 else levels.T
    index = np.zeros(runs.shape, np.int32)
    for row, run in enumerate(runs.tolist()):
        state = 0
        for column, level in enumerate(run):
            second = trellis.quantizer(state)
            if zero:
                index[row, column] = 4 * level + 2 if second else 4 * level
            else:
                index[row, column] = 1 - 4 * level if second else 4 * level - 1
            state = trellis.next_state(state, level & 1)
    return index if axis == 1 else index.T


def dequantize_index(
    levels: LevelArray, states: int = DEFAULT_STATES, axis: int = 1, zero: bool = False
) -> npt.NDArray[np.int32]:
    """Reconstruction indices of a matrix of levels.

    Parameters
    ----------
    levels : ndarray of int8, int16 or int32, shape (R, C)
        ``|level|`` at most 2**22. With ``axis=1`` any set of full rows may be passed.
    states : int
        4, 8, 16, 32 or 64.
    axis : int
        Axis along which runs go: 1, each row is a run; 0, each column is one.
    zero : bool
        Numbering of the points.

    Returns
    -------
    ndarray of int32, shape (R, C)
        ``n``, with ``value = float32(n) * float32(step)``.

    Raises
    ------
    QuantizationError
        For an unknown number of states, a bad axis or an array that is not a matrix.

    >>> dequantize_index(np.array([[1, 1, -2, 0, 3]]), states=4).tolist()
    [[3, -3, 9, 1, -11]]
    >>> dequantize_index(np.array([[1, 1, -2, 0, 3]]), states=4, zero=True).tolist()
    [[4, 6, -6, 2, 14]]
    """
    _check(levels, axis)
    index = np.empty(levels.shape, np.int32)
    tables = _byte_tables(machine(states).states)
    for part in _blocks(levels.shape, axis):
        bits, _ = _quantizer_bits(levels[part], tables, axis, None)
        _combine(levels[part], bits, index[part], zero)
    return index


def dequantize(
    levels: LevelArray, params: TrellisParams, out: npt.NDArray[np.float32] | None = None
) -> npt.NDArray[np.float32]:
    """Values of a matrix of levels.

    Parameters
    ----------
    levels : ndarray of int8, int16 or int32, shape (R, C)
        As in `dequantize_index`.
    params : TrellisParams
    out : ndarray of float32, shape (R, C), optional
        Takes the values.

    >>> dequantize(np.array([[1, 1, -2]], np.int8), TrellisParams(1.0, states=4)).tolist()
    [[0.75, -0.75, 2.25]]
    """
    _check(levels, params.axis)
    found = np.empty(levels.shape, np.float32) if out is None else out
    tables = _byte_tables(machine(params.states).states)
    for part in _blocks(levels.shape, params.axis):
        bits, _ = _quantizer_bits(levels[part], tables, params.axis, None)
        # Indices of 8-bit levels are below 2**10.
        index = np.empty(bits.shape, np.int16 if levels.itemsize == 1 else np.int32)
        _combine(levels[part], bits, index, params.zero)
        np.multiply(index, params.unit, out=found[part], dtype=np.float32, casting="unsafe")
    return found


def _blocks(shape: tuple[int, ...], axis: int) -> Iterator[tuple[slice, slice]]:
    """Parts of a matrix that hold whole runs and stay in the cache."""
    rows, columns = shape
    if axis == 1:
        step = max(1, _BLOCK // max(columns, 1))
        for first in range(0, rows, step):
            yield slice(first, first + step), slice(None)
    else:
        step = max(64, _BLOCK // max(rows, 1))
        for first in range(0, columns, step):
            yield slice(None), slice(first, first + step)


class ColumnDequantizer:
    """Dequantizer for ``axis=0`` that takes a matrix in chunks of consecutive full rows.

    Parameters
    ----------
    columns : int
        Number of columns, each a run.
    states : int
        4, 8, 16, 32 or 64.
    zero : bool
        Numbering of the points.

    >>> chunks = ColumnDequantizer(1, states=4)
    >>> [chunks.feed(np.array([[k]])).item() for k in (1, 1, -2, 0, 3)]
    [3, -3, 9, 1, -11]
    """

    def __init__(self, columns: int, states: int = DEFAULT_STATES, zero: bool = False) -> None:
        self._zero = zero
        self._tables = _byte_tables(machine(states).states)
        self._state = np.zeros(columns, np.uint8)

    def feed(self, levels: LevelArray) -> npt.NDArray[np.int32]:
        """Reconstruction indices of the next rows, shape (r, columns).

        Raises
        ------
        QuantizationError
            When the number of columns differs.
        """
        _check(levels, 0)
        if levels.shape[1] != self._state.size:
            raise QuantizationError(
                f"expected rows of {self._state.size} levels, got {levels.shape[1]}"
            )
        index = np.empty(levels.shape, np.int32)
        bits, self._state = _quantizer_bits(levels, self._tables, 0, self._state)
        _combine(levels, bits, index, self._zero)
        return index


def _check(levels: LevelArray, axis: int) -> None:
    if levels.ndim != 2:
        raise QuantizationError(f"levels must be a matrix, not {levels.ndim}-dimensional")
    if axis not in (0, 1):
        raise QuantizationError(f"axis must be 0 or 1, not {axis}")
    if levels.dtype.kind != "i":
        raise QuantizationError(f"levels must be signed integers, not {levels.dtype}")


def _quantizer_bits(
    levels: LevelArray, tables: _ByteTables, axis: int, state: npt.NDArray[np.uint8] | None
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Quantizer choice (0 or 1) of each level, and the state after the last one of each run."""
    length = levels.shape[axis]
    parities = levels.astype(np.uint8)
    parities &= 1
    packed = np.packbits(parities, axis=axis, bitorder="little")
    count = packed.shape[axis]
    phase = (np.arange(count + 1) % tables.period).astype(np.intp)
    if axis == 0:
        phase = phase[:, None]
    # frame[j] is the state before byte j in the rotating frame; frame[count] the one after all.
    shape = list(packed.shape)
    shape[axis] += 1
    frame = np.zeros(shape, np.uint8)
    head: Any = (slice(None), 0) if axis == 1 else 0
    body: Any = (slice(None), slice(1, None)) if axis == 1 else slice(1, None)
    before: Any = (slice(None), slice(None, -1)) if axis == 1 else slice(None, -1)
    last: Any = (slice(None), -1) if axis == 1 else -1
    if state is not None:
        frame[head] = state
    drive = np.take(tables.drive, (phase[:-1] << 8) + packed)
    frame[body] = drive
    np.bitwise_xor.accumulate(frame, axis=axis, out=frame)
    states = tables.state.shape[1]
    choice = np.take(tables.choice, phase[:-1] * states + frame[before])
    choice ^= np.take(tables.impulse, packed)
    bits = np.unpackbits(choice, axis=axis, count=length, bitorder="little")
    after = tables.state[count % tables.period][frame[last]]
    return bits, tables.rewind[-length % 8][after]


def _combine(
    levels: LevelArray,
    bits: npt.NDArray[np.uint8],
    index: npt.NDArray[np.signedinteger[Any]],
    zero: bool,
) -> None:
    """Reconstruction indices from levels and quantizer choices (overwritten), in place."""
    np.copyto(index, levels)
    index *= 4
    small = bits.view(np.int8)
    if zero:
        small += small
        index += small
    else:
        index -= 1
        small *= -2
        small += 1
        index *= small

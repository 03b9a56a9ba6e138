"""An entropy coder for quantizers that are compared: integers in known contexts to bytes and back.

Interleaved rANS with static frequencies for each context, which are stored with the data, so that
sizes are exact and hold all side information.

Source: J. Duda, "Asymmetric numeral systems", 2013; F. Giesen, "Interleaved entropy coders", 2014.
"""

from __future__ import annotations

import struct
import zlib
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[Any]

#: frequencies of a context add up to 2 ** this.
_SCALE_BITS: Final = 12
_SCALE: Final = 1 << _SCALE_BITS
#: states lie in 2**31 .. 2**63 - 1; 32 bits move at a time.
_LOW: Final = np.uint64(1 << 31)
_ROOM: Final = np.uint64(63 - _SCALE_BITS)
_WORD: Final = np.uint64(32)
_MASK: Final = np.uint64(_SCALE - 1)
#: symbols of one lane, about, and lanes at most.
_LANE_SYMBOLS: Final = 8192
_MOST_LANES: Final = 512
#: lengths of the tables and of the words, and lanes.
_HEAD: Final = struct.Struct("<III")


class _Tables(NamedTuple):
    """Frequencies of each context over the symbols of all, from ``low`` on."""

    low: int
    frequencies: npt.NDArray[np.uint64]
    starts: npt.NDArray[np.uint64]


def encode(symbols: Integers, contexts: Integers) -> bytes:
    """Bytes of integers, each coded in its context.

    Parameters
    ----------
    symbols : ndarray of int, shape (n,)
        Within one context at most 4096 different ones.
    contexts : ndarray of int, shape (n,)
        Small numbers from 0 on; the decoder must have them.
    """
    symbols, contexts = symbols.astype(np.int64), contexts.astype(np.int64)
    listed, tables = _make_tables(symbols, contexts)
    lanes = min(_MOST_LANES, max(1, len(symbols) // _LANE_SYMBOLS))
    state = np.full(lanes, _LOW, np.uint64)
    words: list[npt.NDArray[np.uint32]] = []
    for first in range((len(symbols) - 1) // lanes * lanes, -1, -lanes) if len(symbols) else ():
        place = contexts[first : first + lanes], symbols[first : first + lanes] - tables.low
        frequency, start = tables.frequencies[place], tables.starts[place]
        own = state[: len(frequency)]
        full = own >= frequency << _ROOM
        words.append((own[full] & np.uint64(0xFFFFFFFF)).astype(np.uint32)[::-1])
        own[full] >>= _WORD
        own[:] = (own // frequency << np.uint64(_SCALE_BITS)) + own % frequency + start
    body = np.concatenate([np.zeros(0, np.uint32), *words])[::-1].tobytes()
    return _HEAD.pack(len(listed), lanes, len(body)) + listed + state.tobytes() + body


def decode(data: bytes, contexts: Integers) -> tuple[npt.NDArray[np.int64], bytes]:
    """Integers that were encoded in these contexts, and the bytes that follow them."""
    contexts = contexts.astype(np.int64)
    listed, lanes, size = _HEAD.unpack_from(data)
    at = _HEAD.size
    tables = _read_tables(data[at : at + listed])
    at += listed
    state = np.frombuffer(data, np.uint64, lanes, at).copy()
    at += 8 * lanes
    words = np.frombuffer(data, np.uint32, size // 4, at).astype(np.uint64)
    found = np.empty(len(contexts), np.int64)
    lookup = np.zeros((len(tables.frequencies), _SCALE), np.int64)
    for row, frequencies in zip(lookup, tables.frequencies.astype(np.int64), strict=True):
        row[: frequencies.sum()] = np.repeat(np.arange(frequencies.size), frequencies)
    used = 0
    for first in range(0, len(contexts), lanes):
        context = contexts[first : first + lanes]
        own = state[: len(context)]
        low = own & _MASK
        symbol = lookup[context, low.astype(np.int64)]
        found[first : first + lanes] = symbol
        place = context, symbol
        own[:] = tables.frequencies[place] * (own >> np.uint64(_SCALE_BITS)) + low
        own -= tables.starts[place]
        empty = np.flatnonzero(own < _LOW)
        own[empty] = own[empty] << _WORD | words[used : used + len(empty)]
        used += len(empty)
    return found + tables.low, data[at + size :]


def _make_tables(symbols: Integers, contexts: Integers) -> tuple[bytes, _Tables]:
    """Tables as they are stored, and as the decoder will read them."""
    count = int(contexts.max(initial=-1)) + 1
    ranges, every = [], []
    for context in range(count):
        own = symbols[contexts == context]
        low = int(own.min(initial=0)) if own.size else 0
        counts = np.bincount(own - low) if own.size else np.zeros(1, np.int64)
        every.append(_frequencies(counts))
        ranges.append(struct.pack("<ii", low, len(counts)))
    body = np.concatenate([np.zeros(0, np.uint16), *every]).tobytes()
    listed = zlib.compress(struct.pack("<I", count) + b"".join(ranges) + body, 9)
    return listed, _read_tables(listed)


def _read_tables(listed: bytes) -> _Tables:
    raw = zlib.decompress(listed)
    (count,) = struct.unpack_from("<I", raw)
    ranges = np.frombuffer(raw, np.int32, 2 * count, 4).reshape(count, 2).astype(np.int64)
    body = np.frombuffer(raw, np.uint16, offset=4 + 8 * count)
    low = int(ranges[:, 0].min(initial=0))
    width = int((ranges.sum(axis=1) - low).max(initial=1))
    frequencies = np.zeros((count, width), np.uint64)
    at = 0
    for own, (first, size) in zip(frequencies, ranges, strict=True):
        own[first - low : first - low + size] = body[at : at + size]
        at += size
    starts = np.cumsum(frequencies, axis=1, dtype=np.uint64) - frequencies
    return _Tables(low, frequencies, starts)


def _frequencies(counts: Integers) -> npt.NDArray[np.uint16]:
    """Counts scaled to add up to the scale; what occurs keeps at least 1."""
    total = int(counts.sum())
    if not total:
        return np.zeros(len(counts), np.uint16)
    scaled = np.where(counts > 0, np.maximum(1, np.rint(counts * (_SCALE / total))), 0)
    found = scaled.astype(np.int64)
    while (excess := int(found.sum()) - _SCALE) != 0:
        # The largest bear it best.
        most = np.argsort(found)[::-1][: abs(excess)]
        found[most[found[most] > 1] if excess > 0 else most] -= 1 if excess > 0 else -1
    return found.astype(np.uint16)

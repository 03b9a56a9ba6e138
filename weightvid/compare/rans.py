"""An entropy coder for quantizers that are compared: integers in known contexts to bytes and back.

Asymmetric numeral systems, by the package constriction, with static frequencies for each context,
which are stored with the data: so sizes are exact and hold all side information.
"""

import struct
import zlib
from collections.abc import Sequence
from importlib import import_module
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[Any]

#: largest frequency of a context.
_SCALE: Final = 1 << 12
#: lengths of the tables and of the words.
_HEAD: Final = struct.Struct("<II")


def encode(symbols: Integers, contexts: Integers) -> bytes:
    """Bytes of integers, each coded in its context.

    Parameters
    ----------
    symbols : ndarray of int, shape (n,)
    contexts : ndarray of int, shape (n,)
        Small numbers from 0 on; the decoder must have them.
    """
    groups = [symbols[contexts == number] for number in range(int(contexts.max(initial=-1)) + 1)]
    lows = np.array([own.min(initial=0) for own in groups], np.int32)
    tables = [_frequencies(own - low) for own, low in zip(groups, lows, strict=True)]
    sizes = np.array([len(table) for table in tables], np.int32)
    parts = (struct.pack("<I", len(groups)), lows, sizes, *tables)
    listed = zlib.compress(b"".join(map(bytes, parts)), 9)
    coder = import_module("constriction").stream.stack.AnsCoder()
    for own, low, model in reversed(list(zip(groups, lows, _models(tables), strict=True))):
        coder.encode_reverse((own - low).astype(np.int32), model)
    words: bytes = coder.get_compressed().tobytes()
    return _HEAD.pack(len(listed), len(words)) + listed + words


def decode(data: bytes, contexts: Integers) -> tuple[npt.NDArray[np.int64], bytes]:
    """Integers that were encoded in these contexts, and the bytes that follow them."""
    listed, size = _HEAD.unpack_from(data)
    end = _HEAD.size + listed
    raw = zlib.decompress(data[_HEAD.size : end])
    (count,) = struct.unpack_from("<I", raw)
    lows, sizes = np.frombuffer(raw, np.int32, 2 * count, 4).reshape(2, count)
    body = np.frombuffer(raw, np.uint16, offset=4 + 8 * count)
    tables = np.split(body, np.cumsum(sizes)[:-1]) if count else []
    words = np.frombuffer(data, np.uint32, size // 4, end)
    coder = import_module("constriction").stream.stack.AnsCoder(words)
    found = np.empty(len(contexts), np.int64)
    for number, (low, model) in enumerate(zip(lows, _models(tables), strict=True)):
        here = np.flatnonzero(contexts == number)
        found[here] = coder.decode(model, here.size) + low
    return found, data[end + size :]


def _frequencies(symbols: Integers) -> npt.NDArray[np.uint16]:
    """How often numbers from 0 on occur, in about 12 bits; two of them at least."""
    counts = np.bincount(symbols, minlength=2)
    found = np.ceil(counts * (_SCALE / max(1, int(counts.max()))))
    return np.asarray(found, np.uint16)


def _models(tables: Sequence[npt.NDArray[np.uint16]]) -> list[Any]:
    kind = import_module("constriction").stream.model.Categorical
    return [kind(np.maximum(table, 1e-3).astype(np.float32), perfect=False) for table in tables]

"""Element types of checkpoints: names as safetensors spells them, and their numpy counterparts.

numpy has no bfloat16 and no float8. Their elements travel as raw bits (unsigned integers of the
same size); :func:`to_float32` and :func:`from_float32` convert the four packable float types.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from weightvid.errors import CheckpointError

FloatArray = npt.NDArray[np.float32]

#: dtype name -> numpy dtype of the *stored* little-endian elements (raw bits where numpy lacks it).
STORED: Final[dict[str, np.dtype[np.generic]]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "F8_E4M3": np.dtype("u1"),
    "F8_E5M2": np.dtype("u1"),
    "F8_E8M0": np.dtype("u1"),
    "F8_E4M3FNUZ": np.dtype("u1"),
    "F8_E5M2FNUZ": np.dtype("u1"),
    "C64": np.dtype("<c8"),
    "C128": np.dtype("<c16"),
    "C32": np.dtype("<u4"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}

#: dtypes that may be quantized and coded as video.
PACKABLE: Final = frozenset({"F64", "F32", "F16", "BF16"})

#: dtypes whose numpy array is raw bits, because numpy has no such type.
RAW_BITS: Final = frozenset(
    {"BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "C32"}
)

#: prefix of element types only numpy has (strings, dates, big-endian, long double, ...).
NUMPY_PREFIX: Final = "npy:"
_NUMPY_KINDS: Final = frozenset("biufcSUmMV")


def stored_dtype(name: str) -> np.dtype[np.generic]:
    """Numpy dtype of one stored element of dtype ``name``.

    Raises
    ------
    CheckpointError
        Unknown name, or a numpy type that holds objects.

    Examples
    --------
    >>> stored_dtype("BF16"), stored_dtype("npy:<U3")
    (dtype('uint16'), dtype('<U3'))
    """
    known = STORED.get(name)
    if known is not None:
        return known
    if name.startswith(NUMPY_PREFIX) and len(name) <= 64:
        try:
            dtype = np.dtype(name[len(NUMPY_PREFIX) :])
        except (TypeError, ValueError, SyntaxError):
            dtype = np.dtype(object)
        plain = dtype.fields is None and dtype.subdtype is None
        if dtype.kind in _NUMPY_KINDS and plain and 0 < dtype.itemsize <= 65536:
            return dtype
    raise CheckpointError(f"unknown element type {name!r}")


def name_of(dtype: np.dtype[np.generic]) -> str:
    """Our name of a numpy dtype.

    Examples
    --------
    >>> name_of(np.dtype("float32")), name_of(np.dtype(">f4"))
    ('F32', 'npy:>f4')
    """
    for name, stored in STORED.items():
        if name not in RAW_BITS and stored == dtype:
            return name
    if dtype.kind not in _NUMPY_KINDS or dtype.fields is not None or dtype.subdtype is not None:
        raise CheckpointError(f"arrays of dtype {dtype} cannot be stored")
    return NUMPY_PREFIX + dtype.str


def to_float32(array: npt.NDArray[np.generic], name: str) -> FloatArray:
    """Values of a packable array as float32.

    Parameters
    ----------
    array : ndarray
        Stored elements (BF16 as uint16 bits).
    name : str
        F64, F32, F16 or BF16. F64 rounds to nearest even; the others are exact.
    """
    if name == "BF16":
        return (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if name not in PACKABLE:
        raise CheckpointError(f"{name} is not a packable float type")
    return array.astype(np.float32, copy=False)


def from_float32(values: FloatArray, name: str) -> npt.NDArray[np.generic]:
    """Stored elements of dtype ``name`` nearest to float32 ``values`` (ties to even).

    Examples
    --------
    >>> hex(from_float32(np.array([1.0], np.float32), "BF16")[0])
    '0x3f80'
    """
    if name == "F32":
        return values
    if name == "BF16":
        bits = values.view(np.uint32)
        rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        return (rounded >> np.uint32(16)).astype(np.uint16)
    if name not in PACKABLE:
        raise CheckpointError(f"{name} is not a packable float type")
    with np.errstate(over="ignore"):
        return values.astype(STORED[name])

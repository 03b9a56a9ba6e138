"""Element types of checkpoints: names as safetensors spells them, and their numpy counterparts.

numpy has no bfloat16 and no float8. Their elements travel as raw bits (unsigned integers of the
same size); :func:`to_float32` and :func:`from_float32` convert the four packable float types.
"""

from __future__ import annotations

import re
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
    "F6_E2M3": np.dtype("u1"),
    "F6_E3M2": np.dtype("u1"),
    "F4": np.dtype("u1"),
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

#: largest finite value of each packable dtype, as far as float32 reaches.
LARGEST: Final = {"F64": 3.4e38, "F32": 3.4e38, "F16": 65504.0, "BF16": 3.38e38}

#: dtypes whose numpy array is raw bits, because numpy has no such type.
RAW_BITS: Final = frozenset(
    {
        "BF16",
        "F8_E4M3",
        "F8_E5M2",
        "F8_E8M0",
        "F8_E4M3FNUZ",
        "F8_E5M2FNUZ",
        "F6_E2M3",
        "F6_E3M2",
        "F4",
        "C32",
    }
)

#: dtype name -> bits per element, where files hold elements smaller than a byte. The stored array
#: has one element per byte (low bits); files pack them, the first element in the lowest bits.
SUB_BYTE: Final[dict[str, int]] = {"F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}

#: prefix of element types only numpy has (strings, dates, big-endian, long double, ...).
NUMPY_PREFIX: Final = "npy:"
_MAX_ITEM_BYTES: Final = 65536
#: byte order, kind, item size, unit of a date: what ``numpy.dtype.str`` writes.
_NUMPY_DESCR: Final = re.compile(r"[<>|][biufcSUmMV][0-9]{1,5}(\[[0-9A-Za-zμ]{1,16}\])?")


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
    descr = name[len(NUMPY_PREFIX) :]
    if name.startswith(NUMPY_PREFIX) and _NUMPY_DESCR.fullmatch(descr):
        try:
            dtype = np.dtype(descr)
        except (TypeError, ValueError):
            dtype = np.dtype(object)
        # Only numpy's own spelling, so that a type has one name.
        listed = any(dtype == stored for key, stored in STORED.items() if key not in RAW_BITS)
        if dtype.str == descr and 0 < dtype.itemsize <= _MAX_ITEM_BYTES and not listed:
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
    name = NUMPY_PREFIX + dtype.str
    try:
        plain = dtype.fields is None and dtype.subdtype is None and stored_dtype(name) == dtype
    except CheckpointError:
        plain = False
    if not plain:
        raise CheckpointError(f"arrays of dtype {dtype} cannot be stored")
    return name


def pack_bits(array: npt.NDArray[np.generic], name: str) -> npt.NDArray[np.uint8]:
    """Bytes of a sub-byte tensor as files hold them (padded with zero bits to a whole byte).

    Parameters
    ----------
    array : ndarray of uint8
        Stored elements, one per byte.
    name : str
        A key of :data:`SUB_BYTE`.

    Examples
    --------
    >>> pack_bits(np.array([1, 2], np.uint8), "F4")
    array([33], dtype=uint8)
    """
    width = SUB_BYTE[name]
    flat = array.reshape(-1).view(np.uint8)
    if flat.size and int(flat.max()) >> width:
        raise CheckpointError(f"an element of dtype {name} has more than {width} bits")
    bits = np.unpackbits(flat[:, None], axis=1, count=width, bitorder="little")
    return np.packbits(bits.reshape(-1), bitorder="little")


def unpack_bits(packed: npt.NDArray[np.uint8], name: str, size: int) -> npt.NDArray[np.uint8]:
    """Stored elements (one per byte) of a sub-byte tensor of ``size`` elements.

    Examples
    --------
    >>> unpack_bits(np.array([33], np.uint8), "F4", 2)
    array([1, 2], dtype=uint8)
    """
    width = SUB_BYTE[name]
    bits = np.unpackbits(packed, count=size * width, bitorder="little")
    return np.packbits(bits.reshape(size, width), axis=1, bitorder="little").reshape(size)


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
        # The carry must not run through a NaN: it keeps its upper bits, and one that says NaN.
        nan = (bits >> np.uint32(16)) | np.uint32(0x40)
        kept = np.where(np.isnan(values), nan, rounded >> np.uint32(16))
        return kept.astype(np.uint16)
    if name not in PACKABLE:
        raise CheckpointError(f"{name} is not a packable float type")
    with np.errstate(over="ignore"):
        return values.astype(STORED[name])

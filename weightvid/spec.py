"""What checkpoints and archives both list: element types, tensors, and small files beside them."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from weightvid.errors import CheckpointError
from weightvid.loader import DTYPES, PACKABLE, TensorSpec

#: largest finite value of each packable dtype, as far as float32 reaches.
LARGEST: Final = {"F64": 3.4e38, "F32": 3.4e38, "F16": 65504.0, "BF16": 3.38e38}

#: dtypes whose numpy array is raw bits, because numpy has no such type.
RAW_BITS: Final = frozenset(n for n in DTYPES if n.startswith(("BF", "F8", "F6_", "F4", "C32")))

#: dtype name -> bits per element, where files hold elements smaller than a byte. The stored array
#: has one element per byte (low bits); files pack them, the first element in the lowest bits.
SUB_BYTE: Final[dict[str, int]] = {"F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}

#: dtypes of weights that are quantized already, one stored element each.
_QUANTIZED: Final = frozenset(
    name for name, dtype in DTYPES.items() if dtype.itemsize == 1 and name != "BOOL"
)


def weight_count(specs: Iterable[TensorSpec]) -> int:
    """Elements of all floats, and of what is quantized to a byte or less already.

    Examples
    --------
    >>> weight_count([TensorSpec("w", "I8", (2, 3)), TensorSpec("step", "I64", (1,))])
    6
    """
    return sum(spec.size for spec in specs if spec.dtype in PACKABLE | _QUANTIZED)


def stored_dtype(name: str) -> np.dtype[np.generic]:
    """Numpy dtype of one stored element of dtype ``name``; a CheckpointError for an unknown one.

    Examples
    --------
    >>> stored_dtype("BF16")
    dtype('uint16')
    """
    if name not in DTYPES:
        raise CheckpointError(f"unknown element type {name!r}; known: {', '.join(DTYPES)}")
    return DTYPES[name]


def name_of(dtype: np.dtype[np.generic]) -> str:
    """Our name of a numpy dtype.

    Examples
    --------
    >>> name_of(np.dtype("float32"))
    'F32'
    """
    for name, stored in DTYPES.items():
        if name not in RAW_BITS and stored == dtype:
            return name
    raise CheckpointError(f"arrays of dtype {dtype} cannot be stored")


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


#: most side files, most bytes of one and of all, longest path in UTF-8 bytes.
SIDE_FILES: Final = 4096
SIDE_FILE_BYTES: Final = 48 << 20
SIDE_FILES_BYTES: Final = 128 << 20
SIDE_PATH_BYTES: Final = 1024

#: what some system takes for more than a letter of a name.
_UNSAFE: Final = re.compile(r'[\x00-\x1f\x7f\\:*?"<>|]')
#: names that are devices on Windows, whatever their suffix.
_DEVICE: Final = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class SideFile:
    """A small file that belongs to a model: configuration, tokenizer, graph.

    Attributes
    ----------
    path : str
        Relative, with ``/`` (see :func:`is_safe_path`).
    data : bytes
        The whole file.
    role : str
        ``file``: restored as it is; others are what a kind needs to be written again
        (``onnx-graph``, ``gguf-metadata``).
    """

    path: str
    data: bytes
    role: str = "file"


def is_safe_path(path: str) -> bool:
    """Whether a path stays below the folder it is put into, and is a file name on every system.

    Examples
    --------
    >>> is_safe_path("1_Pooling/config.json"), is_safe_path("../config.json"), is_safe_path("/a")
    (True, False, False)
    >>> is_safe_path("aux.json"), is_safe_path("a/NUL"), is_safe_path("auxiliary.json")
    (False, False, True)
    """
    try:
        if len(path.encode()) > SIDE_PATH_BYTES:
            return False
    except UnicodeEncodeError:
        return False
    return not _UNSAFE.search(path) and all(
        part not in ("", ".", "..") and part[-1] not in ". " and not _DEVICE.fullmatch(part)
        for part in path.split("/")
    )

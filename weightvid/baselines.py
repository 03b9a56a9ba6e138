"""What weightvid is measured against: the usual small checkpoints, without any video.

The baselines are flattered a little: their bytes hold no names, shapes or index, which any real
file needs and which weightvid's own sizes do count.
"""

from __future__ import annotations

import lzma
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Final

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.generic]

#: xz's strongest setting, ``xz -9e``.
XZ_PRESET: Final = 9 | lzma.PRESET_EXTREME

#: zstd's strongest level that needs no ``--ultra``.
ZSTD_LEVEL: Final = 19


@dataclass(frozen=True, slots=True)
class Baseline:
    """Size of a model stored the usual way, and what its reader would get back.

    Attributes
    ----------
    name : str
        ``"int8+xz"`` or ``"fp16+zstd"``.
    file_bytes : int
        Compressed bytes of all tensors.
    tensors : dict of str to ndarray
        The restored tensors, in the dtype and shape of the source.
    """

    name: str
    file_bytes: int
    tensors: dict[str, Array]


@dataclass(frozen=True, slots=True)
class Int8Tensor:
    """A tensor quantized to int8, one scale per output channel (first axis).

    Attributes
    ----------
    levels : ndarray of int8
        -127..127, in the source's shape.
    scales : ndarray of float32, shape (channels,)
        Largest magnitude of each channel over 127; 0 for a channel of zeros.
    """

    levels: npt.NDArray[np.int8]
    scales: npt.NDArray[np.float32]


def int8_per_channel(tensor: Array) -> Int8Tensor:
    """Quantize to int8 by the absolute maximum of each output channel, ties to even.

    Parameters
    ----------
    tensor : ndarray of finite floats, at least 2-D
        The first axis is the output channel.

    Examples
    --------
    >>> int8_per_channel(np.array([[1.0, -2.0], [0.0, 0.0]], np.float32)).levels.tolist()
    [[64, -127], [0, 0]]
    """
    values = tensor.astype(np.float32)
    within_channel = tuple(range(1, tensor.ndim))
    scales = np.abs(values).max(axis=within_channel, initial=0, keepdims=True) / np.float32(127)
    divisors = np.where(scales > 0, scales, np.float32(1))
    levels = np.rint(values / divisors).clip(-127, 127).astype(np.int8)
    return Int8Tensor(levels, scales.reshape(-1))


def int8_dequantize(quantized: Int8Tensor) -> npt.NDArray[np.float32]:
    """``level * scale`` in float32, in the shape of the levels.

    Examples
    --------
    >>> int8_dequantize(int8_per_channel(np.array([[127.0, -2.0]]))).tolist()
    [[127.0, -2.0]]
    """
    levels = quantized.levels.astype(np.float32)
    scales = quantized.scales.reshape((-1,) + (1,) * (levels.ndim - 1))
    return levels * scales


def xz(chunks: Iterable[bytes]) -> bytes:
    """The concatenated chunks as one ``xz -9e`` file.

    Examples
    --------
    >>> lzma.decompress(xz([b"ab", b"c"]))
    b'abc'
    """
    compressor = lzma.LZMACompressor(preset=XZ_PRESET)
    return b"".join([*map(compressor.compress, chunks), compressor.flush()])


def xz_bytes(chunks: Iterable[bytes]) -> int:
    """Bytes of the concatenated chunks as one ``xz -9e`` file.

    Examples
    --------
    >>> xz_bytes([b"a" * 1000, b"a" * 1000]) < 120
    True
    """
    compressor = lzma.LZMACompressor(preset=XZ_PRESET)
    return sum(len(compressor.compress(chunk)) for chunk in chunks) + len(compressor.flush())


def int8_xz(tensors: Mapping[str, Array]) -> Baseline:
    """Int8 per output channel, then ``xz -9e`` over everything.

    Finite float tensors of two or more dimensions are quantized; all others stay as they are. The
    file is all levels, then all scales, then the other tensors raw: like beside like.

    Parameters
    ----------
    tensors : mapping of str to ndarray
        float16, float32 or float64 weights and whatever else the model holds.
    """
    quantized = {name: int8_per_channel(t) for name, t in tensors.items() if is_weight(t)}
    restored = {
        name: int8_dequantize(quantized[name]).astype(t.dtype) if name in quantized else t
        for name, t in tensors.items()
    }

    def chunks() -> Iterator[bytes]:
        yield from (q.levels.tobytes() for q in quantized.values())
        yield from (q.scales.tobytes() for q in quantized.values())
        yield from (t.tobytes() for name, t in tensors.items() if name not in quantized)

    return Baseline("int8+xz", xz_bytes(chunks()), restored)


def fp16_zstd(tensors: Mapping[str, Array]) -> Baseline | None:
    """Every finite float tensor as float16, then zstd level 19; None where zstandard is missing.

    A tensor with a value that float16 cannot hold (beyond 65504) keeps its own type.

    Parameters
    ----------
    tensors : mapping of str to ndarray
        The model, as for :func:`int8_xz`.
    """
    if find_spec("zstandard") is None:
        return None
    import zstandard

    halves = {name: to_half(t) for name, t in tensors.items()}
    payload = b"".join(t.tobytes() for t in halves.values())
    file_bytes = len(zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(payload))
    restored = {name: halves[name].astype(t.dtype) for name, t in tensors.items()}
    return Baseline("fp16+zstd", file_bytes, restored)


def is_weight(tensor: Array) -> bool:
    """Whether a baseline of integers quantizes the tensor: at least 2-D, finite as float32."""
    if tensor.ndim < 2 or tensor.dtype.kind != "f":
        return False
    with np.errstate(over="ignore"):
        return bool(np.isfinite(tensor.astype(np.float32)).all())


def to_half(tensor: Array) -> Array:
    """The tensor as float16 where that stays finite, else unchanged."""
    if tensor.dtype.kind != "f" or tensor.dtype.itemsize <= 2:
        return tensor
    with np.errstate(over="ignore"):
        half = tensor.astype(np.float16)
    return half if bool(np.isfinite(half).all()) else tensor

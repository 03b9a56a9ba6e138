"""The usual small checkpoints, without any video: each is written, read back and measured.

But for GGUF they are flattered a little: their bytes hold no names, shapes or index, which any
real file needs and which weightvid's own sizes do count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from math import sqrt
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from weightvid.baselines import (
    ZSTD_LEVEL,
    Int8Tensor,
    int8_dequantize,
    int8_per_channel,
    is_weight,
    to_half,
    xz,
)
from weightvid.compare import nnc, peers
from weightvid.compare.coded import Coded, Decoded, Tensors
from weightvid.compare.model import Model
from weightvid.errors import CodecError

Array = npt.NDArray[Any]

INSTALL: Final = "pip install 'weightvid[compare]'"


@dataclass(frozen=True, slots=True)
class Baseline:
    """One way to store a model.

    Attributes
    ----------
    about : str
    encode : callable
        Parts of the file of a model at a value.
    decode : callable
        Tensors from the parts, the model's names and shapes, and the value.
    values : tuple
        Of the parameter; (None,) without one.
    modules : tuple of str
        Modules it needs.
    install : str
        How to get them.
    check : callable or None
        Why it cannot run here, where modules alone do not tell.
    exact : bool
        Every element must come back bit for bit.
    """

    about: str
    encode: Callable[[Model, float | None], Coded]
    decode: Callable[[Coded, Model, float | None], Decoded]
    values: tuple[float | None, ...] = (None,)
    modules: tuple[str, ...] = ()
    install: str = INSTALL
    check: Callable[[], str | None] | None = None
    exact: bool = False

    def missing(self) -> str | None:
        """Why it cannot run here, or None where it can."""
        if self.check is not None:
            return self.check()
        absent = [name for name in self.modules if find_spec(name) is None]
        return f"needs {', '.join(absent)}: {self.install}" if absent else None


@dataclass(frozen=True, slots=True)
class _Packer:
    """A general compressor."""

    pack: Callable[[bytes], bytes]
    unpack: Callable[[bytes], bytes]


def _xz(data: bytes) -> bytes:
    return xz([data])


def _unxz(data: bytes) -> bytes:
    import lzma

    return lzma.decompress(data)


def _zstd(data: bytes) -> bytes:
    import zstandard

    return bytes(zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(data))


def _unzstd(data: bytes) -> bytes:
    import zstandard

    return bytes(zstandard.ZstdDecompressor().decompress(data))


_RAW: Final = _Packer(bytes, bytes)
_XZ: Final = _Packer(_xz, _unxz)
_ZSTD: Final = _Packer(_zstd, _unzstd)


class _Taker:
    """Arrays from consecutive bytes."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def take(self, shape: Sequence[int], dtype: Any) -> Array:
        kind = np.dtype(dtype)
        count = int(np.prod(shape, dtype=np.int64))
        end = self._at + count * kind.itemsize
        if end > len(self._data):
            raise CodecError("a baseline's file ends before its tensors do")
        found = np.frombuffer(self._data, kind, count, self._at).reshape(shape)
        self._at = end
        return found


def _weights(model: Model) -> list[str]:
    """Names of the tensors that integers can stand for."""
    return [name for name, tensor in model.tensors.items() if is_weight(tensor)]


def _encode_int8(packer: _Packer, model: Model, value: float | None) -> Coded:
    """All levels, then all scales, then the other tensors raw: like beside like."""
    quantized = {name: int8_per_channel(model.tensors[name]) for name in _weights(model)}

    def chunks() -> Iterator[bytes]:
        yield from (q.levels.tobytes() for q in quantized.values())
        yield from (q.scales.tobytes() for q in quantized.values())
        yield from (t.tobytes() for name, t in model.tensors.items() if name not in quantized)

    return Coded({"data": packer.pack(b"".join(chunks()))})


def _decode_int8(packer: _Packer, coded: Coded, model: Model, value: float | None) -> Decoded:
    taker, weights = _Taker(packer.unpack(coded.parts["data"])), _weights(model)
    levels = {name: taker.take(model.tensors[name].shape, np.int8) for name in weights}
    scales = {name: taker.take(model.tensors[name].shape[:1], np.float32) for name in weights}
    found: Tensors = {}
    for name, tensor in model.tensors.items():
        if name in levels:
            restored = int8_dequantize(Int8Tensor(levels[name], scales[name]))
            found[name] = restored.astype(tensor.dtype)
        else:
            found[name] = taker.take(tensor.shape, tensor.dtype)
    return Decoded(found)


_NARROW: Final = (np.int8, np.int16, np.int32)


def _encode_global(model: Model, value: float | None) -> Coded:
    """One step for all weights; one byte for each of them says how wide its integers are."""
    weights = _weights(model)
    power = sum(float(np.square(model.tensors[n], dtype=np.float64).sum()) for n in weights)
    count = sum(model.tensors[name].size for name in weights)
    step = np.float32((value or 1.0) * sqrt(power / count)) if power else np.float32(1)
    kinds, levels = bytearray(), []
    for name in weights:
        rounded = np.rint(model.tensors[name].astype(np.float32) / step)
        most = float(np.abs(rounded).max(initial=0))
        kind = 0 if most < 1 << 7 else 1 if most < 1 << 15 else 2
        kinds.append(kind)
        levels.append(rounded.astype(_NARROW[kind]).tobytes())
    rest = [t.tobytes() for name, t in model.tensors.items() if name not in set(weights)]
    return Coded({"data": _xz(b"".join([step.tobytes(), bytes(kinds), *levels, *rest]))})


def _decode_global(coded: Coded, model: Model, value: float | None) -> Decoded:
    taker, weights = _Taker(_unxz(coded.parts["data"])), _weights(model)
    step = taker.take((), np.float32)
    kinds = dict(zip(weights, taker.take((len(weights),), np.uint8), strict=True))
    found: Tensors = {}
    for name in weights:
        tensor = model.tensors[name]
        levels = taker.take(tensor.shape, _NARROW[kinds[name]])
        found[name] = (levels.astype(np.float32) * step).astype(tensor.dtype)
    for name, tensor in model.tensors.items():
        if name not in kinds:
            found[name] = taker.take(tensor.shape, tensor.dtype)
    return Decoded(found)


def _encode_half(model: Model, value: float | None) -> Coded:
    return Coded({"data": _zstd(b"".join(to_half(t).tobytes() for t in model.tensors.values()))})


def _decode_half(coded: Coded, model: Model, value: float | None) -> Decoded:
    taker = _Taker(_unzstd(coded.parts["data"]))
    return Decoded(
        {
            name: taker.take(tensor.shape, to_half(tensor).dtype).astype(tensor.dtype)
            for name, tensor in model.tensors.items()
        }
    )


def _int8(about: str, packer: _Packer, modules: tuple[str, ...] = ()) -> Baseline:
    return Baseline(
        f"int8, one scale per output channel, {about}",
        partial(_encode_int8, packer), partial(_decode_int8, packer), modules=modules,
    )  # fmt: skip


def _gguf(kind: str) -> Baseline:
    return Baseline(
        f"GGUF {kind} where rows are multiples of 32, else F16",
        partial(peers.encode_gguf, kind), peers.decode_gguf,
        modules=("gguf",), install="pip install 'weightvid[gguf]'",
    )  # fmt: skip


#: every baseline, by name.
BASELINES: Final[Mapping[str, Baseline]] = MappingProxyType(
    {
        "fp16+zstd": Baseline(
            f"float16 where it stays finite, zstd -{ZSTD_LEVEL}",
            _encode_half, _decode_half, modules=("zstandard",),
        ),
        "int8": _int8("raw", _RAW),
        "int8+zstd": _int8(f"zstd -{ZSTD_LEVEL}", _ZSTD, ("zstandard",)),
        "int8+xz": _int8("xz -9e", _XZ),
        "global+xz": Baseline(
            "one step for all weights, in units of their root mean square, xz -9e",
            _encode_global, _decode_global, (0.12, 0.17, 0.25, 0.35, 0.5, 0.7),
        ),
        "gguf-q8_0": _gguf("Q8_0"),
        "gguf-q4_0": _gguf("Q4_0"),
        "zipnn": Baseline(
            "ZipNN, bit-exact", peers.encode_zipnn, peers.decode_zipnn,
            modules=("zipnn",), install="pip install zipnn", exact=True,
        ),
        "nncodec": Baseline(
            "NNCodec (MPEG NNC) with dependent quantization, over its QP",
            peers.encode_nncodec, peers.decode_nncodec, (-32, -28, -24, -22, -20, -18),
            check=nnc.missing,
        ),
    }
)  # fmt: skip

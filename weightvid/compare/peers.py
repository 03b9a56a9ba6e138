"""Baselines by other people's packages: GGUF, ZipNN, NNCodec."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from weightvid.baselines import is_weight
from weightvid.compare import nnc
from weightvid.compare.coded import Coded, Decoded, Parts, Tensors
from weightvid.compare.model import Model
from weightvid.errors import CodecError

#: weights that share a scale in GGUF's Q8_0 and Q4_0.
_BLOCK: Final = 32
#: ZipNN's names of element types.
_ZIPNN: Final = {"float32": "float32", "float16": "float16"}


def encode_gguf(kind: str, model: Model, value: float | None) -> Coded:
    """A whole GGUF file by the ``gguf`` package.

    Matrices whose rows are multiples of 32 weights take the kind, other matrices F16 where that
    stays finite, vectors F32; names are numbers, since GGUF limits their length.
    """
    import gguf
    from gguf import quants

    wanted = gguf.GGMLQuantizationType[kind]
    with tempfile.TemporaryDirectory(prefix="weightvid-") as folder:
        path = Path(folder) / "model.gguf"
        writer = gguf.GGUFWriter(path, "weightvid")
        for number, tensor in enumerate(model.tensors.values()):
            name = str(number)
            if not tensor.size:
                continue
            if tensor.dtype.kind != "f":
                writer.add_tensor(name, np.ascontiguousarray(tensor).reshape(-1).view(np.int8))
                continue
            if not is_weight(tensor):
                writer.add_tensor(name, _plain(tensor))
                continue
            matrix = tensor.reshape(len(tensor), -1).astype(np.float32)
            if matrix.shape[1] % _BLOCK == 0:
                writer.add_tensor(name, quants.quantize(matrix, wanted), raw_dtype=wanted)
                continue
            with np.errstate(over="ignore"):
                half = matrix.astype(np.float16)
            writer.add_tensor(name, half if np.isfinite(half).all() else matrix)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return Coded({"data": path.read_bytes()})


def _plain(tensor: Any) -> Any:
    """A float vector as GGUF takes it: at least one dimension, elements of an ordinary type."""
    return np.ascontiguousarray(tensor).reshape(-1)


def decode_gguf(coded: Coded, model: Model, value: float | None) -> Decoded:
    """Tensors of a GGUF file."""
    import gguf
    from gguf import quants

    found: Tensors = {}
    with tempfile.TemporaryDirectory(prefix="weightvid-") as folder:
        path = Path(folder) / "model.gguf"
        path.write_bytes(coded.parts["data"])
        tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        for number, (name, before) in enumerate(model.tensors.items()):
            if not before.size:
                found[name] = before
                continue
            stored = tensors[str(number)]
            if before.dtype.kind != "f":
                raw = np.array(stored.data).reshape(-1).view(np.uint8)
                found[name] = raw.view(before.dtype).reshape(before.shape)
            elif is_weight(before):
                values = quants.dequantize(np.array(stored.data), stored.tensor_type)
                found[name] = values.reshape(before.shape).astype(before.dtype)
            else:
                found[name] = np.array(stored.data).reshape(before.shape).astype(before.dtype)
        tensors.clear()
    return Decoded(found)


def encode_zipnn(model: Model, value: float | None) -> Coded:
    """ZipNN on the bytes of each kind of tensor, like beside like; one thread."""
    parts: Parts = {}
    for dtype, data in _by_dtype(model).items():
        if dtype in _ZIPNN and data:
            # It swaps bytes in place: it gets a copy of its own.
            parts[dtype] = bytes(_zipnn(dtype).compress(bytearray(data)))
        else:
            parts[dtype] = data
    return Coded(parts)


def decode_zipnn(coded: Coded, model: Model, value: float | None) -> Decoded:
    """Tensors from ZipNN's streams."""
    whole = {
        dtype: bytes(_zipnn(dtype).decompress(bytearray(data)))
        if dtype in _ZIPNN and data
        else data
        for dtype, data in coded.parts.items()
    }
    at, found = dict.fromkeys(whole, 0), Tensors()
    for name, tensor in model.tensors.items():
        dtype = tensor.dtype.name
        end = at[dtype] + tensor.nbytes
        found[name] = np.frombuffer(whole[dtype][at[dtype] : end], tensor.dtype).reshape(
            tensor.shape
        )
        at[dtype] = end
    return Decoded(found)


def _by_dtype(model: Model) -> dict[str, bytes]:
    found: dict[str, list[bytes]] = {}
    for tensor in model.tensors.values():
        found.setdefault(tensor.dtype.name, []).append(tensor.tobytes())
    return {dtype: b"".join(parts) for dtype, parts in found.items()}


def _zipnn(dtype: str) -> Any:
    import zipnn

    return zipnn.ZipNN(input_format="byte", bytearray_dtype=_ZIPNN[dtype], threads=1)


def encode_nncodec(model: Model, value: float | None) -> Coded:
    """NNCodec's bitstream at a QP."""
    return nnc.encode(model.tensors, round(value or 0))


def decode_nncodec(coded: Coded, model: Model, value: float | None) -> Decoded:
    """Tensors of NNCodec's bitstream."""
    decoded = nnc.decode(coded.parts["data"])
    absent = [name for name in model.tensors if name not in decoded.tensors]
    if absent:
        raise CodecError(f"NNCodec gave no {absent[0]}")
    tensors = {
        name: decoded.tensors[name].reshape(before.shape).astype(before.dtype)
        for name, before in model.tensors.items()
    }
    return replace(decoded, tensors=tensors)

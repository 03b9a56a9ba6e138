"""What people use without video: integers or halves and a general compressor; GGUF; NNCodec.

But for GGUF and NNCodec their bytes hold no names, shapes or index, which any real file needs and
weightvid's own sizes do count. NNCodec's pins clash with ours, so a Python of its own runs it: its
path is an option, or the value of the environment variable WEIGHTVID_NNCODEC.
"""

import ctypes
import lzma
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from importlib import import_module
from importlib.util import find_spec
from math import sqrt
from pathlib import Path
from time import perf_counter
from typing import Any, Final, NamedTuple

import numpy as np

from weightvid.atomic import ScratchFolder
from weightvid.checkpoint.nnc import VARIABLE, run_nncodec
from weightvid.compare.model import Array, Coded, Method, Model, Tensors
from weightvid.errors import CodecError
from weightvid.exact import exact_elements

#: mantissa bits that 1-D floats keep next to a global step, as in weightvid's own recipes.
_MANTISSA_BITS: Final = 7
#: weights of a block with a scale of its own.
_BLOCK: Final = 64
#: kinds of GGUF that the gguf package cannot make.
_K_QUANTS: Final = ("Q6_K", "Q5_K", "Q4_K")
#: octaves of the global step, in units of the root mean square of all weights.
_GLOBAL_FACTORS: Final = tuple(round(0.35 * 2 ** (i / 2), 3) for i in range(-4, 4))
#: general compressors, and their inverses.
_PACKERS: Final[Mapping[str, tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]]] = {
    "xz": (partial(lzma.compress, preset=9 | lzma.PRESET_EXTREME), lzma.decompress),
    "zstd": (
        lambda data: bytes(import_module("zstandard").compress(data, 19)),  # more needs --ultra
        lambda data: bytes(import_module("zstandard").decompress(data)),
    ),
}
#: two to an octave of the step.
DQ_QPS: Final = tuple(range(-34, -17, 2))
OPT_QPS: Final = tuple(range(-36, -19, 2))


class _Integers(NamedTuple):
    """A tensor as integers times scales, which are spread over the integers."""

    levels: Array
    scales: Array


def plain_methods() -> Iterator[Method]:
    """Every plain way: the smallest of each kind at several rates."""
    depends = ("compare/rivals",)
    zstd = lacks("zstandard", "pip install 'weightvid[compare]'")
    for name, block in (*((name, 0) for name in _PACKERS), ("xz", _BLOCK)):
        missing = zstd if name == "zstd" else ""
        per = f"block of {block}" if block else "channel"
        yield Method(
            f"integers per {per} + {name}", "plain", partial(_rounded, name, block), "bits",
            (8, 6, 5, 4), missing, depends=depends,
        )  # fmt: skip
    name = "one global step + xz"
    yield Method(name, "plain", _global_step, "step factor", _GLOBAL_FACTORS, depends=depends)
    yield Method("float16 + zstd", "plain", _half, missing=zstd, depends=depends)
    missing = lacks("gguf", "pip install 'weightvid[gguf]'")
    k_quants = missing or lacks("xllamacpp", "pip install xllamacpp")
    for kind in ("Q8_0", "Q5_0", "Q4_0", *_K_QUANTS):
        lacking = k_quants if kind in _K_QUANTS else missing
        code = partial(_gguf, kind)
        yield Method(f"GGUF {kind}", "plain", code, missing=lacking, depends=depends)


def lacks(module: str, install: str) -> str:
    """What is said of a package that is missing; nothing if it is there."""
    return "" if find_spec(module) else f"{module} is missing: {install}"


def _rounded(packer: str, block: int, model: Model, bits: float) -> Coded:
    """Integers of so many bits, a scale by the largest magnitude of each output channel or block.

    The scales of blocks are float16.
    """
    began = perf_counter()
    top = 2 ** (round(bits) - 1) - 1

    def quantized(tensor: Array) -> _Integers:
        values = tensor.astype(np.float32)
        blocks = block and tensor.size % block == 0
        values = values.reshape(-1, block) if blocks else values
        within = tuple(range(1, values.ndim))
        scales = np.abs(values).max(axis=within, initial=0, keepdims=True) / np.float32(top)
        scales = scales.astype(np.float16 if blocks else np.float32)
        levels = np.rint(values / np.where(scales > 0, scales, np.float32(1)))
        return _Integers(levels.clip(-top, top), scales)

    integers = {name: quantized(tensor) for name, tensor in model.matrices().items()}
    return _stored(model, integers, model.tensors, packer, began)


def _global_step(model: Model, factor: float) -> Coded:
    """One step for the whole network, in units of the root mean square of all weights."""
    began = perf_counter()
    matrices = model.matrices()
    count = max(1, sum(tensor.size for tensor in matrices.values()))
    power = sum(float(np.square(x, dtype=np.float64).sum()) for x in matrices.values())
    step = np.float32(factor * sqrt(power / count) or 1.0)
    integers = {
        name: _Integers(np.rint(tensor.astype(np.float32) / step), np.reshape(step, 1))
        for name, tensor in matrices.items()
    }
    kept = {s.name: exact_elements(model.tensors[s.name], s, _MANTISSA_BITS) for s in model.specs}
    return _stored(model, integers, kept, "xz", began)


def _stored(
    model: Model,
    integers: Mapping[str, _Integers],
    kept: Mapping[str, Array],
    packer: str,
    began: float,
) -> Coded:
    """All levels, then all scales, then the other tensors: like next to like."""
    chunks = [_narrow(each.levels).tobytes() for each in integers.values()]
    chunks += [each.scales.tobytes() for each in integers.values()]
    chunks += [array.tobytes() for name, array in kept.items() if name not in integers]
    pack, unpack = _PACKERS[packer]
    data = pack(b"".join(chunks))
    packed = perf_counter()
    if unpack(data) != b"".join(chunks):
        raise CodecError("the compressor gave other bytes back than it was given")
    found = dict(kept) | {n: np.multiply(*x, dtype=np.float32) for n, x in integers.items()}
    restored = {n: found[n].astype(x.dtype).reshape(x.shape) for n, x in model.tensors.items()}
    return Coded(len(data), restored, packed - began, perf_counter() - packed)


def _narrow(levels: Array) -> Array:
    """Integers in the narrowest type that holds them."""
    most = float(np.abs(levels).max(initial=0))
    return levels.astype(np.int8 if most < 128 else np.int16 if most < 1 << 15 else np.int32)


def _half(model: Model, _: float) -> Coded:
    """Every float tensor as float16 where that stays finite, then zstd."""
    began = perf_counter()
    halves = {name: _to_half(tensor) for name, tensor in model.tensors.items()}
    return _stored(model, {}, halves, "zstd", began)


def _to_half(tensor: Array) -> Array:
    if tensor.dtype.kind != "f" or tensor.dtype.itemsize <= 2:
        return tensor
    with np.errstate(over="ignore"):
        half = tensor.astype(np.float16)
    return half if bool(np.isfinite(half).all()) else tensor


def _gguf_blocks(rows: Array, kind: Any) -> Array:
    """Blocks of a GGUF file; K-quants are made by llama.cpp itself."""
    import gguf

    if kind.name not in _K_QUANTS:
        return np.asarray(gguf.quants.quantize(rows, kind))
    from xllamacpp import xllamacpp

    values = np.ascontiguousarray(rows, np.float32)
    blocks = np.empty(gguf.quants.quant_shape_to_byte_shape(values.shape, kind), np.uint8)
    quantize = ctypes.CDLL(xllamacpp.__file__).ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (values, blocks)]
    sizes = [ctypes.c_int64(size) for size in (0, *values.shape)]
    quantize(ctypes.c_int(kind.value), *pointers, *sizes, None)
    return blocks


def _gguf(kind: str, model: Model, _: float) -> Coded:
    """A GGUF file of one kind; what is no whole number of blocks is in float16.

    Rows that are none are laid end to end. llama.cpp itself would keep those in float16.
    """
    import gguf

    began = perf_counter()
    wanted = gguf.GGMLQuantizationType[kind]
    block = gguf.GGML_QUANT_SIZES[wanted][0]
    with ScratchFolder() as folder:
        path = Path(folder) / "model.gguf"
        writer = gguf.GGUFWriter(path, "weightvid")
        matrices = model.matrices()
        # Numbers stand for the names, whose length GGUF limits.
        for number, (name, tensor) in enumerate(model.tensors.items()):
            if name not in matrices:
                raw = np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)
                if raw.size:
                    writer.add_tensor(str(number), raw.view(np.int8))
                continue
            rows = tensor.reshape(len(tensor), -1).astype(np.float32)
            rows = rows if rows.shape[1] % block == 0 else rows.reshape(1, -1)
            if rows.size % block:
                writer.add_tensor(str(number), _to_half(rows))
            else:
                writer.add_tensor(str(number), _gguf_blocks(rows, wanted), raw_dtype=wanted)
        for write in ("header", "kv_data", "tensors"):
            getattr(writer, f"write_{write}_to_file")()
        writer.close()
        written = perf_counter()
        stored = {t.name: (np.array(t.data), t.tensor_type) for t in gguf.GGUFReader(path).tensors}
        restored: Tensors = {}
        for number, (name, tensor) in enumerate(model.tensors.items()):
            if not tensor.size:
                restored[name] = tensor
            elif name in matrices:
                found = gguf.quants.dequantize(*stored[str(number)])
                restored[name] = found.reshape(tensor.shape).astype(tensor.dtype)
            else:
                raw = stored[str(number)][0].reshape(-1).view(np.uint8)
                restored[name] = raw.view(tensor.dtype).reshape(tensor.shape)
        size = path.stat().st_size
    return Coded(size, restored, written - began, perf_counter() - written)


def peer_methods(
    nncodec: str | os.PathLike[str] | None = None,
    dq_qps: Sequence[int] = DQ_QPS,
    opt_qps: Sequence[int] = OPT_QPS,
) -> Iterator[Method]:
    """NNCodec with dependent quantization, without and with its own QP for each layer.

    ``nncodec`` is the Python that has it (None: the environment variable's). The step of a QP is
    2 ** (QP / 4).
    """
    python = os.fspath(nncodec or os.environ.get(VARIABLE, ""))
    version, missing = _nncodec_version(python)
    for name, opt_qp, qps in (("NNCodec DQ", False, dq_qps), ("NNCodec opt_qp", True, opt_qps)):
        yield Method(
            name, "peer", partial(_nncodec, python, opt_qp), "QP", tuple(map(float, qps)), missing,
            {"version": version}, ("compare/rivals", "compare/nncodec", "checkpoint/nnc"),
            command=("compare", "--nncodec", python) if nncodec else ("compare",),
        )  # fmt: skip


@lru_cache
def _nncodec_version(python: str) -> tuple[str, str]:
    """Version of NNCodec, or why it cannot run."""
    if not python:
        return "", f"NNCodec is missing: name a Python that has it by --nncodec or {VARIABLE}"
    script = "from importlib.metadata import version; print(version('nncodec'))"
    try:
        done = subprocess.run(
            [python, "-c", script], capture_output=True, text=True, check=False,
            timeout=60, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", f"{python} cannot be run: {error}"
    if done.returncode:
        return "", f"{python} has no NNCodec: pip install nncodec==2.1.3 into it"
    return done.stdout.strip(), ""


def _nncodec(python: str, opt_qp: bool, model: Model, qp: float) -> Coded:
    settings = str(round(qp)), str(int(opt_qp))
    try:
        told, stream, restored = run_nncodec(model.tensors, *settings, python=python)
    except RuntimeError as error:
        raise CodecError(f"NNCodec failed: {error}") from None
    tensors = {n: restored[n].reshape(x.shape).astype(x.dtype) for n, x in model.tensors.items()}
    encode_s, decode_s = map(float, told.split()[-2:])
    return Coded(len(stream), tensors, encode_s, decode_s)

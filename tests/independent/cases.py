"""Small archives that together use every feature of the format; made with weightvid's writer."""

from __future__ import annotations

import hashlib
import io
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from weightvid.checkpoint.mapping import from_mapping
from weightvid.codec.encode import EncoderSettings, Lossy, Video, open_encoder
from weightvid.container.exact import LEVEL_DTYPES, ExactItem, PlainLevels, exact_payload
from weightvid.container.records import TENSOR_HASH_BYTES, Header
from weightvid.container.writer import ArchiveWriter
from weightvid.dtypes import STORED, from_float32
from weightvid.pack import PackOptions, pack_checkpoint
from weightvid.packing.frames import FrameWriter
from weightvid.packing.quantized import CodedTensor, split_levels
from weightvid.packing.workers import Outbox, Workers
from weightvid.quantize import Params, TrellisParams, UniformParams, dequantize
from weightvid.spec import TensorSpec
from weightvid.tile import (
    PLAIN_LAYOUT,
    EnergyOrder,
    Fold,
    FrameGeometry,
    Layout,
    matrix_shape,
    to_sequence,
)

Matrix = npt.NDArray[np.int32]
Array = np.ndarray[Any, Any]
SMALL = FrameGeometry(64, 64)


@dataclass(frozen=True)
class Coded:
    """A tensor on the ribbon."""

    spec: TensorSpec
    levels: Matrix
    params: Params = field(default_factory=lambda: UniformParams(0.25))
    layout: Layout = PLAIN_LAYOUT


@dataclass(frozen=True)
class Plain:
    """A tensor whose levels lie in an exact box."""

    spec: TensorSpec
    levels: Matrix
    params: Params
    stored: str


@dataclass(frozen=True)
class Exact:
    """A tensor kept bit for bit, in boxes of at most ``part`` elements."""

    spec: TensorSpec
    array: Array
    part: int = 1 << 20


Entry = Coded | Plain | Exact


def _hash(levels: Matrix, params: Params, spec: TensorSpec) -> bytes:
    stored = from_float32(dequantize(levels, params), spec.dtype)
    return hashlib.sha256(np.ascontiguousarray(stored).data).digest()[:TENSOR_HASH_BYTES]


def _coded(entry: Coded) -> tuple[CodedTensor, npt.NDArray[np.int8]]:
    inner, escapes = split_levels(entry.levels)
    coded = CodedTensor(
        spec=entry.spec,
        params=entry.params,
        escapes=escapes,
        layout=entry.layout,
        sha256=_hash(entry.levels, entry.params, entry.spec),
        noise=1.0,
        power=100.0,
    )
    return coded, to_sequence(inner, entry.layout.order)


def _items(number: int, entry: Plain | Exact) -> list[ExactItem]:
    if isinstance(entry, Plain):
        data = entry.levels.astype(LEVEL_DTYPES[entry.stored]).reshape(-1).view(np.uint8)
        plain = PlainLevels(
            entry.stored, entry.params, _hash(entry.levels, entry.params, entry.spec), 20.0
        )
        return [ExactItem(number, 0, entry.spec.size, data, plain)]
    data = np.ascontiguousarray(entry.array).reshape(-1).view(np.uint8)
    size = entry.spec.size
    each = data.size // max(1, size)
    firsts = range(0, size, entry.part) if size else [0]
    return [
        ExactItem(number, f, min(entry.part, size - f), data[f * each : (f + entry.part) * each])
        for f in firsts
    ]


def build(
    entries: Sequence[Entry],
    geometry: FrameGeometry = SMALL,
    *,
    aliases: Mapping[str, str] | None = None,
    metadata: Mapping[str, str] | None = None,
    video: Video | None = None,
) -> bytes:
    """Bytes of an archive of these tensors; exact ones of several parts take several boxes."""
    specs = tuple(entry.spec for entry in entries)
    coded = video or Video()
    header = Header(
        geometry, specs, aliases or {}, metadata or {}, {"generator": "golden"},
        codec=coded.track.name,
    )  # fmt: skip
    settings = EncoderSettings(geometry.width, geometry.height, coded)
    stream = io.BytesIO()
    writer = ArchiveWriter(stream, header, open_encoder(settings).record)
    with ThreadPoolExecutor(1) as executor:
        outbox = Outbox(Workers(executor, 1))
        frames = FrameWriter(writer, settings, outbox)
        for number, entry in enumerate(entries):
            if isinstance(entry, Coded):
                frames.add(number, *_coded(entry))
        frames.finish()
        outbox.flush()
    boxes: list[list[ExactItem]] = []
    for number, entry in enumerate(entries):
        if not isinstance(entry, Coded):
            for place, item in enumerate(_items(number, entry)):
                if place or not boxes:
                    boxes.append([])
                boxes[-1].append(item)
    for box in boxes:
        writer.write_exact(exact_payload(box, specs), [item.tensor for item in box])
    writer.finish()
    return stream.getvalue()


def levels(seed: int, *shape: int, sigma: float = 2.0) -> Matrix:
    """Levels of about normal spread, as a matrix."""
    drawn = np.random.default_rng(seed).standard_normal(matrix_shape(shape)) * sigma
    found: Matrix = np.rint(drawn).astype(np.int32)
    return found


def _spread(seed: int, rows: npt.ArrayLike, columns: npt.ArrayLike, kernel: int = 1) -> Matrix:
    """Levels whose spread doubles every four energies of rows and columns."""
    across = np.repeat(np.asarray(columns), kernel)
    sigma = 0.4 * 2.0 ** ((np.asarray(rows)[:, None] + across) / 4)
    drawn = np.random.default_rng(seed).standard_normal(sigma.shape) * sigma
    found: Matrix = np.clip(np.rint(drawn), -127, 127).astype(np.int32)
    return found


def _energies(seed: int, count: int, most: int) -> npt.NDArray[np.uint8]:
    found = np.random.default_rng(seed).integers(0, most + 1, count).astype(np.uint8)
    found[0] = most
    return found


def tiny() -> bytes:
    """The worked example of FORMAT.md."""
    weights = np.array([[1, -2, 0, 3], [0, 1, 1, -1], [2, 0, -1, 0]], np.int32)
    return build(
        [
            Coded(TensorSpec("w", "F32", (3, 4)), weights, UniformParams(0.5)),
            Exact(TensorSpec("b", "F32", (2,)), np.array([1.5, -0.25], np.float32)),
        ]
    )


def uniform() -> bytes:
    """Uniform quantizer with and without shifts, escapes, every video dtype, aliases, metadata."""
    peaks = levels(3, 5, 7)
    peaks[0, 0], peaks[2, 3], peaks[4, 6] = 128, -(1 << 22), 4097
    entries: list[Entry] = [
        Coded(
            TensorSpec(f"{dtype}.{number}", dtype, (6, 11)),
            levels(number, 6, 11, sigma=3),
            params,
        )
        for number, params in enumerate(
            (UniformParams(0.1015625), UniformParams(0.1015625, (40, -10, 127)))
        )
        for dtype in ("F32", "F16", "BF16", "F64")
    ]
    entries += [
        Coded(TensorSpec("escapes", "F32", (5, 7)), peaks, UniformParams(0.75, (1, 2, 3))),
        Coded(TensorSpec("conv", "F16", (4, 3, 3, 3)), levels(4, 4, 3, 3, 3)),
        Coded(TensorSpec("vector", "F32", (300,)), levels(5, 300)),
        Coded(TensorSpec("scalar", "F64", ()), levels(6)),
        Coded(TensorSpec("tall", "F32", (131, 3)), levels(7, 131, 3)),
        Coded(TensorSpec("extremes", "F32", (1, 3)), np.array([[-127, 127, 0]], np.int32)),
        Coded(TensorSpec("small.F16", "F16", (4, 4)), levels(8, 4, 4), UniformParams(2.0**-23)),
        Coded(TensorSpec("large.BF16", "BF16", (4, 4)), levels(9, 4, 4), UniformParams(2.0**119)),
    ]
    aliases = {"tied": "conv", "\u00fcber.\U0001f600": "F32.0"}
    return build(entries, aliases=aliases, metadata={"format": "pt", "note": "\u00e9"})


def trellis() -> bytes:
    """Every machine, both axes, both numberings; escapes change the state."""
    entries: list[Entry] = []
    for states in (4, 8, 16, 32, 64):
        for axis in (0, 1):
            for zero in (False, True):
                found = levels(len(entries), 9, 37)
                found[3, 4], found[5, 5] = 131, -300
                entries.append(
                    Coded(
                        TensorSpec(f"s{states}.a{axis}.z{int(zero)}", "F32", (9, 37)),
                        found,
                        TrellisParams(0.1015625, states, axis, zero),
                    )
                )
    return build(entries)


def layout() -> bytes:
    """Energy order and folds, tensors over several frames whose digits are carried."""
    rows, columns = _energies(1, 30, 9), _energies(2, 20, 12)
    order = EnergyOrder(rows, columns)
    folds = tuple(Fold(k % 16, k % 4 + 1) for k in range(order.classes))
    conv_rows, conv_columns = _energies(3, 70, 3), _energies(4, 10, 6)
    conv = EnergyOrder(conv_rows, conv_columns)
    conv_folds = tuple(Fold(min(k, 4), 2) for k in range(conv.classes))
    first = _spread(5, rows, columns)
    first[7, 8] = 1000
    entries: list[Entry] = [
        Coded(TensorSpec("order", "F32", (30, 20)), first, layout=Layout(order, folds)),
        Coded(
            TensorSpec("long", "F32", (70, 10, 3, 3)),
            _spread(6, conv_rows, conv_columns, 9),
            TrellisParams(0.25),
            Layout(conv, conv_folds),
        ),
        Coded(TensorSpec("after", "F16", (20, 20)), levels(7, 20, 20), layout=Layout(order_of(20))),
        Coded(
            TensorSpec("plain.folded", "F32", (70, 70)),
            levels(8, 70, 70, sigma=4),
            layout=Layout(None, (Fold(2, 3),)),
        ),
        Coded(TensorSpec("plain", "F32", (40, 9)), levels(9, 40, 9)),
    ]
    for fold in (Fold(1, 1), Fold(0, 2), Fold(15, 4), Fold(7, 1)):
        spec = TensorSpec(f"fold.{fold.core}.{fold.width}", "F32", (8, 16))
        wide = np.clip(levels(20 + fold.to_byte(), 8, 16, sigma=30), -127, 127)
        entries.append(Coded(spec, wide, layout=Layout(None, (fold,))))
    return build(entries)


def order_of(count: int) -> EnergyOrder:
    """Energies without folds: every class keeps the plain mapping only if it has one class."""
    return EnergyOrder(np.zeros(count, np.uint8), np.zeros(count, np.uint8))


def exact() -> bytes:
    """Every dtype, empty and 0-d tensors, several parts, NaN payloads, plain levels."""
    rng = np.random.default_rng(1)
    entries: list[Entry] = []
    for dtype, stored in STORED.items():
        raw = rng.integers(0, 256, 7 * stored.itemsize).astype(np.uint8)
        if dtype == "BOOL":
            raw &= 1
        elif dtype.startswith("F6"):
            raw &= 63
        elif dtype == "F4":
            raw &= 15
        entries.append(Exact(TensorSpec(dtype, dtype, (7,)), raw.view(stored)))
    for text in ("<U3", "|S5", ">f4", "<M8[ns]", "|V3", ">i2"):
        array = rng.integers(1, 100, (2, np.dtype(text).itemsize)).astype(np.uint8)
        if text == "<U3":
            array = np.array([["abc"], ["\u00e9"]], "<U3").view(np.uint8).reshape(2, -1)
        entries.append(Exact(TensorSpec(f"npy:{text}", f"npy:{text}", (2,)), array.view(text)))
    special = np.array([0x7FC01234, 0xFF800000, 0x80000000, 1], np.uint32).view(np.float32)
    smooth = (np.arange(600) // 3 * 0.001).astype(np.float32)
    entries += [
        Exact(TensorSpec("nan", "F32", (2, 2)), special.reshape(2, 2)),
        Exact(TensorSpec("empty", "F32", (0, 4)), np.empty((0, 4), np.float32)),
        Exact(TensorSpec("empty.i64", "I64", (0,)), np.empty(0, np.int64)),
        Exact(TensorSpec("0-d", "I64", ()), np.array(-7, np.int64)),
        Exact(TensorSpec("", "F32", (1,)), np.ones(1, np.float32)),
        Exact(TensorSpec("parts", "F32", (6, 100)), smooth.reshape(6, 100), part=250),
        Exact(TensorSpec("counter", "I64", (300,)), np.zeros(300, np.int64)),
        Plain(TensorSpec("p8", "F32", (5, 6)), levels(2, 5, 6), UniformParams(0.5), "I8"),
        Plain(
            TensorSpec("p16", "F16", (5, 6)), levels(3, 5, 6, sigma=200.0),
            UniformParams(0.03125, (3, 2, 1)), "I16",
        ),
        Plain(
            TensorSpec("p32", "BF16", (3, 2, 2)), levels(4, 3, 2, 2, sigma=1e5),
            TrellisParams(0.5, 8, 0, True), "I32",
        ),
        Plain(
            TensorSpec("p64", "F64", (30, 20)), levels(5, 30, 20, sigma=0.5),
            TrellisParams(1.0), "I8",
        ),
    ]  # fmt: skip
    return build(entries)


def mixed() -> bytes:
    """Ribbon, plain and exact tensors, none of them in the order of the header's neighbours."""
    return build(
        [
            Exact(TensorSpec("bias", "F32", (9,)), np.linspace(0, 1, 9, dtype=np.float32)),
            Coded(TensorSpec("a", "F32", (40, 40)), levels(1, 40, 40)),
            Plain(TensorSpec("b", "F32", (9, 9)), levels(2, 9, 9), UniformParams(0.125), "I8"),
            Coded(TensorSpec("c", "F32", (64, 200)), levels(3, 64, 200)),
            Exact(TensorSpec("count", "I64", ()), np.array(3, np.int64)),
            Coded(TensorSpec("d", "F32", (3, 9)), levels(4, 3, 9)),
        ],
        FrameGeometry(128, 64),
        aliases={"bias.tied": "bias", "c.tied": "c", "b.tied": "b"},
    )


def nothing() -> bytes:
    """No tensor at all."""
    return build([])


def by_codec(name: str) -> bytes:
    """Tensors over several frames of a codec: every kind of sample, escapes, an exact tensor."""
    peaks = levels(1, 40, 60, sigma=9)
    peaks[0, 0], peaks[3, 4], peaks[39, 59] = 128, -5000, 127
    rows, columns = _energies(2, 64, 7), _energies(3, 70, 5)
    entries: list[Entry] = [
        Coded(TensorSpec("peaks", "F32", (40, 60)), peaks),
        Coded(
            TensorSpec("order", "F16", (64, 70)), _spread(4, rows, columns),
            TrellisParams(0.25), Layout(order := EnergyOrder(rows, columns),
                                        (Fold(),) * order.classes),
        ),
        Exact(TensorSpec("bias", "F32", (9,)), np.linspace(0, 1, 9, dtype=np.float32)),
        Coded(
            TensorSpec("folded", "BF16", (30, 90)), levels(5, 30, 90, sigma=3),
            layout=Layout(None, (Fold(2, 2),)),
        ),
    ]  # fmt: skip
    return build(entries, video=Video(name))


def packed(
    states: int = 8, lossy: Lossy | None = None, *, bits: int = 8, codec: str = "x265"
) -> bytes:
    """What weightvid's own packer makes of a small checkpoint, choosing for itself."""
    rng = np.random.default_rng(5)
    weights = rng.standard_normal((60, 70)) * np.exp(rng.standard_normal(60))[:, None]
    weights[3, 3] = 300.0
    tied = rng.standard_normal((20, 30)).astype(np.float16)
    arrays: dict[str, Array] = {
        "w": weights.astype(np.float32),
        "bias": rng.standard_normal(60).astype(np.float32),
        "conv": (rng.standard_normal((8, 9, 3, 3)) * 0.1).astype(np.float64),
        "half": tied,
        "tied": tied,
        "steps": np.array(1234, np.int64),
        "nan": np.full((20, 20), np.nan, np.float32),
        "zero": np.zeros((30, 30), np.float32),
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.mp4"
        options = PackOptions(states=states, lossy=lossy, bit_depth=bits, codec=codec, jobs=1)
        pack_checkpoint(from_mapping(arrays, metadata={"a": "b"}), path, options)
        return path.read_bytes()


def vvc() -> bytes:
    """Lossy VVC, whose samples have ten bits."""
    return packed(lossy=Lossy("qp", 20), bits=10, codec="vvenc")


def truncated() -> bytes:
    """An archive that ends within its second frame."""
    whole = layout()
    return whole[: whole.rindex(b"weightvid-frame\0") - 100]


#: name -> archive maker; those of the golden archives have the same names.
CASES = {
    "tiny": tiny,
    "uniform": uniform,
    "trellis": trellis,
    "layout": layout,
    "exact": exact,
    "mixed": mixed,
    "nothing": nothing,
    "packed": packed,
    "lossy": partial(packed, lossy=Lossy("qp", 14)),
    "main10": partial(packed, lossy=Lossy("qp", 14), bits=10),
    "avc": partial(by_codec, "x264"),
    "av1": partial(by_codec, "svtav1"),
    "vp9": partial(by_codec, "vp9"),
    "ffv1": partial(by_codec, "ffv1"),
    "png": partial(by_codec, "png"),
    "jpeg2000": partial(by_codec, "jpeg2000"),
}

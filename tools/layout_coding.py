"""Orders, sample mappings and code lengths that bench_layout.py compares."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int32]
Frame = tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8], npt.NDArray[np.uint8]]

X265 = (
    "lossless=1:keyint=2:min-keyint=1:bframes=0:forced-idr=1:info=0:wpp=0:pools=1:frame-threads=1:"
    "log-level=none:scenecut=0:rc-lookahead=0"
)
UNITS = "ctu=64:min-cu-size=16:max-tu-size=32"
ALL_RADII = tuple(range(13))
FEW_RADII = (0, 1, 2, 4, 7)
SMALL_CLASS = 16  # below this many levels the tensor's own spread is the better estimate
SPREAD_OF_MEAN = 1.2533  # sigma / mean |x| of a Gaussian; steadier than a deviation


@dataclass(frozen=True, slots=True)
class Layout:
    """One way to lay levels out and code them; the defaults are the plain ribbon."""

    band: int = 64
    width: int = 512
    height: int = 512
    align: int = 4
    preset: str = "ultrafast"
    units: str = UNITS
    order: str = "file"  # file, sorted (rows and columns), rows, class, causal
    bucket: float = 0.25  # log2 of the energy ratio between neighbouring buckets
    core: float = 0.0  # core radius in units of the class's standard deviation
    wide_tails: bool = False
    per_class: bool = True
    radii: tuple[int, ...] = ALL_RADII
    deflate_digits: bool = True
    chroma: bool = False


@dataclass(slots=True)
class Cost:
    """Bits of each part."""

    video: int = 0
    digits: int = 0
    side: float = 0.0

    @property
    def total(self) -> float:
        return self.video + self.digits + self.side


@dataclass(slots=True)
class Sequenced:
    """Levels in ribbon order with the class of each, and the bits of the permutation."""

    levels: Ints
    classes: Ints
    side_bits: float = 0.0


# -- code lengths -----------------------------------------------------------------------------


def h0_bits(levels: Ints) -> float:
    """Zero-order entropy of the levels, in bits, without any table."""
    if levels.size == 0:
        return 0.0
    _, counts = np.unique(levels, return_counts=True)
    return float(-(counts * np.log2(counts / levels.size)).sum())


def adaptive_bits(levels: Ints) -> float:
    """Length of an ideal adaptive arithmetic code (Krichevsky-Trofimov counts), in bits."""
    if levels.size == 0:
        return 0.0
    _, counts = np.unique(levels, return_counts=True)
    symbols = int(levels.max()) - int(levels.min()) + 1
    length = math.lgamma(levels.size + symbols / 2) - math.lgamma(symbols / 2)
    length -= sum(math.lgamma(c + 0.5) for c in counts.tolist())
    return (length + len(counts) * math.lgamma(0.5)) / math.log(2)


def huffman_bytes(data: bytes) -> int:
    """Size of a raw deflate stream restricted to Huffman coding."""
    coder = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    return len(coder.compress(data)) + len(coder.flush())


def digit_bits(digits: Ints, radix: int, *, deflate: bool) -> int:
    """Bits of digits 0..radix-1, as many to a byte as fit, deflated when that is smaller."""
    per_byte = 1
    while radix ** (per_byte + 1) <= 256:
        per_byte += 1
    padded = np.concatenate([digits, np.zeros(-len(digits) % per_byte, np.int32)])
    weights = radix ** np.arange(per_byte - 1, -1, -1)
    packed = (padded.reshape(-1, per_byte) @ weights).astype(np.uint8).tobytes()
    return 8 * (min(len(packed), huffman_bytes(packed)) if deflate else len(packed))


def level_bytes(levels: Ints) -> bytes:
    """One byte per level; those beyond -127..127 are clipped and follow as (place, level)."""
    flat = levels.reshape(-1)
    beyond = np.flatnonzero(np.abs(flat) > 127).astype("<u4")
    escapes = beyond.tobytes() + flat[beyond].astype("<i2").tobytes()
    narrow: bytes = np.clip(flat, -127, 127).astype(np.int8).tobytes()
    return narrow + bytes(escapes)


def encode_bits(frames: Sequence[Frame], layout: Layout) -> int:
    """Bits of the packets of lossless x265 pictures, every one an IDR."""
    height, width = frames[0][0].shape
    context = av.CodecContext.create("libx265", "w")
    assert isinstance(context, av.VideoCodecContext)
    context.width, context.height, context.pix_fmt = width, height, "yuv420p"
    context.time_base = Fraction(1, 1)
    context.framerate = Fraction(1, 1)
    context.flags |= av.codec.context.Flags.global_header  # parameter sets once, not per picture
    context.options = {
        "preset": layout.preset,
        "forced-idr": "1",
        "x265-params": f"{X265}:{layout.units}",
    }
    size = 0
    for index, planes in enumerate(frames):
        flat = np.concatenate([p.reshape(-1) for p in planes]).reshape(height * 3 // 2, width)
        picture = av.VideoFrame.from_ndarray(flat, format="yuv420p")
        picture.pts = index
        picture.pict_type = av.video.frame.PictureType.I
        size += sum(packet.size for packet in context.encode(picture))
    size += sum(packet.size for packet in context.encode(None))
    return 8 * (size + len(context.extradata or b""))


# -- order ------------------------------------------------------------------------------------


def matrix(levels: Ints) -> Ints:
    return levels.reshape(levels.shape[0], -1)


def ribbon(levels: Ints, band: int) -> Ints:
    """Groups of `band` rows, each column-major; the short last group folds."""
    rows, cols = levels.shape
    full = rows // band * band
    head = levels[:full].reshape(-1, band, cols).transpose(0, 2, 1).reshape(-1)
    return np.concatenate([head, levels[full:].T.reshape(-1)])


def energy_buckets(levels: Ints, bucket: float) -> tuple[Ints, Ints, float]:
    """Energy buckets of rows and columns (one per input channel of a conv), and their bits."""
    size = np.abs(levels).astype(np.float64).reshape(levels.shape[0], levels.shape[1], -1)
    mean = size.mean() + 1e-9
    rows = size.mean((1, 2)) / mean + 0.02
    cols = (size / rows[:, None, None]).mean((0, 2)) / mean + 0.02
    row_b = np.rint(np.log2(rows) / bucket).astype(np.int32)
    col_b = np.rint(np.log2(cols) / bucket).astype(np.int32)
    # 5 % over their entropy for a deflated list, and the two smallest bucket numbers
    bits = 1.05 * (h0_bits(row_b) + h0_bits(col_b)) + 32
    return row_b, np.repeat(col_b, size.shape[2]).astype(np.int32), bits


def class_order(levels: Ints, layout: Layout) -> Sequenced:
    """Levels by falling row bucket + column bucket; within a class by row, then column."""
    flat = matrix(levels)
    row_b, col_b, bits = energy_buckets(levels, layout.bucket)
    rows, cols = np.argsort(-row_b, kind="stable"), np.argsort(-col_b, kind="stable")
    key = (row_b[rows][:, None] + col_b[cols][None, :]).reshape(-1)
    order = np.argsort(-key, kind="stable")
    values, keys = flat[rows][:, cols].reshape(-1)[order], key[order]
    parts = [values[keys == k] for k in np.unique(keys)]
    gain = h0_bits(values) - sum(h0_bits(p) for p in parts)
    # each class costs its adaptation: about six bits for every level in reach
    if gain < bits + 6 * len(parts) * float(values.std()):
        return Sequenced(ribbon(flat, layout.band), np.zeros(flat.size, np.int32), 1.0)
    return Sequenced(values, keys, bits)


def causal_order(levels: Ints, layout: Layout) -> Sequenced:
    """Columns of each group of rows sorted by their energy in the groups before: no side bits."""
    flat = matrix(levels)
    seen = np.zeros(flat.shape[1], np.int64)
    out = []
    for top in range(0, flat.shape[0], layout.band):
        group = flat[top : top + layout.band]
        out.append(group[:, np.argsort(-seen, kind="stable")].T.reshape(-1))
        seen += np.abs(group).sum(0)
    return Sequenced(np.concatenate(out), np.zeros(flat.size, np.int32))


def sequence(levels: Ints, layout: Layout) -> Sequenced:
    """The levels of one tensor in the order of the ribbon."""
    if layout.order == "class":
        return class_order(levels, layout)
    if layout.order == "causal":
        return causal_order(levels, layout)
    flat, bits = matrix(levels), 0.0
    if layout.order in ("sorted", "rows"):
        row_b, col_b, bits = energy_buckets(levels, layout.bucket)
        flat = flat[np.argsort(-row_b, kind="stable")]
        if layout.order == "sorted":
            flat = flat[:, np.argsort(-col_b, kind="stable")]
        else:
            bits = 1.05 * h0_bits(row_b) + 16
    return Sequenced(ribbon(flat, layout.band), np.zeros(flat.size, np.int32), bits)


# -- mapping ----------------------------------------------------------------------------------


def core_shape(spread: float, layout: Layout) -> tuple[int, int]:
    """Core radius and tail width for levels of this standard deviation."""
    wanted = layout.core * spread if spread >= 0.45 else 0.0
    radius = min(layout.radii, key=lambda r: abs(r - wanted))
    width = 1 if not layout.wide_tails or spread < 1.3 else 2 if spread < 4 else 3
    return radius, width


def class_shapes(seq: Sequenced, layout: Layout) -> tuple[Ints, Ints]:
    """Core radius and tail width of every level of a tensor."""
    radius, width = np.zeros_like(seq.levels), np.ones_like(seq.levels)
    size = np.abs(seq.levels)
    for key in np.unique(seq.classes):
        mine = seq.classes == key
        large = int(mine.sum()) >= SMALL_CLASS and layout.per_class
        spread = SPREAD_OF_MEAN * float(size[mine].mean() if large else size.mean())
        radius[mine], width[mine] = core_shape(spread, layout)
        seq.side_bits += 5 if layout.core or layout.wide_tails else 0
    return radius, width


def frames_of(samples: Ints, layout: Layout) -> list[Frame]:
    """Frames of the ribbon; the height shrinks for a model that does not fill two frames."""
    width, height, band = layout.width, layout.height, layout.band
    if len(samples) < 2 * width * height:
        height = min(1024, 64 * max(1, -(-len(samples) // (width * 64))))
    luma = width * height
    per = luma * 3 // 2 if layout.chroma else luma
    padded = np.concatenate([samples, np.zeros(-len(samples) % per, np.int32)])
    data = (np.clip(padded, -127, 127) + 128).astype(np.uint8).reshape(-1, per)
    grey = np.full((height // 2, width // 2), 128, np.uint8)

    def plane(part: npt.NDArray[np.uint8], tall: int, wide: int) -> npt.NDArray[np.uint8]:
        high = band * tall // height
        return part.reshape(tall // high, wide, high).transpose(0, 2, 1).reshape(tall, wide)

    frames = []
    for row in data:
        chroma = (grey, grey)
        if layout.chroma:
            u, v = np.split(row[luma:], 2)
            chroma = (plane(u, height // 2, width // 2), plane(v, height // 2, width // 2))
        frames.append((plane(row[:luma], height, width), *chroma))
    return frames


def code(tensors: Sequence[Ints], layout: Layout) -> Cost:
    """Code a whole model by one layout."""
    cost, parts = Cost(), []
    for tensor in tensors:
        seq = sequence(tensor, layout)
        radius, width = class_shapes(seq, layout)
        pad = -len(seq.levels) % (layout.band * layout.align)
        ends = ((seq.levels, 0), (radius, 0), (width, 1))
        parts.append([np.concatenate([a, np.full(pad, v, np.int32)]) for a, v in ends])
        cost.side += seq.side_bits
    levels, radius, width = (np.concatenate(column) for column in zip(*parts, strict=True))
    tail = np.abs(levels) - radius
    samples = np.where(tail <= 0, 0, np.sign(levels) * -(-tail // width)).astype(np.int32)
    cost.video = encode_bits(frames_of(samples, layout), layout)
    frame = layout.width * layout.height
    for start in range(0, len(levels), frame):
        here = slice(start, start + frame)
        lv, rd, wd, tl = levels[here], radius[here], width[here], tail[here]
        for r in np.unique(rd[rd > 0]).tolist():
            core = lv[(rd == r) & (tl <= 0)] + r
            cost.digits += digit_bits(core, 2 * r + 1, deflate=layout.deflate_digits)
        for w in np.unique(wd[wd > 1]).tolist():
            rest = (tl[(wd == w) & (tl > 0)] - 1) % w
            cost.digits += digit_bits(rest, w, deflate=layout.deflate_digits)
    return cost

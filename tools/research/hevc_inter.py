"""HEVC's own inter prediction between layers: hevc_inter.py MODEL [STEP_FACTOR].

Layers of one shape are the pictures of one video, levels of uniform quantization with and without
the DCT, coded without loss by x265: every picture alone, and with P and B pictures. In file order,
and with rows and columns of each layer in the order of their energies, which makes layers alike.
"""

from __future__ import annotations

import sys
from fractions import Fraction
from math import sqrt
from typing import Any

import av
import numpy as np
from cifar import table, write_results

from weightvid.checkpoint import open_checkpoint
from weightvid.compare.model import load_model
from weightvid.levels.transform import view_of, whole_basis

COMMON = "lossless=1:log-level=none:info=0:pools=none:frame-threads=1:no-sao=1:"
#: types of NAL units from here on are no slices.
FIRST_PARAMETER_SET = 32
MODES = {
    "intra": "keyint=1",
    "inter": "keyint=250:bframes=3:ref=5:me=full:merange=64:subme=3:weightp=1",
}


def encoded(pictures: list[Any], mode: str) -> int:
    """Bytes of a video, which is decoded and compared."""
    height, width = pictures[0].shape
    encoder: Any = av.CodecContext.create("libx265", "w")
    encoder.width, encoder.height, encoder.pix_fmt = width, height, "gray"
    encoder.time_base = Fraction(1, 25)
    encoder.options = {"preset": "slow", "x265-params": COMMON + MODES[mode]}
    packets = []
    for number, picture in enumerate(pictures):
        frame = av.VideoFrame.from_ndarray(picture, "gray")
        frame.pts = number
        packets += encoder.encode(frame)
    packets += encoder.encode(None)
    decoder: Any = av.CodecContext.create("hevc", "r")
    found = [f for p in [*packets, None] for f in decoder.decode(p)]
    planes = [frame.to_ndarray(format="gray") for frame in sorted(found, key=lambda f: f.pts)]
    if not all(np.array_equal(a, b) for a, b in zip(planes, pictures, strict=True)):
        raise SystemExit("the video is not lossless")
    # Only slices: parameter sets before each picture, or once, are no matter of prediction.
    units = b"".join(bytes(packet) for packet in packets).split(b"\0\0\1")[1:]
    return sum(len(unit) + 3 for unit in units if unit[0] >> 1 & 63 < FIRST_PARAMETER_SET)


def picture(levels: Any, ordered: bool) -> Any:
    """Levels (rows, channels, positions) as a picture: positions side by side."""
    if ordered:
        squares = np.square(levels)
        levels = levels[np.argsort(-squares.sum(axis=(1, 2)), kind="stable")]
        levels = levels[:, np.argsort(-squares.sum(axis=(0, 2)), kind="stable")]
    flat = levels.swapaxes(1, 2).reshape(len(levels), -1)
    padded = np.full([-(-size // 16) * 16 for size in flat.shape], 128, np.uint8)
    padded[: flat.shape[0], : flat.shape[1]] = flat.clip(-127, 127) + 128
    return padded


def main(model: str, factor: float) -> None:
    with open_checkpoint(model) as reader:
        matrices = load_model(reader).matrices().values()
    power = sum(float(np.square(x).sum()) for x in matrices) / sum(x.size for x in matrices)
    step, found = factor * sqrt(power), []
    for dct in (False, True):
        groups: dict[tuple[int, ...], list[Any]] = {}
        for tensor in matrices:
            view = view_of(tensor.shape)
            if not view.kernel:
                continue
            x = tensor.reshape(view.rows, view.channels, -1).astype(np.float64)
            x = x @ whole_basis(view.kernel).T if dct else x
            groups.setdefault(tensor.shape, []).append(np.rint(x / step).astype(np.int64))
        for ordered in (False, True):
            sizes = dict.fromkeys(MODES, 0)
            for layers in groups.values():
                for mode in MODES:
                    if len(layers) > 1:
                        sizes[mode] += encoded([picture(x, ordered) for x in layers], mode)
            found.append({"dct": dct, "ordered": ordered, **sizes})
    rows = [
        ("DCT" if r["dct"] else "spatial", "energies" if r["ordered"] else "file",
         f"{r['intra']:,}", f"{r['inter']:,}", f"{100 * (r['inter'] / r['intra'] - 1):+.1f} %")
        for r in found
    ]  # fmt: skip
    heads = ("levels", "order", "every picture alone", "inter", "difference")
    write_results("hevc_inter", table(heads, rows), found)


if __name__ == "__main__":
    main(sys.argv[1], float((sys.argv[2:] or ["0.5"])[0]))

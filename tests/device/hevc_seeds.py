"""Pictures that make HEVC encoders use all that they have; ``python hevc_seeds.py FOLDER`` writes
inputs for the fuzz driver of the C decoder.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from weightvid.loader import Bytes
from weightvid.video.encoder import CODECS, Video, open_encoder

WIDTH, HEIGHT = 192, 256
#: width and height of the fuzz driver's frames.
_SIDE = 192


def waves(rng: np.random.Generator, period: float) -> np.ndarray[Any, Any]:
    """A sum of plane waves: smooth, with edges in all directions."""
    y, x = np.mgrid[:HEIGHT, :WIDTH] / period
    angles = rng.uniform(0, 2 * np.pi, 6)
    return sum((np.sin(x * np.cos(a) + y * np.sin(a) + a) for a in angles), np.zeros(x.shape))


def pictures(seed: int) -> Iterator[np.ndarray[Any, Any]]:
    """Pictures that together make encoders use all modes and sizes of blocks."""
    rng = np.random.default_rng(seed)
    shape = (HEIGHT, WIDTH)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    yield np.full(shape, 77)
    yield x * 0.3 + y * 0.7
    for period in (40.0, 10.0, 3.0):
        yield 128 + 20 * waves(rng, period)
        yield 128 + 100 * np.sign(waves(rng, period))
    yield 128 + 20 * waves(rng, 20) + rng.normal(size=shape)
    yield 128 + rng.laplace(size=shape) * 1.5
    yield np.where(rng.random(shape) < 0.01, rng.integers(0, 256, shape), 128)
    yield rng.choice([0, 255], shape)
    yield rng.integers(0, 256, shape)
    boxes = np.zeros(shape)
    for _ in range(60):
        top, start, side = rng.integers(0, HEIGHT), rng.integers(0, WIDTH), rng.integers(4, 100)
        box = (slice(top, top + side), slice(start, start + side))
        slope = rng.normal(size=2) * 2
        boxes[box] = rng.integers(0, 256) + slope[0] * (y[box] - top) + slope[1] * (x[box] - start)
    yield boxes


@functools.cache
def coded(preset: str) -> tuple[bytes, list[tuple[Bytes, bytes]]]:
    """Record, pictures and their packets."""
    encoder = open_encoder(Video("x265", preset), WIDTH, HEIGHT)
    frames = [np.clip(np.round(one), 0, 255).astype(np.uint8) for one in pictures(len(preset))]
    return encoder.record, [(luma, encoder.encode(luma)) for luma in frames]


def seeds(presets: Iterable[str]) -> Iterator[bytes]:
    """Inputs of the fuzz driver: size of the record, record, NAL unit."""
    for preset in presets:
        encoder = open_encoder(Video("x265", preset), _SIDE, _SIDE)
        head = bytes((len(encoder.record),)) + encoder.record
        for luma, _ in coded(preset)[1]:
            yield head + encoder.encode(luma[:_SIDE])[4:]


if __name__ == "__main__":
    for number, seed in enumerate(seeds(CODECS["x265"].presets)):
        Path(sys.argv[1], f"{number:03}").write_bytes(seed)

"""Tensors of integers on pictures of any depth, and back.

``ribbon`` lays one tensor after another as pack does, but each level is one sample: no fold and no
digits, so that the codec does all the work. ``like`` gives every tensor pictures of its own and
brings those of like tensors (one shape, one name but for numbers) one after another, so that each
can be predicted from the one before.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt

from weightvid import tile
from weightvid.codec.pictures import Luma, middle
from weightvid.codec.registry import bit_depth
from weightvid.tile import BAND, FrameGeometry

Matrix = npt.NDArray[Any]
#: least width of a picture that holds one tensor: every encoder takes it.
_LEAST_WIDTH: Final = 2 * BAND
_MOST_PX: Final = 1024


@dataclass(frozen=True, slots=True)
class Reel:
    """Pictures of one size, coded by one encoder.

    Attributes
    ----------
    geometry : FrameGeometry
    members : tuple of int
        Tensors on them.
    each : int
        Pictures of each tensor; 0: tensors follow each other without a gap.
    frames : int
    """

    geometry: FrameGeometry
    members: tuple[int, ...]
    each: int
    frames: int


def ribbon(shapes: Sequence[tuple[int, int]]) -> list[Reel]:
    """One reel that holds all matrices."""
    if not shapes:
        return []
    columns = tile.starts(shapes)[-1]
    geometry = tile.choose_geometry(columns)
    frames = -(-columns // geometry.columns)
    return [Reel(geometry, tuple(range(len(shapes))), 0, frames)]


def like(shapes: Sequence[tuple[int, int]], names: Sequence[str]) -> list[Reel]:
    """A reel for each group of like tensors.

    Examples
    --------
    >>> reels = like([(64, 64), (8, 8), (64, 64)], ["a.0.w", "b", "a.1.w"])
    >>> [(reel.members, reel.frames) for reel in reels]
    [((0, 2), 2), ((1,), 1)]
    """
    groups: dict[tuple[tuple[int, int], str], list[int]] = {}
    for place, (shape, name) in enumerate(zip(shapes, names, strict=True)):
        groups.setdefault((shape, re.sub(r"\d+", "#", name)), []).append(place)
    reels = []
    for (shape, _), members in groups.items():
        columns = tile.ribbon_columns(*shape)
        side = -(-(isqrt(columns * BAND - 1) + 1) // BAND) * BAND
        width = min(max(side, _LEAST_WIDTH), _MOST_PX)
        bands = min(-(-columns // width), _MOST_PX // BAND)
        each = -(-columns // (width * bands))
        reels.append(
            Reel(FrameGeometry(width, bands * BAND), tuple(members), each, each * len(members))
        )
    return reels


def lay(planes: Sequence[Matrix], reels: Sequence[Reel], pixel_format: str) -> list[list[Luma]]:
    """Pictures of each reel.

    Parameters
    ----------
    planes : sequence of ndarray of int, shape (R, C)
        Samples around zero, within the depth of the pixel format.
    reels : sequence of Reel
    pixel_format : str
    """
    dtype = np.uint8 if bit_depth(pixel_format) == 8 else np.uint16
    zero = middle(pixel_format)
    found = []
    for reel in reels:
        per_frame = reel.geometry.columns * BAND
        samples = np.full(reel.frames * per_frame, zero, dtype)
        for place, begin in zip(reel.members, _begins(planes, reel), strict=True):
            sequence = tile.to_sequence(planes[place], None).astype(np.int32) + zero
            samples[begin : begin + sequence.size] = sequence.astype(dtype)
        pictures = [
            tile.frame_from_ribbon(
                cast(Any, samples[at : at + per_frame].reshape(-1, BAND).T), reel.geometry
            )
            for at in range(0, samples.size, per_frame)
        ]
        found.append([cast(Luma, pictures[place]) for place in _order(reel)])
    return found


def lift(
    pictures: Sequence[Sequence[Luma]],
    shapes: Sequence[tuple[int, int]],
    reels: Sequence[Reel],
    pixel_format: str,
) -> list[Matrix]:
    """Undo :func:`lay`: samples around zero as int16."""
    found: list[Matrix | None] = [None] * len(shapes)
    blanks = [np.broadcast_to(np.int16(0), shape) for shape in shapes]
    for reel, shown in zip(reels, pictures, strict=True):
        natural: list[Any] = [None] * reel.frames
        for place, picture in zip(_order(reel), shown, strict=True):
            natural[place] = picture
        columns = reel.geometry.columns
        samples = np.concatenate(
            [tile.sequence_from_frame(cast(Any, p), 0, columns) for p in natural]
        )
        centred = samples.astype(np.int16) - np.int16(middle(pixel_format))
        for place, begin in zip(reel.members, _begins(blanks, reel), strict=True):
            rows, width = shapes[place]
            part = centred[begin : begin + rows * width]
            found[place] = tile.from_sequence(part, (rows, width), None)
    return [matrix for matrix in found if matrix is not None]


def _begins(planes: Sequence[Matrix], reel: Reel) -> list[int]:
    """First sample of each member."""
    if reel.each:
        return [n * reel.each * reel.geometry.columns * BAND for n in range(len(reel.members))]
    shapes = [cast(tuple[int, int], planes[place].shape) for place in reel.members]
    return [column * BAND for column in tile.starts(shapes)[:-1]]


def _order(reel: Reel) -> list[int]:
    """Coding order: the first pictures of all members, then the second ones."""
    if not reel.each:
        return list(range(reel.frames))
    count = len(reel.members)
    return [n * reel.each + part for part in range(reel.each) for n in range(count)]

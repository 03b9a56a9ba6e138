"""Frames as pictures: levels in colour, the borders of tensors and their names.

A frame shows levels in coding order: sample 128 is level 0, and the distance from it is the level.
"""

from __future__ import annotations

import os
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from weightvid.archives import Location, open_anywhere, place_parts, walk_frames
from weightvid.atomic import atomic_output
from weightvid.errors import CodecError, FormatError, TensorNotFoundError
from weightvid.loader import BAND, ZERO_SAMPLE, Archive, Array, Bytes

#: colours of the most negative, the zero and the most positive level.
_NEGATIVE, _ZERO, _POSITIVE = (24, 78, 168), (247, 247, 244), (178, 24, 43)
_BLANK, _INK, _PAPER = (120, 124, 130), (20, 20, 24), (255, 255, 255)
#: small levels are by far the most frequent; a power below 1 spreads their colours.
_GAMMA: Final = 0.6
#: the scale ends at the level that this share of the samples does not exceed, or at the least.
_QUANTILE, _LEAST_RANGE = 0.999, 3
_TARGET_PX, _MAX_SCALE, _FONT_PX, _LEGEND_PX = 1400, 6, 12, 64


class Tile(NamedTuple):
    """Samples of one tensor in one band of a frame: name, left edge, top edge, width."""

    name: str
    x: int
    y: int
    width: int


def preview_archive(
    location: Location,
    folder: str | os.PathLike[str],
    *,
    frames: range | None = None,
    tensor: str | None = None,
    scale: int = 0,
    force: bool = False,
) -> tuple[str, ...]:
    """Draw frames of an archive as PNG files; gives their paths.

    Parameters
    ----------
    location : path, address or binary file object
    folder : path
        Made if it does not exist; the pictures are named ``frame-0000.png`` and so on.
    frames, tensor : range, str, optional
        Numbers of the frames, or a shell-style pattern of tensors on them; None: the first.
    scale : int
        Pixels per sample; 0: as many as make small frames readable, 1 to 6.
    force : bool
        Replace existing pictures.

    Raises
    ------
    CodecError
        imageio (the extra ``preview``) is missing.
    FormatError, TensorNotFoundError
        The archive is damaged or cut short, or has no such frame or tensor on a frame.
    """
    try:
        import imageio.v3 as imageio
    except ImportError as error:
        raise CodecError(
            f"imageio is needed to draw pictures ({error}): pip install 'weightvid[preview]'"
        ) from None
    target, made = Path(folder), []
    with open_anywhere(location) as archive:
        wanted = _choose_frames(archive, frames, tensor)
        sidecars = (frame.sidecar for frame in walk_frames(archive))
        placed = list(islice(place_parts(sidecars, archive), wanted[-1] + 1))
        target.mkdir(parents=True, exist_ok=True)
        for number in wanted:
            ((_, luma),) = archive.frames(range(number, number + 1))
            tiles = [tile for piece in placed[number] for tile in _tiles(archive, *piece)]
            name = Path(getattr(archive.source.file, "name", "")).name
            picture = draw(luma, tiles, f"{name}   frame {number}", scale)
            path = target / f"frame-{number:04d}.png"
            with atomic_output(path, force=force) as output:
                output.write(imageio.imwrite("<bytes>", picture, extension=".png"))
            made.append(str(path))
    return tuple(made)


def _choose_frames(archive: Archive, frames: range | None, tensor: str | None) -> list[int]:
    if archive.index is None:
        raise FormatError("the archive is cut short: unpack it with --partial", code="truncated")
    count, spans = len(archive.index.frames), archive.index.spans
    if not count:
        raise FormatError("the archive has no frames: all its tensors are exact", code="no-frames")
    if tensor is None:
        wanted = frames or range(1)
        if wanted.stop > count:
            raise TensorNotFoundError(
                f"there is no frame {wanted[-1]}: the archive has frames 0 to {count - 1}"
            )
        return list(wanted)
    names = {archive.spec(name).name for name in archive if fnmatchcase(name, tensor)}
    if not names:
        raise TensorNotFoundError(f"no tensor of the archive matches {tensor!r}")
    numbers = [n for n, spec in enumerate(archive.header.tensors) if spec.name in names]
    found = sorted({frame for number in numbers for frame in spans.get(number, ())})
    if not found:
        raise TensorNotFoundError(
            f"no tensor that matches {tensor!r} lies in the pictures: exact ones don't"
        )
    return found


def _tiles(archive: Archive, tensor: int, column: int, columns: int) -> list[Tile]:
    """Ribbon columns of a frame as rectangles, one for each band."""
    name, width, tiles = archive.header.tensors[tensor].name, archive.track.width, []
    while columns:
        band, x = divmod(column, width)
        run = min(columns, width - x)
        tiles.append(Tile(name, x, band * BAND, run))
        column, columns = column + run, columns - run
    return tiles


def colours(largest: int) -> Bytes:
    """Colour of each sample, shape (256, 3): blue below zero, red above, near white at zero.

    Levels of the largest magnitude and beyond get the full colour.
    """
    level = np.clip((np.arange(256) - ZERO_SAMPLE) / largest, -1, 1)[:, None]
    strength = np.abs(level) ** _GAMMA
    ends = np.where(level < 0, np.array(_NEGATIVE), np.array(_POSITIVE))
    return np.round(np.array(_ZERO) * (1 - strength) + ends * strength).astype(np.uint8)


def colour_range(luma: Array) -> int:
    """Magnitude that nearly all levels keep to; at least 3."""
    levels = np.abs(luma.astype(np.int16) - ZERO_SAMPLE).reshape(-1)
    cumulative = np.cumsum(np.bincount(levels, minlength=129))
    return max(_LEAST_RANGE, int(np.searchsorted(cumulative, _QUANTILE * luma.size)))


def draw(luma: Array, tiles: list[Tile], title: str, scale: int = 0) -> Bytes:
    """Picture of one frame and what lies on it, uint8 of shape (height, width, 3).

    The title is written below it, with the scale of colours; ``scale`` 0 is chosen by the size.
    """
    from PIL import Image, ImageDraw, ImageFont

    height, width = luma.shape
    zoom = scale or max(1, min(_MAX_SCALE, round(_TARGET_PX / max(height, width))))
    largest = colour_range(luma)
    table = colours(largest)
    picture, blank = table[luma], np.ones((height, width), bool)
    for tile in tiles:
        blank[tile.y : tile.y + BAND, tile.x : tile.x + tile.width] = False
    picture[blank] = _BLANK
    picture = np.repeat(np.repeat(picture, zoom, axis=0), zoom, axis=1)
    image = Image.new("RGB", (max(width * zoom, 640), height * zoom + _LEGEND_PX), _PAPER)
    image.paste(Image.fromarray(picture), (0, 0))
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(_FONT_PX)
    for tile in tiles:
        corner = (tile.x + tile.width) * zoom - 1, (tile.y + BAND) * zoom - 1
        pen.rectangle((tile.x * zoom, tile.y * zoom, *corner), outline=_INK)
    widest = {tile.name: tile for tile in sorted(tiles, key=lambda tile: tile.width)}
    for tile in widest.values():
        _label(image, tile, zoom, font)
    top = height * zoom + 8
    pen.text((12, top), f"{title}   level:", fill=_INK, font=font)
    step = -(-largest // 8)
    for place, level in enumerate(range(-(largest // step) * step, largest + 1, step)):
        x, colour = 12 + place * 36, tuple(table[level + ZERO_SAMPLE].tolist())
        pen.rectangle((x, top + 18, x + 35, top + 31), fill=colour, outline=_INK)
        pen.text((x + 2, top + 33), f"{level:+d}" if level else "0", fill=_INK, font=font)
    return np.asarray(image)


def _label(image: Any, tile: Tile, zoom: int, font: Any) -> None:
    """Write a name on its tile: across, else upright; as much of its end as fits."""
    from PIL import Image, ImageDraw

    room, tall, line = tile.width * zoom - 10, BAND * zoom - 10, _FONT_PX + 4
    if room < line:
        return
    upright = font.getlength(tile.name) > room and tall > room
    text = tile.name
    while font.getlength(text) > (tall if upright else room):
        text = "…" + text.lstrip("…")[1:]
    box = Image.new("RGB", (int(font.getlength(text)) + 6, line), _PAPER)
    ImageDraw.Draw(box).text((3, 1), text, fill=_INK, font=font)
    if upright:
        box = box.transpose(Image.Transpose.ROTATE_90)
    image.paste(box, (tile.x * zoom + 3, tile.y * zoom + 2))

"""Frames and kernels as pictures: levels or weights in colour, with names and captions.

A frame shows levels in coding order: sample 128 is level 0, and the distance from it is the level.
"""

from __future__ import annotations

import os
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from weightvid.archives import Location, open_anywhere, place_parts, walk_frames
from weightvid.atomic import atomic_output
from weightvid.errors import CodecError, FormatError, TensorNotFoundError
from weightvid.levels.transform import view_of
from weightvid.loader import BAND, ZERO_SAMPLE, Archive, Array, Bytes, TensorSpec, to_float32

#: colours of the most negative, the zero and the most positive level.
_NEGATIVE, _ZERO, _POSITIVE = (24, 78, 168), (247, 247, 244), (178, 24, 43)
_BLANK, _INK, _PAPER = (120, 124, 130), (20, 20, 24), (255, 255, 255)
#: the scale ends at the level that this share of the samples does not exceed, or at the least.
_QUANTILE, _LEAST_RANGE = 0.999, 3
_TARGET_PX, _MAX_SCALE, _FONT_PX, _LEGEND_PX = 1400, 6, 12, 80
#: letters of a name that are drawn at most.
_LABEL_LETTERS: Final = 160
#: beginnings of types without one real number an element that numpy knows.
_UNDRAWN: Final = ("F8_", "F6_", "F4", "C")
#: kernels are drawn as large as this, and so many rows and columns of them at most.
_KERNEL_SCALE, _MOST_KERNELS = 16, 128


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
    with open_anywhere(location) as archive:
        wanted = _choose_frames(archive, frames, tensor)
        return _write(_draw_frames(archive, wanted, scale), folder, force)


def preview_kernels(
    location: Location,
    folder: str | os.PathLike[str],
    *,
    tensor: str = "*",
    scale: int = 0,
    force: bool = False,
) -> tuple[str, ...]:
    """Draw each tensor that matches, restored: a row of kernels per output; gives the paths.

    The pictures are named after the tensors; see `preview_archive` for the other parameters.

    Raises
    ------
    CodecError
        imageio (the extra ``preview``) is missing.
    FormatError, TensorNotFoundError
        The archive is damaged, or no tensor of two axes or more matches.
    """
    with open_anywhere(location) as archive:
        return _write(_draw_tensors(archive, tensor, scale), folder, force)


def _write(
    pictures: Iterable[tuple[str, Bytes]], folder: str | os.PathLike[str], force: bool
) -> tuple[str, ...]:
    try:
        import imageio.v3 as imageio
    except ImportError as error:
        raise CodecError(
            f"imageio is needed to draw pictures ({error}): pip install 'weightvid[preview]'"
        ) from None
    made = []
    for stem, picture in pictures:
        path = Path(folder) / f"{stem}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_output(path, force=force) as output:
            output.write(imageio.imwrite("<bytes>", picture, extension=".png"))
        made.append(str(path))
    return tuple(made)


def _name(archive: Archive) -> str:
    return _printable(Path(str(getattr(archive.source.file, "name", ""))).name)


def _draw_frames(archive: Archive, wanted: list[int], scale: int) -> Iterator[tuple[str, Bytes]]:
    sidecars = (sidecar for sidecar, _ in walk_frames(archive))
    placed = list(islice(place_parts(sidecars, archive), wanted[-1] + 1))
    for number in wanted:
        ((_, luma),) = archive.frames(range(number, number + 1))
        tiles = [tile for piece in placed[number] for tile in _tiles(archive, *piece)]
        yield f"frame-{number:04d}", draw(luma, tiles, f"{_name(archive)}, frame {number}", scale)


def _draw_tensors(archive: Archive, pattern: str, scale: int) -> Iterator[tuple[str, Bytes]]:
    specs = [archive.spec(each) for each in archive if fnmatchcase(each, pattern)]
    specs = [
        spec
        for spec in dict.fromkeys(specs)
        if spec.size and view_of(spec.shape).rows > 1 and not spec.dtype.startswith(_UNDRAWN)
    ]
    if not specs:
        raise TensorNotFoundError(f"no real tensor of two axes or more matches {pattern!r}")
    taken: list[str] = []
    for spec in specs:
        with np.errstate(over="ignore"):
            weights = to_float32(archive.stored(spec.name), spec.dtype)
        picture = draw_kernels(weights, _name(archive), spec, scale)
        stem = re.sub(r"^\.|[^\w.-]", "_", spec.name, flags=re.ASCII)[:120] or "_"
        taken.append(stem)
        yield f"{stem}-{len(taken)}" if taken.count(stem) > 1 else stem, picture


def _choose_frames(archive: Archive, frames: range | None, tensor: str | None) -> list[int]:
    if archive.index is None:
        raise FormatError("the archive is cut short: unpack it with --partial", code="truncated")
    count, spans = len(archive.index.frames), archive.index.spans
    if not count:
        raise TensorNotFoundError("there are no pictures (but --kernels): all tensors are exact")
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
    found: list[int] = []
    for span in sorted((s for n in numbers for s in spans.get(n, ())), key=lambda s: s.start):
        found += range(max(span.start, found[-1] + 1 if found else 0), span.stop)
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
    strength = np.abs(level) ** 0.6  # small levels are by far the most frequent
    ends = np.where(level < 0, np.array(_NEGATIVE), np.array(_POSITIVE))
    return np.round(np.array(_ZERO) * (1 - strength) + ends * strength).astype(np.uint8)


def colour_range(luma: Array) -> int:
    """Magnitude that nearly all levels keep to; at least 3."""
    levels = np.abs(luma.astype(np.int16) - ZERO_SAMPLE).reshape(-1)
    cumulative = np.cumsum(np.bincount(levels, minlength=129))
    return max(_LEAST_RANGE, int(np.searchsorted(cumulative, _QUANTILE * luma.size)))


def draw(luma: Array, tiles: list[Tile], title: str, scale: int = 0) -> Bytes:
    """Picture of one frame and what lies on it, uint8 of shape (height, width, 3).

    A caption is written below it, with the scale of colours; ``scale`` 0 is chosen by the size.
    """
    height, width = luma.shape
    zoom = scale or max(1, min(_MAX_SCALE, round(_TARGET_PX / max(height, width))))
    largest = colour_range(luma)
    table = colours(largest)
    picture, blank = table[luma], np.ones((height, width), bool)
    for tile in tiles:
        blank[tile.y : tile.y + BAND, tile.x : tile.x + tile.width] = False
    picture[blank] = _BLANK
    image, pen, font = _canvas(np.repeat(np.repeat(picture, zoom, axis=0), zoom, axis=1))
    for tile in tiles:
        corner = (tile.x + tile.width) * zoom - 1, (tile.y + BAND) * zoom - 1
        pen.rectangle((tile.x * zoom, tile.y * zoom, *corner), outline=_INK)
    for tile in tiles:
        _label(image, tile, zoom, font)
    step = -(-largest // 8)
    levels = range(-(largest // step) * step, largest + 1, step)
    swatches = [(table[n + ZERO_SAMPLE], f"{n:+d}" if n else "0") for n in levels]
    caption = "each cell is a quantized weight, laid out column by column, large ones first"
    _legend(pen, font, height * zoom, (title, caption, "level:"), swatches)
    return np.asarray(image)


def draw_kernels(weights: Array, title: str, spec: TensorSpec, scale: int = 0) -> Bytes:
    """Picture of a tensor's kernels: a row for each output, a column for each input."""
    view = view_of(spec.shape)
    tall, *others = (1,) * (2 - len(view.kernel)) + view.kernel
    wide = prod(others)
    whole = weights.reshape(view.rows, view.channels, tall, wide)
    many = _MOST_KERNELS if view.kernel else 8 * _MOST_KERNELS
    shown, gap = whole[:many, :many], int(bool(view.kernel))
    rows, channels = shown.shape[:2]
    values = shown.astype(np.float64)
    limit = float(np.quantile(np.abs(np.where(np.isfinite(values), values, 0)), _QUANTILE)) or 1.0
    with np.errstate(over="ignore"):
        shares = np.nan_to_num(values / limit * 127).clip(-127, 127)  # NaN is drawn as 0
    samples = np.rint(shares).astype(np.int16) + ZERO_SAMPLE
    table = colours(127)
    grid = np.pad(table[samples], ((0, 0), (0, 0), (0, gap), (0, gap), (0, 0)),
                  constant_values=255)  # fmt: skip
    grid = grid.transpose(0, 2, 1, 3, 4).reshape(rows * (tall + gap), channels * (wide + gap), 3)
    zoom = scale or max(1, min(_KERNEL_SCALE, _TARGET_PX // max(grid.shape[:2])))
    image, pen, font = _canvas(np.repeat(np.repeat(grid, zoom, axis=0), zoom, axis=1))
    part = "" if shown.size == whole.size else f" (the first {rows} x {channels} of them)"
    what = "kernels" if view.kernel else "weights"
    caption = f"{view.rows} outputs (rows) x {view.channels} inputs of {what}{part}"
    marks = [n / 4 for n in range(-4, 5)]
    swatches = [(table[round(x * 127) + ZERO_SAMPLE], f"{x * limit:.2g}") for x in marks]
    shape = " x ".join(map(str, spec.shape))
    words = f"{title}, {_printable(spec.name)}, {shape}", caption, "weight:"
    _legend(pen, font, len(grid) * zoom, words, swatches)
    return np.asarray(image)


def _canvas(picture: Bytes) -> tuple[Any, Any, Any]:
    """A picture with room below it, a pen and a font."""
    from PIL import Image, ImageDraw, ImageFont

    height, width, _ = picture.shape
    image = Image.new("RGB", (max(width, 640), height + _LEGEND_PX), _PAPER)
    image.paste(Image.fromarray(picture.astype(np.uint8)), (0, 0))
    return image, ImageDraw.Draw(image), ImageFont.load_default(_FONT_PX)


def _legend(
    pen: Any, font: Any, top: int, words: tuple[str, str, str], swatches: list[tuple[Array, str]]
) -> None:
    """What the picture is, how to read it, and the scale of its colours."""
    for y, text in zip((6, 22, 44), words, strict=True):
        pen.text((12, top + y), text, fill=_INK, font=font)
    for place, (colour, text) in enumerate(swatches):
        x = 60 + place * 44
        pen.rectangle((x, top + 42, x + 43, top + 58), fill=tuple(colour.tolist()), outline=_INK)
        pen.text((x + 2, top + 61), text, fill=_INK, font=font)


def _printable(name: str) -> str:
    """The end of a name, which comes from a file, as one line."""
    shown = "".join(c if c.isprintable() else "�" for c in name[-_LABEL_LETTERS:])
    return shown if len(name) <= _LABEL_LETTERS else "…" + shown


def _label(image: Any, tile: Tile, zoom: int, font: Any) -> None:
    """Write a name on its tile: across, else upright; as much of its end as fits."""
    from PIL import Image, ImageDraw

    room, tall, line = tile.width * zoom - 6, BAND * zoom - 10, _FONT_PX + 4
    if room < line - 6:
        return
    text = _printable(tile.name)
    upright = font.getlength(text) > room and tall > room
    limit = tall if upright else room
    if font.getlength(text) > limit:
        lengths = range(1, len(text) + 1)
        end = bisect_right(lengths, limit, key=lambda n: font.getlength("…" + text[-n:]))
        text = "…" + text[len(text) - end :]
    box = Image.new("RGB", (int(font.getlength(text)) + 6, line), _PAPER)
    ImageDraw.Draw(box).text((3, 1), text, fill=_INK, font=font)
    if upright:
        box = box.transpose(Image.Transpose.ROTATE_90)
    image.paste(box, (tile.x * zoom + 3, tile.y * zoom + 2))

"""Frames as pictures: levels in colour, the borders of tensors and their names.

A frame shows folded levels in coding order: sample 128 is level 0 (or the core that is stored as
digits beside the frame), and the distance from it grows with the level's magnitude.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from weightvid.atomic import atomic_output
from weightvid.errors import CodecError, FormatError, TensorNotFoundError
from weightvid.loader import Archive, open_archive
from weightvid.tile import BAND, ZERO_SAMPLE, Tile

Samples = npt.NDArray[Any]
Picture = npt.NDArray[np.uint8]

#: colours of the most negative, the zero and the most positive level.
_NEGATIVE: Final = (24, 78, 168)
_ZERO: Final = (247, 247, 244)
_POSITIVE: Final = (178, 24, 43)
_BLANK: Final = (120, 124, 130)
_INK: Final = (20, 20, 24)
_PAPER: Final = (255, 255, 255)
#: small levels are by far the most frequent; a power below 1 spreads their colours.
_GAMMA: Final = 0.6
#: the scale ends at the level that this share of the samples does not exceed.
_QUANTILE: Final = 0.999
_LEAST_RANGE: Final = 3
_TARGET_PX: Final = 1400
_MAX_SCALE: Final = 6
_FONT_PX: Final = 12
_LEGEND_PX: Final = 64
_MARGIN_PX: Final = 12


@dataclass(frozen=True, slots=True)
class PreviewOptions:
    """What to draw.

    Attributes
    ----------
    frames : range or None
        Numbers of the frames; None: the first (or those of ``tensor``).
    tensor : str or None
        Shell-style pattern: the frames on which tensors of such names lie.
    scale : int
        Pixels per sample; 0: as many as make small frames readable, 1 to 6.
    force : bool
        Replace existing pictures.
    """

    frames: range | None = None
    tensor: str | None = None
    scale: int = 0
    force: bool = False


@dataclass(frozen=True, slots=True)
class PreviewReport:
    """The pictures' paths, in frame order."""

    pictures: tuple[str, ...]


def preview_archive(
    archive: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    options: PreviewOptions | None = None,
) -> PreviewReport:
    """Draw frames of an archive as PNG files.

    Parameters
    ----------
    archive : path or address
    folder : path
        Made if it does not exist; the pictures are named ``frame-0000.png`` and so on.
    options : PreviewOptions

    Raises
    ------
    CodecError
        imageio (the extra ``preview``) is missing.
    FormatError
        The archive is damaged, or has no frames.
    TensorNotFoundError
        No such frame, or no tensor of that name on a frame.
    """
    chosen = options or PreviewOptions()
    imageio = _import_imageio()
    with open_archive(archive) as opened:
        numbers = _frames(opened, chosen)
        tiles = _tiles(opened)
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        made = []
        count = len(opened.index.frames)
        for run in numbers:
            for sidecar, luma in opened.frames(run):
                title = f"{Path(archive).name}   frame {sidecar.frame} of {count}"
                picture = draw(luma, tiles[sidecar.frame], title, chosen.scale)
                path = target / f"frame-{sidecar.frame:04d}.png"
                data = imageio.imwrite("<bytes>", picture, extension=".png")
                with atomic_output(path, force=chosen.force) as file:
                    file.write(data)
                made.append(str(path))
        return PreviewReport(tuple(made))


def _import_imageio() -> ModuleType:
    try:
        import imageio.v3
    except ImportError as error:
        raise CodecError(
            f"imageio is needed to draw pictures ({error}): pip install 'weightvid[preview]'"
        ) from None
    module: ModuleType = imageio.v3
    return module


def _frames(archive: Archive, options: PreviewOptions) -> list[range]:
    count = len(archive.index.frames)
    if not count:
        raise FormatError("the archive has no frames: all its tensors are exact", code="no-frames")
    if options.tensor is not None:
        names = [name for name in archive.names if fnmatchcase(name, options.tensor)]
        if not names:
            raise TensorNotFoundError(f"no tensor of the archive matches {options.tensor!r}")
        wanted = sorted({number for name in names for number in archive.frames_of(name)})
        if not wanted:
            raise TensorNotFoundError(
                f"{names[0]!r} is stored exactly and lies on no frame"
                if len(names) == 1
                else f"the tensors that match {options.tensor!r} are exact and lie on no frame"
            )
        return [range(number, number + 1) for number in wanted if number < count]
    return [options.frames if options.frames is not None else range(1)]


def _tiles(archive: Archive) -> Mapping[int, list[tuple[str, Tile]]]:
    found: dict[int, list[tuple[str, Tile]]] = defaultdict(list)
    for spec in archive.header.tensors:
        for tile in archive.tiles_of(spec.name):
            found[tile.frame].append((spec.name, tile))
    return found


def colours(largest: int, zero: int = ZERO_SAMPLE) -> Picture:
    """Colour of each sample, shape (2 zero, 3): blue below zero, red above, near white at zero.

    Parameters
    ----------
    largest : int
        Distance from the sample of zero that gets the full colour; those beyond it do too.
    zero : int
        Sample of level 0.

    Examples
    --------
    >>> colours(4)[128].tolist()
    [247, 247, 244]
    """
    distance = np.clip((np.arange(2 * zero) - zero) / largest, -1, 1)
    strength = (np.abs(distance) ** _GAMMA)[:, None]
    ends = np.where(distance[:, None] < 0, np.array(_NEGATIVE), np.array(_POSITIVE))
    return np.round(np.array(_ZERO) * (1 - strength) + ends * strength).astype(np.uint8)


def _zero(luma: Samples) -> int:
    """Sample of level 0: deeper samples than of 8 bits have 10."""
    return ZERO_SAMPLE if luma.dtype == np.uint8 else 4 * ZERO_SAMPLE


def colour_range(luma: Samples) -> int:
    """Distance from the sample of zero that nearly all samples keep to; at least 3."""
    zero = _zero(luma)
    counts = np.bincount(np.abs(luma.astype(np.int16) - zero).reshape(-1), minlength=zero + 1)
    cumulative = np.cumsum(counts)
    return max(_LEAST_RANGE, int(np.searchsorted(cumulative, _QUANTILE * luma.size)))


def draw(luma: Samples, tiles: list[tuple[str, Tile]], title: str, scale: int = 0) -> Picture:
    """Picture of one frame.

    Parameters
    ----------
    luma : ndarray of uint8 or uint16, shape (height, width)
    tiles : list of (name, Tile)
        What lies on it.
    title : str
        Written under the frame, beside the scale.
    scale : int
        Pixels per sample; 0: chosen by size.

    Returns
    -------
    ndarray of uint8, shape (height, width, 3)
    """
    from PIL import Image, ImageDraw, ImageFont

    height, width = luma.shape
    zoom = scale or max(1, min(_MAX_SCALE, round(_TARGET_PX / max(height, width))))
    largest = colour_range(luma)
    table = colours(largest, _zero(luma))
    picture = table[luma]
    covered = np.zeros((height // BAND, width), bool)
    for _, tile in tiles:
        covered[tile.y // BAND, tile.x : tile.x + tile.width] = True
    blank = np.repeat(~covered, BAND, axis=0)
    picture[blank] = _BLANK
    picture = np.repeat(np.repeat(picture, zoom, axis=0), zoom, axis=1)
    image = Image.new("RGB", (max(width * zoom, 640), height * zoom + _LEGEND_PX), _PAPER)
    image.paste(Image.fromarray(picture), (0, 0))
    pen = ImageDraw.Draw(image)
    font = ImageFont.load_default(_FONT_PX)
    _borders(pen, tiles, zoom)
    for name, tile in _labelled(tiles):
        _label(image, (name, tile, zoom), font)
    _legend(image, (largest, table), title, font)
    return np.asarray(image)


def _borders(pen: Any, tiles: list[tuple[str, Tile]], zoom: int) -> None:
    for _, tile in tiles:
        left, top = tile.x * zoom, tile.y * zoom
        right, bottom = left + tile.width * zoom - 1, top + BAND * zoom - 1
        pen.line((left, top, right, top), fill=_INK)
        pen.line((left, bottom, right, bottom), fill=_INK)
    # The sides only where a tensor begins or ends, so that one that goes on is seen to do so.
    for edges, place in ((0, 0), (-1, 1)):
        by_name: dict[str, Tile] = {}
        for name, tile in tiles if edges == -1 else reversed(tiles):
            by_name[name] = tile
        for tile in by_name.values():
            x = tile.x * zoom if place == 0 else (tile.x + tile.width) * zoom - 1
            pen.line((x, tile.y * zoom, x, (tile.y + BAND) * zoom - 1), fill=_INK)


def _labelled(tiles: list[tuple[str, Tile]]) -> list[tuple[str, Tile]]:
    """For each tensor the widest of its tiles, the first of equals: there its name has room."""
    widest: dict[str, Tile] = {}
    for name, tile in tiles:
        if name not in widest or tile.width > widest[name].width:
            widest[name] = tile
    return list(widest.items())


def _label(image: Any, place: tuple[str, Tile, int], font: Any) -> None:
    """Write a name on its tile: across, else upright, else as much of its end as fits."""
    from PIL import Image, ImageDraw

    name, tile, zoom = place
    room, tall = tile.width * zoom - 4, BAND * zoom - 4
    line = _FONT_PX + 4
    across = font.getlength(name) + 6 <= room
    if not across and room < line:
        return
    upright = not across and tall > room
    space = tall if upright else room
    text = _fit(name, space - 6, font)
    if not text:
        return
    box = Image.new("RGB", (int(font.getlength(text)) + 6, line), _PAPER)
    ImageDraw.Draw(box).text((3, 1), text, fill=_INK, font=font)
    if upright:
        box = box.transpose(Image.Transpose.ROTATE_90)
    image.paste(
        Image.blend(image.crop(_area(tile, zoom, box.size)), box, 0.85),
        _area(tile, zoom, box.size)[:2],
    )


def _area(tile: Tile, zoom: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
    left, top = tile.x * zoom + 3, tile.y * zoom + 2
    return left, top, left + size[0], top + size[1]


def _fit(name: str, space: float, font: Any) -> str:
    """The name, without ``.weight`` if need be, or its end; empty if not even four letters fit."""
    if font.getlength(name) <= space:
        return name
    short = name.removesuffix(".weight")
    for cut in range(len(short) - 3):
        text = "…" * bool(cut) + short[cut:]
        if font.getlength(text) <= space:
            return text
    return ""


def _legend(image: Any, scale: tuple[int, Picture], title: str, font: Any) -> None:
    """Below the frame: its title, and the colours of the samples with their distance from zero."""
    from PIL import ImageDraw

    largest, table = scale
    pen = ImageDraw.Draw(image)
    top = image.height - _LEGEND_PX + 8
    pen.text((_MARGIN_PX, top), title, fill=_INK, font=font)
    note = f"sample - {len(table) // 2}:"
    top += _FONT_PX + 10
    pen.text((_MARGIN_PX, top), note, fill=_INK, font=font)
    left = _MARGIN_PX + int(font.getlength(note)) + 10
    # Numbers of three digits take more room.
    cells = 24 if largest < 100 else 16
    steps = list(range(-largest, largest + 1, max(1, -(-2 * largest // cells))))
    each = max(
        18, min(34 if cells == 24 else 42, (image.width - left - _MARGIN_PX) // (len(steps) + 1))
    )
    for place, level in enumerate(steps):
        x = left + place * each
        colour = tuple(int(c) for c in table[level + len(table) // 2])
        pen.rectangle((x, top, x + each - 1, top + 13), fill=colour, outline=_INK)
        text = f"{level:+d}" if level else "0"
        offset = (each - font.getlength(text)) / 2
        pen.text((x + offset, top + 15), text, fill=_INK, font=font)

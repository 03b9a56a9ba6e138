"""A reader written from FORMAT.md alone.

Standard library only, besides the video decoder that the caller hands in; shares no code with
weightvid, and none of its cleverness: every formula is spelled out as the document has it. Slow.
Section numbers here and in the other modules are those of FORMAT.md.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from independent.container import (
    LEVEL_FORMAT,
    Bad,
    Card,
    Spec,
    Start,
    Tensor,
    boxes,
    find,
    read_exact,
    read_header,
    read_index,
    read_sidecar,
    read_track,
)
from independent.video import Decode, Video, by_pyav
from independent.weights import DigitStreams, finish, ribbon_columns, sequence_of, unfold


@dataclass
class Open:
    """A tensor on the ribbon that is not finished yet."""

    start: Start
    column: int
    sequence: list[tuple[int, int, int]]
    levels: list[int] = field(default_factory=list)


@dataclass
class Result:
    """What a file gave."""

    header: dict[str, Any]
    tensors: dict[str, Tensor]
    missing: list[str]


class ExactParts:
    """Puts the items of tensors together."""

    def __init__(self, specs: list[Spec]) -> None:
        self.specs = specs
        self.parts: dict[int, bytearray] = {}

    def add(self, item: dict[str, Any], data: bytes) -> Tensor | None:
        spec = self.specs[item["id"]]
        size = LEVEL_FORMAT[item["levels"]][1] if "levels" in item else spec.item_bytes
        part = self.parts.setdefault(item["id"], bytearray())
        if len(part) != item.get("first", 0) * size:
            raise Bad("order", spec.name)
        part += data
        if len(part) < spec.size * size:
            return None
        whole = bytes(self.parts.pop(item["id"]))
        if "levels" not in item:
            return Tensor(spec, whole)
        levels = [q for (q,) in struct.iter_unpack(LEVEL_FORMAT[item["levels"]][0], whole)]
        return finish(spec, levels, item, bytes.fromhex(item["sha256"]))


# Whole files: section 11.


class Ribbon:
    """Takes frames in order and gives tensors."""

    def __init__(self, specs: list[Spec], video: Video) -> None:
        self.specs, self.width = specs, video.width
        self.sample_bytes, self.zero = (video.bits + 7) // 8, 1 << (video.bits - 1)
        self.per_frame = video.width * (video.height // 64)
        self.open: dict[int, Open] = {}
        self.next_column = 0

    def add(self, card: Card, luma: bytes, column: int | None = None) -> Iterator[Tensor]:
        """Tensors that end in a frame; ``column``: of its first start, if not known from before."""
        if hashlib.sha256(card.payload[32:] + luma).digest() != card.payload[:32]:
            raise Bad("digest", f"frame {card.frame}")
        begin = card.frame * self.per_frame
        digits = DigitStreams(card, skip=not self.open and column is not None)
        if column is not None and not self.open:
            self.next_column = column
        for start in card.starts:
            number = start.record["id"]
            sequence = sequence_of(start, self.specs[number])
            self.open[number] = Open(start, self.next_column, sequence)
            if not begin <= self.next_column < begin + self.per_frame:
                raise Bad("order")
            self.next_column += ribbon_columns(self.specs[number])
        for number, entry in self.open.items():
            spec = self.specs[number]
            end = entry.column + ribbon_columns(spec)
            first, last = max(entry.column, begin), min(end, begin + self.per_frame)
            piece = []
            for c in range(first, last):
                x, top = (
                    (c % self.per_frame) % self.width,
                    64 * ((c % self.per_frame) // self.width),
                )
                piece += [self.sample(luma, (top + r) * self.width + x) for r in range(64)]
            self.lay(entry, piece, digits)
        for number, tensor_hash in card.ends:
            if number not in self.open:
                if column is None:
                    raise Bad("order")
                continue  # began before the frames that are read
            entry = self.open.pop(number)
            spec = self.specs[number]
            if len(entry.levels) != spec.size:
                raise Bad("order", spec.name)
            levels = [0] * spec.size
            for (i, j, _), level in zip(entry.sequence, entry.levels, strict=True):
                levels[i * spec.matrix[1] + j] = level
            for place, level in entry.start.escapes.items():
                levels[place] = level
            yield finish(spec, levels, entry.start.record, tensor_hash)

    def sample(self, luma: bytes, place: int) -> int:
        size = self.sample_bytes
        return int.from_bytes(luma[place * size : (place + 1) * size], "little")

    def lay(self, entry: Open, piece: list[int], digits: DigitStreams) -> None:
        """Levels of the next samples of a tensor."""
        done = len(entry.levels)
        for sample, (_, _, energy) in zip(piece, entry.sequence[done:], strict=False):
            entry.levels.append(unfold(sample, entry.start.folds[energy], digits, self.zero))


def read_stream(data: bytes, decode: Decode = by_pyav) -> Result:
    """All tensors of a file, read from its beginning; what is missing if it is cut short."""
    moov: tuple[int, int] | None = None
    header: dict[str, Any] | None = None
    specs: list[Spec] = []
    cards: list[Card] = []
    packets: list[bytes] = []
    found: dict[str, Tensor] = {}
    exact: ExactParts | None = None
    waiting: Card | None = None
    for kind, begin, end in boxes(data):
        payload = data[begin:end]
        if kind == b"ftyp":
            brands = [payload[:4], *(payload[i : i + 4] for i in range(8, len(payload), 4))]
            if b"wvd1" not in brands and b"wvd2" not in brands:
                raise Bad("not-an-archive")
        elif kind == b"moov":
            moov = (begin, end)
        elif kind == b"weightvid-header":
            header = read_header(payload)
            specs = [Spec(name, dtype, tuple(shape)) for name, dtype, shape in header["tensors"]]
            exact = ExactParts(specs)
        elif kind == b"weightvid-frame\0":
            waiting = read_sidecar(payload, specs)
        elif kind == b"moof":
            first, _ = find(data, [b"mfhd"], begin, end)
            if waiting is None or struct.unpack_from(">I", data, first + 4)[0] != waiting.frame + 1:
                raise Bad("order")
        elif kind == b"mdat" and waiting is not None:
            cards.append(waiting)
            packets.append(payload)
            waiting = None
        elif kind == b"weightvid-exact\0" and exact is not None:
            for item, part in read_exact(payload, specs):
                if (tensor := exact.add(item, part)) is not None:
                    found[tensor.spec.name] = tensor
    if header is None or moov is None:
        raise Bad("truncated")
    video = read_track(data, *moov, header["track"])
    ribbon = Ribbon(specs, video)
    for card, luma in zip(cards, decode(video, packets) if packets else [], strict=True):
        for tensor in ribbon.add(card, luma):
            found[tensor.spec.name] = tensor
    missing = [spec.name for spec in specs if spec.name not in found]
    for alias, target in header.get("aliases", {}).items():
        if target in found:
            found[alias] = found[target]
    return Result(header, found, missing)


def read_one(data: bytes, name: str, decode: Decode = by_pyav) -> Tensor:
    """One tensor by way of the index, from its own frames alone."""
    head = {
        kind: (begin, end)
        for kind, begin, end in boxes(data)
        if kind in (b"moov", b"weightvid-header")
    }
    begin, end = head[b"weightvid-header"]
    header = read_header(data[begin:end])
    video = read_track(data, *head[b"moov"], header["track"])
    specs = [Spec(name, dtype, tuple(shape)) for name, dtype, shape in header["tensors"]]
    target = header.get("aliases", {}).get(name, name)
    number = next(i for i, spec in enumerate(specs) if spec.name == target)
    index = read_index(data)
    if number not in index["ribbon"]:
        return _one_exact(data, specs, number, index)
    column, starts_at = 0, {}
    for other in index["ribbon"]:
        starts_at[other] = column
        column += ribbon_columns(specs[other])
    per_frame = video.width * (video.height // 64)
    first = starts_at[number] // per_frame
    last = (starts_at[number] + ribbon_columns(specs[number]) - 1) // per_frame
    places, at = [], 0
    for gap, sidecar, fragment in index["frames"]:
        places.append((at + gap, at + gap + sidecar, at + gap + sidecar + fragment))
        at += gap + sidecar + fragment
    ribbon = Ribbon(specs, video)
    for frame in range(first, last + 1):
        begin, middle, end = places[frame]
        ((_, inner, stop),) = boxes(data, begin, middle)
        card = read_sidecar(data[inner:stop], specs)
        (_, (_, inner, stop)) = boxes(data, middle, end)
        (luma,) = decode(video, [data[inner:stop]])
        known = starts_at[card.starts[0].record["id"]] if frame == first else None
        for tensor in ribbon.add(card, luma, known):
            if tensor.spec.name == target:
                return tensor
    raise Bad("index", name)


def _one_exact(data: bytes, specs: list[Spec], number: int, index: dict[str, Any]) -> Tensor:
    parts = ExactParts(specs)
    for offset, size, members in index["exact"]:
        if number in members:
            ((_, begin, end),) = boxes(data, offset, offset + size)
            for item, part in read_exact(data[begin:end], specs):
                if item["id"] == number and (tensor := parts.add(item, part)) is not None:
                    return tensor
    raise Bad("index", specs[number].name)

"""A chain of archives merged into one, without quantizing again.

Frames are copied where they fit the base's track, and coded again without loss where not. The
layers of the base come first, then those of each update; what later archives replaced or left out
is dropped. The tensors are those that the chain has, and so is the root.
"""

import hashlib
import os
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import BinaryIO, Final, cast

import numpy as np

from weightvid import loader
from weightvid.archives import Location, checked_tensors, open_chain
from weightvid.atomic import atomic_output, is_source
from weightvid.errors import FormatError, OutputError
from weightvid.levels.frames import Energies, FrameSize, lay_out, to_sequence
from weightvid.loader import Archive, Array, End, Header, Part, Sidecar, Track, parse_exact
from weightvid.progress import Progress, Report, quiet
from weightvid.spec import SideFile
from weightvid.tasks import finish, track_of
from weightvid.video import Video, open_encoder, with_level
from weightvid.writer import ArchiveWriter

#: a level for comparing configuration records, whatever level each claims.
_ANY_LEVEL: Final = 120


@dataclass(frozen=True, slots=True)
class ApplyReport:
    """What a merging did.

    ``layers``, ``tensors`` and ``file_bytes`` are those of the archive that was made. Frames were
    ``copied`` as they were, or had to be ``coded`` again, without loss. ``root`` is that of the
    archive, and of the last update: both have the same tensors.
    """

    layers: int
    tensors: int
    file_bytes: int
    copied: int
    coded: int
    root: str
    seconds: float


def apply_updates(
    base: Location,
    updates: Sequence[Location],
    destination: str | os.PathLike[str],
    *,
    force: bool = False,
    progress: Report = quiet,
) -> ApplyReport:
    """Merge an archive and updates to it, the oldest first, into one archive.

    Parameters
    ----------
    base : path, address or file
    updates : sequence of them
    destination : path
        Appears whole, or not at all; without parity and signatures.
    force : bool
        Replace an existing file.
    progress : callable
        Told about the stage ``merge``.

    Raises
    ------
    FormatError
        An archive is damaged, or no update to the one before.
    OutputError, RemoteError, CodecError
    """
    began = perf_counter()
    if is_source(destination, base, *updates):
        raise OutputError(f"{destination} is the archive or an update itself")
    with open_chain((base, *updates)) as chain, atomic_output(destination, force=force) as file:
        report = _Merge(chain, progress).write(file)
    return replace(report, seconds=perf_counter() - began)


class _Merge:
    def __init__(self, chain: Sequence[Archive], progress: Report) -> None:
        self._chain, self._progress = chain, progress
        self._last = chain[-1]
        headers = [archive.header for archive in chain]
        counts = [header.layers.total if header.layers else 1 for header in headers]
        self._total = sum(counts)
        if self._total > loader.MAX_LAYERS:
            raise FormatError(
                f"the chain has {self._total} layers, and an archive at most {loader.MAX_LAYERS}: "
                "pack the model afresh",
                "limit",
            )
        self._first = [sum(counts[:k]) for k in range(len(chain))]
        self._names = [
            {spec.name: n for n, spec in enumerate(header.tensors)} | dict(header.aliases)
            for header in headers
        ]
        #: new numbers, several of what was tied, by those of the archive and of the tensor there.
        self._numbers: dict[tuple[int, int], list[int]] = {}
        self._masks = [
            self._trace(len(chain) - 1, spec.name, number)
            for number, spec in enumerate(self._last.header.tensors)
        ]
        every = (basis for header in headers for basis in header.bases)
        self._bases: dict[bytes, loader.Floats] = {basis.tobytes(): basis for basis in every}
        self.copied = self.coded = 0

    def _trace(self, place: int, name: str, number: int) -> int:
        """Layers of a tensor of one of the archives, all told."""
        there = self._names[place].get(name)
        if there is None:
            raise FormatError(f"tensor {name!r} is not in the base as it should be", "base")
        header = self._chain[place].header
        mask, name = header.mask(there), header.tensors[there].name
        self._numbers.setdefault((place, there), []).append(number)
        own = (mask >> 1) << (1 + self._first[place])
        return own | (self._trace(place - 1, name, number) if mask & 1 else 0)

    def write(self, file: BinaryIO) -> ApplyReport:
        header, chain = self._last.header, self._chain
        heads: dict[int, bytes] = {}
        deque(checked_tensors(self._last, heads), 0)
        track = self._track()
        layers = loader.Layers(self._total, b"", tuple(self._masks))
        made = header._replace(files=(), bases=tuple(self._bases.values()), layers=layers)
        files = [
            SideFile(entry.path, self._last.read_file(entry.path), entry.role)
            for entry in header.files
        ]
        writer = ArchiveWriter(file, track, made, files)
        for place in range(len(chain)):
            for stage, (frames, boxes) in enumerate(_stages(chain[place])):
                if place or stage:
                    writer.end_layer()
                for sidecar, packet in self._frames(place, frames, track):
                    writer.add_frame(sidecar._replace(frame=len(writer.frames)), packet)
                writer.add_exact(self._exact(place, made, boxes))
                done = self._first[place] + stage + 1
                self._progress(Progress("merge", done, self._total, unit="layers"))
        writer.heads = heads
        return ApplyReport(
            self._total, len(header.tensors), finish(writer), self.copied, self.coded,
            self._last.root.hex(), 0.0,
        )  # fmt: skip

    def _track(self) -> Track:
        """The track of the base, if it is one that frames can be coded for anew."""
        first = self._chain[0].track
        if first.entry == b"hvc1" and all(_same(first, one.track) for one in self._chain):
            return first
        return track_of(Video(), first.width, first.height)

    def _frames(self, place: int, frames: range, track: Track) -> Iterator[tuple[Sidecar, bytes]]:
        """Frames of a layer, with what is kept of their tensors."""
        archive = self._chain[place]
        shared = any(len(new) > 1 for (at, _), new in self._numbers.items() if at == place)
        if _same(archive.track, track) and not shared:
            spans = archive.index.spans.items() if archive.index else ()
            kept = [span for n, own in spans if (place, n) in self._numbers for span in own]
            for number in (n for n in frames if any(n in span for span in kept)):
                sidecar, packet = archive.packet(number)
                parts = tuple(self._kept(place, sidecar.parts))
                ends = tuple(self._ended(place, sidecar.ends))
                self.copied += 1
                yield Sidecar(0, sidecar.sha256, parts, ends), packet
            return
        yield from self._laid_out(place, frames, track)

    def _laid_out(self, place: int, frames: range, track: Track) -> Iterator[tuple[Sidecar, bytes]]:
        """Frames of another size or codec, or of tensors twice, coded again without loss."""
        archive, parts_of = self._chain[place], dict[int, list[tuple[Part, Array]]]()
        ends: dict[int, End] = {}

        def take(part: Part, matrix: Array) -> None:
            energies = None if part.energies is None else Energies(*part.energies)
            samples = to_sequence(matrix.view(np.uint8) ^ np.uint8(loader.ZERO_SAMPLE), energies)
            for kept in self._kept(place, (part,)):
                parts_of.setdefault(kept.tensor, []).append((kept, samples))

        assembler = loader.Assembler(archive.header, sink=take)
        for sidecar, luma in archive.frames(frames):
            all(assembler.add(sidecar, luma))
            ends |= {end.tensor: end for end in self._ended(place, sidecar.ends)}
        encoder = open_encoder(Video(), track.width, track.height)
        last = {number: parts[-1][0] for number, parts in parts_of.items()}
        items = (item for parts in parts_of.values() for item in parts)
        for frame in lay_out(items, FrameSize(track.width, track.height)):
            parts = tuple(replace(part, column=column) for part, column in frame.starts)
            done = tuple(ends[part.tensor] for part in frame.ends if part is last[part.tensor])
            self.coded += 1
            digest = hashlib.sha256(frame.luma.data).digest()
            yield Sidecar(0, digest, parts, done), encoder.encode(frame.luma)

    def _kept(self, place: int, parts: Sequence[Part]) -> Iterator[Part]:
        """Parts that are still needed, by their new numbers."""
        known = list(self._bases)
        for part in parts:
            matrices = (self._chain[place].header.bases[basis] for basis in part.bases)
            bases = tuple(known.index(matrix.tobytes()) for matrix in matrices)
            for number in self._numbers.get((place, part.tensor), ()):
                yield replace(part, tensor=number, bases=bases)

    def _ended(self, place: int, ends: Sequence[End]) -> Iterator[End]:
        for end in ends:
            for number in self._numbers.get((place, end.tensor), ()):
                yield end._replace(tensor=number)

    def _exact(self, place: int, made: Header, boxes: Sequence[int]) -> Iterator[tuple[int, Array]]:
        """Exact tensors in boxes at these offsets, or what is added to them."""
        archive, pieces = self._chain[place], dict[int, list[Array]]()
        for at in boxes:
            for tensor, first, elements in parse_exact(archive.source.box(at)[1], archive.header):
                for number in self._numbers.get((place, tensor), ()):
                    pieces.setdefault(number, []).append(elements)
                    if first + elements.size == made.tensors[number].size:
                        yield number, np.concatenate(pieces.pop(number))


def _same(one: Track, other: Track) -> bool:
    """Whether packets of one track are packets of the other, whatever level they claim."""
    if one[:3] != other[:3]:
        return False
    if one.entry != b"hvc1":
        return one.record == other.record
    return with_level(one.record, _ANY_LEVEL) == with_level(other.record, _ANY_LEVEL)


def _stages(archive: Archive) -> Iterator[tuple[range, list[int]]]:
    """Frames, and offsets of exact boxes, of each layer."""
    index = cast(loader.Index, archive.index)  # or nobody would know its root
    frame = place = 0
    for frames, boxes in index.stages:
        offsets = [at for at, _ in index.boxes[place : place + boxes]]
        yield range(frame, frame + frames), offsets
        frame, place = frame + frames, place + boxes

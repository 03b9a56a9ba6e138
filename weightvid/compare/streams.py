"""Reels of pictures through a codec of the registry, on one core or on several."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter

from weightvid.codec import pictures, program
from weightvid.codec.pictures import Luma, Stream
from weightvid.codec.program import Program
from weightvid.codec.registry import Coding


@dataclass(frozen=True, slots=True)
class Streams:
    """What coding reels gave: streams of each reel, in order, the seconds and the peak memory."""

    streams: tuple[tuple[Stream, ...], ...]
    seconds: float
    peak_bytes: int | None


@dataclass(frozen=True, slots=True)
class Shown:
    """What decoding gave: pictures of each reel."""

    pictures: list[list[Luma]]
    seconds: float
    peak_bytes: int | None


@dataclass(frozen=True, slots=True)
class Tool:
    """A codec's setting and the program that runs it; None: this process."""

    coding: Coding
    program: Program | None = None

    def encode(self, reels: Sequence[Sequence[Luma]], jobs: int) -> Streams:
        """Code reels; all-intra ones in as many pieces as there are jobs.

        Raises
        ------
        CodecError
        """
        pieces = [piece for reel in reels for piece in self._cut(reel, jobs)]
        counts = [len(self._cut(reel, jobs)) for reel in reels]
        began = perf_counter()
        with ThreadPoolExecutor(jobs, "weightvid-compare") as executor:
            made = list(executor.map(self._encode, pieces))
        seconds = perf_counter() - began
        streams, at = [], 0
        for count in counts:
            streams.append(tuple(stream for stream, _ in made[at : at + count]))
            at += count
        return Streams(tuple(streams), seconds, _peak([peak for _, peak in made], jobs))

    def decode(
        self, streams: Sequence[Sequence[Stream]], shapes: Sequence[tuple[int, int]], jobs: int
    ) -> Shown:
        """Decode the streams of reels whose pictures have these heights and widths.

        Raises
        ------
        CodecError
        """
        pieces = [
            (piece, shape)
            for reel, shape in zip(streams, shapes, strict=True)
            for stream in reel
            for piece in self._split(stream, jobs)
        ]
        counts = [sum(len(self._split(s, jobs)) for s in reel) for reel in streams]
        began = perf_counter()
        with ThreadPoolExecutor(jobs, "weightvid-compare") as executor:
            made = list(executor.map(self._decode, pieces))
        seconds = perf_counter() - began
        shown, at = [], 0
        for count in counts:
            shown.append([luma for frames, _ in made[at : at + count] for luma in frames])
            at += count
        return Shown(shown, seconds, _peak([peak for _, peak in made], jobs))

    def _cut(self, frames: Sequence[Luma], jobs: int) -> list[Sequence[Luma]]:
        if self.coding.inter or jobs == 1:
            return [frames]
        size = -(-len(frames) // jobs)
        return [frames[at : at + size] for at in range(0, len(frames), size)]

    def _split(self, stream: Stream, jobs: int) -> list[Stream]:
        count = len(stream.packets)
        if self.coding.inter or jobs == 1 or count == 1:
            return [stream]
        size = -(-count // jobs)
        return [
            Stream(stream.packets[at : at + size], stream.extradata) for at in range(0, count, size)
        ]

    def _encode(self, frames: Sequence[Luma]) -> tuple[Stream, int | None]:
        if self.program is not None:
            return program.encode(frames, self.coding, self.program)
        return pictures.encode(frames, self.coding), None

    def _decode(self, piece: tuple[Stream, tuple[int, int]]) -> tuple[list[Luma], int | None]:
        stream, shape = piece
        if self.program is not None and self.coding.codec.muxer != "nut":
            return program.decode(stream, self.coding, self.program, shape)
        return pictures.decode(stream, self.coding, shape), None


def _peak(peaks: Sequence[int | None], jobs: int) -> int | None:
    """Memory of programs, as many at a time as there are jobs."""
    known = sorted((peak for peak in peaks if peak is not None), reverse=True)
    return sum(known[:jobs]) if known else None

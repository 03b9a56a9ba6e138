"""Reads archives that were changed and sealed again: each gives a result, or an error of ours.

Checksums, deflate streams, sizes and the index are right, so that what lies behind them is reached:

    python tools/fuzz.py --mutations 100000 --seed 7       (or --seconds 20)

What raises anything else, warns, takes 2 seconds of the processor or a gigabyte ends the run;
``--first N --mutations 1`` repeats it. Linux only, for the limit of memory.
"""

from __future__ import annotations

import argparse
import io
import resource
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any, NamedTuple, cast
from unittest.mock import patch

import numpy as np

from weightvid import container, loader
from weightvid.checkpoint import from_mapping
from weightvid.errors import WeightvidError
from weightvid.levels.frames import FrameSize
from weightvid.loader import FRAME_UUID, INDEX_UUID, open_archive
from weightvid.pack import PackOptions, pack_checkpoint
from weightvid.spec import SideFile

CPU_SECONDS, MEMORY_BYTES = 2.0, 1 << 30
RECORD_BOXES = {loader.HEADER_UUID, FRAME_UUID, loader.EXACT_UUID, INDEX_UUID}
NUMBERS = 0, 1, 2, 3, 63, 64, 127, 128, 255, 1024, 1 << 16, 1 << 20, 1 << 24, 1 << 38, (1 << 64) - 1
Record = tuple[int, bytes]


class Box(NamedTuple):
    """A box: its type (16 bytes of ours), and what is behind it; of the index without its size."""

    kind: bytes
    payload: bytes


def split_boxes(data: bytes) -> list[Box]:
    """Boxes of an archive."""
    source, boxes = loader.Source(io.BytesIO(data)), []
    while (box := Box(*source.box())).kind:
        boxes.append(Box(box.kind, box.payload[:-4]) if box.kind == INDEX_UUID else box)
    return boxes


def join_boxes(boxes: Sequence[Box], indexed: bool = True) -> bytes:
    """The archive of some boxes; ``indexed``: the index says how large the frames are."""
    made, frames = b"", [0]

    def resized(records: list[Record]) -> list[Record]:
        sizes = b"".join(map(container.uint, [len(frames) - 1, *frames[1:]]))
        return [(kind, sizes if kind == loader.FRAMES else data) for kind, data in records]

    for kind, payload in boxes:
        box = container.box(kind, payload)
        if kind == INDEX_UUID:
            with suppress(WeightvidError):
                payload = change_records(payload, resized) if indexed else payload  # noqa: PLW2901
            box = container.box(kind, payload, (28 + len(payload)).to_bytes(4, "little"))
        frames += [0] * (kind == FRAME_UUID)
        frames[-1] += len(box) * (kind in (FRAME_UUID, b"moof", b"mdat"))
        made += box
    return made


def change_records(payload: bytes, change: Callable[[list[Record]], list[Record]]) -> bytes:
    """Payload of a box of ours with other records."""
    fields, found = loader.Fields(loader.open_body(payload, "a box"), "a box"), []
    while fields.at < len(fields.data):
        found.append((fields.uint(1 << 62), fields.take(fields.uint())))
    return container.close_body(*(container.record(kind, data) for kind, data in change(found)))


def seeds() -> list[bytes]:
    """Archives that hold every record: transforms, trellis, row steps, escapes, exact tensors."""
    random = np.random.default_rng(1)

    def normal(*shape: int) -> Any:
        return (random.standard_normal(shape) * 0.05).astype(np.float32)

    outlier, scaled = normal(70, 90), normal(60, 60) * np.exp2(random.uniform(-9, 9, (60, 1)))
    outlier[3, 4] = 50
    arrays = {
        "conv": normal(20, 12, 3, 3), "line": normal(24, 8, 5), "wide": normal(220, 300),
        "outlier": outlier, "scaled": scaled.astype("f4"), "half": normal(40, 50).astype("f2"),
        "double": normal(30, 20).astype("f8"), "bias": normal(33), "count": np.array(3),
        "empty": normal(0, 4), "mask": np.array([True, False]), "bytes": np.arange(50, dtype="u1"),
    }  # fmt: skip
    arrays["tied"] = arrays["conv"]
    files = SideFile("config.json", b"{}"), SideFile("vocab.txt", b"a\nb\n" * 50)
    made, frames = [], patch("weightvid.pack.choose_frame_size", lambda _: FrameSize(192, 192))
    with tempfile.TemporaryDirectory() as folder, frames:
        for fidelity in ("outputs", "integers"):
            path = Path(folder) / f"{fidelity}.mp4"
            reader = from_mapping(arrays, metadata={"format": "pt"})
            reader.contents = replace(reader.contents, files=files)
            pack_checkpoint(reader, path, PackOptions(fidelity=fidelity, jobs=1))
            made.append(path.read_bytes())
    return made


def mutate(data: bytes, random: Random) -> bytes:
    boxes = split_boxes(data)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        if random.random() < 0.1:
            mutate_list(boxes, random)
        ours = [n for n, box in enumerate(boxes) if box.kind in RECORD_BOXES]
        at = random.choice(ours if ours and random.random() < 0.8 else range(len(boxes)))
        kind, payload = boxes[at]
        try:
            payload = change_records(payload, partial(mutate_records, random=random))
        except WeightvidError:  # no box of ours, or one that was changed before
            payload = mutate_bytes(payload, random)
        boxes[at] = Box(kind, payload)
    made = join_boxes(boxes, random.random() < 0.7)
    return made[: random.randrange(len(made))] if random.random() < 0.05 else made


def mutate_records(records: list[Record], random: Random) -> list[Record]:
    """Change one record in its fields or its type; or have one more, or one less."""
    if not records or random.random() < 0.15:
        return mutate_list(records, random)
    at = random.randrange(len(records))
    kind = random.choice((*range(80), 1 << 30)) if random.random() < 0.05 else records[at][0]
    records[at] = kind, mutate_bytes(records[at][1], random)
    return records


def mutate_list(items: list[Any], random: Random) -> list[Any]:
    """Drop, repeat or swap entries."""
    if len(items) > 1:
        one, other = random.choices(range(len(items)), k=2)
        choice = ([], [items[one], items[other]], [items[other]])[random.randrange(3)]
        items[other] = items[one]
        items[one : one + 1] = choice
    return items


def mutate_bytes(data: bytes, random: Random) -> bytes:
    """Bytes changed, taken out, put in, cut off, or numbers written over them."""
    at = random.randrange(min(len(data) + 1, random.choice((16, len(data) + 1))))
    new = container.uint(random.choice(NUMBERS))
    if random.random() < 0.5:
        new = random.randbytes(random.randrange(9))
    elif random.random() < 0.5 and at < len(data):
        new = bytes(((data[at] + random.choice((-1, 1, 64, 128))) % 256,))
    ends = at, at + len(new), at + len(new), at + random.randrange(9), len(data)
    return data[:at] + new + data[random.choice(ends) :]


def read_all(data: bytes, random: Random) -> int:
    """Read an archive by every public entry; how many calls had a result."""
    results = 0
    for source in (SimpleNamespace(read=io.BytesIO(data).read), io.BytesIO(data)):
        with suppress(WeightvidError):
            archive = open_archive(cast(Any, source), check_tensors=random.random() < 0.5)
            frames = range(len(archive.index.frames) if archive.index else 1)
            calls: list[Callable[[], Any]] = [partial(lambda a: dict(a.items()), archive)]
            for name in random.sample(list(archive)[:99], min(2, len(archive))):
                calls += [partial(get, name) for get in (archive.levels, archive.info, archive.get)]
            calls += [partial(archive.read_file, file.path) for file in archive.header.files[:2]]
            calls += [partial(lambda a, numbers: list(a.frames(numbers)), archive, frames)]
            for call in calls:
                with suppress(WeightvidError):
                    call()
                    results += 1
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description="mutate archives and read them")
    for name, default in (("mutations", 1 << 62), ("seconds", 1e9), ("seed", 1), ("first", 0)):
        parser.add_argument(f"--{name}", type=type(default), default=default)
    options = parser.parse_args()
    archives, began, number, results, slowest = seeds(), time.monotonic(), options.first, 0, 0.0
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES,) * 2)
    warnings.simplefilter("error")
    end = options.first + options.mutations
    while number < end and time.monotonic() - began < options.seconds:
        random, before = Random(f"{options.seed} {number}"), time.process_time()
        try:
            results += read_all(mutate(random.choice(archives), random), random)
        except BaseException as error:
            error.add_note(f"mutation {number} of seed {options.seed}")
            raise
        slowest, number = max(slowest, time.process_time() - before), number + 1
        if slowest > CPU_SECONDS:
            raise SystemExit(f"mutation {number - 1} took {slowest:.1f} s of the processor")
    print(f"{number - options.first} mutations, {results} results, {slowest:.2f} s at most")


if __name__ == "__main__":
    main()

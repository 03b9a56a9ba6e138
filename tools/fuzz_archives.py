"""Archives of every kind, and how they are changed and sealed again, for `fuzz.py` and the tests.

Checksums, deflate streams, sizes and the index are right, so that what lies behind them is reached.
"""

from __future__ import annotations

import io
import tempfile
import zlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
from fuzz_checkpoints import (
    checkpoint_seeds,
    mutate_bytes,
    mutate_message,
    mutate_text,
    write_checkpoint,
)

from weightvid import container, loader, repair
from weightvid.checkpoint import from_mapping, open_checkpoint
from weightvid.checkpoint.base import CheckpointReader
from weightvid.errors import WeightvidError
from weightvid.levels.frames import FrameSize
from weightvid.loader import FILE_UUID, FRAME_UUID, INDEX_UUID
from weightvid.pack import PackOptions, pack_checkpoint
from weightvid.sign import SIGN_UUID, sign_archive
from weightvid.spec import SideFile
from weightvid.unpack import unpack_archive
from weightvid.video import Video

RECORD_BOXES = {loader.HEADER_UUID, FRAME_UUID, loader.EXACT_UUID, INDEX_UUID, SIGN_UUID}
WITH_GRAPHS = "m.gguf", "m.onnx", "m.tflite", "m.mlpackage"
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
    """The archive of some boxes; ``indexed``: the index says how large frames and boxes are."""
    made, frames, exact = b"", [0], list[int]()

    def resized(records: list[Record]) -> list[Record]:
        found = dict(records)
        found[loader.FRAMES] = b"".join(map(container.uint, [len(frames) - 1, *frames[1:]]))
        listed = loader.Fields(found.get(loader.BOXES, b"\0"), "")
        entries = [container.uint(listed.uint())]
        for size in exact:
            _, count = listed.uint(), listed.uint()
            entries += map(container.uint, [size, count, *(listed.uint() for _ in range(count))])
        found[loader.BOXES] = b"".join(entries) + listed.data[listed.at :]
        return [(kind, found[kind]) for kind, _ in records]

    for kind, payload in boxes:
        box = container.box(kind, payload)
        if kind == INDEX_UUID:
            with suppress(WeightvidError):
                payload = change_records(payload, resized) if indexed else payload  # noqa: PLW2901
            box = container.box(kind, payload, (28 + len(payload)).to_bytes(4, "little"))
        frames += [0] * (kind == FRAME_UUID)
        frames[-1] += len(box) * (kind in (FRAME_UUID, b"moof", b"mdat"))
        exact += [len(box)] * (kind == loader.EXACT_UUID)
        made += box
    return made


def change_records(payload: bytes, change: Callable[[list[Record]], list[Record]]) -> bytes:
    """Payload of a box of ours with other records."""
    fields, found = loader.Fields(loader.open_body(payload, "a box"), "a box"), []
    while fields.at < len(fields.data):
        found.append((fields.uint(1 << 62), fields.take(fields.uint())))
    # Deflating is the slowest part of a mutation, and of no interest.
    return container.stored_body(*(container.record(kind, data) for kind, data in change(found)))


@dataclass(frozen=True)
class Seed:
    """An archive, in its boxes; of an update also the paths of what it is to."""

    kind: str
    boxes: list[Box]
    base: tuple[Path, ...] = ()


def model(rows: int = 220) -> dict[str, Any]:
    """Tensors for which a packer writes every record; ``rows`` of the largest one."""
    random = np.random.default_rng(1)

    def normal(*shape: int) -> Any:
        return (random.standard_normal(shape) * 0.05).astype(np.float32)

    outlier, scaled = normal(70, 90), normal(60, 60) * np.exp2(random.uniform(-9, 9, (60, 1)))
    outlier[3, 4] = 50
    arrays = {
        "conv": normal(20, 12, 3, 3), "line": normal(24, 8, 5), "wide": normal(rows, 300),
        "outlier": outlier, "scaled": scaled.astype("f4"), "half": normal(40, 50).astype("f2"),
        "double": normal(30, 20).astype("f8"), "bias": normal(33), "count": np.array(3),
        "empty": normal(0, 4), "mask": np.array([True, False]), "bytes": np.arange(50, dtype="u1"),
    }  # fmt: skip
    arrays["tied"] = arrays["conv"]
    return arrays


def checkpoint(arrays: dict[str, Any]) -> CheckpointReader:
    """Tensors with side files and metadata."""
    reader = from_mapping(arrays, metadata={"format": "pt"})
    files = SideFile("config.json", b"{}"), SideFile("vocab.txt", b"a\nb\n" * 50)
    reader.contents = replace(reader.contents, files=files)
    return reader


def pack(reader: CheckpointReader, path: Path, options: PackOptions) -> bytes:
    """An archive of small pictures."""
    with ExitStack() as stack:
        for module in ("pack", "layers"):
            name = f"weightvid.{module}.choose_frame_size"
            stack.enter_context(patch(name, lambda *_: FrameSize(192, 192)))
        pack_checkpoint(reader, path, options)
    return path.read_bytes()


def sample(options: PackOptions | None = None) -> bytes:
    """An archive of four pictures, and all kinds of records."""
    with tempfile.TemporaryDirectory() as folder, checkpoint(model()) as reader:
        return pack(reader, Path(folder, "m.mp4"), options or PackOptions(jobs=1))


def seeds(folder: Path) -> list[Seed]:
    """Archives of every kind; the first, as a checkpoint, and a key are left in the folder."""
    arrays, made = model(60), list[Seed]()
    later = changed(arrays)
    few, fewer = (
        {name: each[name] for name in ("conv", "half", "bias", "count", "tied")}
        for each in (arrays, later)
    )
    few["brain"] = arrays["outlier"].view("u2")[:, 1::2].copy()
    small = partial(from_mapping, few, dtypes={"brain": "BF16"})

    def add(kind: str, reader: Any, *base: Path, **options: Any) -> Path:
        path = folder / f"{len(made)}.mp4"
        data = pack(reader, path, PackOptions(jobs=1, base=base, **options))
        made.append(Seed(kind, split_boxes(data), base))
        return path

    first = add("transform", checkpoint(arrays))
    second = add("update", from_mapping(later), first)
    add("update", from_mapping(changed(later)), first, second)
    add("integers", from_mapping(arrays), fidelity="integers")
    add("parity", from_mapping(arrays), parity=0.05, prune=0.5)
    add("lossless", small(), lossless=True)
    add("av1", small(), video=Video("svt-av1"))
    add("update", from_mapping(fewer), add("h264", small(), video=Video("x264")))
    add("update", from_mapping(fewer), add("layers", small(), layers=3))
    # Side files that are not deflated keep their length when they are changed.
    with patch("weightvid.writer.close_body", container.stored_body):
        for kind, files in checkpoint_seeds():
            if kind in WITH_GRAPHS:
                write_checkpoint(folder / kind, files)
                with open_checkpoint(folder / kind) as reader:
                    add(kind, reader)
    unpack_archive(first, folder / "source.safetensors")
    write_keys(folder)
    sign_archive(first, folder / "key", folder / "signed.mp4")
    return [*made, Seed("signed", split_boxes((folder / "signed.mp4").read_bytes()))]


def changed(arrays: dict[str, Any]) -> dict[str, Any]:
    """A later version of a model: some tensors differ a little, one altogether, one is new."""
    later = dict(arrays)
    later["conv"] = later["tied"] = arrays["conv"] * np.float32(1.01)
    later["bias"], later["new"] = arrays["bias"] + np.float32(0.001), arrays["line"][::-1].copy()
    later["outlier"] = arrays["outlier"][:, ::-1].copy()
    return later


def write_keys(folder: Path) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key, pem = Ed25519PrivateKey.generate(), serialization.Encoding.PEM
    private, public = serialization.PrivateFormat.PKCS8, serialization.PublicFormat
    none = serialization.NoEncryption()
    (folder / "key").write_bytes(key.private_bytes(pem, private, none))
    shared = key.public_key().public_bytes(pem, public.SubjectPublicKeyInfo)
    (folder / "key.pub").write_bytes(shared)


def mutate(boxes: list[Box], random: Random) -> bytes:
    boxes = list(boxes)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        if random.random() < 0.1:
            mutate_list(boxes, random)
        ours = [n for n, (kind, _) in enumerate(boxes) if kind in RECORD_BOXES]
        ours += [n for n, (kind, data) in enumerate(boxes) if kind == FILE_UUID and len(data) > 99]
        at = random.choice(ours if ours and random.random() < 0.8 else range(len(boxes)))
        kind, payload = boxes[at]
        if kind == repair.PARITY_UUID and random.random() < 0.5:
            payload = mutate_seal(payload, random)
        elif kind == FILE_UUID and payload[4] == loader.STORED:
            file, change = payload[9:], random.choice((mutate_bytes, mutate_text, mutate_message))
            payload = container.stored_body(change(file, random)[: len(file)].ljust(len(file)))
        elif kind in RECORD_BOXES and random.random() < 0.03:
            sealed = mutate_bytes(payload[4:], random)  # form, size, deflate stream
            payload = zlib.crc32(sealed).to_bytes(4, "little") + sealed
        else:
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


def mutate_seal(payload: bytes, random: Random) -> bytes:
    """Other fields in both seals of a parity box, with a right CRC-32."""
    size = repair._SEAL.size
    fields = mutate_bytes(payload[2 : 2 + size], random).ljust(size, b"\0")[:size]
    sealed = fields + zlib.crc32(fields).to_bytes(4, "little")
    return payload[:2] + sealed + payload[2 + len(sealed) : -len(sealed)] + sealed

"""Reads archives and checkpoints that were changed and sealed again: a result, or an error of ours.

Checksums, deflate streams, sizes and the index are right, so that what lies behind them is reached.
Archives of every kind (transforms, integers, bit-exact floats, H.264, AV1, layers, updates, parity,
signatures, of models with their graphs) are read by every verb and facade, checkpoints of every
kind by their readers:

    python tools/fuzz.py --mutations 100000 --seed 7       (or --seconds 20; or --kind update)
    python tools/fuzz.py --what checkpoints --seconds 20

What raises anything else, warns, takes 2 seconds of the processor or a gigabyte, or fails and has
changed a file, is told with its number, and the exit status is 1 then; ``--first NUMBER --mutations
1`` repeats it. To be fast, FFmpeg decodes only pictures that are new, and nothing waits for a disk.
Linux only, for the limits.
"""

from __future__ import annotations

import argparse
import io
import os
import resource
import signal
import tempfile
import time
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
from fuzz_checkpoints import (
    Checkpoint,
    checkpoint_seeds,
    count_results,
    mutate_bytes,
    mutate_checkpoint,
    mutate_message,
    mutate_text,
    read_checkpoint,
    write_checkpoint,
)

import weightvid.numpy
import weightvid.torch
from weightvid import container, fetch, loader, repair
from weightvid.archives import open_anywhere
from weightvid.checkpoint import from_mapping, open_checkpoint
from weightvid.checkpoint.base import CheckpointReader
from weightvid.cli.inspect import inspect
from weightvid.errors import WeightvidError
from weightvid.layers import Layering, pack_layers
from weightvid.levels.frames import FrameSize
from weightvid.loader import FILE_UUID, FRAME_UUID, INDEX_UUID, open_archive
from weightvid.pack import PackOptions, pack_checkpoint
from weightvid.preview import preview_archive, preview_kernels
from weightvid.sign import SIGN_UUID, open_signed, sign_archive
from weightvid.spec import SideFile
from weightvid.unpack import UnpackOptions, unpack_archive
from weightvid.update import apply_updates
from weightvid.verify import verify_archive
from weightvid.video import Video

CPU_SECONDS, MEMORY_BYTES = 2.0, 1 << 30
#: so many failures are told at most.
MOST_FAILURES = 10
RECORD_BOXES = {loader.HEADER_UUID, FRAME_UUID, loader.EXACT_UUID, INDEX_UUID, SIGN_UUID}
WITH_GRAPHS = "m.gguf", "m.onnx", "m.tflite", "m.mlpackage"
#: what is unpacked to, and the kind where the name does not say it.
OUTPUTS = "out.safetensors", "out.npz", "out.pt", "out.gguf", "out"
KINDS = {"out-folder": "folder", "out.q8_0": "gguf-q8_0", "out.f32": "gguf-f32"}
#: files that hold what is read, or those that a verb makes one by one.
SCRATCH = "mutated.mp4", "arrived", "pictures", "signed.mp4"
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


def pack(reader: CheckpointReader, path: Path, options: PackOptions, layering: Layering) -> bytes:
    """An archive of small pictures."""
    with ExitStack() as stack:
        for module in ("pack", "layers"):
            name = f"weightvid.{module}.choose_frame_size"
            stack.enter_context(patch(name, lambda *_: FrameSize(192, 192)))
        if layering == Layering():
            pack_checkpoint(reader, path, options)
        else:
            pack_layers(reader, path, layering, options)
    return path.read_bytes()


def sample(options: PackOptions | None = None) -> bytes:
    """An archive of four pictures, and all kinds of records."""
    with tempfile.TemporaryDirectory() as folder, checkpoint(model()) as reader:
        return pack(reader, Path(folder, "m.mp4"), options or PackOptions(jobs=1), Layering())


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

    def add(kind: str, reader: Any, *base: Path, layers: int = 1, **options: Any) -> Path:
        path = folder / f"{len(made)}.mp4"
        data = pack(reader, path, PackOptions(jobs=1, **options), Layering(layers, base))
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


def read_all(data: bytes, seed: Seed, random: Random, folder: Path) -> int:
    """Read an archive by public entries, of which some are chosen; how many calls had a result."""
    source: Any = io.BytesIO(data)
    if random.random() < 0.3:
        source = SimpleNamespace(read=source.read, seekable=lambda: False)
    if random.random() < 0.5:
        return count_results(read_archive(source, seed, random, folder))
    weighted = verbs(data, source, seed, random, folder)
    (verb,) = random.choices(list(weighted), list(weighted.values()))
    return count_results([partial(watch, verb, folder)])


def watch(verb: Callable[[], Any], folder: Path) -> None:
    """Run a verb: no file but its output may change, and where it fails, not that one either."""

    def files() -> set[tuple[str, int, int, int]]:
        with os.scandir(folder) as entries:
            found = {entry.name: entry.stat() for entry in entries}
        return {(name, at.st_ino, at.st_size, at.st_mtime_ns) for name, at in found.items()}

    before, may_change = files(), [*SCRATCH]
    try:
        verb()
        may_change += "made.mp4", "out"
    finally:
        changed = {name for name, *_ in before ^ files() if not name.startswith((*may_change,))}
        if changed:
            raise RuntimeError(f"changed: {sorted(changed)}")


def choose_base(seed: Seed, random: Random, folder: Path) -> tuple[Path, ...]:
    """What an update is to, or sometimes something else."""
    wrong = (), seed.base[::-1], seed.base[:1], (folder / "0.mp4",), (folder / "3.mp4",)
    return seed.base if random.random() < 0.85 else random.choice(wrong)


def verbs(
    data: bytes, source: Any, seed: Seed, random: Random, folder: Path
) -> dict[Callable[[], Any], float]:
    """What the command line and the facades do with an archive, and how often (drawing is slow)."""
    base = choose_base(seed, random, folder)
    output = random.choice((f"out{Path(seed.kind).suffix}", random.choice((*OUTPUTS, *KINDS))))
    unpacked = UnpackOptions(
        kind=KINDS.get(output), partial=random.random() < 0.5, force=True, base=base,
        dtype=random.choice((None, None, "F16")), tensors=random.choice(((), ("conv", "bias"))),
        layers=random.choice((1, 2, 16)),
    )  # fmt: skip
    path = folder / "mutated.mp4"
    key, public, made = folder / "key", folder / "key.pub", folder / "made.mp4"

    def written() -> Path:
        path.write_bytes(data)
        return path

    def read(how: Callable[[Any], Any]) -> None:
        with open_anywhere(source, base=base) as archive:
            how(archive)

    def shown() -> None:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            inspect(str(written()), random.random() < 0.5, random.random() < 0.2,
                    random.random() < 0.4)  # fmt: skip

    def arrived() -> None:
        with (folder / "arrived").open("w+b") as file:
            file.write(data)
            found = fetch._Arrived(file, random.choice((0, len(data))))
            for length in (len(data) // 2, len(data)):
                found.check(length)

    def merged() -> None:
        apply_updates((*base, source)[0], [*base[1:], source], made, force=True)
        if not base or base != seed.base:
            raise RuntimeError("merged with a wrong base")

    def signed() -> None:
        place = path if seed.base or random.random() < 0.5 else folder / "signed.mp4"
        if sign_archive(written(), key, place, force=True) and random.random() < 0.5:
            place = written()
        with open_signed(place, public) as file:
            dict(open_archive(file).items())

    drawn = partial(preview_archive, source, folder / "pictures", scale=1, force=True)
    return {
        shown: 1, arrived: 3, signed: 1, merged: 6 if seed.base else 2,
        lambda: read(partial(verify_archive, against=folder / "source.safetensors")): 1,
        lambda: read(verify_archive): 3,
        lambda: unpack_archive(source, folder / output, unpacked): 6,
        lambda: drawn(tensor=random.choice((None, "*"))): 0.3,
        lambda: preview_kernels(source, folder / "pictures", scale=1, force=True): 0.2,
        lambda: read(weightvid.numpy.load_file): 2,
        partial(weightvid.torch.load_file, source): 1,
        lambda: repair.repair_archive(written(), made, force=True): 2,
    }  # fmt: skip


def read_archive(
    source: Any, seed: Seed, random: Random, folder: Path
) -> Iterator[Callable[[], Any]]:
    """Calls of the loader."""
    with suppress(WeightvidError):
        base = [path.read_bytes() for path in choose_base(seed, random, folder)] or None
        layers, check = random.choice((1, 2, 16)), random.random() < 0.5
        archive = open_archive(source, base=base, layers=layers, check_tensors=check)
        frames = range(len(archive.index.frames) if archive.index else 1)
        calls: list[Callable[[], Any]] = [
            lambda: dict(archive.items()), lambda: list(archive.frames(frames[:99])),
            *(partial(archive.read_file, file.path) for file in archive.header.files[:2]),
        ]  # fmt: skip
        for name in random.sample(list(archive)[:99], min(2, len(archive))):
            calls += (partial(get, name) for get in (archive.levels, archive.info, archive.get))
        yield from random.sample(calls, min(3, len(calls)))


class QuickDecoder(loader.Decoder):
    """FFmpeg for pictures that have not been decoded before."""

    _known: dict[tuple[loader.Track, bytes], Any] = {}  # noqa: RUF012 - of all decoders

    def __init__(self, track: loader.Track, device: str = "software", threads: int = 1) -> None:
        self._track, self._settings, self._begun = track, (device, threads), False

    def decode(self, number: int, data: bytes | None) -> list[tuple[int, Any]]:
        """Numbers and luma of the frames that come out; of known packets at once."""
        if data is None:
            return super().decode(number, None) if self._begun else []
        luma = None if self._begun else self._known.get((self._track, data))
        if luma is not None:
            return [(number, luma)]
        if not self._begun:
            super().__init__(self._track, *self._settings)
            self._begun = True
        return super().decode(number, data)

    def remember(self, data: bytes) -> None:
        """Decode a packet by itself, for later."""
        alone = loader.Decoder(self._track)
        with suppress(WeightvidError):
            ((_, luma),) = *alone.decode(0, data), *alone.decode(0, None)
            self._known[self._track, data] = luma.copy()


def remember(seed: Seed) -> None:
    """Decode the pictures of an archive."""
    track = loader.parse_moov(next(box.payload for box in seed.boxes if box.kind == b"moov"))
    for box in seed.boxes:
        if box.kind == b"mdat":
            QuickDecoder(track).remember(box.payload)


def main() -> None:
    parser = argparse.ArgumentParser(description="mutate archives and checkpoints, and read them")
    for name, default in (("mutations", 1 << 62), ("seconds", 1e9), ("seed", 1), ("first", 0)):
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--what", choices=("archives", "checkpoints"), default="archives")
    parser.add_argument("--kind", default="", help="of archives (update, ...) or checkpoints")
    options, memory = parser.parse_args(), Path("/dev/shm")
    parent = memory if memory.is_dir() else None
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="fuzz-", dir=parent))
        stack.enter_context(patch("tempfile.tempdir", folder))
        stack.enter_context(patch("os.fsync"))
        failures = fuzz(options, Path(folder))
    raise SystemExit(failures > 0)


def fuzz(options: argparse.Namespace, folder: Path) -> int:
    """Read mutations for a while; how many failed."""
    kinds: dict[str, list[Seed | Checkpoint]] = {}
    for seed in seeds(folder) if options.what == "archives" else checkpoint_seeds():
        kinds.setdefault(seed.kind, []).append(seed)
        if isinstance(seed, Seed):
            remember(seed)
    if options.kind and options.kind not in kinds:
        raise SystemExit(f"--kind {options.kind}: choose one of {', '.join(kinds)}")
    chosen = [kinds[options.kind]] if options.kind else list(kinds.values())
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES,) * 2)
    signal.signal(signal.SIGPROF, too_slow)
    warnings.simplefilter("error")
    number, results, failures, slowest = options.first, 0, 0, 0.0
    began, end = time.monotonic(), options.first + options.mutations
    while number < end and time.monotonic() - began < options.seconds:
        random, before = Random(f"{options.seed} {number}"), time.process_time()
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        try:
            results += read_one(random.choice(random.choice(chosen)), random, folder)
        except KeyboardInterrupt:
            raise
        except BaseException:
            signal.setitimer(signal.ITIMER_PROF, 0)
            print(f"mutation {number} of seed {options.seed}:", flush=True)
            traceback.print_exc()
            failures += 1
            if failures == MOST_FAILURES:
                break
        signal.setitimer(signal.ITIMER_PROF, 0)
        slowest, number = max(slowest, time.process_time() - before), number + 1
        if not number % 10_000:
            print(f"{number} mutations, {failures} failures", flush=True)
    print(f"{number - options.first} mutations, {results} results, {slowest:.2f} s at most")
    return failures


def read_one(seed: Seed | Checkpoint, random: Random, folder: Path) -> int:
    """Mutate and read an archive or a checkpoint; how many calls had a result."""
    if isinstance(seed, Checkpoint):
        return read_checkpoint(mutate_checkpoint(seed, random), random, folder)
    decoder = QuickDecoder if random.random() < 0.995 else loader.Decoder
    with patch.object(loader, "Decoder", decoder):
        return read_all(mutate(seed.boxes, random), seed, random, folder)


def too_slow(*_: object) -> None:
    raise TimeoutError(f"more than {CPU_SECONDS:g} s of the processor")


if __name__ == "__main__":
    main()

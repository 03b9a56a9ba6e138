"""Reads archives and checkpoints that were changed and sealed again: a result, or an error of ours.

Checksums, deflate streams, sizes and the index are right, so that what lies behind them is reached;
archives are read by every verb and facade, checkpoints of every kind by their readers:

    python tools/fuzz.py --mutations 100000 --seed 7       (or --seconds 20)
    python tools/fuzz.py --what checkpoints --seconds 20

What raises anything else, warns, takes 2 seconds of the processor or a gigabyte ends the run;
``--first N --mutations 1`` repeats it. Linux only, for the limit of memory.
"""

from __future__ import annotations

import argparse
import io
import re
import resource
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np

import weightvid.numpy
import weightvid.torch
from weightvid import container, loader
from weightvid.checkpoint import create_checkpoint, from_mapping, open_checkpoint
from weightvid.cli.inspect import _row
from weightvid.errors import WeightvidError
from weightvid.inspect import summarize_archive
from weightvid.levels.frames import FrameSize
from weightvid.loader import FRAME_UUID, INDEX_UUID, open_archive
from weightvid.pack import PackOptions, pack_checkpoint
from weightvid.preview import preview_archive
from weightvid.spec import SideFile
from weightvid.unpack import UnpackOptions, unpack_archive
from weightvid.verify import verify_archive

CPU_SECONDS, MEMORY_BYTES = 2.0, 1 << 30
RECORD_BOXES = {loader.HEADER_UUID, FRAME_UUID, loader.EXACT_UUID, INDEX_UUID}
NUMBERS = 0, 1, 2, 3, 63, 64, 127, 128, 255, 1024, 1 << 16, 1 << 20, 1 << 24, 1 << 38, (1 << 64) - 1
SUFFIXES = ".safetensors", ".npz", ".pt", ".gguf", ".onnx", ""
OUTPUTS = None, None, "folder", "gguf-q8_0"
TOKENS = (
    b"0", b"-1", b"1e400", b"18446744073709551616", b"9" * 5000, b"null", b"{}", b"[]", b"[" * 5000,
    b'"../x"', b'"\\ud800"', b'"' + b"n" * 9000 + b'"', b"true", b'"F32"', b'"I64"', b'"BOOL"',
)  # fmt: skip
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
        for number, options in enumerate((
            PackOptions(jobs=1), PackOptions(fidelity="integers", jobs=1),
            PackOptions(parity=0.05, prune=0.5, jobs=1),
        )):  # fmt: skip
            path = Path(folder) / f"{number}.mp4"
            reader = from_mapping(arrays, metadata={"format": "pt"})
            reader.contents = replace(reader.contents, files=files)
            pack_checkpoint(reader, path, options)
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


def read_all(data: bytes, random: Random, folder: Path) -> int:
    """Read an archive by public entries, of which some are chosen; how many calls had a result."""
    source: Any = io.BytesIO(data)
    if random.random() < 0.3:
        source = SimpleNamespace(read=source.read, seekable=lambda: False)
    if random.random() < 0.5:
        return count_results(read_archive(source, random))
    unpacked = UnpackOptions(
        kind=random.choice(OUTPUTS), partial=random.random() < 0.5, force=True,
        dtype=random.choice((None, None, "F16")), tensors=random.choice(((), ("conv", "b*"))),
    )  # fmt: skip
    summary = partial(summarize_archive, source, details=random.choice((None, True)))
    drawn = partial(preview_archive, tensor=random.choice((None, "*")), scale=1, force=True)
    verbs: list[Callable[[], Any]] = [
        lambda: list(map(_row, summary().tensors)),
        partial(verify_archive, source, against=folder / "source.safetensors"),
        partial(verify_archive, source),
        partial(unpack_archive, source, folder / f"out{random.choice(SUFFIXES)}", unpacked),
        partial(drawn, source, folder / "pictures"),
        partial(weightvid.numpy.load_file, source),
        partial(weightvid.torch.load_file, source),
    ]
    return count_results([random.choice(verbs)])


def read_archive(source: Any, random: Random) -> Iterator[Callable[[], Any]]:
    """Calls of the loader."""
    with suppress(WeightvidError):
        archive = open_archive(source, check_tensors=random.random() < 0.5)
        frames = range(len(archive.index.frames) if archive.index else 1)
        yield lambda: dict(archive.items())
        for name in random.sample(list(archive)[:99], min(2, len(archive))):
            for get in (archive.levels, archive.info, archive.get):
                yield partial(get, name)
        for file in archive.header.files[:2]:
            yield partial(archive.read_file, file.path)
        yield lambda: list(archive.frames(frames))


def count_results(calls: Iterable[Callable[[], Any]]) -> int:
    """How many calls end in something else than an error of ours."""
    results = 0
    for call in calls:
        with suppress(WeightvidError):
            call()
            results += 1
    return results


# --- checkpoints


def checkpoint_seeds() -> list[tuple[str, dict[str, bytes]]]:
    """One checkpoint of each kind: its name, and its files."""
    random = np.random.default_rng(1)
    arrays = {
        "a.weight": random.standard_normal((5, 32)).astype("f4"), "b": np.arange(6, dtype="f2"),
        "c": np.array(3), "d": np.zeros((0, 4), "f4"), "e": np.array([True, False]),
    }  # fmt: skip
    arrays["tied"] = arrays["a.weight"]
    found = []
    with tempfile.TemporaryDirectory() as named, from_mapping(arrays) as reader:
        for name in ("m.safetensors", "m.npz", "m.pt", "m.gguf", "folder"):
            if name == "m.gguf":
                reader = from_mapping({"w": arrays["a.weight"], "b": arrays["b"]})  # noqa: PLW2901
            path = Path(named, name)
            shards = patch("weightvid.checkpoint.folder.SHARD_BYTES", 600)
            with shards, create_checkpoint(path, reader.contents) as writer:
                for spec in reader.contents.tensors:
                    writer.write(spec.name, reader.read(spec.name))
        Path(named, "m.onnx").write_bytes(onnx_model(arrays["a.weight"]))
        Path(named, "old.bin").write_bytes(legacy_torch(arrays["a.weight"]))
        for path in sorted(Path(named).iterdir()):
            files = [path] if path.is_file() else sorted(path.iterdir())
            found.append((path.name, {file.name: file.read_bytes() for file in files}))
    return found


def onnx_model(weight: Any) -> bytes:
    import onnx
    from onnx import helper, numpy_helper

    value = helper.make_tensor_value_info
    then = helper.make_graph(
        [helper.make_node("Add", ["x", "inner"], ["y"])], "then", [],
        [value("y", 1, [5, 32])], [numpy_helper.from_array(weight, "inner")],
    )  # fmt: skip
    choice = helper.make_node("If", ["c"], ["z"], then_branch=then, else_branch=then)
    inputs = [value("x", 1, [5, 32]), value("c", 9, [])]
    outside = helper.make_tensor("far", 1, [4], np.zeros(4, "f4").tobytes(), raw=True)
    onnx.external_data_helper.set_external_data(outside, "w.bin", 0, 16)
    outside.ClearField("raw_data")
    first = [numpy_helper.from_array(weight, "w"), helper.make_tensor("f", 1, [2], [1.0, 2.0])]
    graph = helper.make_graph([choice], "g", inputs, [value("z", 1, [5, 32])], [*first, outside])
    made: bytes = helper.make_model(graph, ir_version=8).SerializeToString()
    return made


def legacy_torch(weight: Any) -> bytes:
    import torch

    made = io.BytesIO()
    state = {"model": {"w": torch.from_numpy(weight)}, "epoch": 3}
    torch.save(state, made, _use_new_zipfile_serialization=False, pickle_protocol=4)
    return made.getvalue()


def mutate_checkpoint(files: dict[str, bytes], random: Random) -> dict[str, bytes]:
    """Change one file; members of zip archives and headers keep right checksums and lengths."""
    name = random.choice(list(files))
    data = files[name]
    for _ in range(random.choice((1, 1, 2, 4))):
        if data.startswith(b"PK") and random.random() < 0.8:
            data = change_zip(data, random)
        elif name.endswith(".safetensors") and random.random() < 0.8:
            length = int.from_bytes(data[:8], "little")
            header = mutate_text(data[8 : 8 + length], random)
            data = len(header).to_bytes(8, "little") + header + data[8 + length :]
        elif name.endswith(".json"):
            data = mutate_text(data, random)
        else:
            data = mutate_bytes(data, random)
    return files | {name: data}


def change_zip(data: bytes, random: Random) -> bytes:
    made = io.BytesIO()
    with suppress(Exception), zipfile.ZipFile(io.BytesIO(data)) as source:
        members = [(info.filename, source.read(info)) for info in source.infolist()]
        at = random.randrange(len(members))
        # The head tells what the rest means.
        members[at] = members[at][0], mutate_bytes(members[at][1], random)
        method = random.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
        with zipfile.ZipFile(made, "w", method) as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name, content in members:
                archive.writestr(name, content)
        return made.getvalue()
    return mutate_bytes(data, random)


def mutate_text(text: bytes, random: Random) -> bytes:
    """Put one token, or some bytes, in the place of another."""
    if random.random() < 0.3:
        return mutate_bytes(text, random)
    tokens = re.findall(rb'"[^"]*"|[\w.-]+|.', text)
    new = random.choice((*TOKENS, random.choice(tokens or [b"0"])))
    if tokens:
        tokens[random.randrange(len(tokens))] = new
    return b"".join(tokens)


def read_checkpoint(name: str, files: dict[str, bytes], folder: Path) -> int:
    """Read every tensor of a checkpoint; 1 if that ends in a result."""
    target = folder / name
    if name == "folder":
        target.mkdir(exist_ok=True)
    for file, data in files.items():
        (target / file if name == "folder" else target).write_bytes(data)
    (folder / "w.bin").write_bytes(bytes(16))

    def read() -> None:
        with open_checkpoint(target) as reader:
            for tensor, spec in reader.contents.rows():
                reader.read(tensor)
                reader.read_range(tensor, spec.size // 2, spec.size - spec.size // 2)

    return count_results([read])


def main() -> None:
    parser = argparse.ArgumentParser(description="mutate archives and checkpoints, and read them")
    for name, default in (("mutations", 1 << 62), ("seconds", 1e9), ("seed", 1), ("first", 0)):
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--what", choices=("archives", "checkpoints"), default="archives")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        fuzz(options, Path(folder))


def fuzz(options: argparse.Namespace, folder: Path) -> None:
    archives, models = seeds(), checkpoint_seeds()
    unpack_archive(io.BytesIO(archives[0]), folder / "source.safetensors")
    began, number, results, slowest = time.monotonic(), options.first, 0, 0.0
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES,) * 2)
    warnings.simplefilter("error")
    end = options.first + options.mutations
    while number < end and time.monotonic() - began < options.seconds:
        random, before = Random(f"{options.seed} {number}"), time.process_time()
        try:
            if options.what == "archives":
                results += read_all(mutate(random.choice(archives), random), random, folder)
            else:
                name, files = random.choice(models)
                results += read_checkpoint(name, mutate_checkpoint(files, random), folder)
        except BaseException as error:
            error.add_note(f"mutation {number} of seed {options.seed}")
            raise
        slowest, number = max(slowest, time.process_time() - before), number + 1
        if slowest > CPU_SECONDS:
            raise SystemExit(f"mutation {number - 1} took {slowest:.1f} s of the processor")
    print(f"{number - options.first} mutations, {results} results, {slowest:.2f} s at most")


if __name__ == "__main__":
    main()

"""Archives as two readers see them: the package's, and one written from FORMAT.md alone."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from independent import sources
from independent.reader import EXACT, Archive, body_of, children, records

from weightvid import loader
from weightvid.checkpoint import from_mapping
from weightvid.loader import open_archive
from weightvid.pack import PackOptions, pack_checkpoint
from weightvid.video import Video

#: what the archives of this file must hold between them for the comparison to mean something.
FEATURES = {
    *("uniform", "trellis", "frequency steps", "row steps", "energies", "escapes", "untransformed"),
    *("1 kernel axes", "2 kernel axes", "3 kernel axes", "several frames", "several parts"),
    *("form 0", "form 1", "aliases", "side files", "metadata", "hvc1", "av01", "avc1"),
    *("planes", "floats"),
}
seen: set[str] = set()


def compare(path: Path) -> None:
    """Read an archive four ways; every byte must be the same."""
    with path.open("rb") as file, open_archive(path) as ours:
        random, streaming = Archive(file), Archive(io.BytesIO(path.read_bytes()))
        streamed = dict(streaming.stream())
        header = random.header
        assert [tuple(one) for one in header.tensors] == [tuple(t) for t in ours.header.tensors]
        assert (dict(header.aliases), header.metadata) == (
            ours.header.aliases,
            ours.header.metadata,
        )
        assert {one: ours.read_file(one) for one in random.files} == random.files
        stream = {spec.name: array.tobytes() for spec, array in ours.stored_items()}
        assert stream == streamed
        assert sorted(stream) == sorted(random.names)
        for name in ours:
            assert random.read(name) == ours.stored(name).tobytes(), name
            note(ours.info(name))
        assert {random.read(a) == streamed[header.tensors[n].name] for a, n in header.aliases} <= {
            True
        }
    seen.update(name for name, has in (
        ("aliases", header.aliases), ("side files", random.files), ("metadata", header.metadata),
        ("several frames", len(streaming.lumas) > 1),
    ) if has)  # fmt: skip
    seen.add(ours.track.entry.decode())
    own = [box for box in children(path.read_bytes()) if box.kind.startswith(b"weightvid")]
    seen.update(f"form {box.payload[4]}" for box in own)
    for box in own:
        found = records(body_of(box.payload), 48, 50, 54) if box.kind == EXACT else {}
        seen.update(name for name, kind in (("planes", 50), ("floats", 54)) if found.get(kind))


def note(info: loader.TensorInfo) -> None:
    for part in info.parts:
        seen.add(("uniform", "trellis")[part.method])
        seen.add(f"{len(part.bases)} kernel axes" if part.bases else "untransformed")
        for name in ("frequency_steps", "row_steps", "energies", "escapes"):
            seen.update({name.replace("_", " ")} if getattr(part, name) is not None else ())
    seen.update({"several parts"} if len(info.parts) > 1 else ())


def test_digits(tmp_path: Path, digits_dir: Path) -> None:
    pack_checkpoint(digits_dir / "digits_cnn.safetensors", tmp_path / "a.mp4", PackOptions(jobs=1))
    compare(tmp_path / "a.mp4")


@pytest.mark.parametrize(
    "options",
    [
        PackOptions(),
        PackOptions(recipe="small", fidelity="weights", video=Video("svt-av1")),
        PackOptions(recipe="fine", fidelity="integers", video=Video("x264")),
        PackOptions(step_factor=0.002, keep=("conv1d",)),
        PackOptions(step_factor=0.002, fidelity="integers"),
        PackOptions(video=Video(qp=14)),
        PackOptions(video=Video("svt-av1", qp=20)),
        PackOptions(video=Video("x264", qp=20)),
    ],
    ids=str,
)
@pytest.mark.parametrize("make", [sources.kernels, sources.hard])
def test_packed(tmp_path: Path, make: Callable[[], sources.Arrays], options: PackOptions) -> None:
    with sources.small_frames():
        pack_checkpoint(
            sources.safetensors(tmp_path / "m.safetensors", make()), tmp_path / "a.mp4", options
        )
    compare(tmp_path / "a.mp4")


def test_mapping(tmp_path: Path) -> None:
    with from_mapping(sources.typed(), dtypes=sources.TYPED, metadata={"key": "ü\ud801"}) as reader:
        pack_checkpoint(reader, tmp_path / "a.mp4", PackOptions())
    compare(tmp_path / "a.mp4")


def test_folder_and_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weightvid.levels.code.PART_WEIGHTS", 3000)
    monkeypatch.setattr("weightvid.writer.EXACT_BOX_BYTES", 500)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"layers": 2}')
    (tmp_path / "model" / "vocab.txt").write_text("word\n" * 500)
    sources.safetensors(tmp_path / "model" / "model.safetensors", sources.kernels())
    with sources.small_frames():
        pack_checkpoint(tmp_path / "model", tmp_path / "a.mp4", PackOptions(fidelity="weights"))
    compare(tmp_path / "a.mp4")


@pytest.mark.parametrize("box_bytes", [2**22, 3000])
def test_lossless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, box_bytes: int) -> None:
    monkeypatch.setattr("weightvid.writer.EXACT_BOX_BYTES", box_bytes)
    arrays = sources.typed() | sources.hard()
    arrays["single"], arrays["zeros"] = np.full(1, -0.0, "f4"), np.zeros((7, 50), "f4")
    arrays["half"] = sources.normal(30, 30, 40, kind="f2") * np.float16(2.0**-10)
    for bits in (3, 7, 8, 12, 15, 16, 20, 23):  # zero bits at the end of all mantissas
        cut = sources.normal(31, 20, 30).view(np.uint32) >> bits << bits
        arrays[f"cut.{bits}"] = cut.view(np.float32)
    arrays["any.F32"] = np.frombuffer(np.random.default_rng(32).bytes(4000), np.float32)
    arrays["any.F16"] = np.frombuffer(np.random.default_rng(33).bytes(4000), np.float16)
    arrays["any.BF16"] = np.frombuffer(np.random.default_rng(34).bytes(4000), np.uint16)
    with from_mapping(arrays, dtypes=sources.TYPED | {"any.BF16": "BF16"}) as reader:
        pack_checkpoint(reader, tmp_path / "a.mp4", PackOptions(lossless=True))
    compare(tmp_path / "a.mp4")
    with (tmp_path / "a.mp4").open("rb") as file:
        read = Archive(file).read
        assert all(read(name) == array.tobytes() for name, array in arrays.items())


@pytest.mark.parametrize("seed", range(6))
def test_any_part(tmp_path: Path, seed: int) -> None:
    sources.write_random(tmp_path / "a.mp4", seed)
    compare(tmp_path / "a.mp4")


def test_features() -> None:
    if len(seen) > 1:
        assert seen >= FEATURES

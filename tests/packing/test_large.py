"""Tensors larger than memory: block by block, with the same result."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from archives import normal, small_frames
from hypothesis import given
from hypothesis import strategies as st

from weightvid.checkpoint import create_checkpoint, from_mapping, open_checkpoint
from weightvid.errors import FormatError, OutputError
from weightvid.loader import open_archive
from weightvid.loader.stream import Spill
from weightvid.pack import PackOptions, pack_checkpoint
from weightvid.packing.layout import Magnitudes, choose_layout, layout_for
from weightvid.scratch import Scratch
from weightvid.tile import EnergyOrder, to_sequence
from weightvid.tile.blocks import BlockOrder
from weightvid.unpack import UnpackOptions, unpack_archive


@pytest.fixture
def tiny_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is small any more: blocks of few weights, and rooms on disk."""
    monkeypatch.setattr("weightvid.scratch.MEMORY_BYTES", 1 << 15)
    monkeypatch.setattr("weightvid.loader.assemble.STREAMED_ELEMENTS", 1 << 12)
    monkeypatch.setattr("weightvid.loader.stream._PART_ELEMENTS", 1 << 12)
    monkeypatch.setattr("weightvid.tile.blocks.BLOCK_LEVELS", 1 << 14)


@st.composite
def matrices(draw: st.DrawFn) -> tuple[np.ndarray[Any, Any], EnergyOrder | None]:
    rows, kernels, kernel = draw(st.integers(1, 200)), draw(st.integers(1, 12)), draw(
        st.sampled_from((1, 3))
    )  # fmt: skip
    random = np.random.default_rng(draw(st.integers(0, 99)))
    levels = random.integers(-127, 128, (rows, kernels * kernel)).astype(np.int8)
    if draw(st.booleans()):
        return levels, None
    most = draw(st.integers(0, 40))
    energies = [random.integers(0, most + 1, n).astype(np.uint8) for n in (rows, kernels)]
    return levels, EnergyOrder(*energies)


@given(matrices(), st.sampled_from((0, 1 << 20)))
def test_block_by_block_is_the_whole(
    made: tuple[np.ndarray[Any, Any], EnergyOrder | None], memory: int
) -> None:
    levels, order = made
    with pytest.MonkeyPatch.context() as patch, Scratch(levels.size, memory_bytes=memory) as room:
        patch.setattr("weightvid.tile.blocks.BLOCK_LEVELS", 200)
        places = BlockOrder(levels.shape, order)
        for begin, end in places.blocks():
            places.put(room, begin, levels[begin:end])
        assert np.array_equal(room.read(0, levels.size), to_sequence(levels, order))
        for begin, end in places.blocks():
            assert np.array_equal(places.get(room, begin, end), levels[begin:end])


@given(st.integers(1, 90), st.integers(1, 40), st.integers(0, 99), st.integers(1, 50))
def test_a_layout_from_blocks_is_that_of_the_whole(
    rows: int, columns: int, seed: int, step: int
) -> None:
    random = np.random.default_rng(seed)
    spread = 2 * np.exp(random.standard_normal((rows, 1))) * np.exp(random.standard_normal(columns))
    drawn = np.rint(random.standard_normal((rows, columns)) * spread)
    levels = np.clip(drawn, -127, 127).astype(np.int8)
    blocks = [(begin, levels[begin : begin + step]) for begin in range(0, rows, step)]
    parts = [Magnitudes.of(block) for _, block in blocks]
    sums = Magnitudes(np.concatenate([p.rows for p in parts]), sum(p.columns for p in parts))
    found, whole = layout_for(sums, 1, blocks), choose_layout(levels, 1)
    assert found.folds == whole.folds
    assert (found.order is None) == (whole.order is None)
    if found.order is not None and whole.order is not None:
        assert np.array_equal(found.order.rows, whole.order.rows)
        assert np.array_equal(found.order.columns, whole.order.columns)


def test_a_room_on_a_disk_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="TMPDIR"):
        Scratch(100, tmp_path / "nowhere", memory_bytes=0)
    assert Scratch(100, tmp_path / "nowhere").in_memory


def model() -> dict[str, np.ndarray[Any, Any]]:
    """Video with outliers, an exact tensor of several parts, and one that is best as levels."""
    video = normal(1, 900, 1300) * np.exp(normal(2, 900, 1, scale=0.7))
    video[3, 4] = 50.0
    repeats = np.tile(normal(3, 1, 1300), (920, 1)) + normal(6, 920, 1300, scale=1e-6)
    return {
        "video": video.astype(np.float32),
        "small": normal(4, 90, 70),
        "kept": normal(5, 300, 200),
        "repeats": repeats,
        "ids": np.arange(70_000, dtype=np.int64),
    }


def pack(path: Path, **more: Any) -> bytes:
    with small_frames():
        pack_checkpoint(from_mapping(model()), path, PackOptions(keep=("kept",), **more))
    return path.read_bytes()


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("archive") / "model.mp4"
    pack(path)
    with open_archive(path) as opened:
        codings = {name: opened.info(name).coding for name in model()}
        assert opened.info("video").escapes
    assert codings["video"] == "video"
    assert set(codings.values()) == {"video", "plain", "exact"}
    return path


def test_blocks_of_other_sizes_give_the_same_bytes(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weightvid.packing.quantizer._BLOCK_WEIGHTS", 1 << 30)
    monkeypatch.setattr("weightvid.packing.quantizer._BLOCK_ROWS", 850)
    assert pack(tmp_path / "model.mp4") == archive.read_bytes()


@pytest.mark.usefixtures("tiny_memory")
def test_packing_in_rooms_gives_the_same_bytes(archive: Path, tmp_path: Path) -> None:
    assert pack(tmp_path / "model.mp4") == archive.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["model.mp4"]


def test_boxes_of_exact_tensors_lie_where_they_do_whatever_the_workers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("weightvid.packing.exact.PART_BYTES", 100_000)
    made = {pack(tmp_path / f"{jobs}.mp4", jobs=jobs, states=0) for jobs in (1, 4)}
    assert len(made) == 1
    with open_archive(tmp_path / "1.mp4", check_tensors=True) as opened:
        assert len(opened.index.exact) > 3
        assert len(list(opened)) == len(model())


@pytest.mark.usefixtures("tiny_memory")
@pytest.mark.parametrize("names", [None, ("video", "ids"), ("repeats",)])
def test_parts_are_the_tensors(
    archive: Path, tmp_path: Path, names: tuple[str, ...] | None
) -> None:
    seen = []
    with open_archive(archive, check_tensors=True) as opened:
        for spec, parts in opened.iter_parts(names, Spill(tmp_path)):
            flat = [part.reshape(-1) for part in parts]
            seen.append(spec.name)
            assert len(flat) > 1 or spec.size < 1 << 13
            whole = np.concatenate(flat).reshape(spec.shape)
            with open_archive(archive) as plain:
                assert np.array_equal(whole, plain.stored(spec.name))
    assert sorted(seen) == sorted(names or model())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("tiny_memory")
@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ""])
@pytest.mark.parametrize("dtype", [None, "F16"])
def test_unpacking_in_parts(archive: Path, tmp_path: Path, suffix: str, dtype: str | None) -> None:
    path = tmp_path / f"model{suffix}"
    unpack_archive(archive, path, UnpackOptions(dtype=dtype))
    with open_checkpoint(path) as reader, open_archive(archive) as opened:
        for spec in reader.contents.tensors:
            expected = opened.stored(spec.name)
            if dtype and expected.dtype == np.float32:
                expected = expected.astype(np.float16)
            assert np.array_equal(reader.read(spec.name), expected)
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


@pytest.mark.usefixtures("tiny_memory")
def test_a_wrong_hash_is_found_after_the_last_part(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weightvid.loader.stream.TENSOR_HASH_BYTES", 15)
    with pytest.raises(FormatError) as caught:
        unpack_archive(archive, tmp_path / "model.safetensors")
    assert caught.value.code == "tensor-digest"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("tiny_memory")
def test_load_into_takes_parts(archive: Path) -> None:
    torch = pytest.importorskip("torch")
    from weightvid.torch import load_into

    class Model(torch.nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self, device: str) -> None:
            super().__init__()
            for name, array in model().items():
                value = torch.empty(array.shape, device=device, dtype=torch.float32)
                if name == "repeats" and device == "cpu":
                    value = torch.empty(array.shape[::-1]).T  # not contiguous
                self.register_buffer(name, value)

    with open_archive(archive) as opened:
        expected = {name: opened.stored(name) for name in model()}
    for device in ("cpu", "meta"):
        module = Model(device)
        load_into(module, archive)
        for name, array in expected.items():
            found = dict(module.named_buffers())[name]
            assert found.dtype == (torch.float32 if device == "cpu" else
                                   torch.from_numpy(array).dtype)  # fmt: skip
            assert np.array_equal(found.numpy(), array.astype(found.numpy().dtype))


@pytest.fixture
def long_path(tmp_path: Path) -> Iterator[Path]:
    """A checkpoint of one tensor of 6 MB."""
    spec = from_mapping({"w": np.zeros((3000, 500), np.float32)}).contents
    path = tmp_path / "long.safetensors"
    with create_checkpoint(path, spec) as writer:
        writer.write_parts("w", (normal(seed, 500, 500) for seed in range(6)))
    yield path


@pytest.mark.usefixtures("tiny_memory")
def test_memory_does_not_grow_with_the_tensor(
    long_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packing and unpacking hold a fraction of the tensor, its levels included."""
    monkeypatch.setattr("weightvid.packing.quantizer.BATCH_WEIGHTS", 1 << 14)
    monkeypatch.setattr("weightvid.packing.quantizer._SAMPLE_WEIGHTS", 1 << 14)
    monkeypatch.setattr("weightvid.packing.quantizer._BLOCK_ROWS", 1)
    monkeypatch.setattr("weightvid.packing.schedule.BATCH_WEIGHTS", 1 << 14)
    monkeypatch.setattr("weightvid.packing.sums.BLOCK", 1 << 15)
    options = PackOptions(jobs=1, states=0)
    peaks = []
    with small_frames():
        for work in (
            lambda: pack_checkpoint(long_path, tmp_path / "long.mp4", options),
            lambda: unpack_archive(tmp_path / "long.mp4", tmp_path / "back.safetensors"),
        ):
            tracemalloc.start()
            try:
                work()
                peaks.append(tracemalloc.get_traced_memory()[1])
            finally:
                tracemalloc.stop()
    levels = 3000 * 500
    assert max(peaks) < levels, peaks

"""Progressive archives: sums of layers, cut anywhere, a layer at a time."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from independent import reader, sources
from samples import Pipe

from weightvid import container, loader
from weightvid.archives import Salvage
from weightvid.checkpoint import from_mapping, open_checkpoint
from weightvid.errors import (
    FormatError,
    QuantizationError,
    TensorNotFoundError,
    TruncatedError,
)
from weightvid.levels.descent import balanced_moment, descend
from weightvid.levels.rounding import uniform
from weightvid.loader import open_archive
from weightvid.pack import PackOptions, pack_checkpoint
from weightvid.targets import Target
from weightvid.unpack import UnpackOptions, unpack_archive
from weightvid.update import apply_updates
from weightvid.verify import verify_archive


@cache
def model() -> Mapping[str, Any]:
    return {
        "conv": sources.normal(1, 24, 16, 3, 3),
        "matrix": sources.normal(2, 64, 48),
        "half": sources.normal(3, 40, 30, kind="f2"),
        "double": sources.normal(4, 32, 20, kind="f8"),
        "brain": sources.normal(5, 30, 30, kind="BF16"),
        "bias": sources.normal(6, 64),
        "count": np.array(3),
    }


@cache
def packed(layers: int) -> bytes:
    return pack_to(Path(str(layers)), layers)


def pack_to(path: Path, layers: int, **options: Any) -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as name, sources.small_frames():
        place = Path(name) / path.name
        with from_mapping(model(), dtypes={"brain": "BF16"}) as checkpoint:
            pack_checkpoint(checkpoint, place, PackOptions(jobs=1, layers=layers, **options))
        return place.read_bytes()


def noise(archive: loader.Archive, name: str) -> float:
    kind = archive.spec(name).dtype
    original = loader.to_float32(np.asarray(model()[name]).reshape(-1), kind).astype(np.float64)
    found = loader.to_float32(archive.stored(name).reshape(-1), kind)
    return float(np.square(found - original).mean())


def test_outliers_hide_no_error(tmp_path: Path) -> None:
    weights = sources.normal(7, 64, 80)
    weights[3, 5], weights[7, 7] = 90.0, -55.0
    path, options = tmp_path / "a.mp4", PackOptions(jobs=1, layers=2)
    np.savez(tmp_path / "m.npz", w=weights)
    with from_mapping({"w": weights}) as checkpoint:
        report = pack_checkpoint(checkpoint, path, options)
    assert report.sqnr_db is not None
    assert report.sqnr_db < 50
    assert verify_archive(path, tmp_path / "m.npz").ok


@pytest.mark.parametrize("kind", ["weight", "count"])
def test_layers_that_decode_to_something_else_are_discarded(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of quantized tensors the hashes in the sidecars tell, of exact ones the root."""

    def wrong(array: Any) -> bytes:
        digest = loader.tensor_sha256(array)
        return digest[::-1] if (array.dtype == np.int64) == (kind == "count") else digest

    monkeypatch.setattr("weightvid.layers.tensor_sha256", wrong)
    arrays = {"weight": sources.normal(1, 60, 60), "count": np.array([3])}
    with pytest.raises(FormatError, match="does not decode to what was packed"):
        pack_checkpoint(from_mapping(arrays), tmp_path / "a.mp4", PackOptions(jobs=1, layers=2))
    assert not (tmp_path / "a.mp4").exists()


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_each_layer_is_nearer(layers: int) -> None:
    before = dict[str, float]()
    for count in range(1, layers + 1):
        with open_archive(packed(layers), layers=count, check_tensors=True) as archive:
            assert archive.layers == count
            now = {name: noise(archive, name) for name in ("conv", "matrix", "half", "double")}
            assert all(value < 0.5 * before.get(name, 1e9) for name, value in now.items())
            before = now
            streamed = {spec.name: array for spec, array in archive.stored_items()}
            for name in model():
                assert archive.stored(name).tobytes() == streamed[name].tobytes()
            assert streamed["count"] == 3


@pytest.mark.parametrize("step", [0.05, 0.15, 0.3])
def test_the_first_layer_has_two_fifths_of_the_bits(step: float, tmp_path: Path) -> None:
    with from_mapping({f"{n}": sources.normal(n, 160, 160) for n in range(3)}) as checkpoint:
        options = PackOptions(jobs=1, step_factor=step, layers=2)
        pack_checkpoint(checkpoint, tmp_path / "a.mp4", options)
    with open_archive(tmp_path / "a.mp4") as archive:
        assert archive.index is not None
        start = archive.index.frames[archive.index.stages[0][0]][0]
        assert 0.35 < start / (tmp_path / "a.mp4").stat().st_size < 0.44


def test_the_independent_reader_agrees() -> None:
    data = packed(3)
    other = reader.Archive(io.BytesIO(data))
    with open_archive(data) as archive:
        last = dict(reader.Archive(io.BytesIO(data)).stream())
        for name in archive:
            assert other.read(name) == archive.stored(name).tobytes() == last[name]
        assert other.root() == archive.root


def test_cut_anywhere_gives_the_best_that_has_arrived() -> None:
    data = packed(2)
    with open_archive(data, layers=1) as coarse, open_archive(data) as fine:
        layers = [dict(archive.stored_items()) for archive in (coarse, fine)]
        index = fine.index
    assert index is not None
    expected = [{spec.name: a.tobytes() for spec, a in each.items()} for each in layers]
    first = index.stages[0][0]
    # The first frame of the second layer: everything coarse is before it.
    start = index.frames[first][0]
    for cut in [*range(start, data.index(loader.INDEX_UUID), 997), data.index(loader.INDEX_UUID)]:
        found = dict[str, bytes]()
        archive = open_archive(data[:cut])
        with pytest.raises(TruncatedError) as caught:
            for spec, array in archive.stored_items():
                found[spec.name] = array.tobytes()
        assert caught.value.missing == ()
        assert found.keys() == expected[0].keys()
        assert all(value in (e[name] for e in expected) for name, value in found.items())
        assert open_archive(data[:cut], layers=1)["matrix"].tobytes() == expected[0]["matrix"]
    for cut in range(0, start, 1499):
        with pytest.raises(FormatError):
            dict(open_archive(data[:cut], layers=1).stored_items())


def test_arrivals_tell_when_a_layer_is_complete() -> None:
    archive = open_archive(packed(3))
    arrivals = list(archive.arrivals())
    complete = [arrival.complete for arrival in arrivals]
    assert complete == sorted(complete)
    assert complete[-1] == 3
    for done in (1, 2):
        first = complete.index(done)
        seen = {
            a.spec.name for a in arrivals[: first + 1] if a.layer >= min(done, a.layer + a.left)
        }
        assert seen == set(model())
    matrix = [a for a in arrivals if a.spec.name == "matrix"]
    assert [(a.layer, a.left) for a in matrix] == [(1, 2), (2, 1), (3, 0)]
    assert len({a.array.tobytes() for a in matrix}) == 3
    # What the next layer is added to is not for users to change.
    assert [a.array.flags.writeable for a in matrix] == [False, False, True]


def test_a_pipe_is_read_once() -> None:
    archive = open_archive(Pipe(packed(2)), layers=1)
    assert {name for name, _ in archive.items()} == set(model())


def test_levels_of_a_sum_are_refused() -> None:
    with open_archive(packed(2)) as archive, pytest.raises(LookupError, match="sum of layers"):
        archive.levels("matrix")


def test_verbs(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(packed(2))
    assert verify_archive(path).ok
    for layers in (1, 2):
        out = tmp_path / f"{layers}.safetensors"
        unpack_archive(path, out, UnpackOptions(layers=layers))
        with open_checkpoint(out) as made, open_archive(path, layers=layers) as archive:
            assert all(made.read(n).tobytes() == archive.stored(n).tobytes() for n in model())
    with pytest.raises(TensorNotFoundError, match="counted from 1"):
        unpack_archive(path, tmp_path / "0.safetensors", UnpackOptions(layers=0))
    with pytest.raises(TensorNotFoundError, match="no layer 3: the archive has 2"):
        unpack_archive(path, tmp_path / "3.safetensors", UnpackOptions(layers=3))


def test_partial_unpacking_of_a_cut_archive(tmp_path: Path) -> None:
    data = packed(2)
    path = tmp_path / "cut.mp4"
    path.write_bytes(data[: len(data) * 9 // 10])
    out = tmp_path / "cut.safetensors"
    with pytest.raises(TruncatedError, match="coarse"):
        unpack_archive(path, out)
    assert not out.exists()
    report = unpack_archive(path, out, UnpackOptions(partial=True))
    assert report.missing == ()
    assert report.coarse
    assert set(report.coarse) == set(verify_archive(path).affected)
    assert verify_archive(path).tensors_intact == len(model()) - len(report.coarse)
    one = UnpackOptions(tensors=(report.coarse[0],))
    with pytest.raises(TruncatedError, match="cut short"):
        unpack_archive(path, tmp_path / "one.safetensors", one)
    assert report.defect is not None
    assert report.tensors == len(model())
    unpack_archive(path, tmp_path / "coarse.safetensors", UnpackOptions(layers=1))
    salvage = Salvage(open_archive(path.read_bytes()))
    assert {spec.name for spec, _ in salvage} == set(model())


def test_of_a_damaged_layer_those_below_stay(tmp_path: Path) -> None:
    data = bytearray(packed(3))
    with open_archive(bytes(data)) as archive:
        assert archive.index is not None
        (first, _), (second, _), _ = archive.index.stages
        at, size = archive.index.frames[first + second]  # the first frame of the last layer
    data[at + size // 2] ^= 255
    (tmp_path / "m.mp4").write_bytes(data)
    out = tmp_path / "m.safetensors"
    report = unpack_archive(tmp_path / "m.mp4", out, UnpackOptions(partial=True))
    assert report.missing == ()
    assert report.coarse
    with open_checkpoint(out) as found, open_archive(packed(3), layers=2) as lower:
        for name in report.coarse:
            assert found.read(name).tobytes() == lower.stored(name).tobytes()
    assert set(report.coarse) == set(verify_archive(tmp_path / "m.mp4").affected)


@pytest.mark.parametrize(
    "masks",
    [(0, 6, 6, 6, 6, 2, 2), (7, 6, 6, 6, 6, 2, 2), (8, 6, 6, 6, 6, 2, 2), (6, 6), (2,) * 7],
)
def test_masks_that_do_not_fit(masks: tuple[int, ...]) -> None:
    def change(header: loader.Header) -> loader.Header:
        return header._replace(layers=loader.Layers(2, b"", masks))

    with pytest.raises(FormatError) as caught:
        dict(open_archive(with_header(packed(2), change)).stored_items())
    assert caught.value.code in ("record", "order", "limit")


def with_header(data: bytes, change: Callable[[loader.Header], loader.Header]) -> bytes:
    """An archive with another header, and offsets that fit it."""
    source = loader.Source(io.BytesIO(data))
    head = [source.box(), source.box()]
    begin = source.at
    header = loader.parse_header(loader.open_body(source.box()[1], ""), 0)
    rest = data[source.at :]
    made = container.close_body(*container.header_records(change(header), []))
    assert head[0][0] == b"ftyp"
    return data[:begin] + container.box(loader.HEADER_UUID, made) + rest


def test_a_header_that_is_written_again_is_the_same() -> None:
    assert with_header(packed(2), lambda header: header) == packed(2)


def test_tensors_that_come_more_often_than_the_header_says() -> None:
    def change(header: loader.Header) -> loader.Header:
        assert header.layers is not None
        return header._replace(layers=header.layers._replace(masks=(2,) + (6,) * 4 + (2,) * 2))

    with pytest.raises(FormatError, match="more often"):
        dict(open_archive(with_header(packed(2), change)).stored_items())


def test_more_layers_than_there_are() -> None:
    with pytest.raises(QuantizationError, match="1 to 16"):
        PackOptions(layers=17).check()
    with pytest.raises(QuantizationError, match="exclude each other"):
        PackOptions(layers=2, target=Target("size", 1e6)).check()
    with open_archive(packed(2), layers=9) as archive:
        assert archive.layers == 2


def test_merging_a_single_progressive_archive_copies_it(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(packed(3))
    report = apply_updates(path, [], tmp_path / "b.mp4")
    assert (report.layers, report.coded) == (3, 0)
    with open_archive(path) as one, open_archive(tmp_path / "b.mp4", check_tensors=True) as other:
        assert one.root == other.root
        assert all(one.stored(n).tobytes() == other.stored(n).tobytes() for n in model())


def test_descent_trades_bits_for_errors() -> None:
    draw = np.random.default_rng(7)
    scaled = (0.4 * draw.standard_normal((32, 48))).astype(np.float32)
    mixing = draw.standard_normal((48, 8)).astype(np.float32)
    moment = mixing @ mixing.T + 0.1 * np.eye(48, dtype=np.float32)

    def cost(levels: Any) -> float:
        error = scaled - levels
        return float(np.vdot(error @ moment, error))

    plain = uniform(scaled)
    free, dear = (descend(scaled, moment, 0.01, price) for price in (0.0, 0.2))
    assert cost(free) < cost(plain)
    assert np.count_nonzero(dear) < np.count_nonzero(plain)
    assert cost(dear) < cost(np.zeros_like(plain))
    assert not descend(scaled, balanced_moment(48, 16), 0.0, 50.0).any()


def test_descent_of_groups_is_that_of_each() -> None:
    draw = np.random.default_rng(8)
    scaled = draw.standard_normal((20, 9)).astype(np.float32)
    roots = draw.standard_normal((2, 9, 9))
    moments = roots @ roots.swapaxes(1, 2)
    together = descend(scaled, moments, 0.01, 0.05)
    apart = [descend(scaled[10 * g : 10 * g + 10], moments[g], 0.01, 0.05) for g in (0, 1)]
    assert (together == np.concatenate(apart)).all()

"""Updates: what changes an archive into another model; chains, merging, wrong bases."""

from __future__ import annotations

import hashlib
import io
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzz_archives import change_records, join_boxes, split_boxes
from independent import reader, sources
from safetensors.numpy import save_file
from test_layers import with_header

from weightvid import loader
from weightvid.archives import checked_tensors, open_anywhere, open_chain
from weightvid.checkpoint import from_mapping, open_checkpoint
from weightvid.errors import (
    CheckpointError,
    FormatError,
    OutputError,
    QuantizationError,
    TensorNotFoundError,
    WeightvidError,
)
from weightvid.exact import difference
from weightvid.loader import Archive, open_archive
from weightvid.pack import PackOptions, pack_checkpoint
from weightvid.unpack import UnpackOptions, unpack_archive
from weightvid.update import apply_updates
from weightvid.verify import verify_archive
from weightvid.video import Video

Model = Mapping[str, Any]


def first() -> dict[str, Any]:
    return {
        "conv": sources.normal(1, 24, 16, 3, 3),
        "matrix": sources.normal(2, 64, 48),
        "half": sources.normal(3, 40, 30, kind="f2"),
        "frozen": sources.normal(4, 32, 32),
        "shaped": sources.normal(5, 32, 32),
        "gone": sources.normal(6, 30, 30),
        "bias": sources.normal(7, 64),
        "count": np.array(3),
        "wide": np.array([1 + 2j], np.complex128),
    }


def second() -> dict[str, Any]:
    """Another version: of each kind of change one tensor."""
    old = first()
    new = {name: old[name] for name in ("conv", "matrix", "half", "frozen", "bias")}
    for name, seed in (("conv", 11), ("matrix", 12), ("half", 13)):
        moved = 0.05 * sources.normal(seed, *old[name].shape)
        new[name] = (old[name] + moved).astype(old[name].dtype)
    new["bias"] = old["bias"] * np.float32(1.01)
    new["shaped"] = sources.normal(14, 32, 40)
    new["added"] = sources.normal(15, 30, 20)
    return new | {"count": np.array(4), "wide": np.array([3j], np.complex128)}


def third() -> dict[str, Any]:
    return second() | {"matrix": second()["matrix"] * np.float32(1.02), "gone": first()["gone"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """v1.mp4; v1-v2.mp4 and v2-v3.mp4, a chain; v2.mp4, packed alone."""
    path = tmp_path_factory.mktemp("versions")
    options = PackOptions(jobs=1)
    with sources.small_frames():
        for name, model in (("v1", first()), ("v2", second())):
            with from_mapping(model) as checkpoint:
                pack_checkpoint(checkpoint, path / f"{name}.mp4", options)
        for name, model, base in (
            ("v1-v2", second(), ("v1",)),
            ("v2-v3", third(), ("v1", "v1-v2")),
        ):
            with from_mapping(model) as checkpoint:
                bases = tuple(path / f"{each}.mp4" for each in base)
                pack_checkpoint(checkpoint, path / f"{name}.mp4", replace(options, base=bases))
    return path


def tensors(archive: Archive) -> dict[str, bytes]:
    return {name: archive.stored(name).tobytes() for name in archive}


def test_kinds_of_change(folder: Path) -> None:
    with open_archive(folder / "v1-v2.mp4", base=folder / "v1.mp4") as update:
        layers = update.header.layers
        assert layers is not None
        masks = dict(zip(update, layers.masks, strict=True))
        expected = {"conv": 3, "matrix": 3, "half": 3, "bias": 3, "frozen": 1, "shaped": 2}
        assert masks == expected | {"added": 2, "count": masks["count"], "wide": 2}
        with open_archive(folder / "v2.mp4") as alone:
            for name, array in second().items():
                if name == "wide":
                    continue
                if name == "bias":
                    assert np.abs(update[name] / array - 1).max() <= 2**-8
                    continue
                error, usual = (
                    float(np.square(each[name] - array).mean()) for each in (update, alone)
                )
                assert error <= 1.6 * usual, name
            assert (folder / "v1-v2.mp4").stat().st_size < 0.6 * (folder / "v2.mp4").stat().st_size
        assert update["count"] == 4
        assert update["wide"] == 3j
        assert dict(update.items()).keys() == second().keys()
        for spec, array in update.stored_items():
            assert array.tobytes() == update.stored(spec.name).tobytes()


def test_the_independent_reader_agrees(folder: Path) -> None:
    base = None
    for name, before in (("v1", ()), ("v1-v2", ("v1",)), ("v2-v3", ("v1", "v1-v2"))):
        data = (folder / f"{name}.mp4").read_bytes()
        other, stream = reader.Archive(io.BytesIO(data)), reader.Archive(io.BytesIO(data))
        if base is not None:
            other.use_base(base)
            stream.use_base(base)
        with open_chain([folder / f"{each}.mp4" for each in (*before, name)]) as [*_, archive]:
            streamed = dict(stream.stream())
            for each in archive:
                assert other.read(each) == archive.stored(each).tobytes() == streamed[each]
            assert other.root() == archive.root
        base = other


def test_chain_and_merged_archives_are_one(folder: Path, tmp_path: Path) -> None:
    paths = [folder / f"{name}.mp4" for name in ("v1", "v1-v2", "v2-v3")]
    before = [path.read_bytes() for path in paths]
    whole = apply_updates(paths[0], paths[1:], tmp_path / "whole.mp4")
    apply_updates(paths[0], paths[1:2], tmp_path / "v2.mp4")
    apply_updates(tmp_path / "v2.mp4", paths[2:], tmp_path / "again.mp4")
    assert (tmp_path / "whole.mp4").read_bytes() == (tmp_path / "again.mp4").read_bytes()
    assert whole.layers == 3
    assert whole.coded == 2  # each update has a frame of its own size
    assert before == [path.read_bytes() for path in paths]
    with (
        open_archive(paths[2], base=paths[:2]) as chain,
        open_archive(paths[2], base=tmp_path / "v2.mp4") as other,
        open_archive(tmp_path / "whole.mp4", check_tensors=True) as merged,
    ):
        assert tensors(chain) == tensors(merged) == tensors(other)
        assert {s.name: a.tobytes() for s, a in merged.stored_items()} == tensors(chain)
        assert chain.root == merged.root == bytes.fromhex(whole.root)
        dict(checked_tensors(merged))
    # What an update brought is in no earlier layer.
    with (
        open_archive(tmp_path / "whole.mp4", layers=1) as early,
        pytest.raises(TensorNotFoundError, match="in none of the first 1 layers"),
    ):
        dict(early.items())


def test_frames_of_another_size_are_laid_out_anew(folder: Path, tmp_path: Path) -> None:
    with from_mapping(first()) as checkpoint:
        video = Video("svt-av1")
        pack_checkpoint(checkpoint, tmp_path / "v1.mp4", PackOptions(jobs=1, video=video))
    with from_mapping(second()) as checkpoint:
        options = PackOptions(jobs=1, base=(tmp_path / "v1.mp4",))
        pack_checkpoint(checkpoint, tmp_path / "u.mp4", options)
    report = apply_updates(tmp_path / "v1.mp4", [tmp_path / "u.mp4"], tmp_path / "v2.mp4")
    assert report.coded
    with (
        open_archive(tmp_path / "u.mp4", base=tmp_path / "v1.mp4") as update,
        open_archive(tmp_path / "v2.mp4", check_tensors=True) as merged,
    ):
        assert tensors(update) == tensors(merged)
        assert merged.track.entry == b"hvc1"


@pytest.mark.parametrize("shape", [(16, 8, 3, 3), (40,)])
@pytest.mark.parametrize("part", [1 << 24, 500])
def test_tensors_that_are_tied_or_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], part: int
) -> None:
    monkeypatch.setattr("weightvid.levels.code.PART_WEIGHTS", part)
    chance = np.random.default_rng(3)
    one = chance.normal(0, 0.05, shape).astype(np.float32)
    near = [(one + chance.normal(0, 0.005, shape)).astype(np.float32) for _ in range(4)]
    other = chance.normal(0, 0.05, (30, 40)).astype(np.float32)
    paths = []
    for number, (a, t) in enumerate(
        ((one, one), (near[0], near[1]), (near[2],) * 2, (near[3], one))
    ):
        path, base = tmp_path / f"{number}.mp4", tuple(paths)
        with from_mapping({"a": a, "other": other, "t": t}) as checkpoint:
            pack_checkpoint(checkpoint, path, PackOptions(jobs=1, base=base))
        paths.append(path)
    for last in range(2, 5):
        merged = tmp_path / f"merged{last}.mp4"
        apply_updates(paths[0], paths[1:last], merged)
        with open_chain(paths[:last]) as chain, open_archive(merged, check_tensors=True) as made:
            assert tensors(made) == tensors(chain[-1])
            assert made.root == chain[-1].root


@pytest.mark.parametrize("keep", [(), ("b",)])
def test_what_stays_is_as_near_as_the_base_says(tmp_path: Path, keep: tuple[str, ...]) -> None:
    """Tensors that were tied, and tensors that no update of a chain changes."""
    chance = np.random.default_rng(1)
    a, o, b = (chance.normal(0, 0.05, s).astype(np.float32) for s in ((120, 90), (64, 80), 40))
    k = chance.normal(0, 0.05, (16, 16, 3, 3)).astype(np.float32)
    moved = (o + chance.normal(0, 0.003, o.shape)).astype(np.float32)
    first = {"z": a, "a": a, "o": o, "k": k, "b": b}
    chain = [first, first | {"z": a.copy(), "o": moved}, first, first | {"z": a * np.float32(1.01)}]
    paths: list[Path] = []
    for number, arrays in enumerate(chain):
        path = tmp_path / f"{number}.mp4"
        options = PackOptions(
            recipe="small" if number else "fine", keep=keep, base=tuple(paths), jobs=1
        )
        save_file(arrays, path.with_suffix(".safetensors"))
        with from_mapping(arrays) as checkpoint:
            pack_checkpoint(checkpoint, path, options)
        with open_anywhere(path, base=paths) as archive:
            found = verify_archive(archive, path.with_suffix(".safetensors")).comparison
        assert found is not None
        assert found.below == ()
        paths.append(path)


def test_verbs(folder: Path, tmp_path: Path) -> None:
    base, update = folder / "v1.mp4", folder / "v1-v2.mp4"
    unpack_archive(update, tmp_path / "v2.npz", UnpackOptions(base=(base,)))
    with open_checkpoint(tmp_path / "v2.npz") as made, open_archive(update, base=base) as archive:
        assert {s.name for s in made.contents.tensors} == set(archive)
        assert all(made.read(name).tobytes() == archive.stored(name).tobytes() for name in archive)
        assert verify_archive(archive).ok
        # Of a tensor that did not change, the base says what it keeps.
        np.savez(tmp_path / "model.npz", **second())
        assert verify_archive(archive, tmp_path / "model.npz").ok
    apply_updates(base, [update], tmp_path / "merged.mp4")
    assert verify_archive(tmp_path / "merged.mp4", tmp_path / "model.npz").ok


def test_a_base_is_never_replaced(folder: Path, tmp_path: Path) -> None:
    base, link = tmp_path / "base.mp4", tmp_path / "link.mp4"
    shutil.copy(folder / "v1.mp4", base)
    link.symlink_to(base)
    for name in (base, link):
        with pytest.raises(CheckpointError, match="is the source or a base itself"):
            pack_checkpoint(from_mapping(second()), name, PackOptions(base=(base,), force=True))
    assert base.read_bytes() == (folder / "v1.mp4").read_bytes()


def test_inputs_of_a_merging_are_never_replaced(folder: Path, tmp_path: Path) -> None:
    base, update = tmp_path / "v1.mp4", tmp_path / "u.mp4"
    shutil.copy(folder / "v1.mp4", base)
    shutil.copy(folder / "v1-v2.mp4", update)
    for path in (base, update):
        before = path.read_bytes()
        with pytest.raises(OutputError, match="is the archive or an update itself"):
            apply_updates(base, [update], path, force=True)
        assert path.read_bytes() == before
    with pytest.raises(FormatError, match=r"v1-v2\.mp4 is itself an update: its base must come"):
        apply_updates(folder / "v1-v2.mp4", [folder / "v2-v3.mp4"], tmp_path / "v3.mp4")


def test_a_wrong_base_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    update, wrong = folder / "v1-v2.mp4", folder / "v2.mp4"
    data = {path.stem: path.read_bytes() for path in folder.glob("*.mp4")}
    with open_archive(wrong) as other, open_archive(folder / "v1.mp4") as right:
        roots = right.root.hex(), other.root.hex()
    for attempt in (
        lambda: open_archive(data["v1-v2"], base=data["v2"]),
        lambda: open_archive(data["v2-v3"], base=data["v1"]),
        lambda: open_archive(data["v1"], base=data["v2"]),
        lambda: open_archive(data["v1-v2"])["matrix"],
        lambda: dict(open_archive(data["v1-v2"]).items()),
        lambda: open_archive(data["v2-v3"], base=open_archive(data["v1-v2"])),
        lambda: apply_updates(wrong, [update], tmp_path / "v2.mp4"),
        lambda: unpack_archive(update, tmp_path / "v2.npz", UnpackOptions(base=(wrong,))),
        lambda: unpack_archive(update, tmp_path / "v2.npz"),
        lambda: verify_archive(update),
    ):
        with pytest.raises(FormatError) as caught:
            attempt()
        assert caught.value.code == "base"
    with pytest.raises(FormatError) as caught:
        open_archive(data["v1-v2"], base=data["v2"])
    assert all(root in str(caught.value) for root in roots)
    assert not list(tmp_path.iterdir())


def test_a_base_that_lies_is_noticed(folder: Path, tmp_path: Path) -> None:
    """Another model under the root of the right base."""
    with open_archive(folder / "v1.mp4") as right, open_archive(folder / "v2.mp4") as other:
        roots = other.root, right.root
    data = (folder / "v2.mp4").read_bytes()
    boxes = split_boxes(data)

    def change(found: Any) -> Any:
        return [(k, roots[1] if k == loader.ROOT else data) for k, data in found]

    for place, box in enumerate(boxes):
        if box.kind == loader.INDEX_UUID:
            boxes[place] = box._replace(payload=change_records(box.payload, change))
    forged = join_boxes(boxes, False)
    (tmp_path / "forged.mp4").write_bytes(forged)
    with pytest.raises(FormatError) as caught:
        open_archive((folder / "v1-v2.mp4").read_bytes(), base=forged)["matrix"]
    assert caught.value.code == "tensor-digest"
    with pytest.raises(FormatError):
        apply_updates(tmp_path / "forged.mp4", [folder / "v1-v2.mp4"], tmp_path / "out.mp4")
    with from_mapping(third()) as checkpoint, pytest.raises(FormatError) as caught:
        options = PackOptions(jobs=1, base=(tmp_path / "forged.mp4",))
        pack_checkpoint(checkpoint, tmp_path / "out.mp4", options)
    assert caught.value.code == "tensor-digest"
    assert not (tmp_path / "out.mp4").exists()


@pytest.mark.parametrize("place", range(12))
def test_tampered_and_cut_updates(folder: Path, tmp_path: Path, place: int) -> None:
    base, data = folder / "v1.mp4", bytearray((folder / "v1-v2.mp4").read_bytes())
    digest = hashlib.sha256(base.read_bytes()).digest()
    with open_archive(bytes(data), base=base) as right:
        expected = tensors(right)
    draw = np.random.default_rng(place)
    if place % 3 == 0:
        data = data[: int(draw.integers(1, len(data) - 1))]
    elif place % 3 == 1:
        for at in draw.integers(0, len(data), 3):
            data[at] ^= int(draw.integers(1, 256))
    else:
        frames = split_boxes(bytes(data))
        places = [n for n, box in enumerate(frames) if box.kind in (loader.EXACT_UUID, b"moof")]
        one, other = draw.choice(places, 2, replace=False)
        frames[one], frames[other] = frames[other], frames[one]
        data = bytearray(join_boxes(frames))
    (tmp_path / "u.mp4").write_bytes(data)
    out = tmp_path / "v2.mp4"
    try:
        apply_updates(base, [tmp_path / "u.mp4"], out)
    except WeightvidError:
        assert not out.exists()
    else:
        with open_archive(out) as merged:
            assert tensors(merged) == expected
    assert sorted(path.name for path in tmp_path.iterdir() if path != out) == ["u.mp4"]
    assert hashlib.sha256(base.read_bytes()).digest() == digest


@pytest.mark.parametrize(
    "change",
    [
        lambda layers: layers._replace(base=b""),
        lambda layers: layers._replace(base=b"short"),
        lambda layers: layers._replace(masks=(2, *layers.masks[1:])),
        lambda layers: layers._replace(masks=(*layers.masks[:3], 3, *layers.masks[4:])),
        lambda layers: layers._replace(masks=(*layers.masks[:5], 3, *layers.masks[6:])),
        lambda layers: layers._replace(base=bytes(32)),
    ],
)
def test_malformed_headers(folder: Path, change: Callable[[Any], Any]) -> None:
    data = with_header(
        (folder / "v1-v2.mp4").read_bytes(), lambda h: h._replace(layers=change(h.layers))
    )
    with pytest.raises(FormatError) as caught:
        base = (folder / "v1.mp4").read_bytes()
        dict(open_archive(data, base=base, check_tensors=True).stored_items())
    assert caught.value.code in ("record", "base", "order", "tensor-digest", "truncated")


def test_an_update_of_a_tensor_that_is_nowhere(folder: Path, tmp_path: Path) -> None:
    def renamed(header: loader.Header) -> loader.Header:
        conv, *others = header.tensors
        return header._replace(tensors=(conv._replace(name="coov"), *others))

    forged = tmp_path / "u.mp4"
    forged.write_bytes(with_header((folder / "v1-v2.mp4").read_bytes(), renamed))
    with pytest.raises(FormatError, match="'coov' is not in the base"):
        apply_updates(folder / "v1.mp4", [forged], tmp_path / "out.mp4")


def test_layers_of_an_update_are_one() -> None:
    with pytest.raises(QuantizationError, match="one layer"):
        PackOptions(layers=2, base=("v1.mp4",)).check()
    with pytest.raises(QuantizationError, match="no sums"):
        PackOptions(base=("v1.mp4",), fidelity="integers").check()


def test_an_update_may_change_nothing(folder: Path, tmp_path: Path) -> None:
    same = {name: first()[name] for name in ("frozen", "count", "bias")}
    with from_mapping(same) as checkpoint:
        options = PackOptions(jobs=1, base=(folder / "v1.mp4",))
        pack_checkpoint(checkpoint, tmp_path / "u.mp4", options)
    with open_archive(tmp_path / "u.mp4", base=folder / "v1.mp4") as update:
        assert update.header.layers is not None
        assert set(update.header.layers.masks) == {1}
        assert len(dict(update.items())) == 3
    apply_updates(folder / "v1.mp4", [tmp_path / "u.mp4"], tmp_path / "v2.mp4")
    with open_archive(tmp_path / "v2.mp4") as merged:
        assert set(merged) == set(same)


@pytest.mark.parametrize("kind", ["<f4", "<f2", "<f8", "<i8", "i1", "<u2", "?"])
def test_differences_of_bits_are_exact(kind: str) -> None:
    draw = np.random.default_rng(1)
    below, array = (np.frombuffer(draw.bytes(64 * np.dtype(kind).itemsize), kind) for _ in range(2))
    found = loader.add_bits(below, difference(below, array))
    assert found.tobytes() == array.tobytes()
    assert not difference(below, below).view(np.uint8).any()


def test_the_base_may_lie_anywhere(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "v1.mp4", tmp_path / "renamed.bin")
    base = (folder / "v1.mp4").read_bytes()
    with open_archive(folder / "v1-v2.mp4", base=base) as one:
        expected = tensors(one)
    with (tmp_path / "renamed.bin").open("rb") as file, open_archive(file) as opened:
        update = open_archive(folder / "v1-v2.mp4", base=opened)
        assert tensors(update) == expected
        update.close()
        assert opened["frozen"].shape == (32, 32)

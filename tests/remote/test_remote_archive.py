"""Archives at addresses: one tensor, or all of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from archives import normal, packed, same, sample_arrays, small_frames
from serving import Site
from typer.testing import CliRunner

from weightvid.cli.app import app
from weightvid.errors import FormatError
from weightvid.loader import open_archive
from weightvid.pack import PackOptions
from weightvid.summary import OUTLINE, summarize_archive
from weightvid.unpack import UnpackOptions, unpack_archive
from weightvid.verify import verify_archive

pytest.importorskip("aiohttp")

ARRAYS = sample_arrays()


@pytest.fixture(scope="module")
def data() -> bytes:
    with small_frames(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("weightvid.packing.write.TRIAL_WEIGHTS", 0)
        return packed(ARRAYS)


@pytest.fixture(scope="module")
def expected(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("here") / "m.mp4"
    path.write_bytes(data)
    with open_archive(path) as archive:
        return dict(archive)


def test_one_tensor_takes_few_requests(site: Site, tmp_path: Path) -> None:
    """Bar of the issue: frames + index + 64 KB, in at most five requests."""
    with small_frames(1024, 512), pytest.MonkeyPatch.context() as patch:
        patch.setattr("weightvid.packing.write.TRIAL_WEIGHTS", 0)
        many = {f"layer{i}.weight": normal(i, 256, 300) for i in range(14)}
        data = packed(many, PackOptions(preset="ultrafast"))
    (tmp_path / "m.mp4").write_bytes(data)
    url = site.put("m.mp4", data)
    with open_archive(tmp_path / "m.mp4") as here, open_archive(url) as archive:
        for name in ("layer9.weight",):
            assert same(archive[name], here[name])
        entries = [here.index.frames[number] for number in here.frames_of("layer9.weight")]
        frames = sum(entry.end - entry.offset for entry in entries)
        index = len(data) - max(entry.end for entry in here.index.frames)
    assert len(site.asked) <= 5
    assert frames + index < site.sent_bytes < frames + index + (64 << 10) < len(data)


def test_a_large_tensor_is_one_request(
    site: Site, data: bytes, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many windows its frames are read in."""
    monkeypatch.setattr("weightvid.container.reader.WINDOW_BYTES", 9000)
    with open_archive(site.put("m.mp4", data)) as archive:
        assert len(archive.frames_of("f.weight")) > 1
        for name, array in archive:
            assert same(array, expected[name])
            if name == "c.weight":
                asked = len(site.asked)
                assert same(archive["f.weight"], expected["f.weight"])
                assert len(site.asked) == asked + 1
    assert len(site.asked) == 4


@pytest.mark.parametrize("ranges", [True, False])
def test_everything(
    site: Site, data: bytes, expected: dict[str, Any], ranges: bool, tmp_path: Path
) -> None:
    url = site.put("m.mp4", data, ranges=ranges, piece_bytes=5000)
    site.files["m.mp4"].cuts = [40_000, 30_000]
    with open_archive(url) as archive:
        found = dict(archive)
        assert found.keys() == expected.keys()
        assert all(same(found[name], expected[name]) for name in found)
    assert len(site.asked) <= 5
    made = unpack_archive(url, tmp_path / "m.npz")
    assert made.tensors == len(ARRAYS) - 1
    with np.load(tmp_path / "m.npz") as arrays:
        assert all(same(arrays[name], expected[name]) for name in arrays.files)
    report = verify_archive(url)
    assert report.ok
    # A stream is not read beyond its index.
    assert report.file_bytes == len(data) if ranges else report.file_bytes > len(data) - 200
    assert summarize_archive(url) == summarize_archive(archive_file(data, tmp_path))


def test_inspecting_by_the_index(site: Site, data: bytes, tmp_path: Path) -> None:
    """As much as head and index say, in a few requests."""
    url = site.put("m.mp4", data)
    here = summarize_archive(archive_file(data, tmp_path))
    found = summarize_archive(url, details=False)
    assert len(site.asked) <= 4
    assert site.sent_bytes < 48 << 10
    assert not found.detailed
    assert found.stream_bits_per_weight is None
    assert sum(found.account.values()) == found.file_bytes == len(data)
    assert tuple(found.account) == OUTLINE
    assert found.account["sidecar_boxes"] == sum(
        here.account[part] for part in ("sidecars", "orders", "digits")
    )
    assert found.account["fragments"] == here.account["fragment_boxes"] + here.account["packets"]
    assert found.account["exact_boxes"] == sum(
        here.account[part] for part in ("exact_tensors", "plain_tensors")
    )
    for part in ("ftyp", "moov", "header", "index", "mfra", "other"):
        assert found.account[part] == here.account[part]
    assert found.video == here.video
    assert (found.weights, found.coded_weights) == (here.weights, here.coded_weights)
    for outlined, known in zip(found.tensors, here.tensors, strict=True):
        assert outlined.name == known.name
        assert outlined.frames == known.frames
        assert outlined.coding == {"video": "video"}.get(known.coding, "boxed")
    # A file of this machine is read at once, so its details are always told.
    assert summarize_archive(archive_file(data, tmp_path), details=False) == here


def test_inspecting_tensors_by_ranges(
    site: Site, data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The texts of sidecars and boxes, and no digits."""
    url = site.put("m.mp4", data)
    here = summarize_archive(archive_file(data, tmp_path))
    with open_archive(tmp_path / "here.mp4") as archive:
        boxes = len(archive.index.frames) + len(archive.index.exact)
    monkeypatch.setattr("weightvid.summary.gather._TEXT_BYTES", 64)
    assert summarize_archive(url) == here
    assert len(site.asked) <= 4 + 2 * boxes
    assert site.sent_bytes < len(data) * 2 // 3, "32 KiB of them are the first request"
    monkeypatch.setattr("weightvid.summary.MOST_RANGES", boxes - 1)
    site.asked.clear()
    assert summarize_archive(url) == here, "where there are too many, all is read at once"
    assert len(site.asked) <= 4


@pytest.mark.parametrize("details", [True, False])
def test_inspecting_a_file_that_is_cut_short(
    site: Site, data: bytes, tmp_path: Path, details: bool
) -> None:
    url = site.put("m.mp4", data[: len(data) * 2 // 3])
    found = summarize_archive(url, details)
    assert found == summarize_archive(archive_file(data[: len(data) * 2 // 3], tmp_path))
    assert not found.complete


def archive_file(data: bytes, folder: Path) -> Path:
    (folder / "here.mp4").write_bytes(data)
    return folder / "here.mp4"


def test_single_tensors_without_ranges(
    site: Site, data: bytes, expected: dict[str, Any], tmp_path: Path
) -> None:
    with open_archive(site.put("m.mp4", data, ranges=False)) as archive:
        for name in ("f.weight", "a.weight", "count", "tied"):
            assert same(archive[name], expected[name])
        assert [name for name, _ in archive] == list(_order(data))
        with pytest.raises(FormatError, match="not-seekable"):
            archive.info("a.weight")
    options = UnpackOptions(tensors=("c.*", "mask"))
    unpack_archive(site.put("m.mp4", data, ranges=False), tmp_path / "c.npz", options)
    with np.load(tmp_path / "c.npz") as arrays:
        assert sorted(arrays.files) == ["c.weight", "mask"]


def _order(data: bytes) -> Iterator[str]:
    import io

    with open_archive(io.BytesIO(data)) as archive:
        for name, _ in archive:
            yield name


def test_an_iteration_with_single_tensors_between(
    site: Site, data: bytes, expected: dict[str, Any]
) -> None:
    with open_archive(site.put("m.mp4", data)) as archive:
        for name, array in archive:
            assert same(array, expected[name])
            assert same(archive["c.weight"], expected["c.weight"])


def test_python_facades(site: Site, data: bytes, expected: dict[str, Any], tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    import weightvid.numpy
    import weightvid.torch

    for ranges in (True, False):
        url = site.put("m.mp4", data, ranges=ranges)
        assert all(same(a, expected[n]) for n, a in weightvid.numpy.load_file(url).items())
        module = torch.nn.ModuleDict({"f": torch.nn.Linear(257, 200, bias=False, device="meta")})
        weightvid.torch.load_into(module, url, strict=False)
        assert same(module["f"].weight.detach().numpy(), expected["f.weight"])


def test_preview(site: Site, data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("imageio")
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["preview", site.put("m.mp4", data)])
    assert result.exit_code == 0, result.output
    assert [path.name for path in (tmp_path / "m-preview").iterdir()] == ["frame-0000.png"]


def test_a_broken_download_is_still_told(site: Site, data: bytes, tmp_path: Path) -> None:
    url = site.put("m.mp4", data[:-3000])
    report = verify_archive(url)
    assert report.defect is not None
    made = unpack_archive(url, tmp_path / "m.npz", UnpackOptions(partial=True))
    assert made.missing

"""Pictures of frames."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import small_models

from weightvid.errors import CodecError, FormatError, OutputError, TensorNotFoundError
from weightvid.loader import open_archive
from weightvid.preview import PreviewOptions, colour_range, colours, draw, preview_archive
from weightvid.tile import Tile

iio = pytest.importorskip("imageio.v3", reason="needs the extra: weightvid[preview]")


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("long")
    return small_models.pack(small_models.several_frames(), folder / "l.mp4")


def test_first_frame_by_default(archive: Path, tmp_path: Path) -> None:
    report = preview_archive(archive, tmp_path / "new" / "folder")
    assert report.pictures == (str(tmp_path / "new" / "folder" / "frame-0000.png"),)
    picture = iio.imread(report.pictures[0])
    with open_archive(archive) as opened:
        _, luma = next(opened.frames(range(1)))
        assert picture.shape[0] > luma.shape[0]
        assert picture.shape[1] >= luma.shape[1]


def test_frames_of_a_tensor(archive: Path, tmp_path: Path) -> None:
    options = PreviewOptions(tensor="[bc].weight")
    names = [Path(path).name for path in preview_archive(archive, tmp_path, options).pictures]
    assert names == ["frame-0000.png", "frame-0001.png"]


def test_range_of_frames(archive: Path, tmp_path: Path) -> None:
    report = preview_archive(archive, tmp_path, PreviewOptions(frames=range(1, 2)))
    assert [Path(path).name for path in report.pictures] == ["frame-0001.png"]


@pytest.mark.parametrize(
    "options",
    [
        PreviewOptions(frames=range(0, 9)),
        PreviewOptions(tensor="nothing"),
        PreviewOptions(tensor="c.bias"),
    ],
)
def test_what_is_not_there(archive: Path, tmp_path: Path, options: PreviewOptions) -> None:
    with pytest.raises(TensorNotFoundError):
        preview_archive(archive, tmp_path, options)


def test_archive_without_frames(tmp_path: Path) -> None:
    path = small_models.pack({"n": np.arange(4)}, tmp_path / "n.mp4")
    with pytest.raises(FormatError, match="no frames"):
        preview_archive(path, tmp_path / "p")


def test_existing_picture_needs_force(archive: Path, tmp_path: Path) -> None:
    preview_archive(archive, tmp_path)
    with pytest.raises(OutputError):
        preview_archive(archive, tmp_path)
    preview_archive(archive, tmp_path, PreviewOptions(force=True))


def test_missing_imageio_says_how_to_get_it(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "imageio.v3", None)
    with pytest.raises(CodecError, match=r"weightvid\[preview\]"):
        preview_archive(archive, tmp_path)


def test_colours_grow_away_from_zero() -> None:
    table = colours(5).astype(int)
    brightness = table.sum(axis=1)
    assert (np.diff(brightness[123:129]) > 0).all()
    assert (np.diff(brightness[128:134]) < 0).all()
    assert table[100].tolist() == table[123].tolist()
    assert table[123][2] > table[123][0]
    assert table[133][0] > table[133][2]


def test_range_ignores_a_few_outliers() -> None:
    luma = np.full((64, 64), 128, np.uint8)
    assert colour_range(luma) == 3
    luma[:, :8] = 138
    luma[0, 0] = 255
    assert colour_range(luma) == 10


def test_picture_shows_samples_borders_and_blank() -> None:
    luma = np.full((64, 256), 128, np.uint8)
    luma[:, 40] = 131
    tiles = [("layer.weight", Tile(0, 0, 0, 128))]
    picture = draw(luma, tiles, "title", scale=3)
    table = colours(3)
    assert picture[3 * 50 + 1, 3 * 40 + 1].tolist() == table[131].tolist()
    assert picture[3 * 50 + 1, 3 * 90 + 1].tolist() == table[128].tolist()
    assert picture[3 * 50 + 1, 0].sum() < 100
    blank = picture[3 * 50 + 1, 3 * 200]
    assert blank.tolist() != table[128].tolist()
    label = picture[2:20, 3:100]
    assert (label.sum(axis=2) < 300).any()

"""Pictures of frames."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models

from weightvid.errors import CodecError, OutputError, TensorNotFoundError
from weightvid.loader import TensorSpec, open_archive
from weightvid.preview import (
    Tile,
    colour_range,
    colours,
    draw,
    draw_kernels,
    preview_archive,
    preview_kernels,
)

iio = pytest.importorskip("imageio.v3", reason="needs the extra: weightvid[preview]")


def test_first_frame_by_default(long_archive: Path, tmp_path: Path) -> None:
    pictures = preview_archive(long_archive, tmp_path / "new" / "folder")
    assert pictures == (str(tmp_path / "new" / "folder" / "frame-0000.png"),)
    picture = iio.imread(pictures[0])
    with open_archive(long_archive) as opened:
        _, luma = next(opened.frames(range(1)))
        assert picture.shape[0] > luma.shape[0]
        assert picture.shape[1] >= luma.shape[1]
    # Levels are seen: many colours, and no flat grey.
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 10


def test_frames_of_a_tensor(long_archive: Path, tmp_path: Path) -> None:
    pictures = preview_archive(long_archive, tmp_path, tensor="[bc].weight")
    with open_archive(long_archive) as opened:
        frames = {*opened.info("b.weight").frames, *opened.info("c.weight").frames}
    assert [Path(path).name for path in pictures] == [f"frame-{n:04d}.png" for n in sorted(frames)]


@pytest.mark.parametrize(
    "options",
    [
        {"frames": range(0, 99)},
        {"tensor": "nothing"},
        {"tensor": "c.bias"},
    ],
)
def test_what_is_not_there(long_archive: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(TensorNotFoundError):
        preview_archive(long_archive, tmp_path, **options)


def test_kernels_of_a_layer(archive: Path, tmp_path: Path) -> None:
    paths = preview_kernels(archive, tmp_path, tensor="[ce]*.weight")
    assert [Path(path).name for path in paths] == ["conv.weight.png", "embed.weight.png"]
    with pytest.raises(TensorNotFoundError, match=r"conv\.bias"):
        preview_kernels(archive, tmp_path, tensor="conv.bias")


def test_kernels_lie_in_rows_of_outputs() -> None:
    weights = np.zeros((2, 3, 3, 3), np.float32)
    weights[1, 2, 0, 1], weights[0, 0, 2, 2] = 1, -1
    spec = TensorSpec("w", "F32", weights.shape)
    picture, table = draw_kernels(weights, "m.mp4", spec, scale=2), colours(127)
    red, blue = table[255].tolist(), table[1].tolist()
    # Kernel (output 1, input 2) begins at row 4, column 8; cells are 2 pixels wide.
    assert picture[2 * 4, 2 * (8 + 1)].tolist() == red
    assert picture[2 * 2, 2 * 2].tolist() == blue
    assert picture[0, 2 * 3].tolist() == [255, 255, 255]  # between kernels
    assert picture[0, 0].tolist() == table[128].tolist()


def test_kernels_without_a_number() -> None:
    weights = np.full((2, 3, 3, 3), 1e-3, np.float64)
    weights[0, 0, 0], weights[1, 1, 1] = (np.nan, np.inf, -np.inf), (1e308, -1e308, 5e-324)
    picture = draw_kernels(weights, "m.mp4", TensorSpec("w", "F64", weights.shape), scale=1)
    table = colours(127)
    assert picture[0, :3].tolist() == table[[128, 255, 1]].tolist()
    assert picture[5, 4:6].tolist() == table[[255, 1]].tolist()


def test_every_tile_has_its_name() -> None:
    luma = np.full((192, 192), 128, np.uint8)
    tiles = [Tile("layer.weight", 0, y, 192) for y in (0, 64, 128)]
    picture = draw(luma, tiles, "title", scale=4)
    for y in (0, 64, 128):
        assert (picture[4 * y + 2 : 4 * y + 20, 3:100].sum(axis=2) < 300).any()


def test_names_from_files_may_be_anything(tmp_path: Path) -> None:
    odd = {"a\nb" * 1300: small_models.weights(1, 64, 80), "x/../\x00\u202e": np.ones((9, 9))}
    odd |= {name: np.ones((9, 9)) for name in ("x_.._/\u202e", "", ".")}
    path = small_models.pack(odd, tmp_path / "odd.mp4")
    assert len(preview_archive(path, tmp_path / "p")) == 1
    pictures = preview_kernels(path, tmp_path / "k")
    assert len({*pictures}) == 5
    assert not any(Path(picture).name.startswith(".") for picture in pictures)
    assert all(Path(picture).parent == tmp_path / "k" for picture in pictures)


def test_types_without_real_numbers_are_not_drawn(tmp_path: Path) -> None:
    arrays = {
        "w": np.ones((20, 20)),
        "byte": np.ones((20, 20), np.uint8),
        "c": np.ones((9, 9), "c8"),
    }
    path = small_models.pack(arrays, tmp_path / "m.mp4", dtypes={"byte": "F8_E4M3"})
    assert [Path(p).stem for p in preview_kernels(path, tmp_path / "k")] == ["w"]


def test_archive_without_frames(tmp_path: Path) -> None:
    path = small_models.pack({"n": np.arange(4)}, tmp_path / "n.mp4")
    with pytest.raises(TensorNotFoundError, match="no pictures"):
        preview_archive(path, tmp_path / "p")


def test_existing_picture_needs_force(long_archive: Path, tmp_path: Path) -> None:
    (path,) = preview_archive(long_archive, tmp_path, frames=range(1, 2))
    assert Path(path).name == "frame-0001.png"
    with pytest.raises(OutputError):
        preview_archive(long_archive, tmp_path, frames=range(1, 2))
    preview_archive(long_archive, tmp_path, frames=range(1, 2), force=True)


def test_missing_imageio_says_how_to_get_it(
    long_archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "imageio.v3", None)
    with pytest.raises(CodecError, match=r"weightvid\[preview\]"):
        preview_archive(long_archive, tmp_path)


def test_colours() -> None:
    luma = np.full((64, 64), 128, np.uint8)
    assert colour_range(luma) == 3
    luma[:, :8] = 138
    luma[0, 0] = 255
    assert colour_range(luma) == 10
    table = colours(5).astype(int)
    brightness = table.sum(axis=1)
    assert (np.diff(brightness[123:129]) > 0).all()
    assert (np.diff(brightness[128:134]) < 0).all()
    assert table[100].tolist() == table[123].tolist()
    assert table[123][2] > table[123][0]
    assert table[133][0] > table[133][2]


def test_picture_shows_samples_borders_and_blank() -> None:
    luma = np.full((64, 256), 128, np.uint8)
    luma[:, 40] = 131
    picture = draw(luma, [Tile("layer.weight", 0, 0, 128)], "title", scale=3)
    table = colours(3)
    assert picture[3 * 50 + 1, 3 * 40 + 1].tolist() == table[131].tolist()
    assert picture[3 * 50 + 1, 3 * 90 + 1].tolist() == table[128].tolist()
    assert picture[3 * 50 + 1, 0].sum() < 100
    assert picture[3 * 50 + 1, 3 * 200].tolist() != table[128].tolist()
    label = picture[2:20, 3:100]
    assert (label.sum(axis=2) < 300).any()

"""Points of every kind: they restore what they should, and count every byte."""

from __future__ import annotations

import io
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest

from weightvid.codec import program
from weightvid.codec.registry import CODECS
from weightvid.compare import point
from weightvid.compare.archive import ArchiveCoder
from weightvid.compare.coded import Coder
from weightvid.compare.model import Model, load_model
from weightvid.compare.settings import Setting
from weightvid.errors import CodecError
from weightvid.loader import open_archive

PACK = Setting("pack", "x265", "ultrafast", "lossless", "yuv420p", None, "pack", 0.2)


def lossless(name: str, **more: Any) -> Setting:
    row = CODECS[name]
    usual = row.modes["lossless"].formats[0]
    fields = {"preset": row.preset, "pixel_format": usual, "quantizer": "pack", "rate": 0.2}
    return Setting("lossless", name, mode="lossless", **{**fields, **more})


def lossy(name: str, value: float, **more: Any) -> Setting:
    row = CODECS[name]
    fields = {"preset": row.preset, "pixel_format": row.modes["qp"].formats[0]}
    return Setting("lossy", name, mode="qp", value=value, **{**fields, **more})


def coder(model: Model, setting: Setting, ffmpeg: str | None = None) -> Coder:
    return point.coder(model, point.Request("", "", asdict(setting), "", ffmpeg))


def restored(model: Model, made: Coder, jobs: int = 1) -> tuple[dict[str, Any], int]:
    coded = made.encode(jobs)
    assert sum(coded.items.values()) == sum(map(len, coded.parts.values()))
    return made.decode(coded, jobs).tensors, sum(coded.items.values())


@pytest.mark.parametrize("name", ["x265", "x264", "svtav1", "vp9", "ffv1", "jpegls", "png"])
def test_lossless_codecs_restore_what_the_archive_does(name: str, model: Model) -> None:
    archive, _ = restored(model, ArchiveCoder(model, PACK))
    tensors, size = restored(model, coder(model, lossless(name)))
    assert model.judge(tensors).sha256 == model.judge(archive).sha256
    assert 0 < size < sum(t.nbytes for t in model.tensors.values())


@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuv420p10le", "yuv420p12le", "gray"])
def test_lossless_in_any_depth(pixel_format: str, model: Model) -> None:
    tensors, _ = restored(model, coder(model, lossless("x265", pixel_format=pixel_format)))
    usual, _ = restored(model, coder(model, lossless("x265")))
    assert model.judge(tensors).sha256 == model.judge(usual).sha256


@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuv420p10le", "yuv420p12le"])
def test_lossy_keeps_outliers_exactly(pixel_format: str, model: Model) -> None:
    setting = lossy("x265", 10, pixel_format=pixel_format)
    tensors, size = restored(model, coder(model, setting))
    quality = model.judge(tensors)
    assert quality.sqnr_db is not None
    assert quality.sqnr_db > 15
    before = model.tensors["layers.0.weight"]
    far = np.abs(before) > 1
    assert far.any()
    assert np.abs(tensors["layers.0.weight"] - before)[far].max() < 0.05
    coarse, smaller = restored(model, coder(model, replace(setting, value=30.0)))
    assert smaller < size
    assert (model.judge(coarse).sqnr_db or 99) < quality.sqnr_db


@pytest.mark.parametrize("inter", [False, True])
@pytest.mark.parametrize("name", ["x265", "x264", "svtav1"])
def test_frames_of_like_layers(name: str, inter: bool, model: Model) -> None:
    more: dict[str, Any] = {"frames": "like", "inter": inter}
    tensors, _ = restored(model, coder(model, lossless(name, **more)))
    usual, _ = restored(model, coder(model, lossless(name)))
    assert model.judge(tensors).sha256 == model.judge(usual).sha256
    tensors, _ = restored(model, coder(model, lossy(name, 12, **more)))
    assert (model.judge(tensors).sqnr_db or 0) > 12


def test_prediction_pays_where_layers_are_equal(tmp_path: Any) -> None:
    """The experiment can find what it looks for: copies of one layer cost next to nothing."""
    layer = np.random.default_rng(0).standard_normal((128, 128)).astype(np.float32)
    path = tmp_path / "copies.npz"
    np.savez(path, **{f"layer.{n}.weight": layer for n in range(4)})
    model = load_model(path)
    _, alone = restored(model, coder(model, lossless("x265", frames="like")))
    _, predicted = restored(model, coder(model, lossless("x265", frames="like", inter=True)))
    assert predicted < 0.5 * alone


@pytest.mark.parametrize("name", ["x265", "vp9", "svtav1"])
def test_more_jobs_give_the_same_tensors(name: str, tmp_path: Any) -> None:
    draw = np.random.default_rng(0)
    path = tmp_path / "large.npz"
    np.savez(path, **{f"w{n}": draw.standard_normal((1100, 1024)).astype("f4") for n in "ab"})
    model = load_model(path)
    made = coder(model, lossless(name, rate=1.2))
    coded = made.encode(1)
    assert coded.about["frames"] > 1
    hashes = {
        model.judge(made.decode(each, jobs).tensors).sha256
        for each in (coded, made.encode(2))
        for jobs in (1, 2)
    }
    assert len(hashes) == 1


@pytest.mark.parametrize("name", [n for n, row in CODECS.items() if row.backend == "ffmpeg"])
def test_codecs_of_the_program(name: str, model: Model) -> None:
    chosen = program.choose(CODECS[name], program.programs())
    assert not isinstance(chosen, str), chosen
    mode = next(iter(CODECS[name].modes))
    setting = (
        lossless(name) if mode == "lossless" else lossy(name, CODECS[name].modes["qp"].values[0])
    )
    tensors, size = restored(model, coder(model, setting, chosen.path))
    assert size > 1000
    if mode == "lossless":
        usual, _ = restored(model, coder(model, lossless("x265")))
        assert model.judge(tensors).sha256 == model.judge(usual).sha256
    else:
        assert (model.judge(tensors).sqnr_db or 0) > 12


def test_a_lossless_codec_that_is_not_is_found_out(model: Model) -> None:
    made = coder(model, lossless("png"))
    coded = made.encode(1)
    about = {**coded.about, "pictures_sha256": "0" * 64}
    with pytest.raises(CodecError, match="not lossless"):
        made.decode(replace(coded, about=about), 1)


def test_bfloat16_round_trip(tmp_path: Any) -> None:
    import torch
    from safetensors.torch import save_file

    values = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    save_file({"w": values.bfloat16(), "b": values[0].bfloat16()}, tmp_path / "m.safetensors")
    model = load_model(tmp_path / "m.safetensors")
    for setting in (PACK, lossless("ffv1"), lossy("x264", 4)):
        tensors, _ = restored(model, coder(model, setting))
        assert (model.judge(tensors).sqnr_db or 0) > 10
        assert np.array_equal(tensors["b"], model.tensors["b"])


def test_the_archive_is_what_pack_writes(model: Model) -> None:
    coded = ArchiveCoder(model, PACK).encode(1)
    with open_archive(io.BytesIO(coded.parts["archive"])) as archive:
        assert archive.header.about["recipe"] == "step 0.2"

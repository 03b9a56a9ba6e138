"""The summary: tensors, video, and the account of every byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models

from weightvid.checkpoint import from_mapping
from weightvid.loader import open_archive
from weightvid.pack import PackOptions, pack_checkpoint
from weightvid.summary import ACCOUNT, summarize_archive


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_models.pack(small_models.small(), tmp_path_factory.mktemp("small") / "s.mp4")


@pytest.fixture(scope="module")
def long_archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("long")
    return small_models.pack(small_models.several_frames(), folder / "l.mp4")


def all_exact(path: Path) -> Path:
    arrays = {"b": small_models.weights(1, 30), "n": np.arange(5)}
    pack_checkpoint(from_mapping(arrays), path, PackOptions())
    return path


def test_account_sums_to_the_file(archive: Path, long_archive: Path, tmp_path: Path) -> None:
    for path in (archive, long_archive, all_exact(tmp_path / "e.mp4")):
        account = summarize_archive(path).account
        assert tuple(account) == ACCOUNT
        assert sum(account.values()) == path.stat().st_size
        assert account["other"] == 0
        assert all(number >= 0 for number in account.values())


@pytest.mark.parametrize("share", [0.3, 0.8, 0.999])
def test_account_of_a_cut_archive(long_archive: Path, tmp_path: Path, share: float) -> None:
    data = long_archive.read_bytes()
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(data[: int(share * len(data))])
    summary = summarize_archive(cut)
    assert not summary.complete
    assert sum(summary.account.values()) == cut.stat().st_size
    assert any(tensor.coding == "missing" for tensor in summary.tensors)


def test_tensors(archive: Path) -> None:
    summary = summarize_archive(archive)
    source = small_models.small()
    assert {tensor.name for tensor in summary.tensors} == source.keys()
    assert summary.complete
    assert summary.metadata == {"format": "test"}
    assert summary.about["recipe"] == "fine"
    with open_archive(archive) as opened:
        for tensor in summary.tensors:
            info = opened.info(tensor.name)
            assert (tensor.dtype, tensor.shape, tensor.alias_of) == (
                info.dtype,
                info.shape,
                info.alias_of,
            )
            assert tensor.coding == info.coding
            if tensor.alias_of is None and info.params is not None:
                assert tensor.step == info.params.step
                assert tensor.sqnr_db == info.sqnr_db
                assert tensor.escapes == info.escapes
    floats = sum(a.size for n, a in source.items() if a.dtype.kind == "f" and n != "head.weight")
    assert summary.weights == floats
    assert summary.bits_per_weight == 8 * archive.stat().st_size / floats


def test_shares_sum_to_the_stream(long_archive: Path) -> None:
    summary = summarize_archive(long_archive)
    shares = sum(
        tensor.bits_per_weight * tensor.weights / 8
        for tensor in summary.tensors
        if tensor.coding == "video" and tensor.bits_per_weight is not None
    )
    assert shares == pytest.approx(summary.account["packets"] + summary.account["digits"])
    frames = {tensor.name: tensor.frames for tensor in summary.tensors}
    assert frames == {"a.weight": (0, 0), "b.weight": (0, 1), "c.weight": (1, 1), "c.bias": None}


def test_video(archive: Path) -> None:
    video = summarize_archive(archive).video
    assert (video.codec, video.profile, video.tier, video.frames) == ("hevc", "Main", "Main", 1)
    assert float(video.level) <= 4


def test_no_packet_is_read(long_archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from weightvid.codec import decode

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("decoded")

    monkeypatch.setattr(decode.Decoder, "decode", refuse)
    assert summarize_archive(long_archive).video.frames == 2

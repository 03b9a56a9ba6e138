"""The summary: tensors, video, and the account of every byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models

from weightvid import loader
from weightvid.inspect import ACCOUNT, summarize_archive
from weightvid.loader import open_archive


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    arrays = small_models.small()
    arrays["embed.weight"][3, 5] = 40.0
    return small_models.pack(arrays, tmp_path_factory.mktemp("small") / "s.mp4")


@pytest.mark.parametrize("details", [True, False])
def test_account_sums_to_the_file(
    archive: Path, long_archive: Path, tmp_path: Path, details: bool
) -> None:
    exact = {"b": small_models.weights(1, 30), "n": np.arange(5)}
    for path in (archive, long_archive, small_models.pack(exact, tmp_path / "e.mp4")):
        summary = summarize_archive(path, details=details)
        account = summary.account
        assert tuple(account) == ACCOUNT
        assert sum(account.values()) == path.stat().st_size
        assert all(number >= 0 for number in account.values())
        assert (account["other"] == 0) == (account["index"] > 0) == details
        assert summary.detailed == details


@pytest.mark.parametrize("share", [0.3, 0.8, 0.999])
def test_account_of_a_cut_archive(long_archive: Path, tmp_path: Path, share: float) -> None:
    data = long_archive.read_bytes()
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(data[: int(share * len(data))])
    summary = summarize_archive(cut)
    assert not summary.complete
    assert sum(summary.account.values()) == cut.stat().st_size
    if share < 0.9:
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
            assert (tensor.dtype, tensor.shape) == info.spec[1:]
            if tensor.alias_of is not None:
                assert tensor.alias_of == info.spec.name
                continue
            assert tensor.coding == ("video" if info.parts else "boxed")
            assert tensor.frames == ((0, 0) if info.frames else None)
            if info.end is not None:
                assert tensor.sqnr_db == info.end.sqnr_db
                assert tensor.kernel == info.kernel
                assert tensor.step == info.parts[0].step
    by_name = {tensor.name: tensor for tensor in summary.tensors}
    assert by_name["conv.weight"].kernel == (3, 3)
    assert by_name["embed.weight"].escapes > 0
    floats = sum(a.size for n, a in source.items() if a.dtype.kind == "f" and n != "head.weight")
    assert summary.weights == floats
    assert summary.bits_per_weight == 8 * archive.stat().st_size / floats


def test_shares_sum_to_the_packets(long_archive: Path) -> None:
    summary = summarize_archive(long_archive)
    shares = sum(
        tensor.bits_per_weight * tensor.weights / 8
        for tensor in summary.tensors
        if tensor.bits_per_weight is not None
    )
    assert shares == pytest.approx(summary.account["packets"])
    assert summary.packet_share > 0.8


def test_video(archive: Path) -> None:
    video = summarize_archive(archive).video
    assert (video.codec, video.profile, video.tier, video.frames) == ("HEVC", "Main", "Main", 1)
    assert float(video.level) <= 4
    assert video.full_range
    assert 0 < video.largest_packet == video.first_packet < video.width * video.height


def test_nothing_is_decoded(long_archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("decoded")

    monkeypatch.setattr(loader.Decoder, "decode", refuse)
    assert summarize_archive(long_archive).video.frames > 1

"""Hashes, and the comparison with a checkpoint."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models

from weightvid import loader
from weightvid.errors import FormatError
from weightvid.inspect import summarize_archive
from weightvid.loader import open_archive
from weightvid.pack import PackOptions, pack_checkpoint
from weightvid.verify import verify_archive


def save(arrays: small_models.Arrays, path: Path) -> Path:
    np.savez(path, **arrays)
    return path


def test_sound_archive(long_archive: Path) -> None:
    report = verify_archive(long_archive)
    assert report.ok
    assert report.tensors == report.tensors_intact == 4
    assert report.file_bytes == long_archive.stat().st_size
    assert (report.frames, report.affected, report.comparison) == (3, (), None)
    report = verify_archive(small_models.Pipe(long_archive.read_bytes()))
    assert report.ok
    assert (report.frames, report.file_bytes) == (None, None)


def test_comparison_is_what_numpy_computes(archive: Path, tmp_path: Path) -> None:
    source = small_models.small()
    report = verify_archive(archive, save(source, tmp_path / "m.npz"))
    comparison = report.comparison
    assert report.ok
    assert comparison is not None
    rows = {row.name: row for row in comparison.tensors}
    noise = power = largest = 0.0
    with open_archive(archive) as opened:
        for name, row in rows.items():
            end = opened.info(name).end
            claimed = None if end is None else end.sqnr_db
            assert row.claimed_db == claimed
            if row.exact:
                assert opened.stored(name).tobytes() == source[name].tobytes()
                assert row.sqnr_db is None
                continue
            error = opened[name].astype(np.float64) - source[name].astype(np.float64)
            own_noise, own_power = (error**2).sum(), (source[name].astype(np.float64) ** 2).sum()
            assert row.sqnr_db == pytest.approx(10 * np.log10(own_power / own_noise))
            assert row.sqnr_db == pytest.approx(claimed, abs=0.02)
            assert row.max_abs_error == np.abs(error).max()
            noise, power = noise + own_noise, power + own_power
            largest = max(largest, float(np.abs(error).max()))
    assert {name for name, row in rows.items() if row.exact} >= {"conv.bias", "count", "empty"}
    assert not rows["conv.weight"].exact
    assert comparison.sqnr_db == pytest.approx(10 * np.log10(power / noise))
    assert comparison.max_abs_error == largest


def test_worse_than_the_archive_says(archive: Path, tmp_path: Path) -> None:
    source = small_models.small()
    source["conv.weight"] = source["conv.weight"] + small_models.weights(9, 32, 16, 3, 3)
    report = verify_archive(archive, save(source, tmp_path / "m.npz"))
    assert not report.ok
    assert report.comparison is not None
    assert [text.split(":")[0] for text in report.comparison.below] == ["conv.weight"]


def test_another_model_of_the_same_shapes_fails(archive: Path, tmp_path: Path) -> None:
    """Random weights, or nothing but another bias: neither is what was packed."""
    other = {
        name: small_models.weights(99, *array.shape) if array.dtype == np.float32 else array
        for name, array in small_models.small().items()
    }
    report = verify_archive(archive, save(other, tmp_path / "r.npz"))
    assert not report.ok and report.comparison is not None
    named = {text.split(":")[0] for text in report.comparison.below}
    assert {"conv.weight", "embed.weight", "conv.bias"} <= named
    biased = small_models.small()
    biased["conv.bias"] = biased["conv.bias"] + np.float32(0.1)
    biased["count"] = biased["count"] + 1
    report = verify_archive(archive, save(biased, tmp_path / "b.npz"))
    assert report.comparison is not None
    assert [text.split(":")[0] for text in report.comparison.below] == ["conv.bias", "count"]


def test_pack_verify_and_inspect_have_one_sqnr(tmp_path: Path) -> None:
    """With an outlier, which all of them leave out."""
    weights = small_models.weights(5, 64, 64)
    weights[3, 4] = 100
    source = save({"w": weights, "v": small_models.weights(6, 40, 40)}, tmp_path / "m.npz")
    made = pack_checkpoint(source, tmp_path / "m.mp4", PackOptions(step_factor=0.18))
    found = verify_archive(tmp_path / "m.mp4", source).comparison
    assert made.sqnr_db is not None and found is not None and found.sqnr_db is not None
    assert found.sqnr_db == pytest.approx(made.sqnr_db, abs=1e-6)
    rows = {row.name: row.sqnr_db for row in found.tensors}
    assert rows == pytest.approx({tensor.name: tensor.sqnr_db for tensor in made.tensors})
    listed = {t.name: t.sqnr_db for t in summarize_archive(tmp_path / "m.mp4").tensors}
    assert listed == pytest.approx(rows, abs=0.01)
    assert 20 < made.sqnr_db < 30


def test_the_fewest_bits_of_mantissa_are_enough(tmp_path: Path) -> None:
    """Where 1-D floats are most of a small model, they keep 5 bits; a picture there need not be."""
    one = {"scale": np.array([1.017], np.float32)}
    many = one | {"w": small_models.weights(1, 32, 64), "b": small_models.weights(2, 20000)}
    for arrays in (many, one):
        source = save(arrays, tmp_path / "m.npz")
        pack_checkpoint(source, tmp_path / "m.mp4", PackOptions(recipe="small", force=True))
        report = verify_archive(tmp_path / "m.mp4", source)
        assert report.ok and report.comparison is not None
        assert report.comparison.max_abs_error > 0
        assert (report.comparison.sqnr_db is None) == (arrays is one)


@pytest.mark.parametrize(("most", "ok"), [(1.0, True), (1e-9, False)])
def test_divergence_of_the_outputs(archive: Path, tmp_path: Path, most: float, ok: bool) -> None:
    def logits(state: dict[str, Any]) -> Any:
        return np.asarray(state["embed.weight"])[:, :10] * 10

    against = save(small_models.small(), tmp_path / "m.npz")
    report = verify_archive(archive, against, evaluation=logits, max_kl=most)
    assert report.ok == ok
    assert report.comparison is not None and report.comparison.divergence is not None
    assert 1e-9 < report.comparison.divergence < 1


@pytest.mark.parametrize(("least", "ok"), [(10.0, True), (90.0, False)])
def test_least_sqnr(archive: Path, tmp_path: Path, least: float, ok: bool) -> None:
    against = save(small_models.small(), tmp_path / "m.npz")
    report = verify_archive(archive, against, min_sqnr_db=least)
    assert report.ok == ok
    assert report.comparison is not None
    assert bool(report.comparison.below) != ok


def test_another_model(archive: Path, tmp_path: Path) -> None:
    source = small_models.small()
    del source["mask"]
    source["conv.bias"] = source["conv.bias"].astype(np.float64)
    source["new"] = np.zeros(3)
    report = verify_archive(archive, save(source, tmp_path / "m.npz"))
    assert not report.ok
    assert report.defect is None
    assert report.comparison is not None
    assert report.comparison.missing == ("new",)
    assert report.comparison.extra == ("mask",)
    assert [text.split(":")[0] for text in report.comparison.mismatched] == ["conv.bias"]


def test_infinities_do_not_spoil_the_sums(tmp_path: Path) -> None:
    odd = {"odd": np.array([np.inf, np.nan, 1.0], np.float32), "w": small_models.weights(1, 40, 40)}
    path = small_models.pack(odd, tmp_path / "odd.mp4")
    comparison = verify_archive(path, save(odd, tmp_path / "m.npz")).comparison
    assert comparison is not None
    assert next(row for row in comparison.tensors if row.name == "odd").exact
    assert comparison.sqnr_db is not None
    assert np.isfinite(comparison.sqnr_db)


def test_damage_names_what_it_affects(long_archive: Path) -> None:
    with open_archive(long_archive) as opened:
        assert opened.index is not None
        offset, size = opened.index.frames[0]
        hit = {name for name in opened if 0 in opened.info(name).frames}
    data = bytearray(long_archive.read_bytes())
    data[offset + size - 1000] ^= 0x55
    report = verify_archive(io.BytesIO(data))
    assert not report.ok
    assert report.defect is not None
    assert report.defect.code in ("frame-digest", "decode")
    assert set(report.affected) == hit
    assert report.tensors_intact == 4 - len(hit)


def test_cut_archive(archive: Path) -> None:
    whole = archive.read_bytes()
    for cut in (whole[:-300], whole[:-20], whole[:-1], whole + b"more"):
        report = verify_archive(io.BytesIO(cut))
        assert report.defect is not None
        assert report.defect.code == "truncated"
        assert not report.ok


def test_something_else_raises(tmp_path: Path) -> None:
    path = tmp_path / "x.mp4"
    path.write_bytes(b"no archive at all")
    with pytest.raises(FormatError):
        verify_archive(path)


def test_no_frame_is_read_again_for_each_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Work is by frames and tensors, not by their product."""
    source = {f"block.{k}.weight": small_models.weights(k, 24, 20) for k in range(60)}
    pack_checkpoint(save(source, tmp_path / "m.npz"), tmp_path / "m.mp4", PackOptions(jobs=1))
    parsed: list[int] = []
    parse = loader.parse_sidecar
    monkeypatch.setattr(loader, "parse_sidecar", lambda *a: (parsed.append(1), parse(*a))[1])
    report = verify_archive(tmp_path / "m.mp4", tmp_path / "m.npz")
    assert report.ok
    assert report.comparison is not None
    assert all(row.claimed_db is not None for row in report.comparison.tensors)
    assert len(parsed) == 2 * (report.frames or 0)
    parsed.clear()
    with open_archive(tmp_path / "m.mp4") as archive:
        for name in archive:
            archive.info(name)
    assert len(parsed) == report.frames


def test_a_damaged_frame_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = {f"block.{k}.weight": small_models.weights(k, 24, 20) for k in range(60)}
    path = tmp_path / "m.mp4"
    pack_checkpoint(save(source, tmp_path / "m.npz"), path, PackOptions(jobs=1))
    data = bytearray(path.read_bytes())
    with open_archive(path) as archive:
        start, size = archive.index.frames[0] if archive.index else (0, 0)
        spans = archive.index.spans if archive.index else {}
        affected = {n for n, found in spans.items() if any(0 in span for span in found)}
    data[start + size // 2] ^= 64
    path.write_bytes(data)
    decoded: list[int] = []

    class Counting(loader.Decoder):
        def decode(self, number: int, data: bytes | None) -> Any:
            decoded.append(number)
            return super().decode(number, data)

    monkeypatch.setattr(loader, "Decoder", Counting)
    report = verify_archive(path)
    assert report.defect is not None
    assert len(report.affected) == len(affected) > 5
    assert decoded.count(0) <= 2

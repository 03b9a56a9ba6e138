"""BatchNorms with coarse statistics: what they compute stays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from weightvid.checkpoint import from_mapping
from weightvid.exact import norm_sqnr_db, norms_of, round_norm
from weightvid.loader import Floats, TensorSpec, open_archive
from weightvid.numpy import load_file, save_file
from weightvid.pack import PackOptions, pack_checkpoint
from weightvid.verify import verify_archive

NAMES = "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"


def norm(seed: int = 0, channels: int = 64) -> list[Floats]:
    random = np.random.default_rng(seed)
    values = (
        1 + 0.3 * random.standard_normal(channels), random.standard_normal(channels),
        2 * random.standard_normal(channels), np.exp(random.normal(0, 2, channels)),
    )  # fmt: skip
    return [value.astype(np.float32) for value in values]


def test_a_norm_needs_all_four_and_one_shape() -> None:
    specs = [TensorSpec(name, "F32", (8,)) for name in NAMES]
    assert [tuple(found) for found in norms_of(reversed(specs))] == [(3, 2, 1, 0)]
    for missing in range(4):
        assert not norms_of(specs[:missing] + specs[missing + 1 :])
        other = [
            TensorSpec(s.name, "F32", (9,)) if n == missing else s for n, s in enumerate(specs)
        ]
        assert not norms_of(other)


@pytest.mark.parametrize("bits", [7, 10])
def test_statistics_are_coarse_and_what_is_computed_fine(bits: int) -> None:
    values = norm()
    found = round_norm(values, bits)
    for value in found[2:]:
        assert not (value.view(np.uint32) & ((1 << 23 - bits // 3) - 1)).any()
    assert norm_sqnr_db(values, found) > 6 * bits
    weight, bias, mean, variance = (value.astype(np.float64) for value in found)
    given = [value.astype(np.float64) for value in values]
    x = np.random.default_rng(1).standard_normal((50, 64)) * 3
    ours = weight * (x - mean) / np.sqrt(variance + 1e-5) + bias
    right = given[0] * (x - given[2]) / np.sqrt(given[3] + 1e-5) + given[1]
    assert np.abs(ours - right).max() < 2.0**-bits * np.abs(right).max()


def test_a_broken_norm_is_only_rounded() -> None:
    values = norm()
    values[3][5] = -1
    found = round_norm(values, 7)
    assert all(np.allclose(f, v, rtol=2**-7) for f, v in zip(found, values, strict=True))


def test_statistics_of_a_base_stay_where_they_are_near() -> None:
    values, base = norm(), round_norm(norm(), 7)
    values[2][0] += 10 * np.sqrt(values[3][0])
    values[3][1] *= 2
    found = round_norm(values, 7, base)
    assert (found[2] != base[2]).nonzero()[0].tolist() == [0]
    assert (found[3] != base[3]).nonzero()[0].tolist() == [1]
    assert norm_sqnr_db(values, found) > 45


def test_archives_say_so_and_verify_judges_what_is_computed(tmp_path: Path) -> None:
    tensors = dict(zip(NAMES, norm(), strict=True))
    tensors["w"] = np.random.default_rng(2).standard_normal((64, 64)).astype(np.float32)
    save_file(tensors, tmp_path / "a.mp4", recipe="small")
    np.savez(tmp_path / "same.npz", **tensors)
    compared = verify_archive(tmp_path / "a.mp4", tmp_path / "same.npz").comparison
    assert compared is not None and compared.ok
    assert compared.norms_db is not None and compared.norms_db > 40
    assert min(row.sqnr_db or 99 for row in compared.tensors if row.name in NAMES) < 30
    found = load_file(tmp_path / "a.mp4")
    assert not np.allclose(found["bn.running_var"], tensors["bn.running_var"], rtol=0.01)
    for name in NAMES:
        other = tensors | {name: tensors[name] * np.float32(1.1)}
        np.savez(tmp_path / "other.npz", **other)
        report = verify_archive(tmp_path / "a.mp4", tmp_path / "other.npz")
        assert not report.ok
        assert report.comparison is not None
        assert any(name in said for said in report.comparison.below)


def test_what_is_to_be_kept_is_kept(tmp_path: Path) -> None:
    tensors = dict(zip(NAMES, norm(), strict=True))
    tensors["w"] = np.random.default_rng(2).standard_normal((64, 64)).astype(np.float32)
    options = PackOptions("small", keep=("*running_mean",), jobs=1)
    pack_checkpoint(from_mapping(tensors), tmp_path / "a.mp4", options)
    save_file(tensors, tmp_path / "fine.mp4", recipe="fine")
    with open_archive(tmp_path / "fine.mp4") as archive:
        assert all(np.array_equal(archive[name], tensors[name]) for name in NAMES)
    with open_archive(tmp_path / "a.mp4") as archive:
        assert np.array_equal(archive["bn.running_mean"], tensors["bn.running_mean"])
        assert np.allclose(archive["bn.running_var"], tensors["bn.running_var"], rtol=2**-7)


def test_a_norm_without_gain_is_judged_too(tmp_path: Path) -> None:
    tensors = dict(zip(NAMES, norm(), strict=True)) | {"bn.weight": np.zeros(64, np.float32)}
    save_file(tensors, tmp_path / "a.mp4", recipe="small")
    np.savez(tmp_path / "same.npz", **tensors)
    assert verify_archive(tmp_path / "a.mp4", tmp_path / "same.npz").ok
    tensors["bn.bias"][3] += 1
    np.savez(tmp_path / "other.npz", **tensors)
    assert not verify_archive(tmp_path / "a.mp4", tmp_path / "other.npz").ok


def test_a_broken_norm_is_judged_by_its_tensors(tmp_path: Path) -> None:
    tensors = dict(zip(NAMES, norm(), strict=True))
    tensors["bn.running_var"][5] = np.nan
    save_file(tensors, tmp_path / "a.mp4", recipe="small")
    np.savez(tmp_path / "same.npz", **tensors)
    assert verify_archive(tmp_path / "a.mp4", tmp_path / "same.npz").ok
    tensors["bn.bias"] *= np.float32(1.5)
    np.savez(tmp_path / "other.npz", **tensors)
    assert not verify_archive(tmp_path / "a.mp4", tmp_path / "other.npz").ok


@pytest.mark.parametrize(("channels", "bits"), [(40, 7), (512, 5)])
def test_floats_that_are_much_of_the_model_keep_fewer_bits(
    tmp_path: Path, channels: int, bits: int
) -> None:
    random = np.random.default_rng(3)
    tensors = {"w": random.standard_normal((64, 64)), "bias": random.standard_normal(channels)}
    given = {name: value.astype(np.float32) for name, value in tensors.items()}
    save_file(given, tmp_path / "a.mp4", recipe="small")
    kept = load_file(tmp_path / "a.mp4")["bias"].view(np.uint32)
    assert [bool((kept & ((1 << 23 - b) - 1)).any()) for b in (bits, bits - 1)] == [False, True]

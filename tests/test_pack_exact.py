"""What packing must not touch, must say, and must refuse."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models

from weightvid.archives import Salvage
from weightvid.checkpoint import from_mapping
from weightvid.errors import CheckpointError
from weightvid.levels.stats import is_sinusoid, tensor_stats
from weightvid.loader import TensorSpec, open_archive
from weightvid.pack import PackOptions, PackReport, pack_checkpoint

weights = small_models.weights


def packed(
    arrays: small_models.Arrays, path: Path, options: PackOptions | None = None
) -> tuple[PackReport, small_models.Arrays]:
    report = pack_checkpoint(from_mapping(arrays), path, options)
    with open_archive(path) as archive:
        return report, dict(archive.items())


def sinusoids(length: int, width: int) -> np.ndarray[Any, Any]:
    """Positions by sines and cosines, as in "Attention is all you need"."""
    rates = 10_000.0 ** (-np.arange(0, width, 2) / width)
    angles = np.arange(length)[:, None] * rates
    return np.stack([np.sin(angles), np.cos(angles)], 2).reshape(length, width).astype(np.float32)


def test_scales_of_packed_integers_stay_bit_for_bit(tmp_path: Path) -> None:
    arrays = {
        "l.qweight": np.arange(64 * 64, dtype=np.int32).reshape(64, 64),
        "l.scales": np.abs(weights(1, 4, 256)).astype(np.float16),
        "m.weight_packed": np.arange(4096, dtype=np.uint8).reshape(64, 64),
        "m.weight_scale_inv": np.abs(weights(2, 300)),  # which else would keep 8 bits of mantissa
        "n.weight": weights(3, 64, 64),
        "n.scale": weights(4, 32, 32),  # nothing packed beside it: a weight
    }
    report, found = packed(arrays, tmp_path / "m.mp4")
    for name in ("l.qweight", "l.scales", "m.weight_packed", "m.weight_scale_inv"):
        assert found[name].tobytes() == arrays[name].tobytes(), name
    assert {tensor.name for tensor in report.tensors} == {"n.weight", "n.scale"}
    assert any("l.scales, m.weight_scale_inv" in note for note in report.notes)


def test_constant_tables_stay_bit_for_bit(tmp_path: Path) -> None:
    arrays = {
        "encoder.mel_filters": np.maximum(weights(1, 40, 60), 0),
        "some.name": sinusoids(64, 48)[None],
        "rope.cos_cached": np.cos(np.outer(np.arange(40), np.arange(16))).astype(np.float32),
        "embed.weight": weights(2, 64, 48),
    }
    report, found = packed(arrays, tmp_path / "m.mp4")
    assert [tensor.name for tensor in report.tensors] == ["embed.weight"]
    for name in set(arrays) - {"embed.weight"}:
        assert found[name].tobytes() == arrays[name].tobytes(), name
    note = next(note for note in report.notes if "constant tables" in note)
    assert all(name in note for name in set(arrays) - {"embed.weight"})


def test_weights_of_that_size_are_no_sinusoids() -> None:
    def found(array: np.ndarray[Any, Any]) -> bool:
        return is_sinusoid(tensor_stats(TensorSpec("t", "F32", array.shape), [array]))

    assert found(sinusoids(100, 32))
    assert found(np.roll(sinusoids(100, 32), 7, axis=1))
    assert not found(sinusoids(100, 32) * np.float32(1.01))
    assert not found(np.clip(weights(1, 100, 32) * 20, -1, 1))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("fidelity", ["outputs", "weights", "integers"])
def test_a_tensor_of_one_sign_keeps_it(tmp_path: Path, sign: int, fidelity: str) -> None:
    arrays = {
        "lin.weight": sign * np.abs(weights(1, 48, 40)),
        "conv.weight": sign * np.square(weights(2, 24, 16, 3, 3)),
        "both.weight": weights(3, 48, 40),
    }
    report, found = packed(arrays, tmp_path / "m.mp4", PackOptions(fidelity=fidelity))
    assert len(report.tensors) == 3
    for name in ("lin.weight", "conv.weight"):
        assert (sign * found[name] >= 0).all()
        assert np.corrcoef(found[name].ravel(), arrays[name].ravel())[0, 1] > 0.9
    assert (found["both.weight"] < 0).any() and (found["both.weight"] > 0).any()


def test_an_optimizers_state_is_named(tmp_path: Path) -> None:
    arrays = {"w": weights(1, 40, 40), "0.exp_avg_sq": np.square(weights(2, 40, 40))}
    report, found = packed(arrays, tmp_path / "m.mp4")
    assert any("optimizer" in note and "0.exp_avg_sq" in note for note in report.notes)
    assert (found["0.exp_avg_sq"] >= 0).all()
    assert packed({"w": arrays["w"]}, tmp_path / "w.mp4")[0].notes == ()


def test_a_model_whose_weights_are_left_out_is_refused(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    packed_params = (torch.zeros(9, 9), None)
    state = {"fc.scale": torch.tensor(1.0), "fc._packed_params._packed_params": packed_params}
    torch.save(state, tmp_path / "q.pt")
    with pytest.raises(CheckpointError, match="cannot be packed: fc"):
        pack_checkpoint(tmp_path / "q.pt", tmp_path / "q.mp4")
    assert not (tmp_path / "q.mp4").exists()


def test_half_of_a_small_model_gives_about_half(tmp_path: Path) -> None:
    arrays = {f"{n:02d}.weight": weights(n, 64, 64, 3, 3) for n in range(8)}
    packed(arrays, tmp_path / "m.mp4")
    data = (tmp_path / "m.mp4").read_bytes()
    counts = [
        len(list(Salvage(open_archive(io.BytesIO(data[: int(len(data) * share)])))))
        for share in (0.25, 0.5, 0.75)
    ]
    assert counts == sorted(counts)
    assert 3 <= counts[1] <= 4
    assert 5 <= counts[2] < 8

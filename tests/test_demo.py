"""The demo's numpy network and the baselines it is shown beside."""

from __future__ import annotations

import lzma
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import load_file

from weightvid import baselines, demo
from weightvid.errors import CheckpointError

Array = npt.NDArray[np.generic]
finite_weights = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=4, max_side=7),
    elements=st.floats(-1e6, 1e6, width=32),
)


@pytest.fixture(scope="module")
def checkpoint(digits_dir: Path) -> dict[str, Array]:
    tensors: dict[str, Array] = load_file(digits_dir / demo.CHECKPOINT_NAME)
    return tensors


@pytest.fixture(scope="module")
def holdout(digits_dir: Path) -> demo.Holdout:
    return demo.load_holdout(digits_dir / demo.HOLDOUT_NAME)


def convolved_slowly(
    x: npt.NDArray[np.float32], kernel: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    n, c, h, w = x.shape
    o, per_group, kh, kw = kernel.shape
    padded = np.pad(x, ((0, 0), (0, 0), (kh // 2,) * 2, (kw // 2,) * 2))
    out = np.zeros((n, o, h, w), np.float32)
    for channel in range(o):
        first = channel * (c // per_group) * per_group // o if per_group < c else 0
        for row in range(h):
            for column in range(w):
                window = padded[:, first : first + per_group, row : row + kh, column : column + kw]
                out[:, channel, row, column] = (window * kernel[channel]).sum(axis=(1, 2, 3))
    return out


@pytest.mark.parametrize(
    ("inputs", "kernel"),
    [(1, (4, 1, 3, 3)), (3, (5, 3, 1, 1)), (4, (6, 4, 3, 3)), (4, (4, 1, 3, 3)), (2, (3, 2, 5, 1))],
)
def test_conv2d_is_the_sum_over_windows(inputs: int, kernel: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, inputs, 5, 6), np.float32)
    weights = rng.standard_normal(kernel, np.float32)
    assert np.allclose(demo.conv2d(x, weights), convolved_slowly(x, weights), atol=1e-5)


def test_network_classifies_the_held_out_digits(
    checkpoint: dict[str, Array], holdout: demo.Holdout
) -> None:
    predicted = demo.logits(checkpoint, holdout.images).argmax(axis=1)
    assert len(holdout.labels) == 450
    assert int((predicted == holdout.labels).sum()) == 446


def test_network_agrees_with_pytorch(checkpoint: dict[str, Array], holdout: demo.Holdout) -> None:
    torch = pytest.importorskip("torch")
    state = {name: torch.from_numpy(t.copy()) for name, t in checkpoint.items()}
    x = torch.from_numpy(holdout.images[:50].astype(np.float32) / 16).unsqueeze(1)
    functional = torch.nn.functional
    for block, groups in (("stem", 1), ("depthwise", 32), ("pointwise", 1), ("conv", 1)):
        if block == "conv":
            x = functional.max_pool2d(x, 2)
        x = functional.conv2d(x, state[f"{block}.0.weight"], padding="same", groups=groups)
        names = ("running_mean", "running_var", "weight", "bias")
        x = torch.relu(functional.batch_norm(x, *(state[f"{block}.1.{name}"] for name in names)))
    x = functional.max_pool2d(x, 2).flatten(1)
    x = torch.relu(functional.linear(x, state["fc1.weight"], state["fc1.bias"]))
    x = functional.linear(x, state["fc2.weight"], state["fc2.bias"])
    np.testing.assert_allclose(
        demo.logits(checkpoint, holdout.images[:50]), x.numpy(), rtol=1e-4, atol=1e-4
    )


def test_network_names_a_missing_tensor(
    checkpoint: dict[str, Array], holdout: demo.Holdout
) -> None:
    broken = {name: t for name, t in checkpoint.items() if name != "fc1.bias"}
    with pytest.raises(CheckpointError, match=r"fc1\.bias"):
        demo.logits(broken, holdout.images)


def test_checkpoint_exercises_exact_integers(checkpoint: dict[str, Array]) -> None:
    counters = [t for name, t in checkpoint.items() if name.endswith("num_batches_tracked")]
    assert {(t.dtype, t.shape) for t in counters} == {(np.dtype(np.int64), ())}
    assert all(int(t) > 0 for t in counters)


def test_sample_dir_is_found(digits_dir: Path) -> None:
    assert (demo.sample_dir() / demo.HOLDOUT_NAME).is_file()


def test_run_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=demo.CHECKPOINT_NAME):
        demo.run(tmp_path, tmp_path)


def test_count_exact_sees_bits_not_values() -> None:
    original = {"a": np.array([0.0]), "b": np.array([1.0])}
    assert demo.count_exact(original, {"a": np.array([-0.0]), "b": np.array([1.0])}) == 1


@pytest.mark.parametrize(
    "restored",
    [{}, {"a": np.zeros(2)}, {"a": np.zeros(1, np.float32)}, {"a": np.zeros(1), "b": np.zeros(1)}],
)
def test_count_exact_refuses_another_model(restored: dict[str, Array]) -> None:
    with pytest.raises(CheckpointError):
        demo.count_exact({"a": np.zeros(1)}, restored)


@given(finite_weights)
def test_int8_error_is_half_a_step(weights: npt.NDArray[np.float32]) -> None:
    quantized = baselines.int8_per_channel(weights)
    assert quantized.levels.shape == weights.shape
    assert quantized.scales.shape == weights.shape[:1]
    assert int(np.abs(quantized.levels.astype(int)).max()) <= 127
    error = np.abs(baselines.int8_dequantize(quantized) - weights).reshape(len(weights), -1)
    # Half a step, and the roundings of the scale itself: 2**-24 of the largest level, twice.
    assert (error <= quantized.scales[:, np.newaxis] * (0.5 + 127 * 2.0**-22) + 1e-38).all()


def test_int8_restores_zero_channels_and_dtypes() -> None:
    tensors: dict[str, Array] = {
        "zero": np.zeros((2, 3), np.float16),
        "empty": np.zeros((0, 3), np.float32),
        "hollow": np.zeros((3, 0), np.float32),
        "bias": np.array([0.1, 0.2]),
        "nan": np.array([[np.nan, 1.0]]),
        "vast": np.array([[1e300, 1.0]]),
        "count": np.array(7, np.int64),
    }
    restored = baselines.int8_xz(tensors).tensors
    assert demo.count_exact(tensors, restored) == len(tensors)


def test_xz_bytes_is_the_size_of_an_xz_file() -> None:
    data = np.random.default_rng(0).integers(0, 4, 5000).astype(np.uint8).tobytes()
    whole = lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)
    assert baselines.xz_bytes([data[:1234], data[1234:]]) == len(whole)


def test_fp16_keeps_what_half_cannot_hold() -> None:
    pytest.importorskip("zstandard")
    tensors: dict[str, Array] = {
        "big": np.array([1e6, 1.0], np.float32),
        "fine": np.array([0.5, 2.0], np.float32),
        "count": np.array(7, np.int64),
    }
    baseline = baselines.fp16_zstd(tensors)
    assert baseline is not None
    assert demo.count_exact(tensors, baseline.tensors) == 3


def test_baselines_on_the_sample(
    checkpoint: dict[str, Array], holdout: demo.Holdout, digits_dir: Path
) -> None:
    source_bytes = (digits_dir / demo.CHECKPOINT_NAME).stat().st_size
    baseline = baselines.int8_xz(checkpoint)
    assert source_bytes / 5 < baseline.file_bytes < source_bytes / 4
    predicted = demo.logits(baseline.tensors, holdout.images).argmax(axis=1)
    assert int((predicted == holdout.labels).sum()) >= 445

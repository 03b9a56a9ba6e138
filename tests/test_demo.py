"""The demo's numpy network and the baseline that is shown with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file

from weightvid import demo
from weightvid.errors import CheckpointError

Array = npt.NDArray[np.generic]


@pytest.fixture(scope="module")
def checkpoint(digits_dir: Path) -> dict[str, Array]:
    tensors: dict[str, Array] = load_file(digits_dir / demo.CHECKPOINT_NAME)
    return tensors


@pytest.fixture(scope="module")
def holdout(digits_dir: Path) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    with np.load(digits_dir / demo.HOLDOUT_NAME) as data:
        return data["images"], data["labels"]


@pytest.mark.parametrize(
    ("inputs", "kernel"),
    [(1, (4, 1, 3, 3)), (3, (5, 3, 1, 1)), (4, (6, 4, 3, 3)), (4, (4, 1, 3, 3)), (2, (3, 2, 5, 1))],
)
def test_convolution_is_torchs(inputs: int, kernel: tuple[int, ...]) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, inputs, 5, 6), np.float32)
    weights = rng.standard_normal(kernel, np.float32)
    groups, given = inputs // kernel[1], (torch.from_numpy(x), torch.from_numpy(weights))
    expected = torch.nn.functional.conv2d(*given, padding="same", groups=groups)
    assert np.allclose(demo.conv2d(x, weights), expected.numpy(), atol=1e-5)


def test_network_classifies_the_held_out_digits(
    checkpoint: dict[str, Array], holdout: tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]
) -> None:
    images, labels = holdout
    assert len(labels) == 450
    predicted = demo.logits(checkpoint, images).argmax(axis=1)
    assert int((predicted == labels).sum()) == 446


def test_network_names_a_missing_tensor(
    checkpoint: dict[str, Array], holdout: tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]
) -> None:
    broken = {name: t for name, t in checkpoint.items() if name != "fc1.bias"}
    with pytest.raises(CheckpointError, match=r"fc1\.bias"):
        demo.logits(broken, holdout[0])


def test_run_says_what_is_missing(tmp_path: Path) -> None:
    assert (demo.sample_dir() / demo.HOLDOUT_NAME).is_file()
    with pytest.raises(CheckpointError, match=demo.CHECKPOINT_NAME):
        demo.run_demo(tmp_path, tmp_path, lambda _: None)

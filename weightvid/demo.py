"""The demo's work: pack a digit classifier, restore it, and count what it still gets right.

Nothing here prints and nothing needs torch: the network is run in numpy. The checkpoint and the
held-out digits come from ``tools/train_digits.py``.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file

from weightvid.checkpoint import open_checkpoint
from weightvid.compare.model import load_model
from weightvid.compare.rivals import plain_methods
from weightvid.errors import CheckpointError
from weightvid.loader import Array, Floats, open_archive
from weightvid.pack import PackOptions, pack_checkpoint
from weightvid.unpack import UnpackOptions, unpack_archive

CHECKPOINT_NAME: Final = "digits_cnn.safetensors"
HOLDOUT_NAME: Final = "digits_holdout.npz"
#: the plain way that the table shows, which counts neither names nor shapes.
INT8: Final = "integers per channel + xz"
#: PyTorch's default ``BatchNorm2d.eps``, with which the network was trained.
_BATCH_NORM_EPS: Final = np.float32(1e-5)


class DemoRow(NamedTuple):
    """A way to store the network: ``fp32``, ``int8+xz``, ``weightvid``, ``weightvid small``.

    Of the held-out digits, ``correct`` are classified right, and a share of ``agreement`` (0..1)
    as by the fp32 network, right or wrong.
    """

    name: str
    file_bytes: int
    bits_per_weight: float
    correct: int
    agreement: float


class DemoReport(NamedTuple):
    """What the demo found: rows, counts, seconds (every hash checked), where the files lie."""

    rows: tuple[DemoRow, ...]
    images: int
    weights: int
    pack_s: float
    unpack_s: float
    source: str
    archive: str
    restored: str


def sample_dir() -> Path:
    """Folder of the demo's checkpoint and digits: in the wheel, or in a source checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "sample", package.parent / "data" / "digits"):
        if (folder / CHECKPOINT_NAME).is_file():
            return folder
    raise CheckpointError(f"the demo's {CHECKPOINT_NAME} is missing: reinstall weightvid")


def run_demo(data_dir: Path, work_dir: Path, announce: Callable[[str], None]) -> DemoReport:
    """Pack the sample (of `sample_dir`), unpack it, and compare sizes and answers.

    The archive and the restored checkpoint go to ``work_dir``, where earlier ones are replaced.
    ``announce`` is called with ``pack``, ``unpack`` and ``evaluate`` as each begins.
    """
    source, holdout = data_dir / CHECKPOINT_NAME, data_dir / HOLDOUT_NAME
    for path in (source, holdout):
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: the demo needs it")
    work_dir.mkdir(parents=True, exist_ok=True)
    archive, restored = work_dir / "digits_cnn.mp4", work_dir / "digits_cnn.restored.safetensors"
    announce("pack")
    packed = pack_checkpoint(source, archive, PackOptions(force=True))
    announce("unpack")
    unpacked = unpack_archive(archive, restored, UnpackOptions(force=True))
    small = work_dir / "digits_cnn.small.mp4"
    pack_checkpoint(source, small, PackOptions(recipe="small", force=True))
    with open_archive(small) as opened:
        coarse = dict(opened.items())
    announce("evaluate")
    with open_checkpoint(source) as reader:
        model = load_model(reader)
        int8 = next(way for way in plain_methods() if way.name == INT8).code(model, 8)
    with np.load(holdout, allow_pickle=False) as data:
        images, labels = data["images"], data["labels"]
    expected = logits(model.tensors, images).argmax(axis=1)
    rows = []
    for name, file_bytes, tensors in (
        ("fp32", source.stat().st_size, model.tensors),
        ("int8+xz", int8.file_bytes, int8.tensors),
        ("weightvid", archive.stat().st_size, load_file(restored)),
        ("weightvid small", small.stat().st_size, coarse),
    ):
        found = logits(tensors, images).argmax(axis=1)
        correct, agreement = int((found == labels).sum()), float((found == expected).mean())
        rows.append(DemoRow(name, file_bytes, 8 * file_bytes / model.weights, correct, agreement))
    return DemoReport(
        tuple(rows), len(labels), model.weights, packed.seconds, unpacked.seconds,
        str(source), str(archive), str(restored),
    )  # fmt: skip


def logits(tensors: Mapping[str, Array], images: npt.NDArray[np.uint8]) -> Floats:
    """Run the network of ``tools/train_digits.py`` on images of shape (n, 8, 8), levels 0..16."""
    weights = {name: t.astype(np.float32) for name, t in tensors.items()}
    x = images.astype(np.float32)[:, np.newaxis] / np.float32(16)
    try:
        for block in ("stem", "depthwise", "pointwise"):
            x = _conv_bn_relu(x, weights, block)
        x = _conv_bn_relu(_max_pool(x), weights, "conv")
        x = _max_pool(x).reshape(len(x), -1)
        x = np.maximum(x @ weights["fc1.weight"].T + weights["fc1.bias"], 0)
        result: Floats = x @ weights["fc2.weight"].T + weights["fc2.bias"]
    except KeyError as error:
        raise CheckpointError(f"not the demo's network: tensor {error} is missing") from error
    return result


def conv2d(x: Floats, kernel: Floats) -> Floats:
    """Convolution with stride 1 and zero padding that keeps the size; depthwise if it looks so."""
    height, width = kernel.shape[2:]
    sides = (height // 2, height // 2), (width // 2, width // 2)
    padded = np.pad(x, ((0, 0), (0, 0), *sides))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(2, 3))
    if kernel.shape[1] == 1 and x.shape[1] == kernel.shape[0]:
        return np.asarray(np.einsum("nchwij,cij->nchw", windows, kernel[:, 0]))
    return np.moveaxis(np.tensordot(windows, kernel, axes=((1, 4, 5), (1, 2, 3))), 3, 1)


def _conv_bn_relu(x: Floats, weights: Mapping[str, Floats], block: str) -> Floats:
    """Convolution ``block.0``, batch norm ``block.1`` with its running statistics, ReLU."""
    deviation = np.sqrt(weights[f"{block}.1.running_var"] + _BATCH_NORM_EPS)
    gain = weights[f"{block}.1.weight"] / deviation
    offset = weights[f"{block}.1.bias"] - weights[f"{block}.1.running_mean"] * gain
    y = conv2d(x, weights[f"{block}.0.weight"])
    return np.asarray(np.maximum(y * gain[:, None, None] + offset[:, None, None], 0))


def _max_pool(x: Floats) -> Floats:
    """Largest of each 2x2 square: (n, c, h, w) -> (n, c, h / 2, w / 2)."""
    n, c, h, w = x.shape
    return np.asarray(x.reshape(n, c, h // 2, 2, w // 2, 2).max(axis=(3, 5)))

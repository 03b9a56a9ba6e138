"""The demo's work: pack a digit classifier, restore it, and count what it still gets right.

Nothing here prints and nothing needs torch: the network is run in numpy. The checkpoint and the
held-out digits come from ``tools/train_digits.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Final

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file as load_safetensors

from weightvid.baselines import int8_xz
from weightvid.errors import CheckpointError

Array = npt.NDArray[np.generic]
Floats = npt.NDArray[np.float32]
Progress = Callable[[str], None]

CHECKPOINT_NAME: Final = "digits_cnn.safetensors"
HOLDOUT_NAME: Final = "digits_holdout.npz"
ARCHIVE_NAME: Final = "digits_cnn.mp4"
RESTORED_NAME: Final = "digits_cnn.restored.safetensors"

#: PyTorch's default ``BatchNorm2d.eps``, with which the network was trained.
BATCH_NORM_EPS: Final = np.float32(1e-5)


@dataclass(frozen=True, slots=True)
class Holdout:
    """Digits the network was not trained on.

    Attributes
    ----------
    images : ndarray of uint8, shape (n, 8, 8)
        Grey levels 0..16.
    labels : ndarray of uint8, shape (n,)
        0..9.
    """

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class DemoRow:
    """One way to store the network.

    Attributes
    ----------
    name : str
        ``"fp32"``, ``"int8+xz"`` or ``"weightvid"``.
    file_bytes : int
        Bytes of the whole file.
    bits_per_weight : float
        8 x ``file_bytes`` / number of elements in the source's tensors.
    correct : int
        Held-out digits classified correctly.
    agreement : float
        Share (0..1) of held-out digits classified as the fp32 network does, right or wrong.
    """

    name: str
    file_bytes: int
    bits_per_weight: float
    correct: int
    agreement: float


@dataclass(frozen=True, slots=True)
class DemoReport:
    """What the demo found.

    Attributes
    ----------
    rows : tuple of DemoRow
        fp32 (the source file), int8+xz, weightvid.
    images : int
        Number of held-out digits behind ``correct`` and ``agreement``.
    weights : int
        Elements in the source's tensors.
    exact_tensors : int
        Tensors that came back bit for bit (batch norm, biases, counters).
    tensors : int
        All tensors of the network.
    pack_s, unpack_s : float
        Wall-clock seconds; both check every hash.
    archive, restored : str
        Where the two files lie.
    """

    rows: tuple[DemoRow, ...]
    images: int
    weights: int
    exact_tensors: int
    tensors: int
    pack_s: float
    unpack_s: float
    archive: str
    restored: str


def sample_dir() -> Path:
    """Folder of the demo's checkpoint and digits: in the wheel, or in a source checkout.

    Raises
    ------
    CheckpointError
        Neither place has it.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "sample", package.parent / "data" / "digits"):
        if (folder / CHECKPOINT_NAME).is_file():
            return folder
    raise CheckpointError(f"the demo's {CHECKPOINT_NAME} is missing: reinstall weightvid")


def load_holdout(path: Path) -> Holdout:
    """Read the held-out digits from an npz with ``images`` and ``labels``."""
    with np.load(path, allow_pickle=False) as data:
        return Holdout(data["images"], data["labels"])


def run(data_dir: Path, work_dir: Path, progress: Progress | None = None) -> DemoReport:
    """Pack the sample, unpack it, and compare sizes and answers.

    Parameters
    ----------
    data_dir : Path
        Folder with the sample, usually :func:`sample_dir`.
    work_dir : Path
        Folder to write the archive and the restored checkpoint to; earlier ones are replaced.
    progress : callable or None
        Called with ``"pack"``, ``"unpack"``, ``"int8+xz"`` and ``"evaluate"`` as each begins.

    Raises
    ------
    WeightvidError
        The sample is missing or damaged, or the archive does not come back as it was written.
    """
    announce = progress if progress is not None else _ignore
    source, holdout_path = data_dir / CHECKPOINT_NAME, data_dir / HOLDOUT_NAME
    for path in (source, holdout_path):
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: the demo needs it")
    work_dir.mkdir(parents=True, exist_ok=True)
    archive, restored_path = work_dir / ARCHIVE_NAME, work_dir / RESTORED_NAME

    pack_s, unpack_s = _round_trip(source, archive, restored_path, announce)
    original: dict[str, Array] = load_safetensors(source)
    restored: dict[str, Array] = load_safetensors(restored_path)
    exact_tensors = count_exact(original, restored)

    announce("int8+xz")
    baseline = int8_xz(original)

    announce("evaluate")
    holdout = load_holdout(holdout_path)
    weights = sum(t.size for t in original.values())
    expected = logits(original, holdout.images).argmax(axis=1)

    def row(name: str, file_bytes: int, tensors: Mapping[str, Array]) -> DemoRow:
        predicted = logits(tensors, holdout.images).argmax(axis=1)
        return DemoRow(
            name=name,
            file_bytes=file_bytes,
            bits_per_weight=8 * file_bytes / weights,
            correct=int((predicted == holdout.labels).sum()),
            agreement=float((predicted == expected).mean()),
        )

    return DemoReport(
        rows=(
            row("fp32", source.stat().st_size, original),
            row(baseline.name, baseline.file_bytes, baseline.tensors),
            row("weightvid", archive.stat().st_size, restored),
        ),
        images=len(holdout.labels),
        weights=weights,
        exact_tensors=exact_tensors,
        tensors=len(original),
        pack_s=pack_s,
        unpack_s=unpack_s,
        archive=str(archive),
        restored=str(restored_path),
    )


def count_exact(original: Mapping[str, Array], restored: Mapping[str, Array]) -> int:
    """Number of tensors that are bit-identical in both.

    Raises
    ------
    CheckpointError
        A tensor is missing, new, or of another shape or dtype.
    """
    if original.keys() != restored.keys():
        raise CheckpointError(f"tensors differ: {sorted(original.keys() ^ restored.keys())}")
    for name, tensor in original.items():
        other = restored[name]
        if (tensor.shape, tensor.dtype) != (other.shape, other.dtype):
            raise CheckpointError(
                f"{name} was {tensor.dtype}{tensor.shape} and came back as "
                f"{other.dtype}{other.shape}"
            )
    return sum(t.tobytes() == restored[name].tobytes() for name, t in original.items())


def logits(tensors: Mapping[str, Array], images: npt.NDArray[np.uint8]) -> Floats:
    """Run the network of ``tools/train_digits.py`` in float32.

    Parameters
    ----------
    tensors : mapping of str to ndarray
        Its state dict.
    images : ndarray of uint8, shape (n, 8, 8)
        Grey levels 0..16.

    Returns
    -------
    ndarray of float32, shape (n, 10)
        One logit for each digit.

    Raises
    ------
    CheckpointError
        A tensor is missing.
    """
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
    """Convolution with stride 1, odd kernel and "same" zero padding.

    Parameters
    ----------
    x : ndarray of float32, shape (n, c, h, w)
        Input.
    kernel : ndarray of float32, shape (o, c, kh, kw), or (c, 1, kh, kw) for a depthwise one
        Weights.

    Returns
    -------
    ndarray of float32, shape (n, o, h, w)
    """
    height, width = kernel.shape[2:]
    top, left = height // 2, width // 2
    padded = np.pad(x, ((0, 0), (0, 0), (top, top), (left, left)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(2, 3))
    if kernel.shape[1] == 1 and x.shape[1] == kernel.shape[0]:
        depthwise: Floats = np.einsum("nchwij,cij->nchw", windows, kernel[:, 0])
        return depthwise
    products = np.tensordot(windows, kernel, axes=((1, 4, 5), (1, 2, 3)))
    return np.moveaxis(products, 3, 1)


def _conv_bn_relu(x: Floats, weights: Mapping[str, Floats], block: str) -> Floats:
    """Convolution ``block.0``, batch norm ``block.1`` with its running statistics, ReLU."""
    gain = weights[f"{block}.1.weight"] / np.sqrt(
        weights[f"{block}.1.running_var"] + BATCH_NORM_EPS
    )
    offset = weights[f"{block}.1.bias"] - weights[f"{block}.1.running_mean"] * gain
    y = conv2d(x, weights[f"{block}.0.weight"])
    result: Floats = np.maximum(y * gain[:, np.newaxis, np.newaxis] + offset[:, None, None], 0)
    return result


def _max_pool(x: Floats) -> Floats:
    """Largest of each 2x2 square: (n, c, h, w) -> (n, c, h / 2, w / 2)."""
    n, c, h, w = x.shape
    pooled: Floats = x.reshape(n, c, h // 2, 2, w // 2, 2).max(axis=(3, 5))
    return pooled


def _round_trip(
    source: Path, archive: Path, restored: Path, announce: Progress
) -> tuple[float, float]:
    """Pack and unpack, each of which checks its hashes; seconds taken by each."""
    # Late, so that the network and the baseline can be used without the encoder.
    from weightvid.pack import pack_checkpoint
    from weightvid.unpack import UnpackOptions, unpack_archive

    # PackOptions has no say over an existing file, and the demo owns the names in its folder.
    archive.unlink(missing_ok=True)
    announce("pack")
    start = perf_counter()
    pack_checkpoint(source, archive)
    packed = perf_counter()
    announce("unpack")
    unpack_archive(archive, restored, options=UnpackOptions(force=True))
    return packed - start, perf_counter() - packed


def _ignore(stage: str) -> None:
    """Progress callback that does nothing."""

"""Plain ways to store a checkpoint: rounded integers in xz or zstd, no video and no trellis.

Their bytes hold no names, shapes or index, which any real file needs and weightvid's do count.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from weightvid.baselines import ZSTD_LEVEL, xz_bytes
from weightvid.quantize.mantissa import FULL_BITS, round_mantissa

State = dict[str, Any]
Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Plain:
    """A checkpoint as integers: the chunks of its file, and what its reader gets back."""

    chunks: tuple[bytes, ...]
    restored: State

    def xz(self) -> int:
        """Bytes as one ``xz -9e`` file."""
        return xz_bytes(self.chunks)

    def zstd(self) -> int:
        """Bytes as one ``zstd -19`` file."""
        import zstandard

        return len(zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(b"".join(self.chunks)))


def per_channel(state: State, bits: int) -> Plain:
    """Integers of ``bits`` bits, one float32 scale per output channel by its largest magnitude."""

    def rounded(x: Array) -> tuple[Array, Array]:
        top = 2 ** (bits - 1) - 1
        within = tuple(range(1, x.ndim))
        scales = np.abs(x).max(axis=within, keepdims=True) / np.float32(top)
        levels = np.rint(x / np.where(scales > 0, scales, 1)).clip(-top, top)
        return levels, scales.astype(np.float32)

    return _quantized(state, rounded)


def half_precision(state: State) -> Plain:
    """Every float tensor as float16, where that stays finite."""
    import torch

    chunks: list[bytes] = []
    restored: State = {}
    for name, tensor in state.items():
        half = tensor.to(torch.float16) if tensor.is_floating_point() else tensor
        if tensor.is_floating_point() and not half.isfinite().all():
            half = tensor
        chunks.append(tensor_bytes(half))
        restored[name] = half.to(tensor.dtype)
    return Plain(tuple(chunks), restored)


def global_step(state: State, factor: float, mantissa_bits: int = FULL_BITS) -> Plain:
    """One step for the whole network: ``factor`` x the root mean square of all its matrices.

    1-D float32 tensors keep ``mantissa_bits`` of their mantissas, 11..23.
    """
    matrices = [t.float().numpy() for t in state.values() if _is_matrix(t)]
    power = sum(float(np.square(x, dtype=np.float64).sum()) for x in matrices)
    step = np.float32(factor * (power / sum(x.size for x in matrices)) ** 0.5)
    short = {name: _shortened(tensor, mantissa_bits) for name, tensor in state.items()}
    return _quantized(short, lambda x: (np.rint(x / step), np.reshape(step, 1)))


def _shortened(tensor: Any, mantissa_bits: int) -> Any:
    import torch

    if tensor.dtype != torch.float32 or tensor.dim() != 1 or mantissa_bits == FULL_BITS:
        return tensor
    return torch.from_numpy(round_mantissa(tensor.numpy(), mantissa_bits))


def _quantized(state: State, rounded: Any) -> Plain:
    import torch

    levels: list[bytes] = []
    scales: list[bytes] = []
    rest: list[bytes] = []
    restored: State = {}
    for name, tensor in state.items():
        if not _is_matrix(tensor):
            rest.append(tensor_bytes(tensor))
            restored[name] = tensor
            continue
        level, scale = rounded(tensor.float().numpy())
        levels.append(narrow(level).tobytes())
        scales.append(scale.tobytes())
        restored[name] = torch.from_numpy(np.asarray(level * scale, np.float32)).to(tensor.dtype)
    return Plain((*levels, *scales, *rest), restored)


def same_integers(levels: Iterable[Array], steps: int, exact: Iterable[Any]) -> int:
    """``xz -9e`` over an archive's own levels, a 4-byte step for each, and its exact tensors.

    Parameters
    ----------
    levels : iterable of integer arrays
        Those of the archive, each in its natural order.
    steps : int
        Number of quantized tensors.
    exact : iterable of Tensor
        The other tensors as the archive restores them, shortened mantissas included.
    """

    def chunks() -> Iterator[bytes]:
        yield from (narrow(each).tobytes() for each in levels)
        yield bytes(4 * steps)
        yield from (tensor_bytes(tensor) for tensor in exact)

    return xz_bytes(chunks())


def narrow(levels: Array) -> Array:
    """Integers as int8, or the narrowest wider type that holds them."""
    most = int(np.abs(levels).max(initial=0))
    dtype = np.int8 if most <= 127 else np.int16 if most <= 32767 else np.int32
    return levels.astype(dtype)


def tensor_bytes(tensor: Any) -> bytes:
    """Raw bytes of a torch tensor of any dtype."""
    import torch

    flat = tensor.detach().contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).numpy().tobytes())


def _is_matrix(tensor: Any) -> bool:
    return bool(tensor.is_floating_point() and tensor.dim() >= 2 and tensor.isfinite().all())

"""Kernel transform: which axes of a tensor are kernel axes, and the DCT along them.

Convolution kernels are smooth, and the inputs of neighbouring kernel positions are alike, so a
DCT over the kernel axes both packs the energy of the weights and separates errors that the outputs
bear well (high frequencies) from those that they don't. The inverse is in the loader.

Source: Ahmed, Natarajan and Rao, "Discrete cosine transform", 1974 (DCT-II, orthonormal).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Final

import numpy as np
import numpy.typing as npt

from weightvid.loader import MAX_GAIN, MAX_KERNEL, MAX_SHIFT, Floats, quarter_octaves

#: longest axis that is taken for a kernel's: patches of vision transformers have 32.
LONGEST_KERNEL: Final = 32
#: longest axis of kernels without an axis of input channels (depthwise layers).
LONGEST_DEPTHWISE: Final = 11


@dataclass(frozen=True, slots=True)
class View:
    """A tensor as a matrix: rows (outputs) by channels x kernel positions.

    ``kernel`` are the sizes of the kernel axes; empty for a matrix.
    """

    rows: int
    channels: int
    kernel: tuple[int, ...] = ()

    @property
    def columns(self) -> int:
        """Width of the matrix."""
        return self.channels * prod(self.kernel)


def view_of(shape: Sequence[int]) -> View:
    """The matrix that a tensor is coded as.

    Axes of length 1 say nothing and are left out. Of three to five axes, those after the second
    are kernel axes if they are short: outputs x inputs x kernel. Of three, the last two are if both
    are very short: a depthwise layer.

    Examples
    --------
    >>> view_of((64, 32, 3, 3)), view_of((64, 1, 3, 3))
    (View(rows=64, channels=32, kernel=(3, 3)), View(rows=64, channels=1, kernel=(3, 3)))
    >>> view_of((1, 512, 192)), view_of((256, 80, 5)), view_of((8, 512, 256))
    (View(rows=512, channels=192, kernel=()), View(rows=256, channels=80, kernel=(5,)), \
View(rows=4096, channels=256, kernel=()))
    """
    axes = tuple(size for size in shape if size != 1)
    if len(axes) < 2:
        return View(1, prod(axes))
    if len(axes) == 3 and max(axes[1:]) <= LONGEST_DEPTHWISE:
        return View(axes[0], 1, axes[1:])
    kernel = axes[2:]
    if 3 <= len(axes) <= 5 and max(kernel) <= LONGEST_KERNEL and prod(kernel) <= MAX_KERNEL:
        return View(axes[0], axes[1], kernel)
    return View(prod(axes[:-1]), axes[-1])


@cache
def dct(size: int) -> Floats:
    """Orthonormal DCT-II: row u is the basis vector of frequency u; float32, (size, size).

    Examples
    --------
    >>> dct(2).astype(float).round(4).tolist()
    [[0.7071, 0.7071], [0.7071, -0.7071]]
    """
    positions = (np.arange(size) + 0.5) * np.pi / size
    basis = np.cos(np.arange(size)[:, None] * positions) * np.sqrt(2.0 / size)
    basis[0] /= np.sqrt(2.0)
    return np.asarray(basis, np.float32)


@cache
def whole_basis(kernel: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """Basis of all kernel axes together, (K, K): row f is frequency f, positions row-major."""
    basis: npt.NDArray[np.float64] = np.ones((1, 1))
    for size in kernel:
        basis = np.asarray(np.kron(basis, dct(size).astype(np.float64)), np.float64)
    return basis


def precision(kernel: tuple[int, ...], frequency_steps: npt.NDArray[np.int8] | None) -> int:
    """Bits of the kernel matrix of a part: the most with which its sums stay exact.

    Examples
    --------
    >>> precision((3, 3), None), precision((16, 16), None)
    (13, 11)
    """
    basis = np.abs(whole_basis(kernel))
    if frequency_steps is not None:
        basis *= quarter_octaves(frequency_steps)[:, None]
    # A rounded entry may be larger by a half.
    room = MAX_GAIN - len(basis) / 2 - 1
    return min(MAX_SHIFT, max(0, int(np.log2(room / basis.sum(axis=0).max()))))


def forward(matrix: Floats, kernel: tuple[int, ...]) -> Floats:
    """Coefficients of kernels; undone by `weightvid.loader.dequantize`.

    Parameters
    ----------
    matrix : ndarray of float32, shape (R, C * K)
        Channel by channel, K kernel positions each.
    kernel : tuple of int
        Product K.

    Returns
    -------
    ndarray of float32, shape (R, K * C)
        Frequency by frequency, C channels each.
    """
    basis = whole_basis(kernel)
    kernels = matrix.reshape(len(matrix), -1, len(basis)).astype(np.float64)
    made = np.ascontiguousarray((kernels @ basis.T).swapaxes(1, 2))
    return made.reshape(len(matrix), -1).astype(np.float32)


def forward_moment(
    moment: npt.NDArray[np.floating], kernel: tuple[int, ...]
) -> npt.NDArray[np.float64]:
    """Second moments of inputs, (G, C * K, C * K), as the coefficients of kernels meet them."""
    basis = whole_basis(kernel)
    size = len(basis)
    groups, columns, _ = moment.shape
    channels = columns // size
    cut = moment.reshape(groups, channels, size, channels, size).astype(np.float64)
    made = np.einsum("fk,gckdl,hl->gfchd", basis, cut, basis, optimize=True)
    return np.ascontiguousarray(made).reshape(groups, columns, columns)

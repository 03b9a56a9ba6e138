"""Sums over the inputs of layers, of one run of a model or of two runs side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from weightvid.calibrate.watch import Seen
from weightvid.errors import QuantizationError
from weightvid.loader import Floats

#: rows of inputs multiplied at once in float32 before they are added up in float64.
_ROWS: Final = 4096

Means = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class InputMeans:
    """Means over inputs x' of one tensor, and over the inputs x of the original model with them.

    Attributes
    ----------
    moment, cross, original : ndarray of float64, shape (groups, C, C)
        Means of x' x'^T, x x'^T and x x^T; zeros where nothing was seen. Of one run all are the
        same.
    mean, original_mean : ndarray of float64, shape (groups, C)
        Means of x' and x.
    """

    moment: Means
    cross: Means
    original: Means
    mean: Means
    original_mean: Means

    def centred(self) -> InputMeans:
        """Covariances in place of second moments."""
        moment = self.moment - self.mean[:, :, None] * self.mean[:, None, :]
        cross = self.cross - self.original_mean[:, :, None] * self.mean[:, None, :]
        return replace(self, moment=moment, cross=cross)


class Sums:
    """Sums over the inputs of one tensor; ``seen`` tells the shapes, ``paired`` two runs."""

    def __init__(self, seen: Seen, paired: bool = False) -> None:
        self.axis, self._shape = seen.axis, (seen.groups, seen.inputs.shape[-1])
        device = seen.inputs.device
        # Apple's GPUs have no float64.
        wide = torch.device("cpu") if device.type == "mps" else device
        groups, columns = self._shape
        shape = (3 if paired else 1, groups, columns, columns)
        self._square = torch.zeros(shape, dtype=torch.float64, device=wide)
        self._total = torch.zeros(shape[:3], dtype=torch.float64, device=wide)
        self._rows = np.zeros(groups)

    def add(self, seen: Seen, original: Seen | None = None) -> None:
        """Take in a piece, of both runs if there are two.

        Raises
        ------
        QuantizationError
            NaN or infinity, or inputs of another kind than before.
        """
        if seen.axis != self.axis or (seen.groups, seen.inputs.shape[-1]) != self._shape:
            raise QuantizationError(
                f"tensor {seen.name!r} is used in two ways that don't go together"
            )
        place, shares = seen.share
        for group, inputs in enumerate(seen.inputs):
            target = place if shares > 1 else group
            for first in range(0, len(inputs), _ROWS):
                rows = slice(first, first + _ROWS)
                here = [inputs[rows].to(torch.float32)]
                if original is not None:
                    here.append(original.inputs[group][rows].to(torch.float32))
                for number, (left, right) in enumerate(_PRODUCTS[: 2 * len(here) - 1]):
                    self._square[number, target] += here[left].T @ here[right]
                for number, each in enumerate(here):
                    self._total[number, target] += each.sum(0, dtype=torch.float64)
            # Of a NaN or infinity in any input, this diagonal knows.
            if not bool(torch.isfinite(self._square[0, target].diagonal()).all()):
                raise QuantizationError(
                    f"the inputs of tensor {seen.name!r} hold NaN or infinity (or squares "
                    "beyond float32); look at the layer before it, or at the example inputs"
                )
            self._rows[target] += len(inputs)

    def plus(self, other: Sums) -> Sums:
        """Take in the sums of another one."""
        self._square += other._square
        self._total += other._total
        self._rows += other._rows
        return self

    def rounded(self) -> tuple[Floats, Floats]:
        """Means of x x^T and x, as float32."""
        means = self.means()
        return means.moment.astype(np.float32), means.mean.astype(np.float32)

    def means(self) -> InputMeans:
        """Means over all inputs."""
        count = np.maximum(self._rows, 1)
        square = list(self._square.cpu().numpy() / count[:, None, None])
        total = self._total.cpu().numpy() / count[:, None]
        moment, cross, original = square if len(square) == 3 else square * 3
        return InputMeans(moment, cross, original, total[0], total[min(1, len(square) - 1)])


#: factors of the sums of products: x' x', x x', x x.
_PRODUCTS: Final = ((0, 0), (1, 0), (1, 1))


class Collector:
    """Sums of tensors over inputs that are fitted to, and over those held back for checks.

    Attributes
    ----------
    held_back : bool
        Where inputs go now.
    fitted, held : dict of str to Sums
    lost : set of str
        Tensors whose two runs did not match: what they see depends on the values themselves.
    """

    def __init__(self) -> None:
        self.held_back = False
        self.fitted: dict[str, Sums] = {}
        self.held: dict[str, Sums] = {}
        self.lost: set[str] = set()
        self._direct: set[str] = set()

    def add(self, seen: Seen) -> None:
        """Take in the inputs of one call.

        Gradients of a table that is an output layer too (tied weights) are no part of its
        statistics, as its rows matter wherever they are looked up.
        """
        if seen.axis < 0 or (seen.gradient and seen.name in self._direct):
            return
        if not seen.gradient:
            self._direct.add(seen.name)
        self._sums(seen, paired=False).add(seen)

    def add_pairs(
        self, original: Mapping[str, list[Seen]], other: Mapping[str, list[Seen]]
    ) -> None:
        """Take in both runs of a batch."""
        for name in sorted(set(original) | set(other)):
            before, after = original.get(name, []), other.get(name, [])
            forms = [[(s.axis, s.share, s.inputs.shape) for s in each] for each in (before, after)]
            if forms[0] != forms[1]:
                self.lost.add(name)
            for one, two in zip(before, after, strict=False) if name not in self.lost else ():
                self._sums(two, paired=True).add(two, one)

    def _sums(self, seen: Seen, paired: bool) -> Sums:
        store = self.held if self.held_back else self.fitted
        if seen.name not in store:
            store[seen.name] = Sums(seen, paired)
        return store[seen.name]

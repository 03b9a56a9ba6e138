"""Sums over inputs: second moments, means and counts of the tensors of one pass."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from weightvid.calibrate.watch import Seen
from weightvid.errors import QuantizationError

#: rows of inputs multiplied at once in float32 before they are added up in float64.
_ROWS = 4096


@dataclass(slots=True)
class Sums:
    """Sums over the inputs of one tensor.

    Attributes
    ----------
    axis : int
    moment : torch.Tensor of float64, shape (groups, C, C)
    total : torch.Tensor of float64, shape (groups, C)
    rows : list of int
        Inputs seen by each group.
    """

    axis: int
    moment: torch.Tensor
    total: torch.Tensor
    rows: list[int]

    @property
    def mean_moment(self) -> npt.NDArray[np.float64]:
        """Mean of x x'; zeros where nothing was seen."""
        count = torch.tensor(self.rows, dtype=torch.float64).clamp(min=1)
        made: npt.NDArray[np.float64] = (self.moment.cpu() / count[:, None, None]).numpy()
        return made

    @property
    def mean(self) -> npt.NDArray[np.float64]:
        """Mean of x; zeros where nothing was seen."""
        count = np.maximum(np.array(self.rows, np.float64), 1)
        made: npt.NDArray[np.float64] = self.total.cpu().numpy() / count[:, None]
        return made

    def plus(self, other: Sums | None) -> Sums:
        """Sums over both."""
        if other is None:
            return self
        rows = [a + b for a, b in zip(self.rows, other.rows, strict=True)]
        return Sums(self.axis, self.moment + other.moment, self.total + other.total, rows)


@dataclass(slots=True)
class Accumulator:
    """Collects the inputs of chosen tensors.

    Attributes
    ----------
    wanted : frozenset of str
        Tensors of this pass.
    held_back : bool
        Where inputs go now: to those that are kept for checking, or to the others.
    fitted, held : dict of str to Sums
    counts : dict of str to torch.Tensor
        Look-ups of embedding rows.
    direct : set of str
        Tensors with inputs of their own. Gradients of a table that is an output layer too (tied
        weights) are no part of its statistics, as its rows matter wherever they are looked up.
    biases : dict of str to str or None
        What is added to the output of a tensor's layer; None if nothing, or not always the same.
    sizes : dict of str to int
        Rows of embedding tables.
    """

    wanted: frozenset[str]
    sizes: dict[str, int]
    held_back: bool = False
    fitted: dict[str, Sums] = field(default_factory=dict)
    held: dict[str, Sums] = field(default_factory=dict)
    counts: dict[str, torch.Tensor] = field(default_factory=dict)
    direct: set[str] = field(default_factory=set)
    biases: dict[str, str | None] = field(default_factory=dict)

    def add(self, seen: Seen) -> None:
        """Take in the inputs of one call.

        Raises
        ------
        QuantizationError
            They hold NaN or infinity.
        """
        if seen.name not in self.wanted:
            return
        if seen.axis < 0:
            size = self.sizes[seen.name]
            index = seen.inputs.reshape(-1).cpu().to(torch.int64)
            index = torch.where(index < 0, index + size, index)
            counted = torch.bincount(index, minlength=size)
            before = self.counts.get(seen.name)
            self.counts[seen.name] = counted if before is None else before + counted
            return
        if seen.gradient and seen.name in self.direct:
            return
        if not seen.gradient:
            self.direct.add(seen.name)
            known = self.biases.setdefault(seen.name, seen.bias)
            self.biases[seen.name] = seen.bias if known == seen.bias else None
        sums = self._sums(seen)
        place, shares = seen.share
        for group, rows in enumerate(seen.inputs):
            target = place if shares > 1 else group
            for part in rows.split(_ROWS):
                wide = part.to(torch.float32)
                product = wide.T @ wide
                # Of a NaN or infinity in any input, this diagonal knows.
                if not bool(torch.isfinite(product.diagonal()).all()):
                    raise QuantizationError(
                        f"the inputs of tensor {seen.name!r} hold NaN or infinity (or squares "
                        "beyond float32); look at the layer before it, or at the example inputs"
                    )
                sums.moment[target] += product
                sums.total[target] += wide.sum(0, dtype=torch.float64)
            sums.rows[target] += len(rows)

    def _sums(self, seen: Seen) -> Sums:
        store = self.held if self.held_back else self.fitted
        groups = max(len(seen.inputs), seen.share[1])
        columns = seen.inputs.shape[-1]
        found = store.get(seen.name)
        if found is None:
            device = seen.inputs.device
            # Apple's GPUs have no float64.
            wide = torch.device("cpu") if device.type == "mps" else device
            found = store[seen.name] = Sums(
                seen.axis,
                torch.zeros((groups, columns, columns), dtype=torch.float64, device=wide),
                torch.zeros((groups, columns), dtype=torch.float64, device=wide),
                [0] * groups,
            )
        if found.axis != seen.axis or found.total.shape != (groups, columns):
            raise QuantizationError(
                f"tensor {seen.name!r} is used in two ways that don't go together"
            )
        return found

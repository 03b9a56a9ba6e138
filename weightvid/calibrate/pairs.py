"""Sums over pairs of inputs: those of the original model, and those that quantized layers make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from weightvid.calibrate.watch import Seen
from weightvid.errors import QuantizationError

#: rows of inputs multiplied at once in float32 before they are added up in float64.
_ROWS = 4096

Moments = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class PairMoments:
    """Means over pairs (x, x') of inputs of one tensor.

    Attributes
    ----------
    axis : int
        Axis of the weight's matrix along which inputs lie.
    moment, cross : ndarray of float64, shape (groups, C, C)
        Means of x' x'^T and x x'^T.
    mean, original_mean : ndarray of float64, shape (groups, C)
        Means of x' and x.
    """

    axis: int
    moment: Moments
    cross: Moments
    mean: Moments
    original_mean: Moments


class PairSums:
    """Sums over pairs of inputs of one tensor.

    Parameters
    ----------
    seen : Seen
        A first input, which tells the shapes.
    """

    def __init__(self, seen: Seen) -> None:
        self.axis = seen.axis
        groups, columns = max(len(seen.inputs), seen.share[1]), seen.inputs.shape[-1]
        device = seen.inputs.device
        wide = torch.device("cpu") if device.type == "mps" else device
        self._square = torch.zeros((2, groups, columns, columns), dtype=torch.float64, device=wide)
        self._total = torch.zeros((2, groups, columns), dtype=torch.float64, device=wide)
        self._rows = [0] * groups

    def add(self, original: Seen, quantized: Seen) -> None:
        """Take in a piece of both runs."""
        place, shares = quantized.share
        for group, (x, y) in enumerate(zip(original.inputs, quantized.inputs, strict=True)):
            target = place if shares > 1 else group
            for before, after in zip(x.split(_ROWS), y.split(_ROWS), strict=True):
                left, right = before.to(torch.float32), after.to(torch.float32)
                self._square[0, target] += right.T @ right
                self._square[1, target] += left.T @ right
                self._total[0, target] += right.sum(0, dtype=torch.float64)
                self._total[1, target] += left.sum(0, dtype=torch.float64)
            self._rows[target] += len(y)

    def means(self) -> PairMoments:
        """Means over the pairs."""
        count = np.maximum(np.array(self._rows, np.float64), 1)
        moment, cross = self._square.cpu().numpy() / count[:, None, None]
        mean, original_mean = self._total.cpu().numpy() / count[:, None]
        return PairMoments(self.axis, moment, cross, mean, original_mean)


class PairCollector:
    """Matches the inputs of two runs on one batch.

    Parameters
    ----------
    wanted : sequence of str
        Tensors whose inputs count.

    Attributes
    ----------
    fitted, held : dict of str to PairSums
        Of the batches that fit, and of those that are held back for checks.
    lost : set of str
        Tensors whose two runs did not match: what they see depends on the values themselves.
    """

    def __init__(self, wanted: Sequence[str]) -> None:
        self._wanted = frozenset(wanted)
        self.fitted: dict[str, PairSums] = {}
        self.held: dict[str, PairSums] = {}
        self.lost: set[str] = set()

    def record(self, seen: Seen, kept: dict[str, list[Seen]]) -> None:
        """Keep an input of a run."""
        if seen.name in self._wanted and seen.axis >= 0:
            copied = seen.inputs.clone()
            kept.setdefault(seen.name, []).append(
                Seen(seen.name, copied, seen.axis, seen.share, bias=seen.bias)
            )

    def add(
        self,
        original: Mapping[str, list[Seen]],
        quantized: Mapping[str, list[Seen]],
        held_back: bool,
    ) -> None:
        """Take in both runs of a batch."""
        sums = self.held if held_back else self.fitted
        for name in sorted(self._wanted):
            one, other = original.get(name, []), quantized.get(name, [])
            if [_form(seen) for seen in one] != [_form(seen) for seen in other]:
                self.lost.add(name)
            if name in self.lost:
                continue
            for before, after in zip(one, other, strict=True):
                if name not in sums:
                    sums[name] = PairSums(after)
                sums[name].add(before, after)


def _form(seen: Seen) -> tuple[object, ...]:
    return (seen.axis, seen.share, tuple(seen.inputs.shape))


def check_finite(name: str, pairs: PairMoments) -> None:
    """Refuse inputs with NaN or infinity.

    Raises
    ------
    QuantizationError
    """
    if not (np.isfinite(pairs.moment).all() and np.isfinite(pairs.cross).all()):
        raise QuantizationError(
            f"the inputs of tensor {name!r} hold NaN or infinity once the layers before it are "
            "quantized; take finer steps"
        )

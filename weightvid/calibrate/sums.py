"""Sums over what the layers of a model see, and over what pulls at it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as fn

from weightvid.calibrate.layouts import Seen
from weightvid.calibrate.stats import without_ones
from weightvid.errors import QuantizationError

#: rows of inputs multiplied at once in float32 before they are added up in float64.
_ROWS: Final = 4096
#: factors of the sums of products: x' x', x x', x x.
_PRODUCTS: Final = ((0, 0), (1, 0), (1, 1))

Means = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Gap:
    """By how much that which a layer's outputs are added to lies below the original model's.

    Means over the gap r: of r x'^T and r x^T, shape (O, C + 1), x' and x with a 1 appended; of r r,
    shape (O,).
    """

    cross: Means
    original: Means
    power: Means


@dataclass(frozen=True, slots=True, eq=False)
class InputMeans:
    """Means over inputs x' of one tensor, and over the inputs x of the original model with them.

    ``moment``, ``cross`` and ``original`` (groups, C + 1, C + 1) are means of x' x'^T, x x'^T and
    x x^T, each with a 1 appended, or of what pulls at them; ``mean`` and ``original_mean``
    (groups, C) are those of x' and x. Of one run x' and x are the same. ``outputs`` (O, O), of one
    run, is the mean of ``A A'``, where that of ``A' A`` is the moment; None: not known. ``gap``:
    what the layer may make up for besides, if it is known.
    """

    moment: Means
    cross: Means
    original: Means
    mean: Means
    original_mean: Means
    outputs: Means | None = None
    gap: Gap | None = None

    def of(self, rows: slice) -> InputMeans:
        """Those of some outputs."""
        gap = self.gap
        if gap is not None:
            gap = Gap(gap.cross[rows], gap.original[rows], gap.power[rows])
        return replace(self, gap=gap)

    def inner(self, corrected: bool) -> InputMeans:
        """Without the 1; of inputs less their means if a bias is ``corrected``."""
        old, new = (self.original_mean, self.mean) if corrected else (None, None)
        moment, cross = without_ones(self.moment, new), without_ones(self.cross, old, new)
        varies = np.diagonal(moment, axis1=1, axis2=2)[:, None] > 0
        gap = self.gap
        if gap is not None:
            means = np.outer(gap.cross[:, -1], self.mean[0] * corrected)
            gap = replace(gap, cross=gap.cross[:, :-1] - means)
        return replace(self, moment=moment, cross=np.where(varies, cross, 0.0), gap=gap)


class Sums:
    """Sums over the inputs of one tensor, which the first of them tell the shapes of.

    ``across``: of what pulls at its outputs, too, if they are in one group.
    """

    def __init__(self, across: bool = False) -> None:
        self._across = across
        self._gap, self._gap_rows = list[torch.Tensor](), 0
        #: axis, groups and columns.
        self.form: tuple[int, int, int] | None = None
        self._outputs: torch.Tensor | None = None

    def _start(self, seen: Seen, products: int) -> None:
        self.form = self.axis, groups, columns = seen.axis, seen.groups, seen.inputs.shape[-1]
        # Apple's GPUs have no float64.
        device = torch.device("cpu") if seen.inputs.device.type == "mps" else seen.inputs.device
        shape = (products, groups, columns + 1, columns + 1)
        with torch.inference_mode(False):
            self._square = torch.zeros(shape, dtype=torch.float64, device=device)
            self._total = torch.zeros((*shape[:2], columns), dtype=torch.float64, device=device)
        self._rows, self._samples = np.zeros(groups), np.zeros(groups)
        self._pulled = seen.pulls is not None or seen.looked_up
        rows = 0 if seen.pulls is None else seen.pulls.shape[-1]
        if self._across and rows and groups == 1:
            self._outputs = torch.zeros((rows, rows), dtype=torch.float64, device=device)

    def add(self, seen: Seen, original: Seen | None = None) -> bool:
        """Take in a piece, of both runs if there are two, unless it has another form."""
        if self.form is None:
            self._start(seen, 1 if original is None else 3)
        if self.form != (seen.axis, seen.groups, seen.inputs.shape[-1]):
            return False
        place, shares = seen.share
        pulls = seen.pulls if original is None else original.pulls
        for group, inputs in enumerate(seen.inputs):
            target = place if shares > 1 else group
            both = [inputs.float()]
            if original is not None:
                both.append(original.inputs[group].float())
            for number, each in enumerate(both):
                self._total[number, target] += each.sum(0)
            both = [fn.pad(each, (0, 1), value=1.0) for each in both]
            for own in [None] if pulls is None else pulls[:, group].float():
                for here in pieces(both, own, seen.samples):
                    for number, (left, right) in enumerate(_PRODUCTS[: 2 * len(here) - 1]):
                        self._square[number, target] += here[left].T @ here[right]
                if own is not None and self._outputs is not None:
                    self._outputs += _across(inputs.float(), own, seen.samples)
            # Of a NaN or infinity in any input, this diagonal knows.
            if not bool(torch.isfinite(self._square[0, target].diagonal()).all()):
                raise QuantizationError(
                    f"the inputs of tensor {seen.name!r} hold NaN or infinity (or squares "
                    "beyond float32); look at the layer before it, or at the example inputs"
                )
            if original is not None and pulls is None and self.form[:2] in ((0, 1), (1, 1)):
                self._add_gap(seen.added, original.added, both)
            self._rows[target] += len(inputs)
            self._samples[target] += len(inputs) if pulls is None else len(pulls) * seen.samples
        return True

    def _add_gap(
        self, added: torch.Tensor | None, original: torch.Tensor | None, inputs: list[torch.Tensor]
    ) -> None:
        if added is None or original is None or added.shape != original.shape:
            return
        gap = original[0].float() - added[0].float()
        found = [(gap.T @ each).double() for each in inputs] + [gap.double().square().sum(0)]
        self._gap = [a + b for a, b in zip(self._gap, found, strict=True)] if self._gap else found
        self._gap_rows += len(gap)

    def add_all(self, other: Sums) -> None:
        """Take in the sums of another one, of the same form."""
        self._square += other._square
        self._total += other._total
        if self._outputs is not None and other._outputs is not None:
            self._outputs += other._outputs
        self._rows += other._rows
        self._samples += other._samples

    @property
    def weights(self) -> npt.NDArray[np.float64] | None:
        """What the inputs of each group count together; None where gradients don't tell."""
        return self._samples if self._pulled else None

    def means(self) -> InputMeans:
        """Means over all inputs."""
        rows, samples = (np.where(n > 0, n, 1.0) for n in (self._rows, self._samples))
        square = list(self._square.cpu().numpy() / samples[:, None, None])
        total = self._total.cpu().numpy() / rows[:, None]
        moment, cross, original = square if len(square) == 3 else square * 3
        outputs = None if self._outputs is None else self._outputs.cpu().numpy() / samples[0]
        whole = self._gap_rows == self._rows.sum() > 0
        gap = Gap(*(each.cpu().numpy() / self._gap_rows for each in self._gap)) if whole else None
        last = total[min(1, len(square) - 1)]
        return InputMeans(moment, cross, original, total[0], last, outputs, gap)


def _across(inputs: torch.Tensor, pulls: torch.Tensor, samples: int) -> torch.Tensor:
    """Sum of ``A A'``, shape (O, O), for the gradients A by the weights.

    Parameters
    ----------
    inputs : Tensor, shape (n, C)
    pulls : Tensor, shape (n, O)
        Gradients by what the layer makes of its inputs.
    samples : int
        That the n inputs are of, in order; as many of each.
    """
    places = max(1, len(inputs) // max(1, samples))
    step = max(1, _ROWS // places) * places
    found = torch.zeros((), device=inputs.device)
    for first in range(0, len(inputs), step):
        x, g = (e[first : first + step].unflatten(0, (-1, places)) for e in (inputs, pulls))
        if places < g.shape[-1]:
            found = found + g.flatten(0, 1).T @ (x @ x.mT @ g).flatten(0, 1)
        else:
            a = (g.mT @ x).transpose(0, 1).flatten(1)
            found = found + a @ a.T
    return found


def pieces(
    inputs: Sequence[torch.Tensor], pulls: torch.Tensor | None, samples: int
) -> Iterator[list[torch.Tensor]]:
    """Inputs, or rows whose second moments are those of the gradients by the weights, some at once.

    Parameters
    ----------
    inputs : sequence of Tensor, shape (n, C)
        Of one run, or of two.
    pulls : Tensor, shape (n, O), or None
        Gradients by what the layer makes of its inputs.
    samples : int
        That the n inputs are of, in order; as many of each.
    """
    places = max(1, len(inputs[0]) // max(1, samples))
    step = _ROWS if pulls is None else max(1, _ROWS // places) * places
    for first in range(0, len(inputs[0]), step):
        here = [each[first : first + step] for each in inputs]
        if pulls is not None:
            own = pulls[first : first + step].reshape(-1, places, pulls.shape[-1])
            # With fewer places than outputs a root of g g' does the same with fewer rows.
            outputs, columns = own.shape[-1], inputs[0].shape[-1]
            root = places * places * (10 * places + outputs)
            if root < (outputs - places) * columns * columns and bool(own.isfinite().all()):
                values, vectors = torch.linalg.eigh(own @ own.mT)
                own = vectors * values.clamp(min=0.0).sqrt()[:, None]
            split = [each.reshape(len(own), places, -1) for each in here]
            here = [(own.mT @ each).flatten(0, 1) for each in split]
        yield here

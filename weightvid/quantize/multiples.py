"""Coarser steps for the rarer rows of an embedding table, within one step for the whole tensor.

A row that is looked up a thousand times as often as another deserves a finer step. The format has
one step for each tensor, but nothing keeps a row from using only every second, third or fourth
level: its step is then a multiple of the tensor's. Readers need not know; the packer lays such rows
apart, where folds of the same width make every sample count (`weightvid.packing.layout`).

How often a row will be looked up is estimated from counts. Rows never seen share what Good and
Turing's estimate leaves them, the part of look-ups that met a row for its only time; and a part is
spread evenly over all rows, as the texts to come are never quite like those that were counted.

Source: Good, "The population frequencies of species and the estimation of population parameters",
1953.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

#: the widest fold holds four magnitudes.
LARGEST: Final = 4
#: spread evenly over all rows.
_EVEN: Final = 0.25
#: what multiples must save, in bits per weight, to make up for the trellis that they go without.
_LEAST_GAIN: Final = 0.2
_SCALES: Final = 64


@dataclass(frozen=True, slots=True)
class Multiples:
    """Multiples of the step by row.

    Attributes
    ----------
    rows : ndarray of int32, shape (R,)
        1..4.
    spread : float
        Mean over look-ups of the squared multiple: by so much the loss grows at equal step.
    gain : float
        Bits per weight saved at equal loss.
    """

    rows: npt.NDArray[np.int32]
    spread: float
    gain: float


def frequencies(counts: npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
    """Share of each row in look-ups to come; all above 0, sum 1.

    Parameters
    ----------
    counts : ndarray of int, shape (R,)
        Look-ups seen.

    Examples
    --------
    >>> frequencies(np.array([6, 1, 1, 0])).round(4).tolist()
    [0.4844, 0.1328, 0.1328, 0.25]
    """
    seen = counts.astype(np.float64)
    total = seen.sum()
    if total <= 0:
        return np.full(len(seen), 1.0 / max(1, len(seen)))
    unseen = seen == 0
    left = float((seen == 1).sum()) / total if unseen.any() else 0.0
    share = (1.0 - left) * seen / total
    share[unseen] = left / max(1, int(unseen.sum()))
    return (1.0 - _EVEN) * share + _EVEN / len(seen)


def row_multiples(counts: npt.NDArray[np.integer]) -> Multiples | None:
    """Multiples that save most bits at equal loss; None if that is not worth while.

    With steps m times as coarse, a row takes log2 m bits less for each of its weights and loses
    m^2 times as much whenever it is looked up.

    Parameters
    ----------
    counts : ndarray of int, shape (R,)
    """
    if not len(counts) or not counts.any():
        return None
    share = frequencies(counts)
    wanted = np.sqrt(share.mean() / share)
    best: Multiples | None = None
    for scale in np.geomspace(0.25, 8.0, _SCALES):
        rows = np.clip(np.rint(scale * wanted), 1, LARGEST)
        spread = float((share * rows**2).sum())
        gain = float(np.log2(rows).mean()) - 0.5 * float(np.log2(spread))
        if best is None or gain > best.gain:
            best = Multiples(rows.astype(np.int32), spread, gain)
    return best if best is not None and best.gain >= _LEAST_GAIN else None

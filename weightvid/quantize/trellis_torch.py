"""The Viterbi search of `weightvid.quantize.trellis_viterbi` in torch; the same levels.

Only the trellis itself runs here: the costs of the subsets come from the shared numpy code, and the
forward pass is made of float32 additions, minima and comparisons, in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from weightvid.quantize.trellis import Machine
from weightvid.quantize.trellis_viterbi import (
    RENORM,
    Branches,
    CostTables,
    FloatMatrix,
    LaneBlock,
    trace_back,
)


def search_torch(
    lanes: Sequence[FloatMatrix], tables: Sequence[CostTables], trellis: Machine
) -> list[npt.NDArray[np.int32]]:
    """As `weightvid.quantize.trellis_viterbi.search_numpy`."""
    block = LaneBlock(lanes, tables)
    branches = Branches.of(trellis)
    states, count = trellis.states, block.count
    half = states // 2
    entering = torch.from_numpy(branches.entering)
    branch = torch.empty((2 * states, count), dtype=torch.float32)
    by_source = branch.view(2, 2, half, count)
    metric = torch.full((states, count), float("inf"), dtype=torch.float32)
    metric[0] = 0.0
    after = torch.empty_like(metric)
    taken = np.empty((block.length, states, count), np.bool_)
    decisions = torch.from_numpy(taken)
    for start, stop in block.chunks():
        cost = torch.from_numpy(block.costs(start, stop, np.arange(4)))
        for column in range(start, stop):
            torch.index_select(cost[column - start], 0, entering, out=branch)
            by_source += metric.view(2, 1, half, count)
            torch.minimum(
                by_source[0], by_source[1], out=after.view(half, 2, count).transpose(0, 1)
            )
            torch.lt(
                by_source[1],
                by_source[0],
                out=decisions[column].view(half, 2, count).transpose(0, 1),
            )
            metric, after = after, metric
        if stop % RENORM == 0:
            metric -= metric.amin(dim=0)
    subsets = trace_back(taken, np.argmin(metric.numpy(), axis=0), branches)
    return block.levels(subsets)

"""Warnings in advance, from the shapes alone: models that small steps may hurt."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import prod
from typing import Final

from weightvid.dtypes import PACKABLE
from weightvid.spec import TensorSpec

#: a layer whose outputs add up fewer products than this cannot average its errors away.
_FEW_INPUTS: Final = 32
#: so large a share of such layers makes a model sensitive.
_SHARE: Final = 0.2
#: models of fewer weights have little to spare.
_FEW_WEIGHTS: Final = 100_000
_FINE: Final = 0.08


def cautions(
    specs: Sequence[TensorSpec], coded: Collection[int], step_factor: float
) -> tuple[str, ...]:
    """What should be said before a model is packed with these steps.

    Networks of depthwise convolutions are known to be sensitive: each of their outputs is a sum of
    nine products or so. So are small networks, which have little redundancy.

    Parameters
    ----------
    specs : sequence of TensorSpec
        All tensors.
    coded : collection of int
        Ids of those that will be quantized.
    step_factor : float
        k; at 0.08 or below nothing is said of the steps.

    Returns
    -------
    tuple of str
        None, one or two sentences.
    """
    if not any(spec.dtype in PACKABLE for spec in specs):
        return ("there are no floating-point weights in it: nothing is quantized",)
    if step_factor <= _FINE or not coded:
        return ()
    layers = [spec for spec in specs if len(spec.shape) >= 2 and spec.shape[0] >= 8]
    few = [spec for spec in layers if len(spec.shape) > 2 and _few_inputs(spec)]
    weights = sum(specs[number].size for number in coded)
    found = []
    if len(few) >= _SHARE * len(layers) and len(few) > 1:
        found.append(
            f"{len(few)} of {len(layers)} layers are depthwise or of few inputs ({few[0].name}, "
            "...): such models are sensitive; check the accuracy, or take finer steps"
        )
    if weights < _FEW_WEIGHTS:
        found.append(
            f"only {weights:,} weights are quantized: small models are sensitive; check the "
            "accuracy, or take finer steps"
        )
    return tuple(found)


def _few_inputs(spec: TensorSpec) -> bool:
    return prod(spec.shape[1:]) < _FEW_INPUTS and spec.shape[1] < 3

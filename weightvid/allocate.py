"""How many bits each tensor gets: one quantizer step per tensor.

The default rule is data-free: ``step = k * sigma * sqrt(n / mean n)``, n the number of weights of
the tensor. With entropy coding the rate of a tensor is about ``n * log2(sigma / step)`` bits, and
its harm to the output grows about as ``(step / sigma)**2`` whatever its size, so all tensors stand
at one slope of harm against bits when the steps go with sigma * sqrt(n): large tensors can take
coarse steps, and small ones (first, last, depthwise) get fine ones, which cost nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from types import MappingProxyType
from typing import Final

from weightvid.errors import QuantizationError
from weightvid.quantize.params import round_step
from weightvid.quantize.stats import TensorStats

#: no tensor gets a step coarser or finer than this many sigmas.
COARSEST_SIGMAS: Final = 1.5
FINEST_SIGMAS: Final = 0.04
#: added to a tensor's size over the mean: no step goes to nothing with the size.
SMALLEST_SHARE: Final = 0.05
_QUERY_KEY: Final = frozenset({"query", "key", "q_proj", "k_proj", "q", "k", "to_q", "to_k"})


@dataclass(frozen=True, slots=True)
class Recipe:
    """A named combination of settings.

    Attributes
    ----------
    name : str
    step_factor : float
        k of the step rule, in sigmas of a tensor of average size.
    mantissa_bits : int
        Stored mantissa bits that biases, norms and statistics keep; 23: all.
    """

    name: str
    step_factor: float
    mantissa_bits: int


RECIPES: Final[Mapping[str, Recipe]] = MappingProxyType(
    {
        recipe.name: recipe
        for recipe in (
            Recipe("fine", 0.065, 23),
            Recipe("balanced", 0.18, 11),
            Recipe("small", 0.33, 11),
        )
    }
)
DEFAULT_RECIPE: Final = "balanced"


def recipe(name: str) -> Recipe:
    """Recipe of a name.

    Raises
    ------
    QuantizationError
        Unknown name.
    """
    found = RECIPES.get(name)
    if found is None:
        raise QuantizationError(f"unknown recipe {name!r}; known: {', '.join(RECIPES)}")
    return found


def steps(stats: Sequence[TensorStats], step_factor: float) -> list[float]:
    """Quantizer step of each tensor.

    Parameters
    ----------
    stats : sequence of TensorStats
        Tensors that will be quantized, each with sigma > 0.
    step_factor : float
        k; > 0.

    Returns
    -------
    list of float
        ``k * f * sigma * sqrt(n / mean n + 0.05)``, kept within 0.04 and 1.5 sigma, with 8
        significant bits; f is 2 for the queries and keys of attention, whose errors only move the
        weights of a softmax, and 1 for all others.

    Raises
    ------
    QuantizationError
        k is not positive.
    """
    if not 0 < step_factor < float("inf"):
        raise QuantizationError(f"the step factor must be positive, not {step_factor}")
    if not stats:
        return []
    mean = sum(s.spec.size for s in stats) / len(stats)
    found = []
    for s in stats:
        sigmas = step_factor * _kind_factor(s.spec.name) * sqrt(s.spec.size / mean + SMALLEST_SHARE)
        sigmas = min(max(sigmas, FINEST_SIGMAS), COARSEST_SIGMAS)
        found.append(round_step(s.sigma * sigmas))
    return found


def _kind_factor(name: str) -> float:
    """2 for the weights of queries and keys, by their names, else 1."""
    return 2.0 if any(part in _QUERY_KEY for part in name.split(".")) else 1.0

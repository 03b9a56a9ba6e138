"""How many bits each tensor gets: one quantizer step per tensor.

The rule ``fidelity`` is data-free: ``step = k * sigma * sqrt(n / mean n)``, n the number of weights
of the tensor. With entropy coding the rate of a tensor is about ``n * log2(sigma / step)`` bits,
and its harm to the output grows about as ``(step / sigma)**2`` whatever its size, so all tensors
stand at one slope of harm against bits when the steps go with sigma * sqrt(n): large tensors can
take coarse steps, and small ones (first, last, depthwise) get fine ones, which cost nothing.

The rule ``sqnr`` is one step for all tensors: no other choice takes fewer bits at an equal squared
error of the weights themselves.

Whatever the rule, a tensor's **unit** is its step at k = 1 before any limit. Its harm is
``n * (step / unit)**2`` in units of the rule, so that ``(step / (k * unit))**2`` is its slope of
harm against bits in units of the model's: 1, unless a limit holds the step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, log, sqrt
from types import MappingProxyType
from typing import Final

from weightvid.errors import QuantizationError
from weightvid.quantize.params import round_step
from weightvid.quantize.stats import TensorStats

#: no tensor gets a step coarser or finer than this many sigmas.
COARSEST_SIGMAS: Final = 1.5
FINEST_SIGMAS: Final = 0.04
#: under ``sqnr``, a tensor of small weights may vanish: that is what one step for all means. At
#: this many sigmas nearly every level is zero, and a coarser step would save nothing.
VANISHING_SIGMAS: Final = 4.0
#: step of 8-bit samples in units of the rule, for a lossy codec: 127 of them are 7 sigmas of an
#: average tensor. What a QP does to deeper samples is the same in units of the weights.
SAMPLE_FACTOR: Final = 0.055
#: samples of every tensor reach so far; what lies beyond is listed.
SAMPLE_SIGMAS: Final = 6.0
#: added to a tensor's size over the mean: no step goes to nothing with the size.
SMALLEST_SHARE: Final = 0.05
#: measured losses move a unit by at most this factor.
LARGEST_CORRECTION: Final = 8.0
_QUERY_KEY: Final = frozenset({"query", "key", "q_proj", "k_proj", "q", "k", "to_q", "to_k"})

RULES: Final = ("fidelity", "sqnr")
DEFAULT_RULE: Final = "fidelity"


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


def check_rule(rule: str) -> None:
    """Refuse an unknown rule.

    Raises
    ------
    QuantizationError
    """
    if rule not in RULES:
        raise QuantizationError(f"unknown rule {rule!r}; known: {', '.join(RULES)}")


def units(stats: Sequence[TensorStats], rule: str = DEFAULT_RULE) -> list[float]:
    """Step of each tensor at k = 1, before any limit.

    Parameters
    ----------
    stats : sequence of TensorStats
        Tensors that will be quantized, each with sigma > 0.
    rule : str
        ``fidelity``: ``f * sigma * sqrt(n / mean n + 0.05)``; f is 2 for the queries and keys of
        attention, whose errors only move the weights of a softmax, and 1 for all others.
        ``sqnr``: the root of the mean square of all weights, for every tensor.

    Raises
    ------
    QuantizationError
        Unknown rule.
    """
    check_rule(rule)
    if not stats:
        return []
    total = sum(s.spec.size for s in stats)
    if rule == "sqnr":
        return [sqrt(sum(s.spec.size * s.rms**2 for s in stats) / total)] * len(stats)
    mean = total / len(stats)
    return [
        s.sigma * _kind_factor(s.spec.name) * sqrt(s.spec.size / mean + SMALLEST_SHARE)
        for s in stats
    ]


def measured_units(
    units: Sequence[float], stats: Sequence[TensorStats], sensitivity: Mapping[str, float]
) -> list[float]:
    """Units of a rule, balanced by measured losses so that all tensors end at one slope.

    A loss grows as ``sensitivity * step**2``, and the bits as ``n * log2(sigma / step)``, so the
    slope of loss against bits is the same everywhere if the steps go with ``sqrt(n /
    sensitivity)``. Between them the scale is chosen so that the bits stay about what they are.

    Parameters
    ----------
    units : sequence of float
        By the rule.
    stats : sequence of TensorStats
        Of the same tensors.
    sensitivity : mapping of str to float
        By name; tensors without one keep their unit.

    Examples
    --------
    >>> from weightvid.spec import TensorSpec
    >>> two = [TensorStats(TensorSpec(n, "F32", (8, 8)), 1.0, 1.0, 4.0, True) for n in "ab"]
    >>> [round(u, 6) for u in measured_units([0.5, 0.5], two, {"a": 1.0, "b": 16.0})]
    [1.0, 0.25]
    """
    ratios = [
        log(sqrt(s.spec.size / sensitivity[s.spec.name]) / unit)
        if s.spec.name in sensitivity
        else None
        for unit, s in zip(units, stats, strict=True)
    ]
    pairs = [(r, s.spec.size) for r, s in zip(ratios, stats, strict=True) if r is not None]
    if not pairs:
        return list(units)
    middle = sum(r * size for r, size in pairs) / sum(size for _, size in pairs)
    reach = log(LARGEST_CORRECTION)
    return [
        unit if r is None else unit * exp(min(max(r - middle, -reach), reach))
        for unit, r in zip(units, ratios, strict=True)
    ]


def limits(stats: TensorStats, rule: str = DEFAULT_RULE) -> tuple[float, float]:
    """Finest and coarsest step that a rule gives a tensor."""
    coarsest = VANISHING_SIGMAS if rule == "sqnr" else COARSEST_SIGMAS
    return FINEST_SIGMAS * stats.sigma, coarsest * stats.sigma


def limited(step: float, stats: TensorStats, rule: str = DEFAULT_RULE) -> float:
    """A step within the limits of its tensor, with 8 significant bits."""
    finest, coarsest = limits(stats, rule)
    return round_step(min(max(step, finest), coarsest))


def steps(
    stats: Sequence[TensorStats], step_factor: float, rule: str = DEFAULT_RULE
) -> list[float]:
    """Quantizer step of each tensor.

    Parameters
    ----------
    stats : sequence of TensorStats
        Tensors that will be quantized, each with sigma > 0.
    step_factor : float
        k; > 0.
    rule : str

    Returns
    -------
    list of float
        k times the :func:`units`, within the :func:`limits`, with 8 significant bits.

    Raises
    ------
    QuantizationError
        k is not positive, or the rule unknown.
    """
    check_factor(step_factor)
    return [
        limited(step_factor * unit, s, rule)
        for unit, s in zip(units(stats, rule), stats, strict=True)
    ]


def sample_step(unit: float, stats: TensorStats, bits: int = 8) -> float:
    """Step of the samples that a lossy codec gets to quantize.

    It follows the rule's unit, so that one QP does to each tensor what one step factor would; but
    few weights may lie beyond the range of samples.

    Parameters
    ----------
    unit : float
        The tensor's.
    stats : TensorStats
    bits : int
        Of a sample.
    """
    most = (1 << (bits - 1)) - 1
    reach = min(stats.absmax, SAMPLE_SIGMAS * stats.sigma)
    return round_step(max(SAMPLE_FACTOR * 2.0 ** (8 - bits) * unit, reach / most))


def check_factor(step_factor: float) -> None:
    """Refuse a step factor that is no positive number.

    Raises
    ------
    QuantizationError
    """
    if not 0 < step_factor < float("inf"):
        raise QuantizationError(f"the step factor must be positive, not {step_factor}")


def _kind_factor(name: str) -> float:
    """2 for the weights of queries and keys, by their names, else 1."""
    return 2.0 if any(part in _QUERY_KEY for part in name.split(".")) else 1.0

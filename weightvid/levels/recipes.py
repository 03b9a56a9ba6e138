"""The steps of tensors against each other, and what a recipe means for a model.

The rule between tensors is data-free: ``step = k * sigma * sqrt(n / mean n)``, n the number of
weights of the tensor. With entropy coding the rate of a tensor is about ``n * log2(sigma / step)``
bits, and its harm to the output grows about as ``(step / sigma)**2`` whatever its size, so all
tensors stand at one slope of harm against bits when the steps go with sigma * sqrt(n). The head of
a language model does as much harm as all its layers together, each of which adds only a share to
what the head reads; so its step is finer.

k follows from a recipe, which says how much more harm than int8 with a scale per output channel the
steps may do. What int8 does is known without data: its steps are the rows' peaks over 127.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, log, sqrt
from types import MappingProxyType
from typing import Final, NamedTuple

from weightvid.errors import QuantizationError
from weightvid.levels.stats import TensorStats
from weightvid.levels.steps import INT8, TOKENS, finest_sigmas, is_pointwise
from weightvid.levels.transform import view_of
from weightvid.loader import TensorSpec

#: where the step factor of a recipe is looked for, and how often the range is halved.
_FACTORS: Final = (0.01, 10.0)
_HALVINGS: Final = 40
#: added to a tensor's size over the mean: no step goes to nothing with the size.
SMALLEST_SHARE: Final = 0.05
#: measured losses move a step by at most this factor.
LARGEST_CORRECTION: Final = 8.0
_QUERY_KEY: Final = frozenset({"query", "key", "q_proj", "k_proj", "q", "k", "to_q", "to_k"})
#: heads of models that write text; without one the table of tokens is the head.
_HEADS: Final = frozenset({"lm_head", "embed_out", "output"})
#: errors of a convolution whose outputs are averaged over places cancel there, and those of its
#: kernels' high frequencies the most: steps of one of single positions, and of others.
_POOLED: Final = (2.0, 3.0)
#: harm of our errors beside equally large steps of int8: those of the trellis are smaller, and
#: those at high kernel frequencies are borne better.
_MATRIX_HARM: Final = 0.8
_KERNEL_HARM: Final = 0.5
FIDELITIES: Final = ("outputs", "weights", "integers")


@dataclass(frozen=True, slots=True)
class Recipe:
    """A named quality.

    ``noise`` is the error of the outputs, in that of int8 per channel, as the rule forecasts it;
    ``language_noise`` the same of language models, whose perplexity hardly minds errors that change
    single words. ``mantissa_bits``, of 23, are what 1-D floats keep.
    """

    name: str
    noise: float
    language_noise: float
    mantissa_bits: int


_ROWS: Final = (
    *(Recipe("fine", 1.0, 1.5, 23), Recipe("balanced", 1.4, 4.0, 10), Recipe("small", 5.0, 8.0, 7)),
)
RECIPES: Final[Mapping[str, Recipe]] = MappingProxyType({row.name: row for row in _ROWS})


def recipe(name: str) -> Recipe:
    """Recipe of a name; a QuantizationError if it is unknown."""
    found = RECIPES.get(name)
    if found is None:
        raise QuantizationError(f"unknown recipe {name!r}; choose one of: {', '.join(RECIPES)}")
    return found


def units(stats: Sequence[TensorStats], fidelity: str = "outputs") -> list[float]:
    """Step of each tensor at k = 1, before any limit.

    Parameters
    ----------
    stats : sequence of TensorStats
        Tensors that will be quantized, each with sigma > 0.
    fidelity : str
        ``outputs``, ``integers``: ``f * sigma * sqrt(n / mean n + 0.05)``; f is 2 for the queries
        and keys of attention, whose errors only move the weights of a softmax, ``1 / sqrt(T)`` for
        the head of a language model of T other tensors, 3 for the last convolution of a classifier
        (2 without kernels), and 1 for others.
        ``weights``: the root of the mean square of all weights, for every tensor. Other names are a
        QuantizationError.
    """
    if fidelity not in FIDELITIES:
        raise QuantizationError(f"unknown fidelity {fidelity!r}; choose: {', '.join(FIDELITIES)}")
    if not stats:
        return []
    total = sum(s.spec.size for s in stats)
    if fidelity == "weights":
        return [sqrt(sum(s.spec.size * s.sigma**2 for s in stats) / total)] * len(stats)
    mean = sum(s.effective_size for s in stats) / len(stats)
    return [
        s.scale * kind * sqrt(s.effective_size / mean + SMALLEST_SHARE)
        for s, kind in zip(stats, _kind_factors(stats), strict=True)
    ]


def recipe_factor(
    name: str, stats: Sequence[TensorStats], units: Sequence[float], fidelity: str = "outputs"
) -> float:
    """Step factor of a recipe: the forecast of the errors is so many times that of int8.

    ``units`` are of the tensors of ``stats``; an unknown name is a QuantizationError.
    """
    wanted = recipe(name)
    noise = wanted.language_noise if speaks(stats) else wanted.noise
    harms = _harms(stats, units, fidelity)
    low, high = _FACTORS
    for _ in range(_HALVINGS):
        middle = sqrt(low * high)
        if _error(middle, harms) > noise:
            high = middle
        else:
            low = middle
    return low


def forecast(
    factor: float, stats: Sequence[TensorStats], units: Sequence[float], fidelity: str = "outputs"
) -> float:
    """Error of the outputs at a step factor, in that of int8 per channel; 0 without tensors.

    Every tensor does harm as the square of its steps over its scale; steps at the finest that is
    allowed do not follow the factor.
    """
    return _error(factor, _harms(stats, units, fidelity))


class _Harm(NamedTuple):
    """Harm that a tensor does: ours at a step of one scale, int8's; steps at k = 1 and at least."""

    step: float
    finest: float
    ours: float
    int8: float


def _harms(stats: Sequence[TensorStats], units: Sequence[float], fidelity: str) -> list[_Harm]:
    found = []
    for s, unit, kind in zip(stats, units, _kind_factors(stats), strict=True):
        kernel = bool(s.view.kernel) or is_pointwise(s.spec)
        harm = 1.0 if fidelity != "outputs" else _KERNEL_HARM if kernel else _MATRIX_HARM
        int8 = (s.peak / INT8 / kind) ** 2
        found.append(_Harm(unit / s.scale, finest_sigmas(s), harm / kind**2, int8))
    return found


def _error(factor: float, harms: Sequence[_Harm]) -> float:
    int8 = sum(harm.int8 for harm in harms)
    ours = sum(harm.ours * max(factor * harm.step, harm.finest) ** 2 for harm in harms)
    return sqrt(ours / int8) if int8 else 0.0


def speaks(stats: Sequence[TensorStats]) -> bool:
    """Whether the tensors are those of a language model."""
    return language_head([s.spec for s in stats]) is not None


def _kind_factors(stats: Sequence[TensorStats]) -> list[float]:
    """What the step of each tensor is multiplied by for what the tensor does in the network."""
    specs = [s.spec for s in stats]
    head, pooled = language_head(specs), pooled_convolution(specs)
    return [
        1 / sqrt(max(len(stats) - 1, 1))
        if s.spec.name == head
        else _POOLED[bool(s.view.kernel)]
        if s.spec.name == pooled
        else 2.0
        if _parts(s.spec) & _QUERY_KEY
        else 1.0
        for s in stats
    ]


def pooled_convolution(specs: Sequence[TensorSpec]) -> str | None:
    """Name of the convolution whose outputs the only matrix of a network reads, place by place.

    Examples
    --------
    >>> convolutions = [TensorSpec(f"layer{n}.conv", "F32", (64, 64, 3, 3)) for n in (2, 10, 9)]
    >>> head = TensorSpec("fc", "F32", (10, 64))
    >>> pooled_convolution([*convolutions, head]), pooled_convolution([*convolutions, head, head])
    ('layer10.conv', None)
    """
    convolutions = [s for s in specs if view_of(s.shape).kernel or is_pointwise(s)]
    matrices = [spec for spec in specs if spec not in convolutions]
    if len(matrices) != 1:
        return None
    before = [spec.name for spec in convolutions if spec.shape[0] in matrices[0].shape]
    return max(before, key=_by_number, default=None)


def _by_number(name: str) -> list[tuple[int, str]]:
    return [(int(n or 0), text) for n, text in re.findall(r"(\d*)(\D*)", name)]


def _parts(spec: TensorSpec) -> frozenset[str]:
    return frozenset(spec.name.split("."))


def language_head(specs: Sequence[TensorSpec]) -> str | None:
    """Name of the tensor that makes scores of tokens; None where no model writes text.

    Examples
    --------
    >>> table = TensorSpec("model.embed_tokens.weight", "F32", (100, 8))
    >>> head = TensorSpec("lm_head.weight", "F32", (100, 8))
    >>> language_head([table]), language_head([table, head]), language_head([head])
    ('model.embed_tokens.weight', 'lm_head.weight', None)
    """
    tables = [spec for spec in specs if _parts(spec) & TOKENS and len(spec.shape) == 2]
    heads = [
        spec
        for spec in specs
        if _parts(spec) & _HEADS and any(spec.shape == table.shape for table in tables)
    ]
    return next((spec.name for spec in [*heads, *tables]), None)


def measured_units(
    units: Sequence[float], stats: Sequence[TensorStats], sensitivity: Mapping[str, float]
) -> list[float]:
    """Units of a rule, balanced by measured losses so that all tensors end at one slope.

    A loss grows as ``sensitivity * step**2``, and the bits as ``n * log2(sigma / step)``, so the
    slope of loss against bits is the same everywhere if the steps go with ``sqrt(n /
    sensitivity)``. Between them the scale is chosen so that the bits stay about what they are.
    Tensors without a sensitivity, which is by name, keep their unit.
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

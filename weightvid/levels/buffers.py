"""What is kept bit for bit, because it is no weight: scales of packed integers, constant tables.

Names decide, as files say nothing of what a tensor is for; a table of sines also tells by its rows.
"""

import re
from collections.abc import Iterable
from math import sqrt
from typing import Final

import numpy as np

from weightvid.levels.stats import TensorStats
from weightvid.loader import PACKABLE, TensorSpec

#: of a tensor that says how to read the packed integers or 8-bit floats beside it.
_SCALE: Final = re.compile(
    r"(scales?|zeros?|zero_points?|absmax|quant_map|codebook)(_inv)?$", re.IGNORECASE
)
#: buffers that programs compute and store: filters of spectrograms, tables of positions.
_TABLE: Final = re.compile(
    r"(^|[._])(mel_?(filters?|basis|fb|bank)|filter_?bank|fb|pe|inv_freq|(cos|sin)(_cached)?|"
    r"freqs_(cis|cos|sin)|sinusoid\w*|(i?stft|dft|fft)\w*|hann\w*|window)$",
    re.IGNORECASE,
)
_MOMENT: Final = re.compile(
    r"(^|\.)(exp_avg|exp_avg_sq|exp_inf|max_exp_avg_sq|momentum_buffer|square_avg|grad_avg|"
    r"acc_delta|ax)(\.|$)"
)


def scales_of(specs: Iterable[TensorSpec]) -> set[str]:
    """Names of floats that belong to packed integers or 8-bit floats of the same module.

    Examples
    --------
    >>> specs = [TensorSpec("l.qweight", "I32", (64, 256)), TensorSpec("l.scales", "F16", (4, 256))]
    >>> scales_of([*specs, TensorSpec("m.scales", "F16", (4, 256))])
    {'l.scales'}
    """
    every = list(specs)
    packed = [s.name for s in every if s.dtype not in PACKABLE and s.size > 1]
    modules = {name.rpartition(".")[0] for name in packed}.union(packed)
    return {
        spec.name
        for spec in every
        if spec.dtype in PACKABLE
        and _SCALE.search(spec.name.rpartition(".")[2] or spec.name)
        and spec.name.rpartition(".")[0] in modules
    }


def tables_of(specs: Iterable[TensorSpec]) -> set[str]:
    """Names of floats that are constant tables by their name.

    Examples
    --------
    >>> names = "mel_filters", "a.pos.pe", "shape.weight"
    >>> sorted(tables_of(TensorSpec(name, "F32", (80, 201)) for name in names))
    ['a.pos.pe', 'mel_filters']
    """
    return {s.name for s in specs if s.dtype in PACKABLE and _TABLE.search(s.name)}


def is_sinusoid(stats: TensorStats) -> bool:
    """Whether each row is made of pairs of a sine and a cosine: its mean square is a half."""
    close = np.allclose(stats.row_scales, np.float32(sqrt(0.5)), rtol=1e-4)
    return close and stats.row_scales.size > 0 and 0.9 < stats.absmax < 1.0001


def optimizer_state(specs: Iterable[TensorSpec]) -> list[str]:
    """Names of tensors that an optimizer keeps beside the weights."""
    return [s.name for s in specs if s.name.startswith("optimizer") or _MOMENT.search(s.name)]

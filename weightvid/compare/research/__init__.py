"""Quantizers of the research that this grew out of, without training, as rows of a comparison.

Each turns all matrices of a model into bytes at one step, and the bytes back into matrices; shapes
and names are known to both sides, as with the plain ways. docs/research.md says where they come
from and what was measured.
"""

import lzma
import struct
from collections.abc import Iterator
from functools import partial
from math import sqrt
from time import perf_counter
from typing import Final

import numpy as np

from weightvid.compare.model import Coded, Method, Model, Tensors
from weightvid.compare.research.kernels import Codebook, KernelPrediction
from weightvid.compare.research.pyramid import Pyramid
from weightvid.compare.research.scalar import FixedLength, Lnq, Uniform, shape_of
from weightvid.compare.rivals import lacks
from weightvid.exact import exact_elements
from weightvid.levels.transform import view_of

#: steps in units of the root mean square of all weights.
FACTORS: Final = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8)
#: mantissa bits of what is no matrix, as in weightvid's own recipes.
_MANTISSA_BITS: Final = 7
#: a quantizer of matrices in steps, each of shape (rows, channels, kernel positions).
Scheme = FixedLength | Uniform | Lnq | KernelPrediction | Codebook | Pyramid
#: every quantizer, by name.
SCHEMES: Final[dict[str, Scheme]] = {
    "uniform, fixed length": FixedLength(),
    "uniform": Uniform(dct=False),
    "uniform + DCT": Uniform(dct=True),
    "uniform, rate-aware": Uniform(dct=False, rate_aware=True),
    "uniform + DCT, rate-aware": Uniform(dct=True, rate_aware=True),
    "LNQ 2, fixed length": Lnq(2, entropy=False),
    "LNQ 4, fixed length": Lnq(4, entropy=False),
    "LNQ 2": Lnq(2, entropy=True),
    "LNQ 4": Lnq(4, entropy=True),
    "kernel prediction": KernelPrediction(dct=False),
    "kernel prediction + DCT": KernelPrediction(dct=True),
    "kernel codebook": Codebook(256),
    "pyramid 3x3": Pyramid(3),
    "pyramid 5x5": Pyramid(5),
    "pyramid, predictive": Pyramid(0),
}


def research_methods() -> Iterator[Method]:
    """Every untrained method of the research, and the scalar quantizers it is judged against."""
    missing = lacks("constriction", "pip install 'weightvid[compare]'")
    depends = ("compare/research/", "levels/transform")
    for name, scheme in SCHEMES.items():
        yield Method(
            f"research {name}", "research", partial(_code, scheme), "step factor", FACTORS, missing,
            depends=depends, command=("compare", "--research"),
        )  # fmt: skip


def _code(scheme: Scheme, model: Model, factor: float) -> Coded:
    began = perf_counter()
    matrices = model.matrices()
    views = [view_of(tensor.shape) for tensor in matrices.values()]
    shaped = [x.astype(np.float64).reshape(shape_of(view_of(x.shape))) for x in matrices.values()]
    count = max(1, sum(each.size for each in shaped))
    step = factor * sqrt(sum(float(np.square(x).sum()) for x in shaped) / count) or 1.0
    data = struct.pack("<d", step) + scheme.encode([x / step for x in shaped], views)
    kept = {
        spec.name: exact_elements(model.tensors[spec.name], spec, _MANTISSA_BITS)
        for spec in model.specs
        if spec.name not in matrices
    }
    other = lzma.compress(b"".join(array.tobytes() for array in kept.values()))
    coded = perf_counter()
    restored: Tensors = {n: x.astype(model.tensors[n].dtype) for n, x in kept.items()}
    for (name, tensor), found in zip(matrices.items(), scheme.decode(data[8:], views), strict=True):
        restored[name] = (found * step).reshape(tensor.shape).astype(tensor.dtype)
    return Coded(len(data) + len(other), restored, coded - began, perf_counter() - coded)

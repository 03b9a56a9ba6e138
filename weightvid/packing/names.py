"""Names of biases, norms and statistics, as frameworks and exporters write them."""

from __future__ import annotations

import re
from typing import Final

#: what a layer calls its own 1-D tensors: PyTorch, TensorFlow 1 as PyTorch models keep it.
_OWN_NAMES: Final = frozenset(
    {"weight", "bias", "running_mean", "running_var", "gamma", "beta", "LayerNorm", "scale"}
)
#: Paddle numbers them: ``conv2d_0.b_0``, ``batch_norm_3.w_1``. PyTorch's recurrent layers add what
#: a bias belongs to: ``bias_ih_l0_reverse``.
_NUMBERED: Final = re.compile(r"[wb]_\d+|bias_\w+")
#: last words of longer names, and those that need a norm before them, as in ``conv1_bn_offset``.
_WORDS: Final = frozenset({"bias", "biases", "gamma", "beta"})
_NORM_WORDS: Final = frozenset({"weight", "scale", "offset", "mean", "var", "variance"})
_NORMS: Final = frozenset({"bn", "ln", "gn", "running", "moving"})


def is_affine(name: str) -> bool:
    """Whether a 1-D tensor of this name is a bias, or belongs to a norm.

    Others, such as rotary frequencies, lookup tables or the scales of quantized weights, may be
    multiplied by large numbers, or be multiplied often.

    Examples
    --------
    >>> [is_affine(n) for n in ("bn1.weight", "conv2d_7.b_0", "conv1_bn_offset", "dense/bias:0")]
    [True, True, True, True]
    >>> [is_affine(n) for n in ("rotary.inv_freq", "fc.weight_scale", "anchors", "mean")]
    [False, False, False, False]
    """
    plain = re.sub(r":\d+$", "", name)
    own = re.split(r"[./]", plain)[-1]
    if own in _OWN_NAMES or _NUMBERED.fullmatch(own):
        return True
    *before, last = re.split(r"[^a-z0-9]+", plain.lower())
    norm = any("norm" in word or word in _NORMS for word in before)
    return last in _WORDS or (norm and last in _NORM_WORDS)

"""Which 1-D tensors keep fewer bits: biases, norms and statistics, by what frameworks call them."""

from __future__ import annotations

import io

import numpy as np
import pytest
from archives import packed

from weightvid.loader import open_archive
from weightvid.pack import PackOptions
from weightvid.packing.names import is_affine

AFFINE = (
    "weight", "bn1.weight", "layer1.0.bn2.running_var", "encoder.LayerNorm.bias", "head.bias",
    "lstm.bias_ih_l0", "lstm.bias_hh_l1_reverse", "lstm_cell.bias_hh",
    "conv2d_3.b_0", "batch_norm_0.w_2", "conv12_depthwise_bn_scale", "conv5_linear_bn_variance",
    "model/dense_1/bias:0", "model/batch_normalization/moving_mean:0", "block/LayerNorm_0/beta",
)  # fmt: skip
OTHERS = (
    "rotary_emb.inv_freq", "anchors", "fc.weight_scale", "input_scale", "qweight.scales",
    "mean", "pixel_mean", "conv11_se_1_offset", "relative_position_index", "window", "",
)  # fmt: skip


@pytest.mark.parametrize("name", AFFINE)
def test_of_a_layer(name: str) -> None:
    assert is_affine(name)


@pytest.mark.parametrize("name", OTHERS)
def test_of_something_else(name: str) -> None:
    assert not is_affine(name)


def test_what_is_shortened() -> None:
    values = np.random.default_rng(3).standard_normal(300).astype(np.float32)
    names = ("bn1.weight", "conv2d_3.b_0", "rotary_emb.inv_freq", "kept.bias")
    found = {}
    for recipe in ("balanced", "fine"):
        options = PackOptions(recipe=recipe, keep=("kept.*",))
        with open_archive(
            io.BytesIO(packed({n: values.copy() for n in names}, options))
        ) as archive:
            found[recipe] = dict(archive)
    for name in names:
        assert np.array_equal(found["fine"][name], values)
    for name in names[2:]:
        assert np.array_equal(found["balanced"][name], values)
    for name in names[:2]:
        short = found["balanced"][name]
        assert not np.array_equal(short, values)
        assert np.all(short.view(np.uint32) & 0xFFF == 0)
        assert np.abs(short / values - 1).max() <= 2.0**-12

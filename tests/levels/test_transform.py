"""Which axes are kernels, and the transform along them: orthonormal, undone to the last bit."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weightvid.levels import transform
from weightvid.levels.transform import (
    View,
    dct,
    forward,
    precision,
    view_of,
    whole_basis,
)
from weightvid.loader import FormatError, Part, dequantize, kernel_matrix

Array = np.ndarray[Any, Any]


#: shape: rows, channels, kernel.
VIEWS = {
    (): (1, 1), (7,): (1, 7), (1, 7, 1): (1, 7), (512, 192): (512, 192),
    # tables of sinusoids; pointwise; 1-D, 2-D (of an RGB image, and others), 3-D
    (1, 512, 192): (512, 192), (512, 1, 192): (512, 192), (64, 32, 1, 1): (64, 32),
    (64, 32, 3): (64, 32, (3,)), (256, 80, 5): (256, 80, (5,)), (64, 32, 1, 7): (64, 32, (7,)),
    (16, 3, 3, 3): (16, 3, (3, 3)), (64, 32, 3, 3): (64, 32, (3, 3)),
    (64, 3, 7, 7): (64, 3, (7, 7)), (8, 4, 3, 3, 3): (8, 4, (3, 3, 3)),
    # depthwise: in 1-D it has the shape of a matrix, in 3-D that of an RGB image's
    (64, 1, 3, 3): (64, 1, (3, 3)), (64, 1, 11, 11): (64, 1, (11, 11)), (768, 1, 31): (768, 31),
    (8, 1, 3, 3, 3): (8, 3, (3, 3)),
    # patches; experts; heads of attention; many axes
    (768, 3, 16, 16): (768, 3, (16, 16)), (1152, 3, 2, 14, 14): (1152, 3, (2, 14, 14)),
    (1024, 3, 32, 32): (1024, 3, (32, 32)), (8, 512, 256): (4096, 256), (12, 768, 64): (9216, 64),
    (2, 8, 64, 64): (1024, 64), (4, 4, 64, 64, 64): (65536, 64), (2,) * 6: (32, 2),
}  # fmt: skip


@pytest.mark.parametrize("shape", VIEWS, ids=str)
def test_views(shape: tuple[int, ...]) -> None:
    found = view_of(shape)
    assert found == View(*VIEWS[shape])
    assert found.rows * found.columns == int(np.prod(shape))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 11, 16, 32])
def test_the_transform_is_orthonormal(size: int) -> None:
    basis = dct(size).astype(np.float64)
    np.testing.assert_allclose(basis @ basis.T, np.eye(size), atol=2e-7)
    # Frequency u changes its sign u times.
    assert [np.count_nonzero(np.diff(np.sign(row))) for row in basis] == list(range(size))


kernels = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)


@settings(max_examples=25)
@given(kernels, st.integers(1, 4), st.integers(1, 3), st.integers(0, 99))
def test_back_to_the_last_bit(kernel: tuple[int, ...], rows: int, channels: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    count = prod(kernel)
    # Any orthonormal bases, not the DCT's alone; levels of all sizes, and escapes.
    turns = [np.linalg.qr(random.standard_normal((size, size)))[0] for size in kernel]
    bases = [turn.astype(np.float32) for turn in turns]
    levels = random.integers(-128, 128, (rows, count * channels)).astype(np.int8)
    places = np.flatnonzero(random.random(levels.size) < 0.2)
    numbers = (random.standard_normal(places.size) * 1e6).astype(np.float32)
    part = Part(
        0, 0, 0, *levels.shape, 0, 0.3, tuple(range(len(kernel))), 8,
        escapes=(places, numbers),
    )  # fmt: skip
    # FORMAT.md, 5.4, in integers, one number after the other.
    expected = np.empty((rows, channels, count), np.float32)
    matrix = kernel_matrix(part, bases)
    listed = dict(zip(places.tolist(), numbers, strict=True))
    for row, channel, place in np.ndindex(*expected.shape):
        at = [(row * count + f) * channels + channel for f in range(count)]
        total = sum(
            int(levels.flat[a]) * int(m)
            for a, m in zip(at, matrix[:, place], strict=True)
            if a not in listed
        )
        value = np.float32(total)
        for a, m in zip(at, matrix[:, place], strict=True):
            if a in listed:
                value = np.float32(value + listed[a] * m)
        expected[row, channel, place] = value * np.float32(0.3 / 256)
    assert dequantize(levels, part, bases).tobytes() == expected.tobytes()


def test_kernel_matrix_is_refused_where_its_sums_are_not_exact() -> None:
    part = Part(0, 0, 0, 1, 9, 0, 1.0, (0, 1), precision((3, 3), None))
    bases = [dct(3), dct(3)]
    assert np.abs(kernel_matrix(part, bases)).sum(axis=0).max() > 2**14
    for bad in (replace(part, shift=part.shift + 1), replace(part, frequency_steps=np.full(9, 4))):
        with pytest.raises(FormatError, match="kernel matrix"):
            kernel_matrix(bad, bases)
    with pytest.raises(FormatError, match="kernel matrix"):
        kernel_matrix(part, [bases[0], np.full((3, 3), np.nan, np.float32)])


@given(kernels, st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_there_and_back(kernel: tuple[int, ...], rows: int, channels: int, seed: int) -> None:
    count = int(np.prod(kernel))
    weights = np.random.default_rng(seed).standard_normal((rows, channels * count))
    coefficients = forward(weights.astype(np.float32), kernel)
    # A reference in double precision: frequency by frequency, channels within.
    exact = weights.reshape(rows, channels, count) @ whole_basis(kernel).T
    np.testing.assert_allclose(coefficients, exact.swapaxes(1, 2).reshape(rows, -1), atol=1e-5)
    assert np.square(coefficients).sum() == pytest.approx(np.square(weights).sum(), rel=1e-5)


def test_dequantize_puts_kernels_where_they_were() -> None:
    levels = np.random.default_rng(2).integers(-99, 99, (5, 2 * 3 * 4)).astype(np.int8)
    part = Part(0, 0, 0, 5, 24, 0, 0.25, (0, 1), 12, np.array([0, 4, -4, 0, 1, 2], np.int8))
    bases = [dct(2), dct(3)]
    units = 0.25 * np.array([1, 2, 0.5, 1, 2**0.25, 2**0.5])
    scaled = levels.reshape(5, 6, 4) * units[:, None]
    expected = np.einsum("rfc,fk->rck", scaled, whole_basis((2, 3))).reshape(5, 24)
    np.testing.assert_allclose(dequantize(levels, part, bases), expected, rtol=1e-3, atol=0.005)
    # A few rows at a time.
    apart = np.concatenate([dequantize(levels[r : r + 2], part, bases, r) for r in (0, 2, 4)])
    assert apart.tobytes() == dequantize(levels, part, bases).tobytes()


def test_moments_of_coefficients() -> None:
    random = np.random.default_rng(3)
    weights = random.standard_normal((4, 3 * 6)).astype(np.float32)
    inputs = random.standard_normal((50, 18))
    moment = (inputs.T @ inputs)[None]
    before = np.einsum("rc,cd,rd->r", weights, moment[0], weights)
    there, turned = forward(weights, (2, 3)), transform.forward_moment(moment, (2, 3))[0]
    np.testing.assert_allclose(np.einsum("rc,cd,rd->r", there, turned, there), before, rtol=1e-5)

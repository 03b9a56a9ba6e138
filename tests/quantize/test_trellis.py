"""The trellis dequantizer against its specification."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from weightvid.errors import QuantizationError
from weightvid.quantize.params import TRELLIS_STATES
from weightvid.quantize.trellis import (
    ColumnDequantizer,
    dequantize_index,
    dequantize_index_reference,
    machine,
)

BOUND = {"int8": 127, "int16": 32767, "int32": 1 << 22, "int64": 1 << 22}


@st.composite
def level_matrices(draw: st.DrawFn) -> np.ndarray:
    dtype = draw(st.sampled_from(sorted(BOUND)))
    shape = draw(st.tuples(st.integers(0, 9), st.integers(0, 40)))
    bound = draw(st.sampled_from([1, 6, BOUND[dtype]]))
    return draw(hnp.arrays(dtype, shape, elements=st.integers(-bound, bound)))


@settings(deadline=None, max_examples=150)
@given(level_matrices(), st.sampled_from(TRELLIS_STATES), st.sampled_from([0, 1]), st.booleans())
def test_fast_equals_reference(levels: np.ndarray, states: int, axis: int, zero: bool) -> None:
    index = dequantize_index(levels, states, axis, zero)
    assert index.dtype == np.int32
    assert np.array_equal(index, dequantize_index_reference(levels, states, axis, zero))


@settings(deadline=None, max_examples=50)
@given(level_matrices(), st.sampled_from(TRELLIS_STATES), st.lists(st.integers(0, 9), max_size=4))
def test_columns_in_chunks(levels: np.ndarray, states: int, cuts: list[int]) -> None:
    decoder = ColumnDequantizer(levels.shape[1], states)
    parts = [decoder.feed(part) for part in np.split(levels, sorted(cuts))]
    assert np.array_equal(np.concatenate(parts), dequantize_index(levels, states, 0))


def test_chunks_longer_than_the_period() -> None:
    levels = np.random.default_rng(3).integers(-9, 10, (3000, 3))
    whole = dequantize_index(levels, 64, 0, True)
    assert np.array_equal(whole, dequantize_index_reference(levels, 64, 0, True))
    decoder = ColumnDequantizer(3, 64, True)
    parts = [decoder.feed(part) for part in np.split(levels, [5, 1000, 1001, 2417])]
    assert np.array_equal(np.concatenate(parts), whole)


def test_rows_are_independent() -> None:
    levels = np.random.default_rng(4).integers(-9, 10, (1200, 333))
    whole = dequantize_index(levels, 8)
    assert np.array_equal(whole[700:911], dequantize_index(levels[700:911], 8))
    assert np.array_equal(whole[::-1], dequantize_index(levels[::-1], 8))
    columns = dequantize_index(levels, 8, 0)
    assert np.array_equal(columns[:, 100:207], dequantize_index(levels[:, 100:207], 8, 0))


@pytest.mark.parametrize("states", TRELLIS_STATES)
def test_machine_is_linear_and_invertible(states: int) -> None:
    trellis = machine(states)
    for state in range(states):
        for parity in range(2):
            parts = [1 << bit for bit in range(6) if state >> bit & 1]
            total = trellis.next_state(0, parity)
            for part in parts:
                total ^= trellis.next_state(part, 0)
            assert trellis.next_state(state, parity) == total
    for parity in range(2):
        assert {trellis.next_state(s, parity) for s in range(states)} == set(range(states))
    assert sum(trellis.quantizer(state) for state in range(states)) == states // 2


def test_masks_of_the_specification() -> None:
    table = {
        4: (0b10, 0b01),
        8: (0b101, 0b010),
        16: (0b1100, 0b0001),
        32: (0b11000, 0b00101),
        64: (0b110101, 0b011101),
    }
    for states, masks in table.items():
        assert (machine(states).feedback, machine(states).output) == masks


def test_tables_of_the_specification() -> None:
    four, eight = machine(4), machine(8)
    assert [four.quantizer(s) for s in range(4)] == [0, 1, 0, 1]
    assert [[four.next_state(s, p) for p in (0, 1)] for s in range(4)] == [
        [0, 1],
        [2, 3],
        [1, 0],
        [3, 2],
    ]
    assert [eight.quantizer(s) for s in range(8)] == [0, 0, 1, 1, 0, 0, 1, 1]
    assert [[eight.next_state(s, p) for p in (0, 1)] for s in range(8)] == [
        [0, 1],
        [3, 2],
        [4, 5],
        [7, 6],
        [1, 0],
        [2, 3],
        [5, 4],
        [6, 7],
    ]


def test_refusals() -> None:
    levels = np.zeros((2, 3), np.int8)
    with pytest.raises(QuantizationError, match="no trellis of 12 states"):
        dequantize_index(levels, 12)
    with pytest.raises(QuantizationError, match="axis"):
        dequantize_index(levels, 8, 2)
    with pytest.raises(QuantizationError, match="matrix"):
        dequantize_index(levels[0], 8)
    with pytest.raises(QuantizationError, match="signed integers"):
        dequantize_index(levels.astype(np.uint8), 8)
    with pytest.raises(QuantizationError, match="rows of 4 levels"):
        ColumnDequantizer(4).feed(levels)

"""The order of levels by energies, and its inverse in the loader."""

from __future__ import annotations

from math import log2
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from weightvid.levels.order import Energies, choose_energies, to_sequence
from weightvid.loader import MAX_ENERGY, Part, column_energies, from_sequence

Array = np.ndarray[Any, Any]


@st.composite
def matrices(draw: st.DrawFn) -> tuple[Array, Energies | None]:
    rows, channels, kernel = draw(st.tuples(*[st.integers(1, 12)] * 3))
    random, most = np.random.default_rng(draw(st.integers(0, 99))), draw(st.integers(0, MAX_ENERGY))
    matrix = random.integers(-127, 128, (rows, kernel * channels)).astype(np.int8)
    energies = Energies(
        *(random.integers(0, most + 1, n).astype(np.uint8) for n in (rows, channels, kernel))
    )
    return matrix, draw(st.sampled_from((None, energies)))


def part_of(matrix: Array, energies: Energies | None) -> Part:
    return Part(0, 0, 0, *matrix.shape, 0, 1.0, energies=energies)


@given(matrices())
def test_round_trip(made: tuple[Array, Energies | None]) -> None:
    matrix, energies = made
    sequence = to_sequence(matrix, energies)
    assert sequence.shape == (matrix.size,)
    assert np.array_equal(from_sequence(sequence, part_of(matrix, energies)), matrix)


@given(matrices())
def test_the_order_is_that_of_the_specification(made: tuple[Array, Energies | None]) -> None:
    """FORMAT.md, 5.1, element by element."""
    matrix, energies = made
    if energies is None:
        assert np.array_equal(to_sequence(matrix, None), matrix.reshape(-1))
        return
    columns = [int(f) + int(c) for f in energies.frequencies for c in energies.channels]
    assert energies.columns.tolist() == columns
    assert column_energies(part_of(matrix, energies)).tolist() == columns
    rows = energies.rows.tolist()
    places = sorted(
        np.ndindex(*matrix.shape),
        key=lambda p: (-rows[p[0]] - columns[p[1]], -rows[p[0]], -columns[p[1]], p[0], p[1]),
    )
    assert to_sequence(matrix, energies).tolist() == [int(matrix[place]) for place in places]


def test_energies_are_chosen_where_they_save() -> None:
    random = np.random.default_rng(1)
    flat = np.rint(random.standard_normal((64, 64)) * 2).astype(np.int8)
    assert choose_energies(flat) is None
    assert choose_energies(np.zeros((64, 64), np.int8)) is None
    spread = np.exp2(random.uniform(-2, 2, (64, 1)) + np.repeat(random.uniform(-2, 2, 4), 16))
    levels = np.clip(np.rint(random.standard_normal((64, 64)) * spread), -127, 127).astype(np.int8)
    found = choose_energies(levels, 4)
    assert found is not None
    assert [len(each) for each in found] == [64, 16, 4]
    assert max(int(each.max()) for each in found) <= MAX_ENERGY
    rows = np.abs(levels).mean(axis=1)
    assert np.corrcoef(found.rows, np.log2(rows))[0, 1] > 0.95
    sequence = np.abs(to_sequence(levels, found).astype(float))
    # Magnitudes fall along the sequence.
    quarters = [part.mean() for part in np.split(sequence, 4)]
    assert quarters == sorted(quarters, reverse=True)
    assert log2(quarters[0] / quarters[3]) > 3

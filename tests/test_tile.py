"""The ribbon and the orders: bijections, closed formulas, and frames with little left blank."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightvid import tile
from weightvid.errors import QuantizationError
from weightvid.tile import ALIGN, BAND, EnergyOrder, Fold, FrameGeometry, order, ribbon
from weightvid.tile.fold import count_digits, fold_levels, unfold
from weightvid.tile.ribbon import MAX_FRAME_PX

sides = st.one_of(st.integers(1, 12), st.sampled_from([63, 64, 65, 127, 128, 129, 200]))
geometries = st.builds(
    FrameGeometry,
    st.integers(4, 10).map(lambda n: 64 * n),
    st.integers(4, 10).map(lambda n: 64 * n),
)


def levels(seed: int, *shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(-127, 128, shape, dtype=np.int8)


@st.composite
def orders(draw: st.DrawFn) -> tuple[tuple[int, int], EnergyOrder]:
    rows, inputs, repeat = draw(sides), draw(st.integers(1, 40)), draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 20)))
    most = draw(st.sampled_from([1, 2, 5, 64]))
    energies = [rng.integers(0, most, n).astype(np.uint8) for n in (rows, inputs)]
    return (rows, inputs * repeat), EnergyOrder(*energies)


@given(sides, sides)
def test_plain_order_is_a_bijection(rows: int, columns: int) -> None:
    matrix = levels(rows, rows, columns)
    sequence = tile.to_sequence(matrix, None)
    assert np.array_equal(tile.from_sequence(sequence, (rows, columns), None), matrix)


@given(sides, sides, st.data())
def test_closed_formulas_agree_with_the_arrays(
    rows: int, columns: int, data: st.DataObject
) -> None:
    matrix = levels(columns, rows, columns)
    sequence = tile.to_sequence(matrix, None)
    for _ in range(10):
        row = data.draw(st.integers(0, rows - 1))
        column = data.draw(st.integers(0, columns - 1))
        number = order.number(row, column, rows, columns)
        assert sequence[number] == matrix[row, column]
        assert order.element(number, rows, columns) == (row, column)
        assert ribbon.place(number) == (number // BAND, number % BAND)


@pytest.mark.parametrize("number", [-1, 6, 1000])
def test_there_is_no_such_element(number: int) -> None:
    with pytest.raises(IndexError):
        order.element(number, 2, 3)


def test_a_full_group_is_its_sub_matrix() -> None:
    matrix = levels(0, 128, 70)
    laid = tile.to_sequence(matrix, None).reshape(-1, BAND).T
    assert np.array_equal(laid[:, :70], matrix[:64])
    assert np.array_equal(laid[:, 70:], matrix[64:])


@given(orders())
def test_energy_order_is_a_bijection(case: tuple[tuple[int, int], EnergyOrder]) -> None:
    shape, energy = case
    matrix = levels(shape[1], *shape)
    sequence = tile.to_sequence(matrix, energy)
    assert sorted(sequence.tolist()) == sorted(matrix.reshape(-1).tolist())
    assert np.array_equal(tile.from_sequence(sequence, shape, energy), matrix)


@given(orders())
def test_energy_classes_fall(case: tuple[tuple[int, int], EnergyOrder]) -> None:
    """The sum of the energies never rises along the sequence, as the docstring of order says."""
    (rows, columns), energy = case
    each = np.repeat(energy.columns, columns // energy.columns.size)
    sums = (energy.rows[:, None].astype(int) + each).astype(np.int8)
    sequence = tile.to_sequence(sums, energy)
    assert not np.any(np.diff(sequence.astype(int)) > 0)
    edges = energy.class_edges(columns)
    assert edges[-1][1] == rows * columns
    begin = 0
    for number, end in edges:
        assert np.all(sequence[begin:end] == number)
        begin = end


@given(orders(), st.integers(0, 300))
def test_what_lies_behind_a_sequence_is_ignored(
    case: tuple[tuple[int, int], EnergyOrder], more: int
) -> None:
    (rows, columns), energy = case
    matrix = levels(more, rows, columns)
    for how in (None, energy):
        longer = np.concatenate([tile.to_sequence(matrix, how), levels(1, more)])
        assert np.array_equal(tile.from_sequence(longer, (rows, columns), how), matrix)


@pytest.mark.parametrize("bad", [[], [64]])
def test_bad_energies_are_refused(bad: list[int]) -> None:
    with pytest.raises(QuantizationError):
        EnergyOrder(np.array(bad, np.uint8), np.array([1], np.uint8))


@given(st.lists(st.tuples(sides, sides), max_size=6))
def test_tensors_lie_one_behind_the_other(shapes: list[tuple[int, int]]) -> None:
    edges = tile.starts(shapes)
    assert edges[0] == 0
    for (rows, columns), (begin, end) in zip(shapes, pairwise(edges), strict=True):
        assert begin % ALIGN == 0
        assert end - begin == tile.ribbon_columns(rows, columns)
        needed = rows * columns
        assert needed <= (end - begin) * BAND < needed + BAND * ALIGN


@given(geometries, st.integers(0, 1 << 20), st.data())
def test_frames_show_the_ribbon(geometry: FrameGeometry, seed: int, data: st.DataObject) -> None:
    piece = np.random.default_rng(seed).integers(0, 256, (BAND, geometry.columns), np.uint8)
    frame = tile.frame_from_ribbon(piece, geometry)
    assert frame.shape == (geometry.height, geometry.width)
    first = data.draw(st.integers(0, geometry.columns - 1))
    count = data.draw(st.integers(0, geometry.columns - first))
    found = tile.sequence_from_frame(frame, first, count)
    assert np.array_equal(found, piece[:, first : first + count].T.reshape(-1))


@given(geometries, st.integers(0, 3000), st.integers(0, 3000))
def test_tiles_cover_the_tensor_once(geometry: FrameGeometry, first: int, count: int) -> None:
    found = tile.tiles(first, count, geometry)
    shown = []
    for each in found:
        assert each.x + each.width <= geometry.width
        assert each.y % BAND == 0
        assert each.y + BAND <= geometry.height
        band = each.y // BAND
        begin = each.frame * geometry.columns + band * geometry.width + each.x
        shown += range(begin, begin + each.width)
    assert shown == list(range(first, first + count))


@given(st.one_of(st.integers(0, 200_000), st.integers(0, 5_000_000)))
def test_geometry_is_legal_and_leaves_little_blank(columns: int) -> None:
    geometry = tile.choose_geometry(columns)
    for side in (geometry.width, geometry.height):
        assert side % BAND == 0
        assert tile.MIN_FRAME_PX <= side <= MAX_FRAME_PX
    assert 0.5 <= geometry.width / geometry.height <= 2
    frames = max(1, -(-columns // geometry.columns))
    blank = frames * geometry.columns - columns
    # A small model has a smallest frame; the blank part of a frame costs next to nothing.
    smallest = tile.MIN_FRAME_PX**2 // BAND
    assert blank <= max(smallest, 0.08 * columns)


@pytest.mark.parametrize(
    ("shape", "matrix"),
    [((), (1, 1)), ((7,), (1, 7)), ((0,), (1, 0)), ((2, 3), (2, 3)), ((5, 2, 3, 3), (5, 18)),
     ((0, 4), (0, 4)), ((4, 0, 3), (4, 0))],
)  # fmt: skip
def test_matrix_shape(shape: tuple[int, ...], matrix: tuple[int, int]) -> None:
    assert tile.matrix_shape(shape) == matrix


@given(st.integers(0, 15), st.integers(1, 4), st.integers(0, 1 << 20), st.sampled_from([1, 9, 127]))
def test_folding_is_a_bijection(core: int, width: int, seed: int, most: int) -> None:
    fold = Fold(core, width)
    assert Fold.from_byte(fold.to_byte()) == fold
    found = np.random.default_rng(seed).integers(-most, most + 1, 400, dtype=np.int8)
    samples, inner, tail = fold_levels(found, fold)
    assert count_digits(samples, fold) == (inner.size, tail.size)
    assert np.array_equal(unfold(samples, fold, inner, tail), found)


@given(st.integers(0, 15), st.integers(1, 4), st.integers(0, 1 << 20))
def test_unfolding_any_samples(core: int, width: int, seed: int) -> None:
    """Also those that no level gives, which come from damaged files: levels wrap around."""
    rng = np.random.default_rng(seed)
    samples = np.concatenate([rng.permutation(256), np.full(rng.integers(0, 50), 128)])
    samples = rng.permutation(samples).astype(np.uint8)
    fold = Fold(core, width)
    counts = count_digits(samples, fold)
    digits = [
        rng.integers(0, radix, n, dtype=np.uint8)
        for radix, n in zip((2 * core + 1, width), counts, strict=True)
    ]
    inner, outer = map(iter, (digits[0].tolist(), digits[1].tolist()))
    expected = []
    for step in (samples.astype(int) - 128).tolist():
        if step == 0:
            expected.append(next(inner) - core if core else 0)
            continue
        magnitude = core + 1 + (abs(step) - 1) * width
        level = (magnitude if step > 0 else -magnitude) + 128
        more = next(outer) if width > 1 else 0
        # The digit leads away from zero as the wrapped level has it.
        wrapped = level % 256 - 128
        expected.append((wrapped + (more if wrapped >= 0 else -more) + 128) % 256 - 128)
    assert unfold(samples, fold, *digits).tolist() == expected

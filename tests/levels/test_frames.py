"""The order of a part's levels, and their places on frames."""

from __future__ import annotations

from math import log2
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weightvid import loader
from weightvid.levels.frames import (
    FEWEST_FRAMES,
    Energies,
    FrameSize,
    choose_energies,
    choose_frame_size,
    lay_out,
    ribbon_columns,
    to_sequence,
)
from weightvid.loader import (
    BAND,
    MAX_ENERGY,
    MIN_SIDE,
    Assembler,
    Header,
    Part,
    Sidecar,
    TensorSpec,
    column_energies,
    from_sequence,
)

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


SIZE = FrameSize(192, 192)
LARGEST = 983_040
Array = np.ndarray[Any, Any]


@given(st.integers(0, 1 << 24))
def test_frame_sizes(columns: int) -> None:
    width, height = choose_frame_size(columns)
    assert min(width, height) >= MIN_SIDE
    assert max(width, height) <= loader.MAX_SIDE
    assert width * height <= min(loader.MAX_SAMPLES, LARGEST)
    assert width % BAND == height % BAND == 0
    assert 0.5 <= width / height <= 2
    frames = max(1, -(-columns // FrameSize(width, height).columns))
    # A few for a small model, else no frame more than needed, and little left blank in the last.
    small = min(FEWEST_FRAMES, -(-columns // BAND) // 9)
    least = max(1, -(-columns * BAND // LARGEST))
    assert max(least, small - 1) <= frames <= max(least, small)
    blank = frames * width * height - columns * BAND
    assert blank <= max(MIN_SIDE**2, frames * width * BAND)


@settings(max_examples=40)
@given(st.lists(st.integers(1, 90_000), min_size=1, max_size=5), st.integers(0, 99))
def test_frames_and_back(sizes: list[int], seed: int) -> None:
    """Parts smaller and larger than frames; each begins where the frame says."""
    random = np.random.default_rng(seed)
    matrices = [random.integers(1, 256, (1, size)).astype(np.uint8) for size in sizes]
    specs = tuple(TensorSpec(f"t{n}", "F32", (size,)) for n, size in enumerate(sizes))
    found: dict[int, Array] = {}
    collector = Assembler(
        Header(specs, {}, {}, (), (), {}), sink=lambda part, m: found.update({part.tensor: m})
    )
    frames = list(lay_out(((n, m.reshape(-1)) for n, m in enumerate(matrices)), SIZE))
    assert [frame.number for frame in frames] == list(range(len(frames)))
    assert [n for frame in frames for n, _ in frame.starts] == list(range(len(sizes)))
    for frame in frames:
        assert frame.luma.shape == (SIZE.height, SIZE.width)
        assert all(column % loader.ALIGN == 0 for _, column in frame.starts)
        parts = [Part(n, column, 0, 1, sizes[n], 0, 1.0) for n, column in frame.starts]
        list(collector.add(Sidecar(frame.number, b"", tuple(parts), ()), frame.luma))
        assert set(frame.ends) == {n for n in found if n in frame.ends}
        assert len(found) == max(frame.ends, default=len(found) - 1) + 1
    for n, matrix in enumerate(matrices):
        assert np.array_equal(found[n].view(np.uint8) ^ 128, matrix)
    total = sum(map(ribbon_columns, sizes))
    assert len(frames) == -(-total // SIZE.columns)


def test_the_place_of_a_sample() -> None:
    """FORMAT.md, 4: column c, row r of the ribbon is at x = c mod W, y = 64 (c div W) + r."""
    samples = np.arange(250 * BAND) % 127 + 1
    (frame,) = lay_out([("only", samples.astype(np.uint8))], SIZE)
    for s in range(0, samples.size, 97):
        column, row = divmod(s, BAND)
        assert frame.luma[BAND * (column // 192) + row, column % 192] == samples[s]
    assert (frame.luma[BAND:, 250 - 192 :][:BAND] == 128).all()
    assert (frame.luma[2 * BAND :] == 128).all()
    assert (frame.starts, frame.ends) == ((("only", 0),), ("only",))


@pytest.mark.parametrize(("items", "frames"), [([], 0), ([36864] * 2, 2), ([36864 - 64, 65], 2)])
def test_edges(items: list[int], frames: int) -> None:
    made = list(lay_out(((n, np.full(n, 7, np.uint8)) for n in items), SIZE))
    assert len(made) == frames
    assert sum(np.count_nonzero(frame.luma == 7) for frame in made) == sum(items)

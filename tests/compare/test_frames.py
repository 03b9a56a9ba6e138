"""Tensors on pictures of any depth, and back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightvid.codec.pictures import middle
from weightvid.compare import frames

FORMATS = ("yuv420p", "yuv420p10le", "gray12le")
shapes = st.lists(st.tuples(st.integers(1, 150), st.integers(1, 150)), min_size=1, max_size=5)


@given(shapes, st.sampled_from(FORMATS), st.booleans(), st.integers(0, 99))
def test_round_trip(
    sizes: list[tuple[int, int]], pixel_format: str, alike: bool, seed: int
) -> None:
    draw = np.random.default_rng(seed)
    most = middle(pixel_format) - 1
    planes = [draw.integers(-most, most + 1, size).astype(np.int16) for size in sizes]
    names = [f"layer.{number}.weight" for number in range(len(sizes))]
    reels = frames.like(sizes, names) if alike else frames.ribbon(sizes)
    pictures = frames.lay(planes, reels, pixel_format)
    for reel, shown in zip(reels, pictures, strict=True):
        assert len(shown) == reel.frames
        assert {p.shape for p in shown} == {(reel.geometry.height, reel.geometry.width)}
    found = frames.lift(pictures, sizes, reels, pixel_format)
    for before, after in zip(planes, found, strict=True):
        assert np.array_equal(before, after)


def test_like_tensors_follow_each_other() -> None:
    sizes = [(64, 64), (32, 32), (64, 64), (64, 64)]
    reels = frames.like(sizes, ["l.0.q", "l.0.n", "l.1.q", "l.1.k"])
    assert [reel.members for reel in reels] == [(0, 2), (1,), (3,)]


def test_large_tensors_take_several_pictures_of_which_like_ones_are_neighbours() -> None:
    size = (2048, 1536)
    draw = np.random.default_rng(0)
    first = draw.integers(-100, 100, size).astype(np.int8)
    reels = frames.like([size, size], ["l.0.w", "l.1.w"])
    (reel,) = reels
    assert reel.each > 1
    (shown,) = frames.lay([first, first], reels, "gray")
    for part in range(reel.each):
        assert np.array_equal(shown[2 * part], shown[2 * part + 1])


def test_no_tensor_no_reel() -> None:
    assert frames.ribbon([]) == []
    assert frames.like([], []) == []


@pytest.mark.parametrize("pixel_format", FORMATS)
def test_what_no_tensor_covers_is_the_middle(pixel_format: str) -> None:
    reels = frames.ribbon([(3, 3)])
    ((picture,),) = frames.lay([np.ones((3, 3), np.int8)], reels, pixel_format)
    values, counts = np.unique(picture, return_counts=True)
    assert values.tolist() == [middle(pixel_format), middle(pixel_format) + 1]
    assert counts[1] == 9

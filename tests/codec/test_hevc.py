"""NAL units, escapes, levels and the hvcC record."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightvid.codec import bitstream
from weightvid.codec.encode import EncoderSettings, HevcEncoder
from weightvid.errors import CodecError

#: bytes among which emulation happens often.
risky = st.lists(st.sampled_from([0, 0, 0, 1, 2, 3, 4, 255]), max_size=60).map(bytes)


def ends_well(payload: bytes) -> bytes:
    """An RBSP ends in its stop bit, never in a zero byte."""
    return payload + b"\x80"


@given(risky)
def test_escape_round_trip(payload: bytes) -> None:
    whole = ends_well(payload)
    escaped = bitstream.escape(whole)
    assert bitstream.unescape(escaped) == whole
    assert not re.search(rb"\x00\x00[\x00-\x02]", escaped)


@given(st.lists(risky, min_size=1, max_size=4), st.booleans())
def test_split_undoes_joining(payloads: list[bytes], long: bool) -> None:
    units = [b"\x26\x01" + bitstream.escape(ends_well(payload)) for payload in payloads]
    start = b"\x00\x00\x00\x01" if long else b"\x00\x00\x01"
    assert bitstream.split_nal_units(b"".join(start + unit for unit in units)) == units


def test_no_start_code_is_refused() -> None:
    with pytest.raises(CodecError, match="start code"):
        bitstream.split_nal_units(b"nothing here")


def test_only_idr_slices_make_a_sample() -> None:
    idr = b"\x00\x00\x01\x26\x01\xaf\x80"
    assert bitstream.idr_sample(idr) == b"\x00\x00\x00\x04\x26\x01\xaf\x80"
    trailing = b"\x00\x00\x01\x02\x01\xaf\x80"
    with pytest.raises(CodecError, match="IDR"):
        bitstream.idr_sample(idr + trailing)


def test_levels_rise() -> None:
    rows = list(bitstream.LEVELS.items())
    for (_, low), (_, high) in pairwise(rows):
        assert all(a <= b for a, b in zip(low, high, strict=True))
    # general_level_idc is 30 times the level's number (H.265 A.4.1).
    assert all(round(30 * float(name)) == row[0] for name, row in rows)


@given(st.integers(4, 32), st.integers(4, 32))
def test_level_holds_for_any_samples(wide: int, tall: int) -> None:
    width, height = 64 * wide, 64 * tall
    _, picture, rate, kbits = bitstream.LEVELS[bitstream.choose_level(width, height)]
    assert width * height <= min(picture, rate)
    assert max(width, height) ** 2 <= 8 * picture
    assert 12.5 * width * height <= 1000 * kbits


def test_no_level_for_giant_frames() -> None:
    with pytest.raises(CodecError, match="no HEVC level"):
        bitstream.choose_level(8192, 8192)


@pytest.mark.parametrize(("width", "height"), [(256, 256), (512, 1024), (1024, 1024)])
def test_hvcc_says_main_and_the_level(width: int, height: int) -> None:
    settings = EncoderSettings(width, height)
    record = bitstream.hvcc(HevcEncoder(settings).parameter_sets)
    assert bitstream.describe_hvcc(record) == {
        "profile": "Main",
        "tier": "Main",
        "level": settings.level,
    }


def test_parameter_sets_claim_the_level() -> None:
    settings = EncoderSettings(256, 256)
    sets = HevcEncoder(settings).parameter_sets
    idc = bitstream.LEVELS[settings.level][0]
    # profile_tier_level() starts after 2 header bytes and 4 (VPS) or 1 (SPS) bytes more.
    assert bitstream.unescape(sets.vps)[6 + 11] == idc
    assert bitstream.unescape(sets.sps)[3 + 11] == idc
    assert [bitstream.nal_type(unit) for unit in (sets.vps, sets.sps, sets.pps)] == [32, 33, 34]


def test_incomplete_parameter_sets_are_refused() -> None:
    with pytest.raises(CodecError, match="no VPS"):
        bitstream.parameter_sets(b"\x00\x00\x01\x40\x01\x0c\x01", "4")


def test_short_hvcc_is_refused() -> None:
    with pytest.raises(CodecError, match="cut short"):
        bitstream.describe_hvcc(b"\x01\x01")

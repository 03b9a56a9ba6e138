"""NAL units, escapes, HEVC levels and the hvcC record."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightvid.codec import hevc, nal
from weightvid.codec.encode import EncoderSettings, open_encoder
from weightvid.codec.form import Claim, Form
from weightvid.errors import CodecError

#: bytes among which emulation happens often.
risky = st.lists(st.sampled_from([0, 0, 0, 1, 2, 3, 4, 255]), max_size=60).map(bytes)


def ends_well(payload: bytes) -> bytes:
    """An RBSP ends in its stop bit, never in a zero byte."""
    return payload + b"\x80"


@given(risky)
def test_escape_round_trip(payload: bytes) -> None:
    whole = ends_well(payload)
    escaped = nal.escape(whole)
    assert nal.unescape(escaped) == whole
    assert not re.search(rb"\x00\x00[\x00-\x02]", escaped)


@given(st.lists(risky, min_size=1, max_size=4), st.booleans())
def test_split_undoes_joining(payloads: list[bytes], long: bool) -> None:
    units = [b"\x26\x01" + nal.escape(ends_well(payload)) for payload in payloads]
    start = b"\x00\x00\x00\x01" if long else b"\x00\x00\x01"
    assert nal.split_nal_units(b"".join(start + unit for unit in units)) == units


def test_no_start_code_is_refused() -> None:
    with pytest.raises(CodecError, match="start code"):
        nal.split_nal_units(b"nothing here")


def test_only_idr_slices_make_a_sample() -> None:
    idr = b"\x00\x00\x01\x26\x01\xaf\x80"
    assert hevc.idr_sample(idr) == b"\x00\x00\x00\x04\x26\x01\xaf\x80"
    trailing = b"\x00\x00\x01\x02\x01\xaf\x80"
    with pytest.raises(CodecError, match="IDR"):
        hevc.idr_sample(idr + trailing)


def test_levels_rise() -> None:
    rows = list(hevc.LEVELS.items())
    for (_, low), (_, high) in pairwise(rows):
        assert all(a <= b for a, b in zip(low, high, strict=True))
    # general_level_idc is 30 times the level's number (H.265 A.4.1).
    assert all(round(30 * float(name)) == row[0] for name, row in rows)


@given(st.integers(4, 32), st.integers(4, 32))
def test_level_holds_for_any_samples(wide: int, tall: int) -> None:
    width, height = 64 * wide, 64 * tall
    _, picture, rate, kbits = hevc.LEVELS[hevc.choose_level(width, height)]
    assert width * height <= min(picture, rate)
    assert max(width, height) ** 2 <= 8 * picture
    assert 12.5 * width * height <= 1000 * kbits


def test_no_level_for_giant_frames() -> None:
    with pytest.raises(CodecError, match="no HEVC level"):
        hevc.choose_level(8192, 8192)


@pytest.mark.parametrize(("width", "height"), [(256, 256), (512, 1024), (1024, 1024)])
def test_hvcc_says_main_and_the_level(width: int, height: int) -> None:
    record = open_encoder(EncoderSettings(width, height)).record
    assert hevc.describe(record) == Claim("Main", "Main", hevc.choose_level(width, height))


def test_parameter_sets_claim_the_level() -> None:
    record = open_encoder(EncoderSettings(256, 256)).record
    idc = hevc.LEVELS[hevc.choose_level(256, 256)][0]
    assert record[12] == idc
    units, at = [], 23
    for _ in range(record[22]):
        size = int.from_bytes(record[at + 3 : at + 5], "big")
        units.append(record[at + 5 : at + 5 + size])
        at += 5 + size
    vps, sps, _ = units
    # profile_tier_level() starts after 2 header bytes and 4 (VPS) or 1 (SPS) bytes more.
    assert nal.unescape(vps)[6 + 11] == idc
    assert nal.unescape(sps)[3 + 11] == idc
    assert [hevc.nal_type(unit) for unit in units] == [32, 33, 34]


def test_incomplete_parameter_sets_are_refused() -> None:
    with pytest.raises(CodecError, match="no VPS"):
        hevc.parameter_sets(b"\x00\x00\x01\x40\x01\x0c\x01", "4")


def test_short_hvcc_is_refused() -> None:
    with pytest.raises(CodecError, match="cut short"):
        hevc.describe(b"\x01\x01")
    with pytest.raises(CodecError, match="cut short"):
        hevc.check(b"\x01\x01", Form(256, 256))

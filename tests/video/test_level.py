"""Levels of HEVC by hand, records that claim another level, and what a record says."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightvid.errors import CodecError
from weightvid.loader import MAX_SAMPLES
from weightvid.video import CODECS, Video, open_encoder
from weightvid.video.level import (
    HEVC_LEVELS,
    Claim,
    HevcLevel,
    describe,
    hevc_level,
    unescape,
    with_level,
)


@pytest.mark.parametrize(
    ("width", "height", "packet", "first", "name"),
    [
        # MinCR of the first picture: 1.5 * 65,536 / 2 bytes up to level 3 ...
        (256, 256, 49_152, 49_152, "2"),
        # ... and 1.5 * (33,177,600 / 300) / 2 = 82,944 at level 3.1.
        (256, 256, 49_153, 49_153, "3.1"),
        (256, 256, 49_153, 49_152, "2"),
        # 6 bits a sample at level 3.1, the largest picture of which this is.
        (960, 1024, 737_280, 737_280, "3.1"),
        # 1.5 * max(983,040, MaxLumaSr / 300) / MinCr: 368,640; 417,792; 245,760; 334,233;
        # 668,467 at level 5.2 and 6; 1,336,934 at level 6.1.
        (960, 1024, 668_467, 668_467, "3.1"),
        (960, 1024, 737_281, 737_281, "6.1"),
        # MaxCPB and MaxBR of level 3.1: 10,000,000 bits.
        (960, 1024, 1_250_000, 100_000, "3.1"),
        (960, 1024, 1_250_001, 100_000, "4"),
        # MaxLumaPs of 983,040; MinCr is 4 at levels 4 and 4.1, where 1.5 * 1,048,576 / 4 = 393,216.
        (1024, 1024, 393_216, 393_216, "4"),
        (1024, 1024, 417_792, 417_792, "5.2"),
        # Sides: sqrt(8 * 552,960) = 2103 at level 3.
        (2096, 144, 1000, 1000, "3"),
        (2176, 144, 1000, 1000, "3.1"),
        (2048, 1088, 835_584, 835_584, "4"),
    ],
)
def test_level_by_hand(width: int, height: int, packet: int, first: int, name: str) -> None:
    assert hevc_level(width, height, packet, first).name == name


def holds(level: HevcLevel, width: int, height: int, packet: int, first: int) -> bool:
    """The rules of A.4.1 and A.4.2, written once more."""
    most_first = 1.5 * max(width * height, level.max_rate / 300) / level.min_cr
    rules = [
        width * height <= level.max_picture,
        width <= (8 * level.max_picture) ** 0.5,
        height <= (8 * level.max_picture) ** 0.5,
        width * height <= level.max_rate,
        packet * 8 <= level.max_kbits * 1000,
        first <= most_first,
        packet <= 1.5 * level.max_rate / level.min_cr,
    ]
    return all(rules)


sides = st.integers(18, 272).map(lambda n: 8 * n)


@given(sides, sides, st.integers(1, 4_000_000), st.floats(0.01, 1))
def test_level_is_the_lowest_that_holds(wide: int, high: int, packet: int, share: float) -> None:
    first = max(1, int(packet * share))
    if wide * high > MAX_SAMPLES:
        high = 144
    found = [level for level in HEVC_LEVELS if holds(level, wide, high, packet, first)]
    if found:
        assert hevc_level(wide, high, packet, first) is found[0]
    else:
        with pytest.raises(CodecError, match="no HEVC level"):
            hevc_level(wide, high, packet, first)


def test_level_table() -> None:
    for level in HEVC_LEVELS:
        assert level.level_idc == round(30 * float(level.name))  # A.4.1
    # Noise, at 12.2 bits a sample, has a level even in the largest frame.
    assert hevc_level(2048, 1088, 3_400_000, 3_400_000).name == "6.2"


def test_no_level_for_giant_packets() -> None:
    with pytest.raises(CodecError, match="packets of 30000001 bytes; use smaller frames"):
        hevc_level(960, 1024, 30_000_001, 1)


@pytest.mark.parametrize(("width", "height"), [(256, 256), (960, 1024), (320, 192)])
def test_record_claims_the_level_that_is_put_in(width: int, height: int) -> None:
    record = open_encoder(Video(), width, height).record
    most = 6 * width * height // 8
    assert record[12] == hevc_level(width, height, most, most).level_idc
    for level in HEVC_LEVELS:
        patched = with_level(record, level.level_idc)
        assert len(patched) == len(record)
        assert describe(b"hvc1", patched) == Claim("Main", "Main", level.name, True)
        begin, found = 23, []
        for at in (6 + 11, 3 + 11):  # general_level_idc in VPS and SPS
            size = int.from_bytes(patched[begin + 3 : begin + 5], "big")
            found.append(unescape(patched[begin + 5 : begin + 5 + size])[at])
            begin += 5 + size
        assert found == [level.level_idc] * 2
        # Three bytes differ, and nothing else.
        changed = [i for i in range(len(record)) if record[i] != patched[i]]
        assert len(changed) == (0 if level.level_idc == record[12] else 3)


def test_describe_of_other_codecs() -> None:
    claims = {name: describe(CODECS[name].entry, open_encoder(Video(name), 960, 1024).record)
              for name in ("svt-av1", "x264")}  # fmt: skip
    assert claims["svt-av1"] == Claim("Main", "Main", "4.1", True)
    assert claims["x264"] == Claim("High 4:4:4 Predictive", "", "3.2", None)


def test_broken_records_are_refused() -> None:
    record = open_encoder(Video(), 256, 256).record
    for entry in (b"hvc1", b"av01", b"avc1"):
        with pytest.raises(CodecError, match="cut short"):
            describe(entry, record[:4])
    for cut in (8, 24, 30, 50):
        with pytest.raises(CodecError, match="VPS and one SPS"):
            with_level(record[:cut], 93)
    broken = bytes((0x81, 0, 0x0C, 0)) + b"\xff" * 9
    assert describe(b"av01", broken) == Claim("Main", "Main", "2.0", None)

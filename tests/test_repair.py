"""Parity: what it restores, what it says when it cannot, and that readers pass over it."""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest
from samples import Pipe, all_same

from weightvid import repair
from weightvid.archives import find_tail
from weightvid.errors import QuantizationError, RepairError
from weightvid.loader import open_archive
from weightvid.repair import PARITY_UUID, add_parity, repair_archive

pytest.importorskip("zfec", reason="parity needs zfec")


def with_parity(data: bytes, share: float) -> bytes:
    file = io.BytesIO(data)
    assert add_parity(file, share) == len(file.getvalue())
    return file.getvalue()


@pytest.fixture(scope="module")
def plain(long_archive: Path) -> bytes:
    return long_archive.read_bytes()


@pytest.fixture(scope="module")
def guarded(plain: bytes) -> bytes:
    return with_parity(plain, 0.02)


@pytest.fixture
def damaged(guarded: bytes, tmp_path: Path) -> Callable[..., Path]:
    """A file with random bytes in some places."""

    def make(*places: int, length: int = 512, data: bytes = guarded) -> Path:
        made, random = bytearray(data), Random(places[0])
        for at in places:
            new = random.randbytes(len(made[at : at + length]))
            made[at : at + length] = new
        path = tmp_path / "damaged.mp4"
        path.write_bytes(made)
        return path

    return make


@pytest.mark.parametrize("share", [0.005, 0.01, 0.02, 0.1, 0.2])
def test_readers_pass_over_parity(plain: bytes, share: float) -> None:
    data = with_parity(plain, share)
    assert len(data) - len(plain) <= max(share * len(plain), 0.007 * len(plain))
    expected = dict(open_archive(plain).items())
    archive = open_archive(data, check_tensors=True)
    assert all_same({name: archive[name] for name in archive}, expected)
    assert all_same(dict(open_archive(Pipe(data)).items()), expected)


def test_parity_takes_the_place_of_parity(plain: bytes, guarded: bytes) -> None:
    assert with_parity(guarded, 0.02) == guarded
    assert with_parity(with_parity(plain, 0.1), 0.02) == guarded


@pytest.mark.parametrize("share", [0.0, -0.01, 0.004, 0.21, float("nan")])
def test_shares_out_of_range(plain: bytes, share: float) -> None:
    with pytest.raises(QuantizationError, match=r"0\.5 to 20 %"):
        with_parity(plain, share)


def test_one_percent_restores_any_block(plain: bytes, damaged: Callable[..., Path]) -> None:
    data = with_parity(plain, 0.01)
    assert 90_000 < len(data) < 1.01 * len(plain)
    for at in (*range(0, len(data), 5 * 512), *range(len(data) - 2000, len(data), 203)):
        path = damaged(at, data=data)
        report = repair_archive(path)
        assert path.read_bytes() == data, at
        assert 0 < report.restored_bytes <= 512
        assert all(at <= first < last <= at + 512 for first, last in report.spans)


def test_several_bursts_are_restored(plain: bytes, damaged: Callable[..., Path]) -> None:
    data = with_parity(plain, 0.1)
    for seed in range(10):
        places = [Random(seed).randrange(len(data)) for _ in range(4)]
        path = damaged(*places, length=400, data=data)
        repair_archive(path)
        assert path.read_bytes() == data, places


def test_sections_of_large_files(
    plain: bytes, damaged: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repair, "_SECTION", len(plain) // 3 + 1)
    data = with_parity(plain, 0.05)
    kinds = [kind for kind, _, _ in find_tail(io.BytesIO(data)).boxes]
    assert kinds == [PARITY_UUID] * 3
    assert all_same(dict(open_archive(data).items()), dict(open_archive(plain).items()))
    for at in range(100, len(data), 2999):
        path = damaged(at, length=300, data=data)
        repair_archive(path)
        assert path.read_bytes() == data, at


def test_what_is_whole_stays(
    guarded: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "whole.mp4"
    path.write_bytes(guarded)
    before = path.stat()
    assert repair_archive(path).spans == ()
    assert path.stat().st_ino == before.st_ino
    with monkeypatch.context() as patched:  # nor is anything written, where nothing could be
        patched.setattr(repair, "atomic_output", None)
        repair_archive(path)
    report = repair_archive(path, tmp_path / "copy.mp4")
    assert (tmp_path / "copy.mp4").read_bytes() == guarded
    assert report.file_bytes == len(guarded)
    assert 0 < report.parity_bytes <= 0.02 * len(guarded)


def test_too_much_damage(guarded: bytes, damaged: Callable[..., Path]) -> None:
    path = damaged(5000, 20000, 35000, length=4000)
    before = path.read_bytes()
    with pytest.raises(RepairError, match=r"larger than the parity can restore: .* --partial"):
        repair_archive(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_forged_seals(guarded: bytes, tmp_path: Path) -> None:
    """Sizes that cannot be end in an error of ours, before anything is allocated for them."""
    path, at, random = tmp_path / "forged.mp4", guarded.index(PARITY_UUID) + 27, Random(3)
    for _ in range(200):
        fields = bytearray(guarded[at : at + repair._SEAL.size])
        for _ in range(random.randrange(1, 4)):
            fields[random.randrange(len(fields))] = random.choice((0, 1, 2, 127, 255))
        seal = bytes(fields) + zlib.crc32(fields).to_bytes(4, "little")
        path.write_bytes(guarded.replace(guarded[at : at + len(seal)], seal))
        with suppress(RepairError):
            repair_archive(path)


def test_no_parity(plain: bytes, guarded: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(plain)
    with pytest.raises(RepairError, match="no parity"):
        repair_archive(path)
    path.write_bytes(guarded[:20000] + guarded[20001:])
    with pytest.raises(RepairError, match=f"has {len(guarded) - 1} bytes and should have"):
        repair_archive(path)
    path.write_bytes(b"")
    with pytest.raises(RepairError, match="no parity"):
        repair_archive(path)


def test_the_code_is_the_specified_one() -> None:
    """Parity as values of the polynomial through the data: FORMAT.md, section 11."""
    logs, powers, value = dict[int, int](), list[int](), 1
    for power in range(255):
        logs[value] = power
        powers.append(value)
        value = value << 1 ^ (0x11D if value & 128 else 0)

    def times(a: int, b: int) -> int:
        return powers[(logs[a] + logs[b]) % 255] if a and b else 0

    def over(a: int, b: int) -> int:
        return powers[(logs[a] - logs[b]) % 255] if a else 0

    random, lines, rows = Random(5), 7, 3
    data, points = [random.randrange(256) for _ in range(lines)], [0, *powers]
    found = (
        repair._zfec()
        .Encoder(lines, lines + rows)
        .encode([bytes((byte,)) for byte in data], list(range(lines, lines + rows)))
    )
    for row, symbol in enumerate(found):
        at, total = points[lines + row], 0
        for j, byte in enumerate(data):
            term = byte
            for other in points[:j] + points[j + 1 : lines]:
                term = over(times(term, at ^ other), points[j] ^ other)
            total ^= term
        assert symbol == bytes((total,))

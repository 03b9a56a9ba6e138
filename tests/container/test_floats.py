"""Bit-exact floats: every payload comes back, damage has a name, and they are smaller."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightvid import container, exact, loader, writer
from weightvid.archives import stored_pieces
from weightvid.checkpoint import from_mapping
from weightvid.errors import FormatError, QuantizationError, TruncatedError
from weightvid.loader import DTYPES, MANTISSAS, Header, TensorSpec, open_archive
from weightvid.pack import PackOptions, pack_checkpoint

Array = np.ndarray[Any, Any]


def header_of(*specs: TensorSpec) -> Header:
    return Header(specs, {}, {}, (), (), {})


def there_and_back(arrays: list[Array], name: str) -> list[Array]:
    specs = [TensorSpec(f"t{n}", name, array.shape) for n, array in enumerate(arrays)]
    items = [(n, 0, array) for n, array in enumerate(arrays)]
    payload = container.stored_body(*exact.float_records(items, specs))
    return [array for _, _, array in loader.parse_exact(payload, header_of(*specs))]


@pytest.mark.parametrize("name", MANTISSAS)
@pytest.mark.parametrize("shape", [(0,), (1,), (9,), (7, 13), (3, 0), (40, 300), (16, 3, 3, 3)])
def test_every_payload(name: str, shape: tuple[int, ...]) -> None:
    size, random = DTYPES[name].itemsize, np.random.default_rng(2)
    exponent = ((1 << 8 * size - 1) - 1) >> MANTISSAS[name] << MANTISSAS[name]
    arrays = []
    for ones in (0, exponent, 1 << 8 * size - 1):  # any bits, NaN and infinities, negative ones
        bits = random.integers(0, 1 << 8 * size, shape, dtype=f"u{size}")
        arrays.append((bits | np.array(ones, f"u{size}")).view(DTYPES[name]))
    arrays += [np.zeros(shape, DTYPES[name]), -np.zeros(shape, "i1").astype(DTYPES[name])]
    for found, array in zip(there_and_back(arrays, name), arrays, strict=True):
        assert found.tobytes() == array.tobytes()


@given(st.integers(0, 2**32), st.sampled_from(sorted(MANTISSAS)), st.integers(0, 23))
def test_rows_that_end_with_zeros(seed: int, name: str, zeros: int) -> None:
    random, size = np.random.default_rng(seed), DTYPES[name].itemsize
    shape = tuple(random.integers(1, 30, random.integers(1, 4)).tolist())
    bits = random.integers(0, 1 << 8 * size, shape, dtype=f"u{size}")
    some = random.random(shape[:1]) < 0.5
    bits[some] = bits[some] >> min(zeros, 8 * size - 1) << min(zeros, 8 * size - 1)
    (found,) = there_and_back([bits.view(DTYPES[name])], name)
    assert found.tobytes() == bits.tobytes()


def test_archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "EXACT_BOX_BYTES", 50_000)
    random = np.random.default_rng(1)
    arrays = {
        "w": (random.standard_normal((300, 200)) * 0.05).astype(np.float32),
        "h": random.standard_normal((50, 70)).astype(np.float16),
        "of_half": random.standard_normal((90, 100)).astype(np.float16).astype(np.float32),
        "bias": random.standard_normal(33).astype(np.float32),
        "count": np.array(3), "double": random.standard_normal((20, 30)),
    }  # fmt: skip
    path = tmp_path / "exact.mp4"
    with from_mapping(arrays) as reader:
        report = pack_checkpoint(reader, path, PackOptions(lossless=True))
    assert report.coded_weights == 0
    assert report.file_bytes < 0.84 * report.source_bytes
    with open_archive(path) as archive:
        for source in (archive, dict(archive.items())):
            for name, array in arrays.items():
                assert source[name].dtype == array.dtype
                assert source[name].tobytes() == array.tobytes()


def test_damage_has_a_name() -> None:
    array = np.random.default_rng(1).standard_normal((40, 50)).astype(np.float32)
    specs = [TensorSpec("a", "F32", (40, 50))]
    records = exact.float_records([(0, 0, array)], specs)
    random, header = Random(1), header_of(*specs)
    for _ in range(500):
        hurt = bytearray(records[1])
        at = random.randrange(min(len(hurt), random.choice((12, 200, len(hurt)))))
        hurt[at] = random.choice((0, 1, 127, 128, 255, hurt[at] ^ 1))
        payload = container.stored_body(records[0], bytes(hurt[: random.randrange(len(hurt))]))
        try:
            list(loader.parse_exact(payload, header))
        except FormatError as error:
            assert error.code in ("record", "deflate", "version", "limit", "order")
    integers = header_of(TensorSpec("a", "I32", (40, 50)))
    with pytest.raises(FormatError, match="cannot share a record"):
        list(loader.parse_exact(container.stored_body(*records), integers))


def test_a_lossless_update_keeps_every_bit_too(tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    first = {"w": random.standard_normal((40, 90)).astype(np.float32), "b": np.ones(40, np.float32)}
    second = {name: array + random.normal(0, 1e-3, array.shape).astype(np.float32)
              for name, array in first.items()}  # fmt: skip
    options = PackOptions(lossless=True, jobs=1)
    pack_checkpoint(from_mapping(first), tmp_path / "v1.mp4", options)
    update = replace(options, base=(tmp_path / "v1.mp4",))
    pack_checkpoint(from_mapping(second), tmp_path / "v2.mp4", update)
    with open_archive(tmp_path / "v2.mp4", base=tmp_path / "v1.mp4") as archive:
        assert all(archive[name].tobytes() == second[name].tobytes() for name in second)
    with pytest.raises(QuantizationError, match="nothing to refine"):
        pack_checkpoint(from_mapping(first), tmp_path / "x.mp4", replace(options, layers=2))


def test_what_has_arrived_comes_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weightvid.writer.EXACT_BOX_BYTES", 3600)
    arrays = {f"{n}": np.random.default_rng(n).random(900, np.float32) for n in range(8)}
    with from_mapping(arrays) as reader:
        pack_checkpoint(reader, tmp_path / "a.mp4", PackOptions(lossless=True))
    data, found = (tmp_path / "a.mp4").read_bytes(), []
    with open_archive(data) as archive:
        assert archive.index is not None
        cut, _ = archive.index.boxes[6]
    with pytest.raises(TruncatedError) as caught:
        found.extend(spec.name for spec, _, _ in stored_pieces(open_archive(data[: cut + 100])))
    assert (found, caught.value.missing) == ([*"012345"], ("6", "7"))

"""The exact bytes of boxes and records, and that the loader reads what is written."""

from __future__ import annotations

import io
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from weightvid import container, exact, loader, writer
from weightvid.errors import FormatError
from weightvid.loader import DTYPES, End, Header, Part, Sidecar, TensorSpec, Track, open_body
from weightvid.spec import SideFile

TRACK = Track(192, 256, b"hvc1", b"record")


def header(*specs: TensorSpec, bases: tuple[Any, ...] = ()) -> Header:
    return Header(specs, {}, {}, (), bases, {})


def test_boxes() -> None:
    assert container.box(b"free", b"ab", b"c") == b"\0\0\0\x0bfreeabc"
    assert container.box(loader.HEADER_UUID, b"x") == b"\0\0\0\x19uuidweightvid-headerx"
    assert container.full_box(b"mfhd", 1, 2, b"a") == b"\0\0\0\x0dmfhd\x01\0\0\x02a"
    assert container.ftyp() == b"\0\0\0\x1cftypiso6\0\0\0\0iso6mp41wvid"


@pytest.mark.parametrize(
    ("number", "data"),
    [(0, "00"), (127, "7f"), (128, "8001"), (300, "ac02"), (1 << 38, "808080808008"),
     ((1 << 64) - 1, "ffffffffffffffffff01")],
)  # fmt: skip
def test_numbers(number: int, data: str) -> None:
    assert container.uint(number).hex() == data
    assert loader.Fields(bytes.fromhex(data), "").uint(1 << 64) == number


def test_records() -> None:
    assert container.record(300, b"ab", b"c").hex() == "ac0203616263"
    assert container.text("aß\ud800").hex() == "0661c39feda080"
    assert container.record_list(4, []) == b""
    assert container.record_list(4, [b"a", b"b"]).hex() == "0403026162"
    records = container.header_records(header(TensorSpec("w", "BF16", (2, 300))), [])
    assert [record.hex() for record in records] == ["0208010177030202ac02", *[""] * 5]


def test_a_body_is_sealed() -> None:
    short = container.close_body(b"abc")
    assert short[4:].hex() == "0003000000616263"
    assert short[:4] == zlib.crc32(short[4:]).to_bytes(4, "little")
    long = container.close_body(bytes(1000))
    assert long[4:9].hex() == "01e8030000"
    assert zlib.decompress(long[9:], -15) == bytes(1000)
    for sealed in (short, long):
        assert open_body(sealed, "") == (b"abc" if sealed is short else bytes(1000))
    with pytest.raises(FormatError) as caught:
        container.close_body(bytes(loader.MAX_BOX_BYTES + 1))
    assert caught.value.code == "limit"


def test_quantized_weights_are_stored_near_their_entropy() -> None:
    made = np.random.default_rng(3).laplace(0, 4, 200_000)
    levels = np.clip(np.rint(made), -127, 127).astype(np.int8)
    share = np.unique(levels, return_counts=True)[1] / levels.size
    entropy = float(-(share * np.log2(share)).sum()) * levels.size / 8
    body = container.close_body(levels.tobytes())
    assert len(body) < 1.02 * entropy < len(zlib.compress(levels.tobytes(), 9))
    assert bytes(open_body(body, "b")) == levels.tobytes()


def test_a_part() -> None:
    part = Part(
        tensor=1, column=8, first_row=3, rows=2, columns=4, method=1, step=0.5, bases=(0,), shift=9,
        frequency_steps=np.array([-1, 2], np.int8), row_steps=np.array([0, -4], np.int8),
        energies=tuple(np.array(each, np.uint8) for each in ([1, 2], [3, 0], [0, 5])),
        escapes=(np.array([2, 5]), np.array([200, -1.5], np.float32)),
    )  # fmt: skip
    assert container.part_record(part).hex() == (
        "22" "23" "01" "02" "03" "02" "04" "01" "0f" "0000003f" "0100" "09" "ff02" "00fc"
        "0102" "0300" "0005" "02" "02" "02" "0000" "0000" "48c0" "43bf"
    )  # fmt: skip


def test_a_sidecar() -> None:
    sidecar = Sidecar(7, bytes(32), (), (End(3, b"12345678", 20.5), End(0, bytes(8), None)))
    assert [record.hex() for record in container.sidecar_records(sidecar)] == [
        "2021" "07" + "00" * 32, "240b" "03" "3132333435363738" "0208", "240b00" + "00" * 8 + "ff7f"
    ]  # fmt: skip


def test_byte_planes_of_neighbours() -> None:
    specs = [TensorSpec(kind, kind, (2,)) for kind in ("F16", "I16", "U8")]
    items = [(0, 0, np.array([0x1122, 0x3344], "<u2").view("<f2")),
             (1, 0, np.array([0x5566], "<i2")), (2, 0, np.array([9], "u1"))]  # fmt: skip
    made = b"".join(exact.exact_records(items, specs))
    assert made.hex() == "300a03000002010001020001320722446611335509"


def test_fragments() -> None:
    moof = container.moof(4, 1000)
    assert len(moof) == 88
    assert moof[16 + 4 : 24] == (5).to_bytes(4, "big")  # sequence number
    assert moof[-8:-4] == (len(moof) + 8).to_bytes(4, "big")  # where the packet starts
    assert moof[-4:] == (1000).to_bytes(4, "big")
    for far in (0, 1 << 33):
        mfra = container.mfra([100, 200 + far])
        assert int.from_bytes(mfra[-4:], "big") == len(mfra)
    assert loader.parse_moov(container.moov(TRACK)[8:]) == TRACK


texts = st.text(st.characters(), max_size=9)
shapes = st.lists(st.integers(0, 99), max_size=4).map(tuple)
listed = st.builds(TensorSpec, texts, st.sampled_from(list(DTYPES)), shapes)
specs = st.lists(listed, max_size=6, unique_by=lambda spec: spec.name)
square = st.integers(1, 5).flatmap(lambda n: hnp.arrays(np.float32, (n, n)))
bases = st.lists(square, max_size=3).map(tuple)


@given(specs, st.dictionaries(texts, texts), st.dictionaries(texts, texts), bases, st.data())
def test_headers(tensors: Any, metadata: Any, about: Any, made: Any, data: st.DataObject) -> None:
    names = {spec.name for spec in tensors}
    places = st.integers(0, max(0, len(tensors) - 1))
    aliases = data.draw(st.dictionaries(texts, places, max_size=3)) if tensors else {}
    aliases = {name: number for name, number in aliases.items() if name not in names}
    files = [(SideFile(f"f{n}", bytes(n), "file"), 100 + n) for n in range(data.draw(places))]
    given_header = Header(tuple(tensors), aliases, metadata, (), made, about)
    body = b"".join(container.header_records(given_header, files))
    found = loader.parse_header(body, 1000)
    assert found._replace(files=(), bases=()) == given_header._replace(bases=())
    assert [basis.tobytes() for basis in found.bases] == [basis.tobytes() for basis in made]
    offsets = np.cumsum([1000, *(size for _, size in files)])[:-1].tolist()
    assert [file.offset for file in found.files] == offsets
    assert [file[:3] for file in found.files] == [(f.path, f.role, len(f.data)) for f, _ in files]


@st.composite
def parts(draw: st.DrawFn) -> tuple[Part, Header]:
    sizes = tuple(draw(st.lists(st.integers(1, 4), max_size=3)))
    kernel = int(np.prod(sizes))
    rows, first, columns = draw(st.tuples(*[st.integers(1, 9)] * 3))
    columns *= kernel
    steps = [draw(st.none() | hnp.arrays(np.int8, n)) for n in (kernel, rows)]
    if not sizes:
        steps[0] = None
    below = st.integers(0, loader.MAX_ENERGY)
    energies = tuple(
        draw(hnp.arrays(np.uint8, n, elements=below)) for n in (rows, columns // kernel, kernel)
    )
    places = sorted(draw(st.sets(st.integers(0, rows * columns - 1), max_size=5)))
    numbers = draw(hnp.arrays(np.float32, len(places)))
    part = Part(
        0, loader.ALIGN * draw(st.integers(0, 999)), first, rows, columns, draw(st.integers(0, 1)),
        draw(st.floats(2.0**-110, 2.0**110, width=32)), tuple(range(len(sizes))),
        draw(st.integers(0, loader.MAX_SHIFT)) if sizes else 0, *steps,
        draw(st.sampled_from((None, energies))), (np.array(places), numbers) if places else None,
    )  # fmt: skip
    made = tuple(np.eye(size, dtype=np.float32) for size in sizes)
    return part, header(TensorSpec("w", "F32", (first + rows, columns)), bases=made)


def plain(value: Any) -> Any:
    """With bytes for arrays, whose floats may be NaN."""
    if isinstance(value, tuple):
        return [plain(one) for one in value]
    return (value.dtype, value.tobytes()) if isinstance(value, np.ndarray) else value


@given(parts(), st.integers(0, 1 << 31), st.none() | st.integers(-9999, 9999))
def test_sidecars(made: tuple[Part, Header], number: int, hundredths: int | None) -> None:
    part, about = made
    end = End(0, b"abcdefgh", None if hundredths is None else hundredths / 100)
    written = Sidecar(number, bytes(range(32)), (part,), (end,))
    body = b"".join(container.sidecar_records(written))
    found = loader.parse_sidecar(body, about)
    assert found._replace(parts=()) == written._replace(parts=())
    for field in Part.__dataclass_fields__:
        assert plain(getattr(found.parts[0], field)) == plain(getattr(part, field)), field


anything = st.sampled_from(sorted(DTYPES)).flatmap(
    lambda name: st.tuples(st.just(name), hnp.arrays(
        np.uint8 if name == "BOOL" else DTYPES[name],
        hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=7),
        elements=st.integers(0, 1) if name == "BOOL" else None,
    ))
)  # fmt: skip


@settings(max_examples=60)
@given(st.lists(anything, max_size=6), st.integers(1, 60))
def test_exact_tensors_and_the_index(made: list[tuple[str, Any]], room: int) -> None:
    arrays = [array.astype(DTYPES[name]) for name, array in made]
    specs = [TensorSpec(f"t{n}", name, array.shape) for n, (name, array) in enumerate(made)]
    file = io.BytesIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "EXACT_BOX_BYTES", room)  # small boxes
        made_archive = writer.ArchiveWriter(file, TRACK, header(*specs))
        made_archive.add_exact(enumerate(arrays))
        assert made_archive.finish() == len(file.getvalue())
    with loader.open_archive(file.getvalue()) as archive:
        assert archive.track == TRACK
        assert archive.index is not None
        listed = {number for _, numbers in archive.index.boxes for number in numbers}
        assert listed == set(range(len(made)))
        streamed = {spec.name: array for spec, array in archive.stored_items()}
        for spec, array in zip(specs, arrays, strict=True):
            for found in (archive.stored(spec.name), streamed[spec.name]):
                assert (found.dtype, found.shape) == (array.dtype, array.shape)
                assert found.tobytes() == array.tobytes()


@pytest.mark.parametrize(("size", "most"), [(10, 200), (2000, 17), (100_000, 16)])
def test_one_of_many_exact_tensors_is_read_with_few_others(size: int, most: int) -> None:
    """Who reads all of them one by one would read everything as often, else."""
    specs = [TensorSpec(f"t{number}", "I16", (size,)) for number in range(200)]
    file = io.BytesIO()
    made = writer.ArchiveWriter(file, TRACK, header(*specs))
    made.add_exact((number, np.zeros(size, np.int16)) for number in range(200))
    made.finish()
    with loader.open_archive(file.getvalue()) as archive:
        assert archive.index is not None
        assert max(len(numbers) for _, numbers in archive.index.boxes) == most

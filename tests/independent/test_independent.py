"""The reader written from FORMAT.md gives the bytes that weightvid gives."""

from __future__ import annotations

import ast
import io
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from independent import cases, container, reader, video

from weightvid.codec.encode import Lossy
from weightvid.errors import TruncatedError
from weightvid.loader import open_archive
from weightvid.quantize import TrellisParams, UniformParams
from weightvid.spec import TensorSpec
from weightvid.tile import EnergyOrder, Fold, FrameGeometry, Layout

HERE = Path(__file__).parent
FORMAT = HERE.parent.parent / "FORMAT.md"


@pytest.fixture(scope="module", params=[*cases.CASES, "packed-uniform", "av1-main10"])
def archive(request: pytest.FixtureRequest) -> bytes:
    """Every archive in turn."""
    if request.param == "packed-uniform":
        return cases.packed(states=0)
    if request.param == "av1-main10":
        return cases.packed(lossy=Lossy("qp", 20), bits=10, codec="svtav1")
    return cases.CASES[request.param]()


def test_every_tensor_has_the_same_bytes(archive: bytes) -> None:
    found = reader.read_stream(archive)
    assert found.missing == []
    with open_archive(io.BytesIO(archive), check_tensors=True) as ours:
        assert set(found.tensors) == set(ours.names)
        assert found.header["weightvid"] == list(ours.header.version)
        for name in ours.names:
            tensor, spec = found.tensors[name], ours.spec(name)
            assert (tensor.spec.dtype, tensor.spec.shape) == (spec.dtype, spec.shape)
            assert tensor.data == ours.stored(name).tobytes(), name


def test_levels_are_the_same(archive: bytes) -> None:
    found = reader.read_stream(archive)
    with open_archive(io.BytesIO(archive)) as ours:
        for name, tensor in found.tensors.items():
            if tensor.levels is not None:
                levels = ours.levels(name).levels.reshape(-1).tolist()
                assert levels == tensor.levels, name


def test_one_tensor_at_a_time_is_the_same(archive: bytes) -> None:
    whole = reader.read_stream(archive)
    for name, tensor in whole.tensors.items():
        assert reader.read_one(archive, name).data == tensor.data, name


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs the ffmpeg program")
def test_ffmpeg_program_decodes_the_same(archive: bytes) -> None:
    if b"FFV1" in archive[:700]:
        pytest.skip("FFV1 has no stream outside a container")
    found = reader.read_stream(archive, video.by_ffmpeg)
    for name, tensor in reader.read_stream(archive).tensors.items():
        assert found.tensors[name].data == tensor.data


@pytest.mark.parametrize("name", ["layout", "mixed", "exact"])
def test_truncated_at_every_box(name: str) -> None:
    data = cases.CASES[name]()
    edges = [end for _, _, end in container.boxes(data)]
    head = [kind for kind, _, _ in container.boxes(data)].index(b"weightvid-header")
    for end in edges[head:-2]:
        for cut in (end, end + 11):
            found = reader.read_stream(data[:cut])
            with open_archive(io.BytesIO(data[:cut])) as ours:
                given = {}
                with pytest.raises(TruncatedError) as error:
                    for spec, array in ours.iter_stored():
                        given[spec.name] = array.tobytes()
            assert list(error.value.missing) == found.missing
            stored = {n: t.data for n, t in found.tensors.items() if n == t.spec.name}
            assert given == stored


def test_damage_is_found() -> None:
    data = bytearray(cases.mixed())
    for kind, begin, end in list(container.boxes(bytes(data))):
        if kind.startswith(b"weightvid-") and kind != b"weightvid-index\0":
            broken = bytearray(data)
            broken[(begin + end) // 2] ^= 1
            with pytest.raises(container.Bad):
                reader.read_stream(bytes(broken))


def test_cases_cover_the_format() -> None:
    """Digits are carried over frames, and every codec of exact boxes is used."""
    seen = set()
    for make in cases.CASES.values():
        data = make()
        header = next(p for k, *p in container.boxes(data) if k == b"weightvid-header")
        tensors = container.read_header(data[slice(*header)])["tensors"]
        specs = [container.Spec(n, d, tuple(s)) for n, d, s in tensors]
        for kind, begin, end in container.boxes(data):
            if kind == b"weightvid-frame\0":
                card = container.read_sidecar(data[begin:end], specs)
                seen |= {kind for (kind, _), count in card.carried.items() if count}
                seen |= {key for start in card.starts for key in start.record}
            elif kind == b"weightvid-exact\0":
                size = int.from_bytes(data[begin + 32 : begin + 36], "big")
                record = container.parse_json(
                    container.inflate(data[begin + 36 : begin + 36 + size])
                )
                seen |= {code for code, _ in record["streams"]}
                seen |= {key for item in record["items"] for key in item}
    wanted = {"core", "tail", "escapes", "energies", "step", "shifts", "states", "axis"}
    wanted |= {"numbering", "raw", "deflate", "lzma2", "first", "count", "levels", "sha256"}
    assert seen >= wanted


@pytest.mark.parametrize("module", ["reader", "container", "weights", "video"])
def test_reader_imports_the_standard_library_alone(module: str) -> None:
    names = set()
    for node in ast.walk(ast.parse((HERE / f"{module}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").partition(".")[0])
    assert names - sys.stdlib_module_names <= {"independent"} | (
        {"av"} if module == "video" else set()
    )


def test_document_lists_every_error_code() -> None:
    sources = (HERE.parent.parent / "weightvid").rglob("*.py")
    used = {c for p in sources for c in re.findall(r'code="([^"]+)"', p.read_text("utf-8"))}
    used |= {"schema"}
    table = FORMAT.read_text(encoding="utf-8").partition("### 13.3")[2].partition("## 14")[0]
    assert set(re.findall(r"^\| `([a-z_-]+)` \|", table, re.MULTILINE)) == used


def test_document_has_the_machines_of_the_reader() -> None:
    from independent.weights import TRELLIS

    text = FORMAT.read_text(encoding="utf-8")
    for states, (feedback, output) in TRELLIS.items():
        bits = states.bit_length() - 1
        assert f"| {states} | 0b{feedback:0{bits}b} | 0b{output:0{bits}b} |" in text


def test_examples_of_the_document() -> None:
    from independent import weights

    spec = container.Spec("m", "F32", (3, 4))
    start = container.Start({}, {}, bytes([0, 1, 0]), bytes([0, 1]), [(0, 1)] * 3)
    numbers = [(i, j) for i, j, _ in weights.sequence_of(start, spec)]
    assert numbers == [
        (1, 2), (1, 3), (1, 0), (1, 1), (0, 2), (0, 3), (2, 2), (2, 3),
        (0, 0), (0, 1), (2, 0), (2, 1),
    ]  # fmt: skip
    run = [1, 1, -2, 0, 3]
    assert weights.trellis(run, (1, 5), {"states": 4}) == [3, -3, 9, 1, -11]
    assert weights.trellis(run, (1, 5), {"states": 4, "numbering": 1}) == [4, 6, -6, 2, 14]
    assert weights.shifted(-1, [40, 10, 0]) == -216


@st.composite
def coded(draw: st.DrawFn, number: int) -> cases.Coded:
    """A tensor of any shape, spread, order, folds and quantizer."""
    rows = draw(st.sampled_from([1, 2, 7, 63, 64, 65, 130]))
    groups, kernel = draw(st.integers(1, 12)), draw(st.sampled_from([1, 3, 9]))
    columns = groups * kernel
    seed = draw(st.integers(0, 1 << 16))
    rng = np.random.default_rng(seed)
    order = None
    if draw(st.booleans()):
        most = draw(st.sampled_from([0, 1, 6, 63]))
        across = rng.integers(0, most + 1, groups).astype(np.uint8)
        order = EnergyOrder(rng.integers(0, most + 1, rows).astype(np.uint8), across)
    classes = 1 if order is None else order.classes
    folds = tuple(Fold.from_byte(int(code)) for code in rng.integers(0, 64, classes))
    sigma = draw(st.sampled_from([0.0, 0.4, 3.0, 40.0, 3000.0]))
    found = cases.levels(seed, rows, columns, sigma=sigma)
    step = float(np.float32(draw(st.floats(1e-6, 1e6))))
    shifts = draw(st.none() | st.tuples(*[st.integers(-128, 127)] * 3))
    trellis = st.builds(
        TrellisParams,
        st.just(step),
        st.sampled_from([4, 8, 16, 32, 64]),
        st.integers(0, 1),
        st.booleans(),
    )
    params = draw(st.just(UniformParams(step, shifts)) | trellis)
    dtype = draw(st.sampled_from(["F32", "F16", "BF16", "F64"]))
    spec = TensorSpec(f"t{number}", dtype, (rows, groups, kernel))
    return cases.Coded(spec, found, params, Layout(order, folds))


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(st.data(), st.integers(1, 4), st.sampled_from([(64, 64), (128, 64), (64, 128)]))
def test_any_tensor_is_the_same(data: st.DataObject, count: int, geometry: tuple[int, int]) -> None:
    entries = [data.draw(coded(number)) for number in range(count)]
    archive = cases.build(entries, FrameGeometry(*geometry))
    found = reader.read_stream(archive)
    with open_archive(io.BytesIO(archive), check_tensors=True) as ours:
        for entry in entries:
            name = entry.spec.name
            assert found.tensors[name].levels == entry.levels.reshape(-1).tolist()
            assert found.tensors[name].data == ours.stored(name).tobytes()
            assert found.tensors[name].data == reader.read_one(archive, name).data

"""An archive as a mapping, from every kind of source."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Iterator, Mapping
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import fuzz_archives as fuzz
import numpy as np
import pytest
from samples import Pipe, all_same, integers, same, sample, tensors

from weightvid.errors import FormatError, TensorNotFoundError, TruncatedError
from weightvid.loader import TRELLIS, UNIFORM, Archive, open_archive

NAMES = (
    *("conv", "line", "wide", "outlier", "scaled", "half", "double", "bias", "count", "empty"),
    *("mask", "bytes", "tied"),
)


@pytest.fixture
def archive() -> Iterator[Archive]:
    with open_archive(sample()) as opened:
        yield opened


def test_mapping(archive: Archive) -> None:
    assert isinstance(archive, Mapping)
    assert tuple(archive) == tuple(archive.keys()) == NAMES
    assert len(archive) == len(NAMES)
    assert "conv" in archive
    assert "nowhere" not in archive
    assert 3 not in archive
    assert archive.get("nowhere") is None
    assert archive.get("nowhere", 7) == 7
    assert archive == archive != open_archive(sample())
    assert {archive: 1}[archive]
    assert same(archive.get("conv"), archive["conv"])
    assert all_same(dict(archive), tensors())
    assert repr(archive) == (f"<Archive: 13 tensors, 81706 elements, {len(sample())} bytes>")


def test_items_come_in_file_order_and_aliases_behind_their_targets(archive: Archive) -> None:
    names = [name for name, _ in archive.items()]
    assert sorted(names) == sorted(NAMES)
    assert names.index("tied") == names.index("conv") + 1
    found = dict(archive.items())
    assert found["tied"] is found["conv"]
    # Those in pictures by the frame in which they end, exact ones behind them.
    ends = [archive.info(name).frames[-1] if archive.info(name).parts else 99 for name in names]
    assert ends == sorted(ends)
    assert len(set(ends)) > 2


def test_unknown_names(archive: Archive) -> None:
    for call in (archive.__getitem__, archive.stored, archive.spec, archive.info, archive.levels):
        with pytest.raises(TensorNotFoundError, match="'nowhere'"):
            call("nowhere")
    with pytest.raises(LookupError, match=r"no file 'nowhere'"):
        archive.read_file("nowhere")


def test_what_is_said_of_tensors(archive: Archive) -> None:
    info = archive.info("conv")
    assert (info.spec.shape, info.spec.dtype, info.kernel) == ((20, 12, 3, 3), "F32", (3, 3))
    assert archive.spec("tied") is info.spec
    assert archive.info("tied").frames == info.frames
    (part,) = info.parts
    assert (part.rows, part.columns, part.method) == (20, 108, UNIFORM)
    assert part.frequency_steps is not None
    assert len(part.frequency_steps) == 9
    assert info.end is not None
    assert info.end.sqnr_db is not None
    assert 15 < info.end.sqnr_db < 50
    wide = archive.info("wide")
    assert {part.method for part in wide.parts} == {TRELLIS}
    assert len(wide.frames) > 1
    assert archive.info("outlier").parts[0].escapes is not None
    assert archive.info("scaled").parts[0].row_steps is not None
    exact = archive.info("bias")
    assert (exact.parts, exact.end, len(exact.frames), exact.kernel) == ((), None, 0, ())


def test_side_files_and_metadata(archive: Archive) -> None:
    assert archive.read_file("config.json") == b"{}"
    assert archive.read_file("vocab.txt") == b"a\nb\n" * 50
    assert archive.header.metadata == {"format": "pt"}
    assert archive.header.about["generator"].startswith("weightvid ")


def test_integers_can_be_computed_with() -> None:
    with open_archive(integers()) as archive:
        for name in ("conv", "wide", "half"):
            levels = archive.levels(name)
            assert levels.values.shape == archive[name].shape
            assert levels.values.dtype == np.int32
            product = levels.values.astype(np.float32) * np.float32(levels.step)
            assert same(product.astype(archive[name].dtype), archive[name])
        outlier = archive.levels("outlier")
        assert np.argmax(outlier.values) == 3 * 90 + 4
        product = outlier.values.astype(np.float32) * np.float32(outlier.step)
        assert same(product, archive["outlier"])


@pytest.mark.parametrize(
    ("name", "why"),
    [("wide", "trellis"), ("conv", "transform"), ("scaled", "trellis"), ("bias", "in a box")],
)
def test_why_there_are_no_integers(archive: Archive, name: str, why: str) -> None:
    with pytest.raises(TensorNotFoundError, match=rf"{name}.*{why}.*pack with --integer"):
        archive.levels(name)


def test_others_may_read_while_items_come(archive: Archive) -> None:
    for (name, array), (other, _) in zip(archive.items(), archive.items(), strict=True):
        assert name == other
        assert same(array, tensors()[name])
        assert archive.info("scaled").spec.shape == (60, 60)
        assert same(archive["line"], tensors()["line"])
        assert archive.read_file("config.json") == b"{}"


def test_breaking_off_and_starting_anew(archive: Archive) -> None:
    assert next(archive.items())[0] == "conv"
    assert all_same(dict(archive.items()), tensors())


@pytest.mark.parametrize("threads", [0, 1, 2])
def test_threads_change_nothing(threads: int) -> None:
    with open_archive(sample(), threads=threads) as archive:
        assert all_same(dict(archive.items()), tensors())
        assert same(archive["wide"], tensors()["wide"])


def test_paths_and_files_are_closed(tmp_path: Path) -> None:
    path = tmp_path / "model.mp4"
    path.write_bytes(sample())
    for source in (path, str(path), path.open("rb"), io.BytesIO(sample())):
        with open_archive(source) as archive:
            assert all_same(dict(archive.items()), tensors())
        assert archive.source.file.closed
        with pytest.raises(ValueError, match="closed"):
            archive["wide"]
    with pytest.raises(FileNotFoundError):
        open_archive(tmp_path / "none.mp4")
    path.write_bytes(b"no archive at all")
    with pytest.raises(FormatError, match="not a weightvid archive"):
        open_archive(path)  # a file left open would warn


def test_other_bytes_and_numbers_of_layers() -> None:
    for held in (bytearray(sample()), memoryview(sample())):
        for none in (), [], None:
            assert same(open_archive(held, base=none)["wide"], tensors()["wide"])
    for layers in (0, -1):
        with pytest.raises(TensorNotFoundError, match="counted from 1"):
            open_archive(sample(), layers=layers)


def test_frames_are_not_for_writing(archive: Archive) -> None:
    ((_, luma),) = archive.frames(range(1))
    with pytest.raises(ValueError, match="read-only"):
        luma[:] = 0


def refused_by_pipes(archive: Archive) -> None:
    for call in (
        lambda: archive["conv"], lambda: list(archive.items()), lambda: archive.info("conv"),
        lambda: archive.levels("conv"), lambda: archive.read_file("config.json"),
        lambda: list(archive.frames(range(1))),
    ):  # fmt: skip
        with pytest.raises(FormatError) as caught:
            call()
        assert caught.value.code == "not-seekable"


@pytest.mark.parametrize("piece", [1, 13, 4096, 1 << 20])
def test_pipes_can_be_read_once(piece: int) -> None:
    archive = open_archive(Pipe(sample(), piece))
    assert archive.index is None
    assert "a pipe" in repr(archive)
    assert tuple(archive) == NAMES
    assert all_same(dict(archive.items()), tensors())
    refused_by_pipes(archive)


def test_one_tensor_of_a_pipe() -> None:
    assert same(open_archive(Pipe(sample()))["outlier"], tensors()["outlier"])


def test_tensors_come_before_the_file_has() -> None:
    pipe = Pipe(sample(), 512)
    name, _ = next(open_archive(pipe).items())
    assert name == "conv"
    assert pipe.taken < len(sample()) / 2


def test_os_pipe() -> None:
    out, into = os.pipe()

    def write() -> None:
        with os.fdopen(into, "wb") as file:
            file.write(sample())

    writer = threading.Thread(target=write)
    writer.start()
    with os.fdopen(out, "rb") as file, open_archive(file) as archive:
        assert all_same(dict(archive.items()), tensors())
        refused_by_pipes(archive)
    writer.join()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def test_urlopen(tmp_path: Path) -> None:
    (tmp_path / "model.mp4").write_bytes(sample())
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path))
    serving = threading.Thread(target=server.serve_forever)
    serving.start()
    try:
        address = f"http://127.0.0.1:{server.server_port}/model.mp4"
        with open_archive(urlopen(address)) as archive:
            assert all_same(dict(archive.items()), tensors())
    finally:
        server.shutdown()
        server.server_close()
        serving.join()


def test_a_file_without_index_is_read_in_order() -> None:
    boxes = fuzz.split_boxes(sample())
    data = fuzz.join_boxes([box for box in boxes if box.kind != b"mfra"][:-1])
    archive = open_archive(data)
    assert archive.index is None
    assert same(archive["conv"], tensors()["conv"])
    for call in (archive.info, archive.levels):
        with pytest.raises(TruncatedError):
            call("conv")
    with pytest.raises(TruncatedError, match="missing: its index"):
        list(archive.items())

"""Downloads: broken off, resumed, from servers that lie; what is there in the end is right."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fetch_torture import torture
from fuzz_archives import join_boxes, split_boxes
from hostile import HOSTILE, drip, send_forever, server

from weightvid.checkpoint import from_mapping
from weightvid.errors import KeyFileError, OutputError, RemoteError, SignatureError
from weightvid.fetch import FetchOptions, WrongArchiveError, WrongHashError, fetch_archive
from weightvid.loader import FRAME_UUID, open_archive
from weightvid.numpy import save_file
from weightvid.pack import PackOptions, pack_checkpoint

sys.path.append(str(Path(__file__).parent / "checkpoint"))
from serving import Site, serve

pytest.importorskip("aiohttp", reason="fetch needs the extra remote")
asyn = pytest.importorskip("fsspec.asyn")
QUICK = FetchOptions(patience=0.3, attempts=2)


@pytest.fixture
def data(long_archive: Path) -> bytes:
    return long_archive.read_bytes()


@pytest.fixture
def site() -> Iterator[Site]:
    with serve() as served:
        yield served


def head(data: bytes, first: int, **more: Any) -> bytes:
    """Head of an answer to a request for all from a byte on."""
    fields = {
        "Content-Range": f"bytes {first}-{len(data) - 1}/{len(data)}",
        "Content-Length": len(data) - first,
        **{name.replace("_", "-"): value for name, value in more.items()},
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items() if value is not None)
    return f"HTTP/1.1 206 Partial Content\r\n{lines}Connection: close\r\n\r\n".encode()


def wanted(request: bytes) -> int:
    return int(request.split(b"Range: bytes=")[1].split(b"-")[0])


def cut_at(data: bytes, at: int, path: Path) -> None:
    """Leave what a killed download leaves."""
    path.with_name(f".{path.name}.part").write_bytes(data[:at])


def left(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_a_download(site: Site, data: bytes, tmp_path: Path) -> None:
    url, told = site.put("m.mp4", data, headers={"ETag": '"1"'}), []
    report = fetch_archive(url, tmp_path / "m.mp4", QUICK, told.append)
    assert (tmp_path / "m.mp4").read_bytes() == data
    assert left(tmp_path) == ["m.mp4"]
    assert (report.file_bytes, report.fetched_bytes, report.resumed_at) == (len(data),) * 2 + (0,)
    assert (report.frames, report.interruptions, report.sources) == (3, 0, (url,))
    assert (told[-1].stage, told[-1].done, told[-1].total) == ("fetch", len(data), len(data))


@pytest.mark.parametrize("at", [0, 1, 20, 700, 20_000, 50_000, -70, -1])
@pytest.mark.parametrize("state", [False, True])
def test_it_goes_on(site: Site, data: bytes, tmp_path: Path, at: int, state: bool) -> None:
    at %= len(data)
    path, url = tmp_path / "m.mp4", site.put("m.mp4", data)
    cut_at(data, at, path)
    if state:
        known = {"checked": at, "size": len(data), "versions": {}}
        path.with_name(".m.mp4.part.json").write_text(json.dumps(known))
    report = fetch_archive(url, path, QUICK)
    assert path.read_bytes() == data
    assert (report.resumed_at, report.fetched_bytes) == (at, len(data) - at)
    assert left(tmp_path) == ["m.mp4"]


def test_without_ranges(site: Site, data: bytes, tmp_path: Path) -> None:
    path, url = tmp_path / "m.mp4", site.put("m.mp4", data, ranges=False)
    fetch_archive(url, path, QUICK)
    assert path.read_bytes() == data
    path.unlink()
    cut_at(data, 20_000, path)
    with pytest.raises(RemoteError, match=r"no ranges.*--restart.*part keeps what arrived"):
        fetch_archive(url, path, QUICK)
    fetch_archive(url, path, FetchOptions(restart=True))
    assert path.read_bytes() == data


def test_another_version(site: Site, data: bytes, tmp_path: Path) -> None:
    path, url = tmp_path / "m.mp4", site.put("m.mp4", data, cut=700, headers={"ETag": '"1"'})
    with pytest.raises(RemoteError, match="its answer breaks off"):
        fetch_archive(url, path, FetchOptions(patience=0.3, attempts=1))
    site.put("m.mp4", data, headers={"ETag": '"2"'})
    with pytest.raises(RemoteError, match=r'has changed since the download began \("1", now "2"\)'):
        fetch_archive(url, path, QUICK)
    site.put("m.mp4", data + b"x", headers={"ETag": '"1"'})
    with pytest.raises(RemoteError, match=f"has changed .*{len(data)}, now {len(data) + 1}"):
        fetch_archive(url, path, QUICK)
    site.put("m.mp4", bytes(len(data)), headers={"ETag": '"1"'})
    with pytest.raises(RemoteError, match="it is another file than the one that arrived before"):
        fetch_archive(url, path, QUICK)
    site.put("m.mp4", data[:1000])
    with pytest.raises(RemoteError, match=r"has changed|has no byte"):
        fetch_archive(url, path, QUICK)
    assert left(tmp_path) == [".m.mp4.part", ".m.mp4.part.json"]
    site.put("m.mp4", data, headers={"ETag": '"1"'})
    fetch_archive(url, path, QUICK)
    assert path.read_bytes() == data


def test_a_damaged_frame_is_fetched_again(data: bytes, tmp_path: Path) -> None:
    def talk(connection: socket.socket, request: bytes, number: int) -> None:
        first, sent = wanted(request), bytearray(data)
        if number < 2:
            sent[40_000 + 20_000 * number] ^= 64
        connection.sendall(head(data, first) + sent[first:])

    with server(talk) as url:
        report = fetch_archive(url, tmp_path / "m.mp4", QUICK)
    assert (tmp_path / "m.mp4").read_bytes() == data
    assert report.interruptions == 2


def test_damaged_at_the_source(site: Site, data: bytes, tmp_path: Path) -> None:
    url = site.put("m.mp4", data[:40_000] + bytes(8) + data[40_008:])
    with pytest.raises(WrongArchiveError, match=r"cannot fetch .*frame 0 decodes to other samples"):
        fetch_archive(url, tmp_path / "m.mp4", QUICK)
    assert "m.mp4" not in left(tmp_path)


@pytest.mark.parametrize("kinds", [[b"mdat"], [b"moof", b"mdat"], [b"moov"], [FRAME_UUID, b"mdat"]])
def test_boxes_in_another_order(
    site: Site, data: bytes, tmp_path: Path, kinds: list[bytes]
) -> None:
    """A frame of nothing: it is no archive, and the error is ours."""
    boxes = split_boxes(data)
    frame = next(n for n, box in enumerate(boxes) if box.kind == FRAME_UUID)
    wrong = [next(box for box in boxes if box.kind == kind) for kind in kinds]
    url = site.put("m.mp4", join_boxes([*boxes[:frame], *wrong, *boxes[frame:]]))
    with pytest.raises(RemoteError, match=r"\[order\]"):
        fetch_archive(url, tmp_path / "m.mp4", QUICK)


def test_mirrors(site: Site, data: bytes, tmp_path: Path) -> None:
    path, good = tmp_path / "m.mp4", site.put("good", data)
    urls = [
        site.put("absent", b"", status=404), site.put("busy", b"", status=503),
        site.put("short", data, cut=5000), site.put("page", b"<html>" + bytes(999)), good,
    ]  # fmt: skip
    report = fetch_archive(urls, path, FetchOptions(patience=0.3))
    assert path.read_bytes() == data
    assert report.sources[-1] == good
    path.unlink()
    with pytest.raises(RemoteError, match=r"(there is no|it answers 503) .*nor from 3 others"):
        fetch_archive([urls[0], urls[3], urls[1], urls[0]], path, QUICK)


LIARS: dict[str, tuple[Callable[[socket.socket, bytes, int], object], str]] = {
    "says nothing": (lambda c, _, first: time.sleep(1), r"less than 4096 bytes in 0\.3 seconds"),
    "closes": (lambda c, _, first: None, "closed|reset"),
    "no HTTP": (lambda c, _, first: c.sendall(b"220 ready\r\n\r\n"), "220 ready"),
    "drips its head": (lambda c, d, first: drip(c, head(d, first)), "less than 4096"),
    "drips": (lambda c, d, first: (c.sendall(head(d, first)), drip(c, d)), "less than 4096"),
    "endless head": (lambda c, _, first: send_forever(c, b"HTTP/1.1 200 OK\r\nA: b\r\n"), "."),
    "sends less": (
        lambda c, d, first: c.sendall(head(d, first) + d[first : first + 99]),
        "breaks off",
    ),
    "claims more": (
        lambda c, d, first: c.sendall(head(d, first, Content_Length=len(d) + 500) + d[first:-20]),
        "breaks off",
    ),
    "claims less": (
        lambda c, d, first: c.sendall(
            head(d[:900], min(first, 800), Content_Length=None) + d[first:]
        ),
        "another range|more than the 900 bytes|answers bytes|has changed",
    ),
    "another range": (lambda c, d, first: c.sendall(head(d, first + 1) + d[first:]), "it answers"),
    "no range": (
        lambda c, d, first: c.sendall(head(d, first, Content_Range="nonsense") + d), "it answers"
    ),
    "ends early": (
        lambda c, d, first: c.sendall(head(d[:-9], first) + d[first:-9]), "end before the archive"
    ),
    "zipped": (
        lambda c, d, first: c.sendall(head(d, first, Content_Encoding="gzip") + d), "sends gzip"
    ),
    "circle": (
        lambda c, d, first: c.sendall(
            b"HTTP/1.1 302 Found\r\nLocation: /model.mp4\r\nContent-Length: 0\r\n"
            b"Connection: close\r\n\r\n"
        ),
        "redirects in a circle",
    ),
    "to a file": (
        lambda c, d, first: c.sendall(
            b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\nContent-Length: 0\r\n\r\n"
        ),
        ".",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LIARS)
def test_servers_that_lie(name: str, data: bytes, tmp_path: Path) -> None:
    talk, message = LIARS[name]
    with (
        server(lambda connection, request, _: talk(connection, data, wanted(request))) as url,
        pytest.raises(RemoteError, match=message),
    ):
        # Ten redirections take their time beside a load.
        patience = 10.0 if name == "circle" else QUICK.patience
        fetch_archive(url, tmp_path / "m.mp4", replace(QUICK, patience=patience))
    assert "m.mp4" not in left(tmp_path)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_servers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One error, which shows nothing of the address that is secret; nothing goes on behind it."""
    monkeypatch.setattr("weightvid.fetch._MOST_BESIDES", 1 << 20)
    options = FetchOptions(patience=0.3, attempts=1)
    with (
        server(HOSTILE[name]) as url,
        pytest.raises(RemoteError, match=r"^cannot fetch ") as caught,
    ):
        address = url.replace("//", "//me:password@") + "?sig=hidd)en&exp=1"
        fetch_archive(address, tmp_path / "m.mp4", options)
    said = str(caught.value)
    assert len(said) < 500
    assert said.isprintable()
    assert not any(secret in said for secret in ("hidd", "en&exp", "password"))
    assert "m.mp4" not in left(tmp_path)

    async def others() -> set[Any]:
        return asyncio.all_tasks() - {asyncio.current_task()}

    assert not asyncio.run_coroutine_threadsafe(others(), asyn.get_loop()).result(5)


def test_user_and_password(data: bytes, tmp_path: Path) -> None:
    """They are sent as a header, and not to another server that the first one names."""
    asked: list[bytes] = []

    def talk(connection: socket.socket, request: bytes, _: int) -> None:
        asked.append(request)
        connection.sendall(head(data, wanted(request)) + data[wanted(request) :])

    def redirect(connection: socket.socket, request: bytes, _: int) -> None:
        asked.append(request)
        place = f"Location: {url}\r\nContent-Length: 0\r\n\r\n"
        connection.sendall(b"HTTP/1.1 302 Found\r\n" + place.encode())

    with server(talk) as url, server(redirect) as first:
        address = first.replace("//", "//me:pass%40word@")
        report = fetch_archive(address, tmp_path / "m.mp4", QUICK)
    assert (tmp_path / "m.mp4").read_bytes() == data
    assert report.sources == (first,)
    assert b"Authorization: Basic bWU6cGFzc0B3b3Jk" in asked[0]
    assert b"Authorization" not in asked[1]


def test_what_cannot_be(site: Site, data: bytes, tmp_path: Path) -> None:
    path, url = tmp_path / "m.mp4", site.put("m.mp4", data)
    for other in ("s3://bucket/m.mp4", "model.mp4", "file:///etc/passwd"):
        with pytest.raises(RemoteError, match="only http:// and https://"):
            fetch_archive(other, path)
    path.write_bytes(b"mine")
    with pytest.raises(OutputError, match="exists already"):
        fetch_archive(url, path)
    fetch_archive(url, path, FetchOptions(force=True))
    assert path.read_bytes() == data
    with pytest.raises(OutputError, match="cannot write"):
        fetch_archive(url, tmp_path / "absent" / "m.mp4")
    (tmp_path / "folder").mkdir()
    before = list(site.asked)
    for force in (False, True):
        with pytest.raises(OutputError, match="it is a folder; name a file in it"):
            fetch_archive(url, tmp_path / "folder", FetchOptions(force=force))
    assert site.asked == before
    assert left(tmp_path) == ["folder", "m.mp4"]


def test_nothing_is_left_where_nothing_came(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for url in (site.put("text", b"no archive, but a text"), site.put("other", b"") + "/absent"):
        with pytest.raises(RemoteError):
            fetch_archive(url, tmp_path / "m.mp4")
        assert left(tmp_path) == []
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(RemoteError, match=r"weightvid\[remote\]") as caught:
        fetch_archive(url, tmp_path / "m.mp4")
    assert isinstance(caught.value.__context__, ImportError)  # which the exit status depends on


@pytest.mark.parametrize(
    ("start", "end", "code"), [(0, 5, "truncated"), (0, -70, "truncated"), (8, None, "ftyp")]
)
def test_what_is_no_archive_is_no_trouble_of_the_network(
    site: Site, data: bytes, tmp_path: Path, start: int, end: int | None, code: str
) -> None:
    with pytest.raises(WrongArchiveError) as caught:
        fetch_archive(site.put("m.mp4", data[start:end]), tmp_path / "m.mp4", QUICK)
    assert caught.value.code == code
    with pytest.raises(RemoteError) as other:
        fetch_archive(site.put("m.mp4", b"", status=503), tmp_path / "n.mp4", QUICK)
    assert not isinstance(other.value, WrongArchiveError)


def test_the_hash_of_the_file(site: Site, data: bytes, tmp_path: Path) -> None:
    path, url = tmp_path / "m.mp4", site.put("m.mp4", data)
    with pytest.raises(WrongHashError, match=r"has the SHA-256 [0-9a-f]{64}, not 0{64}; .*thrown"):
        fetch_archive(url, path, FetchOptions(sha256="0" * 64))
    for wrong in ("00", "g" * 64, "0" * 63 + "\n", "٠" * 64):
        with pytest.raises(RemoteError, match="64 hexadecimal digits"):
            fetch_archive("http://127.0.0.1:9/m.mp4", path, FetchOptions(sha256=wrong))
    fetch_archive(url, path, FetchOptions(sha256=hashlib.sha256(data).hexdigest().upper()))


def test_the_signature_of_the_file(site: Site, long_archive: Path, tmp_path: Path) -> None:
    pytest.importorskip("cryptography", reason="signatures need cryptography")
    from test_sign import new_key

    from weightvid.sign import sign_archive

    owner, other = new_key(tmp_path, "owner"), new_key(tmp_path, "other")
    sign_archive(long_archive, owner, tmp_path / "signed.mp4")
    path, url = tmp_path / "m.mp4", site.put("m.mp4", (tmp_path / "signed.mp4").read_bytes())
    with pytest.raises(SignatureError, match="by another key"):
        fetch_archive(url, path, FetchOptions(key=str(other.with_suffix(".pub"))))
    assert not path.exists()
    with pytest.raises(KeyFileError, match="holds no public"):  # before anything is fetched
        fetch_archive("http://127.0.0.1:9/m.mp4", path, FetchOptions(key=str(owner)))
    fetch_archive(url, path, FetchOptions(key=str(owner.with_suffix(".pub"))))
    assert path.read_bytes() == (tmp_path / "signed.mp4").read_bytes()


@pytest.mark.skipif(os.name == "nt", reason="files are locked otherwise there")
def test_two_at_a_time(site: Site, data: bytes, tmp_path: Path) -> None:
    import fcntl

    path = tmp_path / "m.mp4"
    cut_at(data, 20_000, path)
    with (tmp_path / ".m.mp4.part").open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="another process is writing"):
            fetch_archive(site.put("m.mp4", data), path)
    fetch_archive(site.put("m.mp4", data), path)


def test_kills_and_cuts(data: bytes, tmp_path: Path) -> None:
    """A small run of `tools/fetch_torture.py`."""
    outcome = torture(data, tmp_path, kills=2, cuts=3, seed=1)
    assert outcome.downloads >= 1


def weights() -> dict[str, Any]:
    random = np.random.default_rng(5)
    return {f"w{n}": random.standard_normal((96, 96)).astype(np.float32) for n in range(3)}


def layered(path: Path, layers: int = 1, *bases: Path) -> bytes:
    """An archive of layers, or an update."""
    with from_mapping(weights()) as reader:
        options = PackOptions(recipe="small", layers=layers, base=bases)
        pack_checkpoint(reader, path, options)
    return path.read_bytes()


def test_a_coarse_model_first_and_the_rest_later(site: Site, tmp_path: Path) -> None:
    whole = layered(tmp_path / "whole.mp4", 2)
    path, url = tmp_path / "m.mp4", site.put("m.mp4", whole)
    report = fetch_archive(url, path, replace(QUICK, layers=1))
    assert (report.layers, report.layers_of) == (1, 2)
    coarse = path.read_bytes()
    assert coarse == whole[: len(coarse)]
    assert len(coarse) < 0.6 * len(whole)
    with open_archive(path, layers=1) as found, open_archive(tmp_path / "whole.mp4") as right:
        assert right.layers == 2
        for name, array in found.items():
            assert np.corrcoef(array.ravel(), right[name].ravel())[0, 1] > 0.9
    assert fetch_archive(url, path, replace(QUICK, layers=1, force=True)).fetched_bytes == 0
    report = fetch_archive(url, path, replace(QUICK, force=True))
    assert (report.layers, report.resumed_at, path.read_bytes()) == (2, len(coarse), whole)
    assert left(tmp_path) == ["m.mp4", "whole.mp4"]
    fetch_archive(url, tmp_path / "all.mp4", replace(QUICK, layers=9))
    assert (tmp_path / "all.mp4").read_bytes() == whole
    with pytest.raises(RemoteError, match="of the whole file"):
        fetch_archive(url, tmp_path / "n.mp4", replace(QUICK, layers=1, sha256="0" * 64))


def test_an_update_to_another_base_is_not_fetched(site: Site, tmp_path: Path) -> None:
    save_file(weights(), tmp_path / "base.mp4")
    update = layered(tmp_path / "update.mp4", 1, tmp_path / "base.mp4")
    other = layered(tmp_path / "other.mp4", 2)
    url, path = site.put("u.mp4", update), tmp_path / "got.mp4"
    for _ in range(2):  # the second time by what is left of the first
        with pytest.raises(WrongArchiveError, match=r"root [0-9a-f]{64}, and the base has") as no:
            fetch_archive(url, path, replace(QUICK, base=(tmp_path / "other.mp4",)))
        assert no.value.code == "base"
    with pytest.raises(RemoteError, match="it is no update"):
        fetch_archive(
            site.put("o.mp4", other),
            path,
            replace(QUICK, base=(tmp_path / "base.mp4",), restart=True),
        )
    assert not path.exists()
    fetch_archive(url, path, replace(QUICK, base=(tmp_path / "base.mp4",), restart=True))
    assert path.read_bytes() == update
    base = tmp_path / "base.mp4"
    before = base.read_bytes()
    with pytest.raises(OutputError, match="is the base itself"):
        fetch_archive(url, base, replace(QUICK, base=(base,), force=True))
    assert base.read_bytes() == before

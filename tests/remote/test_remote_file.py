"""Files on a web server: ranges, streams, cuts, lies, refusals."""

from __future__ import annotations

import datetime
import ipaddress
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import Site, serve
from typer.testing import CliRunner

from weightvid.cli.app import app
from weightvid.errors import RemoteError
from weightvid.remote import file_name, is_url, open_remote, retry, shown
from weightvid.remote.address import parse_hub
from weightvid.remote.file import FIRST_BYTES, RemoteFile, RemoteStream

pytest.importorskip("aiohttp")

ROOT = Path(__file__).resolve().parent.parent.parent
DATA = np.random.default_rng(1).bytes(300_000)


def read_all(url: str) -> bytes:
    with open_remote(url) as stream:
        return stream.read()


def test_ranges(site: Site) -> None:
    with open_remote(site.put("a b.bin", DATA).replace(" ", "%20")) as file:
        assert isinstance(file, RemoteFile)
        assert file.seek(0, 2) == len(DATA)
        file.seek(200_000)
        assert file.read(1000) == DATA[200_000:201_000]
        assert file.tell() == 201_000
        file.seek(-10, 2)
        assert file.read(100) == DATA[-10:]
        assert file.read(1) == b""
        file.seek(FIRST_BYTES - 5)
        buffer = bytearray(10)
        assert file.readinto(buffer) == 10  # type: ignore[attr-defined]
        assert buffer == DATA[FIRST_BYTES - 5 : FIRST_BYTES + 5]
    assert [asked.range for asked in site.asked] == [
        "bytes=0-32767",
        "bytes=200000-200999",
        "bytes=299990-299999",
        "bytes=32768-32772",
    ]
    assert site.sent_bytes == FIRST_BYTES + 1000 + 10 + 5


reads = st.lists(
    st.tuples(st.sampled_from(["read", "seek", "on"]), st.integers(0, 320_000)), max_size=12
)


@given(steps=reads)
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_order_of_reads(site: Site, steps: list[tuple[str, int]]) -> None:
    with open_remote(site.put("f", DATA)) as file:
        at = 0
        for step, number in steps:
            if step == "seek":
                at = file.seek(number)
            elif step == "on":
                file.read_on()  # type: ignore[attr-defined]
            else:
                assert file.read(number // 4) == DATA[at : at + number // 4]
                at = file.tell()


def test_reading_on_is_one_request(site: Site) -> None:
    with open_remote(site.put("f", DATA)) as file:
        file.seek(100)
        file.read_on()  # type: ignore[attr-defined]
        got = b"".join(iter(lambda: file.read(999), b""))
        assert got == DATA[100:]
        file.seek(0)
        file.read_on(skipping=True)  # type: ignore[attr-defined]
        for at in range(0, 300_000, 30_000):
            file.seek(at)
            assert file.read(10) == DATA[at : at + 10]
    assert [asked.range for asked in site.asked] == [
        "bytes=0-32767",
        "bytes=32768-299999",
        "bytes=32768-299999",
    ]


def test_a_cut_range_goes_on_where_it_broke(site: Site, waits: list[float]) -> None:
    url = site.put("f", DATA)
    with open_remote(url) as file:
        site.files["f"].cuts = [70_000, 0, 50_000]
        file.seek(100_000)
        assert file.read(200_000) == DATA[100_000:]
    assert [asked.range for asked in site.asked[1:]] == [
        "bytes=100000-299999",
        "bytes=170000-299999",
        "bytes=170000-299999",
        "bytes=220000-299999",
    ]
    assert len(waits) == 3
    assert 0.5 <= waits[0] < 1 <= waits[1] < 2


@pytest.mark.parametrize("cuts", [[], [100], [0, 200_000], [FIRST_BYTES, 100, 299_999]])
def test_without_ranges(site: Site, cuts: list[int]) -> None:
    url = site.put("f", DATA, ranges=False, cuts=list(cuts))
    with open_remote(url) as stream:
        assert isinstance(stream, RemoteStream)
        assert not stream.seekable()
        assert stream.read() == DATA
        stream.rewind()
        assert stream.read(5) == DATA[:5]
    assert len(site.asked) == len(cuts) + 2


def test_it_gives_up(site: Site, waits: list[float]) -> None:
    url = site.put("f", DATA)
    with open_remote(url) as file:
        site.files["f"].cuts = [1000, *[0] * 20]
        file.seek(50_000)
        with pytest.raises(RemoteError, match=r"/f: .*; gave up after 6 tries at byte 51000"):
            file.read(10_000)
    assert len(site.asked) == 1 + 7 - 1
    assert waits == sorted(waits)
    assert len(waits) == 5


def test_a_length_that_is_not_kept(site: Site) -> None:
    """The server announces more bytes than it has, and less."""
    url = site.put("f", DATA, ranges=False, headers={"Content-Length": "400000"})
    with pytest.raises(RemoteError, match="gave up after 6 tries at byte 300000"):
        read_all(url)
    url = site.put("g", DATA, ranges=False, headers={"Content-Length": "299000"})
    assert read_all(url) == DATA[:299_000]


def test_a_range_that_was_not_asked_for(site: Site) -> None:
    with pytest.raises(RemoteError, match="another range"):
        open_remote(site.put("f", DATA, shift=1))
    with pytest.raises(RemoteError, match="another range"):
        open_remote(site.put("g", DATA, headers={"Content-Range": "bytes"}))


def test_ranges_that_stop_working(site: Site) -> None:
    with open_remote(site.put("f", DATA)) as file:
        site.files["f"].ranges = False
        file.seek(200_000)
        assert file.read(1000) == DATA[200_000:201_000]


@pytest.mark.parametrize("change", [{"headers": {"ETag": '"2"'}}, {"data": DATA + b"x"}])
def test_a_file_that_changes(site: Site, change: dict[str, Any]) -> None:
    with open_remote(site.put("f", DATA, headers={"ETag": '"1"'})) as file:
        for name, value in change.items():
            setattr(site.files["f"], name, value)
        file.seek(200_000)
        with pytest.raises(RemoteError, match="changed while it was read"):
            file.read(10)


def test_a_silent_server(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "POLICY", retry.RetryPolicy(silence_s=0.3))
    assert read_all(site.put("f", DATA, pauses=[1.5])) == DATA
    with pytest.raises(RemoteError, match="does not answer in time; gave up after 6"):
        read_all(site.put("g", DATA, pauses=[1.0] * 6))


def test_a_slow_server(site: Site, monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> None:
    """What keeps coming is waited for, however long it takes in all."""
    monkeypatch.setattr(retry, "POLICY", retry.RetryPolicy(silence_s=0.4))
    url = site.put("f", DATA[:60_000], piece_bytes=3000, piece_pause_s=0.05)
    assert read_all(url) == DATA[:60_000]
    assert waits == []


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (404, "there is no .*/f .HTTP 404 Not Found.; check the address"),
        (410, "there is no"),
        (401, "HTTP 401 .*put user:password@ before the host"),
        (403, "HTTP 403 "),
        (400, "the server says HTTP 400"),
    ],
)
def test_refusals(site: Site, status: int, said: str, waits: list[float]) -> None:
    with pytest.raises(RemoteError, match=said):
        open_remote(site.put("f", DATA, statuses=[status]))
    assert waits == []


def test_trouble_that_passes(site: Site, waits: list[float]) -> None:
    url = site.put("f", DATA, statuses=[503, 429, 500], headers={"Retry-After": "7"})
    assert read_all(url) == DATA
    assert waits == [7, 7, 7]
    with pytest.raises(RemoteError, match=r"HTTP 502 .*gave up after 6 tries"):
        open_remote(site.put("g", DATA, statuses=[502] * 6))


@pytest.mark.parametrize(
    "page", [b"<!DOCTYPE html><html>", b"\n\n <HTML>\n", b"\xef\xbb\xbf<html>"]
)
def test_a_web_page(site: Site, page: bytes) -> None:
    with pytest.raises(RemoteError, match="is a web page, not a model"):
        open_remote(site.put("f", page))


@pytest.mark.parametrize("ranges", [True, False])
def test_an_empty_file(site: Site, ranges: bool) -> None:
    assert read_all(site.put("f", b"", ranges=ranges)) == b""


def test_nobody_there(waits: list[float]) -> None:
    with serve() as site:
        url = site.url
    with pytest.raises(RemoteError, match="gave up after 6 tries"):
        open_remote(f"{url}/f")
    with pytest.raises(RemoteError, match=r"cannot find the server nowhere\.invalid:443"):
        open_remote("https://nowhere.invalid/f")


def certificate(path: Path) -> Path:
    """A self-signed certificate for 127.0.0.1, with its key."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False
        )
        .sign(key, hashes.SHA256())
    )
    secret = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    path.write_bytes(secret + made.public_bytes(serialization.Encoding.PEM))
    return path


def test_a_certificate_of_nobody(tmp_path: Path, waits: list[float]) -> None:
    with serve(certificate(tmp_path / "site.pem")) as site:
        url = site.put("f", DATA)
        with pytest.raises(RemoteError, match=r"cannot trust .*self-signed .*SSL_CERT_FILE"):
            open_remote(url)
        out = tmp_path / "m.mp4"
        result = CliRunner().invoke(app, ["pack", url, "-o", str(out)])
        assert result.exit_code == 1
        assert result.stderr.startswith("error: cannot trust the server")
        assert result.stderr.count("\n") == 1
        assert not out.exists()
    assert waits == []


def test_a_certificate_of_ones_own(tmp_path: Path) -> None:
    """As the message advises."""
    file = certificate(tmp_path / "site.pem")
    code = "import sys, weightvid.remote as r; print(len(r.open_remote(sys.argv[1]).read()))"
    with serve(file) as site:
        done = subprocess.run(
            [sys.executable, "-c", code, site.put("f", DATA)],
            env={**os.environ, "SSL_CERT_FILE": str(file), "PYTHONPATH": str(ROOT)},
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
    assert done.stdout == f"{len(DATA)}\n", done.stderr


def test_an_address_goes_out_as_it_is_written(site: Site) -> None:
    """Signatures are of the very characters."""
    site.put("a b", DATA)
    for path in ("a%20b?x=%2Fy%3d&z=+", "a b?x=1"):
        assert read_all(f"{site.url}/{path}") == DATA
    assert site.targets == ["/a%20b?x=%2Fy%3d&z=+"] * 2 + ["/a%20b?x=1"] * 2


def test_a_size_that_nobody_knows(site: Site) -> None:
    """A range of an unknown whole: asked for without a range."""
    headers = {"Content-Range": "bytes 0-32767/*"}
    url = site.put("f", DATA, headers=headers)
    assert read_all(url) == DATA
    assert [asked.range for asked in site.asked] == ["bytes=0-32767", None]


def test_no_secrets_in_messages(site: Site) -> None:
    url = f"{site.url}/gone?token=secret".replace("://", "://me:secret@")
    with pytest.raises(RemoteError) as caught:
        open_remote(url)
    assert "secret" not in str(caught.value)
    assert site.asked[0].headers["Authorization"].startswith("Basic ")


def test_addresses() -> None:
    assert is_url("s3://b/k")
    assert not any(map(is_url, ("C:\\m.mp4", "a/b", "://x", Path("https://x"), b"https://x")))
    assert file_name("https://h/a%20b.mp4?x=/y#z") == "a b.mp4"
    assert shown("s3://key:secret@b/k") == "s3://b/k"
    assert shown("hf://org/m@v1/f") == "hf://org/m@v1/f"
    assert parse_hub("hf://org/m@refs/pr/1/f").revision == "refs/pr/1"
    assert parse_hub("hf://gpt2").repo == "gpt2"
    for bad in ("hf://datasets/a/b", "hf://a b/c"):
        with pytest.raises(RemoteError, match="names no model"):
            parse_hub(bad)


@pytest.mark.parametrize("url", ["http://[bad/f", "http:///f", "http://h:99999/f", "https://"])
def test_no_addresses(url: str) -> None:
    if is_url(url):
        with pytest.raises(RemoteError, match=r"no valid address|cannot (find|read)"):
            open_remote(url)


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(RemoteError, match=r"aiohttp is needed .*pip install 'weightvid\[remote\]'"):
        open_remote("https://example.org/f")
    with pytest.raises(RemoteError, match="cannot read nonsense://x"):
        open_remote("nonsense://x")


def test_a_driver_that_stumbles(monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> None:
    """Connections that break, and answers that are cut short, are made good."""
    from fsspec.implementations.memory import MemoryFileSystem

    MemoryFileSystem().pipe_file("/f", DATA)
    whole = MemoryFileSystem.cat_file
    trouble: list[Any] = [ConnectionResetError("reset"), 40_000, TimeoutError()]

    def cat_file(files: Any, path: str, start: int, end: int) -> bytes:
        what = trouble.pop(0) if trouble and start else None
        if isinstance(what, Exception):
            raise what
        return whole(files, path, start, end)[:what]

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    with open_remote("memory://f") as file:
        file.seek(100_000)
        assert file.read(150_000) == DATA[100_000:250_000]
        assert len(waits) == 3
        trouble += [PermissionError("no")]
        with pytest.raises(RemoteError, match="access is refused"):
            file.seek(100_000)
            file.read(5)
        trouble += [ConnectionResetError("reset")] * 6
        with pytest.raises(RemoteError, match="reset; gave up after 6 tries at byte 100000"):
            file.read(5)


def test_local_and_memory_drivers(tmp_path: Path) -> None:
    import fsspec

    (tmp_path / "f").write_bytes(DATA)
    assert read_all(f"file://{tmp_path}/f") == DATA
    fsspec.filesystem("memory").pipe_file("/f", DATA)
    with open_remote("memory://f") as file:
        file.seek(299_000)
        assert file.read() == DATA[299_000:]
    with pytest.raises(RemoteError, match="there is no memory://g"):
        open_remote("memory://g")
    with pytest.raises(RemoteError, match="is a folder"):
        open_remote(f"file://{os.fspath(tmp_path)}")

"""S3, against moto's server on loopback."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from archives import normal, packed, same
from safetensors.numpy import save_file
from typer.testing import CliRunner

from weightvid.checkpoint import open_checkpoint
from weightvid.cli.app import app
from weightvid.errors import OutputError, RemoteError
from weightvid.loader import open_archive
from weightvid.pack import pack_checkpoint
from weightvid.remote import open_remote
from weightvid.summary import summarize_archive
from weightvid.unpack import unpack_archive
from weightvid.verify import verify_archive

s3fs = pytest.importorskip("s3fs")
moto = pytest.importorskip("moto.server")

#: what the libraries of the S3 driver say about their own future.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
ARRAYS = {"a": normal(1, 80, 90), "b": normal(2, 300, 70), "c": normal(3, 33)}


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A bucket named ``models``; its files are put there with ``pipe_file``."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "me")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    s3fs.S3FileSystem.clear_instance_cache()
    files = s3fs.S3FileSystem()
    if not files.exists("models"):
        files.mkdir("models")
    yield files
    s3fs.S3FileSystem.clear_instance_cache()


def test_archive(bucket: Any, tmp_path: Path) -> None:
    data = packed(ARRAYS)
    bucket.pipe_file("models/m.mp4", data)
    with open_archive("s3://models/m.mp4") as archive:
        found = dict(archive)
        assert found.keys() == ARRAYS.keys()
        assert same(archive["b"], found["b"])
    assert verify_archive("s3://models/m.mp4").ok
    assert summarize_archive("s3://models/m.mp4").file_bytes == len(data)
    assert unpack_archive("s3://models/m.mp4", tmp_path / "m.npz").tensors == 3


def test_ranges(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weightvid.remote.driver._PIECE_BYTES", 40_000)
    data = normal(4, 250_000).tobytes()
    bucket.pipe_file("models/f", data)
    with open_remote("s3://models/f") as file:
        file.seek(500_001)
        assert file.read(100_000) == data[500_001:600_001]
        assert file.transfer.bytes_received == (32 << 10) + 100_000  # type: ignore[attr-defined]


def test_checkpoints(bucket: Any, tmp_path: Path) -> None:
    index = {"weight_map": {}}
    for name, array in ARRAYS.items():
        save_file({name: array}, tmp_path / name)
        index["weight_map"][name] = f"model-{name}.safetensors"
        bucket.pipe_file(f"models/m/model-{name}.safetensors", (tmp_path / name).read_bytes())
    bucket.pipe_file("models/m/model.safetensors.index.json", json.dumps(index).encode())
    bucket.pipe_file("models/m/config.json", b'{"a": 1}')
    bucket.pipe_file("models/m/pytorch_model.bin", bytes(100))
    bucket.pipe_file("models/m/onnx/model.onnx", bytes(100))
    report = pack_checkpoint("s3://models/m/", tmp_path / "m.mp4")
    assert report.side_files == ("config.json",)
    unpack_archive(tmp_path / "m.mp4", tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_bytes() == b'{"a": 1}'
    with open_checkpoint("s3://models/m/model-b.safetensors") as reader:
        assert same(reader.read("b"), ARRAYS["b"])
    bucket.rm_file("models/m/model-b.safetensors")
    with pytest.raises(ValueError, match=r"s3://models/m/? lacks model-b\.safetensors"):
        open_checkpoint("s3://models/m")


def test_pack_to_an_address(bucket: Any, tmp_path: Path) -> None:
    save_file(ARRAYS, tmp_path / "m.safetensors")
    command = ["pack", str(tmp_path / "m.safetensors"), "-o", "s3://models/new.mp4"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.stderr
    pack_checkpoint(tmp_path / "m.safetensors", tmp_path / "m.mp4")
    assert bucket.cat_file("models/new.mp4") == (tmp_path / "m.mp4").read_bytes()
    for target, said in (
        ("s3://models/new.mp4", "exists already; use --force"),
        ("s3://nobucket/new.mp4", "cannot write to s3://nobucket/new.mp4: "),
        ("s3://models/", "name a file in it"),
        ("https://example.org/m.mp4", "https:// addresses are read only"),
    ):
        result = CliRunner().invoke(app, [*command[:-1], target])
        assert result.exit_code == 1
        assert said in result.stderr
        assert result.stderr.count("\n") == 1
    assert CliRunner().invoke(app, [*command, "--force"]).exit_code == 0
    with pytest.raises(OutputError, match="it is an address, and this output must be a file"):
        unpack_archive("s3://models/new.mp4", "s3://models/m.safetensors")
    with pytest.raises(OutputError, match="it is an address"):
        unpack_archive("s3://models/new.mp4", "s3://models/m")


def test_what_is_not_there(bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for url in ("s3://models/gone", "s3://nobucket/f"):
        with pytest.raises(RemoteError, match=f"there is no {url}"):
            open_remote(url)
        with pytest.raises(RemoteError, match=f"there is no {url}"):
            open_checkpoint(url)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    s3fs.S3FileSystem.clear_instance_cache()
    for opener in (open_remote, open_checkpoint):
        with pytest.raises(
            RemoteError, match=r"s3://models/m\.mp4.*credentials.*AWS_ACCESS_KEY_ID"
        ):
            opener("s3://models/m.mp4")
    out = tmp_path / "m.mp4"
    result = CliRunner().invoke(app, ["pack", "s3://models/m.safetensors", "-o", str(out)])
    assert result.exit_code == 1
    assert re.fullmatch(r"error: .*set AWS_ACCESS_KEY_ID.*\n", result.stderr)
    assert not out.exists()


def test_a_driver_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
    with pytest.raises(RemoteError, match=r"gs:// addresses: pip install 'weightvid\[gs\]'"):
        open_remote("gs://b/f")

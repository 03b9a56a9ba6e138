"""Checkpoints and archives at addresses: web servers, a folder, S3, and the hub."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import normal
from hostile import HOSTILE, server
from safetensors.numpy import save, save_file
from serving import Site, serve

import weightvid
from weightvid.checkpoint import is_url, open_checkpoint
from weightvid.errors import CheckpointError, OutputError, RemoteError
from weightvid.remote import check_upload, file_name, open_remote, shown, upload

asyn = pytest.importorskip("fsspec.asyn")

DATA = np.random.default_rng(1).bytes(300_000)
WEIGHTS = normal(3, 30, 40)
ARRAYS = {"a": normal(1, 40, 50), "b": normal(2, 30)}


@pytest.fixture
def site() -> Iterator[Site]:
    pytest.importorskip("aiohttp")
    with serve() as made:
        yield made


@pytest.fixture(autouse=True)
def spool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where downloads go; nothing may be left there."""
    folder = tmp_path / "spool"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    yield folder
    assert not list(folder.iterdir())


def index_of(names: dict[str, str]) -> bytes:
    return json.dumps({"weight_map": names}).encode()


@pytest.mark.parametrize("ranges", [True, False])
def test_a_file_can_be_sought_in(site: Site, ranges: bool) -> None:
    with open_remote(site.put("a b.bin", DATA, ranges=ranges).replace(" ", "%20")) as file:
        assert file.seek(-10, io.SEEK_END) == len(DATA) - 10
        assert file.read(100) == DATA[-10:]
        file.seek(200_000)
        assert file.read(1000) == DATA[200_000:201_000]
        assert file.tell() == 201_000
        file.seek(0)
        assert file.read() == DATA


def test_a_whole_file_is_asked_for_once(site: Site) -> None:
    with open_remote(site.put("m.mp4", DATA * 30)) as file:
        assert file.read() == DATA * 30
    assert len(site.asked) == 2  # how large it is, all of it


def test_addresses() -> None:
    assert [is_url(x) for x in ("s3://b/k", "C://x", "a/b", Path("s3://b/k"))] == [
        True,
        *[False] * 3,
    ]
    assert shown("https://me:pw@host/a/m.mp4?sig=1#x") == "https://host/a/m.mp4"
    assert shown("hf://model@v1/f") == "hf://model@v1/f"
    assert file_name("https://host/a%20b.mp4?x=/y") == "a b.mp4"
    assert file_name("hf://org/model@v1") == "model"


@pytest.mark.parametrize("opener", [open_remote, open_checkpoint])
@pytest.mark.parametrize(
    ("status", "said"),
    [
        (404, "there is no http://127.0.0.1:.*/m.npz; check the address"),
        (403, "cannot read .*/m.npz: access is refused .*; check the credentials"),
        (500, "cannot read .*/m.npz: "),
    ],
)
def test_refusals_show_no_secrets(site: Site, opener: Any, status: int, said: str) -> None:
    url = site.put("m.npz", b"x", status=status).replace("//", "//me:secret@") + "?sig=hidden"
    with pytest.raises(RemoteError, match=said) as caught:
        opener(url)
    assert "secret" not in str(caught.value)
    assert "hidden" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("opener", [open_remote, open_checkpoint])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_servers(opener: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One error, which shows nothing of the address that is secret; `spool` stays empty."""
    pytest.importorskip("aiohttp")
    for limit, value in (("PATIENCE_S", 0.3), ("_UNSAID_S", 0.3), ("_UNSAID_BYTES", 1 << 20)):
        monkeypatch.setattr(f"weightvid.remote.{limit}", value)
    with (
        server(HOSTILE[name]) as url,
        pytest.raises(RemoteError, match=url) as caught,
        opener(url.replace("//", "//me:password@") + "?sig=hidd)en&exp=1") as file,
    ):
        file.read(2_000_000)
    said = str(caught.value)
    assert len(said) < 500
    assert said.isprintable()
    assert not any(secret in said for secret in ("hidd", "en&exp", "password"))


def test_a_server_that_is_not_there(site: Site) -> None:
    with pytest.raises(RemoteError, match=r"cannot read http://127\.0\.0\.1:1/m"):
        open_remote("http://127.0.0.1:1/m")
    with pytest.raises(RemoteError, match="cannot read"):
        open_checkpoint(site.put("m.npz", DATA, cut=1000))
    with open_remote(site.put("f", DATA * 30)) as file:
        site.files["f"].status = 500
        file.seek(4_500_000)
        with pytest.raises(RemoteError, match="cannot read"):
            file.read(10)


def test_a_checkpoint_is_downloaded_and_removed(site: Site, spool: Path) -> None:
    stages: list[Any] = []
    url = site.put("x/m.safetensors", save(ARRAYS)) + "?sig=1"
    with open_checkpoint(url, stages.append) as reader:
        assert np.array_equal(reader.read("a"), ARRAYS["a"])
        assert reader.location == str(next(spool.iterdir()) / "m.safetensors")
    assert (stages[-1].stage, stages[-1].unit) == ("download", "bytes")
    assert stages[-1].done == len(save(ARRAYS))


def test_what_is_no_checkpoint(site: Site) -> None:
    url = site.put("m.safetensors", save(ARRAYS)[:-50])
    with pytest.raises(CheckpointError, match=f"^{url} is no valid safetensors file"):
        open_checkpoint(url)
    with pytest.raises(CheckpointError, match="it is a web page"):
        open_checkpoint(site.put("m.bin", b"<!doctype html>"))
    with pytest.raises(RemoteError, match="names no file"):
        open_checkpoint(f"{site.url}/folder/")


def test_folders_and_uploads(tmp_path: Path) -> None:
    """fsspec's memory file system stands for an object store."""
    fsspec = pytest.importorskip("fsspec")
    files = fsspec.filesystem("memory")
    files.pipe(
        {
            "/bucket/m/model-1.safetensors": save({"a": ARRAYS["a"]}),
            "/bucket/m/model-2.safetensors": save({"b": ARRAYS["b"]}),
            "/bucket/m/model.safetensors.index.json": index_of(
                {"a": "model-1.safetensors", "b": "model-2.safetensors"}
            ),
            "/bucket/m/config.json": b"{}",
            "/bucket/m/pytorch_model.bin": b"other weights",
            "/bucket/m/.hidden/config.json": b"{}",
            "/bucket/none/readme.txt": b"",
        }
    )
    onnx = pytest.importorskip("onnx")
    graph = onnx.helper.make_graph([], "g", [], [], [onnx.numpy_helper.from_array(WEIGHTS, "w")])
    path, model = tmp_path / "m.onnx", onnx.helper.make_model(graph)
    onnx.save(model, path, save_as_external_data=True, location="w.bin", size_threshold=0)
    for name in ("m.onnx", "w.bin"):
        files.pipe(f"/bucket/onnx/{name}", (tmp_path / name).read_bytes())
    with open_checkpoint("memory://bucket/onnx/m.onnx") as reader:
        assert np.array_equal(reader.read("w"), WEIGHTS)
    with open_checkpoint("memory://bucket/m/") as reader:
        assert {spec.name for spec in reader.contents.tensors} == set(ARRAYS)
        assert [file.path for file in reader.contents.files] == ["config.json"]
        assert reader.contents.skipped == ()
    with pytest.raises(CheckpointError, match=r"holds no weights .*readme\.txt"):
        open_checkpoint("memory://bucket/none")
    (tmp_path / "m.mp4").write_bytes(DATA)
    check_upload("memory://bucket/m.mp4", force=False)
    upload(tmp_path / "m.mp4", "memory://bucket/m.mp4")
    assert files.cat_file("/bucket/m.mp4") == DATA
    check_upload("memory://bucket/m.mp4", force=True)
    for url, said in (
        ("memory://bucket/m.mp4", "exists already; use --force"),
        ("memory://bucket/", "name a file in it"),
        ("https://me:pw@example.org/m.mp4", "cannot write https://example.org/m.mp4: .* read only"),
    ):
        with pytest.raises(OutputError, match=said):
            check_upload(url, force=False)
    files.rm("/bucket", recursive=True)


def test_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(RemoteError, match=r"gs:// addresses .*pip install 'weightvid\[gs\]'"):
        open_remote("gs://b/f")
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(RemoteError, match=r"pip install 'weightvid\[remote\]'"):
        open_remote("https://a.b/f")
    with pytest.raises(RemoteError, match="cannot read xyz://b/f: ValueError: Protocol not known"):
        open_remote("xyz://b/f")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    s3fs = pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        for name, value in {
            "AWS_ENDPOINT_URL": "http://{}:{}".format(*server.get_host_and_port()),
            "AWS_ACCESS_KEY_ID": "me",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }.items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir("models")
        save_file(ARRAYS, tmp_path / "m.safetensors")
        upload(tmp_path / "m.safetensors", "s3://models/m/model.safetensors")
        for url in ("s3://models/m", "s3://models/m/model.safetensors"):
            with open_checkpoint(url) as reader:
                assert np.array_equal(reader.read("b"), ARRAYS["b"])
        with pytest.raises(RemoteError, match="there is no s3://models/gone"):
            open_remote("s3://models/gone")
        with pytest.raises(RemoteError, match="there is no s3://gone/m"):
            upload(tmp_path / "m.safetensors", "s3://gone/m")
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        s3fs.S3FileSystem.clear_instance_cache()
        with pytest.raises(RemoteError, match=r"refused .*set AWS_ACCESS_KEY_ID"):
            open_checkpoint("s3://models/m")
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        server.stop()


@pytest.fixture
def ended() -> Iterator[None]:
    """End the tasks that drivers leave: S3's try again, after pauses drawn from `random`."""
    yield

    async def cancel() -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run_coroutine_threadsafe(cancel(), asyn.get_loop()).result(5)


@pytest.mark.usefixtures("ended")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["silence", "head by the byte"])
@pytest.mark.parametrize("scheme", ["s3", "hf"])
def test_stores_that_never_answer(
    scheme: str, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Their drivers wait for minutes, or for ever."""
    fsspec = pytest.importorskip("fsspec")
    pytest.importorskip({"s3": "s3fs", "hf": "huggingface_hub"}[scheme])
    monkeypatch.setattr("weightvid.remote._CALL_S", 0.3)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "me")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    files, url = fsspec.get_filesystem_class(scheme), f"{scheme}://org/model/m.mp4"
    with server(HOSTILE[name]) as place:
        monkeypatch.setenv("AWS_ENDPOINT_URL", place)
        if scheme == "hf":
            monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", place.rpartition("/")[0])
        files.clear_instance_cache()
        for opener in (open_remote, open_checkpoint):
            with pytest.raises(RemoteError, match=f"cannot read {url}: no end in 0.3 seconds"):
                opener(url)
        if scheme == "s3":
            with pytest.raises(RemoteError, match=f"cannot write {url}: no end in"):
                check_upload(url, force=False)
            with pytest.raises(RemoteError, match=f"cannot write {url}: no end in"):
                upload(__file__, url)
    files.clear_instance_cache()


#: opens what the hub has; importing its client takes a while, so all of it in one process.
SCRIPT = """
import sys
from weightvid.checkpoint import open_checkpoint
from weightvid.remote import open_remote
from weightvid.errors import WeightvidError
with open_checkpoint("hf://org/model@v1") as reader:
    print([s.name for s in reader.contents.tensors], [f.path for f in reader.contents.files])
    print(float(reader.read("b")[3]))
for opener, url in zip((open_checkpoint, open_remote) * 9, sys.argv[1:]):
    try:
        with opener(url) as opened:
            print(url, "opened")
    except WeightvidError as error:
        print(error)
"""

#: addresses that are opened in turns as a checkpoint and as a file, and what is said of them.
HUB = (
    ("hf://org/gone", "there is no hf://org/gone, or it is private: .*HF_TOKEN"),
    ("hf://org/gated/m.mp4", "access is refused .*hf auth login"),
    ("hf://org/model@v9", "has no such revision"),
    ("hf://org/model@v1/gone", "there is no hf://org/model@v1/gone"),
    ("hf://org/model@v1/gone", "there is no hf://org/model@v1/gone; the model has config.json"),
    ("hf://org/model@v1/config.json", "opened"),
)


def test_the_hub(site: Site, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    commit = "0123456789abcdef0123456789abcdef01234567"
    shards = {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}
    files = {
        "config.json": b"{}",
        "pytorch_model.bin": bytes(1000),
        "onnx/model.onnx": bytes(1000),
        "model.safetensors.index.json": index_of(shards),
        **{shards[name]: save({name: array}) for name, array in ARRAYS.items()},
    }
    listed = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
    record = json.dumps({"id": "org/model", "sha": commit, "siblings": listed, "tags": []}).encode()
    site.put("api/models/org/model/revision/v1", record)
    for path, status, code in (
        ("gated", 403, "GatedRepo"),
        ("gone", 401, "RepoNotFound"),
        ("model/revision/v9", 404, "RevisionNotFound"),
    ):
        headers = {"X-Error-Code": code}
        site.put(f"api/models/org/{path}", b"{}", status=status, headers=headers)
    tree = [{"type": "file", "path": n, "size": len(d), "oid": "1"} for n, d in files.items()]
    site.put("api/models/org/model/tree/v1", json.dumps(tree).encode())
    for name, data in files.items():
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hash(data)}"'}
        site.put(f"org/model/resolve/v1/{name}", data, headers=headers)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        "HF_ENDPOINT": site.url,
        "HF_HOME": str(tmp_path / "cache"),
        "PYTHONPATH": str(Path(weightvid.__file__).parents[1]),
    }

    def run(*urls: str, **more: str) -> list[str]:
        command = [sys.executable, "-W", "error", "-c", SCRIPT, *urls]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=environment | more
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    names, value, *said = run(*(url for url, _ in HUB))
    assert (names, float(value)) == ("['a', 'b'] ['config.json']", ARRAYS["b"][3])
    for line, (_, expected) in zip(said, HUB, strict=True):
        assert re.search(expected, line), line
    assert not any("pytorch_model.bin" in asked or "onnx" in asked for asked in site.asked)
    # Once more, from the cache alone.
    asked = len(site.asked)
    *known, said_offline = run("hf://org/other", HF_HUB_OFFLINE="1")
    assert known == [names, value]
    assert re.search("cannot read hf://org/other: .*offline mode is enabled", said_offline)
    assert len(site.asked) == asked

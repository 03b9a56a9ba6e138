"""Checkpoints at addresses, and every verb."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from archives import normal, same
from safetensors.numpy import load_file, save_file
from serving import Site
from typer.testing import CliRunner

from weightvid.checkpoint import open_checkpoint
from weightvid.cli.app import app
from weightvid.errors import CheckpointError, RemoteError
from weightvid.pack import pack_checkpoint
from weightvid.verify import verify_archive

pytest.importorskip("aiohttp")

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def local(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file({"a": normal(1, 80, 90), "b": normal(2, 33)}, path)
    return path


@pytest.mark.parametrize("ranges", [True, False])
def test_pack_from_an_address(
    site: Site, local: Path, ranges: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = tmp_path / "spool"
    spool.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(spool))
    url = site.put("x/model.safetensors", local.read_bytes(), ranges=ranges, cuts=[5000])
    stages = []
    pack_checkpoint(url, tmp_path / "there.mp4", progress=lambda p: stages.append(p.stage))
    pack_checkpoint(local, tmp_path / "here.mp4")
    assert (tmp_path / "there.mp4").read_bytes() == (tmp_path / "here.mp4").read_bytes()
    assert stages[0] == ("survey" if ranges else "download")
    assert not list(spool.iterdir())
    assert verify_archive(tmp_path / "there.mp4", url).ok
    assert not list(spool.iterdir())


def test_shards_by_their_index(site: Site, tmp_path: Path) -> None:
    arrays = {"a": normal(1, 40, 50), "b": normal(2, 30)}
    for name, array in arrays.items():
        save_file({name: array}, tmp_path / f"{name}.safetensors")
        site.put(f"m/{name}.safetensors", (tmp_path / f"{name}.safetensors").read_bytes())
    index = {"weight_map": {name: f"{name}.safetensors" for name in arrays}}
    url = site.put("m/model.safetensors.index.json", json.dumps(index).encode())
    with open_checkpoint(url) as reader:
        assert all(same(reader.read(name), array) for name, array in arrays.items())
    del site.files["m/b.safetensors"]
    with pytest.raises(RemoteError, match=r"there is no .*/m/b\.safetensors"):
        open_checkpoint(url)
    index["weight_map"]["b"] = "../b.safetensors"
    url = site.put("m/model.safetensors.index.json", json.dumps(index).encode())
    with pytest.raises(CheckpointError, match="is no index of shards"):
        open_checkpoint(url)


def test_onnx_with_its_data(site: Site, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    weights = normal(3, 30, 40)
    graph = onnx.helper.make_graph([], "g", [], [], [onnx.numpy_helper.from_array(weights, "w")])
    model = onnx.helper.make_model(graph)
    onnx.save(
        model, tmp_path / "m.onnx", save_as_external_data=True, location="w d", size_threshold=0
    )
    url = site.put("m.onnx", (tmp_path / "m.onnx").read_bytes())
    with pytest.raises(RemoteError, match=r"there is no .*/w%20d"):
        open_checkpoint(url)
    site.put("w d", (tmp_path / "w d").read_bytes())
    with open_checkpoint(url) as reader:
        assert same(reader.read("w"), weights)


def little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 64 << 20})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)


def test_no_room(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "m.npz", a=normal(1, 9, 9))
    little_room(monkeypatch)
    with pytest.raises(CheckpointError, match="has room for 0; set TMPDIR"):
        open_checkpoint(site.put("m.npz", (tmp_path / "m.npz").read_bytes()))


@pytest.mark.parametrize("room", [True, False])
def test_tensors_come_when_they_are_read(
    site: Site, room: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = {name: normal(n, 300, 400) for n, name in enumerate("abc")}
    save_file(arrays, tmp_path / "model.safetensors")
    url = site.put("model.safetensors", (tmp_path / "model.safetensors").read_bytes())
    if not room:
        little_room(monkeypatch)
    with open_checkpoint(url) as reader:
        before = site.sent_bytes
        for _ in range(2):
            assert same(reader.read("b"), arrays["b"])
        assert site.sent_bytes - before == arrays["b"].nbytes * (1 if room else 2)
        asked = len(site.asked)
        for name, array in arrays.items():
            assert same(reader.read(name), array)
        assert len(site.asked) == asked + (2 if room else 3)
        site.files["model.safetensors"].statuses = [404]
        del site.files["model.safetensors"]
        if not room:
            with pytest.raises(RemoteError, match="there is no"):
                reader.read("a")


def test_a_damaged_header(site: Site, local: Path) -> None:
    data = local.read_bytes()
    for damaged in (data[:-50], b"\xff" * 9 + data[9:], data[:5], data[:8] + b"{}" + data[10:]):
        url = site.put("model.safetensors", damaged)
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(url)
        assert str(caught.value).startswith((f"{url} is no valid", f"cannot read {url}"))


def test_many_shards(site: Site, tmp_path: Path) -> None:
    """More than are open at the same time, read in any order."""
    arrays = {f"t{i}": normal(i, 50, 60) for i in range(5)}
    for name, array in arrays.items():
        save_file({name: array}, tmp_path / name)
        site.put(f"{name}.safetensors", (tmp_path / name).read_bytes())
    index = {"weight_map": {name: f"{name}.safetensors" for name in arrays}}
    with open_checkpoint(site.put("m.index.json", json.dumps(index).encode())) as reader:
        for name in ("t4", "t0", "t4", "t2", "t1", "t0", "t3"):
            assert same(reader.read(name), arrays[name])


# The command line


def run(*arguments: object, status: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output
    return result


def test_verbs(site: Site, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run("pack", site.put("some.model.safetensors", local.read_bytes()), "--step", "0.2")
    archive = tmp_path / "some.model.mp4"
    url = site.put("m.mp4", archive.read_bytes())
    told = json.loads(run("inspect", url, "--json").stdout)
    assert (told["archive"], told["detailed"]) == (url, False)
    told = json.loads(run("inspect", url, "--tensors", "--json").stdout)
    assert told["detailed"]
    assert all(tensor["coding"] in ("video", "plain", "exact") for tensor in told["tensors"])
    assert "bits per weight" in run("inspect", url).stdout
    assert "ok" in run("verify", url, "--against", local).stdout
    run("unpack", url, "-o", "out.safetensors")
    assert load_file(tmp_path / "out.safetensors").keys() == {"a", "b"}


@pytest.mark.parametrize("verb", ["inspect", "verify", "unpack", "pack"])
@pytest.mark.parametrize(
    ("served", "said"),
    [
        (None, "there is no"),
        ({"data": b"<!doctype html><html></html>"}, "is a web page"),
        ({"data": b"", "statuses": [403]}, "HTTP 403"),
        ({"data": b"plain text"}, "not a weightvid archive|no checkpoint of a known kind"),
    ],
)
def test_one_line_and_no_output(
    site: Site, verb: str, served: dict[str, Any] | None, said: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    url = f"{site.url}/model" if served is None else site.put("model", **served)
    output = {"unpack": ("-o", "out.safetensors"), "pack": ("-o", "out.mp4")}.get(verb, ())
    result = run(verb, url, *output, status=1)
    lines = result.stderr.splitlines()
    assert len(lines) == 1
    assert re.match(rf"error: .*({said})", lines[0])
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("name", ["m.npz", "m.safetensors"])
def test_an_interrupted_download_leaves_nothing(site: Site, name: str, tmp_path: Path) -> None:
    arrays = {"a": normal(1, 2000, 1000)}
    if name.endswith(".npz"):
        np.savez(tmp_path / name, **arrays)
    else:
        save_file(arrays, tmp_path / name)
    url = site.put(name, (tmp_path / name).read_bytes(), piece_bytes=1000, piece_pause_s=0.02)
    spool, out = tmp_path / "spool", tmp_path / "m.mp4"
    spool.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", "from weightvid.cli import main; main()", "pack", url, "-o", out],
        env={**os.environ, "TMPDIR": str(spool), "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
    )
    while not (len(site.asked) > 2 or site.sent_bytes > 100_000):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == b"interrupted\n"
    assert process.returncode == 130
    assert not list(spool.iterdir())
    assert not list(tmp_path.glob("*.mp4"))
    assert not list(tmp_path.glob(".weightvid*"))

"""The Hugging Face hub, played by a server on loopback; huggingface_hub is the real one."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from archives import normal, packed
from safetensors.numpy import save_file

pytest.importorskip("huggingface_hub")
pytest.importorskip("aiohttp")

ROOT = Path(__file__).resolve().parent.parent.parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class _Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(False)

    def do_GET(self) -> None:
        self._answer(True)

    def _answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(f"{self.command} {path}")
        if "org/gated" in path:
            return self._send(403, b"{}", {"X-Error-Code": "GatedRepo"}, body)
        known = ("/api/models/org/model", "/org/model/resolve/")
        if not path.startswith(known):
            return self._send(401, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
        revision = path.removeprefix(known[1]).partition("/")[0]
        if path.startswith("/api"):
            revision = path.partition("/revision/")[2] or "main"
        if revision not in ("main", "v1", COMMIT):
            return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
        files: dict[str, bytes] = self.server.files
        if path.startswith("/api"):
            siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
            record = {"id": "org/model", "sha": COMMIT, "siblings": siblings, "tags": []}
            return self._send(200, json.dumps(record).encode(), {}, body)
        data = files.get(path.removeprefix(known[1]).partition("/")[2])
        if data is None:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, body)
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
        wanted = self.headers.get("Range")
        if not wanted:
            return self._send(200, data, headers, body)
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        begin, end = int(first), min(int(last or len(data)) + 1, len(data))
        headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(data)}"
        return self._send(206, data[begin:end], headers, body)

    def _send(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.daemon_threads = True
    server.asked = []
    arrays = {"a.weight": normal(1, 90, 80), "b.weight": normal(2, 40, 50)}
    index: dict[str, Any] = {"weight_map": {}}
    server.files = {
        "config.json": b"{}",
        "pytorch_model.bin": bytes(1000),
        "onnx/model.onnx": bytes(1000),
        ".gitattributes": b"",
        "archives/m.mp4": packed(arrays),
        "tokenizer/vocab.txt": b"a\nb\n",
    }
    for number, (name, array) in enumerate(arrays.items(), 1):
        shard = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: array}, tmp_path / "shard")
        server.files[shard] = (tmp_path / "shard").read_bytes()
        index["weight_map"][name] = shard
    server.files["model.safetensors.index.json"] = json.dumps(index).encode()
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


#: runs several verbs in one process (importing the hub's client takes a while).
SCRIPT = """
import json, sys
from typer.testing import CliRunner
from weightvid.cli.app import app
done = [CliRunner().invoke(app, call) for call in json.loads(sys.argv[1])]
print(json.dumps([[d.exit_code, d.stdout, d.stderr] for d in done]))
"""
Run = Callable[..., list[tuple[int, str, str]]]


@pytest.fixture
def run(hub: Any, tmp_path: Path) -> Run:
    """Run verbs with this hub for the real one; exit status, stdout and stderr of each."""

    def call(*calls: tuple[object, ...], **more: str) -> list[tuple[int, str, str]]:
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("HF_")},
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_address[1]}",
            "HF_HOME": str(tmp_path / "cache"),
            "PYTHONPATH": str(ROOT),
            **more,
        }
        texts = json.dumps([[str(argument) for argument in one] for one in calls])
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, texts],
            capture_output=True, text=True, check=False, env=environment, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return [tuple(one) for one in json.loads(done.stdout)]

    return call


REFUSALS = [
    ("pack", "hf://org/gone", "there is no model hf://org/gone, or it is private.*HF_TOKEN"),
    ("pack", "hf://org/model@v9", "has no such revision"),
    ("pack", "hf://org/model/gone.bin", r"there is no hf://org/model/gone\.bin; the model has"),
    ("pack", "hf://org/gated", "is not open to everybody: log in"),
    ("pack", "hf://org/model/archives", "holds no weights that weightvid looks for"),
    ("verify", "hf://org/model", "names a whole model; name a file in it"),
    ("verify", "hf://org/gated/m.mp4", r"HTTP 403 .*hf auth login"),
    ("verify", "hf://org/model/gone.mp4", "there is no hf://org/model/gone.mp4"),
]


def test_models_of_the_hub(hub: Any, run: Run, tmp_path: Path) -> None:
    archive, again, one = (tmp_path / f"{name}.mp4" for name in ("m", "again", "one"))
    shard = "hf://org/model/model-00001-of-00002.safetensors"
    out = tmp_path / "out.mp4"
    first, second, third, *refused = run(
        ("pack", "hf://org/model@v1", "-o", archive, "--json"),
        ("verify", "hf://org/model/archives/m.mp4", "--json"),
        ("pack", shard, "-o", one, "--json"),
        *((verb, url, *(("-o", out) if verb == "pack" else ())) for verb, url, _ in REFUSALS),
    )
    for (status, _, stderr), (_, _, said) in zip(refused, REFUSALS, strict=True):
        assert status == 1
        assert re.fullmatch(rf"error: .*{said}.*\n", stderr), stderr
    assert not out.exists()
    made = json.loads(first[1])
    assert made["side_files"] == ["config.json", "tokenizer/vocab.txt"]
    assert made["weights"] == 90 * 80 + 40 * 50
    assert json.loads(second[1])["ok"]
    assert json.loads(third[1])["weights"] == 90 * 80
    fetched = {line.rpartition("/resolve/")[2] for line in hub.asked}
    assert "v1/config.json" in fetched
    assert fetched.isdisjoint({f"v1/{name}" for name in ("pytorch_model.bin", "onnx/model.onnx")})
    # Once more, from the cache alone.
    offline = run(
        ("pack", "hf://org/model@v1", "-o", again),
        ("pack", "hf://org/other", "-o", tmp_path / "other.mp4"),
        HF_HUB_OFFLINE="1",
    )
    assert [status for status, _, _ in offline] == [0, 1]
    assert again.read_bytes() == archive.read_bytes()
    assert "error: cannot reach the hub for hf://org/other, and its cache" in offline[1][2]

"""The browser's module in headless Chromium and in Node: streams, memory, ranges, layers."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any

import numpy as np
import pytest

from weightvid.demo import logits
from weightvid.loader import Archive, open_archive, to_float32
from weightvid.pack import PackOptions, pack_checkpoint

ROOT = Path(__file__).parents[2]
DEVICE, GOLDEN = ROOT / "weightvid" / "device", ROOT / "data" / "golden"
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
    "",
)

needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")

PAGE = """<!doctype html><script type="module">
import {{ open }} from "./weightvid.js";
const found = {{}};
const hex = async ({{ data }}) => [...new Uint8Array(await crypto.subtle.digest("SHA-256", data))]
  .map((byte) => byte.toString(16).padStart(2, "0")).join("");
for (const name of {names}) {{
  const here = found[name] = {{}};
  try {{
    const streamed = await open(name), whole = await open(await (await fetch(name)).arrayBuffer());
    for (const each of [streamed, whole]) {{
      for await (const t of each) (here[t.name] ??= []).push(await hex(t));
      for (const name of each.names) here[name].push(await hex(await each.tensor(name)));
    }}
  }} catch (error) {{ here.error = String(error); }}
}}
await fetch("found", {{ method: "POST", body: JSON.stringify(found) }});
</script>"""
#: reads archives of layers by a function `open` and one that says where a file is; gives `found`.
LAYERED = """
const hex = async ({ data }) => [...new Uint8Array(await crypto.subtle.digest("SHA-256", data))]
  .map((byte) => byte.toString(16).padStart(2, "0")).join("");
const loaded = async (archive) => {
  const found = {};
  for (const name of archive.names) found[name] = await hex(await archive.tensor(name));
  return found;
};
const streamed = async (archive) => {
  const found = {}, coarse = {};
  let error = "";
  try {
    for await (const each of archive) (each.coarse ? coarse : found)[each.name] = await hex(each);
  } catch (failure) { error = failure.message; }
  return [found, coarse, error];
};
const layers = [], onLayer = (...numbers) => layers.push(numbers);
const whole = await open(await source("progressive.mp4"), { onLayer });
const first = await open(await source("progressive.mp4"), { layers: 1, onLayer });
const update = await open(await source("update.mp4"), { base: whole });
const cut = await open(await source("cut.mp4"));
const found = [await loaded(whole), await loaded(first), await loaded(update),
  await streamed(whole), await streamed(first), await streamed(update), await streamed(cut),
  layers, whole.layers];
for (const archive of [update, whole, first, cut]) archive.close();
"""
FOUND: Queue[Any] = Queue()


class Handler(SimpleHTTPRequestHandler):
    """Answers ranges, except for names that say it does not."""

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        path = Path(self.translate_path(self.path))
        if not wanted or not path.is_file() or "plain" in path.name:
            return super().do_GET()
        first, last = map(int, wanted.groups())
        data = path.read_bytes()
        body = data[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{first + len(body) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        return None

    def do_POST(self) -> None:
        FOUND.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A folder with the module, and its address."""
    folder = tmp_path_factory.mktemp("site")
    for name in ("weightvid.js", "weightvid.wasm", "demo.html"):
        shutil.copy(DEVICE / name, folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def posted(address: str, profile: Path) -> Any:
    """What a page posts when its scripts are done."""
    command = [
        CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        f"--user-data-dir={profile}", address,
    ]  # fmt: skip
    browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        return FOUND.get(timeout=240)
    finally:
        browser.terminate()
        browser.wait()


def expected(archive: Archive) -> dict[str, str]:
    """SHA-256 of each tensor as JavaScript gets it: floats as float32."""
    found = {}
    for name in archive:
        spec, array = archive.spec(name), archive.stored(name)
        if spec.dtype in ("F64", "F16", "BF16"):
            with np.errstate(over="ignore"):
                array = to_float32(array, spec.dtype)
        found[name] = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
    return found


@needs_chromium
def test_every_tensor(site: tuple[Path, str], tmp_path: Path) -> None:
    folder, address = site
    names = ["example", "fields", "hard", "layers", "types", "weights"]
    for name in names:
        shutil.copy(GOLDEN / f"{name}.mp4", folder)
    shutil.copy(GOLDEN / "hard.mp4", folder / "plain.mp4")
    files = [f"{name}.mp4" for name in (*names, "plain")]
    (folder / "all.html").write_text(PAGE.format(names=json.dumps(files)))
    found = posted(f"{address}/all.html", tmp_path)
    for file in files:
        with open_archive(folder / file) as archive:
            wanted = {
                name.encode("utf-8", "replace").decode(): [sha] * 4
                for name, sha in expected(archive).items()
                if "\ud800" not in name
            }
        here = {name: shas for name, shas in found[file].items() if "\ufffd" not in name}
        assert here == wanted, file


def folder_of_layers(folder: Path) -> list[Any]:
    """Files for `LAYERED`, and what it should find."""
    wanted = []
    for name in ("progressive", "update"):
        shutil.copy(GOLDEN / f"{name}.mp4", folder)
    path, cut = folder / "progressive.mp4", folder / "cut.mp4"
    with open_archive(path) as archive:
        assert archive.index is not None
        start = archive.index.frames[-1][0]  # of the last layer's only frame
        wanted.append(expected(archive))
    with open_archive(path, layers=1) as archive:
        wanted.append(expected(archive))
    with open_archive(folder / "update.mp4", base=path) as archive:
        wanted.append(expected(archive))
    with open_archive(path, layers=2) as archive:
        lower = expected(archive)
    cut.write_bytes(path.read_bytes()[: start + 100])
    complete = {name: sha for name, sha in lower.items() if sha == wanted[0][name]}
    coarse = {name: sha for name, sha in lower.items() if name not in complete}
    assert complete
    assert coarse
    early = [complete, coarse, "the file ends early"]
    layers = [[3, 3], [1, 3]]  # the file comes in one piece
    return [*wanted, *([each, {}, ""] for each in wanted), early, layers, 3]


@pytest.mark.skipif(not shutil.which("node"), reason="needs Node")
def test_layers_in_node(tmp_path: Path) -> None:
    wanted = folder_of_layers(tmp_path)
    for name in ("weightvid.js", "weightvid.wasm"):
        shutil.copy(DEVICE / name, tmp_path / name.replace(".js", ".mjs"))
    (tmp_path / "read.mjs").write_text(
        'import { webcrypto as crypto } from "node:crypto";'
        'import { readFile as source } from "node:fs/promises";'
        'import { open, prepare } from "./weightvid.mjs";'
        f'prepare(await source("weightvid.wasm")); {LAYERED} console.log(JSON.stringify(found));'
    )
    command = ["node", "read.mjs"]
    done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert json.loads(done.stdout) == wanted


@needs_chromium
def test_layers_in_chromium(site: tuple[Path, str], tmp_path: Path) -> None:
    folder, address = site
    wanted = folder_of_layers(folder)
    (folder / "layers.html").write_text(
        '<!doctype html><script type="module">import { open } from "./weightvid.js";'
        f"const source = async (name) => name; {LAYERED}"
        'await fetch("found", { method: "POST", body: JSON.stringify(found) });</script>'
    )
    assert posted(f"{address}/layers.html", tmp_path) == wanted


@needs_chromium
def test_demo_reads_digits(site: tuple[Path, str], tmp_path: Path) -> None:
    folder, address = site
    sample = ROOT / "data" / "digits"
    pack_checkpoint(
        sample / "digits_cnn.safetensors",
        folder / "digits.mp4",
        PackOptions(force=True, jobs=1),
    )
    with np.load(sample / "digits_holdout.npz") as data:
        images = data["images"][:20]
    with open_archive(folder / "digits.mp4") as archive:
        scores = logits(dict(archive.items()), images)
    chances = np.exp(scores - scores.max(axis=1, keepdims=True))
    chances /= chances.sum(axis=1, keepdims=True)
    page = (folder / "demo.html").read_text()
    script = (
        "await fetch('found', { method: 'POST', body: "
        "JSON.stringify(IMAGES.map((one) => globalThis.classify(one))) });\n</script>"
    ).replace("IMAGES", json.dumps((images.reshape(20, 64) / 16).tolist()))
    (folder / "digits.html").write_text(page.replace("</script>", script))
    found = posted(f"{address}/digits.html", tmp_path)
    np.testing.assert_allclose(found, chances, atol=1e-4)
    assert (chances.argmax(axis=1) == np.array(found).argmax(axis=1)).all()


@pytest.mark.skipif(
    not (shutil.which("clang") and shutil.which("wasm-ld")),
    reason="needs clang and wasm-ld",
)
def test_the_wasm_is_what_its_sources_make(tmp_path: Path) -> None:
    version = subprocess.run(["clang", "--version"], capture_output=True, text=True, check=True)
    subprocess.run([ROOT / "tools" / "build_wasm", tmp_path / "made.wasm"], check=True)
    made = (tmp_path / "made.wasm").read_bytes()
    assert len(made) < 60_000
    if "clang version 14.0.6" not in version.stdout:
        pytest.skip("another clang than that of the committed file")
    assert made == (DEVICE / "weightvid.wasm").read_bytes()

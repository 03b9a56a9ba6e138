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
from safetensors.numpy import save_file

from weightvid.demo import logits
from weightvid.loader import Archive, open_archive, to_float32
from weightvid.pack import PackOptions, pack_checkpoint

ROOT = Path(__file__).parents[2]
DEVICE, GOLDEN = ROOT / "weightvid" / "device", ROOT / "data" / "golden"
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
    "",
)

needs_node = pytest.mark.skipif(not shutil.which("node"), reason="needs Node")
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
#: what goes wrong, in Node: `said` gives a result or an error; `memory` is of the last module.
MISUSED = """
import { copyFile, utimes } from "node:fs/promises";
let memory, wasm;
const instantiate = WebAssembly.instantiate;
WebAssembly.instantiate = async (...all) => {
  const made = await instantiate(...all);
  if (made.exports?.use_base) ({ memory } = wasm = made.exports); // Node has modules of its own
  return made;
};
const said = async (call) => {
  try { return await call(); } catch (error) { return `${error.name}: ${error.message}`; }
};
const all = async (archive) => {
  const names = [];
  for await (const { name } of archive) names.push(name);
  return names.sort();
};
const file = (name) => source(name + ".mp4");
"""
CLOSED = """
const base = await open(await file("progressive"));
const update = await open(await file("update"), { base });
const late = base.tensor("linear"), array = (await base.tensor("linear")).data;
base.close();
base.close();
const found = [(await late).data.join() === array.join()];
for (const call of [() => base.names, () => base.metadata, () => base.layers,
  () => base.info("linear"), () => base.tensor("linear"), () => all(base),
  () => update.tensor("linear"), () => all(update),
  async () => open(await file("update"), { base })]) found.push(await said(call));
"""
REFUSED = """
const bytes = await file("progressive"), found = [];
for (const layers of [-1, 0, 1.5, "a", NaN, null])
  found.push(await said(() => open(bytes, { layers })));
for (const base of [bytes, "progressive.mp4"]) found.push(await said(() => open(bytes, { base })));
found.push(await said(() => open(new Response("nothing", { status: 404 }))));
"""
FREED = """
const base = await open(await file("progressive")), other = await file("progressive"), found = [];
const twice = async (call) => {
  for (let turn = 0; turn < 10; turn++) await call();
  const bytes = memory.buffer.byteLength;
  for (let turn = 0; turn < 60; turn++) await call();
  return memory.buffer.byteLength - bytes;
};
const stopped = async () => { for await (const { name } of base) if (name === "linear") break; };
const failed = () => said(() => open(other, { base }));
const closed = async () => { (await open(await file("update"), { base })).close(); };
for (const call of [stopped, failed, closed]) found.push(await twice(call));
"""
#: reads a file while less and less memory is left; gives what came of it, each once.
FULL = """
const archive = await open(await file("progressive")), eaten = [], found = {};
const eat = () => { for (let made; (made = wasm.alloc(4000));) eaten.push(made); };
for (let left = 0; left < 120; left++) {
  eat();
  for (let turn = 0; turn < left; turn++) wasm.release(eaten.pop());
  for (const way of [all, async (archive) => (await archive.tensor("linear")).name])
    found[await said(async () => String(await way(archive)))] = 1;
}
"""
REPLACED = """
const found = [];
for (const name of ["tagged", "dated"]) {
  await copyFile("progressive.mp4", name + ".mp4");
  await utimes(name + ".mp4", 1, 1);
  const archive = await open(`${address}/${name}.mp4`);
  found.push((await all(archive)).length, (await archive.tensor("linear")).name);
  await copyFile("other.mp4", name + ".mp4");
  await utimes(name + ".mp4", 1, name === "dated" ? 2 : 1);
  for (const call of [() => archive.tensor("linear"), () => all(archive)])
    found.push((await said(call)).replace(address, ""));
}
"""
FOUND: Queue[Any] = Queue()


class Handler(SimpleHTTPRequestHandler):
    """Answers ranges, but for `plain` names; ends `torn` ones early; has tags for `tagged` ones."""

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        path = Path(self.translate_path(self.path))
        if not wanted and "torn" in path.name:
            self.send_response(200)
            self.send_header("Content-Length", str(path.stat().st_size))
            self.end_headers()
            self.wfile.write(path.with_name("cut.mp4").read_bytes())
            return None
        if not wanted or not path.is_file() or "plain" in path.name:
            return super().do_GET()
        first, last = map(int, wanted.groups())
        data = path.read_bytes()
        body = data[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{first + len(body) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Last-Modified", self.date_time_string(path.stat().st_mtime))
        self.end_headers()
        self.wfile.write(body)
        return None

    def end_headers(self) -> None:
        path = Path(self.translate_path(self.path))
        if "tagged" in path.name:
            self.send_header("ETag", f'"{hashlib.sha256(path.read_bytes()).hexdigest()}"')
        super().end_headers()

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


def in_node(folder: Path, script: str, *flags: str) -> Any:
    """What a script finds that reads files of a folder."""
    for name in ("weightvid.js", "weightvid.wasm"):
        shutil.copy(DEVICE / name, folder / name.replace(".js", ".mjs"))
    (folder / "read.mjs").write_text(
        'import { webcrypto as crypto } from "node:crypto";'
        'import { readFile as source } from "node:fs/promises";'
        'import { open, prepare } from "./weightvid.mjs";'
        f'prepare(await source("weightvid.wasm")); {script} console.log(JSON.stringify(found));'
    )
    command = ["node", *flags, "read.mjs"]
    done = subprocess.run(command, cwd=folder, check=False, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return json.loads(done.stdout)


@needs_node
def test_layers_in_node(tmp_path: Path) -> None:
    wanted = folder_of_layers(tmp_path)
    assert in_node(tmp_path, LAYERED) == wanted


@needs_node
def test_a_download_that_breaks_off_gives_its_coarse_tensors(site: tuple[Path, str]) -> None:
    folder, address = site
    *_, (complete, coarse, _), _, _ = folder_of_layers(folder)
    shutil.copy(folder / "progressive.mp4", folder / "torn.mp4")
    script = LAYERED.replace("cut.mp4", "torn.mp4").replace("source(", "place(")
    script = f"const place = (name) => `{address}/${{name}}`; {script}"
    *found, error = in_node(folder, script)[6]
    assert found == [complete, coarse]
    assert error not in ("", "the file ends early")


@needs_node
def test_a_closed_archive_says_so(tmp_path: Path) -> None:
    folder_of_layers(tmp_path)
    finished, *said = in_node(tmp_path, MISUSED + CLOSED)
    assert finished  # what was being read
    assert said == ["Error: the archive is closed"] * 6 + ["Error: the base is closed"] * 3


@needs_node
def test_wrong_options_are_refused(tmp_path: Path) -> None:
    folder_of_layers(tmp_path)
    refused = "TypeError: layers: a whole number above 0 is wanted, not "
    assert in_node(tmp_path, MISUSED + REFUSED) == [
        *(refused + text for text in ("-1", "0", "1.5", "a", "NaN", "null")),
        *["TypeError: base: an archive that open() gave is wanted"] * 2,
        "Error: the response: the server answered 404",
    ]


@needs_node
def test_memory_is_given_back(tmp_path: Path) -> None:
    folder_of_layers(tmp_path)
    assert in_node(tmp_path, MISUSED + FREED) == [0, 0, 0]


@needs_node
def test_no_tensor_is_lost_without_memory(tmp_path: Path) -> None:
    folder_of_layers(tmp_path)
    found = in_node(tmp_path, MISUSED + FULL, "--wasm-max-mem-pages=32")
    with open_archive(tmp_path / "progressive.mp4") as archive:
        assert found.keys() == {"Error: out of memory", "linear", ",".join(sorted(archive))}


@needs_node
def test_a_file_that_is_replaced_is_noticed(site: tuple[Path, str]) -> None:
    folder, address = site
    data = (GOLDEN / "progressive.mp4").read_bytes()
    (folder / "progressive.mp4").write_bytes(data)
    (folder / "other.mp4").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    found = in_node(folder, f'const address = "{address}"; {MISUSED} {REPLACED}')
    for name, here in (("tagged", found[:4]), ("dated", found[4:])):
        assert here == [11, "linear", *[f"Error: the file at /{name}.mp4 has changed"] * 2]


@needs_node
def test_metadata_may_have_any_key(tmp_path: Path) -> None:
    metadata = {"__proto__": "one", "constructor": "other", "key": "value"}
    save_file({"w": np.ones(3, np.float32)}, tmp_path / "m.safetensors", metadata)
    pack_checkpoint(tmp_path / "m.safetensors", tmp_path / "m.mp4", PackOptions(jobs=1))
    script = 'const found = (await open(await source("m.mp4"))).metadata;'
    assert in_node(tmp_path, script) == metadata


@needs_node
def test_an_archive_without_tensors(tmp_path: Path) -> None:
    save_file({}, tmp_path / "m.safetensors")
    pack_checkpoint(tmp_path / "m.safetensors", tmp_path / "m.mp4", PackOptions(jobs=1))
    script = (
        'const empty = await open(await source("m.mp4")), found = [empty.layers];'
        "for await (const { name } of empty) found.push(name);"
    )
    assert in_node(tmp_path, script) == [1]


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

"""What a comparison leaves behind: files that agree, and a page that works in a browser."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from weightvid.compare.report import write_all
from weightvid.compare.report.results import COLUMNS, Results
from weightvid.compare.row import ERROR, MISSING, Row
from weightvid.errors import OutputError

EVIL = "</script><b>x"


def rows() -> tuple[Row, ...]:
    found = [
        Row("original", "original", "original", {"method": "original"}, file_bytes=32000,
            bits_per_weight=32.0, weights=8000, exact=True, metric=91.0, kl=0.0, agreement=1.0),
        Row("gone 1", "gone", "lossy", {"method": "gone"}, MISSING, "needs more"),
        Row("broken", "broken", "lossy", {"method": "broken"}, ERROR, "fell over"),
        Row(EVIL, EVIL, "baseline", {"method": EVIL}, file_bytes=12000, bits_per_weight=12.0,
            weights=8000, sqnr_db=60.0, worst_sqnr_db=50.0, metric=91.0, kl=1e-6, agreement=1.0),
    ]  # fmt: skip
    for name, scale in (("weightvid", 1.0), ("x264 medium qp", 1.1)):
        for number, sqnr in enumerate((12.0, 17.0, 22.0, 27.0)):
            size = int(1000 * scale * (2 + number))
            found.append(
                Row(f"{name} {number}", name, "pack" if number else "lossy", {"method": name},
                    command=f"weightvid pack m --step {number}", file_bytes=size,
                    items={"packets": size - 9, "header": 9}, bits_per_weight=size / 1000,
                    sqnr_db=sqnr, worst_sqnr_db=sqnr - 1, worst_tensor="w", weights=8000,
                    encode_s=0.5, decode_s=0.1, encode_all_s=0.3, decode_all_s=0.06,
                    encode_peak_bytes=1 << 24, metric=80 + number, kl=0.1 / (number + 1),
                    agreement=0.9)
            )  # fmt: skip
    return tuple(found)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report")
    model = {"path": f"/x/{EVIL}.npz", "sha256": "ab", "weights": 8000, "tensors": 2}
    machine = {"system": "Linux", "release": "6", "processor": "chip", "cores": 2, "python": "3"}
    results = Results(model, machine, "weightvid compare m", rows(), "e.py:f", anchor="weightvid")
    assert [row.label for row in results.failed] == ["broken"]
    assert [row.label for row in results.missing] == ["gone 1"]
    written = write_all(path, results)
    assert {p.name for p in written.values()} == {p.name for p in path.iterdir()}
    return path


def test_json_and_csv_agree(folder: Path) -> None:
    record = json.loads((folder / "results.json").read_text())
    assert record["schema"] == 1
    with (folder / "results.csv").open(newline="") as file:
        reader = csv.DictReader(file)
        lines = list(reader)
        assert tuple(reader.fieldnames or ()) == COLUMNS
    for row, line in zip(record["rows"], lines, strict=True):
        assert line["label"] == row["label"]
        assert line["file_bytes"] == ("" if row["file_bytes"] is None else str(row["file_bytes"]))
        assert line["pareto"] == " ".join(row["pareto"])
    best = next(row for row in record["rows"] if row["label"] == "weightvid 3")
    assert best["pareto"] == ["kl", "metric", "sqnr"]
    bd = record["bd_rate"]["series"]["x264 medium qp"]
    assert {name: round(each["percent"], 6) for name, each in bd.items()} == {
        "kl": 10, "metric": 10, "sqnr": 10,
    }  # fmt: skip


def test_plots(folder: Path) -> None:
    for name in ("sqnr", "metric", "kl"):
        svg = (folder / f"rate_{name}.svg").read_text()
        assert "x264 medium qp" in svg
        assert "bits per weight" in svg
        assert (folder / f"rate_{name}.png").stat().st_size > 10_000


def test_the_page_needs_no_network(folder: Path) -> None:
    page = (folder / "report.html").read_text()
    assert "default-src 'none'" in page
    links = set(re.findall(r"https?://[^\s\"'<>)]+", page))
    assert links <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<(link|img|script|iframe)[^>]+(src|href)=[\"'](?!data:)", page)
    assert EVIL not in page
    assert page.count("</script>") == 2


#: sorts, filters, opens a row, hovers over a point, and says what came of it.
_VISIT = """
<script>
const said = {};
const labels = () => [...document.querySelectorAll("tr.row")].map(r => r.dataset.label);
said.rows = labels().length;
said.points = Number(document.querySelector("#chart svg").dataset.points);
document.querySelector("th button[data-key=file_bytes]").click();
said.smallest = labels()[0];
const search = document.getElementById("search");
search.value = "weightvid 2"; search.dispatchEvent(new Event("input"));
said.filtered = labels();
document.querySelector("tr.row").click();
said.command = document.querySelector("tr.more pre").textContent;
const at = placed.find(p => p.row.label === "weightvid 2");
const box = document.getElementById("chart").getBoundingClientRect();
const svg = document.querySelector("#chart svg");
const scale = svg.viewBox.baseVal.width / box.width;
document.getElementById("chart").dispatchEvent(new PointerEvent("pointermove",
  { clientX: box.left + at.x / scale, clientY: box.top + at.y / scale }));
said.tip = document.getElementById("tip").innerText;
said.shown = getComputedStyle(document.getElementById("tip")).display;
[...document.querySelectorAll("#legend button")].at(-1).click();
said.hidden = Number(document.querySelector("#chart svg").dataset.points);
said.wide = document.documentElement.scrollWidth <= innerWidth;
document.getElementById("zoom").click();
said.everything = Number(document.querySelector("#chart svg").dataset.points);
said.title = document.title;
document.body.replaceChildren(Object.assign(document.createElement("pre"),
  { id: "said", textContent: JSON.stringify(said) }));
</script></body>"""


@pytest.mark.parametrize("size", ["1280,1000", "390,844"])
def test_the_page_in_a_browser(folder: Path, tmp_path: Path, size: str) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs Chromium (Debian: apt-get install chromium)")
    page = (folder / "report.html").read_text()
    visited = tmp_path / "visited.html"
    visited.write_text(page.replace("</body>", _VISIT))
    done = subprocess.run(
        [browser, "--headless=new", "--no-sandbox", "--disable-gpu", f"--window-size={size}",
         f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", visited.as_uri()],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    found = re.search(r'<pre id="said">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found is not None, done.stdout[-2000:]
    said = json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert said["rows"] == 12
    assert said["points"] == 8
    assert said["smallest"] == "weightvid 0"
    assert said["filtered"] == ["weightvid 2"]
    assert said["command"] == "weightvid pack m --step 2"
    assert said["shown"] == "block"
    assert "SQNR 22 dB" in said["tip"]
    assert "4,000 bytes" in said["tip"]
    assert said["hidden"] == 4
    assert said["wide"], "the page is wider than its window"
    assert said["everything"] == 5
    assert said["title"].endswith(f"{EVIL.rpartition('/')[2]}.npz")


def test_files_that_cannot_be_written(folder: Path, tmp_path: Path) -> None:
    from weightvid.compare.report.results import write_json

    results = Results({}, {}, "", rows())
    with pytest.raises(OutputError, match="cannot write"):
        write_json(tmp_path / "absent", results)

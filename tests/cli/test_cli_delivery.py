"""Verbs for what is shipped: fetch, sign, repair, and the order of tensors."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from running import Run
from safetensors.numpy import save_file
from schemas import check
from small_models import weights

from weightvid.loader import open_archive

sys.path.append(str(Path(__file__).parents[1] / "checkpoint"))
from serving import serve


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "m.safetensors"
    names = ("a", "b", "c", "d")
    arrays = {f"{n}.weight": weights(k, 64, 70 + k) for k, n in enumerate(names)}
    save_file({**arrays, "a.bias": weights(8, 64), "b.bias": weights(9, 64)}, path)
    return path


def order(path: Path) -> list[str]:
    with open_archive(path) as archive:
        return [name for name, _ in archive.items()]


def test_the_order_of_tensors(run: Run, model: Path, tmp_path: Path) -> None:
    plain, moved = tmp_path / "plain.mp4", tmp_path / "moved.mp4"
    run("pack", model, "-o", plain)
    run("pack", model, "-o", moved, "--first", "c.*", "--first", "b.*")
    assert order(plain) == [*(f"{n}.weight" for n in "abcd"), "a.bias", "b.bias"]
    assert order(moved) == [*(f"{n}.weight" for n in "cbad"), "b.bias", "a.bias"]
    with open_archive(plain) as one, open_archive(moved, check_tensors=True) as other:
        assert one.header.tensors == other.header.tensors
        assert all((one[name] == other[name]).all() for name in one)
    assert "no tensor matches 'x*'" in run(
        "pack", model, "-o", plain, "-f", "--first", "x*", status=2
    ).output.replace("\n", " ")


def test_parity_and_repair(run: Run, run_json: Run, model: Path, tmp_path: Path) -> None:
    pytest.importorskip("zfec", reason="parity needs zfec")
    path = tmp_path / "m.mp4"
    made = run_json("pack", model, "-o", path, "--parity", "4%")
    whole = path.read_bytes()
    assert made["file_bytes"] == len(whole)
    record = run_json("inspect", path)
    check(record, "inspect")
    assert 0.03 * len(whole) < record["account"]["parity"] <= 0.04 * len(whole)
    assert "parity" in run("inspect", path).stdout
    run("verify", path, "--repair")
    path.write_bytes(whole[:3000] + bytes(200) + whole[3200:])
    assert not run_json("verify", path, status=3)["ok"]
    repaired = tmp_path / "repaired.mp4"
    assert run_json("verify", path, "--repair", "-o", repaired)["ok"]
    assert repaired.read_bytes() == whole
    done = run("verify", path, "--repair")
    assert "bytes from byte 3000 on" in done.output
    assert path.read_bytes() == whole
    assert "0.5 to 20 %" in run("pack", model, "-o", path, "--parity", "50%", status=2).output
    assert "no share" in run("pack", model, "-o", path, "--parity", "much", status=2).output
    run("verify", "-", "--repair", status=2)


def test_repair_without_parity(run: Run, run_json: Run, model: Path, tmp_path: Path) -> None:
    path, copy = tmp_path / "m.mp4", tmp_path / "copy.mp4"
    run("pack", model, "-o", path)
    whole = path.read_bytes()
    assert "the archive is sound" in run("verify", path, "--repair", "-o", copy).stderr
    assert copy.read_bytes() == path.read_bytes() == whole
    assert run_json("verify", path, "--repair")["ok"]
    path.write_bytes(whole[:3000] + bytes(200) + whole[3200:])
    assert "no parity" in run("verify", path, "--repair", status=3).stderr


def test_sign_and_check(run: Run, run_json: Run, model: Path, tmp_path: Path) -> None:
    pytest.importorskip("cryptography", reason="signatures need cryptography")
    sys.path.append(str(Path(__file__).parents[1]))
    from test_sign import new_key

    owner, other = new_key(tmp_path, "owner", ssh=True), new_key(tmp_path, "other")
    path, out = tmp_path / "m.mp4", tmp_path / "out.safetensors"
    run("pack", model, "-o", path)
    check(run_json("sign", path, "--key", owner, "--detached"), "sign")
    signature = tmp_path / "m.mp4.wvsig"
    run("verify", path, "--key", owner.with_suffix(".pub"), "--signature", signature)
    run("verify", path, "--key", owner.with_suffix(".pub"), status=3)
    assert "nobody" in run("inspect", path).stdout
    record = run_json("sign", path, "--key", owner)
    check(record, "sign")
    assert run_json("inspect", path)["signed_by"] == [record["fingerprint"]]
    assert record["fingerprint"] in run("inspect", path).stdout
    run("unpack", path, "-o", out, "--key", owner.with_suffix(".pub"))
    out.unlink()
    run("unpack", path, "-o", out, "--key", other.with_suffix(".pub"), status=3)
    assert not out.exists()
    run("unpack", path, "-o", out, "--signature", signature, status=2)


def test_fetch(
    run: Run, run_json: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("aiohttp", reason="fetch needs the extra remote")
    monkeypatch.chdir(tmp_path)
    run("pack", model, "-o", "m.mp4")
    with serve() as site:
        url = site.put("there.mp4", (tmp_path / "m.mp4").read_bytes())
        check(run_json("fetch", url), "fetch")
        assert (tmp_path / "there.mp4").read_bytes() == (tmp_path / "m.mp4").read_bytes()
        run("fetch", url, status=1)
        run("fetch", url, "--force", "--sha256", "00", status=2)
        run("fetch", url, "--layers", 1, "--sha256", "0" * 64, "-o", "new.mp4", status=2)
        record = run_json("fetch", url, "--force", "--sha256", "0" * 64, status=3)
        check(record, "failure")
        assert record["code"] is None
        text = site.put("text.mp4", b"no archive, but a text")
        assert run_json("fetch", text, "-o", "t.mp4", status=3)["code"] == "ftyp"
        assert run_json("fetch", url, "-o", "b.mp4", "-b", "m.mp4", status=1)["code"] == "base"
        run("fetch", url, "-o", "m.mp4", "-f", "-b", "m.mp4", status=2)
        run("fetch", url, "-o", "-", status=2)
        run("fetch", "s3://bucket/m.mp4", status=2)
        assert not {"-", "t.mp4", "b.mp4", "new.mp4"} & {path.name for path in tmp_path.iterdir()}
        run("fetch", f"{site.url}/absent.mp4", status=4)
        run("fetch", f"{site.url}/", status=2)
        run("fetch", url, "-o", "again.mp4")

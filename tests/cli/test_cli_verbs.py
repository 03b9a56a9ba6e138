"""Each verb: what it writes, prints and returns."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import schemas
import small_models
from running import Run

from weightvid.atomic import ScratchFolder
from weightvid.cli.app import VERBS
from weightvid.loader import open_archive
from weightvid.version import __version__


def test_pack_writes_next_to_the_model_by_default(run: Run, model: Path, tmp_path: Path) -> None:
    source = tmp_path / "net.npz"
    source.write_bytes(model.read_bytes())
    output = run("pack", source).stdout
    for text in ("bits per weight", "worst tensor", "worst row", "% of it video"):
        assert text in output
    with open_archive(tmp_path / "net.mp4") as archive:
        assert archive.index is not None
        assert archive.header.about["recipe"] == "balanced"


def test_pack_json(run_json: Run, model: Path, tmp_path: Path) -> None:
    record = run_json("pack", model, "-o", tmp_path / "m.mp4", "--recipe", "small", "-j", 1)
    schemas.check(record, "pack")
    assert record["archive"] == str(tmp_path / "m.mp4")
    assert record["file_bytes"] == (tmp_path / "m.mp4").stat().st_size
    assert record["bits_per_weight"] == 8 * record["file_bytes"] / record["weights"]


def test_pack_options_reach_the_packer(run: Run, model: Path, tmp_path: Path) -> None:
    run("pack", model, "-o", tmp_path / "c.mp4", "--step", 1.0)
    run("pack", model, "-o", tmp_path / "f.mp4", "--step", 0.1)
    assert (tmp_path / "c.mp4").stat().st_size < (tmp_path / "f.mp4").stat().st_size
    call = ("--integer", "--codec", "x264", "--no-verify", "--keep", "conv.*", "--keep", "half.*")
    run("pack", model, "-o", tmp_path / "i.mp4", *call)
    with open_archive(tmp_path / "i.mp4") as archive:
        levels = archive.levels("embed.weight")
        assert np.array_equal(levels.values * np.float32(levels.step), archive["embed.weight"])
        assert archive.header.about["fidelity"] == "integers"
        assert archive.track.entry == b"avc1"
        coded = {name for name in archive if archive.info(name).parts}
        assert coded == {"embed.weight", "head.weight"}


@pytest.mark.parametrize(
    ("target", "field", "low", "high"),
    [
        ("14kB", "file_bytes", 13_860, 14_000),
        ("4.5bpw", "bits_per_weight", 4.455, 4.5),
        ("22dB", "sqnr_db", 21.9, 22.1),
    ],
)
def test_targets(
    run_json: Run, model: Path, tmp_path: Path, target: str, field: str, low: float, high: float
) -> None:
    record = run_json("pack", model, "-o", tmp_path / "m.mp4", "--target", target)
    schemas.check(record, "pack")
    assert low <= record[field] <= high
    assert record["encodings"] > 1


def test_a_target_out_of_reach(run: Run, model: Path, tmp_path: Path) -> None:
    result = run("pack", model, "-o", tmp_path / "m.mp4", "--target", "1kB", status=1)
    assert result.stderr.startswith("error: 1,000 bytes cannot be reached")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    assert not list(tmp_path.iterdir())


def test_pack_names_what_it_skips(run: Run, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"w": torch.randn(40, 40), "epoch": 3}, tmp_path / "m.pt")
    result = run("pack", tmp_path / "m.pt")
    assert "warning: not packed: epoch" in result.stderr
    assert "epoch" not in result.stdout


def test_unpack(run: Run, run_json: Run, archive: Path, tmp_path: Path) -> None:
    output = tmp_path / "m.safetensors"
    assert "tensors" in run("unpack", archive, "-o", output).stdout
    record = run_json("unpack", archive, "-o", output, "--force")
    schemas.check(record, "unpack")
    assert record["ok"]
    assert record["file_bytes"] == output.stat().st_size


def test_unpack_selection_and_type(run: Run, archive: Path, tmp_path: Path) -> None:
    run("unpack", archive, "-o", tmp_path / "m.npz", "--tensor", "conv.*", "--dtype", "f16")
    with np.load(tmp_path / "m.npz") as found:
        assert set(found) == {"conv.weight", "conv.bias"}
        assert found["conv.weight"].dtype == np.float16


def test_unpack_partial(run: Run, run_json: Run, archive: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.mp4"
    with open_archive(archive) as opened:
        assert opened.index is not None
        cut.write_bytes(archive.read_bytes()[: opened.index.boxes[0][0] + 30])
    assert "cut short" in run("inspect", cut).stderr
    result = run("unpack", cut, "-o", tmp_path / "m.npz", status=3)
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "m.npz").exists()
    record = run_json("unpack", cut, "-o", tmp_path / "m.npz", "--partial", status=3)
    schemas.check(record, "unpack")
    assert not record["ok"]
    with np.load(tmp_path / "m.npz") as found:
        assert "conv.weight" in found
        assert not set(found) & set(record["missing"])
        assert len(set(found) | set(record["missing"])) == len(small_models.small())


def test_a_coarse_model_is_told_from_a_whole_one(run: Run, run_json: Run, tmp_path: Path) -> None:
    np.savez(tmp_path / "m.npz", **small_models.small())
    run("pack", tmp_path / "m.npz", "-o", tmp_path / "m.mp4", "--layers", "2")
    with open_archive(tmp_path / "m.mp4") as opened:
        assert opened.index is not None
        last = opened.index.frames[-1]
    cut = tmp_path / "cut.mp4"
    cut.write_bytes((tmp_path / "m.mp4").read_bytes()[: last[0] + 10])
    record = run_json("unpack", cut, "-o", tmp_path / "c.npz", "--partial", status=3)
    assert not record["ok"]
    assert not record["missing"]
    assert "coarse" in record["defect"]["message"]


def test_a_key_or_a_base_is_no_damage(run: Run, archive: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("no key")
    run("sign", archive, "--key", tmp_path / "key", "-o", tmp_path / "s.mp4", status=1)
    np.savez(tmp_path / "m.npz", **small_models.small())
    update = tmp_path / "u.mp4"
    run("pack", tmp_path / "m.npz", "-o", update, "--base", archive)
    run("unpack", update, "-o", tmp_path / "n.npz", status=1)
    run("unpack", update, "-o", tmp_path / "n.npz", "--base", update, status=1)


def test_inspect(run: Run, run_json: Run, archive: Path) -> None:
    output = run("inspect", archive, "--tensors", "--device").stdout
    for text in (
        "conv.weight", "= embed.weight", "video packets", "HEVC Main", "whole file",
        "full (0 to 255)", "bits per sample", "3x3",
    ):  # fmt: skip
        assert text in output
    record = run_json("inspect", archive)
    schemas.check(record, "inspect")
    assert sum(record["account"].values()) == archive.stat().st_size == record["file_bytes"]
    assert all(type(number) is int for number in record["account"].values())


def test_verify(run: Run, run_json: Run, archive: Path, model: Path) -> None:
    assert "ok" in run("verify", archive).stdout
    record = run_json("verify", archive)
    schemas.check(record, "verify")
    record = run_json("verify", archive, "--against", model)
    schemas.check(record, "verify")
    assert record["comparison"]["sqnr_db"] > 10
    result = run("verify", archive, "--against", model, "--min-sqnr", 90, status=1)
    assert "conv.weight" in result.stdout
    assert "and 90 was asked for" in result.stderr


def test_verify_of_damage(run: Run, run_json: Run, archive: Path, tmp_path: Path) -> None:
    data = bytearray(archive.read_bytes())
    with open_archive(archive) as opened:
        assert opened.index is not None
        offset, size = opened.index.frames[0]
    data[offset + size - 50] ^= 1
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(data)
    result = run("verify", bad, status=3)
    assert "FAILED" in result.stdout
    assert "conv.weight" in result.stderr
    record = run_json("verify", bad, status=3)
    schemas.check(record, "verify")
    assert not record["ok"]
    assert "conv.weight" in record["affected"]
    assert "conv.bias" not in record["affected"]


def test_addresses(run: Run, run_json: Run, model: Path, tmp_path: Path) -> None:
    pytest.importorskip("fsspec")
    address = f"memory://{tmp_path.name}/m.mp4"
    assert run_json("pack", model, "-o", address)["archive"] == address
    assert "exists already" in run("pack", model, "-o", address, status=1).stderr
    record = run_json("inspect", address)
    schemas.check(record, "inspect")
    assert not record["detailed"]
    assert run_json("inspect", address, "--tensors")["detailed"]
    run("verify", address, "--against", model)
    run("unpack", address, "-o", tmp_path / "m.npz")
    run("preview", address, "-o", tmp_path / "p")
    assert (tmp_path / "p" / "frame-0000.png").is_file()


def test_preview(run: Run, run_json: Run, archive: Path, tmp_path: Path) -> None:
    pytest.importorskip("imageio")
    output = run("preview", archive, "-o", tmp_path / "p").stdout
    assert output.split() == [str(tmp_path / "p" / "frame-0000.png")]
    record = run_json("preview", archive, "-o", tmp_path / "q", "--tensor", "conv.weight")
    schemas.check(record, "preview")
    assert Path(record["pictures"][0]).is_file()


def test_kernels(run: Run, archive: Path, tmp_path: Path) -> None:
    pytest.importorskip("imageio")
    call = ("preview", archive, "-o", tmp_path, "--kernels", "--tensor", "conv.weight")
    assert run(*call).stdout.split() == [str(tmp_path / "conv.weight.png")]
    run(*call, "--frames", "0", status=2)


def test_verify_judges_the_outputs(
    run: Run, run_json: Run, archive: Path, model: Path, tmp_path: Path
) -> None:
    script = tmp_path / "judge.py"
    script.write_text("def logits(state):\n    return state['embed.weight'][:, :10] * 10\n")
    call = ("verify", archive, "--against", model, "--eval", f"{script}:logits", "--max-kl")
    record = run_json(*call, 1)
    schemas.check(record, "verify")
    assert 0 < record["comparison"]["divergence"] < 1
    assert "diverge by" in run(*call, 1e-9, status=1).stderr
    run("verify", archive, "--max-kl", 1, status=2)


def test_verify_tells_how_near_batchnorms_are(run: Run, tmp_path: Path) -> None:
    kinds = ("weight", "bias", "running_mean", "running_var")
    norm = {f"bn.{kind}": np.linspace(0.1, 2, 64, dtype=np.float32) for kind in kinds}
    np.savez(tmp_path / "m.npz", **norm)
    run("pack", tmp_path / "m.npz", "-o", tmp_path / "m.mp4", "--recipe", "small")
    shown = run("verify", tmp_path / "m.mp4", "--against", tmp_path / "m.npz").stdout
    assert re.search(r"BatchNorms +gain and offset \d\d\.\d\d dB", shown)


def test_cache(run: Run, run_json: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a killed run has left goes; what a running one needs, and what is not ours, stays."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    old, other = tmp_path / ".weightvid-killed00.tmp", tmp_path / "other"
    with ScratchFolder() as live:
        for folder in (old, other, Path(live)):
            folder.mkdir(exist_ok=True)
            (folder / "m.mp4").write_bytes(bytes(999))
        record = run_json("cache")
        schemas.check(record, "cache")
        mine = [entry for entry in record["entries"] if entry["what"] == "left by a run"]
        assert [(entry["name"], entry["bytes"]) for entry in mine] == [(str(old), 999)]
        assert old.name in run("cache", "--clear").stdout
        assert set(tmp_path.iterdir()) == {other, Path(live)}
    assert "no model" in run("cache", "--forget", "org/absent", status=2).stderr


def test_a_model_is_forgotten_once(
    run_json: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name in ("m", "other"):
        revision = tmp_path / f"models--org--{name}" / "snapshots" / f"0123{name}"
        revision.mkdir(parents=True)
        (revision / "config.json").write_text("{}")
    record = run_json("cache", "--forget", "org/m", "--forget", "org/m")
    assert record["removed"] == ["org/m"]
    assert [path.name for path in tmp_path.iterdir()] == ["models--org--other"]


def test_models_that_are_broken_or_stay(
    run: Run, run_json: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    half, whole = (tmp_path / f"models--org--{name}" for name in ("half", "whole"))
    for path in (half / "blobs" / "ab.incomplete", whole / "snapshots" / "0123" / "config.json"):
        path.parent.mkdir(parents=True)
        path.write_bytes(bytes(999))
    (half / "snapshots" / "0123").mkdir(parents=True)
    (half / "snapshots" / "0123" / "config.json").symlink_to("../../blobs/absent")
    hub = [one for one in run_json("cache")["entries"] if "hub" in one["what"]]
    assert [(one["what"], one["name"], one["bytes"]) for one in hub] == [
        ("broken model of a hub", "org/half", 999), ("model of a hub", "org/whole", 999)
    ]  # fmt: skip
    assert run_json("cache", "--forget", "org/half")["removed"] == ["org/half"]
    assert not half.exists()
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)
    done = run("cache", "--forget", "org/whole", status=1)
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {whole} could not be removed")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(Path(__file__)))
    assert run("cache", status=1).stderr == f"error: {__file__}: Not a directory\n"


def test_demo(run: Run, run_json: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = run_json("demo", "-o", tmp_path)
    schemas.check(record, "demo")
    whole, int8 = record["rows"][:2]
    assert whole["file_bytes"] / 5 < int8["file_bytes"] < whole["file_bytes"] / 4
    assert int8["correct"] >= 445
    rows = {row["name"]: row for row in record["rows"]}
    assert rows["weightvid"]["file_bytes"] < rows["int8+xz"]["file_bytes"]
    assert rows["weightvid"]["correct"] >= rows["fp32"]["correct"] - 3
    assert rows["weightvid small"]["file_bytes"] < 0.75 * rows["weightvid"]["file_bytes"]
    assert rows["weightvid small"]["correct"] >= rows["fp32"]["correct"] - 9
    assert "--force" in run("demo", "-o", tmp_path, status=1).stderr
    monkeypatch.chdir(tmp_path)
    (tmp_path / "-x").symlink_to(tmp_path)
    output = run("demo", "--force", "-o", "-x").stdout
    assert output.count("weightvid ") >= 3 and "weightvid pack YOUR_MODEL" in output
    assert "weightvid inspect ./-x/digits_cnn.mp4" in output


def test_names_from_files_cannot_drive_the_terminal(run: Run, tmp_path: Path) -> None:
    odd = {"evil\x1b[2J\n": small_models.weights(1, 30, 30), "[bold]x": np.zeros(3)}
    path = small_models.pack(odd, tmp_path / "odd.mp4")
    output = run("inspect", path, "-t").stdout
    assert "\x1b" not in output
    assert "evil\\x1b[2J\\n" in output
    assert "[bold]x" in output
    error = run("unpack", path, "-o", tmp_path / "m.npz", "--tensor", "\x1b[2J", status=1).stderr
    assert "\x1b" not in error


def test_json_has_no_infinity(run: Run, tmp_path: Path) -> None:
    path = small_models.pack({"w": small_models.weights(1, 30, 30)}, tmp_path / "w.mp4")
    np.savez(tmp_path / "zero.npz", w=np.zeros((30, 30), np.float32))
    result = run("verify", path, "--against", tmp_path / "zero.npz", "--json", status=1)

    def refuse(constant: str) -> Any:
        raise AssertionError(constant)

    record = json.loads(result.stdout, parse_constant=refuse)
    assert record["comparison"]["tensors"][0]["sqnr_db"] is None


def test_version(run: Run) -> None:
    assert run("--version").stdout == f"weightvid {__version__}\n"


@pytest.mark.parametrize("verb", VERBS)
def test_help_teaches_by_example(run: Run, verb: str) -> None:
    assert f"weightvid {verb} " in run(verb, "--help").stdout.replace("demo\n", "demo ") + " "
    assert verb in run("--help").stdout


def test_what_is_not_there_is_not_praised(run: Run, tmp_path: Path) -> None:
    for name in ("a", "b"):
        np.savez(tmp_path / f"{name}.npz", **{name: np.random.default_rng(0).normal(size=(64, 64))})
    shown = run("pack", tmp_path / "a.npz", "-o", tmp_path / "a.mp4", "--prune", 100).stdout
    assert "next to nothing is left of the weights, 0.0 dB" in shown
    shown = run("verify", tmp_path / "a.mp4", "--against", tmp_path / "b.npz", status=1).stdout
    assert "FAILED" in shown
    assert "SQNR  " not in shown
    assert "largest error" not in shown
    assert run("compare", tmp_path / "c.npz", "-o", tmp_path / "c", status=4)
    assert not (tmp_path / "c").exists()

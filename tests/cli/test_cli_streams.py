"""Pipes, closed streams, odd names, and signals that end a run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from weightvid.loader import open_archive

WEIGHTVID = f"{sys.executable} -m weightvid"


def shell(command: str, folder: Path) -> subprocess.CompletedProcess[bytes]:
    """Run a line of the shell, in which ``weightvid`` is ours."""
    line = command.replace("weightvid ", f"{WEIGHTVID} ")
    return subprocess.run(line, shell=True, cwd=folder, capture_output=True, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in a folder whose name has dots."""
    made = tmp_path_factory.mktemp("streams")
    (made / "Qwen2.5-0.5B").mkdir()
    weights = np.random.default_rng(1).standard_normal((64, 64)).astype("f4")
    path = made / "Qwen2.5-0.5B" / "open_clip_model.safetensors"
    save_file({"w": weights}, path, {"key\x1b[31m": "value\x1b[0m"})
    return made


def test_names_with_dots_and_slashes(folder: Path) -> None:
    done = shell(
        "weightvid pack Qwen2.5-0.5B/ && weightvid unpack Qwen2.5-0.5B.mp4 -o a.b/", folder
    )
    assert done.returncode == 0, done.stderr
    assert [p.name for p in (folder / "a.b").iterdir()] == ["open_clip_model.safetensors"]
    assert shell("weightvid unpack Qwen2.5-0.5B.mp4 -o v1.5", folder).returncode == 0
    assert (folder / "v1.5").is_dir()


def test_pipes(folder: Path) -> None:
    for name in ("-", "/dev/stdout"):
        done = shell(f"weightvid pack Qwen2.5-0.5B -o {name} | cat > {name[-1]}.mp4", folder)
        assert done.returncode == 0, done.stderr
        with open_archive(folder / f"{name[-1]}.mp4") as archive:
            assert list(archive) == ["w"]
    assert shell("weightvid pack Qwen2.5-0.5B -o - --json", folder).returncode == 2
    found = shell("cat ./-.mp4 | weightvid inspect -", folder)
    assert b"key\\x1b[31m" in found.stdout, "no control characters reach the terminal"
    assert b"\x1b" not in found.stdout


PRINTING = """
import subprocess, torch
from safetensors.torch import load_file

class Net(torch.nn.Linear):
    def forward(self, x):
        print("forward")
        return super().forward(x)

def make():
    subprocess.run(["echo", "make"])
    net = Net(64, 64, bias=False)
    net.load_state_dict(load_file("linear.safetensors"))
    return net, torch.randn(50, 64).split(10)
"""


def test_what_a_model_prints_is_no_part_of_the_output(folder: Path) -> None:
    pytest.importorskip("torch", reason="calibration needs the extra 'torch'")
    weights = np.random.default_rng(2).standard_normal((64, 64)).astype("f4")
    save_file({"weight": weights}, folder / "linear.safetensors")
    (folder / "printing.py").write_text(PRINTING)
    line = "weightvid pack linear.safetensors -o - --calibrate printing.py:make > printed.mp4"
    done = shell(line, folder)
    assert done.returncode == 0, done.stderr
    assert {b"make", b"forward"} <= set(done.stderr.split())
    with open_archive(folder / "printed.mp4") as archive:
        assert list(archive) == ["weight"]
    done = shell("weightvid calibrate printing.py:make -o printed.stats --json", folder)
    assert json.loads(done.stdout)["ok"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_behind_stdout(folder: Path) -> None:
    assert shell("weightvid pack Qwen2.5-0.5B -o full.mp4", folder).returncode == 0
    for more in ("", "--json"):
        done = shell(f"weightvid inspect full.mp4 {more} > /dev/full", folder)
        assert (done.returncode, done.stderr) == (1, b"error: No space left on device\n")
    for call in ("--version", "-h"):
        done = shell(f"weightvid {call} > /dev/full", folder)
        assert (done.returncode, done.stderr) == (1, b"error: No space left on device\n")


def test_a_terminal_of_ascii(folder: Path) -> None:
    weights = np.random.default_rng(2).standard_normal((64, 64)).astype("f4")
    save_file({"wärme → 😀": weights}, folder / "u.safetensors")
    calls = (
        "pack u.safetensors -o u.mp4",
        "inspect u.mp4 -t",
        "verify u.mp4 --against u.safetensors",
    )
    for call in calls:
        done = shell(f"PYTHONIOENCODING=ascii weightvid {call}", folder)
        assert done.returncode == 0, done.stderr
        assert b"w\\xe4rme \\u2192" in done.stdout
    found = json.loads(
        shell("PYTHONIOENCODING=ascii weightvid inspect u.mp4 --json", folder).stdout
    )
    assert found["tensors"][0]["name"] == "wärme → 😀"


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&- <&-"])
def test_closed_streams(folder: Path, closed: str) -> None:
    """A file that is opened must not become the standard output."""
    name = f"closed{len(closed)}.mp4"
    assert shell(f"weightvid pack Qwen2.5-0.5B -o {name} {closed}", folder).returncode == 0
    assert shell(f"weightvid inspect {name} --json {closed}", folder).returncode == 0
    with open_archive(folder / name) as archive:
        assert archive["w"].shape == (64, 64)
    if closed == ">&-":
        for place in ("-", "/dev/stdout"):
            lost = shell(f"weightvid pack Qwen2.5-0.5B -o {place} {closed}", folder)
            assert lost.returncode == 1, "the archive went nowhere"
            assert b"it is closed" in lost.stderr


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM, signal.SIGINT])
def test_signals_leave_nothing(folder: Path, number: signal.Signals) -> None:
    """Also while a function of the user judges the model."""
    script = folder / "judge.py"
    script.write_text(
        "import time\ndef judge(state):\n    print('judging', flush=True)\n    time.sleep(60)\n"
    )
    before = sorted(folder.iterdir())
    command = [*WEIGHTVID.split(), "pack", "Qwen2.5-0.5B", "-o", "never.mp4", "--eval"]
    command += ["judge.py:judge", "--max-drop", "1%"]
    # Who runs the tests may ignore the signal (nohup, a job in the background): children inherit.
    handler = signal.signal(number, signal.SIG_DFL)
    try:
        started = subprocess.Popen(command, cwd=folder, stdout=-1, stderr=-1)
    finally:
        signal.signal(number, handler)
    with started as running:
        assert running.stderr is not None
        assert b"judging\n" in running.stderr
        running.send_signal(number)
        running.communicate(timeout=50)
    assert running.returncode == 128 + number
    left = [p for p in folder.iterdir() if p not in before and p.name != "__pycache__"]
    assert left == []

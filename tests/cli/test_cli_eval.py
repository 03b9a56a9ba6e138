"""``pack --eval``."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
import schemas
from running import Run

from weightvid.loader import open_archive

SCRIPT = """
    import numpy as np

    def logits(state):
        print("not for stdout")
        inputs = np.random.default_rng(0).random((40, 80))
        return inputs @ state["embed.weight"].T

    def labelled(state):
        outputs = logits(state)
        return outputs, np.arange(40) % 96

    def number(state):
        return -float(np.abs(state["embed.weight"]).mean())

    def raises(state):
        raise RuntimeError("no data")
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    folder = tmp_path / "scripts"
    folder.mkdir()
    (folder / "judge.py").write_text(textwrap.dedent(SCRIPT))
    return folder / "judge.py"


def test_pack_with_an_evaluation(run_json: Run, model: Path, script: Path, tmp_path: Path) -> None:
    call = ("pack", model, "-o", tmp_path / "m.mp4", "--eval", f"{script}:logits", "--max-kl", 0.01)
    more = ("--eval-budget", 30, "--eval-cache", tmp_path / "cache")
    record = run_json(*call, *more)
    schemas.check(record, schemas.PACK)
    assert 0 < record["loss"] <= 0.01
    assert record["evaluations"] > 3
    assert list((tmp_path / "cache").iterdir())
    with open_archive(tmp_path / "m.mp4") as archive:
        assert "evaluation" in archive.header.about


def test_what_is_shown(run: Run, model: Path, script: Path, tmp_path: Path) -> None:
    call = ("pack", model, "-o", tmp_path / "m.mp4", "--eval", f"{script}:number", "--max-drop")
    more = ("--eval-cache", tmp_path / "cache", "--lower-is-better", "--eval-budget", 20)
    output = run(*call, "1%", *more).stdout
    assert "of the decoded archive" in output
    assert "evaluations" in output
    assert "->" in output


def test_a_loss_out_of_reach(run: Run, model: Path, script: Path, tmp_path: Path) -> None:
    call = ("pack", model, "-o", tmp_path / "m.mp4", "--eval", f"{script}:logits", "--max-kl")
    more = ("--eval-cache", tmp_path / "cache", "--eval-budget", 20)
    result = run(*call, "1e-12", *more, status=1)
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: a KL divergence of 1e-12 at most cannot be reached; the nearest")
    assert result.stdout == ""
    assert not (tmp_path / "m.mp4").exists()


def test_a_function_that_raises(run: Run, model: Path, script: Path, tmp_path: Path) -> None:
    result = run("pack", model, "-o", tmp_path / "m.mp4", "--eval", f"{script}:raises", status=1)
    assert result.stderr == f"error: {script}:raises failed: RuntimeError: no data\n"
    assert not (tmp_path / "m.mp4").exists()


@pytest.mark.parametrize(
    "options",
    [
        ("--max-kl", "0.1"),
        ("--max-drop", "1%"),
        ("--eval-budget", "9"),
        ("--lower-is-better",),
        ("--eval", "{script}:absent"),
        ("--eval", "{script}"),
        ("--eval", "absent.py:logits"),
        ("--eval", "{script}:logits", "--max-drop", "much"),
        ("--eval", "{script}:logits", "--max-kl", "-1"),
        ("--eval", "{script}:logits", "--max-kl", "0.1", "--target-bpw", "3"),
        ("--eval", "{script}:logits", "--rule", "sqnr"),
        ("--eval", "{script}:logits", "--eval-budget", "1"),
    ],
)
def test_wrong_usage(
    run: Run, model: Path, script: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    chosen = [text.format(script=script) for text in options]
    run("pack", model, "-o", tmp_path / "m.mp4", *chosen, status=2)
    assert not (tmp_path / "m.mp4").exists()

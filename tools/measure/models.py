"""Which models a benchmark runs on, from its command line."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from measure.evaluation import Model

MINILM: Final = "minilm_l6"
#: pairs of sentences that rate curves of MiniLM are evaluated on, unless told otherwise.
CURVE_PAIRS: Final = 300


@dataclass(frozen=True, slots=True)
class Source:
    """A model that can be loaded: its name, checkpoint and evaluation script."""

    name: str
    checkpoint: Path
    script: Path

    def load(self, samples: int | None) -> Model:
        """Read the checkpoint and evaluate the original."""
        return Model(self.name, self.checkpoint, self.script, samples)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that name models, and those that every benchmark has."""
    add = parser.add_argument
    add("--eval-dir", type=Path, help="folder of NAME/model.safetensors with NAME/eval.py")
    add("--models", nargs="+", metavar="NAME", help="only these of its models")
    add("--minilm", type=Path, metavar="SAFETENSORS", help=f"weights for its {MINILM}/eval.py")
    add("--model", nargs=3, action="append", default=[], metavar=("NAME", "CHECKPOINT", "SCRIPT"))
    add("--cache", type=Path, help="folder that keeps finished points")
    add("--out", type=Path, default=Path("tools/results"), help="folder for the results")


def sources(options: argparse.Namespace) -> list[Source]:
    """The models of a command line."""
    found = list(_found(options))
    if not found:
        raise SystemExit("no model found: give --eval-dir, --minilm or --model")
    return found


def _found(options: argparse.Namespace) -> Iterator[Source]:
    if options.eval_dir is not None:
        for script in sorted(options.eval_dir.glob("*/eval.py")):
            name = script.parent.name
            checkpoint = script.parent / "model.safetensors"
            if name == MINILM and options.minilm is not None:
                checkpoint = options.minilm
            if checkpoint.is_file() and (not options.models or name in options.models):
                yield Source(name, checkpoint, script)
    for name, checkpoint, script in options.model:
        yield Source(name, Path(checkpoint), Path(script))


def shown_command(tool: str, options: argparse.Namespace, extra: str = "") -> str:
    """The command that makes the results, without the paths of this machine."""
    parts = [f"python tools/{tool}"]
    if options.eval_dir is not None:
        parts.append("--eval-dir EVAL")
        if options.models:
            parts.append("--models " + " ".join(options.models))
        if options.minilm is not None:
            parts.append("--minilm MINILM.safetensors")
    parts += [f"--model {name} CHECKPOINT SCRIPT" for name, _, _ in options.model]
    return " ".join([*parts, extra]).strip()

"""Evaluates restored models, in a process of its own that outlives the points.

``python -m weightvid.compare.judge FUNCTION`` imports the function once. Each line on its standard
input is a JSON request; for each it writes the file that the request names, and answers with a
line. It ends with its standard input.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from weightvid.compare import evaluate
from weightvid.compare.coded import Tensors
from weightvid.errors import WeightvidError
from weightvid.planning.function import Function, load_function


@dataclass(frozen=True, slots=True)
class Question:
    """A restored model to be judged.

    Attributes
    ----------
    tensors : str
        File with the restored tensors, by number.
    names : list of str
        Name of each number.
    aliases : dict of str to str
        Tied names.
    original : str
        File with the original's outcome.
    is_original : bool
        The model is the original, and its outcome is to be kept there.
    result : str
        File for the verdict.
    """

    tensors: str
    names: list[str]
    aliases: dict[str, str]
    original: str
    is_original: bool
    result: str


def save_tensors(path: Path, tensors: Tensors) -> None:
    """Write restored tensors for a judge."""
    arrays: dict[str, Any] = {str(n): array for n, array in enumerate(tensors.values())}
    np.savez(path, **arrays)


def _load_tensors(question: Question) -> Tensors:
    with np.load(question.tensors, allow_pickle=False) as stored:
        found = {name: stored[str(n)] for n, name in enumerate(question.names)}
    return found | {alias: found[name] for alias, name in question.aliases.items()}


def answer(function: Function, question: Question) -> Mapping[str, Any]:
    """Judge a model.

    Raises
    ------
    WeightvidError
    """
    after = evaluate.run(function, _load_tensors(question))
    path = Path(question.original)
    if question.is_original:
        evaluate.save(path, after)
    return asdict(evaluate.judge(evaluate.load(path), after, function.name))


def main(name: str) -> None:
    """Answer every question."""
    # What functions print, by whatever means, must not look like an answer.
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)
    function: Function | None = None
    for line in sys.stdin:
        question = Question(**json.loads(line))
        found: Mapping[str, Any]
        try:
            function = function or load_function(name)
            found = answer(function, question)
        except (WeightvidError, OSError, MemoryError) as error:
            found = {"status": "error", "message": str(error) or type(error).__name__}
        Path(question.result).write_text(json.dumps(found), encoding="utf-8")
        answers.write("done\n")
        answers.flush()
    # Threads of some libraries must not keep it alive.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])

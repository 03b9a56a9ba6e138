"""Options of ``pack`` that name a target."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from weightvid.cli.options import usage_error

if TYPE_CHECKING:
    from weightvid.pack import Evaluation, Target

Size = Annotated[
    str | None,
    typer.Option(
        "--target-size", metavar="SIZE", help="Whole file, at most and nearly: 900kB, 12MB, 4MiB."
    ),
]
Rate = Annotated[
    float | None,
    typer.Option(
        "--target-bpw",
        metavar="BITS",
        help="Bits per weight of the whole file, at most and nearly.",
    ),
]
Sqnr = Annotated[
    float | None,
    typer.Option(
        "--target-sqnr", metavar="DB", help="SQNR of all quantized weights, to 0.1 decibel."
    ),
]
MaxDrop = Annotated[
    str | None,
    typer.Option(
        metavar="SHARE",
        help="Relative loss of the metric, at most: 0.5% or 0.005. Needs [bold]--eval[/bold].",
    ),
]
MaxKl = Annotated[
    float | None,
    typer.Option(
        metavar="NATS",
        help="Divergence of the outputs, at most: mean KL of logits, 1 - mean cosine of unit "
        "vectors. Needs [bold]--eval[/bold].",
    ),
]
Eval = Annotated[
    str | None,
    typer.Option(
        "--eval",
        metavar="FUNCTION",
        help="module:function or script.py:function that judges a dict of tensors: it returns a "
        "number, logits, (logits, labels) or unit vectors. It is run as Python code: call only "
        "what you trust.",
    ),
]
LowerIsBetter = Annotated[
    bool, typer.Option("--lower-is-better", help="The number that --eval returns is a loss.")
]
Budget = Annotated[
    int | None,
    typer.Option(
        "--eval-budget", min=3, metavar="N", help="Calls of --eval; default: 11 a tensor, or so."
    ),
]
EvalCache = Annotated[
    Path | None,
    typer.Option(
        "--eval-cache",
        metavar="FOLDER",
        help="Where results of --eval are kept, so that a search can be resumed; default: the "
        "user's cache folder.",
    ),
]


def chosen(options: Mapping[str, str | float | None]) -> Target | None:
    """The target that the options name, by the names of the options; one at most."""
    from weightvid.errors import QuantizationError
    from weightvid.pack import Target
    from weightvid.planning.target import parse_share, parse_size

    given = [(name, value) for name, value in options.items() if value is not None]
    if not given:
        return None
    if len(given) > 1:
        usage_error("one target at a time", " / ".join(name for name, _ in given))
    name, value = given[0]
    parse: dict[str, Callable[[str], float]] = {
        "--target-size": parse_size,
        "--max-drop": parse_share,
    }
    try:
        number = parse.get(name, float)(str(value))
        return Target(_KINDS[name], number)
    except QuantizationError as error:
        usage_error(str(error), name)


@dataclass(frozen=True, slots=True)
class Measuring:
    """What the options say of an evaluation besides its function."""

    lower_is_better: bool
    budget: int | None
    cache: Path | None


def evaluation(
    function: str | None, more: Measuring, target: Target | None, rule: str | None
) -> Evaluation | None:
    """The evaluation that the options name."""
    from weightvid.errors import EvaluationError
    from weightvid.pack import Evaluation
    from weightvid.planning.function import load_function

    if function is None:
        if target is not None and target.measured:
            usage_error("only an evaluation can judge that: give --eval", f"--max-{target.kind}")
        if more != Measuring(False, None, None):
            usage_error("there is no --eval", "--lower-is-better / --eval-budget / --eval-cache")
        return None
    if rule == "sqnr":
        usage_error("the rule sqnr and an evaluation exclude each other", "--rule")
    try:
        loaded = load_function(function)
    except EvaluationError as error:
        usage_error(str(error), "--eval")
    return Evaluation(loaded, more.lower_is_better, more.cache, more.budget)


_KINDS: Final = {
    "--target-size": "size",
    "--target-bpw": "bpw",
    "--target-sqnr": "sqnr",
    "--max-drop": "drop",
    "--max-kl": "kl",
}

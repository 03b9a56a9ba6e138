"""``weightvid calibrate``: what a model's layers see, for smaller archives."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weightvid.cli import output
from weightvid.cli.options import Force, Json, usage_error
from weightvid.errors import WeightvidError

if TYPE_CHECKING:
    from weightvid.calibration import CalibrationStats

_MODULE = "weightvid_calibration_script"


def calibrate(
    script: Annotated[
        str,
        typer.Argument(
            metavar="SCRIPT:FUNCTION",
            help="A Python file, and a function in it that takes nothing and returns a torch "
            "module and an iterable of example inputs.",
        ),
    ],
    stats: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="STATS", help="The statistics (.safetensors)."),
    ] = Path("stats.safetensors"),
    memory: Annotated[
        int,
        typer.Option(min=1, metavar="MB", help="Limit of one pass; more layers take more passes."),
    ] = 1024,
    force: Force = False,
    json: Json = False,
) -> None:
    """Run a model on a few hundred example inputs and keep what its layers see.

    No labels and no training. Packing with the statistics gives a smaller archive at the same
    fidelity. The script is run as Python code: call only what you trust.

    [bold]weightvid calibrate script.py:examples -o stats.safetensors[/bold]
    [bold]weightvid pack model.safetensors --calibration stats.safetensors[/bold]
    """
    if stats.exists() and not force:
        usage_error(f"{stats} exists; --force replaces it", "--output")
    function = _load(script)
    try:
        from weightvid.calibrate import CalibrationConfig
        from weightvid.calibrate import calibrate as run
    except ImportError as error:
        raise WeightvidError(
            f"calibrating needs PyTorch ({error}); install it with: pip install 'weightvid[torch]'"
        ) from None
    given = function()
    if not isinstance(given, tuple) or len(given) != 2:
        usage_error("the function must return two things: a module and its inputs", "SCRIPT")
    module, inputs = given
    config = CalibrationConfig(memory_bytes=memory << 20)
    with output.progress_bars() as report:
        made = run(module, inputs, config=config, progress=report)
    made.save(stats, force=force)
    for note in made.notes:
        output.warn(note)
    _show(made, stats, json)


def _load(script: str) -> Callable[[], Any]:
    """The function that a script defines."""
    name, colon, wanted = script.rpartition(":")
    if not (colon and name and wanted.isidentifier()):
        usage_error(f"{script!r} is not of the form script.py:function", "SCRIPT")
    path = Path(name)
    if not path.is_file():
        usage_error(f"{path} is no file", "SCRIPT")
    spec = importlib.util.spec_from_file_location(_MODULE, path)
    if spec is None or spec.loader is None:
        usage_error(f"{path} is no Python file", "SCRIPT")
    module = importlib.util.module_from_spec(spec)
    # As if it were run: its folder can be imported from, and its classes can be pickled.
    sys.modules[_MODULE] = module
    sys.path.insert(0, str(path.resolve().parent))
    spec.loader.exec_module(module)
    function = getattr(module, wanted, None)
    if not callable(function):
        usage_error(f"{path} defines no function {wanted!r}", "SCRIPT")
    made: Callable[[], Any] = function
    return made


def _show(made: CalibrationStats, path: Path, json: bool) -> None:
    rows = [
        {
            "name": name,
            "kind": "inputs" if moments.counts is None else "embedding",
            "rows": moments.rows,
            "gain_db": moments.gain_db,
            "used": moments.useful,
        }
        for name, moments in made.tensors.items()
    ]
    if json:
        output.emit_json(
            {
                "stats": str(path),
                "file_bytes": path.stat().st_size,
                "model_sha256": made.model_sha256,
                "samples": made.samples,
                "tensors": rows,
                "notes": list(made.notes),
            }
        )
        return
    used = [moments for moments in made.tensors.values() if moments.useful]
    gains = sorted(m.gain_db for m in used if m.gain_db is not None)
    facts = [
        ("statistics", str(path)),
        ("size", output.size(path.stat().st_size)),
        ("samples", output.count(made.samples)),
        ("tensors", f"{len(used)} of {len(made.tensors)} profit"),
    ]
    if gains:
        middle = gains[len(gains) // 2]
        facts.append(
            ("output error", f"{middle:.1f} dB less (median; {gains[0]:.1f} to {gains[-1]:.1f})")
        )
    output.facts(facts)

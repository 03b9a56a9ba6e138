"""``weightvid calibrate``: what a model's layers see, for smaller archives."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from weightvid.cli import output
from weightvid.cli.examples import load_examples
from weightvid.cli.options import Force, Json, TrustInputs, usage_error

if TYPE_CHECKING:
    from weightvid.calibration import CalibrationStats


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
    trust_inputs: TrustInputs = False,
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
    module, inputs = load_examples(script, "SCRIPT")
    from weightvid.calibrate import CalibrationConfig
    from weightvid.calibrate import calibrate as run

    config = CalibrationConfig(memory_bytes=memory << 20, trust_inputs=trust_inputs)
    with output.progress_bars() as report:
        made = run(module, inputs, config=config, progress=report)
    made.save(stats, force=force)
    for note in made.notes:
        output.warn(note)
    _show(made, stats, json)


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

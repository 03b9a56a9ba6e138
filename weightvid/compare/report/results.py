"""``results.json`` and ``results.csv``."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, Final

from weightvid.atomic import atomic_output
from weightvid.compare.analysis import Quality, bd_rates, pareto, qualities, series
from weightvid.compare.bd import BdRate
from weightvid.compare.row import ERROR, MISSING, Row
from weightvid.version import __version__

#: of results.json; grows when a key changes its meaning.
SCHEMA: Final = 1
#: columns of results.csv, in order.
COLUMNS: Final = (
    "label", "series", "kind", "status", "message", "file_bytes", "bits_per_weight", "exact",
    "sqnr_db", "worst_sqnr_db", "worst_tensor", "metric", "metric_change", "kl", "cosine_loss",
    "agreement",
    "encode_weights_per_s", "decode_weights_per_s", "encode_all_weights_per_s",
    "decode_all_weights_per_s", "codec_encode_s", "codec_decode_s", "encode_peak_bytes",
    "decode_peak_bytes", "timing", "pareto", "command",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Results:
    """A finished comparison.

    Attributes
    ----------
    model : mapping
        Path, SHA-256, weights, tensors.
    machine : mapping
    command : str
        What a shell runs to get all of it again.
    rows : tuple of Row
    evaluation : str or None
    lower_is_better : bool
    anchor : str
        Curve that BD-rates are taken against.
    seconds : float
    """

    model: Mapping[str, Any]
    machine: Mapping[str, Any]
    command: str
    rows: tuple[Row, ...]
    evaluation: str | None = None
    lower_is_better: bool = False
    anchor: str = ""
    seconds: float = 0.0
    measures: tuple[Quality, ...] = field(init=False)
    fronts: Mapping[str, frozenset[str]] = field(init=False)
    bd: Mapping[str, Mapping[str, BdRate]] = field(init=False)

    def __post_init__(self) -> None:
        measures = tuple(qualities(self.rows, self.lower_is_better))
        object.__setattr__(self, "measures", measures)
        fronts = {q.name: pareto(self.rows, q) for q in measures}
        object.__setattr__(self, "fronts", fronts)
        known = series(self.rows)
        found = bd_rates(self.rows, self.anchor, measures) if self.anchor in known else {}
        object.__setattr__(self, "bd", found)

    @property
    def front(self) -> frozenset[str]:
        """Labels of the Pareto front over the measure that tells most."""
        return self.fronts[self.measures[0].name] if self.measures else frozenset()

    @property
    def failed(self) -> tuple[Row, ...]:
        """Points that were not measured though this machine has what they need."""
        return tuple(row for row in self.rows if row.status == ERROR)

    @property
    def missing(self) -> tuple[Row, ...]:
        """Points that this machine lacks something for."""
        return tuple(row for row in self.rows if row.status == MISSING)

    def record(self) -> dict[str, Any]:
        """As results.json has it."""
        found: dict[str, Any] = plain(
            {
                "schema": SCHEMA,
                "weightvid": __version__,
                "command": self.command,
                "model": self.model,
                "machine": self.machine,
                "evaluation": self.evaluation,
                "lower_is_better": self.lower_is_better,
                "seconds": round(self.seconds, 1),
                "rows": [row.record() | {"pareto": self._fronts_of(row)} for row in self.rows],
                "bd_rate": {
                    "anchor": self.anchor,
                    "interpolation": "pchip",
                    "series": {
                        name: {measure: asdict(bd) for measure, bd in each.items()}
                        for name, each in self.bd.items()
                    },
                },
            }
        )
        return found

    def _fronts_of(self, row: Row) -> list[str]:
        return [name for name, front in self.fronts.items() if row.label in front]


def plain(value: Any) -> Any:
    """For JSON, which has no infinities."""
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def write_json(folder: Path, results: Results) -> Path:
    """Write ``results.json``.

    Raises
    ------
    OutputError
    """
    return write(folder / "results.json", json.dumps(results.record(), indent=1).encode())


def write_csv(folder: Path, results: Results) -> Path:
    """Write ``results.csv``: one line for each row.

    Raises
    ------
    OutputError
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for record in results.record()["rows"]:
        writer.writerow(record | {"pareto": " ".join(record["pareto"])})
    return write(folder / "results.csv", text.getvalue().encode())


def write(path: Path, data: bytes) -> Path:
    """Write a file whole, in place of an older one.

    Raises
    ------
    OutputError
    """
    with atomic_output(path, force=True) as file:
        file.write(data)
    return path


def shown(rows: Sequence[Row]) -> list[Row]:
    """Rows in the order of tables: by kind and curve as first met, then by size."""
    kinds = list(dict.fromkeys(row.kind for row in rows))
    curves = list(dict.fromkeys(row.series for row in rows))
    return sorted(
        rows, key=lambda r: (kinds.index(r.kind), curves.index(r.series), r.file_bytes or 0)
    )

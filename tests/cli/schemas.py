"""Objects that ``--json`` prints, held against docs/cli.schema.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema

SCHEMA = json.loads(
    (Path(__file__).parents[2] / "docs" / "cli.schema.json").read_text(encoding="utf-8")
)


def check(value: Any, name: str) -> None:
    """Fail with the place at which an object breaks the schema of a verb, or of a ``failure``."""
    jsonschema.validate(value, {"$ref": f"#/$defs/{name}", "$defs": SCHEMA["$defs"]})

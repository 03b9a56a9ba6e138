"""Checking the fields of JSON records, one way for all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weightvid.errors import FormatError, QuantizationError
from weightvid.quantize.params import Params, params_from_dict


def bad(what: str, why: str) -> FormatError:
    """A FormatError about a record that parses as JSON but not as what it should be."""
    return FormatError(f"{what} is malformed: {why}", code="schema")


def integer(value: object, low: int, high: int, what: str) -> int:
    """``value`` if it is an int in low..high."""
    if type(value) is not int or not low <= value <= high:
        raise bad(what, f"expected an integer in {low}..{high}, found {str(value)[:40]!r}")
    return value


def items(value: object, limit: int, what: str) -> list[Any]:
    """``value`` if it is a list of at most ``limit`` items."""
    if not isinstance(value, list) or len(value) > limit:
        raise bad(what, f"expected a list of at most {limit} items")
    return value


def mapping(value: object, what: str) -> dict[str, Any]:
    """``value`` if it is a JSON object."""
    if not isinstance(value, dict):
        raise bad(what, "expected a JSON object")
    return value


def exactly(value: object, count: int, what: str) -> list[Any]:
    """``value`` if it is a list of just so many items."""
    found = items(value, count, what)
    if len(found) != count:
        raise bad(what, f"expected {count} items")
    return found


def parse_params(record: Mapping[str, Any], what: str) -> Params:
    """Quantizer parameters among the keys of a record."""
    try:
        return params_from_dict(record)
    except QuantizationError as error:
        raise FormatError(f"{what} is malformed: {error}", code="quantizer") from None

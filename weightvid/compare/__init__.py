"""Ways of storing a model, measured next to each other: archives, codecs, plain ways, peers."""

from weightvid.compare.curves import Goal, parse_goal
from weightvid.compare.report import write_report
from weightvid.compare.rows import Row
from weightvid.compare.run import CompareOptions, CompareResult, compare, missing

__all__ = [
    "CompareOptions",
    "CompareResult",
    "Goal",
    "Row",
    "compare",
    "missing",
    "parse_goal",
    "write_report",
]

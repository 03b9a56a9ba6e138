"""The command line. Verbs live in one file each; what they need is imported when they run."""

from __future__ import annotations

from weightvid.cli.app import main

__all__ = ["main"]

"""The command line. Verbs live in one file each, which is imported when the verb is called."""

from __future__ import annotations

from weightvid.cli.app import main

__all__ = ["main"]

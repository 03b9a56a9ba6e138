"""Golden archives of the format, and the generated parts of FORMAT.md.

Golden archives of a released format never change; ``--add`` makes those that are missing, and
``--write`` makes those of a format under work anew.
``--document`` renews the tables and the dump in FORMAT.md. In any case it says which archives
today's packer and encoder would make otherwise, which is no fault; outdated parts of FORMAT.md are.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def golden() -> Any:
    """The module of the tests that knows the archives."""
    sys.path.insert(0, str(ROOT / "tests"))
    return importlib.import_module("independent.golden")


def main() -> int:
    """Run the tool; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="make the golden archives anew")
    parser.add_argument("--add", action="store_true", help="make those that are not there")
    parser.add_argument("--document", action="store_true", help="renew the parts of FORMAT.md")
    options = parser.parse_args()
    module = golden()
    if options.write or options.add:
        module.write(anew=options.write)
    if options.document:
        text = module.DOCUMENT.read_text(encoding="utf-8")
        module.DOCUMENT.write_text(module.generated(text), encoding="utf-8")
    for name, make in module.MAKERS.items():
        path = module.FOLDER / f"{name}.mp4"
        same = path.is_file() and path.read_bytes() == make()
        print(f"{name}: {'as made now' if same else 'differs from what would be made now'}")
    text = module.DOCUMENT.read_text(encoding="utf-8")
    if text != module.generated(text):
        print("FORMAT.md: its generated parts are out of date")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""``python -m weightvid`` is the ``weightvid`` command."""

from weightvid.cli import main

if __name__ == "__main__":
    main()

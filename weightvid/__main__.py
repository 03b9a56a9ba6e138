"""``python -m weightvid``: the command line."""

from weightvid.cli import main

if __name__ == "__main__":
    main()

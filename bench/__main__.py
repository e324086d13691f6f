"""`python -m bench`: `racecar bench` from a source tree that is not installed."""

from __future__ import annotations

import sys

from racecar.cli import app


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; its exit status."""
    try:
        app(["bench", *(sys.argv[1:] if arguments is None else arguments)], prog_name="racecar")
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    return 0


if __name__ == "__main__":
    sys.exit(main())

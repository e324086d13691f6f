"""`python -m racecar`, the same as the `racecar` command."""

from .cli import app

if __name__ == "__main__":
    app(prog_name="racecar")

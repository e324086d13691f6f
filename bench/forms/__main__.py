"""`python -m bench.forms`: the forms of one product, shape by shape, in ms; * marks the one that the backend takes.

One thread and the least of several runs in its own CPU time, so that a busy machine disturbs little. The bounds in
`racecar_kernels` that name this command come from its tables.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from racecar.bench import machine
from racecar_kernels import extension

from . import image, joined, undone
from .timing import Table, Timed, check, least

TABLES = {"forms": undone.TABLE, "few": image.FEW_TABLE, "first": image.FIRST_TABLE, "joined": joined.TABLE}
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
MISSED = 1.1  # times the fastest form's time, from which on a choice is remarked on


def measure(name: str, table: Table, dtype: torch.dtype, rounds: int) -> Iterator[list[Timed]]:
    """The rows of one shape after the other."""
    for shape in table.shapes:
        words, found = table.describe(*shape), []
        for row in table.rows(dtype, *shape):
            with image.lifted():
                check(row)
                found.append(Timed(name, words, row.what, least(row.forms, rounds), row.chosen))
        yield found


def line(row: Timed) -> str:
    cells = ", ".join(f"{name} {ms:.2f}{'*' if name == row.chosen else ''}" for name, ms in row.ms.items())
    return f"  {row.what:<22} {cells}" + (f"   ({row.missed:.1f} times the fastest)" if row.missed > MISSED else "")


def progress(words: str) -> None:
    """Overwrites the last line of a terminal."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{words}", end="", file=sys.stderr, flush=True)


def from_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number from 1 is needed, got {text!r}")
    return int(text)


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.forms", description=__doc__)
    parser.add_argument("--only", choices=TABLES, help="; ".join(f"{name}: {t.title}" for name, t in TABLES.items()))
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of all tensors (default: float32)")
    parser.add_argument("--rounds", type=from_one, default=7, help="runs of each form; the least counts (default: 7)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write every time to this file")
    given = parser.parse_args(arguments)
    if given.json is not None and not given.json.absolute().parent.is_dir():
        parser.error(f"--json: {given.json} cannot be written, its folder does not exist")
    missing = extension.why_not()
    if missing and any(TABLES[name].needs_extension for name in chosen(given)):
        parser.error(f"few and first need the C++ extension: {missing}; take --only forms or --only joined")
    return given


def chosen(given: argparse.Namespace) -> list[str]:
    return list(TABLES) if given.only is None else [given.only]


def main(arguments: Sequence[str] | None = None) -> None:
    given = options(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    every: list[Timed] = []
    for name in chosen(given):
        table = TABLES[name]
        print(f"{name}: {table.title}; {given.dtype}, ms")
        progress(f"{name}: shape 1 of {len(table.shapes)}")
        for done, found in enumerate(measure(name, table, DTYPES[given.dtype], given.rounds), 1):
            progress("")
            print(f"{found[0].shape}:", *map(line, found), sep="\n", flush=True)
            progress(f"{name}: {done} of {len(table.shapes)} shapes done")
            every += found
        progress("")
    missed = sum(row.missed > MISSED for row in every)
    print(f"{missed} of {len(every)} choices take over {MISSED} times the fastest form's time")
    if given.json is not None:
        rows = [row.as_json() for row in every]
        settings = {"dtype": given.dtype, "rounds": given.rounds}
        given.json.write_text(json.dumps({**machine.facts(), **settings, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

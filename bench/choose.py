"""`python -m bench.choose RESULTS.json...`: the chooser's table, from the rows of layers that `make gpu` has measured.

The table, `racecar_kernels/gpu/measured.py`, says by architecture in which shape classes and passes a kernel of
Triton or CUDA was the fastest form (`racecar_kernels/gpu/chooser.py`). An architecture that a file holds rows of
replaces what the table, or a file named before, says of it; the others stay. Rows that are flagged wrong are left out.
The JSON of `python -m bench.layers` is taken as well. Nothing is written where any file is of no use.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from racecar_kernels.gpu import chooser, measured

Row = dict[str, Any]
Table = dict[str, frozenset[str]]

EMPTY = "Not yet measured on a GPU: the table is empty, and everything goes to the library."
FILLED = "By architecture, shape classes and passes in which a Triton or CUDA kernel was the fastest form, as measured."
WRITTEN = "Written by `python -m bench.choose` from what `make gpu` measures; `gpu/chooser.py` says what it means."
TIMES = {f"{form}_us": 0.0 for form in chooser.FORMS}


class ResultsError(Exception):
    """A file that no table can be made of; the message names it."""


def rows_in(path: Path) -> tuple[list[Row], int]:
    """The rows of all steps of kind layers that are right, and how many are wrong. Raises ResultsError."""
    try:
        report = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ResultsError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise ResultsError(f"{path} is no JSON: {error}") from None
    try:
        steps = [s for s in report["steps"].values() if s.get("kind") == "layers"] if "steps" in report else [report]
        rows = [row for step in steps for row in step.get("rows", [])]
        dry = report.get("dry_run") or any(row.get("architecture") == "interpreter" for row in rows)
    except (AttributeError, KeyError, TypeError):
        raise ResultsError(f"{path} is no JSON of `make gpu` or `python -m bench.layers`") from None
    if dry:
        raise ResultsError(f"{path} is of a dry run: its figures are the interpreter's, and mean nothing")
    if not rows:
        raise ResultsError(f"{path} has no rows of layers; `make gpu OUT=dir ARGS='--only layers'` measures them")
    right = [row for row in rows if not row.get("wrong")]
    if not right:
        raise ResultsError(f"{path}: every row is wrong, the first one: {rows[0].get('why')}")
    return right, len(rows) - len(right)


def table_of(path: Path, rows: list[Row]) -> tuple[Table, Table]:
    """By architecture the classes in which a kernel of Triton or CUDA was the fastest form, and all that have one."""
    try:
        timed = [row for row in rows if any(row.get(time) is not None for time in TIMES)]
        winning = [{**row, **TIMES, "library_us": 1.0} for row in timed]  # names every class, whatever was measured
        faster, known = chooser.faster(timed), chooser.faster(winning)
    except (AttributeError, KeyError, TypeError) as error:
        raise ResultsError(f"{path} has a row of another layout: {type(error).__name__} {error}") from None
    if not known:
        raise ResultsError(f"{path} has no row with a time of a fused kernel")
    return faster, known


def table_in(path: Path) -> Table:
    """What a module written by `module` holds. The file is parsed, not run. Raises ResultsError."""
    try:
        body = ast.parse(path.read_text("utf-8")).body
        values = [n.value for n in body if isinstance(n, ast.AnnAssign) and ast.unparse(n.target) == "FASTER"]
        found = ast.literal_eval(values[0])  # type: ignore[arg-type]
        return {architecture: frozenset(names) for architecture, names in found.items()}
    except (OSError, SyntaxError, ValueError, IndexError, AttributeError, TypeError):
        raise ResultsError(f"{path} holds no table that this command has written, and is left as it is") from None


def module(table: Mapping[str, frozenset[str]]) -> str:
    """Python source, formatted as ruff does it: the same for the same table."""
    lines = [f'"""{FILLED if table else EMPTY}', "", WRITTEN, '"""', "", "from __future__ import annotations", ""]
    if not table:
        return "\n".join([*lines, "FASTER: dict[str, list[str]] = {}", ""])
    lines.append("FASTER: dict[str, list[str]] = {")
    for architecture in sorted(table):
        names = [f'        "{name}",' for name in sorted(table[architecture])]
        lines += [f'    "{architecture}": [', *names, "    ],"] if names else [f'    "{architecture}": [],']
    return "\n".join([*lines, "}", ""])


def _counted(faster: frozenset[str], known: frozenset[str]) -> str:
    """Classes by who was the fastest in them. A class is known once by name, whichever form was measured."""
    cuda = sum(name.startswith(chooser.FORMS["cuda"]) for name in faster)
    of = f"of {len(known)} classes the library is the slower one in {len(faster)}"
    return f"{of}: {len(faster) - cuda} go to Triton's kernels, {cuda} to CUDA's"


def parser() -> argparse.ArgumentParser:
    described = argparse.ArgumentParser(prog="python -m bench.choose", description=(__doc__ or "").split("\n\n")[0])
    described.add_argument("results", type=Path, nargs="+", metavar="RESULTS.json", help="what `make gpu` has written")
    described.add_argument("--out", type=Path, default=Path(measured.__file__), help="default: the package's own table")
    return described


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        table = table_in(options.out) if options.out.exists() else {}
        said = []
        for path in options.results:
            rows, wrong = rows_in(path)
            faster, known = table_of(path, rows)
            table |= faster
            said += [f"{path}: {wrong} wrong rows are left out"] if wrong else []
            said += [f"{path}: {name}: {_counted(faster[name], known[name])}" for name in sorted(known)]
    except ResultsError as error:
        print(f"{error}; nothing is written", file=sys.stderr)
        return 2
    unfinished = options.out.with_suffix(".py.part")
    try:
        unfinished.write_text(module(table), "utf-8")
        unfinished.replace(options.out)
    except OSError as error:
        print(f"{options.out}: {error.strerror or error}; nothing is written", file=sys.stderr)
        return 2
    print("\n".join([*said, f"written: {options.out}"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""CONTRIBUTING.md draws the layers of `racecar_kernels`: every module has its place, and imports nothing above it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import racecar_kernels

FOLDER = Path(racecar_kernels.__file__).parent
DRAWING = Path(__file__).parents[1] / "CONTRIBUTING.md"


def rows() -> dict[str, int]:
    """Module or package, such as `.gpu`, to the number of its row, counted from above."""
    drawn = DRAWING.read_text("utf-8").split("## Layers")[1].split("\nNames with a dot")[0]
    rows = drawn.split("\n       │\n")
    return {name: i for i, row in enumerate(rows) for name in re.findall(r"(?<!\S)\.([a-z_.]*[a-z_])", row)}


def imported(path: Path) -> Iterator[str]:
    """Modules that a file imports, wherever in it, by their path from the package."""
    package = path.relative_to(FOLDER).parent.parts
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            yield from (".".join(filter(None, [*base, name.name])) for name in node.names)


def row_of(name: str, known: dict[str, int]) -> int | None:
    """Of the module itself, else of what it is in; None: of no module."""
    while name and name not in known:
        name = name.rpartition(".")[0]
    return known.get(name)


def test_nothing_imports_what_is_above_it() -> None:
    known, wrong = rows(), []
    for path in sorted(FOLDER.rglob("*.py")):
        name = ".".join(path.relative_to(FOLDER).with_suffix("").parts).removesuffix(".__init__")
        if name == "__init__":
            continue
        own = row_of(name, known)
        assert own is not None, f"{name} has no place in {DRAWING.name}"
        for other in imported(path):
            row = row_of(other, known)
            wrong += [f"{name} imports {other}"] if row is not None and row < own else []
    assert wrong == []


def test_what_is_drawn_is_there() -> None:
    assert len(rows()) > 20
    for name in rows():
        path = FOLDER / name.replace(".", "/")
        assert path.is_dir() or path.with_suffix(".py").is_file(), name

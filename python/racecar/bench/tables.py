"""Measured networks as text and Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from .steps import Measured, Result


class MarksError(ValueError):
    """A Markdown file without the two marks between which text is to be put."""


def table(measured: Measured) -> str:
    """Plain text: times in ms (20th to 80th percentile), bytes in MB, the three ratios and the least possible one."""
    wide = max((len(r.contestant) for r in measured.results), default=24)
    titles = f"{'ms per step':>24} {'x Std':>7} {'least':>6} {'kept MB':>9} {'x Std':>7} {'peak MB':>9} {'x Std':>7}"
    head = f"{'':{wide}} {titles}"
    lines = [measured.heading, head, "-" * len(head)]
    for r in measured.results:
        spread = f"{r.time.median * 1e3:.2f} ({r.time.p20 * 1e3:.2f}-{r.time.p80 * 1e3:.2f})"
        lines.append(
            f"{r.contestant:{wide}} {spread:>24} {r.time_ratio.median:7.2f} {_least(r):>6} {r.kept / 1e6:9.3f} "
            f"{r.kept_ratio:7.2f} {r.peak / 1e6:9.3f} {r.peak_ratio:7.2f}"
        )
    lines += [f"{name}: not measured, {reason}" for name, reason in measured.skipped.items()]
    return "\n".join(lines)


def markdown(measured: Measured) -> str:
    """The ratios of `table` as a Markdown table, for the documentation."""
    rows = [
        [r.contestant, f"{r.time_ratio.median:.2f}", _least(r), f"{r.kept_ratio:.2f}", f"{r.peak_ratio:.2f}"]
        for r in measured.results
    ]
    return markdown_table([measured.heading, "step", "least", "kept", "peak"], rows)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells as a Markdown table."""
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells in columns, the first aligned to the left and the others to the right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        first, *others = (
            f"{c:{'<' if i == 0 else '>'}{w}}" for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join([first, *others]).rstrip()

    return "\n".join([line(head), "-" * (sum(widths) + 2 * (len(widths) - 1)), *map(line, rows)])


def check_marks(path: Path, name: str) -> None:
    """Raises MarksError where `path` cannot be filled in by `write_between_marks`."""
    _replaced(path, name, "")


def write_between_marks(path: Path, name: str, text: str) -> None:
    """Replaces what `path` has between its line `<!-- NAME:begin ...` and its line `<!-- NAME:end -->`.

    Raises:
        MarksError: it has no such lines, or there is no such file.
    """
    path.write_text(_replaced(path, name, text), encoding="utf-8")


def _replaced(path: Path, name: str, text: str) -> str:
    begin, end = f"<!-- {name}:begin", f"<!-- {name}:end -->"
    try:
        old = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MarksError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    pattern = rf"(^{begin}[^\n]*\n).*?(^{end})"
    new, count = re.subn(pattern, lambda m: f"{m[1]}\n{text}\n\n{m[2]}", old, flags=re.DOTALL | re.MULTILINE)
    if count != 1:
        raise MarksError(f"{path} needs one line that begins with {begin!r}, and a line {end!r} after it")
    return new


def _least(result: Result) -> str:
    return "" if result.least is None else f"{result.least:.2f}"

"""The report's frame: style sheet, skeleton and blocks. It follows the reader's light or dark setting and a phone."""

from __future__ import annotations

from html import escape
from string import Template

from ..analysis.pictures import Row
from .images import data_uri
from .results import Results

# The colours of the six models differ in lightness as well as in hue: they stay apart for colour-blind eyes too.
# Each has a contrast of at least 3 to the card it is drawn on.

STYLE = """
:root { color-scheme: light dark; --page: #f6f6f4; --card: #fff; --ink: #1d1f23; --quiet: #5d636d; --line: #e2e2de;
  --c0: #6b6f76; --c1: #1065bc; --c2: #790e2c; --c3: #10a15c; --c4: #3523dc; --c5: #b45a00; }
@media (prefers-color-scheme: dark) { :root { --page: #131417; --card: #1c1e22; --ink: #e9e9e6; --quiet: #a2a7b0;
  --line: #33363c; --c0: #b4b8bf; --c1: #78b7fd; --c2: #f83574; --c3: #1ff26c; --c4: #896dfc; --c5: #e8891a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "Noto Sans", sans-serif; -webkit-text-size-adjust: 100%; }
main { max-width: 1000px; margin: 0 auto; padding: 28px 16px 48px; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .6em; }
h2 { font-size: 1.15rem; margin: 0 0 .7em; }
h3 { font-size: .95rem; margin: .2em 0; color: var(--quiet); }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px;
  margin-top: 18px; }
p { margin: .4em 0; max-width: 78ch; }
.note, .quiet, small { color: var(--quiet); }
.note { font-size: .875rem; margin-top: .9em; max-width: 92ch; } .note + .note { margin-top: .5em; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .5rem .7rem; border-bottom: 1px solid var(--line); white-space: nowrap;
  vertical-align: top; }
thead th { font-size: .82rem; font-weight: 600; color: var(--quiet); }
th:first-child { text-align: left; padding-left: 0; } tr > :last-child { padding-right: 2px; }
tbody th { font-weight: 600; }
tbody tr:last-child > * { border-bottom: 0; }
td small, th small { display: block; font-weight: 400; font-size: .78rem; }
th small { white-space: normal; max-width: 23em; }
.clear { color: var(--ink); font-weight: 600; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(340px, 100%), 1fr)); gap: 14px 36px; }
.dot { display: inline-block; width: .65em; height: .65em; border-radius: 50%; margin-right: .45em;
  background: var(--ink); }
.dot.c0 { background: var(--c0); } .dot.c1 { background: var(--c1); } .dot.c2 { background: var(--c2); }
.dot.c3 { background: var(--c3); } .dot.c4 { background: var(--c4); } .dot.c5 { background: var(--c5); }
.heat { display: inline-block; min-width: 3.2em; padding: .05em .4em; border-radius: 4px;
  background: color-mix(in srgb, var(--ink) calc(var(--h) * 35%), transparent); }
.pictures { display: grid; gap: 10px; }
.row { display: grid; grid-template-columns: 7.5em 1fr; align-items: center; gap: 10px; font-size: .875rem; }
.row small { display: block; }
.cells { display: grid; grid-template-columns: repeat(10, 1fr); gap: 4px; }
.cells img { width: 100%; display: block; border-radius: 2px; image-rendering: pixelated; }
.legend { display: flex; flex-wrap: wrap; gap: .2em 1.4em; font-size: .875rem; position: sticky; top: 0; margin: 0;
  padding: .4em 0; max-width: none; background: var(--card); }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(270px, 1fr)); gap: 14px 18px;
  margin-top: .6em; }
svg { width: 100%; max-width: 440px; height: auto; display: block; }
svg .t { font-size: 12.5px; font-weight: 600; fill: var(--ink); }
svg .n { font-size: 11px; fill: var(--quiet); }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg .seed, svg .mean { fill: none; stroke-linejoin: round; stroke-linecap: round; }
svg .seed { stroke-width: 1; opacity: .3; } svg .mean { stroke-width: 2.2; }
svg .c0 { stroke: var(--c0); } svg .c1 { stroke: var(--c1); } svg .c2 { stroke: var(--c2); }
svg .c3 { stroke: var(--c3); } svg .c4 { stroke: var(--c4); } svg .c5 { stroke: var(--c5); }
dl { display: grid; grid-template-columns: 7em 1fr; gap: .45em 1em; margin: 0; font-size: .875rem; }
dt { color: var(--quiet); } dd { margin: 0; overflow-wrap: anywhere; }
code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: .95em; }
@media (max-width: 640px) { main { padding: 18px 10px 32px; } section { padding: 14px 12px; } h1 { font-size: 1.35rem; }
  .row { grid-template-columns: 1fr; gap: 3px; } .row small { display: inline; margin-left: .6em; }
  .cells { gap: 2px; } dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .6em; }
  th, td { padding: .5rem .35rem; } thead th { white-space: normal; vertical-align: bottom; } }
@media (max-width: 780px) { .cards thead { display: none; } /* every model a card of its own */
  .cards, .cards tbody, .cards tr, .cards th, .cards td { display: block; }
  .cards tbody tr + tr { margin-top: 1em; } .cards tbody th { padding: 0 0 .3em; }
  .cards td { padding: .3em 0; white-space: normal; } .cards td br { display: none; }
  .cards td::before { content: attr(data-label); color: var(--quiet); float: left; }
  .cards tbody tr:last-child > td { border-bottom: 1px solid var(--line); } }
"""

# The empty icon keeps a browser from asking a server for one.
PAGE = Template(
    f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>$title</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>$title</h1>
$lead
$sections
</main>
</body>
</html>
"""
)


def section(title: str, *parts: str) -> str:
    """A titled part of the page; empty where there is nothing to show."""
    body = "\n".join(part for part in parts if part)
    return f"<section><h2>{escape(title)}</h2>\n{body}\n</section>" if body else ""


def note(*sentences: str) -> str:
    """A paragraph below a figure or table, from the sentences that are not empty; they are HTML."""
    text = " ".join(sentence for sentence in sentences if sentence)
    return f'<p class="note">{text}</p>' if text else ""


def table(title: str, head: list[str], rows: list[tuple[str, list[str]]], *, cards: bool = False) -> str:
    """A table of the models.

    Args:
        title: what it shows, for a reader who hears the page.
        head: the columns' names, as text.
        rows: (label, cells), all of them HTML.
        cards: on a phone every row becomes a card, with one line per cell: for cells too wide to stand side by side.
    """
    body = []
    for label, cells in rows:
        # On a card, where the head of the table is hidden, the name of the column stands in front of the figure.
        labelled = "".join(f'<td data-label="{escape(c)}">{cell}</td>' for c, cell in zip(head, cells, strict=True))
        body.append(f'<tr><th scope="row">{label}</th>{labelled}</tr>')
    titles = "".join(f'<th scope="col">{escape(column)}</th>' for column in ("model", *head))
    return (
        f'<div class="wide"><table aria-label="{escape(title)}"{" class=cards" if cards else ""}>'
        f"<thead><tr>{titles}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def model_label(results: Results, name: str, *, title: bool = False) -> str:
    """A model's colour and name, and what it is."""
    place = list(results.models).index(name)
    small = f"<small>{escape(results.models[name])}</small>" if title else ""
    return f'<i class="dot c{place}"></i>{escape(name)}{small}'


def picture_grid(rows: list[Row], *, what: str) -> str:
    """Rows of images; what: what an image is, for a reader who hears the page, "reconstructed image"."""
    parts = []
    for row in rows:
        cells = "".join(f'<img alt="" src="{data_uri(row.colour(image))}">' for image in row.images)
        details = "".join(f"<small>{escape(detail)}</small>" for detail in row.details)
        spoken = escape(f"{row.label}: {what}, {len(row.images)} of them")
        parts.append(
            f'<div class="row"><span>{escape(row.label)}{details}</span>'
            f'<div class="cells" role="img" aria-label="{spoken}">{cells}</div></div>'
        )
    return f'<div class="pictures">{"".join(parts)}</div>'

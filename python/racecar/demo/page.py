"""The report's frame: style sheet and skeleton. It follows the reader's light or dark setting and a phone's width."""

from __future__ import annotations

from string import Template

STYLE = """
:root { color-scheme: light dark; --page: #f6f6f4; --card: #fff; --ink: #1d1f23; --quiet: #5d636d; --line: #e2e2de;
  --c0: #8a6d1f; --c1: #0b67b8; --c2: #b3316f; --c3: #2e7d4f; --c4: #6b4fb3; --c5: #a8451c; }
@media (prefers-color-scheme: dark) { :root { --page: #131417; --card: #1c1e22; --ink: #e9e9e6; --quiet: #a2a7b0;
  --line: #33363c; --c0: #e0bb5a; --c1: #6db6ff; --c2: #f08ab8; --c3: #76cf9b; --c4: #b7a0f5; --c5: #f29a71; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "Noto Sans", sans-serif; -webkit-text-size-adjust: 100%; }
main { max-width: 1000px; margin: 0 auto; padding: 28px 16px 48px; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .6em; }
h2 { font-size: 1.15rem; margin: 0 0 .7em; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px;
  margin-top: 18px; }
p { margin: .4em 0; max-width: 78ch; }
.note, .quiet, small { color: var(--quiet); }
.note { font-size: .875rem; margin-top: .9em; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .5em .7em; border-bottom: 1px solid var(--line); white-space: nowrap;
  vertical-align: top; }
thead th { font-size: .82rem; font-weight: 600; color: var(--quiet); }
th:first-child { text-align: left; padding-left: 0; }
tbody th { font-weight: 600; }
tbody tr:last-child > * { border-bottom: 0; }
td small, th small { display: block; font-weight: 400; font-size: .78rem; }
.dot { display: inline-block; width: .65em; height: .65em; border-radius: 50%; margin-right: .45em;
  background: var(--ink); }
.dot.c0 { background: var(--c0); } .dot.c1 { background: var(--c1); } .dot.c2 { background: var(--c2); }
.dot.c3 { background: var(--c3); } .dot.c4 { background: var(--c4); } .dot.c5 { background: var(--c5); }
.pictures { display: grid; gap: 10px; }
.row { display: grid; grid-template-columns: 7.5em 1fr; align-items: center; gap: 10px; font-size: .875rem; }
.cells { display: grid; grid-template-columns: repeat(10, 1fr); gap: 4px; }
.cells img { width: 100%; display: block; border-radius: 2px; image-rendering: pixelated; }
.legend { display: flex; flex-wrap: wrap; gap: .2em 1.4em; font-size: .875rem; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(270px, 1fr)); gap: 14px 18px;
  margin-top: .6em; }
svg { width: 100%; max-width: 440px; height: auto; display: block; }
svg .t { font-size: 12.5px; font-weight: 600; fill: var(--ink); }
svg .n { font-size: 11px; fill: var(--quiet); }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg .seed, svg .mean { fill: none; stroke-linejoin: round; stroke-linecap: round; }
svg .seed { stroke-width: 1; opacity: .4; } svg .mean { stroke-width: 2.2; }
svg .c0 { stroke: var(--c0); } svg .c1 { stroke: var(--c1); } svg .c2 { stroke: var(--c2); }
svg .c3 { stroke: var(--c3); } svg .c4 { stroke: var(--c4); } svg .c5 { stroke: var(--c5); }
dl { display: grid; grid-template-columns: 7em 1fr; gap: .45em 1em; margin: 0; font-size: .875rem; }
dt { color: var(--quiet); } dd { margin: 0; overflow-wrap: anywhere; }
code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: .95em; }
@media (max-width: 640px) { main { padding: 18px 10px 32px; } section { padding: 14px 12px; } h1 { font-size: 1.35rem; }
  .row { grid-template-columns: 1fr; gap: 3px; } .cells { gap: 2px; } dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: .6em; }
  thead { display: none; } table, tbody, tr, th, td { display: block; } /* every model a card of its own */
  tbody tr + tr { margin-top: 1em; } tbody th { padding: 0 0 .3em; }
  td { display: flex; gap: .6em; padding: .3em 0; } td::before { content: attr(data-label); color: var(--quiet);
  margin-right: auto; } tbody tr:last-child > td { border-bottom: 1px solid var(--line); } }
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

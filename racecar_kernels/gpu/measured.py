"""Not yet measured on a GPU: the table is empty, and everything goes to the library.

Written by `python -m bench.choose` from what `make gpu` measures; `gpu/chooser.py` says what it means.
"""

from __future__ import annotations

FASTER: dict[str, list[str]] = {}

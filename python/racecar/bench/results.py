"""Results as a file: what was measured, on what, and whether an interrupted run can be taken up again."""

from __future__ import annotations

import datetime
import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .steps import Measured


class ResultsError(ValueError):
    """A file that holds no results of `racecar bench`, or those of something else; the message is one sentence."""


@dataclass
class Report:
    """Everything of one run.

    Attributes:
        machine: what `machine.facts` found.
        settings: the options that the figures depend on (rounds, tiny inputs, contestants ...).
        networks: name -> what was measured, in order.
        dtype: of parameters and input.
        date: when the run began, in UTC.
    """

    machine: dict[str, Any]
    settings: dict[str, Any]
    networks: dict[str, Measured] = field(default_factory=dict)
    dtype: str = "float32"
    date: str = field(
        default_factory=lambda: datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    )

    @property
    def where(self) -> str:
        """One line: processor and threads, or GPU and dtype; versions, commit."""
        facts = self.machine
        unsure = {name: facts.get(name, "unknown") for name in ("processor", "threads", "torch", "commit")}
        line = "{processor}, {threads} threads, PyTorch {torch}, commit {commit}".format(**unsure)
        if "gpu" in facts:
            how = f"{self.dtype}, multiplied as TF32" if self.dtype == "float32" else self.dtype
            line = f"{facts['gpu']['name']}, {how}, PyTorch {unsure['torch']}, commit {unsure['commit']}"
        return f"{line}, {self.date[:10]}" if self.date else line

    def write(self, path: Path) -> None:
        """All or nothing: an interruption leaves the file as it was."""
        text = json.dumps(
            {
                "date": self.date,
                "machine": self.machine,
                "dtype": self.dtype,
                "quick": bool(self.settings.get("quick", False)),
                "settings": self.settings,
                "networks": {name: measured.as_json() for name, measured in self.networks.items()},
            },
            indent=2,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + ".part")
        unfinished.write_text(text + "\n", encoding="utf-8")
        unfinished.replace(path)


def why_not_writable(path: Path) -> str | None:
    """Why a file at `path`, whose folders may not exist yet, could not be written; None if it could."""
    folder = path
    try:
        if path.is_file():
            with path.open("ab"):  # changes nothing
                pass
        folder = next(p for p in path.absolute().parents if p.exists() or p.is_symlink())
        if not folder.is_dir():
            return f"{folder} is no folder"
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return f"{folder} takes nothing ({error.strerror or error})"


def read(path: Path) -> Report:
    """The results in a file.

    Raises:
        ResultsError: it cannot be read, or holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultsError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError:
        raise ResultsError(f"{path} is no JSON file") from None
    try:
        return Report(
            machine=dict(found["machine"]),
            settings=dict(found.get("settings", {"quick": found.get("quick", False)})),
            networks={str(name): Measured.from_json(entry) for name, entry in found["networks"].items()},
            dtype=str(found["dtype"]),
            date=str(found.get("date", "")),
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ResultsError(f"{path} holds no results of `racecar bench --json`") from None


def taken_up(path: Path, fresh: Report) -> Report:
    """The report in `path` to go on with, if it is of the same machine, sources and settings; else `fresh`, if no file.

    Raises:
        ResultsError: it is of something else; the message says of what.
    """
    if not path.exists():
        return fresh
    earlier = read(path)
    mine, theirs = {**fresh.machine, **fresh.settings}, {**earlier.machine, **earlier.settings}
    differing = [key for key in (*mine, *theirs) if mine.get(key) != theirs.get(key)]
    if earlier.dtype != fresh.dtype:
        differing.append("dtype")
    if differing:
        first = "commit" if "commit" in differing else differing[0]
        raise ResultsError(
            f"{path} cannot be taken up: its {first} is {theirs.get(first, 'unknown')!r}, now it is "
            f"{mine.get(first, 'unknown')!r}; write to another file, or leave --resume out to begin anew"
        )
    return earlier

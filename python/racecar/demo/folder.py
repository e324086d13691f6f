"""The demo's output folder: what is in it, whether a demo may begin there, and how one that was broken off goes on.

demo.json       settings, a fingerprint of the data, and whether the demo has come to its end
runs/           one folder per run, see `racecar.training.run_phase`
results.json, pictures.npz, report.html, reconstructions.png     when it is
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from ..data import DIGITS
from ..experiments.folder import SettingsError
from ..training.history import replace_text
from .settings import Settings

RUNS, STATE = "runs", "demo.json"
FINISHED = ("results.json", "pictures.npz", "report.html", "reconstructions.png")
RUN = re.compile(r"[A-Za-z0-9]+-seed\d+-(I|AA|AB)")  # as `Job.folder` names them
FREE = ("workers", "save_every_s")  # settings that do not change the figures


def begin(out: Path, settings: Settings, fingerprint: int, command: str, *, resume: bool, overwrite: bool) -> str:
    """Makes the folder ready, or refuses, before anything is computed.

    Returns:
        The command that began the demo.

    Raises:
        SettingsError: it cannot be written; it holds a demo that was broken off, and neither `resume` nor `overwrite`
            is given; or the demo in it has other settings or other data.
    """
    state = read_state(out)
    if state is None and not resume and not overwrite:
        refuse_foreign(out)
    if resume:
        if state is None:
            raise SettingsError(f"there is no demo to resume in {out}; leave out --resume to begin one")
        check_same(state, settings, fingerprint, out)
    else:
        if state is not None and not state["finished"] and not overwrite:
            count = len(list((out / RUNS).glob("*/history.json")))
            raise SettingsError(
                f"{out} holds a demo that was broken off, with {count} finished runs; give --resume to go on with it, "
                f"--overwrite to begin anew, or another --out"
            )
        if state is not None and not overwrite:
            check_same(state, settings, fingerprint, out)
        empty(out)
    command = state["command"] if resume and state is not None else command
    write_state(out, settings, fingerprint, command, finished=False)
    return command


def end(out: Path, settings: Settings, fingerprint: int, command: str) -> None:
    """Notes that the demo has come to its end."""
    write_state(out, settings, fingerprint, command, finished=True)


def refuse_foreign(out: Path) -> None:
    """Raises SettingsError where a folder has files of the names that a demo writes, but no demo that is known here."""
    found = [name for name in (STATE, *FINISHED) if (out / name).exists()]
    found += [f"{RUNS}/{path.name}" for path in (out / RUNS).iterdir()]
    if found:
        raise SettingsError(
            f"{out} holds {', '.join(found[:4])}{' and more' if len(found) > 4 else ''}, but no demo of this version; "
            f"give another --out, or --overwrite to replace what has a demo's names"
        )


def empty(out: Path) -> None:
    """Removes what an earlier demo left, and nothing else: files and folders of the names that a demo gives."""
    for name in (*FINISHED, STATE):
        (out / name).unlink(missing_ok=True)
    for path in (out / RUNS).iterdir():
        if path.is_dir() and RUN.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def settings_to_resume(out: Path, given: dict[str, Any]) -> Settings:
    """The settings of the demo in a folder, with those that were given in their place.

    Raises:
        SettingsError: there is no demo in it.
    """
    state = read_state(out)
    if state is None:
        raise SettingsError(f"there is no demo to resume in {out}; leave out --resume to begin one")
    return Settings(**{**state["settings"], **given})


def read_state(out: Path) -> dict[str, Any] | None:
    """What `write_state` wrote; None: nothing, or something else."""
    try:
        state = json.loads((out / STATE).read_text(encoding="utf-8"))
        known = {field.name for field in fields(Settings)}
        if set(state) >= {"settings", "fingerprint", "command", "finished"} and set(state["settings"]) == known:
            return dict(state)
    except (OSError, ValueError, TypeError):
        pass
    return None


def write_state(out: Path, settings: Settings, fingerprint: int, command: str, *, finished: bool) -> None:
    """Keeps what a resumed demo must agree with, and the command that began it."""
    state = {
        "settings": asdict(located(settings)),
        "fingerprint": fingerprint,
        "command": command,
        "finished": finished,
    }
    replace_text(out / STATE, json.dumps(state, indent=1) + "\n")


def located(settings: Settings) -> Settings:
    """The same settings with the data's path from the root, so that a demo can be resumed from another folder."""
    return (
        settings
        if settings.data == DIGITS
        else replace(settings, data=str(Path(settings.data).expanduser().absolute()))
    )


def check_same(state: dict[str, Any], settings: Settings, fingerprint: int, out: Path) -> None:
    """Refuses to go on with other settings or other data than those that the finished runs belong to."""
    before, now = state["settings"], asdict(located(settings))
    changed = [
        f"{name} was {before[name]}, now {now[name]}" for name in now if name not in FREE and now[name] != before[name]
    ]
    if changed:
        raise SettingsError(
            f"the demo in {out} has other settings ({'; '.join(changed)}); leave them out with --resume, begin anew "
            f"with --overwrite, or give another --out"
        )
    if state["fingerprint"] != fingerprint:
        raise SettingsError(
            f"the data have changed since the demo in {out} began; put them back, or begin anew with --overwrite"
        )

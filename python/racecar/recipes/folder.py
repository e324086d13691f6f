"""The folder of a run: whose it is, its checkpoint, and how one that was broken off goes on.

run.json          recipe, settings, a fingerprint of the data, the command, and whether the run has come to its end
checkpoint.pt     everything that the next epoch depends on; replaced whole or not at all
results.json, table.md, *.png     when it has
"""

from __future__ import annotations

import io
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from ..experiments.folder import SettingsError, locked, prepare
from ..training.history import replace_text

STATE, CHECKPOINT, RESULTS, TABLE = "run.json", "checkpoint.pt", "results.json", "table.md"
FREE = ("save_every_s", "threads", "workers")  # settings that do not change the figures


class RunFolder:
    """Where a recipe writes.

    Args:
        path: the folder.
        recipe: name of the recipe.
    """

    def __init__(self, path: Path, recipe: str) -> None:
        self.path, self.recipe = path, recipe

    def settings_to_resume(self) -> dict[str, Any]:
        """The settings of the run in it.

        Raises:
            SettingsError: there is none, or one of another recipe.
        """
        state = self.state()
        if state is None and (self.path / STATE).exists():
            raise SettingsError(
                f"{self.path / STATE} is damaged, so that its run cannot go on; begin anew with --overwrite"
            )
        if state is None:
            raise SettingsError(f"there is no run to resume in {self.path}; leave out --resume to begin one")
        self.check_recipe(state)
        return dict(state["settings"])

    @contextmanager
    def held(self) -> Iterator[None]:
        """Makes the folder, and keeps other runs out of it: held before what is in it is read or replaced.

        Raises:
            SettingsError: it cannot be written, or a run is under way there.
        """
        prepare(self.path)
        with locked(self.path, "run"):
            yield

    def begin(
        self,
        settings: Any,
        data: Path | None,
        fingerprint: int,
        command: str,
        *,
        resume: bool,
        overwrite: bool,
    ) -> None:
        """Makes the folder, which is `held`, ready, or refuses, before anything is computed.

        Args:
            settings: a dataclass.
            data: where they are from; kept for `resume`. fingerprint: of the data.
            command: the command line, kept for the results; that of a run that is resumed stays.
            resume: go on with the run in the folder.
            overwrite: begin anew even where there is one.

        Raises:
            SettingsError: the folder holds what neither option covers.
        """
        state = self.state()
        if resume:
            self.check_same(settings, fingerprint)
            return
        if state is None:
            found = [name for name in (STATE, CHECKPOINT, RESULTS, TABLE) if (self.path / name).exists()]
            if found and not overwrite:
                raise SettingsError(
                    f"{self.path} holds {', '.join(found)}, but no run of a recipe; give another --out, or --overwrite "
                    f"to replace them"
                )
        elif not overwrite:
            how = "is finished" if state["finished"] else "was broken off"
            again = "--resume to see its table again" if state["finished"] else "--resume to go on with it"
            self.check_recipe(state)
            raise SettingsError(
                f"{self.path} holds a run that {how}; give {again}, --overwrite to begin anew, or another --out"
            )
        for name in (CHECKPOINT, RESULTS, TABLE, STATE):
            (self.path / name).unlink(missing_ok=True)
        self._write(
            {
                "recipe": self.recipe,
                "settings": asdict(settings),
                "data": None if data is None else str(data.expanduser().absolute()),
                "fingerprint": fingerprint,
                "command": command,
                "finished": False,
            }
        )

    def finish(self) -> None:
        """Notes that the run has come to its end."""
        state = self.state()
        if state is None:
            raise SettingsError(f"{self.path}: {STATE} has gone or changed while the run was under way")
        self._write({**state, "finished": True})

    def check_recipe(self, state: dict[str, Any]) -> None:
        """Raises SettingsError where the run is another recipe's."""
        if state["recipe"] != self.recipe:
            raise SettingsError(
                f"{self.path} holds a run of the recipe {state['recipe']!r}, not of {self.recipe!r}; give another --out"
            )

    def check_same(self, settings: Any, fingerprint: int) -> None:
        """Refuses to go on with other settings or other data than those that the checkpoint belongs to."""
        before, now = self.settings_to_resume(), json.loads(json.dumps(asdict(settings)))
        changed = [
            f"{name} was {before.get(name)}, now {now[name]}"
            for name in now
            if name not in FREE and now[name] != before.get(name)
        ]
        if changed:
            raise SettingsError(
                f"the run in {self.path} has other settings ({'; '.join(changed)}); leave them out with --resume, "
                f"begin anew with --overwrite, or give another --out"
            )
        state = self.state()
        if state is not None and state["fingerprint"] != fingerprint:
            raise SettingsError(
                f"the data have changed since the run in {self.path} began; put them back, or begin anew with "
                f"--overwrite"
            )

    def state(self) -> dict[str, Any] | None:
        """What run.json says; None: nothing, or something else."""
        try:
            state = json.loads((self.path / STATE).read_text(encoding="utf-8"))
            if set(state) >= {"recipe", "settings", "data", "fingerprint", "command", "finished"}:
                return dict(state)
        except (OSError, ValueError, TypeError):
            pass
        return None

    @property
    def finished(self) -> bool:
        """Whether the run in it has come to its end."""
        state = self.state()
        return state is not None and bool(state["finished"])

    @property
    def data(self) -> Path | None:
        """Where the data of the run in it are from; None: the recipe's own."""
        path = (self.state() or {}).get("data")
        return None if path is None else Path(path)

    @property
    def command(self) -> str:
        """The command line that began the run."""
        return (self.state() or {}).get("command", "")

    def save(self, state: Any) -> None:
        """Replaces the checkpoint.

        Raises:
            OSError: it cannot be written; the one before is then still whole.
        """
        content = io.BytesIO()
        torch.save(state, content)  # to memory first: of a full disk torch says no more than that its writer failed
        partial = self.path / (CHECKPOINT + ".partial")
        with partial.open("wb") as file:
            file.write(content.getbuffer())
        os.replace(partial, self.path / CHECKPOINT)

    def load(self) -> Any:
        """The checkpoint; None where there is none yet.

        Raises:
            SettingsError: it is damaged.
        """
        path = self.path / CHECKPOINT
        if not path.exists():
            return None
        try:
            return torch.load(path, weights_only=True)
        except Exception as error:  # of a damaged file torch raises whatever the bytes lead it to, and bad advice
            raise SettingsError(f"{path} is damaged or of another version; begin anew with --overwrite") from error

    def _write(self, state: dict[str, Any]) -> None:
        replace_text(self.path / STATE, json.dumps(state, indent=1) + "\n")


@contextmanager
def stop_asked() -> Iterator[Callable[[], bool]]:
    """Holds Ctrl-C and SIGTERM back until an epoch has ended and is saved; a second one ends at once.

        with stop_asked() as asked:
            while ...:
                one_epoch()
                if asked():
                    save()
                    raise KeyboardInterrupt

    Outside the main thread, where no handler can be set, it holds nothing back.
    """
    count = 0

    def handler(number: int, frame: FrameType | None) -> None:
        nonlocal count
        count += 1
        if count > 1:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: count > 0
    finally:
        for number, own in before.items():
            signal.signal(number, own)

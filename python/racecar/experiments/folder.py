"""An output folder: tried out before anything is computed, and kept from a second run."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class SettingsError(ValueError):
    """An option with a value that cannot be used; the message says what was given and what would be right."""


@contextmanager
def locked(out: Path, what: str) -> Iterator[None]:
    """Keeps a second run out of the folder; a lock ends with its process, however that ends.

    Args:
        out: the folder. what: what runs there, "demo".

    Raises:
        SettingsError: one is running there.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise SettingsError(f"a {what} is running in {out}; wait for it, or give another --out") from error
        try:
            yield
        finally:
            (out / ".lock").unlink(missing_ok=True)


def prepare(out: Path, *inside: str) -> None:
    """Creates the folder, and those inside, and writes a file into it for a try, so that a full training is never lost.

    Raises:
        SettingsError: it cannot be created or written.
    """
    try:
        if out.is_file():
            raise FileExistsError(errno.EEXIST, "it is a file")
        for folder in (out, *(out / name for name in inside)):
            folder.mkdir(parents=True, exist_ok=True)
        probe = out / ".writable"
        probe.write_bytes(b"1")
        probe.unlink()
    except OSError as error:
        why = error.strerror or error
        raise SettingsError(f"out: cannot write into {out} ({why}); give a folder that can be written") from error

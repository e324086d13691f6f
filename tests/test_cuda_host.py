"""What the host finds of threads that race, and of shared memory that is too small: with a kernel that does either."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_host import ALONE, CHECKED, COMPILER, LAST_FIRST, call, compile_library, compiled, threads

OWN, ADDED, READ, BEHIND = range(4)


def ran(how: int) -> list[float]:
    out = torch.full((4,), torch.nan)
    call(compiled("race").race, how, out)
    return out.tolist()


def test_threads_with_places_of_their_own_do_not_race() -> None:
    want = ran(OWN)
    for order in (LAST_FIRST, ALONE):
        with threads(compiled("race"), order):
            assert ran(OWN) == want == [7.0] * 4


def test_two_threads_that_change_one_place_are_found() -> None:
    """In either order they give the same sum: only those that are alone tell."""
    want = ran(ADDED)
    with threads(compiled("race"), LAST_FIRST):
        assert ran(ADDED) == want == [11.0, 1.0, 1.0, 1.0]
    with pytest.raises(AssertionError, match="threads of one step have changed the same"), \
            threads(compiled("race"), ALONE):  # fmt: skip
        ran(ADDED)


def test_a_thread_that_reads_what_another_one_writes_gives_something_else() -> None:
    assert ran(READ) == [5.0] * 4
    for order in (LAST_FIRST, ALONE):
        with threads(compiled("race"), order):
            assert ran(READ) == [5.0, 1.0, 1.0, 1.0]
    assert ran(READ) == [5.0] * 4  # in order again


def test_a_byte_behind_the_shared_memory_is_found(tmp_path: Path) -> None:
    """By AddressSanitizer, under which `make sanitize` runs the kernels; in a process that it ends."""
    if COMPILER is None:
        pytest.skip("no C++ compiler is installed")
    found = subprocess.run([*COMPILER.split(), "-print-file-name=libasan.so"], capture_output=True, text=True)
    runtime = Path(found.stdout.strip())
    if not runtime.is_absolute() or not runtime.exists():
        pytest.skip("the compiler has no AddressSanitizer")
    compile_library("race", tmp_path / "race.so", *CHECKED)
    checked = {"LD_PRELOAD": str(runtime.resolve()), "ASAN_OPTIONS": "detect_leaks=0:exitcode=66"}

    def ended(how: int) -> tuple[int, str]:
        code = f"import ctypes; ctypes.CDLL('race.so').race(ctypes.c_int64({how}), (ctypes.c_float * 4)())"
        done = subprocess.run(
            [sys.executable, "-c", code.replace("race.so", str(tmp_path / "race.so"))],
            env={**os.environ, **checked}, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        return done.returncode, done.stderr

    assert ended(OWN) == (0, "")
    status, told = ended(BEHIND)
    assert status == 66 and "heap-buffer-overflow" in told

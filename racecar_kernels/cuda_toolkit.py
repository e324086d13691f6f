"""The CUDA compiler and driver: where they are, their versions, and which GPUs the kernels are compiled for.

Imports no PyTorch: setup.py loads this file by itself, and so does whoever compiles a kernel beside any PyTorch.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import NamedTuple

TARGETS = (80, 86, 89, 90, 100, 120)  # A100; RTX 30; RTX 40, L4; H100, H200; B200; RTX 50. The last one as PTX too
OLDEST = TARGETS[0]
BYTES_PER_JOB = 3 << 30  # what one compilation of PyTorch's headers takes, and nvcc with all targets less than that


class ToolkitError(Exception):
    """The CUDA compiler cannot compile what is asked for; the sentence says why."""


class NoCompilerError(ToolkitError):
    """There is no nvcc at all."""


class Nvcc(NamedTuple):
    """A CUDA compiler."""

    path: Path
    home: Path  # of its toolkit, with include/ and a folder of libraries
    version: tuple[int, int]
    known: frozenset[int]  # architectures: 80 for sm_80


def find() -> Nvcc:
    """The compiler of CUDA_HOME or CUDA_PATH if one is set, else on PATH, in its usual place, or installed by pip.

    Raises:
        NoCompilerError: there is none.
        ToolkitError: it does not run.
    """
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(name):
            path = Path(home) / "bin" / "nvcc"
            if not path.is_file():
                raise NoCompilerError(f"there is no nvcc: {name}={home} has no bin/nvcc")
            return _asked(path)
    packages = Path(sysconfig.get_path("purelib")) / "nvidia"
    for place in (shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc", *sorted(packages.glob("cu*/bin/nvcc"))):
        if place and Path(place).is_file():
            return _asked(Path(place))
    raise NoCompilerError("there is no nvcc: not on PATH, not in /usr/local/cuda, and CUDA_HOME is not set")


def _asked(path: Path) -> Nvcc:
    version = re.search(r"release (\d+)\.(\d+)", _output(path, "--version"))
    known = frozenset(map(int, re.findall(r"compute_(\d+)\b", _output(path, "--list-gpu-arch"))))
    # its own word for where it is: what stands on PATH may be a link or a script that calls the real one
    top = re.search(r"^#\$ TOP=(.+)$", _output(path, "--dryrun", "-x", "cu", "-c", os.devnull), flags=re.MULTILINE)
    if version is None or not known:
        raise ToolkitError(f"{path} does not tell its version and architectures")
    home = Path(top.group(1).strip()) if top else path.parent.parent
    return Nvcc(path, home.resolve(), (int(version[1]), int(version[2])), known)


def _output(path: Path, *arguments: str) -> str:
    try:
        done = subprocess.run([path, *arguments], capture_output=True, text=True, timeout=60, check=True)
    except subprocess.CalledProcessError as error:
        last = (error.stderr or error.stdout or "").strip().splitlines()[-1:]
        raise ToolkitError(f"{path} {arguments[0]} failed: {' '.join(last) or f'status {error.returncode}'}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ToolkitError(f"{path} does not run: {error}") from error
    return done.stdout + done.stderr


def codes(nvcc: Nvcc, listed: str = "") -> tuple[str, ...]:
    """What to compile for: `sm_90` is a chip's own instructions, `compute_120` PTX, which later drivers compile.

    Args:
        nvcc: leaves out what this compiler does not know.
        listed: as in TORCH_CUDA_ARCH_LIST, "8.0 9.0+PTX"; what is older than sm_80 is left out. Empty: TARGETS.

    Raises:
        ToolkitError: the list cannot be read, or nothing is left of it.
    """
    wanted: list[str] = []
    if not listed.strip():
        chips = [target for target in TARGETS if target in nvcc.known]
        wanted = [*(f"sm_{chip}" for chip in chips), *(f"compute_{chip}" for chip in chips[-1:])]
    for word in re.split(r"[\s;,]+", listed.strip()) if listed.strip() else ():
        found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", word)
        if found is None:
            raise ToolkitError(f"TORCH_CUDA_ARCH_LIST holds {word!r}; numbers such as 8.0 or 9.0+PTX are understood")
        chip = int(found[1] + found[2])
        if chip >= OLDEST and chip in nvcc.known:
            wanted += [f"sm_{chip}{found[3]}", *([f"compute_{chip}{found[3]}"] if found[4] else [])]
    if not wanted:
        asked = f"of TORCH_CUDA_ARCH_LIST={listed!r}" if listed.strip() else "of what the kernels are written for"
        version = ".".join(map(str, nvcc.version))
        raise ToolkitError(f"nothing {asked} is both sm_{OLDEST} or newer and known to nvcc {version}")
    return tuple(dict.fromkeys(wanted))


def flags(wanted: tuple[str, ...]) -> list[str]:
    """nvcc's flags that compile for `codes`."""
    return [f"-gencode=arch={code.replace('sm_', 'compute_')},code={code}" for code in wanted]


def runs_on(wanted: tuple[str, ...], capability: tuple[int, int]) -> bool:
    """Whether a GPU of this compute capability runs what was compiled for `codes`.

    A chip's own instructions run on later minor versions of it, PTX on every later chip; with a letter behind it,
    either runs on that chip only (`f`: on its family).
    """
    for code in wanted:
        kind, major, minor, letter = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", code).groups()  # type: ignore[union-attr]
        own = (int(major), int(minor))
        if own == capability or (letter != "a" and own[0] == capability[0] and own[1] <= capability[1]):
            return True
        if kind == "compute" and not letter and own <= capability:
            return True
    return False


def driver_version() -> tuple[int, int] | None:
    """The newest CUDA that the installed driver serves; None where there is no driver."""
    number = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
    except (OSError, AttributeError):
        return None
    return None if failed or not number.value else (number.value // 1000, number.value % 1000 // 10)


def jobs() -> int:
    """Compilations at a time: MAX_JOBS if that is set, else one per core as far as the free memory reaches."""
    if (told := os.environ.get("MAX_JOBS", "")).isdigit() and int(told) > 0:
        return int(told)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    free = free_memory()
    return cores if free is None else max(1, min(cores, free // BYTES_PER_JOB))


def free_memory(root: Path = Path("/")) -> int | None:
    """Bytes that can be had: of the machine, or of the container if that has less (Linux); None if unknown.

    root: below which /proc and /sys lie.
    """
    limits = []
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", (root / "proc/meminfo").read_text(), flags=re.MULTILINE)
        limits += [int(found[1]) * 1024] if found else []
        group = root / "sys/fs/cgroup"
        most, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        # used are also files that were read and are not needed: they make room
        stat = (group / "memory.stat").read_text() if (group / "memory.stat").is_file() else ""
        found = re.search(r"^inactive_file (\d+)$", stat, flags=re.MULTILINE)
        limits += [most - used + (int(found[1]) if found else 0)]
    except (OSError, ValueError):  # no such file; "max": no limit
        pass
    return max(0, min(limits)) if limits else None

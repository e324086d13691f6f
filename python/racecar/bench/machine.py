"""What a figure was measured on: processor, GPU, versions, commit. No host name, no path."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import racecar_kernels as rk
from racecar_kernels import extension

PACKAGE = Path(__file__).resolve().parent.parent
ROOT = PACKAGE.parent.parent  # of the source tree; an installed package has none


def facts(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Machine, versions and commit, ready for JSON."""
    found: dict[str, Any] = {
        "device": torch.device(device).type,
        "processor": processor_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "racecar_kernels": rk.__version__,
        "commit": commit(),
        "sources": sources(),
        "backends": list(rk.backends()),
        "extension": "in use" if extension.why_not() is None else "not in use",  # the reason may name a path
    }
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return found


def prepare_cuda() -> None:
    """What every figure on a GPU is measured with: cuDNN chooses by measuring, and float32 is multiplied as TF32."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.matmul.allow_tf32 = True


def processor_name() -> str:
    """The processor's own name where the system tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def in_source_tree() -> bool:
    """Whether this is a checkout and not an installed package, around which another project's commit might be found."""
    return (ROOT / "pyproject.toml").is_file() and (ROOT / "csrc").is_dir()


def commit() -> str:
    """Commit of the measured tree, `-dirty` behind it where files differ; `unknown` if installed or without git."""
    if not in_source_tree():
        return "unknown"
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()


def sources() -> str:
    """Fingerprint of the code that is measured: tells two states of a tree apart where the commit does not."""
    digest = hashlib.sha256()
    folders = [PACKAGE, Path(rk.__file__).resolve().parent]
    if in_source_tree():
        folders += [ROOT / name for name in ("bench", "csrc", "tests")]
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".py", ".cpp", ".h", ".inl", ".cu", ".cuh"):
                digest.update(f"{folder.name}/{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]

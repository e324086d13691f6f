"""What a figure was measured on: processor, GPU, versions, commit. No host name, no path."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


def facts(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Machine, versions and commit, ready for JSON."""
    found: dict[str, Any] = {
        "device": torch.device(device).type,
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "racecar_kernels": _package_version(),
        "commit": commit(),
        "sources": sources(),
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


def processor_name() -> str:
    """The processor's own name where the system tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    """Commit of the tree that is measured, with `-dirty` behind it where files differ; `unknown` without git."""
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
    for folder in ("bench", "csrc", "python", "racecar_kernels", "tests"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh"):
                digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _package_version() -> str:
    import racecar_kernels

    return getattr(racecar_kernels, "__version__", "unknown")

"""What is installed and what of it works, as text for bug reports."""

from __future__ import annotations

import platform

import torch

from .backends import TABLE, Query
from .layer import Layer, Tied


def show_config() -> str:
    """Versions, devices, and every backend with what speaks against it, one per line."""
    from . import __version__, extension

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    reason = extension.why_not(warn=False)
    module = extension.load() if reason is None else None
    state = reason if module is None else f"loaded, {module.simd_level()} instructions"
    lines = [
        f"racecar-kernels {__version__}, Python {platform.python_version()}, PyTorch {torch.__version__}",
        f"threads {torch.get_num_threads()}, GPU {gpu}",
        f"compiled extension: {state}",
        f"compiled CUDA extension: {extension.why_not(extension.CUDA, warn=False) or 'loaded'}",
        "backends, in order of preference:",
    ]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for backend in TABLE:
        why = backend.why_not(Query(Layer(Tied()), device, torch.float32))
        lines.append(f"  {backend.name:<10} {backend.summary}" + (f" (not here: {why})" if why else ""))
    return "\n".join(lines)

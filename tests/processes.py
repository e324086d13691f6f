"""Runs a test's function in two processes that know each other, as data-parallel training does."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed

COUNT = 2
LONGEST = 60.0  # seconds; a process that waits for one that has failed would wait forever


def in_two_processes(job: Callable[..., Any], folder: Path, *args: Any) -> Any:
    """What `job(rank, *args)`, a module's own function, returns in process 0; an error in either is raised here."""
    context = torch.multiprocessing.spawn(_begin, (job, str(folder), args), nprocs=COUNT, join=False)
    end = time.monotonic() + LONGEST
    try:
        while not context.join(timeout=1):
            if time.monotonic() > end:
                raise TimeoutError(f"{job.__name__} has not come back within {LONGEST:.0f} seconds")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    return torch.load(folder / "result.pt", weights_only=False)


def _begin(rank: int, job: Callable[..., Any], folder: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="barrier.*device")
    # a file instead of a port, which another test might take in between
    distributed.init_process_group(
        "gloo", f"file://{folder}/meeting", timeout=timedelta(seconds=LONGEST / 2), rank=rank, world_size=COUNT
    )
    result = job(rank, *args)
    if rank == 0:
        torch.save(result, Path(folder) / "result.pt")
    distributed.barrier()
    distributed.destroy_process_group()

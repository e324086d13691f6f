"""Every example, as its first line says to run it, on a few of the embedded digits."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # each is a process of its own

FOLDER = Path(__file__).parents[1] / "examples"
NEEDS = {"lightning_callback": ["lightning"], "hf_trainer": ["transformers", "accelerate"], "timm_train": ["timm"]}
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "digits")


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=120, cwd=FOLDER.parent
    )


def skip_without(package: str) -> None:
    """A package may be there and not import, such as timm beside a torchvision that fits another PyTorch."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    found = run("-c", f"import {package}")
    if found.returncode:
        pytest.skip(f"{package} does not import: {found.stderr.strip().splitlines()[-1]}")


def in_tiny(name: str, *more: str) -> str:
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if name == "ddp" else []
    found = run(*start, str(FOLDER / f"{name}.py"), "--tiny", *more)
    assert found.returncode == 0, found.stderr
    return found.stdout


@pytest.mark.parametrize("name", NAMES)
def test_runs_in_tiny(name: str) -> None:
    for package in NEEDS.get(name, []):
        skip_without(package)
    out = in_tiny(name)
    assert 0 <= float(re.search(r"accuracy ([\d.]+)", out)[1]) <= 1
    assert "reverse" in out or name in ("ddp", "timm_train")


@pytest.mark.parametrize("name", NAMES)
def test_helps(name: str) -> None:
    for package in NEEDS.get(name, []):
        skip_without(package)
    found = run(str(FOLDER / f"{name}.py"), "--help")
    assert found.returncode == 0 and "--tiny" in found.stdout, found.stderr


@pytest.mark.parametrize(
    "more",
    [["--dtype", "bfloat16", "--accumulate", "2", "--memory", "recompute"], ["--compile", "aot_eager"]],
    ids=["mixed precision", "compiled"],
)
def test_the_plain_loop_in_other_ways(more: list[str]) -> None:
    assert "of the average" in in_tiny("plain_loop", *more)


def test_ddp_without_torchrun_says_how_to_start_it() -> None:
    found = run(str(FOLDER / "ddp.py"), "--tiny")
    assert found.returncode == 2 and "torchrun --nproc-per-node 2" in found.stderr

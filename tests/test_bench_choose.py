"""`python -m bench.choose`: from the rows of `make gpu` to a table by which the chooser decides."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
from bench import choose, gpu_summary
from racecar_kernels.gpu import chooser, measured
from racecar_kernels.layer import Tied

CONV: dict[str, Any] = {
    "architecture": "sm_90", "dtype": "bfloat16", "pass": "forward", "kernel": [3, 3], "stride": [1, 1], "factor": None,
    "c_in": 64, "c_out": 48, "groups": 1, "library_us": 10.0, "fused_us": 8.0,
}  # fmt: skip
LINEAR = {**CONV, "kernel": [], "stride": [], "pass": "tied", "c_in": 12, "c_out": 10}
SLOWER = {"fused_us": 12.0}
ROWS = [
    CONV, {**CONV, "pass": "source", **SLOWER}, {**CONV, "pass": "weight", "fused_us": None},
    {**CONV, "c_in": 3, "cuda_us": 6.0},
    LINEAR, {**LINEAR, "pass": "source"}, {**LINEAR, "pass": "source", **SLOWER},  # won once, lost once
]  # fmt: skip
WRONG = {**CONV, "pass": "weight", "wrong": True, "why": "CUDA out of memory"}
FASTER = {
    "forward half 9 taps 64 to 64 channels stride 1",
    "cuda forward half 9 taps 64 to 4 channels stride 1",
    "tied half linear 16 to 16 features",
}


def report(*rows: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """As `make gpu` writes it, the rows dealt out to two steps, beside steps that have no rows of layers."""
    half = len(rows) // 2
    steps = {
        "tests": {"passed": True},
        "bandwidth bfloat16": {"kind": "bandwidth", "rows": [{"kernel": "compare", "us": 1.0}]},
        "layers mnist bfloat16": {"kind": "layers", "rows": list(rows[:half])},
        "layers linear bfloat16": {"kind": "layers", "rows": list(rows[half:]), "error": "stopped after 480 s"},
    }
    return {"dry_run": False, "steps": steps, **settings}


def written(folder: Path, name: str, content: Any) -> str:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def imported(path: Path) -> dict[str, frozenset[str]]:
    """The table of a generated module, by Python's own import."""
    spec = importlib.util.spec_from_file_location("generated", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {architecture: frozenset(names) for architecture, names in module.FASTER.items()}


def test_the_chooser_takes_what_was_faster(tmp_path, monkeypatch, capsys) -> None:
    out = tmp_path / "measured.py"
    assert choose.main([written(tmp_path, "h200.json", report(*ROWS, WRONG)), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "h200.json: sm_90: of 5 classes the library is the slower one in 3" in said
    assert "in 3: 2 go to Triton's kernels, 1 to CUDA's\n" in said and "1 wrong rows are left out" in said
    assert imported(out) == {"sm_90": FASTER}
    monkeypatch.setattr(chooser, "MEASURED", imported(out))
    monkeypatch.setattr(chooser.device, "of", lambda t: type("Device", (), {"architecture": "sm_90"}))
    conv = torch.empty(48, 64, 3, 3, dtype=torch.bfloat16), Tied((1, 1), ((1, 1), (1, 1)), (1, 1))
    linear = torch.empty(10, 12, dtype=torch.bfloat16), Tied((), (), ())
    taken = {
        name: [pass_ for pass_ in ("tied", "forward", "source", "weight") if chooser.is_fastest(pass_, *layer, None)]
        for name, layer in (("conv", conv), ("linear", linear))
    }
    assert taken == {"conv": ["forward"], "linear": ["tied"]}


def test_other_architectures_stay_and_a_later_file_replaces_its_own(tmp_path) -> None:
    out = tmp_path / "measured.py"
    first = written(tmp_path, "a100.json", report(*({**row, "architecture": "sm_80"} for row in ROWS)))
    second = written(tmp_path, "h200.json", report(*ROWS))
    third = written(tmp_path, "layers.json", {"dry_run": False, "ceilings": {}, "rows": [{**CONV, **SLOWER}]})
    assert choose.main([second, first, "--out", str(out)]) == 0
    text = out.read_text()
    assert choose.main([first, "--out", str(out)]) == choose.main([second, "--out", str(out)]) == 0
    assert out.read_text() == text  # whatever the order
    assert choose.main([third, "--out", str(out)]) == 0
    assert imported(out) == choose.table_in(out) == {"sm_80": FASTER, "sm_90": frozenset()}
    assert choose.main([third, second, "--out", str(out)]) == 0
    assert out.read_text() == text


DRY = {**CONV, "architecture": "interpreter"}
BAD = {
    "missing": (None, "No such file"),
    "not JSON": ("{", "is no JSON"),
    "something else": ([1, 2], "is no JSON of `make gpu`"),
    "no layers": (report(), "has no rows of layers"),
    "a dry run": (report(CONV, dry_run=True), "is of a dry run"),
    "interpreted": ({"rows": [CONV, DRY]}, "is of a dry run"),
    "wrong": (report(WRONG, WRONG), "every row is wrong, the first one: CUDA out of memory"),
    "no fused kernel": (report({**CONV, "fused_us": None}), "has no row with a time of a fused kernel"),
    "another layout": (report({"architecture": "sm_90", "fused_us": 1.0}), "has a row of another layout: KeyError"),
}


@pytest.mark.parametrize(("content", "reason"), BAD.values(), ids=list(BAD))
def test_a_file_of_no_use_is_named_and_nothing_is_written(content, reason, tmp_path, capsys) -> None:
    good, out = written(tmp_path, "good.json", report(*ROWS)), tmp_path / "measured.py"
    bad = str(tmp_path / "bad.json") if content is None else written(tmp_path, "bad.json", content)
    assert choose.main([good, bad, "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert bad in said and reason in said and "nothing is written" in said
    assert not out.exists()


def test_a_module_of_someone_else_is_not_overwritten(tmp_path, capsys) -> None:
    out = tmp_path / "theirs.py"
    for text in ("import os\n", "FASTER: dict = make()\n", "FASTER: list = [1]\n", "{"):
        out.write_text(text)
        assert choose.main([written(tmp_path, "h200.json", report(*ROWS)), "--out", str(out)]) == 2
        assert "theirs.py holds no table" in capsys.readouterr().err and out.read_text() == text


def test_a_folder_that_is_not_there(tmp_path, capsys) -> None:
    out = tmp_path / "nowhere" / "measured.py"
    assert choose.main([written(tmp_path, "h200.json", report(*ROWS)), "--out", str(out)]) == 2
    assert str(out) in capsys.readouterr().err


def test_the_package_ships_what_the_command_writes() -> None:
    own = Path(measured.__file__)
    assert own.read_text() == choose.module(choose.table_in(own))
    assert choose.table_in(own) == chooser.MEASURED
    assert choose.parser().parse_args(["a.json"]).out == own


@pytest.mark.parametrize(
    "table", [{}, {"sm_90": frozenset(FASTER), "sm_80": frozenset(list(FASTER)[:1]), "sm_100": ()}]
)
def test_what_is_written_is_formatted(table, tmp_path) -> None:
    pytest.importorskip("ruff", reason="ruff is not installed")
    out = tmp_path / "measured.py"
    out.write_text(choose.module(table))
    settings = Path(choose.__file__).parents[1] / "pyproject.toml"
    for words in (["check"], ["format", "--check"]):
        argv = [sys.executable, "-m", "ruff", *words, "--no-cache", "--config", str(settings), str(out)]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_summary_names_the_command() -> None:
    machine = {"processor": "none", "torch": "2", "python": "3", "commit": "0"}
    text = gpu_summary.summary({"machine": machine, "dry_run": False, "steps": {}})
    assert "python -m bench.choose" in text.splitlines()[-1]

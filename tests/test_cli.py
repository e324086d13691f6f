"""The command line: help, a tiny run, and errors in one line with an exit code."""

from __future__ import annotations

import errno
import os
import re
import runpy
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from racecar.cli import app


def invoke(*arguments: str):
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"})


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_help_lists_every_option():
    assert "demo" in invoke("--help").stdout and "report" in invoke("--help").stdout
    result = invoke("demo", "--help")
    assert result.exit_code == 0
    for option in (
        "--data",
        "--seeds",
        "--epochs",
        "--lam",
        "--blur",
        "--limit",
        "--batch-size",
        "--out",
        "--quick",
        "--resume",
        "--overwrite",
        "--models",
        "--labels",
        "--workers",
        "--validate",
    ):
        assert option in plain(result.stdout)


@pytest.mark.slow
def test_a_tiny_run_writes_table_and_report(tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "tiny.npz", x=rng.uniform(size=(24, 5, 5)), y=np.arange(24) % 3)
    out = tmp_path / "out"
    words = ["--data", str(tmp_path / "tiny.npz"), "--quick", "--seeds", "1", "--models", "RR", "--out", str(out)]
    result = invoke("demo", *words)
    assert result.exit_code == 0, result.output
    text = plain(result.stdout)
    assert "found 24 images of 3 classes" in text
    assert "tiny: test accuracy after each phase, 1 seed" in text
    assert "1.00 ×" in text and "report.html" in text
    assert "Std: plain training. RR: full reverse pass, all layers compared." in " ".join(text.split())
    assert {path.name for path in out.iterdir()} == {
        "demo.json",
        "pictures.npz",
        "reconstructions.png",
        "report.html",
        "results.json",
        "runs",
    }
    report = out / "report.html"
    drawn = report.read_bytes()
    report.unlink()
    again = invoke("report", str(out))
    assert again.exit_code == 0 and report.read_bytes() == drawn
    assert plain(again.stdout).splitlines()[0].split() == [
        "tiny:",
        "test",
        "accuracy",
        "after",
        "each",
        "phase,",
        "1",
        "seed",
    ]
    resumed = invoke("demo", "--resume", "--out", str(out), "--workers", "1")
    assert resumed.exit_code == 0 and "6 of 6 runs are finished already" in plain(resumed.stdout)
    other = invoke("demo", "--resume", "--out", str(out), "--lam", "3")
    assert other.exit_code == 2 and "lam was 1.0, now 3.0" in plain(other.stderr)


def test_report_of_nothing(tmp_path):
    result = invoke("report", str(tmp_path))
    assert result.exit_code == 2
    assert f"error: {tmp_path}: holds no results of a demo" in plain(result.stderr)
    assert invoke("report").exit_code == 2


def test_full_disk_is_one_line_that_says_how_to_go_on(tmp_path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "runs" / "x"))

    monkeypatch.setattr("racecar.demo.experiment.run_jobs", full)
    result = invoke("demo", "--quick", "--out", str(tmp_path))
    assert result.exit_code == 1
    error = plain(result.stderr).strip()
    assert error.startswith(
        f"error: cannot write {tmp_path}/runs/x: No space left on device; what was finished is kept"
    )
    assert "--resume" in error and "\n" not in error


def test_training_that_failed_is_remarked_on(tmp_path):
    words = ["--quick", "--seeds", "1", "--lam", "1e30", "--models", "RR", "--out", str(tmp_path)]
    result = invoke("demo", *words)
    assert result.exit_code == 0, result.output
    lines = [line for line in plain(result.stdout).splitlines() if line.startswith("warning:")]
    assert len(lines) == 1 and lines[0].startswith("warning: RR: accuracy after phase I is .")
    assert "λ (--lam 1e+30) or the learning rate (--learning-rate 0.001) is probably too large" in lines[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lam", "-1"], "lam must be a number, 0 or larger, got -1.0"),
        (["--epochs", "0"], "epochs must be at least 1, got 0"),
        (["--models", "RR,XX"], "models must be some of Std, Ort, Pre, RR1, RR, RRlocal, got 'RR,XX'"),
        (["--resume"], "there is no demo to resume in"),
        (["--resume", "--overwrite"], "--resume goes on with a demo, --overwrite begins anew; give one of them"),
        (["--seeds", "0"], "seeds must be at least 1, got 0"),
        (["--data", "/no/such/[place]"], "no such file or folder: /no/such/[place]"),
        (["--out", "{file}/out"], "out: cannot write into {file}/out"),
        (["--limit", "5"], "limit is 5, but there are 10 classes"),
        (["--blur", "1000"], "blur must be at most 8 pixels, the longer side of these 8×8 images, got 1000"),
        (["--size", "5000"], "size must be at most 256 pixels, got 5000"),
        (
            ["--threads", "100000"],
            f"threads must be at least 1 and at most {os.cpu_count()}, the CPUs here, got 100000",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, arguments, message):
    file = tmp_path / "file"
    file.write_text("")
    arguments = [argument.format(file=file) for argument in arguments]
    if "--out" not in arguments:
        arguments += ["--out", str(tmp_path / "out")]
    result = invoke("demo", *arguments)
    assert result.exit_code == 2
    error = plain(result.stderr).strip()
    assert error.startswith("error: ") and message.format(file=file) in error
    assert "\n" not in error and "Traceback" not in result.output


def test_missing_extra_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "racecar.demo.terminal", raising=False)
    monkeypatch.delitem(sys.modules, "racecar.demo.experiment", raising=False)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    for name in [name for name in sys.modules if name.startswith(("racecar.demo.", "racecar.training"))]:
        monkeypatch.delitem(sys.modules, name)
    result = invoke("demo")
    assert result.exit_code == 1
    assert "the demo needs lightning.pytorch" in plain(result.stderr) and "racecar-kernels[demo]" in plain(
        result.stderr
    )


def test_interrupt(tmp_path, monkeypatch):
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("racecar.demo.terminal.run_in_terminal", stop)
    result = invoke("demo", "--out", str(tmp_path))
    assert result.exit_code == 130
    assert "stopped before the end" in plain(result.stderr)


def test_python_dash_m(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["racecar", "demo", "--help"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("racecar", run_name="__main__")
    assert caught.value.code == 0
    assert "racecar demo" in plain(capsys.readouterr().out)

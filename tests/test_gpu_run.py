"""`make gpu` as far as a machine without a GPU can tell: order, resuming, what stops it, and what a dry run says."""

from __future__ import annotations

import json

import pytest
import torch

from bench import gpu

RESULT = {
    "contestant": "Std",
    "step_seconds": {"median": 0.002, "p20": 0.001, "p80": 0.003},
    "step_ratio": {"median": 1.0, "p20": 1.0, "p80": 1.0},
    "kept_bytes": 10,
    "kept_ratio": 1.0,
    "peak_bytes": 20,
    "peak_ratio": 1.0,
}
PASSED = {"seconds": 1.0, "passed": True, "counts": {"passed": 1, "skipped": 0, "failed": 0}}
FAILED = {"seconds": 1.0, "passed": False, "counts": {"passed": 0, "skipped": 0, "failed": 1}, "error": "it broke"}


@pytest.fixture
def calls(monkeypatch):
    """The steps that were run, each replaced by one that succeeds at once."""
    made: list[str] = []

    def measurement(network, dtype, options):
        made.append(f"{network} {dtype}")
        return {"seconds": 1.0, "dry_run": True, "batch": 2, "results": [RESULT]}

    monkeypatch.setattr(gpu, "build_extension", lambda: made.append("build"))
    monkeypatch.setattr(gpu, "run_tests", lambda limit: made.append("tests") or PASSED)
    monkeypatch.setattr(gpu, "run_measurement", measurement)
    return made


def test_a_dry_run_says_so_everywhere(calls, tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path), "--dry-run"]) == 0
    assert calls == ["build", "tests", *(f"{network} {dtype}" for network, dtype in gpu.MEASURED)]
    assert gpu.DRY_BANNER in capsys.readouterr().out
    assert gpu.DRY_BANNER in (tmp_path / "summary.md").read_text()
    report = json.loads((tmp_path / "dry-run-cpu.json").read_text())
    assert report["dry_run"] is True and report["device"] == "cpu" and "gpu" not in report["machine"]
    assert len(report["steps"]) == 1 + len(gpu.MEASURED)


def test_finished_steps_are_not_repeated_unless_forced(calls, tmp_path):
    arguments = ["--out", str(tmp_path), "--dry-run"]
    gpu.main(arguments)
    calls.clear()
    assert gpu.main(arguments) == 0
    assert calls == ["build"]
    gpu.main([*arguments, "--force"])
    assert len(calls) == 1 + 2 + len(gpu.MEASURED)


@pytest.mark.parametrize("earlier", ["not json", "{}", json.dumps({"machine": {}, "dry_run": True, "steps": {}})])
def test_a_report_of_something_else_is_not_taken_up(calls, tmp_path, earlier):
    (tmp_path / "dry-run-cpu.json").write_text(earlier)
    gpu.main(["--out", str(tmp_path), "--dry-run"])
    assert len(calls) == 2 + len(gpu.MEASURED)


def test_no_figure_after_a_failed_test(calls, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "run_tests", lambda limit: FAILED)
    assert gpu.main(["--out", str(tmp_path), "--dry-run"]) == 1
    assert calls == ["build"]
    assert "no figure is measured" in capsys.readouterr().err
    assert "it broke" in (tmp_path / "summary.md").read_text()


def test_a_failed_measurement_is_named_and_the_others_go_on(calls, tmp_path, monkeypatch, capsys):
    working = gpu.run_measurement

    def measurement(network, dtype, options):
        done = working(network, dtype, options)
        return {"seconds": 1.0, "error": "first line\nCUDA out of memory"} if network == "vgg19" else done

    monkeypatch.setattr(gpu, "run_measurement", measurement)
    assert gpu.main(["--out", str(tmp_path), "--dry-run"]) == 1
    assert "failed: vgg19 float32, vgg19 bfloat16" in capsys.readouterr().err
    assert "vgg19 float32: failed: CUDA out of memory" in (tmp_path / "summary.md").read_text()
    assert "cifar bfloat16" in calls


def test_one_measurement_in_a_process_of_its_own(tmp_path):
    options = gpu.parser().parse_args(["--out", str(tmp_path), "--dry-run", "--rounds", "1"])
    step = gpu.run_measurement("mnist", "float32", options)
    assert step.get("error") is None and step["dry_run"] is True and step["device"] == "cpu"
    assert step["results"][0]["contestant"] == "Std" and len(step["results"]) == 10


def test_a_step_ends_at_its_time_limit():
    done = gpu.run(["-c", "import time; print('begun', flush=True); time.sleep(60)"], limit=1.0)
    assert done["returncode"] is None and "begun" in done["output"] and "stopped after 1 s" in done["output"]
    assert done["seconds"] < 30


def test_tests_are_counted(tmp_path):
    xml = tmp_path / "tests.xml"
    xml.write_text('<testsuites><testsuite tests="9" skipped="3" failures="1" errors="1"/></testsuites>')
    assert gpu.counted(xml) == {"passed": 4, "skipped": 3, "failed": 2}


def test_files_are_named_after_the_gpu():
    assert gpu.file_name({"gpu": {"name": "NVIDIA H200"}}, dry_run=False) == "nvidia-h200.json"
    assert gpu.file_name({}, dry_run=True) == "dry-run-cpu.json"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_only_a_dry_run_is_possible(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert "sees no CUDA device; DRY=1" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

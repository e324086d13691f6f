"""`make gpu` as far as a machine without a GPU can tell: order, resuming, what stops it, and what a dry run says."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from bench import gpu, gpu_steps, gpu_summary
from racecar.bench import targets
from racecar.bench.machine import ROOT
from racecar.bench.steps import Measured

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
TESTS = [s.name for s in gpu_steps.steps() if s.kind == "tests"]
DRY = [s.name for s in gpu_steps.steps() if s.dry]


def network_step(step: gpu_steps.Step, *results) -> dict:
    known = {"kind": step.kind, "network": step.network, "dtype": step.dtype}
    return {"seconds": 1.0, "dry_run": True, **known, "batch": 2, "results": [RESULT, *results]}


@pytest.fixture
def calls(monkeypatch):
    """The steps that were run, each replaced by one that succeeds at once."""
    made: list[str] = []

    def run_step(step, options, limit):
        made.append(step.name)
        return PASSED if step.kind == "tests" else network_step(step)

    monkeypatch.setattr(gpu, "build_extension", lambda: None)
    monkeypatch.setattr(gpu, "run_step", run_step)
    return made


def failing(monkeypatch, part: str, error: str):
    """Lets the steps whose name contains `part` fail."""
    working = gpu.run_step

    def run_step(step, options, limit):
        found = working(step, options, limit)
        return {**found, "passed": False, "error": error} if part in step.name else found

    monkeypatch.setattr(gpu, "run_step", run_step)


def test_what_matters_most_comes_first():
    names = [s.name for s in gpu_steps.steps()]
    order = ["tests", "tests triton_transposed", "mnist bfloat16", "cifar bfloat16", "vgg19 bfloat16",
             "bandwidth bfloat16", "layers mnist bfloat16", "mnist float32", "layers vgg19 float32", "smoke bfloat16",
             "mnist bfloat16 full, torch.compile", "vgg19 float32 local, torch.compile"]  # fmt: skip
    assert sorted(order, key=names.index) == order and len(set(names)) == len(names)
    kinds = {s.kind for s in gpu_steps.steps()}
    assert kinds - {s.kind for s in gpu_steps.steps() if s.dry} == {"compiled"}
    assert "tests measure" not in names and "test_cuda.py" in gpu_steps.steps()[0].files


def test_a_dry_run_says_so_everywhere(calls, tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path), "--dry-run"]) == 0
    assert calls == DRY
    assert gpu.DRY_BANNER in capsys.readouterr().out
    text = (tmp_path / "summary.md").read_text()
    rows = 20 * text.count("pointwise kernels, the") + text.count("processor time per reverse layer")
    assert gpu.DRY_BANNER in text and text.count("not yet measured on a GPU") == rows
    report = json.loads((tmp_path / "dry-run-cpu.json").read_text())
    assert report["dry_run"] is True and report["device"] == "cpu" and "gpu" not in report["machine"]
    assert list(report["steps"]) == DRY


def test_finished_steps_are_not_repeated_unless_forced(calls, tmp_path):
    arguments = ["--out", str(tmp_path), "--dry-run"]
    gpu.main(arguments)
    calls.clear()
    assert gpu.main(arguments) == 0 and calls == []
    gpu.main([*arguments, "--force"])
    assert calls == DRY


@pytest.mark.parametrize("earlier", ["not json", "{}", json.dumps({"machine": {}, "dry_run": True, "steps": {}})])
def test_a_report_of_something_else_is_not_taken_up(calls, tmp_path, earlier):
    (tmp_path / "dry-run-cpu.json").write_text(earlier)
    gpu.main(["--out", str(tmp_path), "--dry-run"])
    assert calls == DRY


def test_no_figure_after_a_failed_test(calls, tmp_path, monkeypatch, capsys):
    failing(monkeypatch, "tests", "it broke")
    assert gpu.main(["--out", str(tmp_path), "--dry-run"]) == 1
    assert calls == [name for name in TESTS if name in DRY]
    assert "no figure is measured" in capsys.readouterr().err
    assert "it broke" in (tmp_path / "summary.md").read_text()
    assert gpu.main(["--out", str(tmp_path), "--dry-run", "--only", "mnist"]) == 1  # nor later, until they pass
    assert "mnist bfloat16" not in calls


def test_a_failed_step_is_named_and_the_others_go_on(calls, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as broken:
        failing(broken, "vgg19", "first line\nCUDA out of memory")
        assert gpu.main(["--out", str(tmp_path), "--dry-run"]) == 1
    assert "failed: vgg19 bfloat16, vgg19 float32" in capsys.readouterr().err
    assert calls == DRY
    calls.clear()
    assert gpu.main(["--out", str(tmp_path), "--dry-run"]) == 0
    assert calls == ["vgg19 bfloat16", "vgg19 float32"]  # those alone are repeated


def test_a_run_ends_in_the_time_it_is_given(calls, tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path), "--dry-run", "--total", "5"]) == 1
    assert calls == [] and f"are over before {DRY[0]}: run again to go on" in capsys.readouterr().out


def test_some_of_the_figures_after_all_of_the_tests(calls, tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path), "--dry-run", "--only", "cifar"]) == 0
    assert calls == ["tests", "cifar bfloat16", "cifar float32"]
    assert gpu.main(["--out", str(tmp_path), "--only", "nothing"]) == 2
    assert "no step's name contains 'nothing'; --list names them" in capsys.readouterr().err
    assert gpu.main(["--out", str(tmp_path), "--list"]) == 0
    assert "vgg19 float32 local, torch.compile" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------- processes


def options(tmp_path, *more: str):
    return gpu.parser().parse_args(["--out", str(tmp_path), "--dry-run", *more])


def given_to_gpu(tmp_path):
    return gpu.parser().parse_args(["--out", str(tmp_path)])


def step_named(name: str) -> gpu_steps.Step:
    return next(s for s in gpu_steps.steps() if s.name == name)


@pytest.mark.slow
def test_one_measurement_in_a_process_of_its_own(tmp_path):
    step = gpu_steps.run_step(step_named("mnist float32"), options(tmp_path, "--rounds", "1"), 300)
    assert step.get("error") is None and step["dry_run"] is True and step["device"] == "cpu" and step["tf32"] is False
    assert step["results"][0]["contestant"] == "Std" and len(step["results"]) == 10


def test_what_was_measured_before_the_time_limit_is_kept(tmp_path, monkeypatch):
    def stopped(argv, limit, variables):
        with open(argv[argv.index("--out") + 1], "w", encoding="utf-8") as file:
            json.dump({"kind": "layers", "rows": [{"pass": "forward"}]}, file)
        return {"output": "stopped after 1 s", "returncode": None, "seconds": 1.0}

    monkeypatch.setattr(gpu_steps, "run", stopped)
    step = gpu_steps.run_step(step_named("layers mnist bfloat16"), options(tmp_path), 1)
    assert step["rows"] == [{"pass": "forward"}] and step["error"] == "stopped after 1 s"
    assert not gpu.done({"steps": {"layers mnist bfloat16": step}}, step_named("layers mnist bfloat16"))


def test_the_compiled_one_is_measured_beside_those_it_is_held_against(monkeypatch):
    asked: list[str] = []

    def measure_network(network, chosen, **settings):
        asked.extend(c.name for c in chosen)
        return Measured(network.title, 2, [])

    monkeypatch.setattr(gpu_steps, "measure_network", measure_network)
    gpu_steps._measure_network(step_named("mnist bfloat16 full, torch.compile"), "cpu", True, None, print)
    assert asked == ["Std", "plain PyTorch, full", "plain PyTorch, full, torch.compile", "ours, full, store"]
    asked.clear()
    gpu_steps._measure_network(step_named("mnist bfloat16 local, torch.compile"), "cpu", True, None, print)
    assert asked[2:] == ["plain PyTorch, local, torch.compile", "ours, local, deferred"]
    asked.clear()
    gpu_steps._measure_network(step_named("mlp float32 full, torch.compile"), "cpu", True, None, print)
    assert asked[2:] == ["plain PyTorch, full, torch.compile", "ours, full, store", "ours, full, store, cuda"]


def test_a_step_ends_at_its_time_limit():
    done = gpu.run(["-c", "import time; print('begun', flush=True); time.sleep(60)"], limit=1.0)
    assert done["returncode"] is None and "begun" in done["output"] and "stopped after 1 s" in done["output"]
    assert done["seconds"] < 30


def test_tests_are_dealt_out_and_counted(tmp_path, monkeypatch):
    given: list[str] = []

    def run(argv, limit):
        part, xml = argv[argv.index("no:cacheprovider") + 1 :][:2]
        given.append(part)
        with open(xml.removeprefix("--junitxml="), "w", encoding="utf-8") as file:
            file.write('<testsuites><testsuite tests="4" skipped="1" failures="0" errors="0"/></testsuites>')
        return {"output": "", "returncode": 5 if part == "--part=1/3" else 0, "seconds": 1.0}

    monkeypatch.setattr(gpu_steps, "run", run)
    monkeypatch.setattr(gpu_steps.os, "cpu_count", lambda: 6)
    found = gpu_steps.run_tests(step_named("tests"), False, 10)
    assert sorted(given) == ["--part=0/3", "--part=1/3", "--part=2/3"]
    assert found["passed"] and found["counts"] == {"passed": 9, "skipped": 3, "failed": 0}


@pytest.mark.parametrize(("status", "counts"), [(1, "tests='2' failures='1'"), (5, "tests='0'"), (None, "")])
def test_tests_that_fail_or_do_not_run_have_not_passed(tmp_path, monkeypatch, status, counts):
    def run(argv, limit):
        xml = next(a for a in argv if a.startswith("--junitxml=")).removeprefix("--junitxml=")
        if counts:
            with open(xml, "w", encoding="utf-8") as file:
                file.write(f"<a><testsuite {counts}/></a>")
        return {"output": "it broke", "returncode": status, "seconds": 1.0}

    monkeypatch.setattr(gpu_steps, "run", run)
    found = gpu_steps.run_tests(step_named("tests"), False, 10)
    assert not found["passed"] and found["error"]


SANITIZER = [s.name for s in gpu_steps.steps() if s.kind == "sanitizer"]


def test_the_cuda_kernels_are_run_under_compute_sanitizer(tmp_path, monkeypatch):
    assert SANITIZER == ["compute-sanitizer memcheck", "compute-sanitizer racecheck"] and set(SANITIZER) <= set(DRY)
    asked: list[tuple] = []

    def run(argv, limit, variables, under):
        asked.append((argv, variables, under))
        return {"output": output, "returncode": 0, "seconds": 1.0}

    output = "36 passed in 9.00s"
    monkeypatch.setattr(gpu_steps, "run", run)
    monkeypatch.setattr(gpu_steps, "sanitizer", lambda: "/opt/compute-sanitizer")
    for tool in ("memcheck", "racecheck"):
        found = gpu_steps.run_step(step_named(f"compute-sanitizer {tool}"), given_to_gpu(tmp_path), 5)
        argv, variables, under = asked.pop()
        assert under[:3] == ["/opt/compute-sanitizer", "--tool", tool] and "--error-exitcode=66" in under
        assert variables == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} and argv[:2] == ["-m", "pytest"]
        assert gpu_summary.outcome(found) == f"{tool} found nothing" and "error" not in found
    output = "36 skipped in 0.10s"
    found = gpu_steps.run_step(step_named(SANITIZER[0]), given_to_gpu(tmp_path), 5)
    assert gpu_summary.outcome(found) == "left out: its tests did not run: 36 skipped in 0.10s"


def test_what_a_sanitizer_finds_is_an_error(tmp_path, monkeypatch):
    """Told by an exit status of its own, here of a tool that stands in for it."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text("#!/bin/sh\necho '========= ERROR SUMMARY: 1 error'\nexit 66\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert gpu_steps.sanitizer() == str(tool)
    found = gpu_steps.run_step(step_named(SANITIZER[0]), given_to_gpu(tmp_path), 60)
    assert gpu_summary.outcome(found) == "failed: ========= ERROR SUMMARY: 1 error"


@pytest.mark.slow
def test_without_the_sanitizer_it_is_left_out_and_a_dry_run_tries_its_tests(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_steps, "sanitizer", lambda: None)
    found = gpu_steps.run_step(step_named(SANITIZER[0]), given_to_gpu(tmp_path), 60)
    sentence = "left out: compute-sanitizer is not installed; it comes with the CUDA toolkit"
    assert gpu_summary.outcome(found) == sentence and gpu.done(
        {"steps": {SANITIZER[0]: found}}, step_named(SANITIZER[0])
    )
    found = gpu_steps.run_step(step_named(SANITIZER[0]), options(tmp_path), 300)
    assert "error" not in found and found["seconds"] > 0
    told = capsys.readouterr().out
    assert "compute-sanitizer --tool memcheck --error-exitcode=66 --target-processes=all" in told
    assert "test_cuda_few_channels.py::test_a_repeated_run_gives_the_same_bits" in told


@pytest.mark.slow
def test_parts_of_the_tests_are_all_of_them():
    words = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-m", "gpu", "-p", "no:cacheprovider"]
    files = ["tests/test_srip.py", "tests/test_measure.py", "tests/test_baselines.py"]

    def collected(*more: str) -> list[str]:
        done = subprocess.run([*words, *more, *files], cwd=ROOT, capture_output=True, text=True, timeout=200)
        return [line for line in done.stdout.splitlines() if "::" in line]

    parts = collected("--part=0/2"), collected("--part=1/2")
    assert len(parts[0]) == 2 and len(parts[1]) == 1 and sorted([*parts[0], *parts[1]]) == sorted(collected())


# ------------------------------------------------------------------------------------------- what is said of it


def ratios(contestant: str, step: float) -> dict:
    return {**RESULT, "contestant": contestant, "step_ratio": dict.fromkeys(("median", "p20", "p80"), step)}


def test_targets_are_held_against_what_was_measured():
    ours = ratios("ours, full, store", 1.3)
    eager, compiled = (ratios(f"plain PyTorch, full{ending}", 2.0) for ending in ("", ", torch.compile"))
    found = [(step_named("mnist bfloat16"), [ours, eager]),
             (step_named("mnist bfloat16 full, torch.compile"), [ours, eager, compiled])]  # fmt: skip
    steps = {step.name: network_step(step, *results) for step, results in found}
    rows = [{"kernel": "compare", "share": 0.9}, {"kernel": "channel_sum", "share": 0.8}]
    steps["bandwidth bfloat16"] = {"kind": "bandwidth", "rows": rows}
    table = gpu_summary.targets_table(steps).splitlines()
    of = {cells[0]: (cells[3], cells[-1]) for cells in ([c.strip() for c in line[1:-1].split("|")] for line in table)
          if cells[1] in ("step", "GB/s")}  # fmt: skip
    assert of["bfloat16, mnist: ours, full, store"] == ("1.30", "met")
    assert of["bfloat16, mnist: best of plain PyTorch, full / ours, full, store"] == ("1.54", "met")
    assert of["bfloat16, pointwise kernels, the slowest: share of a copy's bandwidth"] == ("0.80", "NOT MET")
    assert of["float32, mnist: ours, full, store"] == ("", "not yet measured on a GPU")
    steps["bandwidth bfloat16"] = {"kind": "bandwidth", "rows": rows[:1], "error": "stopped after 480 s"}
    assert gpu_summary._bandwidth_target(steps, "bfloat16")[-1] == "not yet measured on a GPU"
    steps["bandwidth bfloat16"] = {"kind": "bandwidth", "rows": rows}
    rows[0] = {"kernel": "compare", "wrong": True, "why": "off"}
    assert gpu_summary._bandwidth_target(steps, "bfloat16")[-1] == "not yet measured on a GPU"


def test_a_chain_is_held_against_the_faster_of_plain_pytorchs_two():
    def taking(contestant: str, seconds: float) -> dict:
        return {**ratios(contestant, 1.0), "step_seconds": dict.fromkeys(("median", "p20", "p80"), seconds)}

    step = step_named("mlp float32 full, torch.compile")
    plain = [taking("plain PyTorch, full", 0.6), taking("plain PyTorch, full, torch.compile", 0.4)]
    for own, said in ((0.05, ["8.00", "", "5.00", "", "met"]), (0.1, ["4.00", "", "5.00", "", "NOT MET"])):
        steps = {step.name: network_step(step, *plain, taking("ours, full, store, cuda", own))}
        assert gpu_summary._chain_target(steps, "float32")[3:] == said
    for results in (plain, [*plain[:1], taking("ours, full, store, cuda", 0.1)]):
        steps = {step.name: network_step(step, *results)}
        assert gpu_summary._chain_target(steps, "float32")[-1] == "not yet measured on a GPU"
    assert "mlp, full, store, backend cuda" in gpu_summary.targets_table({})


def test_the_documentation_has_every_target_and_says_that_none_is_measured():
    text = (ROOT / "docs" / "benchmarking.md").read_text(encoding="utf-8")
    for target in targets.GPU:
        line = next(r for r in text.splitlines() if r.startswith(f"| {target.network}: {target.contestant} |"))
        wanted = (target.step, target.kept, target.peak)
        assert [c.strip() for c in line.split("|")[2:5]] == ["" if v is None else f"≤ {v:.2f}" for v in wanted]
        assert "not yet measured on a GPU" in line


def test_files_are_named_after_the_gpu():
    assert gpu.file_name({"gpu": {"name": "NVIDIA H200"}}, dry_run=False) == "nvidia-h200.json"
    assert gpu.file_name({}, dry_run=True) == "dry-run-cpu.json"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_only_a_dry_run_is_possible(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert "sees no CUDA device; DRY=1" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

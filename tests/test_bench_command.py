"""`racecar bench`: what it prints and writes, taking up an interrupted run, comparing two, and bad input."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from bench.__main__ import main
from racecar.bench import comparison, results, tables, targets, terminal
from racecar.bench.gradients import WrongGradientError
from racecar.bench.machine import ROOT
from racecar.bench.steps import Measured, Quantiles, Result
from racecar.cli import app

QUICK = ("--quick", "--no-compile", "--contestants", "plain PyTorch, full")


def bench(*arguments: str):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)], env={"COLUMNS": "300", "TERM": "dumb"})


def result(contestant: str, step: float = 1.5, kept: int = 150, peak: int = 80, spread: float = 0.1) -> Result:
    """Of a network whose plain training takes 1 s, keeps 100 bytes and peaks at 100."""
    time = Quantiles(step, step - spread, step + spread)
    return Result(contestant, time, time, kept, kept / 100, peak, peak / 100, least=1.4)


def measured(*found: Result, batch: int = 64) -> Measured:
    return Measured("A network", batch, [result("Std", 1.0, 100, 100, 0.0), *found])


def report(**networks: Measured) -> results.Report:
    machine = {"processor": "a", "threads": 2, "torch": "2.13", "commit": "abc", "sources": "1"}
    return results.Report(machine, {"quick": False}, networks)


@pytest.fixture
def instead(monkeypatch):
    """Every measurement replaced by one that takes no time; the names of the networks it was asked for."""
    asked: list[str] = []

    def measure_network(network, contestants, **settings):
        asked.append(network.title.split()[0].strip("(,"))
        return measured(result("ours, full, store"), result("ours, full, recompute", 1.6, 140), batch=settings["batch"])

    monkeypatch.setattr(terminal, "measure_network", measure_network)
    return asked


# ------------------------------------------------------------------------------------------- a run


def test_a_quick_run_prints_a_table_and_writes_everything(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- measured:begin by a command -->\nold\n<!-- measured:end -->\nafter\n")
    target, picture = tmp_path / "new" / "figures.json", tmp_path / "pictures" / "ratios.svg"
    words = ["mlp", *QUICK, "--json", target, "--markdown", page, "--plot", picture]
    done = bench(*words)
    assert done.exit_code == 0, done.output
    assert "MLP (6 linear, tanh), 12 inputs, batch 2 (tiny input)" in done.output and "checkpoints" in done.output
    written = json.loads(target.read_text())
    assert written["machine"]["torch"] == torch.__version__ and written["quick"] is True
    assert written["date"].startswith("20") and written["dtype"] == "float32" and written["machine"]["backends"]
    names = [r["contestant"] for r in written["networks"]["mlp"]["results"]]
    assert names == ["Std", "plain PyTorch, full", "plain PyTorch, full, checkpoints"]
    assert set(written["networks"]["mlp"]["results"][1]["step_seconds"]) == {"median", "p20", "p80"}
    text = page.read_text()
    assert text.startswith("before\n<!-- measured:begin by a command -->\n") and text.endswith("-->\nafter\n")
    assert "old" not in text and text.count("| plain PyTorch, full | ") == 1
    assert "<svg" in picture.read_text()
    assert not list(tmp_path.rglob("*.part"))
    assert bench(*words).exit_code == 0 and page.read_text().count("| plain PyTorch, full | ") == 1


def test_the_module_runs_the_same_command(capsys):
    assert main(["--list"]) == 0
    printed = capsys.readouterr().out
    for word in ("resnet110", "weather", "cpu", "ours, local, deferred", "torch.compile", "reference"):
        assert word in printed
    assert main(["resnet"]) == 2


def test_help_names_every_option():
    text = re.sub(r"\x1b\[[0-9;]*m", "", bench("--help").output)
    names = (
        "suite dtype contestants backends batch rounds threads no-compile quick json resume markdown plot where compare"
    )
    for name in (*names.split(), "list"):
        assert f"--{name}" in text


def test_a_suite_prints_every_row_of_its_targets(instead):
    done = bench("--suite", "cpu", "--no-compile")
    assert done.exit_code == 0, done.output
    assert instead == ["MNIST", "CIFAR", "VGG19", "MLP"]
    names = tuple(f"{name}:" for name in targets.SUITES["cpu"].networks)
    rows = [line for line in done.output.splitlines() if line.startswith(names)]
    assert len(rows) == sum(2 + (t.peak is not None) for t in targets.CPU) + 2 * 4
    assert re.search(r"mnist: ours, full, store +step +1\.50 +1\.40 +1\.30 +1\.50 +at least", done.output)
    assert re.search(r"mnist: ours, local, deferred +step .*not measured", done.output)
    assert re.search(r"mlp: full, recompute / store +kept +0\.93 +1\.00 +met", done.output)


@pytest.mark.parametrize(
    ("value", "goal", "least", "said"),
    [(1.3, 1.3, 1.5, "met"), (1.3001, 1.3, 1.5, "at least"), (1.51, 1.3, 1.5, "NOT MET"), (0.81, 0.8, None, "NOT MET"),
     (None, 1.0, None, "not measured")],
)  # fmt: skip
def test_verdicts(value, goal, least, said):
    assert targets.verdict(value, goal, least) == said


def on_a_gpu(monkeypatch, known: dict | None = None):
    """As far as the command can tell; `known`: filled with the settings of every measurement."""
    gpu = {"name": "NVIDIA GPU", "capability": "9.0"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(terminal.machine, "prepare_cuda", lambda: None)
    monkeypatch.setattr(terminal.machine, "facts", lambda device: {"device": device, "torch": "2.13", "gpu": gpu})
    inner = terminal.measure_network

    def measure_network(network, contestants, **settings):
        if known is not None:
            known[network.title.split()[0]] = settings
        return inner(network, contestants, **settings)

    monkeypatch.setattr(terminal, "measure_network", measure_network)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_suite_without_a_gpu_names_the_command_that_measures_it(instead, tmp_path):
    done = bench("--suite", "gpu", "--json", tmp_path / "x.json")
    assert done.exit_code == 2 and "needs a CUDA device" in done.output and "`make gpu OUT=dir`" in done.output
    assert instead == [] and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("words", "dtype"), [((), torch.bfloat16), (("--dtype", "float32"), torch.float32)])
def test_the_gpu_suite_has_its_batches_types_and_targets(instead, monkeypatch, tmp_path, words, dtype):
    known: dict = {}
    on_a_gpu(monkeypatch, known)
    done = bench("--suite", "gpu", "--json", tmp_path / "x.json", *words)
    assert done.exit_code == 0, done.output
    assert instead == ["MNIST", "CIFAR", "VGG19", "Smoke"]
    assert [s["batch"] for s in known.values()] == [1024, 512, 64, 256]
    assert all(s["device"] == "cuda" and s["dtype"] == dtype for s in known.values())
    assert "NVIDIA GPU, " + ("float32, multiplied as TF32" if words else "bfloat16") in done.output
    assert re.search(r"mnist: ours, full, store +step +1\.50 +1\.40 +1\.35 +NOT MET", done.output)
    assert re.search(
        r"best of plain PyTorch, full / ours, full, store +step +1\.25 +not yet measured on a", done.output
    )
    assert results.read(tmp_path / "x.json").dtype == str(dtype).removeprefix("torch.")


def test_against_the_best_of_plain_pytorch():
    """Twice: eager is best, then compiled; and without the compiled one nobody knows."""
    ours, eager = result("ours, full, store", 1.2), result("plain PyTorch, full", 2.0)
    goal = next(t for t in targets.GPU if t.network == "mnist" and t.faster)
    for compiled, want in ((2.5, ["1.67", "met"]), (1.4, ["1.17", "NOT MET"]), (None, ["", "not measured"])):
        found = [ours, eager] + ([] if compiled is None else [result("plain PyTorch, full, torch.compile", compiled)])
        row = next(r for r in targets.rows([goal], {"mnist": measured(*found)}) if "best of" in r[0])
        assert [row[3], row[-1]] == want


def test_tiny_inputs_compile_one_network_only():
    options = terminal.Options(quick=True)
    assert any(c.compiled for c in options.contestants_of("mlp"))
    assert not any(c.compiled for c in options.contestants_of("mnist"))
    assert not any(c.compiled for c in terminal.Options(compile=False).contestants_of("mlp"))
    assert any(c.name.endswith("store, reference") for c in terminal.Options(backends="all").contestants_of("mlp"))


# ------------------------------------------------------------------------------------------- taking up


def test_an_interrupted_run_is_taken_up(instead, tmp_path, monkeypatch):
    target = tmp_path / "figures.json"
    whole = terminal.measure_network

    def interrupted(network, contestants, **settings):
        if network.title.startswith("CIFAR"):
            raise KeyboardInterrupt
        return whole(network, contestants, **settings)

    monkeypatch.setattr(terminal, "measure_network", interrupted)
    done = bench("mnist", "cifar", "mlp", "--json", target)
    assert done.exit_code == 130 and "--resume goes on with it" in done.output
    assert list(results.read(target).networks) == ["mnist"]
    monkeypatch.setattr(terminal, "measure_network", whole)
    done = bench("mnist", "cifar", "mlp", "--json", target, "--resume")
    assert done.exit_code == 0 and "mnist: already in" in done.output
    assert instead == ["MNIST", "CIFAR", "MLP"]
    assert list(results.read(target).networks) == ["mnist", "cifar", "mlp"]
    assert bench("mnist", "--json", target).exit_code == 0  # without --resume it begins anew
    assert instead[-1] == "MNIST" and list(results.read(target).networks) == ["mnist"]


def test_a_run_of_something_else_is_not_taken_up(instead, tmp_path):
    target = tmp_path / "figures.json"
    assert bench("mnist", "--json", target).exit_code == 0
    done = bench("mlp", "--json", target, "--resume", "--rounds", "3")
    assert done.exit_code == 2 and "its rounds is 15, now it is 3; write to another file" in done.output
    older = json.loads(target.read_text())
    older["machine"]["commit"] = "0123456789ab"
    target.write_text(json.dumps(older))
    done = bench("mlp", "--json", target, "--resume")
    assert done.exit_code == 2 and "its commit is '0123456789ab', now it is" in done.output
    assert instead == ["MNIST"]


def test_results_survive_a_write_that_fails(tmp_path):
    target = tmp_path / "figures.json"
    report(mnist=measured()).write(target)
    before = target.read_text()
    broken = report(mnist=measured())
    broken.machine["odd"] = object()
    with pytest.raises(TypeError):
        broken.write(target)
    assert target.read_text() == before


# ------------------------------------------------------------------------------------------- comparing


def write(path, found: results.Report):
    found.write(path)
    return path


def test_comparing_says_what_moved_and_by_how_much(tmp_path):
    a = report(mnist=measured(result("ours, full, store")), mlp=measured(result("x")))
    b = report(mnist=measured(result("ours, full, store", step=1.2, kept=150, peak=88)))
    b.machine["torch"] = "2.15"
    found, remarks = comparison.compare(a, b, (tmp_path / "a", tmp_path / "b"))
    of_ours = {d.figure: d for d in found if d.contestant == "ours, full, store"}
    assert of_ours["x Std"].ratio == pytest.approx(0.8) and of_ours["x Std"].moved
    assert not of_ours["kept MB"].moved and of_ours["peak MB"].moved
    assert not any(d.moved for d in found if d.contestant == "Std")
    assert remarks == ["A and B differ in torch: 2.13 and 2.15"]
    within = report(mnist=measured(result("ours, full, store", step=1.6)))
    found, _ = comparison.compare(a, within, (tmp_path, tmp_path))
    assert not any(d.moved for d in found)  # 1.4 to 1.6 and 1.5 to 1.7 overlap
    done = bench("--compare", write(tmp_path / "a.json", a), write(tmp_path / "b.json", b))
    assert done.exit_code == 0 and "3 of 8 figures moved" in done.output
    assert re.search(r"mnist: ours, full, store +x Std +1\.500 +1\.200 +0\.800 +lower", done.output)
    assert re.search(r"peak MB +0\.000 +0\.000 +1\.100 +HIGHER", done.output)


def test_files_without_a_common_case_are_refused(tmp_path):
    a = write(tmp_path / "a.json", report(mnist=measured()))
    other = write(tmp_path / "b.json", report(mlp=measured()))
    done = bench("--compare", a, other)
    assert done.exit_code == 2 and "share no case: mnist (batch 64, float32) in the one, mlp" in done.output
    larger = report(mnist=measured(batch=128), mlp=measured())
    found, remarks = comparison.compare(results.read(other), larger, (other, other))
    assert {d.network for d in found} == {"mlp"} and remarks == []
    both = report(mnist=measured(), mlp=measured())
    _, remarks = comparison.compare(both, larger, (a, a))
    assert remarks == ["mnist is not compared: batch 64, float32 in A, batch 128, float32 in B"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        ("{", "is no JSON file"),
        ("[1, 2]", "holds no results of"),
        (
            '{"machine": {}, "dtype": "float32", "networks": {"mnist": {"batch": 1, "results": [{}]}}}',
            "holds no results",
        ),
        ('{"steps": {}}', "holds no results"),
    ],
    ids=["missing", "not json", "a list", "no figures", "something else"],
)
def test_what_holds_no_results_is_refused(tmp_path, content, message):
    bad, good = tmp_path / "bad.json", write(tmp_path / "good.json", report(mnist=measured()))
    if content is not None:
        bad.write_text(content)
    done = bench("--compare", good, bad)
    assert done.exit_code == 2 and message in done.output and "Traceback" not in done.output


def test_the_committed_results_can_be_read():
    committed = results.read(ROOT / "bench" / "results" / "cpu.json")
    assert committed.networks["mnist"].of("Std").kept_ratio == 1.0
    found, _ = comparison.compare(committed, committed, (ROOT, ROOT))
    assert found and not any(d.moved for d in found)


# ------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["resnet"], "no network is named resnet; there are mnist, cifar"),
        (["--suite", "tpu"], "no suite is named tpu; there are cpu, gpu"),
        (
            ["--suite", "gpu", "--dtype", "float16"],
            "--dtype is one of those of the suite gpu: bfloat16, float32; got float",
        ),
        (["--suite", "cpu", "--dtype", "bfloat16"], "--dtype is one of those of the suite cpu: float32; got bfloat16"),
        (["mnist", "--dtype", "bfloat16"], "--dtype is one of those of the suite gpu; say --suite gpu; got bfloat16"),
        (["mlp", "--rounds", "-1"], "--rounds is a whole number from 1, got -1"),
        (["mlp", "--batch", "0"], "--batch is a whole number from 1, got 0"),
        (["mlp", "--threads", "0"], "--threads is a whole number from 1, got 0"),
        (["mlp", "--contestants", "nobody"], "no contestant's name contains 'nobody'; there are Std"),
        (["mlp", "--backends", "abacus"], "no backend is named abacus; there are cpp, triton, reference"),
        (["mlp", "--resume"], "say which with --json FILE"),
        (["mlp", "--plot", "ratios.jpg"], "--plot writes .png or .svg, got ratios.jpg"),
        (["mlp", "--json", "."], "--json is a file to write, . is a folder"),
        (["mlp", "--markdown", "missing.md"], "missing.md cannot be read: No such file"),
        (["mlp", "--where", "--suite", "cpu"], "--where takes networks, --contestants, --backends, --batch, --quick"),
        (["mlp", "--where", "--rounds", "15", "--json", "x"], "--plot only, got --rounds, --json; leave them out"),
        (["mlp", "--where", "--no-compile"], "got --compile; leave it out"),
        (
            ["--compare", "a", "b", "mlp", "--json", "x"],
            "--compare takes no other options, got networks, --json; leave",
        ),
        (["--compare", "a", "b", "--where"], "--compare takes no other options, got --where; leave it out"),
        (["--list", "mlp"], "--list takes no other options, got networks; leave them out"),
        (["mlp", "--json", "file/x.json"], "--json: file/x.json cannot be written, "),
        (["mlp", "--json", "file/new/x.json"], "file is no folder; name a file in another folder"),
        (["mlp", "--plot", "file/x.svg"], "--plot: file/x.svg cannot be written, "),
        (["mlp", "--plot", "/proc/x.svg"], "/proc/x.svg cannot be written, /proc takes nothing (No such file"),
        (["mlp", "--where", "--plot", "file/x.svg"], "--plot: file/x.svg cannot be written, "),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_bad_input_is_one_sentence(words, message, instead, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    done = bench(*words)
    assert done.exit_code == 2 and message in done.output and "Traceback" not in done.output
    assert instead == []  # before anything is measured
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_cannot_be_written_is_refused(instead, tmp_path, monkeypatch):
    """As the system says it to whom it applies; root may write everywhere."""

    def refuse(dir):
        raise PermissionError(13, "Permission denied", str(dir / "tmp1"))

    monkeypatch.setattr(results.tempfile, "TemporaryFile", refuse)
    done = bench("mlp", "--json", tmp_path / "new" / "x.json")
    assert done.exit_code == 2 and f"{tmp_path} takes nothing (Permission denied); name a file" in done.output
    assert instead == [] and not list(tmp_path.iterdir())


def test_a_page_without_marks_is_refused_before_anything_is_measured(tmp_path, instead):
    page = tmp_path / "page.md"
    page.write_text("no marks")
    done = bench("mlp", "--markdown", page)
    assert done.exit_code == 2 and "needs one line that begins with '<!-- measured:begin'" in done.output
    assert instead == [] and page.read_text() == "no marks"


def test_a_wrong_contestant_ends_the_command(monkeypatch):
    def wrong(*_, **settings):
        raise WrongGradientError("ours is off by 1")

    monkeypatch.setattr(terminal, "measure_network", wrong)
    done = bench("mlp", "--no-compile")
    assert done.exit_code == 1 and "error: ours is off by 1" in done.output


def test_marks_are_found_wherever_they_are(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- a:begin -->\n1\n<!-- a:end -->\n<!-- b:begin -->\n2\n<!-- b:end -->\n")
    tables.write_between_marks(page, "b", "new")
    assert page.read_text() == "<!-- a:begin -->\n1\n<!-- a:end -->\n<!-- b:begin -->\n\nnew\n\n<!-- b:end -->\n"


# ------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("ending", [".png", ".svg"])
def test_a_plot_holds_every_bar_and_target(tmp_path, ending, monkeypatch):
    from matplotlib.axes import Axes

    from racecar.bench import plot

    drawn = []
    real = Axes.bar
    monkeypatch.setattr(Axes, "bar", lambda self, *a, **k: drawn.append(a) or real(self, *a, **k))
    both = measured(result("plain PyTorch, full"), result("ours, full, store"))
    plot.draw({"mnist": both, "mlp": both}, tmp_path / f"x{ending}", "a machine")
    assert len(drawn) == 2 * 2 * 3
    assert (tmp_path / f"x{ending}").stat().st_size > 1000
    assert plot._goal(targets.CPU, "mnist", "ours, full, store", "step") == 1.30
    assert plot._goal(targets.CPU, "mnist", "plain PyTorch, full", "step") is None


def test_a_plot_of_tiny_inputs_has_no_targets(tmp_path, monkeypatch):
    from racecar.bench import plot

    monkeypatch.setattr(plot, "_goal", lambda *_: pytest.fail("a target for figures that mean nothing"))
    tiny = dataclasses.replace(measured(result("ours, full, store")), tiny=True)
    plot.draw({"mnist": tiny}, tmp_path / "x.svg", "a machine")


# ------------------------------------------------------------------------------------------- single operators


def test_the_benchmark_of_single_operators_runs():
    some = "MLP or pooled-full or (test_reverse_layer and group)"
    words = ["-m", "pytest", "bench/test_ops.py", "-q", "--benchmark-disable", "-p", "no:cacheprovider", "-k", some]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-3000:]
    assert re.search(r"(\d+) passed", done.stdout)


def test_json_replaces_results_alone(tmp_path):
    path = tmp_path / "notes.json"
    path.write_text("my notes")
    ran = bench("mlp", *QUICK, "--json", path)
    assert ran.exit_code == 2 and "would replace what is no file of results" in ran.output
    assert path.read_text() == "my notes"

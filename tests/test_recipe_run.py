"""`racecar run mi`: what it writes, what a broken run keeps, and bad input in one line."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import savemat
from typer.testing import CliRunner

from racecar.cli import app
from racecar.experiments.folder import SettingsError, locked
from racecar.recipes import RECIPES
from racecar.recipes.command import without_folders
from racecar.recipes.folder import RunFolder, stop_asked
from racecar.recipes.mi import KINDS, PRETRAINED, Experiment, Listener, Settings, moments, run, split
from racecar.recipes.mi_results import SCRATCH
from racecar.recipes.patterns import generated_patterns
from racecar.recipes.tables import comparison

TINY = Settings(preset="quick", seeds=2, epochs=2, transfer_epochs=2, batch_size=2048)
FIGURES = ("accuracy", "curves", "planes", "left by the reverse pass")


def invoke(*arguments: str):
    environment = {"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}
    return CliRunner().invoke(app, ["run", *arguments], env=environment)


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that nothing broke off."""
    folder = RunFolder(tmp_path_factory.mktemp("whole") / "out", "mi")
    return run(TINY, folder, command="racecar run mi --first"), folder


def test_the_result_is_written_beside_the_papers(finished):
    content, folder = finished
    assert json.loads((folder.path / "results.json").read_text()) == {"format": 1, **content}
    assert folder.finished and (folder.path / "planes.png").read_bytes()[:4] == b"\x89PNG"
    table = (folder.path / "table.md").read_text()
    assert "| Std | .967 |" in table and "`racecar run mi --first`" in table and "2 seeds, preset quick" in table
    assert str(folder.path) not in (folder.path / "results.json").read_text()
    tasks = {name: sorted(own) for name, own in content["accuracy"].items()}
    assert tasks == {**{n: ["A", "AA", "AB"] for n in KINDS}, "Pre": ["AA", "AB"], SCRATCH: ["AB"]}
    assert all(len(values) == 2 for own in content["accuracy"].values() for values in own.values())
    # swapped labels turn an accuracy round; both of phase II begin with the same networks
    first = {task: content["curves"][task]["RR"][0][1] for task in ("AA", "AB")}
    assert np.add(first["AA"], first["AB"]) == pytest.approx(np.ones(2))
    assert first["AA"] == content["accuracy"]["RR"]["A"]
    for name in PRETRAINED:
        assert np.shape(content["planes"][name]["before"]) == (2, 2, 7)
        assert content["planes"][name]["AA"][0][0][0] == pytest.approx(12)  # the input tells all 4096 patterns apart


def test_kinds_differ_in_what_they_were_trained_with_alone(finished):
    _, folder = finished
    done = folder.load()["done"]
    weights = done["phase I"][0]
    rows = {kind: weights[2 * i : 2 * i + 2] for i, kind in enumerate(KINDS)}
    assert len({rows[kind].sum().item() for kind in KINDS}) == len(KINDS)
    experiment = Experiment(TINY, split(generated_patterns(), TINY))
    stack, _ = experiment.training("phase I")
    initial = {kind: stack.weights[0][2 * i : 2 * i + 2] for i, kind in enumerate(KINDS)}
    assert all(torch.equal(initial[kind], initial["Std"]) for kind in KINDS)
    experiment.state["done"] = done
    second, training = experiment.training("phase II")
    assert torch.equal(second.weights[0][:10], weights) and torch.equal(second.weights[0][12:22], weights)
    assert training.labels.tolist() == [1.0] * 12 + [-1.0] * 14


class BrokenOffError(Exception):
    pass


@pytest.mark.parametrize("stop", [3, 8, 10])  # in a layer of Pre; in phase I; in phase II
def test_a_run_that_was_broken_off_ends_with_the_same_figures(tmp_path, finished, stop):
    want, _ = finished
    folder, done = RunFolder(tmp_path / "out", "mi"), []

    def advance(epochs):
        done.append(epochs)
        if len(done) == stop:
            raise BrokenOffError

    often = replace(TINY, save_every_s=0.0)
    with pytest.raises(BrokenOffError):
        run(often, folder, listener=Listener(advance=advance))
    with pytest.raises(SettingsError, match="holds a run that was broken off; give --resume to go on with it"):
        run(often, folder)
    told = []
    got = run(often, folder, resume=True, listener=Listener(plan=lambda *counts: told.append(counts)))
    assert told == [(10, stop - 1)]  # the epoch that was broken off is lost, and no other
    for name in FIGURES:
        assert got[name] == want[name], name


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path, finished, monkeypatch):
    want, _ = finished
    folder, saves, save = RunFolder(tmp_path / "out", "mi"), [], RunFolder.save

    def full(self, state):
        saves.append(1)
        if len(saves) > 4:
            monkeypatch.setattr(Path, "open", refuse)
        save(self, state)

    def refuse(self, *args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save", full)
        with pytest.raises(OSError, match="No space left"):
            run(replace(TINY, save_every_s=0.0), folder)
        patch.undo()
    monkeypatch.undo()
    assert list(folder.load()["done"])  # what four saves held
    got = run(TINY, folder, resume=True)
    assert got["accuracy"] == want["accuracy"]


def test_other_settings_data_and_recipes_are_refused(tmp_path, finished):
    _, folder = finished
    with pytest.raises(SettingsError, match=r"has other settings \(lam was 0.01, now 1.0\); leave them out"):
        run(replace(TINY, lam=1.0), folder, resume=True)
    made = generated_patterns()
    savemat(tmp_path / "other.mat", {"F": made.x, "y": 1 - made.y[None]})
    with pytest.raises(SettingsError, match="the data have changed since the run"):
        run(TINY, folder, data=tmp_path / "other.mat", resume=True)
    with pytest.raises(SettingsError, match="holds a run of the recipe 'mi', not of 'peak'; give another --out"):
        RunFolder(folder.path, "peak").settings_to_resume()
    with pytest.raises(SettingsError, match="holds a run that is finished; give --resume to see its table again"):
        run(TINY, folder)
    with pytest.raises(SettingsError, match="there is no run to resume in"):
        RunFolder(tmp_path, "mi").settings_to_resume()
    (tmp_path / "results.json").write_text("mine")
    with pytest.raises(SettingsError, match=r"holds results.json, but no run of a recipe"):
        run(TINY, RunFolder(tmp_path, "mi"))
    assert (tmp_path / "results.json").read_text() == "mine"
    before = {path.name: path.read_bytes() for path in folder.path.iterdir()}
    for how in ({"resume": True}, {"overwrite": True}, {}):
        with locked(folder.path, "run"), pytest.raises(SettingsError, match="a run is running in"):
            run(TINY, folder, **how)
    assert {path.name: path.read_bytes() for path in folder.path.iterdir()} == before  # --overwrite took nothing away


@pytest.mark.parametrize("package", ["matplotlib", "scipy"])
def test_what_is_needed_at_the_end_is_missed_at_the_beginning(tmp_path, monkeypatch, package):
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)
    result = invoke("mi", "--quick", "--out", str(tmp_path / "out"))
    assert result.exit_code == 1 and f"needs {package}, which is not installed: pip install" in plain(result.stderr)
    assert not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_is_named(tmp_path, finished):
    _, whole = finished
    folder = RunFolder(tmp_path / "out", "mi")
    with folder.held():
        folder.begin(TINY, None, 1, "", resume=False, overwrite=False)
    assert folder.load() is None
    for content in (b"", b"half a fi", (whole.path / "checkpoint.pt").read_bytes()[:5000]):
        (folder.path / "checkpoint.pt").write_bytes(content)
        with pytest.raises(SettingsError, match=r"checkpoint.pt is damaged .* begin anew with --overwrite"):
            folder.load()


def test_validation_leaves_the_test_patterns_alone():
    patterns = generated_patterns()
    for ordered in (False, True):
        for seed, settings in enumerate([TINY, replace(TINY, ordered=ordered, validate=True)]):
            data = split(patterns, replace(settings, ordered=ordered))
            sizes = [(len(p.x), p.x.shape[1]) for p in (data.train, data.test)]
            assert sizes == [[(2, 3277), (2, 819)], [(2, 2622), (2, 655)]][seed]
        whole = split(patterns, replace(TINY, ordered=ordered))
        tested = {tuple(row) for row in whole.test.x[1].tolist()}
        for part in (data.train, data.test):
            assert not tested & {tuple(row) for row in part.x[1].tolist()}
    assert split(patterns, replace(TINY, signed=True)).train.x.unique().tolist() == [-1, 1]


def test_recorded_moments_hold_the_first_and_the_last():
    assert moments(1) == [0, 1] and moments(3) == [0, 1, 2, 3]
    assert moments(20000)[0] == 0 and moments(20000)[-1] == 20000 and len(moments(20000)) <= 13


def test_table():
    here = {"Std": {"A": [0.9, 0.92, 0.91]}, "RR": {"A": [0.95, 0.96, 0.955]}, "Pre": {}}
    lines = comparison({"Std": {"A": 0.8}}, here, ["A"]).splitlines()
    assert lines[0] == "| model | A paper | A here | A − Std (p) |"
    assert lines[2] == "| Std | .800 | .910 ± .010 |  |"
    assert re.fullmatch(r"\| RR \| – \| \.955 ± \.005 \| \+\.045 \(\.\d{3}\) \|", lines[3])
    assert lines[4] == "| Pre | – | – |  |"


def test_help_names_every_recipe_and_option():
    assert all(name in plain(invoke("--help").stdout) for name in RECIPES)
    text = plain(invoke("mi", "--help").stdout)
    for option in ("--out", "--seeds", "--data", "--resume", "--quick", "--preset", "--overwrite", "--validate"):
        assert option in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "nothing.mat"], "no such file: nothing.mat"),
        (["--preset", "huge"], "preset must be one of cpu, paper, quick, got 'huge'"),
        (["--seeds", "0"], "seeds must be at least 1, got 0"),
        (["--resume"], "there is no run to resume in"),
        (["--resume", "--overwrite"], "give one of them"),
        (["--quick", "--preset", "cpu"], "--quick is a preset of its own"),
    ],
)
def test_bad_input_is_one_line_and_status_2(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    result = invoke("mi", *words)
    assert result.exit_code == 2 and message in plain(result.stderr) and "Traceback" not in result.output
    assert not list(tmp_path.rglob("checkpoint.pt"))


def test_the_recorded_command_shows_no_folders():
    words = ["run", "mi", "--data", "/home/me/var_u.mat", "--out", "results/mi", "--seeds", "2"]
    assert [without_folders(word) for word in words] == [*words[:3], "var_u.mat", *words[4:]]


def test_presets_are_settings():
    recipe = RECIPES["mi"]
    paper = recipe.settings("paper")
    assert asdict(paper) == {**asdict(Settings()), "preset": "paper"}
    assert (paper.epochs, paper.transfer_epochs, paper.seeds, paper.lam) == (20000, 20000, 5, 0.01)
    quick = recipe.settings("quick", seeds=1)
    assert quick.seeds == 1 and quick.epochs < 100


def test_the_first_interrupt_waits_and_the_second_does_not():
    def twice():
        with stop_asked() as asked:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            seen.append(asked())
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)

    seen = []
    with pytest.raises(KeyboardInterrupt):
        twice()
    assert seen == [True] and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("how", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_a_run_that_is_stopped_from_outside_goes_on(tmp_path, how):
    out = tmp_path / "out"
    words = [sys.executable, "-m", "racecar", "run", "mi", "--quick", "--seeds", "1", "--out", str(out)]
    process = subprocess.Popen(
        [*words, "--save-every-s", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
    )
    end = time.monotonic() + 60
    while not (out / "checkpoint.pt").exists() and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(how)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (130 if how == signal.SIGINT else -signal.SIGKILL)
    if how == signal.SIGINT:
        assert "stopped before the end; what was computed is kept in" in plain(errors)
    result = invoke("mi", "--resume", "--out", str(out))
    assert result.exit_code == 0, result.output
    assert "epochs are kept from before" in result.stdout and "| RR | .822 |" in result.stdout
    assert RunFolder(out, "mi").finished


@pytest.mark.parametrize("recipe", ["mnist", "peak"])
def test_sigterm_ends_a_run_as_an_interrupt_does(tmp_path, recipe):
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "racecar", "run", recipe, "--quick", "--seeds", "5", "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
    )
    end = time.monotonic() + 60
    while not (out / "checkpoint.pt").exists() and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped before the end; what was computed is kept in" in plain(errors)
    assert not (out / ".lock").exists() and not (out / "runs" / ".jobs.pt").exists()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--threads", "100000"], "threads must be at most"),
        (["--save-every-s", "nan"], "save_every_s must be a number, 0 or larger, got nan"),
        (["--save-every-s", "-1"], "save_every_s must be a number, 0 or larger, got -1.0"),
    ],
)
def test_options_that_no_run_could_follow(tmp_path, wrong, said):
    result = invoke("peak", "--quick", *wrong, "--out", str(tmp_path / "out"))
    assert result.exit_code == 2 and said in plain(result.stderr)
    assert not (tmp_path / "out").exists()


def test_a_damaged_state_is_named(tmp_path):
    (tmp_path / "run.json").write_text("{")
    result = invoke("mi", "--quick", "--resume", "--out", str(tmp_path))
    assert result.exit_code == 2 and "run.json is damaged" in plain(result.stderr)


def test_an_accelerator_is_refused_where_it_would_do_nothing(tmp_path: Path) -> None:
    done = invoke("peak", "--quick", "--accelerator", "gpu", "--out", str(tmp_path / "out"))
    assert done.exit_code == 2
    assert "leave out --accelerator" in plain(done.stderr)

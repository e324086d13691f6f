"""A demo that is broken off: by a kill, by Ctrl-C, by a full disk, by a worker's death."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from toys import halves, same_runs, tiny

import racecar
from racecar.demo.experiment import Listener, run_demo
from racecar.demo.folder import read_state, settings_to_resume
from racecar.demo.results import load_results
from racecar.demo.settings import Settings
from racecar.experiments.folder import SettingsError, locked
from racecar.experiments.workers import WorkerDiedError


def stop_at(name: str, error: BaseException):
    """A listener that breaks the demo off when this begins."""

    def stage(words: str) -> None:
        if words == name:
            raise error

    return Listener(stage=stage)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "error"),
    [
        ("RR, seed 0, A→A", KeyboardInterrupt()),
        ("Std, seed 1, I", OSError(28, "No space left on device")),
        ("reconstructions, patterns, layers", KeyboardInterrupt()),
        ("measuring costs", OSError(28, "No space left on device")),
    ],
)
def test_what_was_finished_is_kept_and_gone_on_with(tmp_path, finished, moment, error):
    _, _, want = finished
    settings, out = tiny(tmp_path), tmp_path / "out"
    with pytest.raises(type(error)):
        run_demo(settings, out, listener=stop_at(moment, error))
    before = {path: path.stat().st_mtime_ns for path in (out / "runs").glob("*/history.json")}
    assert before and not (out / "results.json").exists()
    with pytest.raises(
        SettingsError, match=f"was broken off, with {len(before)} finished runs; give --resume to go on"
    ):
        run_demo(settings, out)
    said: list[str] = []
    got = run_demo(settings_to_resume(out, {}), out, resume=True, listener=Listener(say=said.append))
    assert same_runs(got, want) and got.resumed
    assert got.reconstructions == want.reconstructions and got.reversibility == want.reversibility
    assert f"{len(before)} of 18 runs are finished already and are kept." in said
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())


def test_resume_refuses_other_settings_and_other_data(tmp_path):
    settings, out = tiny(tmp_path), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run_demo(settings, out, listener=stop_at("Pre, seed 0, I", KeyboardInterrupt()))
    with pytest.raises(SettingsError, match=r"has other settings \(lam was 1.0, now 2.0\); leave them out"):
        run_demo(settings_to_resume(out, {"lam": 2.0}), out, resume=True)
    assert settings_to_resume(out, {"workers": 2}).workers == 2
    halves(tmp_path, count=62)
    with pytest.raises(SettingsError, match="the data have changed since the demo"):
        run_demo(settings_to_resume(out, {}), out, resume=True)
    halves(tmp_path)
    assert (out / "runs" / "Std-seed0-I" / "history.json").exists()
    (out / "mine.txt").write_text("not the demo's")
    run_demo(Settings(**{**vars(settings), "seeds": 1, "models": "Std"}), out, overwrite=True)
    assert sorted(path.name for path in (out / "runs").iterdir()) == ["Std-seed0-AA", "Std-seed0-AB", "Std-seed0-I"]
    assert (out / "mine.txt").exists() and read_state(out)["finished"]


def test_a_finished_demo_may_be_begun_anew_or_read_back(tmp_path):
    settings, out = tiny(tmp_path, seeds=1, models="Std"), tmp_path / "out"
    want = run_demo(settings, out, command="racecar demo --first")
    resumed = run_demo(settings_to_resume(out, {}), out, resume=True, command="racecar demo --resume")
    assert same_runs(resumed, want) and resumed.command == "racecar demo --first"
    assert same_runs(run_demo(settings, out), want)
    with pytest.raises(SettingsError, match=r"other settings \(lam was 1.0, now 2.0\).*begin anew with --overwrite"):
        run_demo(replace(settings, lam=2.0), out)
    assert same_runs(load_results(out)[0], want)


def test_what_a_demo_did_not_make_is_never_removed(tmp_path):
    out = tmp_path / "project"
    mine = [out / "runs" / "my-work" / "events", out / "report.html"]
    for path in mine:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("months of work")
    settings = tiny(tmp_path, seeds=1, models="Std")
    with pytest.raises(SettingsError, match=r"project holds report.html, runs/my-work, but no demo of this version"):
        run_demo(settings, out)
    assert all(path.read_text() == "months of work" for path in mine)
    run_demo(settings, out, overwrite=True)
    assert mine[0].read_text() == "months of work" and (out / "runs" / "Std-seed0-I").is_dir()
    (out / "demo.json").write_text("{")  # damaged, or of another version
    with pytest.raises(SettingsError, match=r"holds demo.json, results.json.* and more, but no demo of this version"):
        run_demo(settings, out)
    assert (out / "runs" / "Std-seed0-I" / "history.json").exists()


def test_a_second_demo_in_the_same_folder_is_refused(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with locked(out, "demo"), pytest.raises(SettingsError, match="a demo is running in"):
        run_demo(tiny(tmp_path), out)


def test_a_damaged_run_is_run_again(tmp_path, finished):
    _, _, want = finished
    settings, out = tiny(tmp_path), tmp_path / "out"
    run_demo(settings, out)
    (out / "runs" / "RR-seed0-AA" / "weights.safetensors").write_bytes(b"half a fi")
    assert same_runs(run_demo(settings_to_resume(out, {}), out, resume=True), want)


def test_state_that_is_not_ours_is_not_resumed(tmp_path):
    (tmp_path / "demo.json").write_text(
        json.dumps({"settings": {"lam": 1}, "fingerprint": 0, "command": "", "finished": True})
    )
    assert read_state(tmp_path) is None
    (tmp_path / "demo.json").write_text("{")
    assert read_state(tmp_path) is None
    with pytest.raises(SettingsError, match="there is no demo to resume"):
        settings_to_resume(tmp_path, {})


def begin_in_a_process(tmp_path: Path, *options: str) -> subprocess.Popen[str]:
    """`racecar demo` as a user runs it, in a process group of its own."""
    data = halves(tmp_path)
    words = [
        "--data",
        str(data),
        "--quick",
        "--batch-size",
        "16",
        "--models",
        "Pre,RR",
        "--transfer-epochs",
        "3",
        "--labels",
        "10",
    ]
    root = Path(racecar.__file__).parent.parent
    paths = os.pathsep.join([str(root), str(root.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-m", "racecar", "demo", *words, "--out", str(tmp_path / "out"), *options],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # A process in the background of a shell ignores Ctrl-C, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for_runs(out: Path, count: int, process: subprocess.Popen[str]) -> None:
    """Until so many runs are finished."""
    deadline = time.monotonic() + 120
    while len(list(out.glob("runs/*/history.json"))) < count:
        if process.poll() is not None or time.monotonic() > deadline:
            pytest.fail(f"the demo ended too early or hangs: {process.communicate(timeout=10)[0]}")
        time.sleep(0.01)


def alive(group: int) -> bool:
    """Whether any process of a group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_process_is_resumed_to_the_same_table(tmp_path, finished, how):
    _, _, want = finished
    process = begin_in_a_process(tmp_path, "--workers", "2")
    wait_for_runs(tmp_path / "out", 4, process)
    if how is signal.SIGKILL:
        process.kill()  # the parent alone: its workers must not go on without it
    else:
        os.killpg(process.pid, how)  # as a terminal does
    text, _ = process.communicate(timeout=60)
    assert process.returncode == (130 if how is signal.SIGINT else -how)
    if how is signal.SIGINT:
        assert "stopped before the end; what was finished is kept in" in text and "--resume" in text
        assert "Traceback" not in text
    deadline = time.monotonic() + 30
    while alive(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(process.pid)
    second = subprocess.run(
        [sys.executable, "-m", "racecar", "demo", "--resume", "--out", str(tmp_path / "out")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert second.returncode == 0, second.stdout + second.stderr
    assert "of 18 runs are finished already and are kept" in second.stdout
    assert same_runs(load_results(tmp_path / "out")[0], want)


@pytest.mark.slow
def test_a_worker_that_is_killed_is_named(tmp_path):
    settings = tiny(tmp_path, workers=2)

    def kill_children(words: str) -> None:
        if words == "Std, seed 1, I":
            for pid in children(os.getpid()):
                os.kill(pid, signal.SIGKILL)

    with pytest.raises(WorkerDiedError, match="a worker process was killed"):
        run_demo(settings, tmp_path / "out", listener=Listener(stage=kill_children))


def children(parent: int) -> list[int]:
    """Processes whose parent this is, but for multiprocessing's own resource tracker."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            words = (entry / "cmdline").read_text()
        except OSError:
            continue
        if int(fields[1]) == parent and "resource_tracker" not in words:
            found.append(int(entry.name))
    return found

"""The demo's parts, and whole runs with tiny settings."""

from __future__ import annotations

import math
import os
from dataclasses import replace

import pytest
import torch
from torch import nn
from toys import halves, same_runs, tiny

from racecar.data import DataError, load_images
from racecar.demo.experiment import Listener, device_of, run_demo
from racecar.demo.network import fresh_network, small_convolutional_network
from racecar.demo.results import PHASES, load_results
from racecar.demo.settings import Settings
from racecar.demo.tasks import tasks_of
from racecar.demo.workplace import Workplace
from racecar.experiments.contestants import CONTESTANTS, chosen
from racecar.experiments.folder import SettingsError
from racecar.experiments.jobs import Job
from racecar.experiments.tasks import fingerprint, labelled, part_of_each_class
from racecar.training import load_checkpoint

# --- settings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch_size": -1}, "batch-size must be at least 1, got -1"),
        ({"transfer_epochs": 0}, "transfer-epochs must be at least 1, got 0"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"labels": -1}, "labels must be 0 \\(all\\) or the number per class, got -1"),
        ({"ort": -1.0}, "ort must be a number, 0 or larger, got -1.0"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"size": 0}, "size must be at least 1"),
        ({"size": 257}, "size must be at most 256 pixels, got 257"),
        ({"threads": 0}, f"threads must be at least 1 and at most {os.cpu_count()}, the CPUs here, got 0"),
        ({"threads": 100_000}, f"threads must be at least 1 and at most {os.cpu_count()}, the CPUs here, got 100000"),
        ({"lam": -0.1}, "lam must be a number, 0 or larger, got -0.1"),
        ({"lam": float("nan")}, "lam must be a number, 0 or larger, got nan"),
        ({"learning_rate": 0.0}, "learning-rate must be larger than 0"),
        ({"blur": 0.5}, "blur must be a length in pixels, at least 1, got 0.5"),
        ({"angle": float("inf")}, "angle must be a number of degrees"),
        ({"accelerator": "abacus"}, "accelerator must be cpu, gpu or auto, got abacus"),
    ],
)
def test_settings_are_checked(options, message):
    with pytest.raises(SettingsError, match=message):
        Settings(**options)


def test_defaults_depend_on_the_data():
    assert Settings().image_limits == Settings(validate=True).image_limits == (None, None)
    assert Settings(data="x").image_limits == (1000, 1000)
    assert Settings(data="x", validate=True).image_limits == (1500, 1000)
    assert Settings(limit=7).image_limits == (7, 7)
    data = load_images()
    filled = Settings(workers=3).filled(data)
    assert (filled.seeds, filled.epochs, filled.transfer_epochs, filled.blur, filled.workers) == (5, 40, 40, 3.0, 3)
    filled = Settings(quick=True, epochs=5, accelerator="auto").filled(data)
    assert (filled.seeds, filled.epochs, filled.transfer_epochs, filled.workers) == (2, 5, 2, 1)
    assert Settings(blur=8).filled(data).blur == 8
    with pytest.raises(SettingsError, match="blur must be at most 8 pixels, the longer side of these 8×8 .*got 8.5"):
        Settings(blur=8.5).filled(data)


# --- network and contestants


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 28, 28), (1, 5, 9), (1, 2, 2), (1, 1, 1)])
def test_network_takes_every_size(shape):
    network = small_convolutional_network(shape, 7, width=4)
    assert network(torch.rand(2, *shape)).shape == (2, 7)
    assert sum(isinstance(module, nn.Conv2d) for module in network) == 3


def test_contestants_start_from_the_same_weights_and_leave_the_global_seed_alone():
    state = torch.random.get_rng_state()
    a, b, c = (fresh_network((1, 8, 8), 10, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(a[0].weight, b[0].weight) and not torch.equal(a[0].weight, c[0].weight)
    settings = Settings(lam=0.3, ort=0.5)
    for contestant in CONTESTANTS:
        prepared = contestant.prepare(a, settings)
        assert prepared is a and hasattr(type(prepared), "reverse_loss") == contestant.reverse
        if contestant.reverse:
            assert prepared.plan.variant == contestant.variant and set(prepared.lam) == {0.3}
            assert prepared.plan.compared == (contestant.compared or 3)
        assert contestant.release(a) is a and type(a) is nn.Sequential
        assert (contestant.penalty(settings) is not None) == contestant.orthogonal


def test_contestants_are_chosen_by_key():
    assert chosen("") == CONTESTANTS
    assert [c.name for c in chosen(" rr, Ort")] == ["Std", "Ort", "RR"]
    assert [c.name for c in chosen("Std")] == ["Std"]
    with pytest.raises(SettingsError, match="models must be some of Std, Ort, Pre, RR1, RR, RRlocal, got 'RR,R2D2'"):
        chosen("RR,R2D2")


# --- tasks


def test_task_b_is_blurred_and_has_few_labels():
    data = load_images()
    settings = Settings().filled(data)
    tasks = tasks_of(data, settings)
    assert tasks["A"].train_x is data.train_x and torch.equal(tasks["B"].train_y, data.train_y)
    assert torch.equal(tasks["A"].test_y, tasks["B"].test_y)
    assert not torch.equal(tasks["A"].test_x, tasks["B"].test_x)
    few, same, other = (labelled(tasks["B"], 3, seed) for seed in (0, 0, 1))
    assert few.train_y.bincount().tolist() == [3] * 10 and torch.equal(few.train_x, same.train_x)
    assert not torch.equal(few.train_x, other.train_x) and few.test_x is tasks["B"].test_x
    assert labelled(tasks["B"], 0, seed=0) is tasks["B"]
    assert fingerprint(tasks) == fingerprint(tasks_of(data, settings))
    assert fingerprint(tasks) != fingerprint(tasks_of(data, replace(settings, blur=2.0)))


def test_validation_does_not_look_at_the_test_images():
    data = load_images()
    task = tasks_of(data, Settings(validate=True).filled(data))["A"]
    assert len(task.train_y) + len(task.test_y) == len(data.train_y)
    own = {tuple(image.flatten().tolist()) for image in data.train_x}
    assert all(tuple(image.flatten().tolist()) in own for image in task.test_x)
    assert (task.test_y.bincount() > 20).all()


def test_parts_of_classes():
    y = torch.tensor([0, 1, 0, 1, 0, 1, 1, 2, 2])
    mask = part_of_each_class(y, 0.2)
    assert y[mask].unique().tolist() == [0, 1, 2] and y[~mask].unique().tolist() == [0, 1, 2]
    with pytest.raises(SettingsError, match="at least two training images of every class"):
        part_of_each_class(torch.tensor([0, 0, 1]), 0.2)


# --- the whole


def test_whole_demo(tmp_path):
    said: list[str] = []
    stages: list[str] = []
    planned, done = [], []
    listener = Listener(said.append, planned.append, stages.append, done.append)
    threads = torch.get_num_threads()
    results = run_demo(tiny(tmp_path, models=""), tmp_path / "out", command="racecar demo", listener=listener)
    assert torch.get_num_threads() == threads
    assert "found 60 images of 2 classes" in said[0] and len(said) == 2
    # 2 seeds; 3 steps an epoch in A, 2 in B of 20 images; 5 models with 2 + 2 epochs of A, Pre with 3 layers × 2 + 2
    assert planned == [sum(done)] == [2 * (5 * 4 * 3 + 8 * 3 + 6 * 3 * 2)]
    assert stages[:3] == ["reading images", "blurring images", "Std, seed 0, I"]
    assert stages[-6] == "measuring costs" and stages[-1] == "measuring costs, round 5 of 5"
    assert {(run.model, run.seed, run.phase) for run in results.runs} == {
        (contestant.name, seed, phase) for contestant in CONTESTANTS for seed in range(2) for phase in PHASES
    }
    reverse = {run.model for run in results.runs if run.reverse_loss}
    assert reverse == {"RR¹", "RR", "RR local"}
    assert all(run.phase == "I" for run in results.runs if run.layer_losses)
    assert {run.model for run in results.runs if not run.accuracy} == {"Pre"}
    assert results.costs["Std"].time_ratio == results.costs["Std"].kept_ratio == results.costs["Std"].peak_ratio == 1.0
    assert results.costs["Std"].kept > results.costs["RR"].kept > 0  # one node keeps less than plain training
    assert results.costs["RR"].peak > results.costs["Std"].peak > 0
    assert list(results.information["RR"]) == ["D1", "D2", "D3", "D4"]
    bound = math.log2(results.data["used"][1])
    assert all(0 <= y <= x <= bound + 1e-9 for own in results.information.values() for x, y in own.values())
    assert list(results.reversibility["RR"]) == list(results.depths["RR"]) == ["0", "3", "5"]
    for name, made in results.reconstructions.items():  # of the same networks, seed 0
        assert results.depths[name]["5"] == made.error_with_gain <= min(1.0, made.error)
    again, pictures = load_results(tmp_path / "out")
    assert again.runs == results.runs and again.costs == results.costs
    assert again.reversibility == results.reversibility and again.depths == results.depths
    assert pictures["input"].shape == pictures["reconstruction RR"].shape == (2, 1, 6, 6)
    assert pictures["modes RR¹"].shape == (10, 1, 6, 6)
    runs = sorted(path.name for path in (tmp_path / "out" / "runs").iterdir())
    assert len(runs) == 6 * 2 * 3 and "RRlocal-seed1-AB" in runs
    load_checkpoint(fresh_network((1, 6, 6), 2, 0), tmp_path / "out" / "runs" / "RR-seed0-I" / "weights.safetensors")


@pytest.mark.slow
def test_two_workers_give_what_one_gives(tmp_path, finished, monkeypatch):
    for how in ("_share_fd_cpu_", "_share_filename_cpu_"):  # containers have 64 MB of shared memory
        monkeypatch.setattr(torch.UntypedStorage, how, lambda *_, **__: pytest.fail("images went to shared memory"))
    _, _, want = finished
    stages: list[str] = []
    got = run_demo(tiny(tmp_path, workers=2), tmp_path / "out", listener=Listener(stage=stages.append))
    assert same_runs(got, want)
    assert "RR, seed 1, A→B" in stages


def test_bad_input_is_found_before_anything_is_computed(tmp_path, monkeypatch):
    monkeypatch.setattr("racecar.demo.experiment.run_jobs", lambda *_, **__: pytest.fail("training has begun"))
    with pytest.raises(DataError, match="no such file or folder"):
        run_demo(Settings(data=str(tmp_path / "none")), tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match=r"out: cannot write into .*file/out"):
        run_demo(Settings(), tmp_path / "file" / "out")
    with pytest.raises(SettingsError, match="models must be some of"):
        run_demo(Settings(models="XX"), tmp_path / "out")
    with pytest.raises(SettingsError, match="there is no demo to resume in"):
        run_demo(Settings(), tmp_path / "out", resume=True)


def test_large_images_are_announced_before_they_are_blurred(tmp_path):
    said: list[str] = []

    def stop(stage: str) -> None:
        if stage == "blurring images":
            raise KeyboardInterrupt

    settings = Settings(data=str(halves(tmp_path, count=10, side=96)))
    with pytest.raises(KeyboardInterrupt):
        run_demo(settings, tmp_path / "out", listener=Listener(say=said.append, stage=stop))
    assert said[-1].startswith("Large images: 96×96 is 9 times the work of 32×32 in every step")


def test_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SettingsError, match="no CUDA GPU"):
        device_of("gpu")
    assert device_of("auto").type == device_of("cpu").type == "cpu"


def test_a_job_knows_its_steps_and_its_folder(tmp_path):
    data = load_images(halves(tmp_path))
    settings = tiny(tmp_path).filled(data)
    place = Workplace(tasks_of(data, settings), 2, settings, tmp_path / "runs")
    pre, rr = (Job(place, contestant, 1) for contestant in chosen("Pre,RR")[1:])
    assert [pre.steps(phase) for phase in PHASES] == [18, 6, 6] and [rr.steps(phase) for phase in PHASES] == [6, 6, 6]
    assert rr.folder("A→B").name == "RR-seed1-AB" and not rr.finished("I")

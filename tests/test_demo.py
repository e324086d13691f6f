"""The demo's parts and one whole run with tiny settings."""

from __future__ import annotations

import logging
import os
import signal
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import racecar
from racecar.data import DataError, load_images
from racecar.demo.checkpoints import CheckpointError, load_checkpoint, save_checkpoint
from racecar.demo.contestants import CONTESTANTS, fresh_network, small_convolutional_network
from racecar.demo.experiment import Listener, checkpoint_name, compare, cpu_threads, device_of, reconstruct, run_demo
from racecar.demo.results import PHASES, load_results
from racecar.demo.settings import Settings, SettingsError
from racecar.demo.singular_vectors import data_modes, first_layer_modes
from racecar.demo.training import Batches, Task, train


def small_data(tmp_path, count=60, side=6, channels=1):
    """Two classes that differ in where the light is."""
    rng = np.random.default_rng(0)
    y = np.arange(count) % 2
    x = rng.uniform(0, 0.3, (count, side, side, channels))
    x[y == 0, : side // 2] += 0.6
    x[y == 1, side // 2 :] += 0.6
    path = tmp_path / "halves.npz"
    np.savez(path, x=x, y=y)
    return path


def task_of(path) -> Task:
    data = load_images(path)
    return Task(data.train_x, data.train_y, data.test_x, data.test_y)


# --- settings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch_size": -1}, "batch-size must be at least 1, got -1"),
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


def test_defaults_depend_on_the_data(tmp_path):
    assert Settings().image_limit is None
    assert Settings(data="x").image_limit == 3000
    assert Settings(data="x", quick=True).image_limit == 1000
    assert Settings(limit=7).image_limit == 7
    data = load_images()
    filled = Settings().filled(data)
    assert (filled.seeds, filled.epochs, filled.blur) == (3, 40, 3.0)
    filled = Settings(quick=True, epochs=5).filled(data)
    assert (filled.seeds, filled.epochs) == (2, 5)
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
    for contestant in CONTESTANTS:
        prepared = contestant.prepare(a, 0.1)
        assert prepared is a and hasattr(type(prepared), "reverse_loss") == contestant.reverse
        assert contestant.release(a) is a and type(a) is nn.Sequential


# --- training


def test_batches_cover_everything_once_in_a_seeded_order():
    x, y = torch.arange(10.0), torch.arange(10)
    batches = Batches(x, y, 4, seed=3)
    assert len(batches) == 3
    first, second = [torch.cat([b for _, b in batches]) for _ in range(2)]
    assert not torch.equal(first, second)
    assert first.sort().values.tolist() == list(range(10))
    assert torch.equal(first, torch.cat([b for _, b in Batches(x, y, 4, seed=3)]))
    assert torch.cat([b for _, b in Batches(x, y, 4)]).tolist() == list(range(10))


@pytest.mark.parametrize("reverse", [False, True])
def test_training_learns_is_repeatable_and_quiet(tmp_path, capfd, caplog, reverse):
    task = task_of(small_data(tmp_path))
    steps: list[int] = []
    options = {"epochs": 12, "batch_size": 16, "learning_rate": 3e-3, "reverse": reverse, "seed": 0}

    def once():
        network = fresh_network((1, 6, 6), 2, seed=0)
        if reverse:
            racecar.wrap(network, lam=0.1, variant="full", reduction="mean")
        with warnings.catch_warnings(), caplog.at_level(logging.INFO):
            warnings.simplefilter("error", UserWarning)
            with cpu_threads(1):  # as the demo itself: two threads on a busy machine wait for each other
                return network, train(network, task, advance=steps.append, **options)

    network, curve = once()
    assert curve.accuracy[-1] == 1.0
    assert len(curve.accuracy) == len(curve.task_loss) == 12
    assert curve.task_loss[-1] < curve.task_loss[0]
    assert len(curve.reverse_loss) == (12 if reverse else 0)
    assert sum(steps) == 12 * 3
    again, same = once()
    assert same == curve
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))
    captured = capfd.readouterr()
    assert captured.out + captured.err == "" and caplog.text == ""


def test_an_interrupt_is_passed_on(tmp_path):
    def stop(_: int) -> None:
        raise KeyboardInterrupt

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(
            fresh_network((1, 6, 6), 2, 0),
            task_of(small_data(tmp_path)),
            epochs=1,
            batch_size=16,
            learning_rate=1e-3,
            reverse=False,
            seed=0,
            advance=stop,
        )
    assert signal.getsignal(signal.SIGINT) is handler


# --- checkpoints


def test_checkpoint_round_trip_wrapped_or_not(tmp_path):
    path = tmp_path / "a.safetensors"
    source = fresh_network((1, 8, 8), 10, 0)
    save_checkpoint(racecar.wrap(source, lam=0.1), path, {"seed": "0"})
    target = fresh_network((1, 8, 8), 10, 1)
    load_checkpoint(target, path)
    for key, value in target.state_dict().items():
        assert torch.equal(value, source.state_dict()[key])
    load_checkpoint(racecar.wrap(target, lam=0.1), path)


def test_checkpoint_of_another_architecture_names_the_keys_and_changes_nothing(tmp_path):
    path = tmp_path / "a.safetensors"
    save_checkpoint(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2, bias=False)), path)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5), nn.Linear(3, 6, bias=False))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(model, path)
    text = str(caught.value)
    assert "another architecture than this Sequential" in text
    assert "missing: 1.weight, 1.bias" in text
    assert "2.weight is (2, 3), the model has (6, 3)" in text
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(CheckpointError, match="unexpected: 2.weight"):
        load_checkpoint(nn.Sequential(nn.Linear(4, 3)), path)


def test_checkpoint_that_is_none(tmp_path):
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_checkpoint(nn.Linear(1, 1), tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"PK something else")
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        load_checkpoint(nn.Linear(1, 1), tmp_path / "bad.safetensors")


# --- singular vectors, reconstructions


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(2, 5, 3, padding=1),
        nn.Conv2d(2, 4, 3, stride=2, padding=1, padding_mode="circular"),
        nn.Conv2d(2, 4, 2, padding="same", groups=2),
        nn.Sequential(nn.Flatten(), nn.Linear(40, 7)),
    ],
)
def test_modes_are_the_right_singular_vectors_of_the_whole_layer(layer):
    network = layer if isinstance(layer, nn.Sequential) else nn.Sequential(layer)
    shape = (2, 4, 5)
    matrix = torch.func.jacrev(lambda x: network(x[None]).flatten())(torch.zeros(shape)).reshape(-1, 40).detach()
    values = torch.linalg.svdvals(matrix.double())
    modes = first_layer_modes(network, shape, count=3)
    torch.testing.assert_close(modes.singular_values, values[:3].float(), rtol=1e-4, atol=1e-5)
    ours = modes.images.flatten(1).double()
    torch.testing.assert_close((matrix.double() @ ours.T).norm(dim=0), values[:3], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours @ ours.T, torch.eye(3, dtype=torch.float64), atol=1e-5, rtol=0)
    assert (ours.amax(1) >= -ours.amin(1) - 1e-6).all()  # symmetric patterns have their largest entry several times


def test_data_modes_hold_most_of_the_energy():
    x = torch.rand(30, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    best = data_modes(x, count=4)
    values = torch.linalg.svdvals(x.flatten(1))
    assert best.energy(x) == pytest.approx(float(values[:4].square().sum() / values.square().sum()), rel=1e-5)
    assert data_modes(x, count=16).energy(x) == pytest.approx(1.0)


def test_modes_need_a_layer():
    with pytest.raises(ValueError, match="no Conv2d or Linear"):
        first_layer_modes(nn.Sequential(nn.ReLU()), (1, 4, 4))


def test_large_images_take_the_iterative_way_to_the_same_patterns(monkeypatch):
    network = fresh_network((3, 8, 8), 10, 0)
    x = torch.rand(30, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    exact = first_layer_modes(network, (3, 8, 8), 4), data_modes(x, 4)
    monkeypatch.setattr("racecar.demo.singular_vectors.LARGEST_MATRIX", 10)
    for ours, want in zip((first_layer_modes(network, (3, 8, 8), 4), data_modes(x, 4)), exact, strict=True):
        torch.testing.assert_close(ours.singular_values, want.singular_values, rtol=1e-4, atol=0)
        overlap = (ours.images.flatten(1) @ want.images.flatten(1).T).square().sum(1)
        torch.testing.assert_close(overlap, torch.ones(4), atol=1e-2, rtol=0)


def test_reconstruction_of_both_kinds_leaves_the_network_plain():
    network = fresh_network((1, 8, 8), 10, 0)
    x = torch.rand(5, 1, 8, 8)
    back = reconstruct(network, x, batch_size=2)
    assert back.shape == x.shape and type(network) is nn.Sequential and network.training
    torch.testing.assert_close(back, racecar.wrap(network, lam=0.0).reconstruct(x))


def test_gain_and_errors_of_a_reconstruction():
    x = torch.rand(5, 1, 3, 3)
    made = compare(x, 4 * x)
    assert made.gain == pytest.approx(0.25)
    assert made.error == pytest.approx(3.0)
    assert made.error_with_gain == pytest.approx(0.0, abs=1e-6)
    assert compare(x, torch.zeros_like(x)).error == pytest.approx(1.0)


# --- the whole


def test_whole_demo(tmp_path):
    said: list[str] = []
    stages: list[str] = []
    planned, done = [], []
    listener = Listener(said.append, planned.append, stages.append, done.append)
    settings = Settings(data=str(small_data(tmp_path)), quick=True, batch_size=16)
    threads = torch.get_num_threads()
    results = run_demo(settings, tmp_path / "out", command="racecar demo", listener=listener)
    assert torch.get_num_threads() == threads
    assert "found 60 images of 2 classes" in said[0]
    assert planned == [sum(done)] == [2 * 3 * 2 * 2 * 3]
    assert len(said) == 2
    assert stages[:3] == ["reading images", "blurring images", "Std, seed 0, I"]
    assert stages[-6] == "measuring costs" and stages[-1] == "measuring costs, round 5 of 5"
    assert {(run.model, run.seed, run.phase) for run in results.runs} == {
        (contestant.name, seed, phase) for contestant in CONTESTANTS for seed in range(2) for phase in PHASES
    }
    assert all(bool(run.reverse_loss) == (run.model == "RR" and run.phase == "I") for run in results.runs)
    assert results.costs["Std"].time_ratio == results.costs["Std"].kept_ratio == 1.0
    assert results.costs["RR"].kept > results.costs["Std"].kept > 0
    again, pictures = load_results(tmp_path / "out")
    assert again.runs == results.runs and again.costs == results.costs
    assert pictures["input"].shape == pictures["reconstruction RR"].shape == (2, 1, 6, 6)
    assert pictures["modes Std"].shape == (10, 1, 6, 6)
    files = sorted(os.listdir(tmp_path / "out" / "checkpoints"))
    assert len(files) == 12 and checkpoint_name("RR", 1, "A→B") in files
    load_checkpoint(fresh_network((1, 6, 6), 2, 0), tmp_path / "out" / "checkpoints" / "RR-seed0-I.safetensors")


def test_bad_input_is_found_before_anything_is_computed(tmp_path, monkeypatch):
    monkeypatch.setattr("racecar.demo.experiment.train", lambda *_, **__: pytest.fail("training has begun"))
    with pytest.raises(DataError, match="no such file or folder"):
        run_demo(Settings(data=str(tmp_path / "none")), tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match=r"out: cannot write into .*file/out"):
        run_demo(Settings(), tmp_path / "file" / "out")


def test_large_images_are_announced_before_they_are_blurred(tmp_path, monkeypatch):
    said: list[str] = []

    def stop(stage: str) -> None:
        if stage == "blurring images":
            raise KeyboardInterrupt

    settings = Settings(data=str(small_data(tmp_path, count=10, side=96)))
    with pytest.raises(KeyboardInterrupt):
        run_demo(settings, tmp_path / "out", listener=Listener(say=said.append, stage=stop))
    assert said[-1].startswith("Large images: 96×96 is 9 times the work of 32×32 in every step")


def test_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SettingsError, match="no CUDA GPU"):
        device_of("gpu")
    assert device_of("auto").type == device_of("cpu").type == "cpu"

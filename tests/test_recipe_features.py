"""`racecar run peak` and `mnist-svd`: images, what is measured, resume, bad input."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_recipe_run import invoke, plain
from torch import nn
from torch.nn import functional as F

from racecar.data import DataError
from racecar.experiments.folder import SettingsError
from racecar.recipes import RECIPES, features, mnist_svd, peak
from racecar.recipes.features import COLUMNS, KINDS, Images, Settings, columns_of, measured, perceptual_distances
from racecar.recipes.folder import RunFolder
from racecar.recipes.peaks import generated_peaks, peak_image, read_peaks

TINY = Settings(preset="quick", seeds=2, epochs=3)


def write_peaks(folder, side: int = 28) -> None:
    for label in (0, 1):
        (folder / str(label)).mkdir(parents=True)
        for number in range(55):
            pixels = np.full((side, side), 100 * label + number, np.uint8)
            Image.fromarray(pixels).save(folder / str(label) / f"{number}.png")


def test_generated_images_share_their_peak_and_nothing_else():
    train, test = generated_peaks(3)
    assert train.shape == (2, 50, 784) and test.shape == (2, 5, 784) and train.min() == 0 and train.max() == 255
    again, _ = generated_peaks(3)
    assert (train == again).all() and not (train == generated_peaks(4)[0]).all()
    always = (train == 255).all(axis=1)
    assert (always.sum(1) > 30).all() and not (always[0] & always[1])[: 28 * 5].any()
    assert len({image.tobytes() for image in train.reshape(100, -1)}) == 100
    assert peak_image(0, np.random.default_rng(0)).shape == (28, 28)


def test_peaks_are_read_from_a_folder(tmp_path):
    write_peaks(tmp_path / "peak")
    train, test = read_peaks(tmp_path / "peak")
    assert train[1, 7, 0] == 107 and test[0, 4, 783] == 54


@pytest.mark.parametrize("fault", ["no folder", "missing", "no image", "size"])
def test_a_folder_that_does_not_fit_is_refused(tmp_path, fault):
    folder = tmp_path / "peak"
    if fault != "no folder":
        write_peaks(folder, side=20 if fault == "size" else 28)
    if fault == "missing":
        (folder / "1" / "54.png").unlink()
    if fault == "no image":
        (folder / "0" / "3.png").write_bytes(b"no image")
    message = {"no folder": "is no folder", "missing": "54.png is missing; 0.png to 54.png are needed",
               "no image": "3.png cannot be read", "size": "has 20×20 pixels, peak needs 28×28"}  # fmt: skip
    with pytest.raises(DataError, match=message[fault]):
        read_peaks(folder)


def test_what_is_measured_of_known_vectors():
    """A first layer made of two orthogonal images: both are singular vectors, and lie in the span."""
    x = torch.zeros(2, 16)
    x[0, :4], x[1, 8:12] = 200.0, 100.0
    network = nn.Sequential(nn.Linear(16, 12))
    with torch.no_grad():
        network[0].weight.copy_(torch.eye(12, 16) * 1e-3)
        network[0].weight[0], network[0].weight[1] = 3 * F.normalize(x[0], dim=0), -2 * F.normalize(x[1], dim=0)
    found = measured(network, Images(x, torch.arange(2), x, torch.arange(2), 4))
    np.testing.assert_allclose(np.max(found["cosines"], axis=0), [1, 1], atol=1e-5)
    assert np.argmax(found["cosines"], axis=0).tolist() == [0, 1]
    np.testing.assert_allclose(found["singular values"][:2], [3, 2], rtol=1e-3)
    np.testing.assert_allclose(found["span"], [1, 1], atol=1e-5)
    assert found["train accuracy"] == 0.5  # -2 is not the largest
    assert (found["vectors"][:2] @ x.T).amax(1).min() > 0


@pytest.mark.parametrize(("recipe", "module"), [("peak", peak), ("mnist-svd", mnist_svd)])
def test_reverse_training_embeds_the_classes(tmp_path, recipe, module):
    """What the recipes are about, in a few steps of a greater learning rate."""
    settings = replace(TINY, seeds=1, epochs=80, learning_rate=4e-4, lam=1e-6 if recipe == "peak" else 1e-5)
    folder = RunFolder(tmp_path / "out", recipe)
    content = module.run(settings, folder, command="racecar run")
    columns = columns_of(content["runs"], 1)
    for column in COLUMNS:
        assert columns["RR"][column][0] > columns["Std"][column][0] + 0.15, column
        assert columns["RR"][column][0] > columns["Ort"][column][0] + 0.15, column
    table = (folder.path / "table.md").read_text()
    assert "cosine, class 0 published" in table and "LPIPS is not measured" in table
    assert (folder.path / "vectors.png").read_bytes()[:4] == b"\x89PNG" and folder.finished
    assert json.loads((folder.path / "results.json").read_text())["runs"] == content["runs"]


def test_a_run_that_was_broken_off_keeps_what_was_finished(tmp_path, monkeypatch):
    whole = mnist_svd.run(TINY, RunFolder(tmp_path / "whole", "mnist-svd"))
    folder, trained, count = RunFolder(tmp_path / "broken", "mnist-svd"), features.trained, []

    def stops(kind, *rest):
        count.append(kind)
        if len(count) == 5:
            raise KeyboardInterrupt
        return trained(kind, *rest)

    monkeypatch.setattr(features, "trained", stops)
    with pytest.raises(KeyboardInterrupt):
        mnist_svd.run(TINY, folder)
    resumed = mnist_svd.run(TINY, folder, resume=True)
    assert count == [*KINDS, "Std", "Ort", "Ort", "RR"]

    def figures(content):
        return {name: {k: v for k, v in run.items() if k != "seconds"} for name, run in content["runs"].items()}

    assert figures(resumed) == figures(whole)


def test_lpips_is_measured_where_it_is_there(tmp_path, monkeypatch):
    def metric(a, b):
        assert a.shape == b.shape == (10, 3, 64, 64) and a.abs().max() <= 1
        return (a - b).square().mean((1, 2, 3), keepdim=True)

    fake = SimpleNamespace(LPIPS=lambda net, verbose: SimpleNamespace(eval=lambda: metric))
    monkeypatch.setitem(sys.modules, "lpips", fake)
    folder = RunFolder(tmp_path / "out", "mnist-svd")
    content = mnist_svd.run(TINY, folder)
    assert all(len(run["LPIPS"]) == 2 for run in content["runs"].values())
    assert "LPIPS to the nearest vector" in (folder.path / "table.md").read_text()
    x = torch.rand(2, 784)
    images = Images(255 * x, torch.arange(2), x, torch.arange(2), 28)
    own = images.classes() / 127.5 - 1
    assert perceptual_distances(metric, own.repeat(5, 1), images) == pytest.approx([0, 0], abs=1e-6)


def test_bad_input(tmp_path):
    with pytest.raises(SettingsError, match="nothing to choose by validation"):
        RECIPES["peak"].settings("quick", validate=True)
    with pytest.raises(SettingsError, match="epochs must be at least 1, got 0"):
        replace(TINY, epochs=0)
    np.savez(tmp_path / "colour.npz", x=np.zeros((40, 3, 8, 8), np.uint8), y=np.arange(40) % 2)
    with pytest.raises(DataError, match="square grey images, got 3 channels of 8×8"):
        mnist_svd.run(TINY, RunFolder(tmp_path / "a", "mnist-svd"), data=tmp_path / "colour.npz")
    random = np.random.default_rng(0).integers(0, 255, (8, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "few.npz", x=random, y=np.arange(8) % 2)
    with pytest.raises(DataError, match="needs 10 training images of the classes 0 and 1 for 9 seeds"):
        mnist_svd.run(replace(TINY, seeds=9), RunFolder(tmp_path / "b", "mnist-svd"), data=tmp_path / "few.npz")


@pytest.mark.parametrize("recipe", ["peak", "mnist-svd"])
def test_the_command_runs_it(tmp_path, recipe):
    result = invoke(recipe, "--quick", "--seeds", "1", "--out", str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    assert "| RR |" in plain(result.output)
    again = invoke(recipe, "--quick", "--out", str(tmp_path / "out"))
    assert again.exit_code == 2 and "holds a run that is finished" in plain(again.output)

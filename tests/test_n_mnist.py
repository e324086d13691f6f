"""n-MNIST as it is published, small files of the same layout, and what is said of damaged ones."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from racecar.data import DataError, load_images
from racecar.recipes import mnist
from racecar.recipes.study import PHASE_I, Settings

savemat = pytest.importorskip("scipy.io").savemat
TRAIN, TEST = 40, 20


def arrays(seed: int = 0, side: int = 28) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    made: dict[str, Any] = {}
    for half, count in (("train", TRAIN), ("test", TEST)):
        made[f"{half}_x"] = rng.integers(0, 256, (count, side * side), np.uint8)
        made[f"{half}_y"] = np.eye(10, dtype=np.uint8)[np.arange(count) % 10]
    return made


def write(folder: Path, content: dict[str, Any], packed: bool = False) -> Path:
    path = folder / "mnist-with-motion-blur.mat"
    savemat(path, content)
    if not packed:
        return path
    archive = path.with_suffix(".gz")
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(path, path.name)
    path.unlink()
    return archive


def idx(folder: Path) -> None:
    """The digits themselves, as the official MNIST files."""
    rng = np.random.default_rng(7)
    for name, count in (("train", TRAIN), ("t10k", TEST)):
        pixels = rng.integers(0, 256, (count, 28, 28), np.uint8)
        header = np.array([2051, count, 28, 28], ">i4").tobytes()
        (folder / f"{name}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        labels = (np.arange(count) % 10).astype(np.uint8)
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(np.array([2049, count], ">i4").tobytes() + labels.tobytes())


@pytest.mark.parametrize("packed", [False, True])
def test_read(packed: bool, tmp_path: Path) -> None:
    content = arrays()
    read = load_images(write(tmp_path, content, packed))
    assert read.classes == tuple("0123456789")
    assert read.image_shape == (1, 28, 28)
    expected = torch.from_numpy(content["train_x"]).reshape(TRAIN, 1, 28, 28) / 255
    torch.testing.assert_close(read.train_x, expected)
    assert read.test_y.tolist() == [i % 10 for i in range(TEST)]


def one_hot(**changed: Any) -> dict[str, Any]:
    return {**arrays(), **changed}


def marked_twice() -> Any:
    labels = arrays()["train_y"]
    labels[3, :2] = 1
    return labels


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"train_x": np.zeros((4, 4))}, "holds train_x; expected train_x, train_y, test_x, test_y"),
        (one_hot(train_x=np.zeros((TRAIN, 784))), "train_x is float64"),
        (one_hot(train_x=np.zeros((TRAIN, 783), np.uint8)), r"train_x is uint8 of shape \(40, 783\)"),
        (one_hot(test_y=np.eye(10, dtype=np.uint8)), r"test_y is uint8 of shape \(10, 10\); expected \(20, classes\)"),
        (one_hot(train_y=marked_twice()), "row 3 of train_y is .*; expected a single 1"),
        (
            one_hot(test_y=np.eye(12, dtype=np.uint8)[np.arange(TEST) % 10]),
            r"differ in the number of classes: \[10, 12",
        ),
    ],
)
def test_refused(content: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=said):
        load_images(write(tmp_path, content))


@pytest.mark.parametrize("packed", [False, True])
def test_cut_short(packed: bool, tmp_path: Path) -> None:
    path = write(tmp_path, arrays(), packed)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=r"mnist-with-motion-blur\.(mat|gz): .*not a readable"):
        load_images(path)


def test_an_archive_without_one(tmp_path: Path) -> None:
    archive = tmp_path / "mnist-with-motion-blur.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(__file__, "test.py")
    with pytest.raises(DataError, match=r"holds no \.mat file"):
        load_images(archive)


@pytest.mark.parametrize("packed", [False, True])
def test_the_recipe_takes_it_for_task_b(packed: bool, tmp_path: Path) -> None:
    idx(tmp_path)
    blurred_here = mnist.tasks(Settings(), tmp_path)
    content = arrays()
    write(tmp_path, content, packed)
    found = mnist.tasks(Settings(), tmp_path)
    assert "mnist-with-motion-blur" in found.notes[-1]
    expected = torch.from_numpy(content["test_x"]).reshape(TEST, 1, 28, 28) / 255
    torch.testing.assert_close(found.of["AB"].test_x, expected)
    torch.testing.assert_close(found.of[PHASE_I].test_x, blurred_here.of[PHASE_I].test_x)
    assert found.fingerprint != blurred_here.fingerprint


def test_the_recipe_refuses_other_shapes(tmp_path: Path) -> None:
    idx(tmp_path)
    write(tmp_path, arrays(side=8))
    with pytest.raises(DataError, match=r"has images of shape \(1, 8, 8\), the digits beside it \(1, 28, 28\)"):
        mnist.tasks(Settings(), tmp_path)

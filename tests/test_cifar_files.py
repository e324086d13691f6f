"""The official CIFAR files, small ones of the same layout, and what is said of damaged ones."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from racecar.data import DataError, cifar10_1, load_images
from racecar.data.cifar import KINDS, Kind, OnlyArrays

PER_FILE = {10: 20, 100: 200}
each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.folder)


def batch(kind: Kind, seed: int) -> tuple[np.ndarray, list[int]]:
    rng = np.random.default_rng(seed)
    count = PER_FILE[kind.classes]
    return rng.integers(0, 256, (count, 3072), np.uint8), [i % kind.classes for i in range(count)]


def content(kind: Kind, pixels: np.ndarray, labels: list[int]) -> bytes:
    if not kind.labels:
        coarse = [bytes(kind.before) for _ in labels]
        return b"".join(c + bytes([i]) + row.tobytes() for c, i, row in zip(coarse, labels, pixels, strict=True))
    # as Python 2 wrote them: names of numpy's old modules, keys as bytes
    written = pickle.dumps({b"data": pixels, kind.labels.encode(): labels, b"batch_label": b"x"}, protocol=2)
    return written.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def write(kind: Kind, folder: Path) -> Path:
    place = folder / kind.folder
    place.mkdir(parents=True)
    for seed, name in enumerate((*kind.train, *kind.test)):
        (place / name).write_bytes(content(kind, *batch(kind, seed)))
    names = [f"class{i}" for i in range(kind.classes)]
    if kind.meta:
        (place / kind.names).write_bytes(pickle.dumps({kind.meta.encode(): [n.encode() for n in names]}, protocol=2))
    else:
        (place / kind.names).write_text("\n".join(names) + "\n\n")
    return place


@each_kind
@pytest.mark.parametrize("how", ["the folder", "the folder around it", "the archive"])
def test_read(kind: Kind, how: str, tmp_path: Path) -> None:
    place = write(kind, tmp_path)
    if how == "the archive":
        with tarfile.open(tmp_path / kind.archive, "w:gz") as archive:
            archive.add(place, kind.folder)
        place = tmp_path / kind.archive
    read = load_images(tmp_path if how == "the folder around it" else place)
    assert read.name == kind.title
    assert read.classes == tuple(f"class{i}" for i in range(kind.classes))
    pixels, labels = batch(kind, 0)
    assert torch.equal(read.train_y[: len(labels)], torch.tensor(labels))
    expected = torch.from_numpy(pixels[3].reshape(3, 32, 32).astype(np.float32)) / 255
    assert torch.equal(read.train_x[3], expected), "the file has one channel behind the other"
    assert len(read.train_y) == len(kind.train) * PER_FILE[kind.classes]
    assert len(read.test_y) == PER_FILE[kind.classes]


def test_cifar_10_where_both_are_there(tmp_path: Path) -> None:
    write(KINDS[0], tmp_path)
    write(KINDS[2], tmp_path)
    assert load_images(tmp_path, limit=50).name == "CIFAR-10"


@each_kind
def test_cut_short(kind: Kind, tmp_path: Path) -> None:
    place = write(kind, tmp_path)
    file = place / kind.train[0]
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataError, match=f"{kind.train[0]}: .*(cut short|not readable)"):
        load_images(place)


@each_kind
def test_missing(kind: Kind, tmp_path: Path) -> None:
    place = write(kind, tmp_path)
    for name in (kind.train[-1], kind.names):  # beside a folder of CIFAR-10, less than all would go unnoticed
        (place / name).unlink()
        with pytest.raises(DataError, match=f"holds no .*{name}.* of {kind.title}; fetch the archive again"):
            load_images(place)


@each_kind
def test_a_label_that_there_is_not(kind: Kind, tmp_path: Path) -> None:
    place = write(kind, tmp_path)
    pixels, labels = batch(kind, 0)
    (place / kind.train[0]).write_bytes(content(kind, pixels, [kind.classes, *labels[1:]]))
    with pytest.raises(DataError, match=f"lie in 0 .. {kind.classes - 1}, found {kind.classes}"):
        load_images(place)


@each_kind
def test_names_missing(kind: Kind, tmp_path: Path) -> None:
    place = write(kind, tmp_path)
    own = pickle.dumps({kind.meta.encode(): [b"one"]}, protocol=2) if kind.meta else b"one\n"
    (place / kind.names).write_bytes(own)
    with pytest.raises(DataError, match=f"has {kind.classes} classes, found 1 names"):
        load_images(place)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({b"data": np.zeros((20, 3072), np.float32), b"labels": [0] * 20}, "must be uint8 .* found float32"),
        ({b"data": np.zeros((20, 100), np.uint8), b"labels": [0] * 20}, r"found uint8 \(20, 100\)"),
        ({b"data": np.zeros((20, 3072), np.uint8), b"labels": [0] * 19}, "20 whole numbers"),
        ({b"labels": [0]}, "found NoneType"),
        ([1, 2], "must hold a dictionary, found list"),
    ],
)
def test_other_content(given: object, said: str, tmp_path: Path) -> None:
    place = write(KINDS[0], tmp_path)
    written = pickle.dumps(given, protocol=2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    (place / "data_batch_1").write_bytes(written)
    with pytest.raises(DataError, match=f"data_batch_1: .*{said}"):
        load_images(place)


class Runs:
    def __reduce__(self):
        return os.mkdir, ("run_by_a_pickle",)


def test_a_pickle_that_would_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    place = write(KINDS[0], tmp_path)
    (place / "data_batch_1").write_bytes(pickle.dumps(Runs()))
    with pytest.raises(DataError, match="asks for .*mkdir"):
        load_images(place)
    assert not (tmp_path / "run_by_a_pickle").exists()


def test_arrays_of_today_are_read_too() -> None:
    array = np.arange(6, dtype=np.uint8).reshape(2, 3)
    for protocol in (2, 3, 4):
        found = OnlyArrays(io.BytesIO(pickle.dumps({b"a": array}, protocol=protocol)), encoding="bytes").load()
        assert np.array_equal(found[b"a"], array)


def test_an_archive_cut_short(tmp_path: Path) -> None:
    place = write(KINDS[1], tmp_path)
    archive = tmp_path / KINDS[1].archive
    with tarfile.open(archive, "w:gz") as file:
        file.add(place, KINDS[1].folder)
    archive.write_bytes(archive.read_bytes()[:5000])
    with pytest.raises(DataError, match="not a readable archive, or cut short"):
        load_images(archive)


def newer(folder: Path, pixels: np.ndarray, labels: np.ndarray) -> Path:
    np.save(folder / "cifar10.1_v6_data.npy", pixels)
    np.save(folder / "cifar10.1_v6_labels.npy", labels)
    return folder


def test_cifar_10_1(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (7, 32, 32, 3), np.uint8)
    x, y = cifar10_1(newer(tmp_path, pixels, np.arange(7, dtype=np.int32)))
    assert x.shape == (7, 3, 32, 32)
    assert float(x[2, 1, 5, 6]) == pytest.approx(pixels[2, 5, 6, 1] / 255)
    assert y.tolist() == list(range(7))


@pytest.mark.parametrize(
    ("pixels", "labels", "said"),
    [
        (np.zeros((7, 3, 32, 32), np.uint8), np.zeros(7, int), "are uint8"),
        (np.zeros((7, 32, 32, 3), np.float32), np.zeros(7, int), "found float32"),
        (np.zeros((7, 32, 32, 3), np.uint8), np.zeros(6, int), "as many"),
        (np.zeros((7, 32, 32, 3), np.uint8), np.full(7, 10), "lie in 0 .. 9"),
    ],
)
def test_another_cifar_10_1(pixels: np.ndarray, labels: np.ndarray, said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=said):
        cifar10_1(newer(tmp_path, pixels, labels))


def test_no_cifar_10_1(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no cifar10"):
        cifar10_1(tmp_path)
    (tmp_path / "cifar10.1_v6_data.npy").write_bytes(b"nothing")
    with pytest.raises(DataError, match="no readable array"):
        cifar10_1(tmp_path)

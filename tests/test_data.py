"""Reading image data: every kind of source, every kind of damage, and the motion blur."""

from __future__ import annotations

import gzip
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from racecar.data import DataError, load_images, motion_blur, motion_kernel
from racecar.data.images import stratified_split, stratified_subsample

SHARED = Path(__file__).parents[2] / "shared" / "data"


def write_image(path: Path, value: int, size: tuple[int, int] = (8, 6), mode: str = "L") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = value if mode == "L" else (value, 0, 255 - value)
    Image.new(mode, size, colour).save(path)


def write_folder(root: Path, counts: dict[str, int], **options: object) -> Path:
    for c, (name, count) in enumerate(counts.items()):
        for i in range(count):
            write_image(root / name / f"{i}.png", 10 * c + i, **options)  # type: ignore[arg-type]
    return root


def zip_folder(root: Path, target: Path) -> Path:
    with zipfile.ZipFile(target, "w") as archive:
        for file in sorted(root.rglob("*.*")):
            archive.write(file, file.relative_to(root))
    return target


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def write_mnist(root: Path, zipped: bool = True) -> Path:
    root.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for half, count in (("train", 40), ("t10k", 20)):
        images = rng.integers(0, 256, (count, 7, 5))
        for name, array in ((f"{half}-images-idx3-ubyte", images), (f"{half}-labels-idx1-ubyte", np.arange(count) % 4)):
            content = idx_bytes(array)
            (root / (name + ".gz" * zipped)).write_bytes(gzip.compress(content) if zipped else content)
    return root


# --- splits


def test_digits_are_split_in_half_with_every_class_in_both():
    data = load_images()
    assert data.found == (899, 898)
    assert data.image_shape == (1, 8, 8)
    assert data.train_x.dtype == torch.float32 and data.train_y.dtype == torch.int64
    assert (data.train_x.min(), data.train_x.max()) == (0, 1)
    for labels in (data.train_y, data.test_y):
        assert torch.bincount(labels).min() >= 80
    assert "1,797 images of 10 classes" in data.describe()
    assert any("50%" in note for note in data.notes)


def test_split_and_subsample_are_seeded_and_stratified():
    labels = np.repeat(np.arange(3), [50, 30, 2])
    train, test = stratified_split(labels, 0.2, seed=1)
    assert sorted([*train, *test]) == list(range(82))
    assert np.bincount(labels[test]).tolist() == [10, 6, 1]
    assert np.array_equal(test, stratified_split(labels, 0.2, seed=1)[1])
    assert not np.array_equal(test, stratified_split(labels, 0.2, seed=2)[1])
    kept = stratified_subsample(labels, 10, seed=0)
    assert np.bincount(labels[kept]).tolist() == [6, 3, 1]
    assert stratified_subsample(labels, 82, seed=0).tolist() == list(range(82))


def test_limit_keeps_every_class_and_says_so():
    data = load_images(limit=100)
    assert 90 <= len(data.train_y) <= 100 and 40 <= len(data.test_y) <= 50
    assert len(torch.unique(data.train_y)) == 10
    assert data.found == (899, 898)
    assert any("of 899" in note for note in data.notes)
    with pytest.raises(DataError, match=r"limit is 9.*10 classes"):
        load_images(limit=9)


@pytest.mark.parametrize(("option", "message"), [("limit", "limit"), ("size", "size"), ("max_side", "max_side")])
def test_numbers_below_one_are_refused(option, message):
    with pytest.raises(DataError, match=f"{message} must be at least 1, got 0"):
        load_images(**{option: 0})


def test_test_fraction_is_checked():
    with pytest.raises(DataError, match="between 0 and 1, got 1"):
        load_images(test_fraction=1)


# --- paths


def test_missing_path_and_unknown_kinds(tmp_path):
    with pytest.raises(DataError, match=r"no such file or folder: .*nowhere"):
        load_images(tmp_path / "nowhere")
    (tmp_path / "data.csv").write_text("1,2")
    with pytest.raises(DataError, match=r"data\.csv: unknown kind of data; expected"):
        load_images(tmp_path / "data.csv")
    with pytest.raises(DataError, match="unknown kind of data: no image found"):
        load_images(tmp_path)


# --- MNIST files


@pytest.mark.parametrize("zipped", [True, False])
def test_mnist_files(tmp_path, zipped):
    data = load_images(write_mnist(tmp_path / "digits", zipped))
    assert data.name == "digits"
    assert data.train_x.shape == (40, 1, 7, 5) and data.test_x.shape == (20, 1, 7, 5)
    assert data.classes == ("0", "1", "2", "3")
    assert data.train_y[:5].tolist() == [0, 1, 2, 3, 0]
    want = np.random.default_rng(0).integers(0, 256, (40, 7, 5))
    torch.testing.assert_close(data.train_x[:, 0], torch.tensor(want / 255, dtype=torch.float32))


def test_mnist_file_missing(tmp_path):
    (write_mnist(tmp_path / "m") / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match="t10k-labels-idx1-ubyte missing"):
        load_images(tmp_path / "m")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (idx_bytes(np.zeros((40, 7, 5)))[:-1], "header says 40 × 7 × 5 bytes, 1399 follow"),
        (b"\x00\x00\x08\x03\x00", "cut short inside its header"),
        (b"<html>not found</html>", "not an idx file"),
        (b"", "not an idx file"),
        (idx_bytes(np.zeros((39, 7, 5))), r"labels of shape \(40,\) do not go with images of shape \(39, 7, 5\)"),
        (idx_bytes(np.zeros((40, 6, 5))), "training and test images differ in size"),
    ],
)
def test_damaged_mnist_files(tmp_path, content, message):
    (write_mnist(tmp_path / "m", zipped=False) / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_images(tmp_path / "m")


def test_mnist_gzip_cut_short(tmp_path):
    path = write_mnist(tmp_path / "m") / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz: corrupt or cut short"):
        load_images(tmp_path / "m")


# --- archives


def test_npz_with_a_split_and_without(tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (30, 6, 6, 3), dtype=np.uint8), np.array(["cat", "dog", "eel"] * 10)
    np.savez(tmp_path / "a.npz", x_train=x[:20], y_train=y[:20], x_test=x[20:], y_test=y[20:])
    data = load_images(tmp_path / "a.npz")
    assert data.classes == ("cat", "dog", "eel")
    assert data.train_x.shape == (20, 3, 6, 6)
    assert data.test_y.tolist() == [2, 0, 1] * 3 + [2]
    torch.testing.assert_close(data.train_x, torch.tensor(x[:20].transpose(0, 3, 1, 2) / 255, dtype=torch.float32))
    np.savez(tmp_path / "b.npz", x=x.transpose(0, 3, 1, 2) / 255, y=np.arange(30) % 3.0)
    data = load_images(tmp_path / "b.npz")
    assert data.found == (24, 6) and data.classes == ("0", "1", "2")
    assert data.image_shape == (3, 6, 6)
    assert data.train_x.max() <= 1


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": np.zeros(3)}, "holds a; expected x_train"),
        ({"x": np.zeros((4, 2, 2)), "y": np.zeros(3)}, "one label for each of the 4 images in x"),
        ({"x": np.zeros((4, 2)), "y": np.zeros(4)}, r"shape \(4, 2\); expected numbers"),
        ({"x": np.zeros((4, 5, 5, 2)), "y": np.zeros(4)}, "neither 1 nor 3 channels"),
        ({"x": -np.ones((4, 5, 5)), "y": np.zeros(4)}, "negative or not finite"),
        ({"x": np.full((4, 5, 5), np.nan), "y": np.zeros(4)}, "negative or not finite"),
        (
            {"x_train": np.ones((4, 5, 5)), "y_train": [0, 1] * 2, "x_test": np.ones((4, 4, 5)), "y_test": [0, 1] * 2},
            "differ in shape",
        ),
        ({"x": np.array([None, "a"]), "y": np.zeros(2)}, "not a readable .npz"),
        ({"x": np.ones((2, 5, 5)), "y": [1, 0.5]}, "y holds float64 with values such as 0.5; .*integers or strings"),
        ({"x": np.ones((2, 5, 5)), "y": [1, np.nan]}, "values such as nan; labels must be integers or strings"),
        ({"x": np.ones((2, 5, 5)), "y": [1, 1j]}, "y holds complex128; labels must be integers or strings"),
    ],
)
def test_unusable_npz(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=message):
        load_images(tmp_path / "a.npz")


def test_damaged_npz(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(DataError, match=r"a\.npz: not a readable \.npz"):
        load_images(tmp_path / "a.npz")


# --- folders and zips


def test_folder_is_split_and_its_zip_reads_the_same(tmp_path):
    root = write_folder(tmp_path / "pets", {"cat": 10, "dog": 5})
    (root / "cat" / "notes.txt").write_text("no image")
    (root / "cat" / ".hidden.png").write_text("no image")
    data = load_images(root)
    assert data.name == "pets" and data.classes == ("cat", "dog")
    assert data.found == (12, 3)
    assert data.image_shape == (1, 6, 8)
    zipped = load_images(zip_folder(root, tmp_path / "pets.zip"))
    torch.testing.assert_close(zipped.train_x, data.train_x)
    torch.testing.assert_close(zipped.test_y, data.test_y)


def test_folder_with_train_and_test(tmp_path):
    write_folder(tmp_path / "pets" / "train", {"cat": 3, "dog": 3}, mode="RGB")
    write_folder(tmp_path / "pets" / "test", {"cat": 1, "dog": 2}, mode="RGB")
    data = load_images(tmp_path / "pets")
    assert data.found == (6, 3) and data.image_shape == (3, 6, 8)
    assert load_images(zip_folder(tmp_path / "pets", tmp_path / "p.zip")).found == (6, 3)
    zips = tmp_path / "zips"
    zips.mkdir()
    for half in ("train", "test"):
        zip_folder(tmp_path / "pets" / half, zips / f"{half}.zip")
    again = load_images(zips)
    torch.testing.assert_close(again.train_x, data.train_x)
    (zips / "test.zip").unlink()
    assert sum(load_images(zips).found) == 6


@pytest.mark.parametrize("damage", ["cut", "text"])
def test_corrupt_image_is_named_in_folder_and_zip(tmp_path, damage):
    root = write_folder(tmp_path / "pets", {"cat": 4, "dog": 4}, size=(20, 20))
    bad = root / "dog" / "2.png"
    bad.write_bytes(bad.read_bytes()[:50] if damage == "cut" else b"hello")
    with pytest.raises(DataError, match=r"pets/dog/2\.png: corrupt image \([^<>]+\w\)$"):
        load_images(root)
    with pytest.raises(DataError, match=r"dog/2\.png inside .*pets\.zip: corrupt image"):
        load_images(zip_folder(root, tmp_path / "pets.zip"))


def test_damaged_zip(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"not a zip")
    with pytest.raises(DataError, match=r"a\.zip: not a readable zip"):
        load_images(tmp_path / "a.zip")
    # Intact directory, damaged bytes of one image: the checksum finds it.
    root = write_folder(tmp_path / "pets", {"cat": 2, "dog": 2})
    path = zip_folder(root, tmp_path / "b.zip")
    content = bytearray(path.read_bytes())
    at = content.index(b"IDAT") + 6
    content[at] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"0\.png inside .*b\.zip: corrupt image"):
        load_images(path)


def test_image_outside_a_class_folder(tmp_path):
    write_image(write_folder(tmp_path, {"cat": 2, "dog": 2}) / "loose.png", 1)
    with pytest.raises(DataError, match=r"loose\.png: lies in no class folder"):
        load_images(tmp_path)


def test_too_few_classes_or_images(tmp_path):
    with pytest.raises(DataError, match=r"found 1 class \(cat\); at least 2"):
        load_images(write_folder(tmp_path / "one", {"cat": 3}))
    with pytest.raises(DataError, match=r"class 'dog' has 1 image; at least 2 are needed"):
        load_images(write_folder(tmp_path / "few", {"cat": 3, "dog": 1}))
    write_folder(tmp_path / "split" / "train", {"cat": 3, "dog": 3})
    write_folder(tmp_path / "split" / "test", {"cat": 3})
    write_folder(tmp_path / "split" / "test", {"Dog": 3, "eel": 3})
    with pytest.raises(DataError, match="same classes, .* alone: only in train: dog; only in test: Dog, eel"):
        load_images(tmp_path / "split")


def test_sizes_differ(tmp_path):
    root = write_folder(tmp_path, {"cat": 3, "dog": 3})
    write_image(root / "dog" / "1.png", 7, size=(9, 6))
    with pytest.raises(DataError, match=r"dog/1\.png is 6×9, .*cat/0\.png is 6×8.*--size N"):
        load_images(root)
    data = load_images(root, size=4)
    assert data.image_shape == (1, 4, 4)
    assert any("resized to 4×4" in note for note in data.notes)


def test_large_images_shrink_in_proportion(tmp_path):
    data = load_images(write_folder(tmp_path, {"cat": 2, "dog": 2}, size=(80, 40)), max_side=20)
    assert data.image_shape == (1, 10, 20)


@pytest.mark.parametrize(("most", "other", "grey"), [("RGB", "L", 1), ("L", "RGB", 5)])
def test_grey_among_colour_becomes_colour_and_nothing_is_lost(tmp_path, most, other, grey):
    root = write_folder(tmp_path, {"cat": 3, "dog": 3}, mode=most)
    write_image(root / "dog" / "1.png", 51, mode=other)
    data = load_images(root, test_fraction=0.34)
    assert data.train_x.shape[1] == data.test_x.shape[1] == 3
    assert f"Grey and colour images are mixed: the {grey} grey ones used became colour." in data.notes
    images = torch.cat([data.train_x, data.test_x])
    own = (images[:, 0, 0, 0] == torch.tensor(51 / 255)).nonzero().flatten()
    assert len(own) == 1
    values = images[own[0], :, 0, 0]
    torch.testing.assert_close(values, torch.tensor([51, 51, 51] if other == "L" else [51, 0, 204]) / 255)


def test_images_of_one_kind_say_nothing_of_colours(tmp_path):
    assert not any("mixed" in note for note in load_images(write_folder(tmp_path, {"a": 2, "b": 2})).notes)


def test_sixteen_bit_images_keep_their_range(tmp_path):
    for name, value in (("a", 0), ("a", 65535), ("b", 32768), ("b", 32767)):
        (tmp_path / name).mkdir(exist_ok=True)
        Image.fromarray(np.full((5, 5), value, np.uint16)).save(tmp_path / name / f"{value}.png")
    data = load_images(tmp_path, test_fraction=0.5)
    values = torch.cat([data.train_x, data.test_x]).amax((1, 2, 3)).sort().values
    torch.testing.assert_close(values, torch.tensor([0, 127, 128, 255]) / 255)


def test_oversized_image_is_named(tmp_path, monkeypatch):
    root = write_folder(tmp_path, {"cat": 2, "dog": 2}, size=(40, 40))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DataError, match=r"cat/0\.png: image too large"):
        load_images(root)


@pytest.mark.parametrize(
    ("path", "options", "found"),
    [
        ("mnist", {"limit": 200}, (60_000, 10_000)),
        ("cifar10-jpeg", {"limit": 100}, (50_000, 10_000)),
        ("texture-shape/stylized-128.zip", {"limit": 100, "max_side": 32}, (1024, 256)),
    ],
)
def test_real_data(path, options, found):
    if not (SHARED / path).exists():
        pytest.skip(f"{path} is not on this machine")
    data = load_images(SHARED / path, **options)
    assert data.found == found
    assert data.train_x.min() >= 0 and data.train_x.max() <= 1


# --- motion blur


def test_kernel_of_a_horizontal_motion_is_a_box():
    torch.testing.assert_close(motion_kernel(3), torch.tensor([[0, 0, 0], [1, 1, 1], [0, 0, 0]]) / 3)
    torch.testing.assert_close(motion_kernel(3, 90), motion_kernel(3).T)
    torch.testing.assert_close(motion_kernel(1, 30), torch.ones(1, 1))


@pytest.mark.parametrize("length", [1.5, 2, 4, 7.3])
@pytest.mark.parametrize("angle", [0, 15, 45, 100, -30])
def test_kernel_sums_to_one_and_is_symmetric(length, angle):
    kernel = motion_kernel(length, angle)
    assert kernel.shape[0] == kernel.shape[1] and kernel.shape[0] % 2 == 1
    torch.testing.assert_close(kernel.sum(), torch.tensor(1.0))
    torch.testing.assert_close(kernel, kernel.flip(0, 1), atol=2e-3, rtol=0)


def test_angle_turns_counter_clockwise():
    kernel = motion_kernel(5, 45)
    assert kernel[0, -1] > 0 and kernel[0, 0] == 0


def test_blur_is_per_channel_and_keeps_shape_and_range():
    x = torch.rand(4, 3, 9, 12, generator=torch.Generator().manual_seed(0))
    y = motion_blur(x, 5, 20)
    assert y.shape == x.shape and y.min() >= 0 and y.max() <= 1 + 1e-6
    torch.testing.assert_close(motion_blur(x[:, 1:2], 5, 20), y[:, 1:2])
    torch.testing.assert_close(motion_blur(x, 1), x)
    point = torch.zeros(1, 1, 7, 7)
    point[0, 0, 3, 3] = 1
    torch.testing.assert_close(motion_blur(point, 3)[0, 0, 3], torch.tensor([0, 0, 1, 1, 1, 0, 0]) / 3)


@pytest.mark.parametrize(("length", "angle"), [(5, 20), (12, 15), (30, -70), (9, 90)])
def test_long_blurs_take_another_way_to_the_same_images(monkeypatch, length, angle):
    x = torch.rand(2, 3, 9, 12, generator=torch.Generator().manual_seed(0))
    want = motion_blur(x, length, angle)
    monkeypatch.setattr("racecar.data.blur.LARGEST_DENSE_KERNEL", 1)
    torch.testing.assert_close(motion_blur(x, length, angle), want)


@pytest.mark.parametrize(("length", "angle"), [(0.5, 0), (float("nan"), 0), (float("inf"), 0), (3, float("nan"))])
def test_blur_checks_its_numbers(length, angle):
    with pytest.raises(ValueError, match="blur"):
        motion_kernel(length, angle)


@pytest.mark.parametrize("images", [torch.zeros(3, 8, 8), torch.zeros(1, 1, 8, 8, dtype=torch.uint8)])
def test_blur_checks_its_images(images):
    with pytest.raises(ValueError, match="images must be floating point of shape"):
        motion_blur(images, 3)


def test_groups_are_not_parted(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("bear", "car"):
        (tmp_path / name).mkdir()
        for i in range(40):
            pixels = rng.integers(0, 256, (4, 4), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{name}{i % 8}-{i}.png")
    read = load_images(tmp_path, test_fraction=0.25, group=lambda name: name.partition("-")[0])
    assert (len(read.train_y), len(read.test_y)) == (60, 20)
    trained = {name.partition("-")[0] for name in read.train_names}
    assert len(trained) == 12, "two of eight groups of either class are held out"
    assert any("whole groups" in note for note in read.notes)
    again = load_images(tmp_path, test_fraction=0.25, group=lambda name: name.partition("-")[0])
    assert again.train_names == read.train_names
    with pytest.raises(DataError, match="all 40 images of class 0 are of one group"):
        load_images(tmp_path, group=lambda name: "all")
    with pytest.raises(DataError, match="holds no image files"):
        load_images("digits", group=str)

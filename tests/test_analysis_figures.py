"""What `racecar.analysis` draws, and the example of its page."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from racecar.analysis import (
    InformationPlane,
    Modes,
    MutualInformationPlane,
    reconstructions,
    reversibility,
    singular_vectors,
)
from racecar.analysis.pictures import Row, as_images, draw_rows, grey_levels, mosaic, signed_levels

PAGE = Path(__file__).parents[1] / "docs" / "analysis.md"


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2), nn.Conv2d(3, 2, 3), nn.ReLU())


def images(count: int = 12) -> torch.Tensor:
    return torch.rand(count, 1, 6, 6, generator=torch.Generator().manual_seed(1))


def recorded() -> MutualInformationPlane:
    plane = MutualInformationPlane(images(), torch.arange(12) % 3)
    plane.record(chain(), 0)
    plane.record(chain(), 4)
    return plane


LOOKS = {
    "reversibility": lambda: reversibility(chain(), images()),
    "reconstructions": lambda: reconstructions(chain(), images()),
    "singular vectors": lambda: singular_vectors(chain(), images()),
    "modes": lambda: singular_vectors(chain(), images()).layer,
    "recorder": recorded,
    "plane": lambda: recorded().result,
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_every_look_draws_into_a_figure_of_its_own_or_where_it_is_told(look, tmp_path):
    found = look()
    figure = found.plot()
    assert isinstance(figure, Figure) and figure.axes[0].has_data()
    figure.savefig(tmp_path / "own.png")
    assert (tmp_path / "own.png").stat().st_size > 1000
    mine = Figure()
    left, right = mine.subplots(1, 2)
    assert found.plot(right) is mine and right.has_data() and not left.has_data()
    part = mine.subfigures(1, 2)[0].subplots()
    assert found.plot(part) is mine and part.has_data()


def test_errors_are_drawn_over_the_layers():
    found = reversibility(chain(), images())
    (axes,) = found.plot().axes
    local, full = axes.get_lines()
    np.testing.assert_array_equal(local.get_ydata(), found.local)
    np.testing.assert_array_equal(full.get_ydata(), found.full)
    assert [label.get_text() for label in axes.get_xticklabels()] == list(found.names) == ["0", "3"]
    assert found[:1] == (found[0],) and len(found) == 2 and found.local[1] == found[1].local


def test_the_plane_is_drawn_with_a_colour_for_every_epoch():
    plane = InformationPlane(
        ("a", "b"), np.array([1.0, 5.0]), np.array([[3.0, 1], [3, 2]]), np.array([[1.0, 0], [1, 0.5]])
    )
    axes, colours = plane.plot().axes
    assert colours.get_ylabel() == "epoch" and axes.get_xlabel() == "I(X; D), bits"
    np.testing.assert_array_equal(
        [line.get_xydata() for line in axes.get_lines()], [[[3, 1], [1, 0]], [[3, 1], [2, 0.5]]]
    )
    drawn = [points for points in axes.collections if len(points.get_offsets())]
    np.testing.assert_array_equal([points.get_offsets() for points in drawn], [[[3, 1], [3, 1]], [[1, 0], [2, 0.5]]])
    assert all(points.get_array().tolist() == [1.0, 5.0] and points.get_clim() == (1.0, 5.0) for points in drawn)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b"]
    once = InformationPlane(("a",), np.array([1.0]), np.array([[3.0]]), np.array([[1.0]]))
    assert len(once.plot().axes) == 1  # one epoch needs no scale of colours


def test_reconstructions_are_drawn_with_their_gain():
    found = reconstructions(chain(), images())
    (axes,) = found.plot(count=3).axes
    picture = axes.get_images()[0].get_array()
    assert [label.get_text().split("\n")[0] for label in axes.get_yticklabels()] == [
        "input",
        "from layer 0",
        "from layer 3",
    ]
    rows = [found.inputs[:3], *(found.images[i, :3] * found.gain[i] for i in range(2))]
    np.testing.assert_array_equal(picture, mosaic([Row("", row, grey_levels) for row in rows])[0])


def test_mosaic_places_every_image():
    white, black = np.ones((2, 1, 4, 5), np.float32), np.zeros((3, 1, 4, 5), np.float32)
    picture, centres = mosaic([Row("a", white, grey_levels), Row("b", black, grey_levels)])
    assert picture.shape == (4 + 1 + 4, 3 * 5 + 2, 3) and centres == [1.5, 6.5]
    assert (picture[:5] == 255).all()  # white images, and white where the shorter row ends
    assert (picture[5:, [5, 11]] == 255).all() and picture[5:].sum() == 2 * 4 * 3 * 255


def test_vectors_are_drawn_where_their_shape_is_given():
    net, x = nn.Sequential(nn.Linear(12, 4), nn.Tanh()), torch.rand(5, 12)
    for look in (reconstructions(net, x), singular_vectors(net, x), singular_vectors(net, x).layer):
        assert look.plot(image_shape=(3, 4)).axes[0].has_data()
        with pytest.raises(ValueError, match=r"drawing needs images.* these are \(12,\); give image_shape="):
            look.plot()
        with pytest.raises(ValueError, match=r"these are \(12,\), and image_shape=\(4, 4\) does not make images"):
            look.plot(image_shape=(4, 4))
    with pytest.raises(ValueError, match=r"these are \(2, 5, 5\)"):  # two channels have no colours
        as_images(np.zeros((1, 2, 5, 5)))
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        reconstructions(net, x).plot(count=0, image_shape=(3, 4))


def test_values_that_are_not_finite_are_drawn_all_the_same():
    broken = Modes(np.full((2, 1, 3, 3), np.nan, np.float32), np.zeros(2, np.float32))
    assert (broken.plot().axes[0].get_images()[0].get_array()[:, :3] == 247).all()
    assert draw_rows([Row("colour", np.zeros((1, 3, 2, 2)), signed_levels)]).axes[0].has_data()


def test_matplotlib_is_imported_by_plot_alone(monkeypatch):
    code = "import sys, racecar.analysis; print({'matplotlib', 'scipy'} & set(sys.modules))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=paths()).stdout
        == "set()\n"
    )
    found = reversibility(chain(), images())
    for module in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    with pytest.raises(
        ModuleNotFoundError, match=r"drawing needs matplotlib, .*: pip install 'racecar-kernels\[demo\]'"
    ):
        found.plot()


def test_scipy_is_named_where_it_is_missing(monkeypatch):
    for module in ("scipy", "scipy.sparse", "scipy.sparse.linalg"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match="inputs of more than 1024 values needs scipy, .*pip install"):
        singular_vectors(nn.Linear(1025, 2), torch.rand(2, 1025))


def paths() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def test_the_example_of_the_page_runs(tmp_path, monkeypatch):
    (example,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert "range(61)" in example
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng(devices=[]):
        names: dict[str, object] = {}
        exec(example.replace("range(61)", "range(3)"), names)
    assert (tmp_path / "inside.png").stat().st_size > 10_000
    plane = names["plane"]
    assert plane.result.epochs.tolist() == [0.0, 1.0, 2.0] and plane.result.names == ("D1", "D2", "D3", "D4", "D5")
